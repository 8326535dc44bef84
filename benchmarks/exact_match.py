"""Where loss looks fine and answers fall: exact answers by generation, beside perplexity, at several sparsities.

    python scripts/real_models.py qwen2.5-coder-0.5b --to models
    python benchmarks/exact_match.py models/qwen2.5-coder-0.5b --text wikitext2.valid.txt.xz --targets 0.25 0.4 0.5 0.6

Two tasks that a model of half a billion parameters can do, made from numbers of a seed. "lookup": a list of names with
a number each, then one of the names; the answer is its number. "steps": additions and subtractions of numbers below
20, written out one below the other as in the examples before it; the answer is the last result. Answers are generated
greedily, token by token through the decode steps, prompts dense. A mean of losses hardly shows what they show: every
token of an answer must be right, and each is read by those after it.

Schedules are uniform, or by `--recipe fisher` with weights corrected once. Thresholds are measured while the model
drops channels, on windows of the text. One JSON line per sparsity and then a table.
"""

import argparse
import json
import math
import random
from pathlib import Path
from typing import Any

import torch
from environment import describe
from rich.console import Console
from rich.table import Table

import was_fx
from was_fx.cli.input.texts import cut_windows, opening_ids, read_file

NAMES = ["Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gia", "Hugo", "Ida", "Jan", "Kim", "Leo", "Mia", "Noah", "Olga"]
SHOTS = 2
LONGEST = {"lookup": 6, "steps": 40}  # tokens of an answer


def lookup(random: random.Random) -> tuple[str, str]:
    """A prompt and its answer."""

    def one(asked: bool) -> tuple[str, str]:
        names = random.sample(NAMES, 8)
        numbers = [str(random.randrange(100, 1000)) for _ in names]
        chosen = random.randrange(len(names))
        lines = [f"{name}: {number}" for name, number in zip(names, numbers, strict=True)]
        question = f"\nThe number of {names[chosen]} is"
        return "\n".join(lines) + question + ("" if asked else f" {numbers[chosen]}.\n\n"), numbers[chosen]

    before = "".join(one(False)[0] for _ in range(SHOTS))
    prompt, answer = one(True)
    return before + prompt, answer


def steps(random: random.Random) -> tuple[str, str]:
    """A prompt and its answer: the result of the last line."""

    def one(asked: bool) -> tuple[str, str]:
        value, terms, lines = random.randrange(20), [], []
        first = value
        for _ in range(3):
            change = random.choice([n for n in range(-19, 20) if n and 0 <= value + n < 100])
            sign = "+" if change > 0 else "-"
            terms.append(f"{sign} {abs(change)}")
            lines.append(f"{value} {sign} {abs(change)} = {value + change}")
            value += change
        question = f"Compute {first} {' '.join(terms)}:\n"
        return question + ("" if asked else "\n".join(lines) + "\n\n"), lines[-1]

    before = "".join(one(False)[0] for _ in range(2 * SHOTS))
    prompt, answer = one(True)
    return before + prompt, answer.rpartition(" ")[2]


@torch.no_grad()
def accuracy(model: Any, tokenizer: Any, task: Any, count: int, seed: int) -> float:
    """Share of prompts that are answered exactly."""
    draw = random.Random(seed)
    right = 0
    for _ in range(count):
        prompt, answer = task(draw)
        ids = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
        new = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=LONGEST[task.__name__], do_sample=False
        )
        text = tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True)
        said = text.strip().split("\n\n")[0].split()
        right += bool(said) and said[0 if task is lookup else -1].rstrip(".") == answer
    return right / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder or a name on the Hub")
    parser.add_argument("--text", type=Path, required=True, help="for thresholds and perplexity; .xz is unpacked")
    parser.add_argument("--targets", nargs="+", type=float, default=[0.25, 0.4, 0.5, 0.6])
    parser.add_argument("--recipe", choices=["uniform", "fisher"], default="uniform")
    parser.add_argument("--count", type=int, default=100, help="prompts of each task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()

    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model: Any = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype)).eval()
    model.to(arguments.device)
    ids = torch.tensor(tokenizer(read_file(str(arguments.text)).content, add_special_tokens=False)["input_ids"])
    windows = cut_windows(ids, 512, opening_ids(tokenizer))
    fitted, scored = windows[:16], windows[16:32]
    calibration = was_fx.calibrate(model, fitted, fisher=arguments.recipe == "fisher", batch_size=2)
    if arguments.recipe == "fisher":
        calibration = was_fx.correct_fisher(model, calibration, tokens=fitted, batch_size=2)
    made = was_fx.fisher if arguments.recipe == "fisher" else was_fx.uniform
    table = Table("sparsity", "perplexity", "lookup", "steps", title=f"{arguments.model}, {arguments.recipe}")
    for target in [0.0, *arguments.targets]:
        was_fx.densify(model)
        if target:
            schedule = was_fx.recalibrate(model, made(calibration, target), fitted[:8], batch_size=2)
            was_fx.sparsify(model, schedule)
        row = {"target": target, "perplexity": math.exp(was_fx.evaluate(model, scored, batch_size=2).loss)}
        for task in (lookup, steps):
            row[task.__name__] = accuracy(model, tokenizer, task, arguments.count, arguments.seed)
        print(json.dumps(row | {"model": arguments.model, "recipe": arguments.recipe} | describe()), flush=True)
        table.add_row(
            f"{target:.0%}" if target else "dense",
            f"{row['perplexity']:.2f}",
            *(f"{row[task]:.0%}" for task in ("lookup", "steps")),
        )
    Console().print(table)


if __name__ == "__main__":
    main()
