"""Thresholds read off in one forward of a model that already drops channels, and the sparsity that they give.

`calibrate` sees the activations of the dense model, which change once channels are dropped. Here every Linear sees
what the Linears before it have left. Works on the module's own hooks: nothing is compiled, one forward is enough.
"""

import inspect
import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from was_fx.modules.linears import (
    LinearModule,
    body_linears,
    dropping,
    experts_per_token,
    find_linears,
    head_linears,
    weight_bytes_per_token,
)
from was_fx.modules.tokens import check_tokens
from was_fx.schedules.experts import groups, is_member
from was_fx.schedules.files.linear_schedule import LinearSchedule
from was_fx.schedules.files.schedule import Schedule, ScheduleMetadata
from was_fx.schedules.score import Score, channel_norms, channel_scale


@torch.no_grad()
def uniform_while_dropping(
    model: nn.Module, tokens: Tensor, target: float, score: Score | None = None, head: float | None = None
) -> Schedule:
    """The schedule in which every Linear drops a share `target` of its inputs, in the model that drops them.

    Args:
        model: a dense causal LM; not changed.
        tokens: LongTensor [n, seq], n · seq · K values are sorted at a time.
        target: sparsity of every Linear, at least 0 and below 1.
        score: WAS's by default.
        head: the share that the output head drops; by default it is not scheduled.
    """
    check_tokens(model, tokens)
    score = score or Score(1.0, 1)
    linears = body_linears(model) | ({} if head is None else head_linears(model))
    found: dict[str, LinearSchedule] = {}
    thresholds: dict[str, Tensor | None] = {}

    def read(name: str, x: Tensor) -> None:
        if name in found:
            return
        norms = channel_norms(linears[name].weight, score.norm)
        scores = (x.float().abs() * channel_scale(norms, score.exponent)).flatten()
        share = head if linears[name].head and head is not None else target
        rank = round(share * scores.numel())
        threshold = float(scores.kthvalue(rank).values) if rank else 0.0
        found[name] = LinearSchedule(share, threshold, score.exponent)
        thresholds[name] = found[name].channel_thresholds(norms)

    with dropping(linears, thresholds, look=read):
        model(input_ids=tokens.to(next(model.parameters()).device), use_cache=False)
    _fill(found, linears)
    ordered = {name: found[name] for name in linears if name in found}
    per_token = experts_per_token(model)
    metadata = ScheduleMetadata(
        experts_per_token={
            group: min(per_token, len(names))
            for group, names in groups(ordered).items()
            if per_token and is_member(names[0])
        }
    )
    return Schedule(ordered, {name: linears[name].shape for name in ordered}, score.norm, metadata)


def _fill(found: dict[str, LinearSchedule], names: Iterable[str]) -> None:
    """Give experts that no token was sent to the median threshold of the others of their group."""
    for members in groups(names).values():
        known = [found[name] for name in members if name in found]
        if known and is_member(members[0]):
            median = replace(known[0], threshold=statistics.median(each.threshold for each in known))
            found |= {name: median for name in members if name not in found}


def thresholds_of(schedule: Schedule, linears: Mapping[str, LinearModule]) -> dict[str, Tensor | None]:
    """Channel thresholds t [K] fp32 of dense Linears by a schedule, for `dropping`."""
    norms = {name: channel_norms(linear.weight, schedule.norm) for name, linear in linears.items()}
    return {name: schedule.linears[name].channel_thresholds(norms[name]) for name in linears}


@torch.no_grad()
def realised_sparsity(
    model: nn.Module, schedule: Schedule, tokens: Tensor, together: int | None = None
) -> tuple[float, int]:
    """Model sparsity on a text whose every token is sparse, and the bytes of weights read for one token; or for a step
    of several, which reads what any of them keeps.

    Args:
        model: the dense model; not changed.
        schedule: of that model.
        tokens: LongTensor [n, seq].
        together: consecutive tokens of each of the n sequences that are read in one step; tokens at the end that are
            no whole step don't count. Of models without experts. None: every token by itself.

    Raises:
        ValueError: `together` is given for a model with experts, which don't see all tokens.
    """
    linears = {name: linear for name, linear in find_linears(model).items() if name in schedule.linears}
    shares: dict[str, Tensor] = {}
    seen: dict[str, float] = {}  # share of the tokens that a Linear or an expert got

    if together is not None and any(linear.expert is not None for linear in linears.values()):
        raise ValueError("together is given for a model with experts; leave it out, tokens are counted one by one then")

    def note(name: str, weak: Tensor) -> None:
        if together is not None:
            steps = weak.shape[1] // together
            weak = weak[:, : steps * together].unflatten(1, (steps, together)).all(2).all(0)
        shares[name] = weak.mean(dtype=torch.float32)
        seen[name] = weak.shape[:-1].numel() / tokens.numel() if linears[name].expert is not None else 1.0

    takes = inspect.signature(type(model).forward).parameters
    dense_head = not any(linear.head for linear in linears.values())
    last = {"logits_to_keep": 1} if "logits_to_keep" in takes and dense_head else {}  # all of a long text may not fit
    with dropping(linears, thresholds_of(schedule, linears), dropped=note):
        model(input_ids=tokens.to(next(model.parameters()).device), use_cache=False, **last)
    sizes = {name: seen[name] * math.prod(linears[name].shape) for name in shares}
    dropped = {name: float(share) for name, share in shares.items()}
    skipped = sum(share * sizes[name] for name, share in dropped.items())
    saved = sum(share * seen[name] * linears[name].nbytes for name, share in dropped.items())
    return skipped / sum(sizes.values()), round(weight_bytes_per_token(model) - saved)
