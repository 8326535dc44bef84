"""How quantised rows lie: packing, padding, what they mean, and what is refused."""

import dataclasses

import pytest
import torch

from was_fx.kernels.quantized.fit import quantize_int4, quantize_int8
from was_fx.kernels.quantized.rows import QuantizedRows, check_group, check_rows, pack_int4, pack_int8, unpack_int4


@pytest.fixture
def int8() -> QuantizedRows:
    return quantize_int8(torch.randn(40, 6, generator=torch.Generator().manual_seed(0)))


@pytest.fixture
def int4() -> QuantizedRows:
    return quantize_int4("w", torch.randn(64, 6, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("outputs", [32, 96])
def test_packed_int4_unpacks(outputs):
    q = torch.randint(0, 16, (5, outputs), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    packed = pack_int4(q)
    assert packed.shape == (5, outputs // 2)
    assert packed.is_contiguous()
    assert torch.equal(unpack_int4(packed), q)


def test_a_byte_of_int4_holds_outputs_sixteen_apart():
    q = torch.zeros(1, 64, dtype=torch.uint8)
    q[0, 3], q[0, 19], q[0, 32] = 5, 9, 7
    packed = pack_int4(q)
    assert packed[0, 3] == 5 + 16 * 9
    assert packed[0, 16] == 7
    assert packed.count_nonzero() == 2


@pytest.mark.parametrize(("outputs", "padded"), [(1, 32), (32, 32), (33, 64)])
def test_int8_is_padded_with_zeros_to_whole_sectors(outputs, padded):
    codes = torch.full((3, outputs), -7, dtype=torch.int8)
    packed = pack_int8(codes)
    assert packed.shape == (3, padded)
    assert torch.equal(packed[:, :outputs], codes)
    assert not packed[:, outputs:].any()


def test_shape_format_and_size(int8, int4):
    assert (int8.format, int8.shape, int8.nbytes) == ("int8", (40, 6), 6 * 64 + 4 * 40)
    assert (int4.format, int4.shape, int4.nbytes) == ("int4", (64, 6), 6 * 32 + 4 * 6 + 6 * 2 * 2)


def test_dequantized_rows_are_what_the_codes_mean(int8, int4):
    assert torch.equal(int8.dequantize(torch.float32), int8.codes[:, :40] * int8.scales)
    q = unpack_int4(int4.codes)
    n, k = 37, 4
    s, z = int4.groups[k, n // 32].tolist()
    expected = float(int4.scales[k]) * s * (int(q[k, n]) - z / 16)
    assert float(int4.dequantize(torch.float32)[k, n]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("made", ["int8", "int4"])
def test_some_channels_are_dequantized_as_all_are(request, made, dtype):
    rows = request.getfixturevalue(made)
    some = rows.dequantize(dtype, slice(2, 5))
    assert some.dtype == dtype
    assert torch.equal(some, rows.dequantize(dtype)[2:5])


def test_sound_rows_are_accepted(int8, int4):
    check_rows("w", int8, (40, 6))
    check_rows("w", int4, (64, 6))


@pytest.mark.parametrize(
    ("made", "change", "message"),
    [
        ("int8", {"codes": torch.zeros(6, 64)}, r"w: codes are torch.float32 \[6, 64\]; expected int8"),
        ("int8", {"codes": torch.zeros(6, 40, dtype=torch.int8)}, "don't fit each other"),
        ("int8", {"scales": torch.zeros(40)}, "not all positive"),
        ("int8", {"scales": torch.full((40,), torch.inf)}, "not all positive"),
        ("int4", {"scales": torch.ones(6, dtype=torch.float16)}, "fp32 numbers"),
        ("int4", {"scales": torch.ones(5)}, r"scales \[5\]"),
        ("int4", {"groups": torch.ones(6, 3, 2, dtype=torch.uint8)}, r"groups \[6, 3, 2\]"),
        ("int4", {"groups": torch.ones(6, 2, 2)}, "don't fit each other"),
        ("int4", {"groups": None}, "expected int8"),
    ],
)
def test_rows_that_do_not_fit_are_refused(request, made, change, message):
    with pytest.raises(ValueError, match=message):
        check_rows("w", dataclasses.replace(request.getfixturevalue(made), **change))


def test_rows_of_another_weight_are_refused(int4):
    with pytest.raises(ValueError, match=r"for a weight of \[64, 7\].*another model"):
        check_rows("w", int4, (64, 7))


@pytest.mark.parametrize("group", [32, 64, 128])
def test_a_group_that_divides_is_accepted(group):
    check_group("w", 128, group)


@pytest.mark.parametrize(
    ("outputs", "group", "message"),
    [
        (64, 16, "the group of int4 is 16; expected one of 32, 64, 128"),
        (96, 64, r'layer\.w has 96 outputs, which groups of 64 don\'t divide.*"layer\.w": "int8"'),
    ],
)
def test_other_groups_are_refused(outputs, group, message):
    with pytest.raises(ValueError, match=message):
        check_group("layer.w", outputs, group)
