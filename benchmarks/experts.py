"""Decode speed of a mixture-of-experts model with random weights, dense against sparse experts, batch 1, on a GPU.

    python benchmarks/experts.py                                    # Qwen3-30B-A3B shapes, 24 blocks: 62 GB
    python benchmarks/experts.py --shape mixtral-8x7b               # 10 blocks: 60 GB
    python benchmarks/experts.py --weights none --targets 0.5       # bf16 only

The dense model runs as fast as transformers makes it: a static cache, decode steps compiled as a whole with each of its
experts functions and two modes of torch.compile; the fastest is what the others are compared with. The sparse model
takes turns with it in the same process. Prints one JSON line per row and then a table.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict
from typing import Any

import torch
from decode import table
from environment import bandwidth, describe
from rich.console import Console

from was_fx.measure.shapes import config
from was_fx.measure.speed import decode_speed, random_model

# Blocks of which a dense and a sparse copy fit into 78 GB.
_BLOCKS = {"qwen3-30b-a3b": 24, "mixtral-8x7b": 10}
_FUNCTIONS = ("batched_mm", "grouped_mm")
_MODES = ("reduce-overhead", "max-autotune")


def fastest_dense(model: Any, functions: list[str], modes: list[str], note: Any) -> tuple[str, str, dict[str, Any]]:
    """(experts function, mode, ms or what went wrong of each) of the dense model's fastest decode steps."""
    found: dict[str, Any] = {}
    for function in functions:
        for mode in modes:
            name = f"{function}, {mode}"
            torch.compiler.reset()
            model.set_experts_implementation(function)
            try:
                # Prompts of few tokens: batched_mm copies the weights of every token's experts.
                (row,) = decode_speed(model, [], prompt=16, long_prompt=16, tokens=32, repetitions=2, dense_mode=mode)
                found[name] = row.step_ms
            except Exception as error:  # whatever a combination raises, the others count
                found[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            torch.cuda.empty_cache()
            note(f"dense, {name}: {found[name]}")
    times = {name: each for name, each in found.items() if isinstance(each, float)}
    if not times:
        raise SystemExit(f"the dense model ran in no way: {found}")
    function, _, mode = min(times, key=times.__getitem__).partition(", ")
    return function, mode, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=_BLOCKS, default="qwen3-30b-a3b")
    parser.add_argument("--blocks", type=int, help="as many as fit, by default")
    parser.add_argument("--targets", type=float, nargs="+", default=[0.0, 0.5, 0.75])
    parser.add_argument("--weights", nargs="+", default=["none", "int8"], help="of the sparse model: none, int8, int4")
    parser.add_argument("--functions", nargs="+", default=list(_FUNCTIONS), help="experts functions of the dense model")
    parser.add_argument("--modes", nargs="+", default=list(_MODES), help="of torch.compile, for the dense model")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--long-prompt", type=int, default=512)
    parser.add_argument("--repetitions", type=int, default=5)
    arguments = parser.parse_args()
    start = time.perf_counter()

    def note(text: str) -> None:
        print(f"{time.perf_counter() - start:5.0f} s  {text}", file=sys.stderr, flush=True)

    blocks = arguments.blocks or _BLOCKS[arguments.shape]
    machine = bandwidth("cuda")
    model: Any = random_model(config(arguments.shape, num_hidden_layers=blocks), dtype=torch.bfloat16, device="cuda")
    function, mode, dense = fastest_dense(model, arguments.functions, arguments.modes, note)
    model.set_experts_implementation(function)
    common = describe("cuda") | machine | {"shape": arguments.shape, "blocks": blocks, "dense": dense}
    for weights in arguments.weights:
        torch.compiler.reset()
        torch.cuda.empty_cache()
        rows = decode_speed(
            model,
            arguments.targets,
            prompt=arguments.prompt,
            long_prompt=arguments.long_prompt,
            tokens=arguments.tokens,
            repetitions=arguments.repetitions,
            dense_mode=mode,
            weights=None if weights == "none" else weights,
            progress=lambda done, of, weights=weights: note(f"{weights}: {done} of {of} runs"),
        )
        for row in rows:
            sys.stdout.write(json.dumps(common | {"weights": weights} | asdict(row)) + "\n")
        title = (
            f"{arguments.shape}, {blocks} blocks, {'bf16' if weights == 'none' else weights}, batch 1, "
            f"{common['device']}, reads {machine['read_GB/s']} GB/s; dense: {function}, {mode}"
        )
        Console(width=180).print(table(rows, title))


if __name__ == "__main__":
    main()
