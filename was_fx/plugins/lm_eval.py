"""lm-eval's model "was": whatever its model "hf" takes, with a schedule.

    from was_fx.plugins.lm_eval import WasLM, minimal_pairs, run_tasks
    run_tasks(WasLM("embedded", schedule="s.was.safetensors"), [minimal_pairs()])

    python -m was_fx.plugins.lm_eval --model was --model_args pretrained=DIR,schedule=FILE --tasks blimp

The second is lm-eval's own command line; started as `lm_eval`, it finds only the models that it brings along. In
Python, `import was_fx` makes the name known (`was_fx.plugins.announce`).
"""

import random
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from was_fx.measure.realised import Counting, Realised
from was_fx.modules.token_rule import Prefill
from was_fx.schedules.files.schedule import Schedule
from was_fx.schedules.names import suggestion
from was_fx.sparse.sparsify import densify, sparsify
from was_fx.sparse.state import sparse_state

try:
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise ImportError(
        f'lm-eval with its Hugging Face models is needed: pip install "was-fx[eval]" ({error})'
    ) from error

PAIRS = Path(__file__).resolve().parent / "tasks" / "minimal_pairs.jsonl"
_SEED = 1234  # lm-eval's own


class WasLM(HFLM):
    """A causal LM of transformers that decodes and scores by a schedule.

    Args:
        pretrained: as for lm-eval's "hf" (a directory, a Hub name or a model), or "embedded".
        schedule: a `Schedule` or the path of one. Without it, the one that the checkpoint was saved with; without
            that, the model is dense.
        prefill: which tokens of a prompt are sparse: "sparse" all but the first 1 % (WAS's convention), "half" the
            last half (TEAL's), "all" every one. Not "dense": tasks that compare likelihoods consist of prompts only.
        lowering: as for `sparsify`.
        allow_other_model: as for `sparsify`.
        bars: show lm-eval's progress bars.
        arguments: lm-eval's own, such as device, dtype and batch_size.

    Raises:
        ValueError: `prefill` is "dense".
        ScheduleError: the schedule does not fit the model.
    """

    def __init__(
        self,
        pretrained: str | nn.Module = "embedded",
        schedule: Schedule | str | Path | None = None,
        prefill: Prefill = "sparse",
        lowering: Any = None,
        allow_other_model: bool = False,
        bars: bool = True,
        **arguments: Any,
    ) -> None:
        if prefill == "dense":
            raise ValueError("prefill='dense' would score the dense model; use 'sparse', 'half' or 'all'")
        if pretrained == "embedded":
            from was_fx import embedded

            pretrained = str(embedded.path())
        super().__init__(pretrained, **arguments)  # type: ignore[arg-type]
        self._bars = bars
        self._how = {"prefill": prefill, "lowering": lowering, "allow_other_model": allow_other_model}
        self._counts = Counting(self.model)
        known = sparse_state(self.model)
        if schedule is None and known is not None:
            schedule = known.schedule
        self.use(schedule)

    def use(self, schedule: Schedule | str | Path | None) -> None:
        """Score by another schedule from now on; None makes the model dense."""
        self._counts.stop()
        if schedule is None:
            densify(self.model)
        else:
            sparsify(self.model, schedule, **self._how)  # type: ignore[arg-type]
        self._counts = Counting(self.model)

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """lm-eval's own, with or without bars."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm or not self._bars)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """lm-eval's own, with or without bars."""
        return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm or not self._bars)

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """lm-eval's own, with or without bars."""
        return super().generate_until(requests, disable_tqdm=disable_tqdm or not self._bars)

    def _create_model(self, *arguments: Any, **keywords: Any) -> None:
        """Without the warning that the checkpoint says already how it decodes: that is where lm-eval read it."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "You passed `quantization_config`")
            super()._create_model(*arguments, **keywords)

    @property
    def realised(self) -> Realised:
        """Sparsity measured since the last `use`, over the tokens that were sparse; padding is not counted."""
        return self._counts.realised()


def minimal_pairs(path: str | Path | None = None) -> dict[str, Any]:
    """A task: find the right one of two sentences that differ in one point.

    Args:
        path: a JSONL file with `sentence_good` and `sentence_bad` per line, such as BLiMP's; may be compressed. By
            default the 200 pairs that come with was-fx.

    Returns:
        A task as lm-eval takes it in place of a name; it is called as the file. Its metric is acc. As in lm-eval's own
        BLiMP, a space comes before each sentence.

    Raises:
        FileNotFoundError: there is no such file.
    """
    path = PAIRS if path is None else Path(path)
    if not path.is_file():
        raise FileNotFoundError(2, "there is no such file of sentence pairs", str(path))
    return {
        "task": path.name.split(".")[0],
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path.resolve())}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "",
        "doc_to_target": 0,
        "doc_to_choice": "{{[sentence_good, sentence_bad]}}",
        "num_fewshot": 0,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }


def task_manager(tasks: Sequence[str | dict[str, Any]], include_path: str | Path | None = None) -> Any:
    """What loads tasks: lm-eval's `TaskManager`, with its own thousands of tasks where a name asks for one.

    Args:
        tasks: names, or tasks as `minimal_pairs` gives them.
        include_path: a folder with more tasks, as YAML files.

    Raises:
        ValueError: lm-eval doesn't know a task.
    """
    from lm_eval.tasks import TaskManager

    names = [task for task in tasks if isinstance(task, str)]
    folder = None if include_path is None else str(include_path)
    manager = TaskManager(include_path=folder, include_defaults=False)
    if not all(manager.match_tasks([name]) for name in names):
        manager = TaskManager(include_path=folder)  # reads thousands of files
    for name in names:
        if not manager.match_tasks([name]):
            raise ValueError(
                f"lm-eval has no task {name!r}{suggestion(name, manager.all_tasks)}; `lm-eval ls tasks` lists them, "
                "and include_path adds a folder of your own"
            )
    return manager


def run_tasks(
    model: Any,
    tasks: Sequence[str | dict[str, Any]],
    *,
    limit: int | None = None,
    fewshot: int | None = None,
    chat_template: bool = False,
    include_path: str | Path | None = None,
    manager: Any = None,
    documents: bool = False,
) -> dict[str, dict[str, Any]]:
    """Run tasks of lm-eval, with its own seeds.

    Args:
        model: a `WasLM`, or any other model of lm-eval.
        tasks: names that lm-eval knows, or tasks as `minimal_pairs` gives them.
        limit: at most so many documents of each task.
        fewshot: examples in the prompt. By default what a task says, else none.
        chat_template: write prompts as the tokenizer's chat template has them, examples as turns.
        include_path: a folder with more tasks, as YAML files.
        manager: of `task_manager`, so that it is not made for every call.
        documents: give the value of each document too.

    Returns:
        By task: its metrics, such as "acc,none" and "acc_stderr,none"; with `documents`, "documents" too, which has
        the values of each metric by the same key, in the order of the documents.

    Raises:
        ValueError: lm-eval doesn't know a task, or there is no chat template.
    """
    from lm_eval.evaluator import evaluate

    if chat_template and not getattr(model.tokenizer, "chat_template", None):
        raise ValueError("the tokenizer has no chat template; leave the chat template out, or take an instruct model")
    manager = manager or task_manager(tasks, include_path)
    # As `simple_evaluate` does, which asks git and the whole machine about themselves too.
    random.seed(0)
    torch.manual_seed(_SEED)
    loaded: Any = manager.load(list(tasks))
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=_SEED)
        if fewshot is not None and task.get_config("num_fewshot") != 0:  # a task of 0 can't be given any
            task.set_config(key="num_fewshot", value=fewshot)
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
    found: Any = evaluate(
        lm=model,
        task_dict=loaded,
        limit=limit,
        log_samples=documents,
        apply_chat_template=chat_template,
        fewshot_as_multiturn=chat_template,
        verbosity="ERROR",
    )
    results: dict[str, dict[str, Any]] = found["results"]
    for task, samples in (found.get("samples") or {}).items() if documents else ():
        results[task] = {**results[task], "documents": _by_metric(samples)}
    return results


def _by_metric(samples: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """The values of lm-eval's samples by the key of their metric; of metrics that are a number of each document."""
    found: dict[str, list[float]] = {}
    for sample in sorted(samples, key=lambda each: each["doc_id"]):
        for metric in sample["metrics"]:
            if isinstance(sample[metric], (int, float)):
                found.setdefault(f"{metric},{sample['filter']}", []).append(float(sample[metric]))
    return found


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
