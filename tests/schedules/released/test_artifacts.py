"""Reading released folders."""

import shutil

import pytest
import torch

from was_fx.schedules.errors import ScheduleError
from was_fx.schedules.released.artifacts import read_release

PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")


@pytest.fixture(scope="module")
def folders(tmp_path_factory, write_release):
    generator = torch.Generator().manual_seed(0)
    scores = {(b, p): torch.randn(4096, generator=generator) for b in range(2) for p in PROJECTIONS}
    return {
        method: write_release(tmp_path_factory.mktemp(method), method, scores) for method in ("teal", "was", "wina")
    }


@pytest.fixture
def folder(folders, tmp_path):
    """A copy of WAS's to damage."""
    return shutil.copytree(folders["was"], tmp_path / "was")


@pytest.mark.parametrize("method", ["teal", "was", "wina"])
def test_the_method_shows_in_the_histograms(folders, method):
    found = read_release(folders[method], 2)
    assert found.method == method
    assert set(found.histograms) == {(b, p) for b in range(2) for p in PROJECTIONS}
    assert set(found.tables) == {0, 1}


def test_teal_shares_a_histogram_among_siblings(folders):
    found = read_release(folders["teal"], 2).histograms
    assert found[0, "q"].centers.tolist() == found[0, "v"].centers.tolist()
    assert found[0, "q"].centers.tolist() != found[0, "o"].centers.tolist()


def test_everything_that_is_wrong_is_in_one_error(folder):
    (folder / "histograms/layer-0/mlp/histograms.pt").write_bytes(b"PK\x03\x04 no archive")
    (folder / "histograms/layer-1/self_attn/histograms.pt").unlink()
    (folder / "lookup/layer-1/results.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ScheduleError) as caught:
        read_release(folder, 2)
    text = str(caught.value)
    assert "histograms/layer-0/mlp/histograms.pt: it is no .pt file" in text
    assert "histograms/layer-1/self_attn/histograms.pt is missing" in text
    assert "lookup/layer-1/results.csv: the columns are 'a,b'" in text
    assert len(caught.value.problems) == 3


def test_blocks_that_are_missing_or_too_many_are_one_line_each(folder):
    with pytest.raises(ScheduleError) as caught:
        read_release(folder, 40)
    assert caught.value.problems == [
        f"{part}/ lacks layer-2, layer-3, layer-4, … layer-39 (38) of the model's 40 blocks"
        for part in ("histograms", "lookup")
    ]
    with pytest.raises(ScheduleError, match="histograms/ has layer-1, but the model has only 1"):
        read_release(folder, 1)


def test_a_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(ScheduleError, match=r"histograms/ lacks layer-0, layer-1 of"):
        read_release(tmp_path / "none", 2)


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemExit('code ran')",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (Evil(), "no .pt file of plain tensors"),
        ([torch.ones(3)], "it holds a list, expected a dict of tensors"),
        ({"gate": torch.ones(3)}, "'gate_centers' is missing"),
        ({}, "'gate' is missing"),
    ],
)
def test_pickles_run_no_code_and_must_hold_histograms(folder, content, message):
    torch.save(content, folder / "histograms/layer-0/mlp/histograms.pt")
    with pytest.raises(ScheduleError, match=message):
        read_release(folder, 2)


def test_any_cut_or_flipped_file_is_an_error_of_ours_or_read(folder):
    path = folder / "histograms/layer-0/mlp/histograms.pt"
    data = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    cuts = [data[: len(data) * part // 10] for part in range(10)]
    for place in torch.randint(0, len(data), (30,), generator=generator).tolist():
        cuts.append(data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :])
    refused = 0
    for cut in cuts:
        path.write_bytes(cut)
        try:
            read_release(folder, 2)
        except ScheduleError:
            refused += 1
    assert refused >= 10  # every cut; a flipped byte may be padding


def test_unknown_columns_and_mixed_methods_are_refused(folder, folders):
    table = folder / "lookup/layer-0/results.csv"
    table.write_text(table.read_text().replace("gate", "gates"))
    with pytest.raises(ScheduleError, match="unknown columns gates"):
        read_release(folder, 2)
    shutil.copytree(folders["was"], folder, dirs_exist_ok=True)
    other = "histograms/layer-1/mlp/histograms.pt"
    shutil.copy(folders["wina"] / other, folder / other)
    with pytest.raises(ScheduleError, match="several methods: was, wina"):
        read_release(folder, 2)
