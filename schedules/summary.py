"""What a schedule amounts to: its budget by projection and by depth, and what should make a reader look twice."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from was_fx.schedules.experts import groups, weights_read
from was_fx.schedules.names import by_block

if TYPE_CHECKING:
    from was_fx.schedules.files.schedule import Schedule

# How far the sparsity of a Linear may lie from those of its projection in the blocks around it.
_FAR = 0.25
_AROUND = 2
_SHOWN = 3
# (from this nominal sparsity on, what is known): docs/choosing-a-level.md has the sources.
_GSM8K = "Llama-3-8B on GSM8K: 50.0 % dense, 44.2 % at 40 %, 21.6 % at 60 % (WAS, EMNLP 2025); measure your own task"
_LEVELS = (
    (
        0.68,
        "text itself suffers: published perplexities at 75 % are 12.76 for 5.47 (Llama-2-7B) and 28.33 for 6.14 "
        "(Llama-3-8B; WAS, EMNLP 2025), and reasoning is gone long before",
    ),
    (0.58, f"reasoning has collapsed where perplexity looks fine yet. {_GSM8K}"),
    (0.38, f"reasoning suffers before perplexity shows it. {_GSM8K}"),
)


@dataclass(frozen=True)
class Part:
    """A part of the scheduled Linears.

    Attributes:
        weights: that a dense token reads.
        dropped: that a token does not read, nominally.
    """

    weights: float
    dropped: float

    @property
    def sparsity(self) -> float:
        """Nominal."""
        return self.dropped / self.weights


def part(schedule: "Schedule", names: list[str] | None = None) -> Part:
    """All of a schedule, or some of its Linears."""
    weights = weights_read(schedule.shapes, schedule.metadata.experts_per_token)
    names = list(schedule.linears) if names is None else names
    dropped = sum(weights[name] * schedule.linears[name].sparsity for name in names)
    return Part(sum(weights[name] for name in names), dropped)


def by_projection(schedule: "Schedule") -> dict[str, Part]:
    """By projection, in the order of the model; a Linear outside the blocks by its name."""
    names: dict[str, list[str]] = {}
    rows, others = by_block(_grouped(schedule))
    for row in rows.values():
        for projection, members in row.items():
            names.setdefault(projection, []).extend(members)
    return {key: part(schedule, members) for key, members in {**names, **others}.items()}


def by_depth(schedule: "Schedule", most: int = 8, other: "Schedule | None" = None) -> dict[str, Part]:
    """By runs of blocks, at most so many and as equal as can be: "0–3", "4–7", …

    Args:
        schedule: which.
        most: runs.
        other: whose blocks the runs are cut from too, so that both can be compared.
    """
    rows, _ = by_block(_grouped(schedule))
    keys = sorted({*rows, *(by_block(other.linears)[0] if other else ())})
    count = min(most, len(keys))
    several = len({prefix for prefix, _ in keys}) > 1
    found = {}
    for at in range(count):
        run = keys[len(keys) * at // count : len(keys) * (at + 1) // count]
        first, last = ((f"{key[0]}.{key[1]}" if several else str(key[1])) for key in (run[0], run[-1]))
        members = [name for key in run for group in rows.get(key, {}).values() for name in group]
        if members:
            found[first if len(run) == 1 else f"{first}–{last}"] = part(schedule, members)
    return found


def block_count(schedule: "Schedule") -> int:
    """How many blocks have a scheduled Linear."""
    return len(by_block(schedule.linears)[0])


def warnings(schedule: "Schedule") -> list[str]:
    """What a user of a schedule should know, a sentence each."""
    found = [text for level, text in _LEVELS if schedule.sparsity >= level][:1]
    far = outliers(schedule)
    for name, (own, around) in list(far.items())[:_SHOWN]:
        found.append(f"{name} drops {100 * own:.1f} %, the blocks around it {100 * around:.1f} %")
    if len(far) > _SHOWN:
        found.append(f"{len(far) - _SHOWN} more Linears lie {100 * _FAR:.0f} points or more off the blocks around them")
    return found


def outliers(schedule: "Schedule") -> dict[str, tuple[float, float]]:
    """Linears (of experts, groups) far off the same projection in the two blocks before and after, the farthest first:
    (own sparsity, median of those)."""
    means = group_means(schedule)
    columns: dict[tuple[str, str], list[tuple[str, float]]] = {}
    for (prefix, _), row in by_block({name: name for name in means})[0].items():
        for projection, name in row.items():
            columns.setdefault((prefix, projection), []).append((name, means[name]))
    found = {}
    for column in columns.values():
        if len(column) <= 2 * _AROUND:
            continue
        for at, (name, own) in enumerate(column):
            near = column[max(0, at - _AROUND) : at] + column[at + 1 : at + 1 + _AROUND]
            if len(near) > 1:
                around = statistics.median(value for _, value in near)
                if abs(own - around) >= _FAR:
                    found[name] = own, around
    return dict(sorted(found.items(), key=lambda item: -abs(item[1][0] - item[1][1])))


def group_means(schedule: "Schedule") -> dict[str, float]:
    """The sparsity of each Linear, and of all experts of a parameter their mean."""
    return {
        group: statistics.fmean(schedule.linears[name].sparsity for name in names)
        for group, names in _grouped(schedule).items()
    }


def weights_format(formats: Mapping[str, str] | None) -> str:
    """The format that most Linears of a schedule's model have: "bf16", "int8" or "int4"."""
    if not formats:
        return "bf16"
    return statistics.mode(formats.values()).partition("-")[0]


def _grouped(schedule: "Schedule") -> dict[str, list[str]]:
    return groups(schedule.linears)
