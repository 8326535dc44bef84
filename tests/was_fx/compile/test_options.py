"""Options of the backend: ours, and those of Inductor."""

import pytest
import torch

import was_fx
from was_fx.compat.dynamo import mode_options
from was_fx.compile.options import BackendOptions

LINEAR = was_fx.LinearSchedule(0.5, 0.25, 1.0)
SCHEDULE = was_fx.Schedule({"a": LINEAR}, {"a": (4, 3)}, norm=2)


@pytest.mark.parametrize(
    ("options", "field", "value"),
    [
        ({}, "schedule", None),
        ({}, "prefill", "dense"),
        ({}, "lowering", "inductor"),
        ({}, "cuda_graphs", True),
        ({}, "lists", None),
        ({"prefill": "half"}, "prefill", "half"),
        ({"disable": ["merge_siblings"]}, "disable", ("merge_siblings",)),
        ({"disable": "merge_siblings"}, "disable", ("merge_siblings",)),
        ({"disable": ()}, "disable", ()),
        ({"max_autotune": True, "cuda_graphs": False}, "inductor", {"max_autotune": True}),
        ({"triton.cudagraphs": True}, "inductor", {"triton.cudagraphs": True}),
    ],
)
def test_options_are_ours_or_those_of_inductor(options, field, value):
    assert getattr(BackendOptions.parse(options), field) == value


@pytest.mark.parametrize("mode", [None, "default", "reduce-overhead", "max-autotune"])
def test_modes_stand_for_options_of_inductor(mode):
    known = torch._inductor.list_mode_options(mode) if mode else {}
    assert mode_options(mode) == known
    assert BackendOptions.parse(mode_options(mode)).inductor == known


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lowering": "eager", "disable": ("merge_siblings",), "max_autotune": True},
        {"schedule": SCHEDULE, "prefill": "all", "compile_prompts": False, "lists": True, "cuda_graphs": False},
        {"as_step": True},
    ],
)
def test_given_options_are_what_is_not_the_default(options):
    parsed = BackendOptions.parse(options)
    assert parsed.given == options
    assert BackendOptions.parse(parsed.given) == parsed
    assert BackendOptions.parse({"lowering": "inductor", "prefill": "dense", "lists": None}).given == {}


@pytest.mark.parametrize("as_path", [False, True])
def test_passes_get_the_numbers_of_the_schedule(tmp_path, as_path):
    schedule = SCHEDULE
    if as_path:
        SCHEDULE.save(tmp_path / "a.was.safetensors")
        schedule = tmp_path / "a.was.safetensors"
    found = BackendOptions.parse({"schedule": schedule, "prefill": "all", "disable": "fuse_attention"}).passes
    (numbers,) = found.schedule.values()
    assert (numbers.shape, numbers.threshold, numbers.exponent, numbers.norm) == ((4, 3), 0.25, 1.0, 2)
    assert numbers.channel_threshold is None
    assert (found.sparse_prompts, found.disable, found.lists) == (True, ("fuse_attention",), None)


def test_passes_of_a_sparsified_model_get_no_numbers():
    found = BackendOptions.parse({"prefill": "half"}).passes
    assert (found.schedule, found.sparse_prompts) == (None, False)
