"""A model that tp_plan= shards over two ranks equals the model on one device."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from was_fx.coverage.tiny_models import tiny_model

SCRIPT = Path(__file__).with_name("two_ranks.py")
TOLERANCE = 1e-5
PAIRS = ["was", "wina", "compiled", "overridden", "changed"]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    """What two ranks on gloo say."""
    folder = tmp_path_factory.mktemp("ranks")
    tiny_model("llama").save_pretrained(folder / "llama")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(SCRIPT), str(folder / "llama"), str(folder / "found.json")]
    paths = os.pathsep.join([str(SCRIPT.parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    environment.pop("TRITON_INTERPRET", None)  # the meaning of the kernels will do
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("pair", PAIRS)
def test_logits_loss_and_realised_sparsity_equal_one_device(found, pair):
    assert found["dense"] < TOLERANCE
    for what in ("logits", "loss", "realised", "Linears", "bytes saved"):
        assert found[pair][what] < TOLERANCE, what
    assert found[pair]["effect"] > 0.01


@pytest.mark.parametrize("pair", PAIRS)
def test_norms_and_thresholds_are_those_of_the_whole_weight(found, pair):
    assert found[pair]["norms"] < TOLERANCE
    assert found[pair]["thresholds"] < TOLERANCE


def test_generate_and_check(found):
    assert found["same text"]
    assert found["check"] == [True, "eager"]


@pytest.mark.parametrize("pair", PAIRS)
def test_thresholds_follow_their_shards_and_shards_are_input_major(found, pair):
    assert found[pair]["channels"] == [64, 48]  # all inputs of up_proj [96, 64], half of those of down_proj [64, 96]
    assert found[pair]["strides"] == [[1, 48], [1, 64]]


def test_densify_undoes_it(found):
    assert found["undone"] < TOLERANCE
    assert found["weights undone"] == 0
    assert found["stride undone"]
    assert found["classes undone"]


def test_calibration_of_shards_is_refused(found):
    assert "sharded over ranks" in found["calibrate"]
