"""A router, from its Linear to the experts that it chooses, becomes one kernel in a step whose channels are listed."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import was_fx
from was_fx.compat.dynamo import linear_function, settings_for_models
from was_fx.compile.backend import was
from was_fx.coverage.tiny_models import tiny_model
from was_fx.kernels.linear.sparse_experts import reference, sparse_experts
from was_fx.kernels.ops.decode_attention import decode_attention_op
from was_fx.kernels.ops.few_topk import few_topk_op
from was_fx.kernels.ops.route import route_op
from was_fx.kernels.parts.arrivals import arrivals_op

EXPERTS, K = 6, 16


def qwen(logits):
    return torch.topk(F.softmax(logits, dtype=torch.float, dim=-1), 2, dim=-1)


def mixtral(logits):
    return torch.topk(F.softmax(logits.float(), dim=-1), 2, dim=-1)


def positional(logits):
    return torch.softmax(logits, 1, torch.float32).topk(2)


def method(logits):
    return logits.softmax(dim=-1, dtype=torch.float32).topk(k=2, dim=1, sorted=False)


def cast(logits):
    return torch.topk(logits.to(torch.float32).softmax(-1), 2)


def gpt_oss(logits):
    values, index = torch.topk(logits, 2, dim=-1)
    return F.softmax(values, dim=1, dtype=values.dtype), index


def read_scores(logits):
    scores = F.softmax(logits, dtype=torch.float, dim=-1)
    values, index = torch.topk(scores, 2, dim=-1)
    return values / scores.sum(-1, keepdim=True), index


def narrow_scores(logits):
    return torch.topk(logits.bfloat16().softmax(-1), 2)


def rounded_logits(logits):
    return torch.topk(logits.bfloat16().float().softmax(-1), 2)


def across_tokens(logits):
    return torch.topk(logits.softmax(0, dtype=torch.float32), 2)


def sigmoid(logits):
    return torch.topk(logits.sigmoid(), 2)


def in_place(logits):
    logits.add_(1)
    return mixtral(logits)


class Mixture(nn.Module):
    """A router and the product with the experts that it chooses."""

    def __init__(self, choose, dtype=torch.float32, bias=False) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(EXPERTS, K, generator=random).to(dtype))
        self.bias = nn.Parameter(torch.randn(EXPERTS, generator=random).to(dtype)) if bias else None
        self.register_buffer("experts", torch.randn(EXPERTS, K, 24, generator=random).to(dtype).mT)
        self.register_buffer("threshold", torch.rand(EXPERTS, K, generator=random))
        self.requires_grad_(False)
        self.choose, self.product = choose, sparse_experts

    def router_weight(self):
        return self.weight

    def forward(self, x):
        logits = F.linear(x, self.router_weight(), self.bias)
        values, experts = self.choose(logits)
        values /= values.sum(-1, keepdim=True)
        y = self.product(x * 2, self.experts, None, self.threshold, experts.flatten(), None)
        return logits, y * values.to(y.dtype).reshape(-1, 1)


class ComputedWeight(Mixture):
    def router_weight(self):
        return self.weight * 1


class InputMajor(Mixture):
    def __init__(self, choose) -> None:
        super().__init__(choose)
        self.weight = nn.Parameter(self.weight.t().contiguous().t(), requires_grad=False)


def targets(context):
    return [node.target for node in context.module.graph.nodes]


def run(module, rows, contexts, **options):
    """The graph of the module, which gives what it would give uncompiled."""
    x = torch.randn(rows, K, generator=torch.Generator().manual_seed(1)).to(module.weight.dtype)
    step = torch.compile(module, backend=was, options={"lowering": "eager", "lists": True, **options})
    found = step(x)
    module.product = reference
    for each, expected in zip(found, module(x), strict=True):
        torch.testing.assert_close(each, expected)
    (context,) = contexts
    return context


@pytest.mark.parametrize("choose", [qwen, mixtral, positional, method, cast, gpt_oss], ids=lambda each: each.__name__)
@pytest.mark.parametrize(("rows", "dtype"), [(1, torch.float32), (1, torch.bfloat16), (4, torch.float32)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_a_router_becomes_the_op(choose, rows, dtype, bias, contexts):
    context = run(Mixture(choose, dtype, bias), rows, contexts)
    found = targets(context)
    assert found.count(route_op) == found.count(arrivals_op) == context.counts["fused routers"] == 1
    assert linear_function not in found
    assert few_topk_op not in found
    (node,) = context.module.graph.find_nodes(op="call_function", target=route_op)
    assert node.args[4] == (choose is not gpt_oss)
    assert "softmax" not in {getattr(each, "__name__", each) for each in found} or choose is gpt_oss


REFUSED = {
    "scores with other readers": (read_scores, "the scores are read by more than the topk"),
    "scores of bf16": (narrow_scores, "the softmax is not in fp32"),
    "logits that are rounded": (rounded_logits, "the logits are rounded before the softmax"),
    "softmax across tokens": (across_tokens, "the softmax is not over the last dimension"),
    "sigmoid": (sigmoid, "the topk is not of a Linear, or of its softmax"),
    "written in place": (in_place, "the router's input, weight, logits or scores are written in place"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_others_keep_their_linear(name, contexts):
    choose, reason = REFUSED[name]
    context = run(Mixture(choose), 2, contexts)
    assert route_op not in targets(context)
    assert few_topk_op in targets(context)
    assert reason in [why for _, why in context.declined]


def test_of_two_choices_of_one_router_the_second_is_of_the_logits_of_the_first(contexts):
    def twice(logits):
        values, index = torch.topk(logits, 2)
        return values * torch.topk(logits, 1).values, index

    context = run(Mixture(twice), 2, contexts)
    assert targets(context).count(route_op) == targets(context).count(few_topk_op) == 1


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (ComputedWeight, "the router's weight or bias is not a parameter"),
        (InputMajor, "the router is of other sizes, dtypes or strides than the kernel takes"),
    ],
)
def test_other_weights_keep_their_linear(module, reason, contexts):
    context = run(module(qwen), 2, contexts)
    assert route_op not in targets(context)
    assert reason in [why for _, why in context.declined]


@pytest.mark.parametrize(
    ("rows", "options"), [(9, {}), (1, {"disable": ("fuse_routers",)}), (1, {"disable": ("list_expert_channels",)})]
)
def test_it_is_for_steps_of_few_tokens_and_can_be_left_out(rows, options, contexts):
    assert route_op not in targets(run(Mixture(qwen), rows, contexts, **options))


@pytest.mark.parametrize("model_type", ["qwen3_moe", "qwen2_moe", "mixtral", "olmoe", "gpt_oss"])
def test_routers_of_models(model_type, contexts):
    """A decode step is that without lists, has no dense router, and all kernels share counters."""
    model = tiny_model(model_type)
    tokens = torch.randint(3, 128, (4, 16), generator=torch.Generator().manual_seed(0))
    was_fx.sparsify(model, was_fx.uniform(was_fx.calibrate(model, tokens), 0.5))
    results = []
    with settings_for_models(), torch.no_grad():
        cache = model(tokens[:1, :9]).past_key_values
        for lists in (False, True):
            torch.compiler.reset()
            step = torch.compile(model, backend=was, options={"lowering": "eager", "lists": lists})
            results.append(step(tokens[:1, 9:10], past_key_values=copy.deepcopy(cache)).logits)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    without, context = contexts[0], contexts[-1]
    assert not without.counts["fused routers"]
    found = targets(context)
    assert found.count(route_op) == context.counts["fused routers"] == model.config.num_hidden_layers == 2
    assert few_topk_op not in found
    assert found.count(arrivals_op) == 1
    if decode_attention_op in found:
        assert found.index(arrivals_op) < found.index(decode_attention_op) < found.index(route_op)
