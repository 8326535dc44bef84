"""Quantise a weight for the inputs that it meets: input channels one after the other, each channel's error made up for
by the channels still to come (GPTQ, https://arxiv.org/abs/2210.17323).

    least  tr (W − Ŵ) H (W − Ŵ)ᵀ,   H = mean of x xᵀ over the inputs x [K] of a text

With U upper triangular and Uᵀ U = H⁻¹, channel k leaves the error e = (w[k] − ŵ[k]) / U[k, k] and each later channel j
becomes w[j] − U[k, j] · e. Channels with the largest inputs come first, when most others are left to make up for them.
A channel of int4 has a scale and groups of its own, which are fitted to what the channel has become.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from was_fx.kernels.quantized.fit import empty_int4, fit_groups, int8_scales, round_int4, round_int8
from was_fx.kernels.quantized.rows import FORMATS, INT4, QuantizedRows, check_group, int4_values, pack_int4, pack_int8

DAMPING = 0.01  # of the mean of H's diagonal
_BLOCK = 128  # channels whose errors reach all later ones in one product
_FITTED = 16  # channels that are fitted at a time


@torch.no_grad()
def quantize_with_hessian(
    name: str, weight: Tensor, hessian: Tensor, format: str = INT4, group: int = 32, damping: float = DAMPING
) -> QuantizedRows:
    """Quantise W [N, K] for inputs whose second moments are known.

    Args:
        name: of the Linear, for errors.
        weight: finite, of a floating dtype.
        hessian: fp32 [K, K], the mean of x xᵀ or a multiple of it, on the weight's device.
        format: "int8" or "int4".
        group: outputs that share a step and a zero point of int4.
        damping: share of the mean of H's diagonal that is added to the diagonal; raised where H is singular.

    Raises:
        ValueError: H holds NaN or inf, H is not [K, K], the format is unknown, or the group doesn't
            divide N.
    """
    outputs, channels = weight.shape
    if format not in FORMATS:
        raise ValueError(f"the format is {format!r}; expected one of {', '.join(FORMATS)}")
    if format == INT4:
        check_group(name, outputs, group)
    _check_hessian(name, hessian, channels)
    order = hessian.diagonal().argsort(descending=True)
    rows = weight.t()[order].float()
    factor = _factor(hessian[order][:, order], damping)
    if format == INT4:
        levels, scales, groups = _int4(rows, factor, group)
        made = empty_int4(outputs, channels, group, weight.device)
        assert made.groups is not None
        made.codes[order], made.scales[order], made.groups[order] = pack_int4(levels), scales, groups
        return made
    scales = int8_scales(weight)
    codes = torch.empty(channels, outputs, dtype=torch.int8, device=weight.device)
    codes[order] = _int8(rows, factor, scales)
    return QuantizedRows(pack_int8(codes), scales, None)


def _int4(rows: Tensor, factor: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Levels uint8 [K, N], scales [K] and groups [K, N / group, 2] of rows [K, N] fp32, which are used up."""
    channels, outputs = rows.shape
    levels = torch.empty(channels, outputs, dtype=torch.uint8, device=rows.device)
    scales = torch.empty(channels, device=rows.device)
    groups = torch.empty(channels, outputs // group, 2, dtype=torch.uint8, device=rows.device)

    def quantise(k: int) -> Tensor:
        if k % _FITTED == 0:
            part = slice(k, k + _FITTED)
            scales[part], groups[part] = fit_groups(rows[part], group)
        one = slice(k, k + 1)
        levels[one] = round_int4(rows[one], scales[one], groups[one])
        return int4_values(levels[one], scales[one], groups[one])[0]

    _feed_errors_forward(rows, factor, quantise)
    return levels, scales, groups


def _int8(rows: Tensor, factor: Tensor, scales: Tensor) -> Tensor:
    """Levels int8 [K, N] of rows [K, N] fp32, which are used up, with scales [N]."""
    levels = torch.empty_like(rows, dtype=torch.int8)

    def quantise(k: int) -> Tensor:
        levels[k] = round_int8(rows[k], scales)
        return levels[k] * scales

    _feed_errors_forward(rows, factor, quantise)
    return levels


def _feed_errors_forward(rows: Tensor, factor: Tensor, quantise: Callable[[int], Tensor]) -> None:
    """Call `quantise(k)` for each row k of `rows` [K, N] in turn, and change the later ones by the error it leaves.

    Args:
        rows: fp32, changed.
        factor: U [K, K].
        quantise: returns what row k, as it is by then, has become, [N].
    """
    channels = rows.shape[0]
    for start in range(0, channels, _BLOCK):
        stop = min(start + _BLOCK, channels)
        errors = torch.empty_like(rows[start:stop])
        for k in range(start, stop):
            errors[k - start] = (rows[k] - quantise(k)) / factor[k, k]
            rows[k + 1 : stop].addr_(factor[k, k + 1 : stop], errors[k - start], alpha=-1)
        rows[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)


def _factor(hessian: Tensor, damping: float) -> Tensor:
    """U [K, K] fp32, upper triangular with Uᵀ U = (H + damping · mean of the diagonal)⁻¹.

    By one Cholesky decomposition of H with its channels in reverse, H = R Rᵀ with R upper triangular, so that U = R⁻¹;
    in fp64, for the eigenvalues of a language model's H span more than fp32 has digits for.
    """
    reverse = hessian.double().flip(0, 1)
    mean = reverse.diagonal().mean()
    identity = torch.eye(len(reverse), dtype=reverse.dtype, device=reverse.device)
    if mean <= 0:
        return identity.float()  # the text never reached this Linear: nothing to make up for
    while True:
        lower, failed = torch.linalg.cholesky_ex(reverse + identity * (damping * mean))
        if not failed:
            return torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1).float()
        damping = max(10 * damping, 1e-6)


def _check_hessian(name: str, hessian: Tensor, channels: int) -> None:
    if hessian.shape != (channels, channels):
        raise ValueError(f"{name}: the Hessian is {list(hessian.shape)}; expected [{channels}, {channels}]")
    if not hessian.isfinite().all():
        raise ValueError(
            f"{name}: the Hessian holds NaN or inf: the model overflows on the text that it was taken from; load it in "
            "bf16 or fp32"
        )
