"""The k largest of short rows, as torch.topk gives them."""

import pytest
import torch

from was_fx.kernels.ops.few_topk import MAX_ENTRIES, few_topk, few_topk_op, reference, supports

CASES = [((1, 128), 8), ((1, 60), 4), ((3, 7), 7), ((8, 256), 1), ((2, 1, 5), 2)]


def numbers(shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + shape[-1])).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("shape", "k"), CASES)
def test_it_gives_what_torch_gives(shape, k, dtype, device):
    x = numbers(shape, dtype)
    values, index = few_topk(x.to(device), k)
    expected = torch.topk(x, k, dim=-1)
    assert values.cpu().equal(expected.values)  # where numbers are equal, torch may give any of their columns
    assert values.dtype == dtype
    assert index.dtype == torch.int64
    assert x.gather(-1, index.cpu()).equal(values.cpu())
    assert index.cpu().equal(reference(x, k)[1])


def test_equal_ones_come_in_order_and_nan_first(device):
    x = torch.tensor([[0.0, 3.0, -0.0, float("nan"), 3.0, -float("inf"), float("inf")]], device=device)
    values, index = few_topk(x, 7)
    assert index.tolist() == [[3, 6, 1, 4, 0, 2, 5]]
    assert values[0, 1:].tolist() == [float("inf"), 3.0, 3.0, 0.0, 0.0, -float("inf")]
    assert values[0, 0].isnan()


def test_the_op_is_well_behaved(device):
    torch.library.opcheck(few_topk_op, (numbers((2, 9)).to(device), 3))


def test_long_rows_and_many_are_torchs(device):
    assert not supports(torch.zeros(1, MAX_ENTRIES + 1, device=device), 2)
    assert not supports(torch.zeros(9, 4, device=device), 2)
    x = numbers((9, 4)).to(device)
    assert few_topk(x, 2)[0].equal(torch.topk(x, 2).values)
