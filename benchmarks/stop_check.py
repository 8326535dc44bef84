"""Ways to decide on a GPU whether `generate()` goes on, by ms per token: what waiting for the answer costs.

    python benchmarks/stop_check.py                           # llama-3.2-1b and llama-3-8b shapes at 50 %, 3 minutes
    python benchmarks/stop_check.py --shapes llama-3.2-1b

- ours: was_fx's loop, which queues steps ahead.
- transformers: its own loop with decode steps compiled by the backend "was"; it reads the answer after every token.
- deferred: the same with the answer read one step late, which transformers from 5.24 on does on Apple's GPUs only
  (`DeferredStopCheck`); here it is forced on.

They take turns; a streamer notes when each token arrives. Prints one JSON line per shape and then a table.
"""

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import transformers.generation.utils
from environment import describe
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig

import was_fx
from was_fx.generate.generation import Generation
from was_fx.measure.sequential import uniform_while_dropping
from was_fx.measure.shapes import SHAPES, config
from was_fx.measure.speed import random_model
from was_fx.measure.token_clock import TokenClock

WARM_UP = 8
DEFERRED: Any = getattr(transformers.generation.utils, "DeferredStopCheck", None)


@contextlib.contextmanager
def ours() -> Iterator[None]:
    yield


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """transformers' loop: ours serves no call."""
    with mock.patch.object(Generation, "_takes", return_value=False):
        yield


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    with plain(), mock.patch.object(DEFERRED, "is_supported", staticmethod(lambda *_, **__: True)):
        yield


def ways(device: str) -> dict[str, Callable[[], contextlib.AbstractContextManager[None]]]:
    found: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {"ours": ours, "transformers": plain}
    if DEFERRED is not None and device == "cuda":
        found["deferred"] = deferred
    return found


@torch.no_grad()
def measure(shape: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Median ms per token of each way, and whether all give the same text."""
    device = arguments.device
    tiny = LlamaConfig(
        hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4, vocab_size=128
    )
    model: Any = random_model(tiny if shape == "tiny" else config(shape), device=device)
    ids = torch.randint(model.config.vocab_size, (4, 128), generator=torch.Generator().manual_seed(0))
    was_fx.sparsify(model, uniform_while_dropping(model, ids, arguments.target))
    prompt, new = ids[:1].to(device), arguments.tokens
    times: dict[str, list[float]] = {name: [] for name in ways(device)}
    texts = {}

    def generate() -> tuple[float, list[int]]:
        clock = TokenClock()
        text = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            cache_implementation="static",
            streamer=clock,
        )
        return statistics.fmean(clock.steps()[WARM_UP:]), text.tolist()

    for turn in range(2 + arguments.rounds):  # the first two compile and capture
        print(f"{time.perf_counter() - START:5.0f} s  {shape}, round {turn}", file=sys.stderr, flush=True)
        for name, way in ways(device).items():
            with way():
                ms, texts[name] = generate()
            if turn > 1:
                times[name].append(ms)
    return {
        "shape": shape,
        "target": arguments.target,
        "ms": {name: round(statistics.median(each), 4) for name, each in times.items()},
        "rounds": {name: [round(ms, 4) for ms in each] for name, each in times.items()},
        "same_text": all(each == texts["ours"] for each in texts.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: to try the script out")
    parser.add_argument("--shapes", nargs="+", choices=[*SHAPES, "tiny"], default=["llama-3.2-1b", "llama-3-8b"])
    parser.add_argument("--target", type=float, default=0.5)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    about = describe(arguments.device)
    table = Table(title=f"generate(), ms per token at {arguments.target:.0%}, {about['device']}")
    for heading in ("shape", "ours", "transformers' loop", "its deferred check", "same text"):
        table.add_column(heading, justify="right")
    for shape in arguments.shapes:
        row = measure(shape, arguments)
        sys.stdout.write(json.dumps(about | row) + "\n")
        sys.stdout.flush()
        cells = [
            f"{row['ms'][name]:.3f}" if name in row["ms"] else "–" for name in ("ours", "transformers", "deferred")
        ]
        table.add_row(shape, *cells, "yes" if row["same_text"] else "no")
        if arguments.device == "cuda":
            torch.cuda.empty_cache()
    Console(width=120).print(table)
    if DEFERRED is None:
        print(f"transformers {transformers.__version__} has no DeferredStopCheck; it came with 5.24.")


START = time.perf_counter()

if __name__ == "__main__":
    main()
