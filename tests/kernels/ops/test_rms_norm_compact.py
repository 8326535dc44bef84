"""RMSNorms that list their output: as a model would write them."""

import math

import pytest
import torch
from torch import nn

from was_fx.kernels.ops.rms_norm_compact import STYLES, reference, rms_norm_compact, rms_norm_compact_op
from was_fx.kernels.parts.triton_parts import serves

EPS = 1e-5
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def arguments(k, device, dtype=torch.float32, *, splits=0, bias=False, siblings=1, threshold=0.6745, style=STYLES[0]):
    random = torch.Generator().manual_seed(k)

    def rand(*shape):
        return torch.randn(shape, generator=random).to(device)

    return [
        rand(1, 1, k).to(dtype),
        rand(splits, 1, k) if splits else None,
        rand(k).to(dtype) if bias else None,
        (1 + rand(k) / 4).to(dtype),
        [2 * threshold * rand(k).abs() for _ in range(siblings)],
        EPS,
        style,
    ]


def assert_alike(got, residual, partial, bias, weight, thresholds, eps, style, kept):
    """Near to a double-precision norm, and listed by its own output."""
    hidden, x, index, count = got
    h = residual.double()
    if partial is not None:
        y = partial.double().sum(0) + (0 if bias is None else bias.double())
        h = (h + y.to(residual.dtype).double()).to(residual.dtype).double()
        torch.testing.assert_close(hidden, h.to(residual.dtype), rtol=TOLERANCE[x.dtype], atol=TOLERANCE[x.dtype])
        h = hidden.double()
    scale = weight.double() + (style == "unit_offset")
    exact = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps) * scale
    assert (x.shape, x.dtype) == (residual.shape, residual.dtype)
    torch.testing.assert_close(x.double(), exact, rtol=2 * TOLERANCE[x.dtype], atol=TOLERANCE[x.dtype])
    for g, threshold in enumerate(thresholds):
        assert kept(index, count, g) == (~(x.flatten().abs() <= threshold)).nonzero().flatten().tolist()


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("k", [1, 2, 3, 8, 37, 96, 1000])
def test_norm_and_list_of_any_width(kept, device, dtype, k, style):
    case = arguments(k, device, dtype, style=style)
    assert serves(case[0])
    assert_alike(rms_norm_compact(*case), *case, kept)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("splits", [1, 5])
@pytest.mark.parametrize("k", [1, 100])
def test_linear_before_is_added_to_the_residual(kept, device, dtype, k, splits, bias):
    case = arguments(k, device, dtype, splits=splits, bias=bias)
    assert_alike(rms_norm_compact(*case), *case, kept)


@pytest.mark.parametrize("siblings", [2, 3, 4])
def test_each_sibling_has_a_list(kept, device, siblings):
    case = arguments(60, device, splits=2, siblings=siblings)
    assert_alike(rms_norm_compact(*case), *case, kept)


@pytest.mark.parametrize(("threshold", "keeps"), [(math.inf, 0), (0.0, 70)])
def test_nothing_or_everything_is_kept(kept, device, threshold, keeps):
    case = arguments(70, device)
    case[4] = [torch.full((70,), threshold, device=device)]
    _, _, index, count = rms_norm_compact(*case)
    assert kept(index, count) == list(range(keeps))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, from the interpreter
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nonfinite_input_spoils_the_token_as_in_a_dense_norm(kept, device, bad):
    case = arguments(20, device)
    case[0][..., 3] = bad
    _, x, index, count = rms_norm_compact(*case)
    expected = reference(*case)
    assert torch.equal(x.isnan(), expected[1].isnan())
    assert x[..., 3].isnan().all()
    assert kept(index, count) == kept(*expected[2:])


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("splits", [0, 3])
def test_reference_gives_the_same(kept, device, dtype, style, splits):
    case = arguments(50, device, dtype, splits=splits, bias=splits > 0, style=style)
    ours, theirs = rms_norm_compact(*case), reference(*case)
    first = 0 if splits else 1  # the hidden state is defined with a Linear before only
    for a, b in zip(ours[first:2], theirs[first:2], strict=True):
        torch.testing.assert_close(a, b, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert [each.shape for each in ours] == [each.shape for each in theirs]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_reference_rounds_as_the_models_do(dtype):
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

    norms = {
        "cast_first": LlamaRMSNorm(50, EPS),
        "cast_last": Olmo2RMSNorm(50, EPS),
        "unit_offset": GemmaRMSNorm(50, EPS),
    }
    for style, norm in norms.items():
        case = arguments(50, "cpu", dtype, style=style)
        norm.weight.data = case[3]
        assert torch.equal(reference(*case)[1], norm(case[0]))
    own = nn.RMSNorm(50, EPS)
    own.weight.data = case[3]
    case[-1] = "cast_last"
    torch.testing.assert_close(reference(*case)[1], own(case[0]))


def test_weight_of_higher_precision_leaves_the_models_dtype():
    case = arguments(20, "cpu", torch.float16)
    case[3] = case[3].float()
    assert [each.dtype for each in reference(*case)[:2]] == [torch.float16] * 2


@pytest.mark.parametrize("splits", [0, 2])
def test_op_passes_opcheck(device, splits):
    case = arguments(40, device, splits=splits, siblings=2)
    torch.library.opcheck(rms_norm_compact_op, tuple(case), test_utils=("test_schema", "test_faketensor"))
