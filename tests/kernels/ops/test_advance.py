"""Many counters, one call."""

import torch

from was_fx.kernels.ops.advance import advance_op


def test_every_counter_advances_in_place(device):
    counters = [torch.tensor(i, device=device) for i in range(3)]
    counters.append(torch.tensor(7, dtype=torch.int32, device=device))
    places = [each.data_ptr() for each in counters]
    advance_op(counters, 2)
    assert [int(each) for each in counters] == [2, 3, 4, 9]
    assert [each.data_ptr() for each in counters] == places


def test_op_passes_opcheck(device):
    counters = [torch.tensor(i, device=device) for i in range(3)]
    torch.library.opcheck(advance_op, (counters, 1), test_utils=("test_schema", "test_faketensor"))
