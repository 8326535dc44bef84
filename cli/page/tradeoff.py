"""Loss against what a token costs: every measured choice, and the front that none other beats."""

from collections.abc import Callable, Mapping, Sequence

from markupsafe import Markup

from was_fx.choosing.choices import Choice
from was_fx.choosing.decision import Cost, Decision, cost_bytes, cost_time, front
from was_fx.cli.page import svg

_WIDTH, _HEIGHT = 460, 340
_CHARACTER = 7.6

# Left, top, right, bottom.
Box = tuple[float, float, float, float]


def by_bytes(choices: Sequence[Choice], decision: Decision, kinds: Mapping[str, int]) -> Markup:
    """Loss against the bytes that a token reads."""
    unit, name = (1e9, "GB") if decision.dense.bytes_per_token >= 1e9 else (1e6, "MB")
    return _draw(
        choices,
        decision,
        kinds,
        cost_bytes,
        lambda each: each.bytes_per_token / unit,
        f"weights read per token, {name}",
        "Loss against bytes per token",
    )


def by_speed(choices: Sequence[Choice], decision: Decision, kinds: Mapping[str, int]) -> Markup:
    """Loss against tokens per second."""
    return _draw(
        choices,
        decision,
        kinds,
        cost_time,
        lambda each: speed(each, decision.dense),
        "tokens per second",
        "Loss against speed",
    )


def speed(choice: Choice, dense: Choice) -> float:
    """Tokens per second: the speed-up, which was measured in turns, on that of the dense model."""
    assert choice.ratio is not None
    assert dense.ms_per_token is not None
    return choice.ratio * 1e3 / dense.ms_per_token


def label(choice: Choice) -> str:
    """A choice in one line: "int8, s50" or "int8, dense"."""
    return f"{choice.format}, {choice.schedule or 'dense'}"


def _draw(
    choices: Sequence[Choice],
    decision: Decision,
    kinds: Mapping[str, int],
    cost: Cost,
    value: Callable[[Choice], float],
    what: str,
    title: str,
) -> Markup:
    best = front(choices, cost)
    root = svg.drawing(
        _WIDTH,
        _HEIGHT,
        title,
        f"{len(choices)} choices; on the front: {'; '.join(label(each) for each in best)}. The table has the numbers.",
    )
    low, high = svg.padded([value(each) for each in choices], 0.1)
    x = svg.Scale(max(low, 0.0), high, 52, _WIDTH - 12)
    y = svg.Scale(*svg.padded([each.loss for each in choices], 0.1), _HEIGHT - 48, 30)
    svg.axes(root, x, y, what, "loss, nats per token")
    if len(best) > 1:
        svg.add(root, "path", "front", d=svg.path([(x(value(each)), y(each.loss)) for each in best]))
    for each in choices:
        place = x(value(each)), y(each.loss)
        if each is decision.choice:
            svg.add(root, "circle", "chosen", cx=place[0], cy=place[1], r=11)
        tip = f"{label(each)}: {value(each):.4g} {what.rpartition(', ')[2]}, loss {each.loss:.4f}"
        svg.mark(root, kinds[each.format], *place, tip, "" if each.schedule else "hollow")
    first = [each for each in choices if each is decision.choice or each.schedule is None]
    _name(root, [*first, *(each for each in best if each not in first)], choices, lambda c: (x(value(c)), y(c.loss)))
    return svg.markup(root)


def _name(
    root: svg.Element,
    named: Sequence[Choice],
    choices: Sequence[Choice],
    place: Callable[[Choice], tuple[float, float]],
) -> None:
    """Names beside marks, where one fits that covers neither a mark nor a name before it."""
    taken = [(px - 7, py - 7, px + 7, py + 7) for px, py in map(place, choices)]
    for each in named:
        text = f"{100 * each.nominal:.3g} %" if each.schedule else "dense"
        across = _CHARACTER * len(text)
        px, py = place(each)
        for right, down in ((True, -8), (True, 17), (False, -8), (False, 17)):
            left = px + 10 if right else px - 10 - across
            box = (left, py + down - 10, left + across, py + down + 2)
            if left >= 54 and box[2] <= _WIDTH and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                svg.write(root, left, py + down, text, "name")
                break


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
