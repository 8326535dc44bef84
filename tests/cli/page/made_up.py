"""A report of made-up measurements, and a reader of pages."""

import math
from html.parser import HTMLParser
from pathlib import Path

import torch

from was_fx import Calibration, LinearSchedule, Schedule, Score
from was_fx.choosing.choices import Choice
from was_fx.choosing.decision import decide
from was_fx.cli.input.compare_inputs import Trials
from was_fx.cli.input.eval_results import Score as TaskScore
from was_fx.cli.input.eval_results import TaskResults
from was_fx.cli.page.page import Report

PROJECTIONS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """A page's elements as (tag, attributes), its text by tag, and whether every element is closed in its turn."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert not self._open, f"not closed: {self._open}"

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if data.strip():
            self.texts.setdefault(self._open[-1] if self._open else "", []).append(data.strip())

    @property
    def sections(self) -> list[str]:
        return [attributes.get("id") or attributes["class"] for tag, attributes in self.elements if tag == "section"]

    def count(self, tag: str, css: str) -> int:
        return sum(each == tag and css in (attributes.get("class") or "").split() for each, attributes in self.elements)


def schedule(level: float, blocks: int = 3, projections: tuple[str, ...] = PROJECTIONS) -> Schedule:
    names = [f"model.layers.{block}.{each}" for block in range(blocks) for each in projections]
    return Schedule({name: LinearSchedule(level, level, 1.0) for name in names}, dict.fromkeys(names, (8, 4)))


def choice(format: str, name: str | None, level: float, loss: float, ms: float | None) -> Choice:
    size = {"bf16": 200_000_000, "int8": 100_000_000}[format]
    linears = dict.fromkeys(schedule(level).linears, level + 0.01) if name else {}
    text = "the sea was calm" if name is None else "the sea was <b>wild</b>"
    return Choice(
        format,
        name,
        loss,
        math.exp(loss),
        level,
        level + 0.01 if name else 0.0,
        linears,
        round(size * (1 - level)),
        (text,),
        ms,
        None if ms is None else 20.0,
        () if ms is None else (ms, 0.9 * ms, 1.1 * ms),
    )


def choices(*, timed: bool = True) -> list[Choice]:
    rows = [
        ("bf16", None, 0.0, 2.5, 20.0),
        ("bf16", "s25", 0.25, 2.52, 16.0),
        ("bf16", "s50", 0.5, 2.7, 10.0),
        ("int8", None, 0.0, 2.501, 12.5),
        ("int8", "s25", 0.25, 2.53, 8.0),
        ("int8", "s50", 0.5, 2.71, 5.0),
    ]
    return [choice(*row[:4], row[4] if timed else None) for row in rows]


def calibration() -> Calibration:
    levels = torch.arange(0, 1, 0.01)
    shapes = schedule(0.5).shapes
    return Calibration(Score(), levels, {name: 0.1 + levels**2 for name in shapes}, shapes, 64, "book.txt")


def make_report(**changes) -> Report:
    """Every section is there; `changes` replace fields."""
    measured = changes.pop("choices", choices())
    fields = {
        "model": "tiny",
        "text": "test.txt",
        "setting": "Measured on test.txt.",
        "choices": measured,
        "decision": decide(measured, changes.pop("within", 0.05)),
        "schedules": {"s25": schedule(0.25), "s50": schedule(0.5)},
        "prompts": ["Once upon a time"],
        "calibration": calibration(),
        "evaluations": [
            TaskResults(
                "tiny, prefill sparse.",
                ("dense", "s50"),
                {("piqa", "acc"): {"dense": TaskScore(0.75, 0.01), "s50": TaskScore(0.72, 0.011)}},
            )
        ],
        "searches": [Trials(Path("search.jsonl"), [0, 1, 2, 3], [3.0, 2.8, math.nan, 2.9], 0.5)],
        "environment": {"device": "a processor", "torch": "2.13"},
        "command": "was report tiny --schedule s25",
    }
    return Report(**fields | changes)
