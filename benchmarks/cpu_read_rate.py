"""How near every Linear of a decode step, and the whole step, come to the rate at which this machine reads memory.

    python benchmarks/cpu_read_rate.py models/smollm2-135m   # its own weights
    python benchmarks/cpu_read_rate.py llama-3.2-1b --only linears --threads 1 2  # a shape of was_fx.measure.shapes
    WAS_FX_CPU_KERNELS=avx2 python benchmarks/cpu_read_rate.py models/smollm2-135m

Linears are those of one block and the head, siblings of one input together, as a recorded step runs them
(`was_fx.kernels.record`): each measurement is a recorded step of nothing but them, through more weights than the caches
hold. "list" is the same where no channel is kept: waiting for all threads, listing, writing the sums. A step is a real
one, of int8 and int4 with an int8 head, repeated whole, and all but its Linears alone: the rest of it is theirs.

Everything takes turns with the sum over memory that gives the read rate. Medians, and the fastest of all turns, which
tells more where others use the machine too. JSON lines, then tables.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from environment import describe
from rich.console import Console
from rich.table import Table
from torch import Tensor

import was_fx
from was_fx.generate import recorded_step
from was_fx.kernels.cpu import library
from was_fx.kernels.record.program import LINEARS, OPERATIONS, Program, Step, View
from was_fx.kernels.record.recorder import Recording
from was_fx.measure.sequential import uniform_while_dropping
from was_fx.measure.shapes import SHAPES, config
from was_fx.measure.speed import random_model
from was_fx.modules.linears import weight_bytes_per_token

FORMATS = ("bf16", "int8", "int4")
PASSED_BYTES = 128 << 20  # read by one measurement, and by the sum that it is compared with
GROUP = 32  # outputs of a group of int4


@dataclass(frozen=True)
class Siblings:
    """Linears of one input.

    Attributes:
        name: of them.
        channels: K.
        outputs: N of each.
        head: whether it is the head, which keeps all channels and is int8 beside int4.
    """

    name: str
    channels: int
    outputs: tuple[int, ...]
    head: bool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help=f"a folder, or one of {', '.join(SHAPES)} with random weights")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.0, 0.25, 0.5])
    parser.add_argument("--threads", nargs="+", type=int, default=[2])
    parser.add_argument("--only", choices=["linears", "steps"], help="leave out the other")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--blocks", type=int, help="fewer blocks than the shape has")
    arguments = parser.parse_args()
    common = describe() | {"kind": library.KINDS[library.kind()], "model": arguments.model}
    memory = torch.randn(PASSED_BYTES // 2, dtype=torch.float32).to(torch.bfloat16)
    rows: dict[str, list[dict[str, Any]]] = {}
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for each in () if arguments.only == "steps" else siblings(configuration(arguments)):
            rows.setdefault("Linears", []).extend(of_linears(each, memory, arguments, threads))
        if arguments.only != "linears":
            rows.setdefault("Steps", []).extend(of_steps(memory, arguments, threads))
    for found in itertools.chain(*rows.values()):
        print(json.dumps(common | found), flush=True)
    for title, found in rows.items():
        table = Table(title=f"{title}: {arguments.model}, {common['device']}, {common['kind']}")
        for heading in found[0]:
            table.add_column(heading, justify="right")
        for row in found:
            table.add_row(*[str(value) for value in row.values()])
        Console(width=None if sys.stdout.isatty() else 200).print(table)


def configuration(arguments: argparse.Namespace) -> Any:
    """The model's configuration."""
    from transformers import AutoConfig

    changes = {"num_hidden_layers": arguments.blocks} if arguments.blocks else {}
    if arguments.model in SHAPES:
        return config(arguments.model, **changes)
    return AutoConfig.from_pretrained(arguments.model, **changes)


def siblings(configuration: Any) -> list[Siblings]:
    """The Linears of a block of Llama's kind, and the head."""
    hidden, wide = configuration.hidden_size, configuration.intermediate_size
    heads, shared = configuration.num_attention_heads, configuration.num_key_value_heads
    width = getattr(configuration, "head_dim", None) or hidden // heads
    return [
        Siblings("q k v", hidden, (heads * width, shared * width, shared * width), False),
        Siblings("o", heads * width, (hidden,), False),
        Siblings("gate up", hidden, (wide, wide), False),
        Siblings("down", wide, (hidden,), False),
        Siblings("head", hidden, (configuration.vocab_size,), True),
    ]


def of_linears(each: Siblings, memory: Tensor, arguments: argparse.Namespace, threads: int) -> Iterator[dict[str, Any]]:
    """A row for each format and sparsity."""
    x = torch.randn(1, each.channels).to(torch.bfloat16)
    timed: dict[Any, Callable[[], object]] = {"read": memory.view(torch.int64).sum}
    sizes: dict[Any, tuple[int, int]] = {}
    for format, sparsity in itertools.product(arguments.formats, [0.0] if each.head else arguments.sparsities):
        if each.head and format == "int4":
            continue
        magnitude = x.float().abs().flatten()
        limit = magnitude.kthvalue(round(sparsity * each.channels)).values.item() if sparsity else -1.0
        kept = int((magnitude > limit).sum())
        for threshold in (limit, float("inf")):
            made, passes, size = passing(each, format, memory, x, torch.full((each.channels,), threshold))
            timed[format, sparsity, threshold == limit] = made.run
            sizes[format, sparsity] = passes, size * kept // each.channels
            if each.head and format == "bf16":  # by rows, without a list
                break
    seconds = in_turns(timed, arguments.rounds)
    rate, most = (PASSED_BYTES / each / 1e9 for each in seconds["read"])
    for (format, sparsity), (passes, size) in sizes.items():
        whole, fastest = (each / passes for each in seconds[format, sparsity, True])
        listing = seconds.get((format, sparsity, False), (0.0, 0.0))[0] / passes
        yield {
            "threads": threads,
            "Linears": f"{each.name} {each.channels} → {'+'.join(map(str, each.outputs))}",
            "format": format,
            "sparsity": sparsity,
            "kB kept": round(size / 1e3, 1),
            "µs": round(1e6 * whole, 1),
            "list µs": round(1e6 * listing, 1),
            "product µs": round(1e6 * (whole - listing), 1),
            "GB/s": round(size / whole / 1e9, 1),
            "read GB/s": round(rate, 1),
            "share": round(size / whole / 1e9 / rate, 2),
            "fastest µs": round(1e6 * fastest, 1),
            "of the fastest read": round(size / fastest / 1e9 / most, 2),
        }


def passing(each: Siblings, format: str, memory: Tensor, x: Tensor, threshold: Tensor) -> tuple[Program, int, int]:
    """A recorded step that multiplies x by siblings after siblings until it has passed through `memory`; how many, and
    the bytes of each."""
    by_rows = each.head and format == "bf16"
    name = "all_rows" if by_rows else "gather" if format == "bf16" else f"gather_{format}"
    pool = memory.view(torch.uint8)
    scales = torch.ones(max(each.channels, *each.outputs))
    outs = [torch.empty(1, outputs, dtype=x.dtype) for outputs in each.outputs]
    steps, begin, passes, size = [], 0, 0, 0
    while True:
        some = []
        place = begin
        for outputs, out in zip(each.outputs, outs, strict=True):
            parts: list[Tensor | None] = []
            bytes_of = {"bf16": 2 * outputs, "int8": -(-outputs // 32) * 32, "int4": outputs // 2}[format]
            for row in (bytes_of, outputs // GROUP * 2 if format == "int4" else 0):
                parts.append(pool[place : place + row * each.channels] if row else None)
                place += -(-row * each.channels // 64) * 64
            codes, groups = parts
            weights = (codes, None, None if by_rows else threshold, None if format == "bf16" else scales, groups)
            sizes = (1, outputs, each.channels)
            some.append(Step(name, View(out, ()), [View(x, ())], sizes, weights=weights, group=GROUP))
        if place > pool.numel():
            break
        size, begin, passes = place - begin, place, passes + 1
        steps += some
    return Program(steps, [memory, scales]), passes, size


def of_steps(memory: Tensor, arguments: argparse.Namespace, threads: int) -> Iterator[dict[str, Any]]:
    """A row for each quantised format and sparsity."""
    timed: dict[Any, Callable[[], object]] = {"read": memory.view(torch.int64).sum}
    sizes: dict[Any, float] = {}
    linears, kept_alive = {*LINEARS, "add_parts"}, []
    for format, sparsity in itertools.product(arguments.formats, arguments.sparsities):
        found, size = recorded(arguments, format, sparsity)
        kept_alive.append(found)
        program = found.program
        timed[format, sparsity, "step"] = program.run
        timed[format, sparsity, "all else"] = program.part(set(OPERATIONS) - linears).run
        sizes[format, sparsity] = size
    seconds = in_turns(timed, 3 * arguments.rounds)
    rate, most = (PASSED_BYTES / each / 1e9 for each in seconds["read"])
    for (format, sparsity), size in sizes.items():
        step, rest = (1e3 * seconds[format, sparsity, part][0] for part in ("step", "all else"))
        products = step - rest
        fastest = seconds[format, sparsity, "step"][1]
        yield {
            "threads": threads,
            "format": format,
            "sparsity": sparsity,
            "MB kept": round(size / 1e6, 1),
            "bytes ÷ rate, ms": round(size / rate / 1e6, 2),
            "step ms": round(step, 2),
            "Linears ms": round(products, 2),
            "all else ms": round(rest, 2),
            "Linears' GB/s": round(size / products / 1e6, 1),
            "read GB/s": round(rate, 1),
            "Linears' share": round(size / products / 1e6 / rate, 2),
            "step's share": round(size / step / 1e6 / rate, 2),
            "fastest ms": round(1e3 * fastest, 2),
            "of the fastest read": round(size / fastest / 1e9 / most, 2),
        }


@torch.no_grad()
def recorded(arguments: argparse.Namespace, format: str, sparsity: float) -> tuple[Recording, float]:
    """The decode step of a model, after a prompt of 64 tokens, and the bytes of weights that it reads."""
    from transformers import AutoModelForCausalLM

    if arguments.model in SHAPES:
        model = random_model(configuration(arguments))
    else:
        model = AutoModelForCausalLM.from_pretrained(Path(arguments.model), dtype=torch.bfloat16).eval()
    if format != "bf16":
        was_fx.quantize(model, {"lm_head": "int8", "*": format})
    ids = torch.randint(model.config.vocab_size, (1, 64), generator=torch.Generator().manual_seed(0))
    schedule = uniform_while_dropping(model, ids, sparsity)
    everything = weight_bytes_per_token(model)
    was_fx.sparsify(model, schedule, lowering="recorded")
    made: list[Recording] = []

    class Noted(Recording):
        def __init__(self, *inputs: Any) -> None:
            super().__init__(*inputs)
            made.append(self)

    recorded_step.Recording = Noted  # type: ignore[misc]
    model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    recorded_step.Recording = Recording  # type: ignore[misc]
    head = model.get_output_embeddings().weight if format == "bf16" else None
    head_bytes = head.numel() * 2 if head is not None else model.config.vocab_size * model.config.hidden_size
    return made[-1], head_bytes + (everything - head_bytes) * (1 - sparsity)


def in_turns(timed: dict[Any, Callable[[], object]], rounds: int) -> dict[Any, tuple[float, float]]:
    """Median and least seconds of each, after a round that does not count."""
    times: dict[Any, list[float]] = {name: [] for name in timed}
    for turn in range(rounds + 1):
        for name, function in timed.items():
            start = time.perf_counter()
            function()
            if turn:
                times[name].append(time.perf_counter() - start)
    return {name: (statistics.median(each), min(each)) for name, each in times.items()}


if __name__ == "__main__":
    main()
