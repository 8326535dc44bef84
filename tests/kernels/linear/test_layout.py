"""Moving weights keeps their values, shapes and identity."""

import pytest
import torch
from torch import nn

from was_fx.kernels.linear.layout import restore, to_input_major

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(5, 3), (1, 4), (4, 1), (1, 1), (17, 33)]


def bits(tensor):
    return tensor.detach().clone().contiguous().view(torch.uint8)


def parameter(shape, dtype=torch.float32):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)
    weight.view(-1)[0] = float("nan")
    return nn.Parameter(weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_input_major_weight_has_the_same_values_and_contiguous_rows_of_its_transpose(shape, dtype):
    weight = parameter(shape, dtype)
    before, identity = bits(weight), id(weight)
    to_input_major(weight)
    assert id(weight) == identity
    assert weight.shape == shape
    assert weight.t().is_contiguous()
    assert torch.equal(bits(weight), before)
    assert weight.requires_grad


def test_input_major_weight_is_not_moved_again():
    weight = parameter((5, 3))
    to_input_major(weight)
    home = weight.data_ptr()
    to_input_major(weight)
    assert weight.data_ptr() == home


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_restore_is_the_exact_inverse(shape, dtype):
    weight = parameter(shape, dtype)
    before, stride = bits(weight), weight.stride()
    to_input_major(weight)
    restore(weight, stride)
    assert weight.stride() == stride
    assert torch.equal(bits(weight), before)


def test_restore_gives_a_storage_of_its_own():
    whole = nn.Parameter(torch.arange(24.0))
    part = nn.Parameter(whole.data[6:18].view(3, 4))
    restore(part, (4, 1))
    assert part.untyped_storage().nbytes() == part.numel() * part.element_size()
    assert part.data_ptr() != whole.data_ptr() + 6 * 4
    assert torch.equal(part.data, torch.arange(6.0, 18.0).view(3, 4))


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("made_inside", [False, True])
def test_weights_move_in_inference_mode_and_out_of_it_and_stay_of_their_kind(made_inside, inside):
    with torch.inference_mode(made_inside):
        weight = parameter((5, 3)) if not made_inside else torch.rand(5, 3)
    before = bits(weight)
    with torch.inference_mode(inside):
        to_input_major(weight)
        assert weight.t().is_contiguous()
        restore(weight, (3, 1))
    assert weight.stride() == (3, 1)
    assert weight.is_inference() is made_inside
    assert torch.equal(bits(weight), before)
