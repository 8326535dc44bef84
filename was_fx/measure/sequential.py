"""Thresholds read off in one forward of a model that already drops channels, and the sparsity that they give.

`calibrate` sees the activations of the dense model, which change once channels are dropped. Here every Linear sees
what the Linears before it have left. Works on the module's own hooks: nothing is compiled, one forward is enough.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from was_fx.modules.linears import LinearModule, body_linears, dropping, weight_bytes_per_token
from was_fx.modules.tokens import check_tokens
from was_fx.schedules.files.linear_schedule import LinearSchedule
from was_fx.schedules.files.schedule import Schedule
from was_fx.schedules.score import Score, channel_norms, channel_scale


@torch.no_grad()
def uniform_while_dropping(model: nn.Module, tokens: Tensor, target: float, score: Score | None = None) -> Schedule:
    """The schedule in which every Linear drops a share `target` of its inputs, in the model that drops them.

    Args:
        model: a dense causal LM; not changed.
        tokens: LongTensor [n, seq], n · seq · K values are sorted at a time.
        target: sparsity of every Linear, at least 0 and below 1.
        score: WAS's by default.
    """
    check_tokens(model, tokens)
    score = score or Score(1.0, 1)
    linears = body_linears(model)
    found: dict[str, LinearSchedule] = {}
    thresholds: dict[str, Tensor | None] = {}

    def read(name: str, x: Tensor) -> None:
        if name in found:
            return
        norms = channel_norms(linears[name].weight, score.norm)
        scores = (x.float().abs() * channel_scale(norms, score.exponent)).flatten()
        rank = round(target * scores.numel())
        threshold = float(scores.kthvalue(rank).values) if rank else 0.0
        found[name] = LinearSchedule(target, threshold, score.exponent)
        thresholds[name] = found[name].channel_thresholds(norms)

    with dropping(linears, thresholds, look=read):
        model(input_ids=tokens.to(next(model.parameters()).device), use_cache=False)
    ordered = {name: found[name] for name in linears if name in found}
    return Schedule(ordered, {name: linears[name].shape for name in ordered}, score.norm)


def thresholds_of(schedule: Schedule, linears: Mapping[str, LinearModule]) -> dict[str, Tensor | None]:
    """Channel thresholds t [K] fp32 of dense Linears by a schedule, for `dropping`."""
    norms = {name: channel_norms(linear.weight, schedule.norm) for name, linear in linears.items()}
    return {name: schedule.linears[name].channel_thresholds(norms[name]) for name in linears}


@torch.no_grad()
def realised_sparsity(model: nn.Module, schedule: Schedule, tokens: Tensor) -> tuple[float, int]:
    """Model sparsity on a text whose every token is sparse, and the bytes of weights read for one token.

    Args:
        model: the dense model; not changed.
        schedule: of that model.
        tokens: LongTensor [n, seq].
    """
    linears = {name: linear for name, linear in body_linears(model).items() if name in schedule.linears}
    shares: dict[str, float] = {}

    def note(name: str, weak: Tensor) -> None:
        shares[name] = float(weak.mean(dtype=torch.float32))

    with dropping(linears, thresholds_of(schedule, linears), dropped=note):
        model(input_ids=tokens.to(next(model.parameters()).device), use_cache=False)
    sizes = {name: linears[name].shape[0] * linears[name].shape[1] for name in shares}
    skipped = sum(share * sizes[name] for name, share in shares.items())
    saved = sum(share * linears[name].nbytes for name, share in shares.items())
    return skipped / sum(sizes.values()), round(weight_bytes_per_token(model) - saved)
