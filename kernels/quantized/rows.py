"""How the rows of a quantised Wᵀ lie: what belongs to an input channel lies together, and is skipped together.

    int8   W[n, k] = scales[n] · codes[k, n]
    int4   W[n, k] = scales[k] · s · (q − z / 16)                 s, z of the group of outputs that n lies in

A weight of int8 has one scale for each output, which a product applies once, to its sums. One of int4 has groups of 32,
64 or 128 outputs inside one input channel; s and z are bytes, so that a group of 32 costs half a bit per weight.

Sixteen bytes of an int4 row hold 32 outputs: byte i has output i in its low four bits and output i + 16 in the others.
Rows of int8 are padded to whole sectors of 32 bytes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

INT8, INT4 = "int8", "int4"
FORMATS = (INT8, INT4)
GROUPS = (32, 64, 128)

_BLOCK = 32  # outputs that sixteen bytes of int4 hold, and the sector of int8


@dataclass(frozen=True, eq=False)
class QuantizedRows:
    """A quantised weight W [N, K].

    Attributes:
        codes: int8 [K, N padded to a multiple of 32], or uint8 [K, N / 2].
        scales: fp32, [N] of int8, [K] of int4.
        groups: uint8 [K, N / group, 2], s and z of each group of int4; None for int8.
    """

    codes: Tensor
    scales: Tensor
    groups: Tensor | None

    @property
    def format(self) -> str:
        """ "int8" or "int4"."""
        return INT8 if self.groups is None else INT4

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return outputs_of(self.codes, self.scales, self.groups), self.codes.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        tensors = (self.codes, self.scales, self.groups)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)

    def dequantize(self, dtype: torch.dtype, channels: slice | Tensor = slice(None)) -> Tensor:
        """Wᵀ [K, N] of some input channels, rows contiguous, in a floating dtype."""
        codes = self.codes[channels]
        if self.groups is None:
            return (codes[:, : self.scales.shape[0]] * self.scales).to(dtype)
        return int4_values(unpack_int4(codes), self.scales[channels], self.groups[channels]).to(dtype)

    def dequantize_outputs(self, dtype: torch.dtype, outputs: Tensor) -> Tensor:
        """W [M, K] of some outputs, int64 [M], in a floating dtype: the numbers that `dequantize` gives."""
        if self.groups is None:
            return (self.codes.index_select(1, outputs) * self.scales[outputs]).t().to(dtype)
        block, place = outputs // _BLOCK, outputs % _BLOCK
        pairs = self.codes.index_select(1, block * (_BLOCK // 2) + place % (_BLOCK // 2))
        q = torch.where(place < _BLOCK // 2, pairs & 15, pairs >> 4)
        groups = self.groups.index_select(1, outputs // (self.shape[0] // self.groups.shape[1]))
        step = self.scales[:, None] * groups[..., 0]
        return (step * (q - groups[..., 1].float() / 16)).t().to(dtype)


def outputs_of(codes: Tensor, scales: Tensor, groups: Tensor | None) -> int:
    """N of a weight, or of those of experts that are stacked."""
    return scales.shape[-1] if groups is None else 2 * codes.shape[-1]


def expert_rows(codes: Tensor, scales: Tensor, groups: Tensor | None, expert: int) -> QuantizedRows:
    """The weight [N, K] of one of the experts that are stacked: views."""
    return QuantizedRows(codes[expert], scales[expert], None if groups is None else groups[expert])


def pack_int8(codes: Tensor) -> Tensor:
    """int8 [K, N padded to a multiple of 32] of codes [K, N]; the padding is 0."""
    return torch.nn.functional.pad(codes, (0, -codes.shape[1] % _BLOCK)).contiguous()


def pack_int4(q: Tensor) -> Tensor:
    """uint8 [K, N / 2] of integers 0 … 15, [K, N] with N a multiple of 32."""
    halves = q.to(torch.uint8).unflatten(1, (-1, 2, _BLOCK // 2))
    return (halves[:, :, 0] | (halves[:, :, 1] << 4)).flatten(1).contiguous()


def unpack_int4(codes: Tensor) -> Tensor:
    """uint8 [K, N], the integers that `pack_int4` packed."""
    blocks = codes.unflatten(1, (-1, _BLOCK // 2))
    return torch.stack((blocks & 15, blocks >> 4), dim=2).flatten(1)


def int4_values(q: Tensor, scales: Tensor, groups: Tensor) -> Tensor:
    """Rows of Wᵀ, fp32 [C, N], that levels q [C, N] of 0 … 15 mean with scales [C] and groups [C, N / group, 2]."""
    step = scales[:, None] * groups[..., 0]
    levels = q.unflatten(1, (groups.shape[1], -1))
    return (step[..., None] * (levels - groups[..., 1:].float() / 16)).flatten(1)


def check_rows(name: str, rows: QuantizedRows, shape: tuple[int, int] | None = None) -> None:
    """Refuse rows that are not what `QuantizedRows` says, or hold numbers that no weight can have.

    Args:
        name: of the Linear, for the error.
        rows: of any source, such as a file.
        shape: (N, K) that they must have; None for any.

    Raises:
        ValueError: says what was found and what was expected.
    """
    codes, scales, groups = rows.codes, rows.scales, rows.groups
    if codes.dim() != 2 or codes.dtype != (torch.int8 if groups is None else torch.uint8):
        raise ValueError(
            f"{name}: codes are {codes.dtype} {list(codes.shape)}; expected int8 [K, N] for int8, uint8 [K, N / 2] for "
            "int4"
        )
    if groups is None:
        fits = scales.dim() == 1 and codes.shape[1] == scales.shape[0] + -scales.shape[0] % _BLOCK
    else:
        fits = scales.shape == codes.shape[:1] and groups.dtype == torch.uint8 and groups.dim() == 3
        fits = fits and groups.shape[0] == codes.shape[0] and groups.shape[2] == 2
        fits = fits and any(groups.shape[1] * group == 2 * codes.shape[1] for group in GROUPS)
    if not fits or (shape is not None and rows.shape != shape):
        expected = "" if shape is None else f" for a weight of {list(shape)}"
        raise ValueError(
            f"{name}: codes are {list(codes.shape)}, scales {list(scales.shape)}, groups "
            f"{None if groups is None else list(groups.shape)}; they don't fit each other{expected}. The file is "
            "truncated, or of another model"
        )
    if scales.dtype != torch.float32 or not (scales.isfinite() & (scales > 0)).all():
        raise ValueError(f"{name}: scales are not all positive finite fp32 numbers; quantise the model anew")


def check_group(name: str, outputs: int, group: int) -> None:
    """Refuse a group of int4 that doesn't divide the outputs.

    Raises:
        ValueError: with what to do.
    """
    if group not in GROUPS:
        raise ValueError(f"the group of int4 is {group}; expected one of {', '.join(map(str, GROUPS))}")
    if outputs % group:
        raise ValueError(
            f"{name} has {outputs} outputs, which groups of {group} don't divide; choose int8 for it, such as "
            f'weights={{"{name}": "int8", "*": "int4"}}'
        )
