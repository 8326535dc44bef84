"""Tables that others published for the schedules of `published`, as numbers to compare with."""

import functools
import json
from dataclasses import dataclass
from importlib import resources

from was_fx.schedules.names import suggestion

PERPLEXITY = "perplexity"


@dataclass(frozen=True)
class PublishedValue:
    """A number of a table.

    Attributes:
        measure: a data set ("wikitext2", "c4"), or a task of lm-eval.
        metric: "perplexity", or lm-eval's key, such as "acc_norm,none".
        value: as published: a perplexity, or a share of 1.
        error: its standard error; None where none is published.
    """

    measure: str
    metric: str
    value: float
    error: float | None = None


@dataclass(frozen=True)
class PublishedLevel:
    """What a table has of one schedule.

    Attributes:
        schedule: its name among the published schedules; None for the dense model.
        level: the sparsity that the publisher names, 0.0 for the dense model.
        values: the numbers.
    """

    schedule: str | None
    level: float
    values: tuple[PublishedValue, ...]


@dataclass(frozen=True)
class PublishedTable:
    """A table of one model.

    Attributes:
        name: what it is called here.
        model: its name on the Hub.
        source: where all of its numbers are from.
        convention: how perplexities were measured, one of `was_fx.measure.conventions`.
        fewshot: examples in the prompts of its tasks; None: it has no tasks.
        levels: dense first, if published, and then by level.
    """

    name: str
    model: str
    source: str
    convention: str
    fewshot: int | None
    levels: tuple[PublishedLevel, ...]

    @property
    def measures(self) -> tuple[str, ...]:
        """Its data sets and tasks, in its order."""
        return tuple(dict.fromkeys(value.measure for level in self.levels for value in level.values))

    @property
    def datasets(self) -> tuple[str, ...]:
        """Those of its measures that are data sets."""
        values = [value for level in self.levels for value in level.values]
        return tuple(dict.fromkeys(value.measure for value in values if value.metric == PERPLEXITY))

    @property
    def tasks(self) -> tuple[str, ...]:
        """Those of its measures that are tasks of lm-eval."""
        return tuple(each for each in self.measures if each not in self.datasets)


@functools.cache
def published_tables() -> tuple[PublishedTable, ...]:
    """All of them."""
    path = resources.files("was_fx.schedules") / "measured" / "published_tables.json"
    return tuple(_table(name, found) for name, found in json.loads(path.read_text(encoding="utf-8")).items())


def published_table(name: str) -> PublishedTable:
    """The table of a name.

    Raises:
        ValueError: there is none; says the nearest name.
    """
    tables = {table.name: table for table in published_tables()}
    if name not in tables:
        raise ValueError(
            f"there is no published table {name!r}{suggestion(name, tables)}; expected one of {', '.join(tables)}"
        )
    return tables[name]


def _table(name: str, found: dict) -> PublishedTable:  # type: ignore[type-arg]  # as JSON has it
    levels = tuple(
        PublishedLevel(each["schedule"], each["level"], tuple(PublishedValue(**value) for value in each["values"]))
        for each in found.pop("levels")
    )
    return PublishedTable(name=name, levels=levels, **found)
