"""Run by test_tensor_parallel.py under torchrun: a model on two ranks beside the same model on one.

Usage: two_ranks.py MODEL_DIRECTORY RESULT.json
"""

import json
import sys
from unittest import mock

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

import was_fx
from was_fx.compile.backend import BackendOptions
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


def bound(model: torch.nn.Module, name: str):
    return model.get_submodule(name).weight._was.bindings[name]


def listed(options: BackendOptions) -> Options:
    """As on a GPU: a decode step lists its channels, and what surrounds the Linears is fused with that."""
    return Options(prefill=options.prefill, observe=options.observe, lists=True)


def forget(*models: torch.nn.Module) -> None:
    """Make them dense, and drop the graphs that would serve them again whatever the passes now do."""
    for model in models:
        was_fx.densify(model)
    torch.compiler.reset()


def compare(two: torch.nn.Module, one: torch.nn.Module, schedule: was_fx.Schedule, tokens: torch.Tensor) -> dict:
    """Two ranks and one device with the same schedule."""
    was_fx.sparsify(one, schedule, prefill="sparse")
    was_fx.sparsify(two, schedule, prefill="sparse")
    expected, found = was_fx.evaluate(one, tokens), was_fx.evaluate(two, tokens)
    names = {name: (bound(two, name), bound(one, name)) for name in schedule.linears}
    width = {name: bound(two, name).threshold.shape[0] for name in OWN}
    return {
        "logits": difference(logits(two, tokens[:1]), logits(one, tokens[:1])),
        "loss": abs(found.loss - expected.loss),
        "realised": abs(found.realised - expected.realised),
        "bytes saved": abs(found.bytes_saved - expected.bytes_saved),
        "norms": max(difference(own.norms, whole.norms) for own, whole in names.values()),
        "channels": [width[name] for name in OWN],
        "strides": [list(two.get_submodule(name).weight.to_local().stride()) for name in OWN],
    }


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
    found = {"dense": difference(before, logits(one, tokens[:1]))}
    for score in ("was", "wina"):
        calibration = was_fx.calibrate(one, tokens, score=was_fx.Score.named(score))
        schedule = was_fx.uniform(calibration, 0.5)
        found[score] = compare(two, one, schedule, tokens)
        if score == "was":
            forget(two, one)
            with mock.patch.object(BackendOptions, "passes", property(listed)):
                found["listed"] = compare(two, one, schedule, tokens)
            forget(two, one)
            found["overridden"] = compare(two, one, override(schedule), tokens)
        was_fx.densify(two)
        was_fx.densify(one)
    found["undone"] = difference(logits(two, tokens[:1]), before)
    found["stride undone"] = two.get_submodule(OWN[0]).weight.to_local().stride() == stride
    try:
        was_fx.calibrate(two, tokens)
    except ValueError as error:
        found["calibrate"] = str(error)
    if dist.get_rank() == 0:
        with open(result, "w", encoding="utf-8") as file:
            json.dump(found, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
