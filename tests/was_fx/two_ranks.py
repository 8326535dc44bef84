"""Run by test_tensor_parallel.py under torchrun: a model on two ranks beside the same model on one.

Usage: two_ranks.py MODEL_DIRECTORY RESULT.json
"""

import copy
import json
import sys
from unittest import mock

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

import was_fx
from was_fx.compile.options import BackendOptions
from was_fx.passes.graph.context import Options

OWN = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"  # sharded by outputs, by inputs


def load(directory: str, **arguments) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **arguments).eval()


@torch.no_grad()
def logits(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [7, V] of a prompt's last token and six decode steps."""
    cached = model(tokens[:, :12].clone(memory_format=torch.contiguous_format), use_cache=True)
    found = [cached.logits[:, -1]]
    for step in range(12, 18):
        # As generate() does: DTensor's rules can't take the symbolic strides of a slice.
        token = tokens[:, step : step + 1].clone(memory_format=torch.contiguous_format)
        cached = model(token, past_key_values=cached.past_key_values, use_cache=True)
        found.append(cached.logits[:, -1])
    return torch.cat(found)


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def forget(*models: torch.nn.Module) -> None:
    """Make them dense, and drop the graphs of before."""
    for model in models:
        was_fx.densify(model)
    torch.compiler.reset()


def compare(two: torch.nn.Module, one: torch.nn.Module, schedule: was_fx.Schedule, tokens: torch.Tensor) -> dict:
    """Two ranks and one device with the same schedule."""
    for model in (one, two):
        was_fx.sparsify(model, schedule, prefill="sparse", allow_other_model=True)
    expected, found = was_fx.evaluate(one, tokens), was_fx.evaluate(two, tokens)
    pairs = [(two.get_submodule(name), one.get_submodule(name)) for name in schedule.linears]
    shared = {name: abs(found.linears[name] - expected.linears[name]) for name in schedule.linears}
    return {
        "logits": difference(logits(two, tokens[:1]), logits(one, tokens[:1])),
        "effect": difference(logits(two, tokens[:1]), logits(was_fx.densify(copy.deepcopy(one)), tokens[:1])),
        "loss": abs(found.loss - expected.loss),
        "realised": abs(found.realised - expected.realised),
        "Linears": max(shared.values()),
        "bytes saved": abs(found.bytes_saved - expected.bytes_saved),
        "norms": max(difference(own.was_norms, whole.was_norms) for own, whole in pairs),
        "thresholds": max(difference(own.was_threshold, part(own, whole)) for own, whole in pairs),
        "channels": [two.get_submodule(name).was_threshold.shape[0] for name in OWN],
        "strides": [list(two.get_submodule(name).weight.to_local().stride()) for name in OWN],
    }


def part(own: torch.nn.Module, whole: torch.nn.Module) -> torch.Tensor:
    """This rank's channels of the whole thresholds."""
    width = own.was_threshold.shape[0]
    start = dist.get_rank() * width if width < whole.was_threshold.shape[0] else 0
    return whole.was_threshold[start : start + width]


def compiled(two: torch.nn.Module, one: torch.nn.Module, schedule: was_fx.Schedule, tokens: torch.Tensor) -> dict:
    """The same, where the call of the sharded model is compiled; `lists` as on a GPU."""
    with mock.patch.object(BackendOptions, "passes", property(lambda _: Options(lists=True))):
        two.compile(backend="was", dynamic=True, options={"lowering": "eager"})
        found = compare(two, one, schedule, tokens)
    two._compiled_call_impl = None
    return found


def changed(two: torch.nn.Module, one: torch.nn.Module, schedule: was_fx.Schedule, tokens: torch.Tensor) -> dict:
    """After the weights have changed on both."""
    for model in (one, two):
        was_fx.sparsify(model, schedule, prefill="sparse")
    with torch.no_grad():
        for model in (one, two):
            for name in OWN:
                model.get_submodule(name).weight.mul_(2)
    found = compare(two, one, schedule, tokens)
    with torch.no_grad():
        for model in (one, two):
            for name in OWN:
                model.get_submodule(name).weight.div_(2)
    return found


def override(schedule: was_fx.Schedule) -> was_fx.Schedule:
    """The same with thresholds of its own for each channel of the Linear that is sharded by inputs, and α = ½."""
    channels = torch.linspace(0.0, 2.0, schedule.shapes[OWN[1]][1])
    changed = {
        OWN[0]: was_fx.LinearSchedule(0.5, 0.3, 0.5),
        OWN[1]: was_fx.LinearSchedule(0.5, 0.0, 1.0, channel_threshold=channels),
    }
    return schedule.replace(changed)


def main(directory: str, result: str) -> None:
    dist.init_process_group("gloo")
    tokens = torch.randint(3, 128, (2, 18), generator=torch.Generator().manual_seed(0))
    one, two = load(directory), load(directory, tp_plan="auto")
    before, stride = logits(two, tokens[:1]), two.get_submodule(OWN[0]).weight.to_local().stride()
    weights = [each.detach().to_local().clone() for each in own_weights(two)]
    classes = [type(each) for each in two.modules()]
    found: dict = {"dense": difference(before, logits(one, tokens[:1]))}
    for score in ("was", "wina"):
        schedule = was_fx.uniform(was_fx.calibrate(one, tokens, score=was_fx.Score.named(score)), 0.5)
        found[score] = compare(two, one, schedule, tokens)
        if score == "was":
            text = [model.generate(tokens[:1, :12], max_new_tokens=6, do_sample=False) for model in (one, two)]
            found["same text"] = text[0].equal(text[1])
            report = was_fx.check(two, tokens[:1, :12])
            found["check"] = [report.ok, report.path]
            for name, way, numbers in (
                ("compiled", compiled, schedule),
                ("overridden", compare, override(schedule)),
                ("changed", changed, schedule),
            ):
                forget(two, one)
                found[name] = way(two, one, numbers, tokens)
        forget(two, one)
    found["undone"] = difference(logits(two, tokens[:1]), before)
    found["stride undone"] = two.get_submodule(OWN[0]).weight.to_local().stride() == stride
    found["classes undone"] = classes == [type(each) for each in two.modules()]
    pairs = zip(own_weights(two), weights, strict=True)
    found["weights undone"] = max(difference(each.detach().to_local(), then) for each, then in pairs)
    try:
        was_fx.calibrate(two, tokens)
    except ValueError as error:
        found["calibrate"] = str(error)
    if dist.get_rank() == 0:
        with open(result, "w", encoding="utf-8") as file:
            json.dump(found, file)
    dist.destroy_process_group()


def own_weights(model: torch.nn.Module) -> list:
    return [model.get_submodule(name).weight for name in OWN]


if __name__ == "__main__":
    main(*sys.argv[1:])
