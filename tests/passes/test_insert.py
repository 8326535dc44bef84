"""A dense graph becomes sparse by a schedule: in a decode step, and in prompts where all of their tokens are sparse."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from transformers.pytorch_utils import Conv1D

from was_fx.kernels.linear.dense_linear import dense_linear
from was_fx.kernels.linear.sparse_linear import sparse_linear
from was_fx.kernels.ops.channel_threshold import channel_threshold_op
from was_fx.passes.graph.context import Numbers, Options
from was_fx.passes.graph.errors import RewriteError
from was_fx.passes.pipeline import run
from was_fx.schedules.score import channel_norms, channel_thresholds

LINEAR = torch._C._nn.linear


class Block(nn.Module):
    """Linears on whole and on flattened sequences, and a head that sees the last `last` tokens."""

    def __init__(self, last=None):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(12, 10), nn.Linear(10, 12, bias=False), nn.Linear(12, 7)
        self.last = last

    def forward(self, x):
        h = torch.sin(self.a(x))
        y = torch.sin(self.b(h.reshape(-1, 10))).view(x.shape)
        return self.head(y if self.last is None else y[:, -self.last :])


SCHEDULE = {"a": 0.7, "b": 0.4, "head": 0.3}


def expected(module, x):
    y = torch.sin(module.linear("b", torch.sin(module.linear("a", x))))
    last = module.module.last
    return module.linear("head", y if last is None else y[:, -last:])


@pytest.mark.parametrize("prefill", ["dense", "all"])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("dynamic", [None, True])
def test_decode_is_sparse_whatever_prompts_are(rewrite, prefill, batch, dynamic):
    module = rewrite(Block(), SCHEDULE, dynamic, insert=True, prefill=prefill)
    x = torch.randn(batch, 1, 12)
    torch.testing.assert_close(module(x), expected(module, x))
    assert module.targets[sparse_linear] == module.context.counts["inserted"] == module.context.counts["sparse"] == 3
    assert module.targets[LINEAR] == 0
    assert module.context.decode
    assert [call.name for call in module.context.calls] == list(SCHEDULE)


@pytest.mark.parametrize("last", [None, 1, 3])
@pytest.mark.parametrize("length", [2, 7])
def test_dense_prompt_keeps_its_meaning_and_its_products_read_weights_by_input_channel(rewrite, last, length):
    module = rewrite(Block(last), SCHEDULE, insert=True, prefill="dense")
    x = torch.randn(1, length, 12)
    torch.testing.assert_close(module(x), module.module(x))
    assert (module.targets[sparse_linear], module.targets[LINEAR], module.targets[dense_linear]) == (0, 0, 3)
    assert module.context.counts["dense (prompt)"] == 3
    assert not module.context.decode


@pytest.mark.parametrize("last", [None, 1, 3])
@pytest.mark.parametrize("dynamic", [None, True])
def test_every_token_of_a_prompt_is_sparse_where_all_are(rewrite, last, dynamic):
    module = rewrite(Block(last), SCHEDULE, dynamic, insert=True, prefill="all")
    for batch, length in ((2, 5), (2, 9), (3, 4)):
        x = torch.randn(batch, length, 12)
        torch.testing.assert_close(module(x), expected(module, x))
        assert module.context.counts["inserted"] == 3
    assert len(module.contexts) == (1 if dynamic else len(module.contexts))


def test_unscheduled_linears_stay_dense(rewrite):
    module = rewrite(Block(), {"a": 0.7}, insert=True)
    x = torch.randn(1, 5, 12)
    h = torch.sin(module.linear("a", x))
    torch.testing.assert_close(module(x), module.module.head(torch.sin(module.module.b(h))))
    assert (module.targets[sparse_linear], module.targets[LINEAR]) == (1, 2)


def test_linear_called_twice_is_sparse_twice(rewrite):
    class Again(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(12, 12)

        def forward(self, x):
            return self.a(torch.sin(self.a(x)))

    module = rewrite(Again(), {"a": 0.5}, insert=True)
    x = torch.randn(1, 1, 12)
    torch.testing.assert_close(module(x), module.linear("a", torch.sin(module.linear("a", x))))
    assert (module.targets[sparse_linear], module.targets[LINEAR]) == (2, 0)
    assert len(module.context.weights) == 1


@pytest.mark.parametrize("length", [1, 6])
@pytest.mark.parametrize("names", ["02", "01", "12", "012"])
def test_linear_may_feed_a_linear(rewrite, length, names):
    module = rewrite(nn.Sequential(*[nn.Linear(12, 12) for _ in range(3)]), dict.fromkeys(names, 0.2), insert=True)
    x = torch.randn(2, length, 12)
    y = x
    for i in range(3):
        y = module.linear(str(i), y) if str(i) in names else module.module[i](y)
    torch.testing.assert_close(module(x), y)
    assert module.targets[sparse_linear] == len(names)


def test_linear_may_make_the_bias_of_another(rewrite):
    class Generated(nn.Linear):
        def forward(self, x, bias):
            return F.linear(x, self.weight, bias)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = Generated(12, 10), nn.Linear(12, 10)

        def forward(self, x):
            return self.a(x, self.b(x[0, 0]))

    module = rewrite(Net(), {"a": 0.5, "b": 0.5}, insert=True)
    x = torch.randn(1, 3, 12)
    torch.testing.assert_close(module(x), module.linear("a", x, bias=False) + module.linear("b", x[0, 0]))
    assert module.targets[sparse_linear] == 2


@pytest.mark.parametrize(("threshold", "result"), [(0.0, "dense"), (math.inf, "bias")])
def test_extreme_thresholds(rewrite, threshold, result):
    module = rewrite(nn.Sequential(nn.Linear(12, 10)), {"0": torch.full((12,), threshold)}, insert=True)
    x = torch.randn(1, 5, 12)
    y = module.module(x) if result == "dense" else module.module[0].bias.expand(1, 5, 10)
    torch.testing.assert_close(module(x), y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("length", [1, 4])
def test_other_dtypes(rewrite, dtype, length):
    module = rewrite(Block().to(dtype), SCHEDULE, insert=True)
    x = torch.randn(2, length, 12, dtype=dtype)
    y = module(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y, expected(module, x), rtol=2e-2, atol=2e-2)


def compiled(model, numbers, **options):
    """The model compiled through the passes with these numbers; the contexts of its graphs."""
    contexts = []

    def backend(module, inputs):
        contexts.append(run(module, inputs, Options(schedule=numbers, **options)))
        return contexts[-1].module.forward

    return torch.compile(model, backend=backend, fullgraph=True), contexts


@pytest.mark.parametrize("kind", [nn.Linear, lambda k, n: Conv1D(n, k)], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize(("exponent", "norm"), [(0.0, 1), (1.0, 1), (0.5, 2)])
@pytest.mark.parametrize("explicit", [False, True])
@torch.no_grad()
def test_thresholds_are_those_of_the_numbers(kind, exponent, norm, explicit):
    model = nn.Sequential(kind(12, 10))
    own = torch.rand(12) if explicit else None
    weight = model[0].weight if isinstance(model[0], nn.Linear) else model[0].weight.t()
    limits = own if explicit else channel_thresholds(0.8, channel_norms(weight, norm), exponent)
    fast, _ = compiled(model, {"0": Numbers((10, 12), 0.8, exponent, norm, own)})
    x = torch.randn(3, 1, 12)
    y = F.linear(x.masked_fill(x.abs() <= limits, 0), weight, model[0].bias)
    torch.testing.assert_close(fast(x), y)


@pytest.mark.parametrize(("exponent", "explicit", "ops"), [(0.0, False, 0), (1.0, False, 1), (1.0, True, 0)])
@torch.no_grad()
def test_norms_are_only_asked_for_where_they_are_needed(exponent, explicit, ops):
    fast, contexts = compiled(
        nn.Sequential(nn.Linear(12, 10)),
        {"0": Numbers((10, 12), 0.8, exponent, 1, torch.rand(12) if explicit else None)},
    )
    fast(torch.randn(1, 1, 12))
    graph = contexts[0].module.graph
    assert len(graph.find_nodes(op="call_function", target=channel_threshold_op)) == ops
    (constant,) = [getattr(contexts[0].module, node.target) for node in graph.nodes if node.op == "get_attr"] or [None]
    assert (constant is None) == (ops == 1)
    if constant is not None:
        assert (constant.shape, constant.dtype) == ((12,), torch.float32)


@pytest.mark.parametrize("exponent", [0.0, 1.0], ids=["constants", "norms"])
@torch.no_grad()
def test_thresholds_stand_before_all_that_is_computed(exponent):
    """Passes that list channels above a Linear read its threshold there."""
    shapes = {"a": (10, 12), "b": (12, 10), "head": (7, 12)}
    fast, contexts = compiled(Block(), {name: Numbers(shape, 0.4, exponent, 2) for name, shape in shapes.items()})
    fast(torch.randn(1, 1, 12))
    nodes = list(contexts[0].module.graph.nodes)
    thresholds = [node.args[3] for node in nodes if node.target is sparse_linear]
    (*_, last) = sorted(nodes.index(threshold) for threshold in thresholds)
    assert len(thresholds) == 3
    assert not [node for node in nodes[:last] if node not in thresholds and node.op != "placeholder"]


@torch.no_grad()
def test_changed_weights_are_seen():
    model = nn.Sequential(nn.Linear(12, 10))
    fast, contexts = compiled(model, {"0": Numbers((10, 12), 0.8, 1.0, 1)})
    x = torch.randn(1, 1, 12)
    for _ in range(3):
        limits = channel_thresholds(0.8, channel_norms(model[0].weight, 1), 1.0)
        torch.testing.assert_close(fast(x), model(x.masked_fill(x.abs() <= limits, 0)))
        model[0].weight.mul_(1.5)
    assert len(contexts) == 1


def problems(model, numbers, *inputs):
    fast, _ = compiled(model, numbers)
    with torch.no_grad(), pytest.raises(BackendCompilerFailed) as caught:
        fast(*inputs)
    assert type(caught.value.inner_exception) is RewriteError
    return caught.value.inner_exception.linears


def test_every_problem_is_listed():
    numbers = {
        "a": Numbers((10, 11), 0.5, 0.0, 1),
        "b": Numbers((12, 10), 0.5, 0.0, 1),
        "c": Numbers((12, 10), 0.5, 0.0, 1),
        "layers.0.b": Numbers((12, 10), 0.5, 0.0, 1),
        "head": Numbers((12, 7), 0.5, 0.0, 1),
    }
    assert problems(Block(), numbers, torch.randn(1, 1, 12)) == {
        "a": "the schedule is for shape (10, 11), the model has (10, 12)",
        "c": "no Linear of the graph has this name",
        "layers.0.b": "no Linear of the graph has this name",
        "head": "the schedule is for shape (12, 7), the model has (7, 12)",
    }


@pytest.mark.parametrize("length", [1, 5])
def test_problems_of_a_dense_prompt_are_found_too(length):
    numbers = {"a": Numbers((10, 11), 0.5, 0.0, 1)}
    assert list(problems(Block(), numbers, torch.randn(1, length, 12))) == ["a"]


@pytest.mark.parametrize(("shape", "fits"), [((10, 12), True), ((12, 10), False)])
def test_shapes_of_a_conv1d_are_those_of_its_linear(shape, fits):
    numbers = {"0": Numbers(shape, 0.5, 0.0, 1)}
    model, x = nn.Sequential(Conv1D(10, 12)), torch.randn(1, 1, 12)
    if fits:
        assert compiled(model, numbers)[0](x).shape == (1, 1, 10)
    else:
        assert problems(model, numbers, x) == {"0": "the schedule is for shape (12, 10), the model has (10, 12)"}


def test_autocast_is_an_error_that_names_every_linear():
    class Autocast(Block):
        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(x)

    numbers = {
        "a": Numbers((10, 12), 0.5, 0.0, 1), "b": Numbers((12, 10), 0.5, 0.0, 1), "head": Numbers((7, 12), 0.5, 0.0, 1)
    }  # fmt: skip
    assert problems(Autocast(), numbers, torch.randn(1, 1, 12)) == {
        "a": "autocast makes its output torch.bfloat16 from torch.float32",
        "b": "x is torch.bfloat16 and its weight torch.float32",
        "head": "x is torch.bfloat16 and its weight torch.float32",
    }


class Attention(nn.Module):
    """q, k, v and o, with a cache that `cache` finds among the inputs."""

    def __init__(self, cache=None, attention=F.scaled_dot_product_attention):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(12, 12) for _ in range(4))
        self.cache, self.attention = cache, attention

    def forward(self, x, past_key_values=None, mask=None):
        q, k, v = (each(x)[:, None] for each in (self.q, self.k, self.v))
        if past_key_values is not None:
            k, v = (torch.cat([old, new], dim=2) for old, new in zip(past_key_values, (k, v), strict=True))
        return self.o(self.attention(q, k, v)[:, 0])


def written_out(q, k, v):
    return torch.softmax(q @ k.transpose(-1, -2), dim=-1) @ v


NAMES = {name: Numbers((12, 12), 0.4, 0.0, 1) for name in "qkvo"}


@pytest.mark.parametrize("attention", [F.scaled_dot_product_attention, written_out])
@pytest.mark.parametrize(
    ("length", "past", "sparse"),
    [(1, None, False), (1, 3, True), (1, 1, True), (4, None, False), (4, 3, False)],
    ids=["prompt of one token", "step", "second step", "prompt", "more of a prompt"],
)
@torch.no_grad()
def test_a_step_is_one_token_with_a_past_where_there_is_attention(attention, length, past, sparse):
    model = Attention(attention=attention)
    fast, contexts = compiled(model, NAMES)
    cache = None if past is None else [torch.randn(2, 1, past, 12) for _ in "kv"]
    x = torch.randn(2, length, 12)
    y = fast(x, past_key_values=cache)
    assert contexts[0].counts["inserted"] == (4 if sparse else 0)
    assert contexts[0].counts["dense (prompt)"] == (0 if sparse else 4)
    if not sparse:
        torch.testing.assert_close(y, model(x, cache))


@torch.no_grad()
def test_a_prompt_of_one_token_may_be_sparse_where_all_tokens_are():
    fast, contexts = compiled(Attention(), NAMES, sparse_prompts=True)
    fast(torch.randn(2, 1, 12))
    assert contexts[0].counts["inserted"] == 4


@torch.no_grad()
def test_positions_of_the_weights_are_told_also_of_a_prompt():
    model = Attention()
    fast, contexts = compiled(model, {name: NAMES[name] for name in "qo"})
    fast(torch.randn(2, 4, 12))
    (context,) = contexts
    assert [context.inputs[position] for position in context.weights] == [model.q.weight, model.o.weight]


@pytest.mark.parametrize("first", ["one", "all"])
@torch.no_grad()
def test_empty_cache_of_a_prompt_of_one_token_holds_no_floats(first):
    """Of a cache that grows, which is empty, nothing is among the inputs."""
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=32)
    model = LlamaForCausalLM(config).eval()
    names = {"model.layers.0.mlp.up_proj": Numbers((32, 24), 0.4, 0.0, 1)}
    fast, contexts = compiled(model, names)
    tokens = torch.tensor([[3]]) if first == "one" else torch.tensor([[3, 5, 7]])
    cache = DynamicCache(config=config)
    fast(tokens, past_key_values=cache)
    assert contexts[-1].counts["dense (prompt)"] == 1
    fast(torch.tensor([[4]]), past_key_values=cache)
    assert contexts[-1].counts["inserted"] == 1
