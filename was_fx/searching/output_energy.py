"""The share of each Linear's output energy that is dropped at each sparsity: the shape of its loss curve."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from was_fx.modules.linears import find_linears, looking_at_inputs
from was_fx.schedules.experts import group_of, groups
from was_fx.schedules.projection import Vector
from was_fx.schedules.score import channel_norms, channel_scale

# Inputs of a Linear that are looked at: a share of about 0.5 % is then known to a tenth of itself.
_SAMPLE = 1 << 16


@torch.no_grad()
def dropped_energy(
    model: nn.Module, exponents: Mapping[str, float], tokens: Tensor, *, norm: int, levels: Vector
) -> Vector:
    """Σ x_j²‖W[:, j]‖₂² over the dropped channels, as a share of all, by sparsity.

    Channels of random sign add up by their energy, so this is the share of ‖Wx‖² that a sparsity costs, without a
    product for each level.

    Args:
        model: the dense model.
        exponents: α of the Linears, by qualified name.
        tokens: LongTensor [n, seq], one forward pass.
        norm: p of the score's norms.
        levels: sparsities, [G], from 0 to 1.

    Returns:
        [Linears, G] in the order of `exponents`, nondecreasing from 0 to 1; the experts of a parameter are one Linear.
    """
    linears = {name: linear for name, linear in find_linears(model).items() if name in exponents}
    curves: dict[str, Vector] = {}
    totals: dict[str, float] = {}

    def measure(name: str, x: Tensor) -> None:
        x = x.reshape(-1, x.shape[-1]).float()
        weight = linears[name].weight
        scores = (x.abs() * channel_scale(channel_norms(weight, norm), exponents[name])).flatten()
        energies = (x.square() * channel_norms(weight, 2).square()).flatten()
        drawn = torch.randint(scores.numel(), (_SAMPLE,), generator=torch.Generator().manual_seed(0)).to(x.device)
        order = drawn[scores[drawn].argsort()]
        total = energies[order].double().cumsum(0).cpu().numpy()
        ranks = np.linspace(0, 1, len(total) + 1)
        group, whole = group_of(name), float(energies.double().sum())
        curve = whole * np.interp(levels, ranks, np.concatenate([[0.0], total]) / max(total[-1], 1e-300))
        curves[group] = curves[group] + curve if group in curves else curve
        totals[group] = totals.get(group, 0.0) + whole

    with looking_at_inputs(linears, measure):
        model(input_ids=tokens.to(next(model.parameters()).device), use_cache=False)
    return np.stack([curves[group] / max(totals[group], 1e-300) for group in groups(exponents)])
