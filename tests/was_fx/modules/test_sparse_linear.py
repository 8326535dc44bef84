"""`SparseLinear`: what it computes, what it keeps of the class that it was, and what undoing leaves."""

import copy
import functools
import io
import pickle
import types

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from was_fx.kernels.parts.served import noting_served
from was_fx.modules.linears import LinearModule, find_linears, is_conv1d
from was_fx.modules.sparse_linear import SparseLinear, make_dense, make_sparse, set_numbers, sparse_linears, take_norms
from was_fx.modules.token_rule import TokenRule
from was_fx.schedules.files.linear_schedule import LinearSchedule

ENTRY = LinearSchedule(0.5, 1.0, 1.0)


class Own(nn.Linear):
    """A Linear with a forward of its own."""

    def forward(self, input):
        return super().forward(input) + 0


def linear_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    made = {
        "Linear": lambda: nn.Linear(12, 8),
        "no bias": lambda: nn.Linear(12, 8, bias=False),
        "Conv1D": lambda: Conv1D(8, 12),
        "Own": lambda: Own(12, 8),
    }[kind]()
    with torch.no_grad():
        made.weight.normal_()
    return made.eval()


KINDS = ["Linear", "no bias", "Conv1D", "Own"]


def as_linear(module: nn.Module, head: bool = False) -> LinearModule:
    return LinearModule("name", module, is_conv1d(module), head)


def sparse(module: nn.Module, entry: LinearSchedule = ENTRY, norm: int = 1, prefill: str = "all") -> nn.Module:
    make_sparse(as_linear(module), entry, norm, TokenRule(prefill))
    return module


def expected(dense: nn.Module, x: torch.Tensor, entry: LinearSchedule = ENTRY, norm: int = 1) -> torch.Tensor:
    weight = dense.weight.t() if is_conv1d(dense) else dense.weight
    limits = entry.threshold / weight.detach().double().norm(p=norm, dim=0) ** entry.exponent
    return dense(x.masked_fill(x.abs() <= limits.float(), 0))


@pytest.fixture
def x():
    return torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("entry", "norm"), [(ENTRY, 1), (LinearSchedule(0.5, 0.5, 0.5), 2), (LinearSchedule(0, 0, 1), 1)]
)
def test_it_computes_the_linear_of_the_kept_channels(kind, entry, norm, x):
    dense = linear_of(kind)
    found = sparse(copy.deepcopy(dense), entry, norm)(x)
    torch.testing.assert_close(found, expected(dense, x, entry, norm))
    assert torch.allclose(found, dense(x)) == (entry.threshold == 0)


@pytest.mark.parametrize("kind", KINDS)
def test_where_all_tokens_are_dense_the_classes_own_forward_runs(kind, x, monkeypatch):
    dense = linear_of(kind)
    module = sparse(copy.deepcopy(dense), prefill="dense")
    with noting_served() as served:
        assert module(x).equal(dense(x))
    assert served == []
    with noting_served() as served:
        torch.testing.assert_close(module(x[:, :1]), expected(dense, x[:, :1]))
    assert len(served) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_same_module_of_a_subclass_of_its_class(kind):
    module = linear_of(kind)
    before, parameters = type(module), dict(module.named_parameters())
    assert sparse(module) is module
    assert isinstance(module, before)
    assert isinstance(module, SparseLinear)
    assert type(module).__name__ == f"Sparse{before.__name__}"
    assert type(sparse(linear_of(kind))) is type(module)
    assert all(dict(module.named_parameters())[name] is each for name, each in parameters.items())
    assert list(module.state_dict()) == list(parameters)
    assert find_linears(nn.ModuleDict({"a": module}))["a"].module is module


@pytest.mark.parametrize("kind", KINDS)
def test_undone_nothing_is_left(kind, x):
    module = linear_of(kind)
    before, attributes, names = type(module), dict(vars(module)), set(module._non_persistent_buffers_set)
    dense = module(x)
    make_dense(sparse(module))
    assert type(module) is before
    assert vars(module) == attributes
    assert module._non_persistent_buffers_set == names
    assert module(x).equal(dense)


def through_a_file(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, copy.copy, lambda module: pickle.loads(pickle.dumps(module)), through_a_file]
)
@pytest.mark.parametrize("kind", KINDS[:3])  # the last is a class of this file, which pytest imports by no name
def test_a_copy_is_sparse(kind, copied, x):
    dense = linear_of(kind)
    twin = copied(sparse(copy.deepcopy(dense)))
    assert isinstance(twin, SparseLinear)
    torch.testing.assert_close(twin(x), expected(dense, x))
    assert "was_threshold" not in twin.state_dict()
    if copied is not copy.copy:
        make_dense(twin)
        assert twin(x).equal(dense(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_thresholds_stay_fp32_bit_by_bit_in_another_dtype(dtype):
    module = sparse(linear_of("Linear"))
    before = module.was_threshold.clone(), module.was_norms.clone()
    module.was_counts = torch.zeros(2, dtype=torch.int64)
    module.to(dtype)
    assert module.weight.dtype == dtype
    assert module.was_counts.dtype == torch.int64
    for found, kept in zip((module.was_threshold, module.was_norms), before, strict=True):
        assert found.dtype == torch.float32
        assert found.equal(kept)


def test_buffers_follow_to_another_device():
    module = sparse(linear_of("Linear")).to("meta")
    assert module.was_threshold.is_meta
    assert module.was_norms.is_meta
    assert module.weight.is_meta


def test_new_numbers_take_effect_where_the_old_ones_lie(x):
    dense = linear_of("Linear")
    module, other = sparse(copy.deepcopy(dense)), LinearSchedule(0.5, 2.0, 1.0)
    place = module.was_threshold.data_ptr()
    set_numbers(as_linear(module), other)
    assert module.was_threshold.data_ptr() == place
    torch.testing.assert_close(module(x), expected(dense, x, other))


def test_norms_of_a_weight_that_changed(x):
    dense = linear_of("Linear")
    module = sparse(copy.deepcopy(dense))
    for each in (dense, module):
        each.weight.data *= 3
    take_norms(as_linear(module))
    torch.testing.assert_close(module(x), expected(dense, x))


def test_a_channel_of_zeros_is_never_kept(x):
    module = linear_of("Linear")
    module.weight.data[:, 3] = 0
    assert sparse(module).was_threshold[3] == float("inf")


@pytest.mark.parametrize("prefill", ["all", "half"])
def test_counts_are_of_sparse_tokens(x, prefill):
    dense = linear_of("Linear")
    module = sparse(copy.deepcopy(dense), prefill=prefill)
    module.was_counts = torch.zeros(2, dtype=torch.int64)
    for _ in range(2):
        module(x)
    own = x if prefill == "all" else x[:, 3:]
    weak = own.abs() <= ENTRY.threshold / dense.weight.detach().abs().sum(0)
    assert module.was_counts.tolist() == [2 * int(weak.sum()), 2 * weak.numel()]


@pytest.mark.parametrize("bias", ["Linear", "no bias"])
def test_autocast(bias, x):
    dense = linear_of(bias)
    module = sparse(copy.deepcopy(dense))
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = module(x), dense(x)
    assert found.dtype == wanted.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected(dense, x), atol=0.1, rtol=0.05)
    assert module(x).dtype == torch.float32


def test_inside_inference_mode_it_can_be_made_and_used_outside(x):
    dense = linear_of("Linear")
    module = copy.deepcopy(dense)
    with torch.inference_mode():
        sparse(module)
        set_numbers(as_linear(module), ENTRY)
    assert not module.was_threshold.is_inference()
    found = module(x.clone().requires_grad_())
    torch.testing.assert_close(found, expected(dense, x))
    found.sum().backward()


def test_they_are_found_by_name():
    inner = nn.ModuleDict({"a": sparse(linear_of("Linear")), "b": linear_of("Linear")})
    assert list(sparse_linears(inner)) == ["a"]


# Forwards that others have wrapped.


def by_accelerate(module):
    """The module's forward is a partial of a function that calls `_old_forward`."""
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.add_hook_to_module(module, hooks.AlignDevicesHook(torch.device("cpu")))


def by_a_closure(module):
    """As tensor parallelism of transformers."""
    forward = module.forward

    @functools.wraps(forward)
    def wrapped(*arguments, **keywords):
        return forward(*arguments, **keywords)

    module.forward = wrapped


def by_itself(module):
    """A bound method among the instance's attributes."""
    module.forward = types.MethodType(type(module).forward, module)


@pytest.mark.parametrize("wrap", [by_accelerate, by_a_closure, by_itself])
@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
def test_what_wraps_the_forward_calls_the_present_one(wrap, kind, x):
    dense = linear_of(kind)
    module = copy.deepcopy(dense)
    wrap(module)
    sparse(module)
    torch.testing.assert_close(module(x), expected(dense, x))
    make_dense(module)
    assert module(x).equal(dense(x))


@pytest.mark.parametrize("wrap", [by_accelerate, by_a_closure, by_itself])
def test_wrapped_afterwards_it_is_sparse_and_dense_again_when_undone(wrap, x):
    dense = linear_of("Linear")
    module = sparse(copy.deepcopy(dense))
    wrap(module)
    torch.testing.assert_close(module(x), expected(dense, x))
    make_dense(module)
    assert module(x).equal(dense(x))


def test_a_forward_of_someone_elses_stays(x):
    module = linear_of("Linear")
    module.forward = lambda input: input
    assert sparse(module)(x) is x
    make_dense(module)
    assert module(x) is x
