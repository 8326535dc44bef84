import pytest
import torch

from was_fx.schedules.files.linear_schedule import LinearSchedule
from was_fx.schedules.files.schedule_file import pack_linears, unpack_linears

LINEARS = {
    "z.up": LinearSchedule(0.6, 0.25, 0.3),
    "a.down": LinearSchedule(0.4, 0.5, 1.0, torch.tensor([1.0, float("inf")])),
}
SHAPES = {"z.up": (4, 3), "a.down": (3, 2)}


def test_keys_and_kinds_of_tensors():
    tensors = pack_linears(LINEARS)
    kinds = {key: (tensor.dtype, list(tensor.shape)) for key, tensor in tensors.items()}
    scalars = [f"{name}.{field}" for name in LINEARS for field in ("sparsity", "threshold", "exponent")]
    expected = {key: (torch.float32, []) for key in scalars}
    assert kinds == {**expected, "a.down.channel_threshold": (torch.float32, [2])}


def test_linears_there_and_back_keep_their_order():
    linears, problems = unpack_linears(pack_linears(LINEARS), SHAPES)
    assert problems == []
    assert linears == LINEARS
    assert list(linears) == list(LINEARS)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"z.up.sparsity": None}, ["z.up.sparsity is missing"]),
        (
            {"z.up.sparsity": None, "z.up.exponent": None},
            ["z.up.sparsity is missing", "z.up.exponent is missing"],
        ),
        (
            {"z.up.sparsity": None, "z.up.threshold": None, "z.up.exponent": None},
            ["z.up has a shape but no tensors"],
        ),
        (
            {"other.threshold": torch.tensor(1.0)},
            ["other.sparsity is missing", "other.exponent is missing", "other has no shape"],
        ),
        (
            {"z.up.bias": torch.tensor(1.0)},
            ["unknown tensor z.up.bias: expected <Linear>.sparsity|threshold|exponent|channel_threshold"],
        ),
        (
            {"threshold": torch.tensor(1.0)},
            ["unknown tensor threshold: expected <Linear>.sparsity|threshold|exponent|channel_threshold"],
        ),
        (
            {"z.up.threshold": torch.tensor(1.0, dtype=torch.float64)},
            ["z.up.threshold is float64 [], expected a float32 scalar"],
        ),
        ({"z.up.threshold": torch.ones(1)}, ["z.up.threshold is float32 [1], expected a float32 scalar"]),
        (
            {"a.down.channel_threshold": torch.ones(1, 2).half()},
            ["a.down.channel_threshold is float16 [1, 2], expected float32 [K]"],
        ),
    ],
)
def test_every_problem_is_listed_and_the_rest_is_read(change, expected):
    tensors = {key: tensor for key, tensor in {**pack_linears(LINEARS), **change}.items() if tensor is not None}
    linears, problems = unpack_linears(tensors, SHAPES)
    assert problems == expected
    damaged = {key.rpartition(".")[0] for key in change if "bias" not in key}
    assert linears == {name: linear for name, linear in LINEARS.items() if name not in damaged}
