"""A sparse draft and the dense model that verifies it: how many guesses are accepted, and tokens a second of both.

    python benchmarks/draft_acceptance.py                                    # the embedded model: acceptance only
    python benchmarks/draft_acceptance.py models/smollm2-135m --lowering recorded --weights none int4 --targets 0.25 0.4
    python benchmarks/draft_acceptance.py models/llama-3.1-8b --device cuda --dtype bfloat16 --weights none int8 int4
    python benchmarks/draft_acceptance.py --shape llama-3-8b --device cuda --dtype bfloat16 --weights int4

With a model, the dense one alone and with each draft take turns, prompt by prompt; both run as fast as was_fx can, the
dense one alone too: compiled and replayed as CUDA graphs on a GPU, recorded on a CPU with `--lowering recorded`. Times
are counted from the 32nd new token on, when everything is compiled, captured and recorded; medians over all texts.
Thresholds are uniform and measured with the draft's weights. "Round" is the time of a dense step and the guesses
before it. With --shape weights and text are random, so what is accepted says nothing; the times of a round and of the
dense model do. One JSON line per draft, then a table.
"""

import argparse
import copy
import functools
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from environment import describe
from rich.console import Console
from rich.table import Table

import was_fx
from was_fx import embedded
from was_fx.generate.compiled_step import CompiledStep
from was_fx.generate.decode_loop import AHEAD, decode
from was_fx.generate.drafted_loop import noting_rounds
from was_fx.generate.recorded_step import RecordedStep
from was_fx.measure.shapes import SHAPES, config
from was_fx.measure.speed import random_model
from was_fx.measure.token_clock import TokenClock

BEGIN = 32  # new tokens that are not timed
TEXT = Path(embedded.path())
COLUMNS = ("draft", "sparsity", "guesses", "tokens per dense step", "accepted per step", "accepted", "same text")
TIMES = ("dense ms", "with draft ms", "round ms", "faster")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a folder or a name on the Hub; by default the embedded model")
    parser.add_argument("--shape", choices=SHAPES, help="random weights of a model's shapes, for times")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", help="of the dense model")
    parser.add_argument("--lowering", choices=["inductor", "eager", "recorded"])
    parser.add_argument("--weights", nargs="+", default=["none"], help="of the draft: none, int8 or int4")
    parser.add_argument("--dense-weights", choices=["int8", "int4"], help="of the model that verifies")
    parser.add_argument("--targets", nargs="+", type=float, default=[0.25, 0.4, 0.5, 0.6, 0.75])
    parser.add_argument("--guesses", nargs="+", type=int, default=[3, 5, 8])
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, help="new tokens; 64 of the embedded model, else 160")
    parser.add_argument("--rounds", type=int, default=1, help="how often each text is timed")
    arguments = parser.parse_args()
    if arguments.model and arguments.shape:
        parser.error("give a model or --shape, not both")
    measure(arguments)


def measure(arguments: argparse.Namespace) -> None:
    """Print what was found of every draft."""
    machine = describe(arguments.device)
    model, fitted, prompts = _loaded(arguments)
    if arguments.dense_weights:
        was_fx.quantize(model, arguments.dense_weights)
    name = arguments.model or arguments.shape
    timed = name is not None
    tokens = arguments.tokens or (160 if timed else 64)
    if timed and tokens <= 2 * BEGIN:
        sys.exit(f"--tokens is {tokens}; give more than {2 * BEGIN}, of which the first {BEGIN} are not timed")
    alone = copy.deepcopy(model)  # the weights of a model with drafts lie otherwise
    dense = _generate_alone(alone, arguments) if timed else alone.generate
    table = Table(*COLUMNS, *(TIMES if timed else ()), title=f"{name or 'embedded'}, {machine['device']}")
    calibration = was_fx.calibrate(model, fitted)
    drafts = {}
    for weights in arguments.weights:
        chosen, lowering = None if weights == "none" else weights, arguments.lowering
        draft = was_fx.draft(model, was_fx.uniform(calibration, 0.0), weights=chosen, lowering=lowering)
        # Thresholds of the draft's own weights.
        own = calibration if chosen is None else was_fx.calibrate(was_fx.densify(draft), fitted)
        drafts[weights] = draft, own
    print("every draft is made; now they are measured", file=sys.stderr, flush=True)
    for weights, (draft, own) in drafts.items():
        for target in arguments.targets:
            was_fx.sparsify(draft, was_fx.uniform(own, target), lowering=arguments.lowering)
            for guesses in arguments.guesses:
                draft.generation_config.num_assistant_tokens = guesses
                row = _compared(model, draft, dense, prompts, tokens, arguments.rounds, timed)
                row = {"draft": weights, "sparsity": target, "guesses": guesses, **row}
                print(json.dumps(machine | {"model": name, "dtype": arguments.dtype} | row), flush=True)
                table.add_row(*[f"{each:.3g}" if isinstance(each, float) else str(each) for each in row.values()])
    Console(width=160).print(table)


def _loaded(arguments: argparse.Namespace) -> tuple[Any, Any, Any]:
    """Model, tokens [n, 512] to measure thresholds on, and prompts [n, seq], both of books."""
    dtype = getattr(torch, arguments.dtype)
    if arguments.shape:
        model = random_model(config(arguments.shape), dtype=dtype, device=arguments.device)
        generator = torch.Generator().manual_seed(0)
        calibration, test = (
            torch.randint(model.config.vocab_size, size, generator=generator)
            for size in ((4, 512), (arguments.prompts, arguments.prompt))
        )
    elif arguments.model is None:
        model, _ = embedded.load(dtype)
        calibration, test = embedded.tokens("calibration", 512), embedded.tokens("test", arguments.prompt)
    else:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype).eval()
        read = AutoTokenizer.from_pretrained(arguments.model)
        texts = [(TEXT / f"{name}.txt").read_text(encoding="utf-8") for name in ("calibration", "test")]
        calibration, test = (read(text, return_tensors="pt").input_ids[0] for text in texts)
        calibration = calibration[: 4 * 512].view(-1, 512)
        test = test[: len(test) // arguments.prompt * arguments.prompt].view(-1, arguments.prompt)
    spaced = test[:: max(1, len(test) // arguments.prompts)][: arguments.prompts]
    return model.to(arguments.device), calibration.to(arguments.device), spaced.to(arguments.device)


def _generate_alone(model: Any, arguments: argparse.Namespace) -> Any:
    """`generate` of the dense model by the same fast steps."""
    if arguments.lowering == "recorded":
        loop = functools.partial(decode, ahead=0, direct=RecordedStep)
    elif arguments.device.startswith("cuda") and arguments.lowering != "eager":
        loop = functools.partial(decode, ahead=AHEAD, step=CompiledStep(model, {"as_step": True}))
    else:
        return model.generate

    def generate(*given: Any, streamer: Any = None, **keywords: Any) -> Any:
        streaming = functools.partial(loop, streamer=streamer)  # generate() keeps it from a loop
        return model.generate(
            *given, custom_generate=streaming, streamer=streamer, cache_implementation="static", **keywords
        )

    return generate


def _compared(
    model: Any, draft: Any, dense: Any, prompts: Any, tokens: int, rounds: int, timed: bool
) -> dict[str, Any]:
    """What a draft does on all prompts, and the dense model in turns with it."""
    arguments = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    times: dict[str, list[float]] = {"dense": [], "draft": []}
    equal = 0
    with noting_rounds() as noted:
        for repetition in range(rounds + timed):  # the first one compiles
            for prompt in prompts.split(1):
                mask = torch.ones_like(prompt)
                clocks = {name: TokenClock() for name in times}
                texts = [
                    generate(prompt, attention_mask=mask, streamer=clocks[name], **arguments, **more)
                    for name, generate, more in (
                        ("dense", dense, {}),
                        ("draft", model.generate, {"assistant_model": draft}),
                    )
                ]
                if repetition or not timed:
                    equal += torch.equal(*texts)
                    for name, clock in clocks.items():
                        times[name].append(_ms_a_token(clock.times[1:]) if timed else 0.0)
    steps, guessed = len(noted), sum(each.guessed for each in noted)
    accepted = sum(each.accepted for each in noted)
    row: dict[str, Any] = {
        "tokens_per_step": (steps + accepted) / steps,
        "accepted_per_step": accepted / steps,
        "accepted_share": accepted / guessed,
        "same_text": f"{equal} of {len(times['draft'])}",
    }
    if timed:
        ratios = [one / other for one, other in zip(*times.values(), strict=True)]
        row |= {f"{name}_ms": statistics.median(each) for name, each in times.items()}
        row["round_ms"] = row["draft_ms"] * row["tokens_per_step"]
        row["faster"] = statistics.median(ratios)
    return row


def _ms_a_token(times: list[float]) -> float:
    """Milliseconds a token, of the seconds at which tokens came, alone or several at once."""
    begin = next(i for i in range(BEGIN, len(times)) if times[i + 1] - times[i] > 3e-4)
    return 1e3 * (times[-1] - times[begin]) / (len(times) - 1 - begin)


if __name__ == "__main__":
    main()
