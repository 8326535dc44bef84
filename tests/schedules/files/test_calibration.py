import math

import pytest
import torch

from was_fx.schedules.errors import ScheduleError
from was_fx.schedules.files import calibration as calibration_module
from was_fx.schedules.files import storage
from was_fx.schedules.files.calibration import Calibration, CalibrationBuilder
from was_fx.schedules.files.schedule import LinearSchedule, Schedule
from was_fx.schedules.score import Score, channel_norms, channel_thresholds

SHAPES = {"up": (24, 16), "down": (16, 24)}
FINGERPRINT = {"architecture": "Llama"}


def inputs(name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(name))
    return torch.randn(5, 400, SHAPES[name][1], generator=generator).to(dtype)


def norms_of(name: str, norm: int = 1) -> torch.Tensor:
    return channel_norms(torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(9)), norm)


def builder_for(score: Score) -> CalibrationBuilder:
    return CalibrationBuilder(score, SHAPES, {name: norms_of(name, score.norm) for name in SHAPES})


def calibrated(score: Score | None = None, dtype: torch.dtype = torch.float32) -> Calibration:
    builder = builder_for(score or Score())
    for name in SHAPES:
        builder.add(name, inputs(name, dtype))
    return builder.build("text", FINGERPRINT)


def by_hand(threshold=(0.0, 0.0, 1.0, 3.0)) -> Calibration:
    levels = torch.tensor([0.0, 0.25, 0.5, 0.75])
    return Calibration(Score(), levels, {"up": torch.tensor(threshold)}, {"up": (24, 16)}, 10, "text")


@pytest.mark.parametrize("score", [Score(), Score(0.0), Score(0.5, 2), Score(1.0, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
def test_thresholds_drop_the_share_asked_for(score, dtype, sparsity):
    calibration = calibrated(score, dtype)
    for name in SHAPES:
        threshold = calibration.threshold(name, sparsity)
        channels = channel_thresholds(threshold, norms_of(name, score.norm), score.exponent)
        dropped = inputs(name, dtype).float().abs() <= channels
        assert dropped.float().mean().item() == pytest.approx(sparsity, abs=0.002)


def test_calibration_describes_itself():
    calibration = calibrated()
    assert torch.equal(calibration.levels, (torch.arange(1000, dtype=torch.float64) / 1000).float())
    assert calibration.thresholds.keys() == SHAPES.keys()
    assert (calibration.shapes, calibration.tokens, calibration.text) == (SHAPES, 2000, "text")
    assert calibration.fingerprint == FINGERPRINT
    assert calibration.score == Score()


def test_batches_and_blocks_equal_one_pass(monkeypatch):
    whole = calibrated()
    monkeypatch.setattr(calibration_module, "_BLOCK_ELEMENTS", 1000)
    builder = builder_for(Score())
    for name in SHAPES:
        for batch in inputs(name):
            builder.add(name, batch)
    assert builder.build("text", FINGERPRINT) == whole


def test_inputs_that_require_a_gradient_are_counted():
    builder = CalibrationBuilder(Score(), {"up": (24, 16)}, {"up": norms_of("up")})
    builder.add("up", inputs("up").requires_grad_())
    assert builder.build("text", {}).tokens == 2000


def test_unusable_inputs_are_refused_with_the_names_of_their_linears():
    shapes = {**SHAPES, "idle": (2, 3)}
    norms = {name: torch.ones(shape[1]) for name, shape in shapes.items()}
    builder = CalibrationBuilder(Score(), shapes, norms)
    bad = inputs("up")
    bad[0, 0, 0], bad[0, 1, 1] = math.nan, math.inf
    builder.add("up", bad)
    builder.add("down", inputs("down"))
    with pytest.raises(ScheduleError, match="the calibration is not usable") as caught:
        builder.build("text", {})
    assert caught.value.problems == [
        "idle has seen no token",
        "up: 2 of 32000 scores are NaN or infinite",
    ]


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda: by_hand().threshold("up", 0.76), "sparsity must be from 0 to 0.75, found 0.76"),
        (lambda: by_hand().threshold("up", -0.1), "found -0.1"),
        (lambda: by_hand().threshold("up", math.nan), "found nan"),
        (lambda: by_hand().threshold("upp", 0.5), r"upp was not calibrated \(did you mean up\?\)"),
        (lambda: by_hand((0.0, 2.0, 1.0, 3.0)), "thresholds decrease"),
    ],
)
def test_refusals(use, message):
    with pytest.raises(ValueError, match=message):
        use()


@pytest.mark.parametrize(("sparsity", "threshold"), [(0.25, 0.0), (0.375, 0.5), (0.5, 1.0), (0.625, 2.0), (0.75, 3.0)])
def test_thresholds_are_linear_between_levels(sparsity, threshold):
    assert by_hand().threshold("up", sparsity) == pytest.approx(threshold)


def test_zeros_are_dropped_at_threshold_zero():
    assert by_hand().threshold("up", 0.1) == 0


def test_the_last_level_of_a_measured_calibration_is_reached():
    assert calibrated().threshold("up", 0.999) > calibrated().threshold("up", 0.998)


@pytest.mark.parametrize("make", [calibrated, by_hand])
def test_round_trip_is_equal_and_byte_stable(tmp_path, make):
    make().save(tmp_path / "first")
    loaded = Calibration.load(tmp_path / "first")
    loaded.save(tmp_path / "second")
    assert loaded == make()
    assert list(loaded.thresholds) == list(make().thresholds)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


def test_load_lists_every_problem_and_the_path(tmp_path):
    path = tmp_path / "calibration"
    by_hand().save(path)
    tensors, metadata = storage.read(path, storage.CALIBRATION)
    tensors |= {
        "up.thresholds": -tensors["up.thresholds"],
        "down.thresholds": torch.ones(4),
        "x": torch.ones(1),
    }
    metadata |= {"tokens": "0", "norm": "3", "note": "x"}
    del metadata["text"]
    storage.write(path, storage.CALIBRATION, tensors, metadata)
    with pytest.raises(ScheduleError, match="is not a valid calibration") as caught:
        Calibration.load(path)
    assert str(path) in str(caught.value)
    assert caught.value.problems == [
        "a channel norm is p = 1 or p = 2, found 3",
        "metadata 'text' is missing",
        "unknown metadata 'note'",
        "unknown tensor x: expected levels or <Linear>.thresholds",
        "the calibration has 0 tokens, expected at least 1",
        "up: the thresholds hold NaN, infinite or negative values",
        "down has thresholds, but the shape None: expected (N, K)",
    ]


def test_a_schedule_is_not_loaded_as_a_calibration(tmp_path):
    Schedule({"up": LinearSchedule(0.5, 0.1, 1.0)}, {"up": (2, 3)}).save(tmp_path / "schedule")
    with pytest.raises(ScheduleError, match=r"is not a was-fx calibration.*\n.*Load it with Schedule\.load"):
        Calibration.load(tmp_path / "schedule")
