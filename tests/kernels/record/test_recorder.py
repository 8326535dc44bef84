"""What is recorded gives, run with other inputs, what the function itself gives."""

import pytest
import torch
from torch.nn import functional as F

from was_fx.kernels.cpu.library import KINDS, library
from was_fx.kernels.linear.quantized_linear import quantized_linear
from was_fx.kernels.linear.sparse_linear import sparse_linear
from was_fx.kernels.quantized.fit import quantize_int4, quantize_int8
from was_fx.kernels.record.program import OPERATIONS, Unsupported
from was_fx.kernels.record.recorder import Recording

pytestmark = pytest.mark.skipif(library() is None, reason="no C++ compiler")

RANDOM = torch.Generator().manual_seed(0)
TABLE = torch.randn(20, 6, generator=RANDOM)
BIAS = torch.randn(6, generator=RANDOM)
SQUARE = torch.randn(6, 6, generator=RANDOM)
INDEX = torch.tensor([4, 0, 4])

FUNCTIONS = {
    "arithmetic": lambda x: (x + 2 * x - 0.5) * x / (x.abs() + 1) - torch.add(x, x, alpha=3),
    "broadcast": lambda x: x[:, None, :] * x[None, :, :] + x.t()[:, :1].t(),
    "activations": lambda x: F.silu(x) + torch.sigmoid(x) + torch.tanh(x) + F.relu(x),
    "gelu": lambda x: F.gelu(x) + F.gelu(x, approximate="tanh"),
    "roots": lambda x: (x.abs() + 1).sqrt() + (x.abs() + 1).rsqrt() + (x.abs() + 1).reciprocal(),
    "powers": lambda x: x.pow(2) + x.pow(3) + (x.abs() + 1) ** -0.5,
    "exponential": lambda x: x.exp() + (x * 40).exp() + (x - 200).exp(),
    "turns": lambda x: (x * 50).sin() + (x * 50).cos(),
    "comparisons": lambda x: (
        torch.where((x > 0) & ~(x < 0.5) | (x == 1), x, -x) + (x >= 0).to(x.dtype) + (x <= x[:, :1])
    ),
    "bounds": lambda x: x.clamp(-0.5, 0.5) + torch.maximum(x, -x) + torch.minimum(x, x * 2),
    "filled": lambda x: x.masked_fill(x > 0, -1.0),
    "over the last dimension": lambda x: x.mean(-1, keepdim=True) + x.sum(-1)[:, None] + x.amax(-1, keepdim=True) + x,
    "softmax": lambda x: torch.softmax(x, -1),
    "layer norm": lambda x: F.layer_norm(x, (6,), BIAS.to(x.dtype), BIAS.to(x.dtype)) + F.layer_norm(x, (6,)),
    "concatenated": lambda x: torch.cat([x, x[:, :2] * 2], -1) * torch.cat([x, x[:, 2:4]], -1),
    "views": lambda x: x.view(2, 2, 6).transpose(0, 2)[1:].flatten() * 1,
    "copied": lambda x: x.t().contiguous().view(-1) + x.to(torch.float64).to(x.dtype).flatten(),
    "whole numbers": lambda x: (x > 0).to(torch.int64) * 3 + torch.arange(6) - (x * 4).to(torch.int32),
    "Linear": lambda x: F.linear(x, SQUARE.to(x.dtype), BIAS.to(x.dtype)) + F.linear(x, SQUARE.to(x.dtype)),
    "matrices": lambda x: torch.bmm(x.view(2, 2, 6), x.view(2, 6, 2)) + x[:2, :2],
    "rows of a table": lambda x: F.embedding((x[:, 0] > 0).long() + 3, TABLE) + TABLE[INDEX[:1]] + x.float(),
    "selected": lambda x: x.index_select(1, INDEX) + x[:, INDEX],
    "made of nothing": lambda x: torch.zeros_like(x) + torch.arange(6).to(x.dtype) + x,
}


def inputs(dtype, seed):
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_operator_is_what_torch_computes(name, dtype):
    function = FUNCTIONS[name]
    recording = Recording(function, [inputs(dtype, 0)])
    for seed in (0, 1, 2):
        x = inputs(dtype, seed)
        assert recording.run(x)
        expected = function(x)
        assert recording.output.dtype == expected.dtype
        tolerance = {torch.float32: 2e-6, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
        torch.testing.assert_close(recording.output, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["plain", "avx2", "avx512", None])
@pytest.mark.parametrize("weights", ["bf16", "int8", "int4"])
def test_siblings_give_what_each_gives(weights, kind, threads, monkeypatch):
    """Threads share Linears of one input, of which one is not a multiple of a vector."""
    from was_fx.kernels.record import program

    native = program.kind()
    wanted = native if kind is None else KINDS.index(kind)
    if wanted > native:
        pytest.skip(f"this processor has no {kind}")
    for module in (
        "was_fx.kernels.record.program",
        "was_fx.kernels.linear.cpu_gather",
        "was_fx.kernels.linear.cpu_quantized",
    ):
        monkeypatch.setattr(f"{module}.kind", lambda: wanted)
    outputs = (64, 192, 96) if weights == "int4" else (64, 100, 30)
    made = [torch.randn(n, 70, generator=RANDOM) for n in outputs]
    threshold = torch.full((70,), 0.6)

    def function(x):
        x = x * 2
        if weights == "bf16":
            return torch.cat([sparse_linear(x, w, None, threshold, None) for w in matrices], -1)
        return torch.cat([quantized_linear(x, q.codes, q.scales, q.groups, None, threshold, None) for q in rows], -1)

    matrices = [w.bfloat16().t().contiguous().t() for w in made]
    rows = [] if weights == "bf16" else [quantize_int8(w) if weights == "int8" else quantize_int4("w", w) for w in made]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        recording = Recording(function, [torch.randn(1, 70, generator=RANDOM).bfloat16()])
        for seed in range(3):
            x = torch.randn(1, 70, generator=torch.Generator().manual_seed(seed)).bfloat16()
            assert recording.run(x)
            assert torch.equal(recording.output, function(x))  # the same sums in the same order
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("masked", [None, "bool", "added"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention(dtype, masked):
    keys, values = (torch.randn(2, 3, 40, 24, generator=RANDOM).to(dtype) for _ in range(2))
    allowed = torch.rand(2, 1, 2, 40, generator=RANDOM) > 0.5
    mask = {
        None: None,
        "bool": allowed,
        "added": torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, -torch.inf),
    }

    def function(x):
        return F.scaled_dot_product_attention(x, keys, values, attn_mask=mask[masked])

    def query(seed):
        return torch.randn(2, 3, 2, 24, generator=torch.Generator().manual_seed(seed)).to(dtype)

    recording = Recording(function, [query(0)])
    assert recording.run(query(1))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(recording.output, function(query(1)), rtol=tolerance, atol=tolerance)


def test_state_is_changed_once_for_each_run():
    count, table = torch.zeros((), dtype=torch.int64), torch.zeros(4, 2)

    def function(x):
        table.index_copy_(0, count.view(1), x)
        count.add_(1)
        return table.sum(-1) + count

    recording = Recording(function, [torch.ones(1, 2)])
    assert count == 0  # what the recorded call counted is undone
    assert recording.run(torch.ones(1, 2))
    assert recording.run(torch.full((1, 2), 3.0))
    assert count == 2
    assert table.tolist() == [[1, 1], [3, 3], [0, 0], [0, 0]]
    assert recording.output.tolist() == [4, 8, 2, 2]


def test_a_value_read_into_python_must_stay_what_it_was():
    recording = Recording(lambda x: x * 2 if x[0] > 0 else x, [torch.ones(2)])
    assert recording.run(torch.full((2,), 3.0))
    assert recording.output.tolist() == [6, 6]
    assert not recording.run(-torch.ones(2))


def test_an_index_out_of_range_is_told():
    table = torch.ones(4, 2)
    recording = Recording(lambda i: F.embedding(i, table) * 1, [torch.tensor([1])])
    assert recording.run(torch.tensor([3]))
    assert not recording.run(torch.tensor([4]))


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda x: torch.cumsum(x, 0), "cumsum"),
        (lambda x: x + torch.rand(4, 6), "random"),
        (lambda x: torch.ones(4, 6) * 2, "does not depend"),
        (lambda x: torch.zeros(4, 6).add_(x), "changed afterwards"),
        (lambda x: x.mean(0), "another dimension"),
        (lambda x: x * torch.native_layer_norm(x, (6,), None, None, 1e-5)[1], "not computed"),
        (lambda x: torch.native_layer_norm(x, (6,), None, None, 1e-5)[2], "not computed"),
    ],
)
def test_what_cannot_be_recorded_is_said(function, words):
    with pytest.raises(Unsupported, match=words):
        Recording(function, [inputs(torch.float32, 0)])


def test_recordings_of_the_same_are_equal():
    memory = torch.ones(4, 6)
    first, second = (Recording(lambda x: x * memory + 1, [inputs(torch.float32, seed)]) for seed in (0, 1))
    assert first.signature == second.signature
    other = Recording(lambda x: x * memory + 2, [inputs(torch.float32, 0)])
    assert other.signature != first.signature
    elsewhere = Recording(lambda x: x * memory[:1] + 1, [inputs(torch.float32, 0)])
    assert elsewhere.signature != first.signature


def test_operations_have_one_name_each():
    assert len(set(OPERATIONS)) == len(OPERATIONS)
