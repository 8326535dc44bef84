"""Workers for the trials of a search: local processes, or those of a Dask cluster."""

import functools
import os
from collections.abc import Callable, Mapping
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import torch
from torch import nn

from was_fx.modules.auto_class import auto_class_of
from was_fx.schedules.files.schedule import Schedule


@dataclass(frozen=True)
class RemoteEvaluator:
    """What a worker needs to evaluate trials. The model is loaded once per process and kept.

    Attributes:
        checkpoint: directory or Hub name of the model, found by every worker.
        dtype: of the weights, `float32`.
        device: where it runs.
        schedule: the model is sparsified with it first; its fingerprint proves that the checkpoint is the same model.
        tokens: the validation windows, rows of token ids.
        batch_size: windows per forward pass.
    """

    checkpoint: str
    dtype: str
    device: str
    schedule: Schedule
    tokens: tuple[tuple[int, ...], ...]
    batch_size: int

    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Evaluate a trial; see `TrialEvaluator`."""
        schedule = self.schedule
        key = (self.checkpoint, self.dtype, self.device, self.tokens, schedule.norm, tuple(schedule.linears))
        evaluate = _evaluators.get(key)
        if evaluate is None:
            _evaluators.clear()
            evaluate = _evaluators[key] = self._load()
        return evaluate(inputs)

    def _load(self) -> Any:
        from was_fx.searching.trial_evaluation import TrialEvaluator
        from was_fx.sparse.sparsify import sparsify

        kind = auto_class_of(str(self.schedule.metadata.fingerprint.get("architecture")))
        model: Any = kind.from_pretrained(self.checkpoint, dtype=getattr(torch, self.dtype))
        model = sparsify(model.to(self.device).eval(), self.schedule)
        tokens = torch.tensor(self.tokens, dtype=torch.long)
        return TrialEvaluator(model, self.schedule, tokens, batch_size=self.batch_size)


# The evaluator that this process has loaded, by what tells its search from others.
_evaluators: dict[tuple[Any, ...], Any] = {}


def checkpoint_of(model: nn.Module) -> str:
    """Where workers find the model.

    Raises:
        ValueError: it was not loaded from a checkpoint, or was quantised since.
    """
    name = getattr(getattr(model, "config", None), "name_or_path", "")
    if not name or getattr(model, "was_quantised_here", False):
        raise ValueError(
            "workers load the model by themselves, but this one comes from no checkpoint; save it with "
            "save_pretrained(directory) and load it from there, or search without workers"
        )
    return os.fspath(name)


def local_processes(count: int) -> Callable[[], Executor]:
    """Opens a pool of `count` processes, which share this machine's cores.

    A process dies without harm: the pool is opened anew and its trials are made again. Scripts need the usual
    `if __name__ == "__main__":`.
    """
    threads = max(1, torch.get_num_threads() // count)
    return lambda: ProcessPoolExecutor(
        count, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(threads,)
    )


def dask_cluster(address: str) -> Callable[[], Executor]:
    """Connects to the scheduler of a Dask cluster, `tcp://host:8786`, whose workers have was-fx installed.

    Raises:
        ValueError: Dask is not installed.
        OSError: when it is opened and nothing answers there.
    """
    try:
        import distributed  # noqa: F401
    except ImportError as error:
        raise ValueError('Dask is not installed: pip install "was-fx[dask]"') from error
    return lambda: _DaskExecutor(address)


class _DaskExecutor(Executor):
    """A Dask client as an executor whose futures fail with `BrokenExecutor` when workers keep dying."""

    def __init__(self, address: str) -> None:
        from distributed import Client

        self._client = Client(address, timeout="15s", set_as_default=False)
        self._inner = self._client.get_executor(pure=False)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        outer: Future = Future()
        self._inner.submit(fn, *args, **kwargs).add_done_callback(functools.partial(_pass_on, outer))
        return outer

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._inner.shutdown(wait=wait)
        self._client.close()


def _pass_on(outer: Future, inner: Future) -> None:
    from distributed import KilledWorker

    if inner.cancelled():
        outer.set_exception(BrokenExecutor("the Dask client lost this trial"))
        return
    error = inner.exception()
    if error is None:
        outer.set_result(inner.result())
    else:
        outer.set_exception(BrokenExecutor(str(error)) if isinstance(error, KilledWorker) else error)
