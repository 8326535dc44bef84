"""Decode steps of a real model on this CPU beside llama.cpp, in turns, with the perplexity of each.

    pip install llama-cpp-python gguf
    python benchmarks/beside_llama_cpp.py models/smollm2-135m --text wikitext2.valid.txt.xz --formats int8 int4
    python benchmarks/beside_llama_cpp.py models/smollm2-135m --text wikitext2.valid.txt.xz --formats bf16 int8 int4 \
        --targets 0 --schedules 25.was.safetensors 50.was.safetensors

Ours are `generate()` with recorded steps (`sparsify(lowering="recorded")`) and uniform schedules whose thresholds are
measured with the quantised weights, or the schedules given; theirs BF16, Q8_0, Q4_0 and Q4_1 by the reference rounding
of gguf, embeddings in Q8_0 at most beside the quantised. Same threads, same text; medians over all steps of all rounds.
One JSON line per variant, then a table.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

THEIRS = {"bf16": ("BF16",), "int8": ("Q8_0",), "int4": ("Q4_0", "Q4_1")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder or a name on the Hub")
    parser.add_argument("--text", type=Path, required=True, help="a text; .xz is unpacked")
    parser.add_argument("--formats", nargs="+", default=["int8", "int4"], choices=THEIRS)
    parser.add_argument("--targets", nargs="+", type=float, default=[0.0, 0.25, 0.5])
    parser.add_argument("--schedules", nargs="+", default=[], type=Path, help="schedules beside the uniform targets")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    measure(parser.parse_args())


def measure(arguments: argparse.Namespace) -> None:
    """Time every variant and print what was found."""
    import llama_cpp
    import torch
    from environment import describe
    from gguf_file import write
    from rich.console import Console
    from rich.table import Table
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import was_fx
    from was_fx.cli.input.texts import read_file

    torch.set_num_threads(arguments.threads)
    ids = AutoTokenizer.from_pretrained(arguments.model)(
        read_file(str(arguments.text)).content, return_tensors="pt"
    ).input_ids
    fitted, scored = ids[:, :4096].view(8, 512), ids[:, 4096 : 4096 + 1024]
    prompt = ids[:, 5120 : 5120 + arguments.prompt]
    load = lambda: AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16).eval()  # noqa: E731
    variants: dict[str, tuple[Any, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for format in arguments.formats:
            for kind in THEIRS[format]:
                path = Path(folder) / f"{kind}.gguf"
                write(load(), path, kind)
                options = {"n_ctx": 2048, "n_threads": arguments.threads, "n_threads_batch": arguments.threads}
                scoring = llama_cpp.Llama(str(path), logits_all=True, verbose=False, **options)
                scoring.eval(scored[0].tolist())
                logits = torch.from_numpy(scoring.scores[: scored.shape[1] - 1].copy())
                loss = torch.nn.functional.cross_entropy(logits, scored[0, 1:]).item()
                scoring.close()
                variants[f"llama.cpp {kind}"] = llama_cpp.Llama(str(path), verbose=False, **options), math.exp(loss)
            for chosen in (*arguments.targets, *arguments.schedules):
                model = load()
                if format != "bf16":
                    was_fx.quantize(model, {"lm_head": "int8", "*": format})
                if isinstance(chosen, Path):
                    schedule = was_fx.Schedule.load(chosen)
                else:
                    schedule = was_fx.uniform(was_fx.calibrate(model, fitted), chosen)
                was_fx.sparsify(model, schedule, prefill="sparse", lowering="recorded")
                loss = was_fx.perplexity(model, scored)
                name = chosen.name.split(".")[0] if isinstance(chosen, Path) else f"{chosen:.0%}"
                variants[f"{format}, {name}"] = was_fx.sparsify(model, schedule, lowering="recorded"), loss
        times: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(arguments.rounds):
            for name, (model, _) in variants.items():
                steps = _theirs if name.startswith("llama.cpp") else _ours
                times[name] += steps(model, prompt, arguments.tokens)
    table = Table("", "ms a token", "fastest", "perplexity")
    for name, (_, perplexity) in variants.items():
        row = {
            "variant": name,
            "ms": statistics.median(times[name]),
            "min_ms": min(times[name]),
            "perplexity": perplexity,
        }
        print(json.dumps(row | describe()))
        table.add_row(name, f"{row['ms']:.2f}", f"{row['min_ms']:.2f}", f"{perplexity:.2f}")
    Console().print(table)


def _ours(model: Any, prompt: Any, tokens: int) -> list[float]:
    from was_fx.measure.token_clock import TokenClock

    clock = TokenClock()
    model.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, streamer=clock)
    return clock.steps()[3:]  # two steps are recorded, and what waits for them is not counted


def _theirs(model: Any, prompt: Any, tokens: int) -> list[float]:
    model.reset()
    model.eval(prompt[0].tolist())
    times = []
    for i in range(tokens):
        start = time.perf_counter()
        model.eval([int(prompt[0, (i + 1) % prompt.shape[1]])])
        times.append(1e3 * (time.perf_counter() - start))
    return times


if __name__ == "__main__":
    main()
