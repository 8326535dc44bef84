"""Which Linears, by patterns on qualified names.

A pattern is a glob over the whole name, case counting (`model.layers.*.mlp.*`, `*.q_proj`; `*` crosses dots), or, after
`re:`, a regular expression that the whole name must match (`re:.*layers\\.[0-3]\\..*`). One that matches
`….experts.down_proj` matches the matrices of all experts there; a whole name, with brackets or not, matches itself.
"""

import difflib
import re
from collections.abc import Collection, Iterable
from fnmatch import translate

from was_fx.schedules.errors import ScheduleError
from was_fx.schedules.experts import group_of

REGEX = "re:"


def select(
    names: Collection[str],
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] = (),
    *,
    default: Collection[str] | None = None,
) -> list[str]:
    """The names that `include` matches and `exclude` doesn't, in the order of `names`.

    Args:
        names: qualified names to choose from.
        include: a pattern or several; None takes `default`.
        exclude: a pattern or several to leave out of those.
        default: what is taken without `include`; all names if that is not given.

    Returns:
        At least one name.

    Raises:
        ScheduleError: a pattern matches nothing or is no regular expression, with all of these; or no name is left.
    """
    wanted, unwanted = _listed(include), _listed(exclude)
    problems: list[str] = []
    taken = set(names if default is None else default)
    if include is not None:
        taken = {name for pattern in wanted for name in _matching(pattern, names, "include", problems)}
    dropped = {name for pattern in unwanted for name in _matching(pattern, names, "exclude", problems)}
    selected = [name for name in names if name in taken and name not in dropped]
    if not problems and not selected:
        problems.append(f"nothing is left of {len(names)} Linears")
    if problems:
        remedy = f"Give qualified names, globs such as '*.mlp.*', or regular expressions after {REGEX!r}."
        raise ScheduleError("these Linears cannot be chosen", problems, remedy)
    return selected


def _listed(patterns: str | Iterable[str] | None) -> list[str]:
    return [patterns] if isinstance(patterns, str) else list(patterns or ())


def _matching(pattern: str, names: Collection[str], option: str, problems: list[str]) -> list[str]:
    regex = pattern.startswith(REGEX)
    try:
        matcher = re.compile(pattern.removeprefix(REGEX) if regex else translate(pattern))
    except re.error as error:
        problems.append(f"{option} {pattern!r} is not a regular expression: {error}")
        return []
    found = [name for name in names if name == pattern or any(map(matcher.fullmatch, (name, group_of(name))))]
    if not found:
        near = difflib.get_close_matches(pattern, names, n=1, cutoff=0.3)
        example = near[0] if near else next(iter(names), "none")
        problems.append(f"{option} {pattern!r} matches none of {len(names)} Linears (one is {example})")
    return found
