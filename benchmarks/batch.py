"""Decode steps of several sequences, or of several tokens of one, with random weights: dense against sparse.

    python benchmarks/batch.py --blocks 8                           # a GPU, Llama-3-8B shapes
    python benchmarks/batch.py --batches 1 2 4 8 --together         # several sequences only
    python benchmarks/batch.py --batches 1 --together 2 4 8         # one sequence, several tokens only
    python benchmarks/batch.py --batches 1 --together --prompt 131072 --blocks 16 --targets 0.5     # a long context
    python benchmarks/batch.py --device cpu --lowering eager --shape llama-3.2-1b --blocks 1 --vocabulary 512

Each token drops its own channels. "Weights read" is what some token of a step keeps, and GB/s goes by it: the GPU's
kernels for quantised weights read that, of at most eight tokens; with plain weights several tokens read everything
there. "Together" are steps in which one sequence reads several tokens at once, as the verifier of a draft's guesses
does. A sparsified model takes such a step for a prompt, which is dense by default: here its steps run with
prefill="all", and only its prompts are dense. Both models' steps read a static cache, compiled and replayed as CUDA
graphs, the dense ones as transformers does it, in turns in one process; each sequence has a prompt of random tokens of
its own. Prints one JSON line per row and then a table.
"""

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from environment import bandwidth, describe
from rich.console import Console
from rich.table import Table
from torch import Tensor

from was_fx.compat.dynamo import graphs_compiled, settings_for_models
from was_fx.generate.compiled_step import CompiledStep
from was_fx.measure.sequential import realised_sparsity, uniform_while_dropping
from was_fx.measure.shapes import SHAPES, config
from was_fx.measure.speed import random_model
from was_fx.measure.timed_model import WARM_UP, Load, TimedModel
from was_fx.modules.linears import weight_bytes_per_token
from was_fx.schedules.files.schedule import Schedule
from was_fx.sparse.quantize import quantize
from was_fx.sparse.sparsify import densify, prompts_treated, sparsify

# With experts, each reads the tokens that it got, and there is no union of all.
_SHAPES = [name for name, (_, settings) in SHAPES.items() if not {"num_experts", "num_local_experts"} & settings.keys()]


@dataclass(frozen=True)
class Row:
    """Steps of one size at one sparsity.

    Attributes:
        sequences, together: how many there are, and the tokens of each that a step reads.
        target: nominal sparsity of a token; 0.0 for the dense model.
        read: share of the scheduled weights that some token of a step keeps.
        bytes_per_step: bytes of those, and of the weights that are always read, the head's included.
        step_ms: median time of a step, by the GPU's clock.
        repetitions: what it is the median of.
        tokens_per_s: tokens read by the steps of a second.
        ratio: the dense model's time over this one's.
        graphs: compiled for this row.
    """

    sequences: int
    together: int
    target: float
    read: float
    bytes_per_step: int
    step_ms: float
    repetitions: tuple[float, ...]
    tokens_per_s: float
    ratio: float
    graphs: int


_COLUMNS: dict[str, Callable[[Row], str]] = {
    "sequences": lambda row: str(row.sequences),
    "together": lambda row: str(row.together),
    "sparsity": lambda row: f"{row.target:.0%}" if row.target else "dense",
    "weights read": lambda row: f"{row.read:.1%}",
    "ms/step": lambda row: f"{row.step_ms:.3f}",
    "tokens/s": lambda row: f"{row.tokens_per_s:.0f}",
    "ratio": lambda row: f"{row.ratio:.2f}×",
    "GB/s": lambda row: f"{row.bytes_per_step / row.step_ms / 1e6:.0f}",
    "graphs": lambda row: str(row.graphs),
}


@dataclass(frozen=True)
class Timed:
    """What was found of the dense model or of a schedule: milliseconds of a step in each repetition, the tokens
    [B, seq] of prompts and steps, and how many graphs were compiled."""

    ms: list[float]
    text: Tensor
    graphs: int


@dataclass(frozen=True)
class Steps:
    """Steps of one size of the dense model and of the sparse one, with a cache each."""

    dense: TimedModel
    sparse: TimedModel

    def __call__(self, schedule: Schedule | None) -> tuple[float, Tensor]:
        """See `TimedModel.steps`; the dense model's without a schedule."""
        if schedule is None:
            with settings_for_models(late_hooks=False):
                return self.dense.steps()
        sparsify(self.sparse.model, schedule)
        return self.sparse.steps()


def random_tokens(model: Any, sequences: int, length: int) -> Tensor:
    """LongTensor [sequences, length] on the model's device."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (sequences, length), generator=generator).to(model.device)


def steps_of(model: Any, sparse: Any, *, eager: bool) -> tuple[Any, Any]:
    """What is called for a step of the dense model and of the sparse one, of any size."""
    dense_step, sparse_step = model, sparse
    if not eager:
        dense_step = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True, dynamic=False)
        sparse_step = CompiledStep(sparse, {"as_step": True})

    def every_token_sparse(**arguments: Any) -> Any:
        with prompts_treated(sparse, "all"):
            return sparse_step(**arguments)

    return dense_step, every_token_sparse


def timed(steps: Steps, subjects: Sequence[Schedule | None], repetitions: int) -> list[Timed]:
    """What is found of each subject; they take turns once everything is compiled."""
    found = []
    for subject in subjects:
        before = graphs_compiled()
        _, text = steps(subject)
        found.append(Timed([], torch.cat([steps.dense.load.prompt, text], dim=1), graphs_compiled() - before))
    for _ in range(repetitions):
        for subject, each in zip(subjects, found, strict=True):
            each.ms.append(steps(subject)[0])
    return found


def rows_of(
    model: Any, without_schedule: Any, schedules: Sequence[Schedule], batch: int, together: int, found: Sequence[Timed]
) -> list[Row]:
    """The dense row and one for each schedule, with what `without_schedule`, which they are of, reads by them."""
    rows: list[Row] = []
    for schedule, each in zip([None, *schedules], found, strict=True):
        realised, read = 0.0, weight_bytes_per_token(model)
        if schedule is not None:
            realised, read = realised_sparsity(without_schedule, schedule, each.text, together)
        ms = statistics.median(each.ms)
        rows.append(
            Row(
                sequences=batch,
                together=together,
                target=schedule.sparsity if schedule else 0.0,
                read=1 - realised,
                bytes_per_step=read,
                step_ms=ms,
                repetitions=tuple(each.ms),
                tokens_per_s=1e3 * batch * together / ms,
                ratio=(rows[0].step_ms if rows else ms) / ms,
                graphs=each.graphs,
            )
        )
    return rows


def table(rows: list[Row], title: str) -> Table:
    """A row for each."""
    made = Table(title=title)
    for heading in _COLUMNS:
        made.add_column(heading, justify="right")
    for row in rows:
        if not row.target and made.row_count:
            made.add_section()
        made.add_row(*[show(row) for show in _COLUMNS.values()])
    return made


def slower(rows: list[Row]) -> str:
    """Where the dense model is the faster one."""
    found = [f"{row.sequences} × {row.together} at {row.target:.0%}" for row in rows if row.ratio < 1]
    return f"dense is faster (sequences × tokens): {', '.join(found) or 'nowhere'}"


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--shape", choices=_SHAPES, default="llama-3-8b")
    parser.add_argument("--blocks", type=int, help="fewer blocks than the model has")
    parser.add_argument("--vocabulary", type=int, help="another vocabulary than the model has")
    parser.add_argument("--targets", type=float, nargs="+", default=[0.5, 0.75])
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 2, 4, 8], help="sequences, of one token a step")
    parser.add_argument("--together", type=int, nargs="*", default=[2, 4, 8], help="tokens a step, of one sequence")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--steps", type=int, default=32, help=f"of a repetition; the first {WARM_UP} are not timed")
    parser.add_argument("--weights", help="quantise the sparse model: int8 or int4, with an int8 head")
    parser.add_argument("--lowering", choices=["inductor", "eager"], default="inductor", help="of both models")
    parser.add_argument("--repetitions", type=int, default=5)
    arguments = parser.parse_args()
    sizes = [(batch, 1) for batch in arguments.batches] + [(1, together) for together in arguments.together]
    if not sizes or arguments.steps <= WARM_UP or min(map(min, sizes)) < 1 or arguments.repetitions < 1:
        parser.error(f"give sizes and repetitions of at least 1, and more than {WARM_UP} steps")
    start = time.perf_counter()

    def note(text: str) -> None:
        print(f"{time.perf_counter() - start:5.0f} s  {text}", file=sys.stderr, flush=True)

    asked = {"num_hidden_layers": arguments.blocks, "vocab_size": arguments.vocabulary}
    changes = {name: each for name, each in asked.items() if each}
    machine = bandwidth(arguments.device)
    model: Any = random_model(config(arguments.shape, **changes), dtype=torch.bfloat16, device=arguments.device)
    sparse = copy.deepcopy(model)
    if arguments.weights:
        quantize(sparse, arguments.weights)
    ids = random_tokens(model, max(4, *(batch for batch, _ in sizes)), max(arguments.prompt, 128))
    schedules = [uniform_while_dropping(sparse, ids[:4, :128], target) for target in arguments.targets]
    note("thresholds are set")
    dense_step, sparse_step = steps_of(model, sparse, eager=arguments.lowering == "eager")
    measured: list[tuple[int, int, list[Timed]]] = []
    for batch, together in sizes:
        prompt = ids[:batch, : arguments.prompt]
        load = Load(prompt, prompt, arguments.steps, "static", together=together)
        steps = Steps(TimedModel(model, load, dense_step), TimedModel(sparse, load, sparse_step))
        found = timed(steps, [None, *schedules], arguments.repetitions)
        measured.append((batch, together, found))
        note(f"{batch} × {together}: {', '.join(f'{statistics.median(each.ms):.3f}' for each in found)} ms")
    rows = [
        row
        for batch, together, found in measured
        for row in rows_of(model, densify(sparse), schedules, batch, together, found)
    ]
    common = describe(arguments.device) | machine | {"shape": arguments.shape, "dtype": "bf16", **changes}
    common |= {"weights": arguments.weights, "prompt": arguments.prompt}
    for row in rows:
        sys.stdout.write(json.dumps(common | asdict(row)) + "\n")
    blocks = model.config.num_hidden_layers
    title = (
        f"{arguments.shape}, {blocks} blocks, {arguments.weights or 'bf16'}, {common['device']}, "
        f"reads {machine['read_GB/s']} GB/s; prompts of {arguments.prompt} tokens"
    )
    console = Console(width=160)
    console.print(table(rows, title))
    console.print(slower(rows))


if __name__ == "__main__":
    main()
