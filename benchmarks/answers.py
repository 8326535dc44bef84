"""Whole answers of a real model on this CPU, dense against sparse: time to the first token, and to the last.

    python benchmarks/answers.py ~/.cache/was_fx/models/smollm2-135m
    python benchmarks/answers.py MODEL --processor avx2      # as on a processor without AVX-512

One sequence, greedy, a prompt of the embedded test text; medians over rounds in which the variants take turns, each
with a model of its own. `dense` is eager, which for one answer is faster than compiling; `--compiled` adds
torch.compile of both. Prints one JSON line per variant and then a table.
"""

import argparse
import json
import os
import statistics
import sys
import time
from typing import Any

# What a library may use of the processor is read when it is loaded.
_OF = {
    "avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "MKL_ENABLE_INSTRUCTIONS": "AVX512"},
    "avx512bf16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16", "MKL_ENABLE_INSTRUCTIONS": "AVX512"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder or a name on the Hub")
    parser.add_argument("--processor", choices=_OF, help="use no more than such a processor has")
    parser.add_argument("--targets", type=float, nargs="+", default=[0.5])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compiled", action="store_true")
    arguments = parser.parse_args()
    if arguments.processor and os.environ.get("WAS_FX_CPU_KERNELS") != arguments.processor:
        limits = _OF[arguments.processor] | {"WAS_FX_CPU_KERNELS": arguments.processor}
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | limits)
    measure(arguments)


def measure(arguments: argparse.Namespace) -> None:
    """Time every variant and print what was found."""
    import torch
    from environment import describe
    from rich.console import Console
    from rich.table import Table

    import was_fx
    from was_fx import embedded
    from was_fx.kernels.cpu.library import KINDS, kind

    torch.set_num_threads(arguments.threads)
    transformers = __import__("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.model)

    def load() -> Any:
        dtype = getattr(torch, arguments.dtype)
        return transformers.AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype).eval()

    calibrating = tokenizer(embedded.text("calibration")[:100_000], return_tensors="pt").input_ids[:, :16384]
    prompt = tokenizer(embedded.text("test")[:50_000], return_tensors="pt").input_ids[:, : arguments.prompt]
    models = {"dense": load()}
    calibration = was_fx.calibrate(models["dense"], calibrating.view(-1, 1024))
    for target in arguments.targets:
        models[f"{target:.0%}"] = was_fx.sparsify(load(), was_fx.uniform(calibration, target))
    if arguments.compiled:
        models["dense, compiled"] = load()
        models["dense, compiled"].forward = torch.compile(models["dense, compiled"].forward, dynamic=True)
        for target in arguments.targets:
            schedule = was_fx.uniform(calibration, target)
            models[f"{target:.0%}, compiled"] = was_fx.sparsify(load(), schedule, lowering="inductor")

    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    firsts: dict[str, float] = {}
    for turn in range(arguments.repetitions + 1):
        for name, model in models.items():
            clock = _Clock()
            start = time.perf_counter()
            model.generate(
                prompt,
                max_new_tokens=arguments.tokens,
                min_new_tokens=arguments.tokens,
                do_sample=False,
                streamer=clock,
            )
            whole = time.perf_counter() - start
            if turn == 0:
                firsts[name] = whole
            else:
                times[name].append((clock.first - start, whole))
    common = describe("cpu") | vars(arguments) | {"kernels": KINDS[kind()]}
    medians = {name: [statistics.median(each) for each in zip(*rows, strict=True)] for name, rows in times.items()}
    table = Table(title=f"{arguments.model}, {arguments.dtype}, {arguments.prompt} + {arguments.tokens} tokens, "
                  f"{arguments.threads} threads, {KINDS[kind()]} kernels")  # fmt: skip
    for heading in ("", "first generate() s", "to first token ms", "ratio", "ms per token", "whole answer s", "ratio"):
        table.add_column(heading, justify="right")
    dense_first, dense_whole = medians["dense"]
    for name, (first, whole) in medians.items():
        per_token = (whole - first) / (arguments.tokens - 1) * 1e3
        row = {"first_s": first, "whole_s": whole, "ms_per_token": per_token, "first_generate_s": firsts[name]}
        print(json.dumps(common | {"variant": name} | row))
        table.add_row(
            name, f"{firsts[name]:.2f}", f"{1e3 * first:.0f}", f"{first / dense_first:.2f}", f"{per_token:.2f}",
            f"{whole:.3f}", f"{dense_whole / whole:.2f}×",
        )  # fmt: skip
    Console(width=140).print(table)


class _Clock:
    """A streamer that notes when the first new token comes."""

    def __init__(self) -> None:
        self.calls = 0
        self.first = 0.0

    def put(self, _: Any) -> None:
        """The prompt, then each token."""
        self.calls += 1
        if self.calls == 2:
            self.first = time.perf_counter()

    def end(self) -> None:
        """Nothing is left."""


if __name__ == "__main__":
    main()
