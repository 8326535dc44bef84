"""`was compare`, its tables and its picture."""

import json
import sys
from xml.etree import ElementTree

import pytest

from was_fx import LinearSchedule, Schedule

SHAPES = {f"model.layers.{b}.{p}": (4 if p == "k_proj" else 12, 8) for b in range(3) for p in ("q_proj", "k_proj")}


@pytest.fixture
def files(tmp_path):
    """Two schedules of one model, the results of `was ppl --json` for them, and a search's trials."""
    first = {name: LinearSchedule(0.2 if "k_proj" in name else 0.4, 1.0, 1.0) for name in SHAPES}
    second = {**first, "model.layers.2.q_proj": LinearSchedule(0.8, 1.0, 1.0)}
    paths = []
    results = [{"schedule": None, "perplexity": 40.0, "nominal": 0.0, "realised": 0.0, "bytes_saved": 0.0}]
    for name, linears in {"a": first, "b": second}.items():
        schedule = Schedule(linears, SHAPES)
        paths.append(tmp_path / f"{name}.safetensors")
        schedule.save(paths[-1])
        measured = {"perplexity": 50.0, "nominal": schedule.sparsity, "realised": 0.36, "bytes_saved": 0.3}
        results.append({"schedule": str(paths[-1]), **measured})
    ppl = tmp_path / "ppl.json"
    ppl.write_text(json.dumps({"model": "m", "text": "t", "prefill": "sparse", "length": 64, "results": results}))
    search = tmp_path / "search.jsonl"
    search.write_text("".join(json.dumps({"index": i, "loss": 4 - i / 10, "target": 0.5}) + "\n" for i in range(5)))
    return {"schedules": paths, "ppl": ppl, "search": search}


def test_means_are_weighted_by_the_number_of_weights(was, files):
    rows = [line.split() for line in was("compare", *files["schedules"]).stdout.splitlines()]
    assert ["q", "40.0", "53.3"] in rows
    assert ["k", "20.0", "20.0"] in rows
    assert ["0", "35.0", "35.0"] in rows  # (12 · 40 + 4 · 20) / 16
    assert ["2", "35.0", "65.0"] in rows


def test_perplexity_stands_beside_the_bytes_saved(was, files):
    outcome = was("compare", *files["schedules"], "--ppl", files["ppl"])
    rows = [line.split() for line in outcome.stdout.splitlines()]
    assert ["#1", "50.00", "35.0", "%", "36.0", "%", "30.0", "%"] in rows
    assert ["dense", "40.00", "0.0", "%", "0.0", "%", "0.0", "%"] in rows
    assert max(map(len, outcome.stdout.splitlines())) <= 80 + len(str(files["ppl"]))


def test_searches_stand_alone_too(was, files):
    rows = [line.split() for line in was("compare", "--history", files["search"]).stdout.splitlines()]
    assert any(row[-6:] == ["50.0", "%", "5", "4.0000", "3.6000", "4"] for row in rows)


def test_json_has_everything(was, files):
    found = was("compare", *files["schedules"], "--ppl", files["ppl"], "--history", files["search"], "--json").json
    assert [each["nominal"] for each in found["schedules"]] == pytest.approx([0.35, 0.45])
    assert found["schedules"][1]["blocks"]["model.layers.2"] == pytest.approx(0.65)
    assert found["schedules"][0]["measured"]["bytes_saved"] == 0.3
    assert found["dense"]["perplexity"] == 40.0
    assert found["searches"][0]["best"] == {"index": 4, "loss": 3.6}


def test_many_schedules_go_into_several_tables(was):
    from was_fx.schedules.released.published import published_names

    outcome = was("compare", *published_names())
    assert outcome.code == 0
    assert max(map(len, outcome.stdout.splitlines())) <= 80
    assert outcome.stdout.count("block ") == 2
    assert "#15" in outcome.stdout


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_pictures_are_whole_and_the_same_each_time(was, files, tmp_path, ending):
    drawn = []
    for name in ("first", "second"):
        path = tmp_path / f"{name}.{ending}"
        inputs = (*files["schedules"], "--ppl", files["ppl"], "--history", files["search"])
        outcome = was("compare", *inputs, "--plot", path)
        assert outcome.code == 0, outcome.stderr
        assert f"Wrote {path}" in outcome.stdout
        drawn.append(path.read_bytes())
    assert drawn[0] == drawn[1]
    start = {"png": b"\x89PNG\r\n", "svg": b"<?xml", "pdf": b"%PDF-"}[ending]
    assert drawn[0].startswith(start)


def test_the_picture_has_a_panel_for_each_thing_there_is(was, files, tmp_path):
    def titles(*arguments) -> str:
        path = tmp_path / "p.svg"
        assert was("compare", *arguments, "--plot", path, "--force").code == 0
        comments = ElementTree.parse(path, ElementTree.XMLParser(target=ElementTree.TreeBuilder(insert_comments=True)))
        return " | ".join(each.text for each in comments.iter() if each.tag is ElementTree.Comment)

    everything = titles(*files["schedules"], "--ppl", files["ppl"], "--history", files["search"])
    for title in ("Sparsity by block", "Sparsity by projection", "Perplexity against bytes saved", "Search: every"):
        assert title in everything
    assert "Perplexity" not in titles(*files["schedules"])
    assert "Sparsity" not in titles("--history", files["search"])


def test_names_are_no_markup(was, files, tmp_path):
    odd = tmp_path / "[bold]_$x$.safetensors"
    odd.write_bytes(files["schedules"][0].read_bytes())
    outcome = was("compare", odd, "--plot", tmp_path / "p.svg")
    assert outcome.code == 0, outcome.stderr
    assert "[bold]_$x$" in outcome.stdout.replace("\n", "").replace(" ", "")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "give at least one schedule or --history"),
        (["{a}", "--plot", "{tmp}/x.gif"], 2, "must end in .png, .svg, .pdf"),
        (["{a}", "--plot", "{tmp}/none/x.svg"], 1, "choose an existing directory"),
        (["{a}", "--plot", "{a}.svg"], 1, "--force"),
        (["{tmp}/none"], 1, "there is no was-fx schedule here"),
        (["was-llama-2-7b-61"], 1, "there is no was-fx schedule here"),
        (["{a}", "--ppl", "{a}.svg"], 1, "is not what was ppl --json prints"),
        (["--history", "{ppl}"], 1, "no trial with a loss"),
    ],
)
def test_refusals(was, files, tmp_path, arguments, code, message):
    a = files["schedules"][0]
    a.with_name(a.name + ".svg").write_text("mine")
    names = {"{a}": a, "{tmp}": tmp_path, "{ppl}": files["ppl"]}
    for name, path in names.items():
        arguments = [each.replace(name, str(path)) for each in arguments]
    outcome = was("compare", *arguments)
    assert outcome.code == code, outcome
    text = outcome.error if code == 1 else outcome.stderr
    assert message in " ".join(text.replace("│", " ").split())


def test_without_matplotlib_the_error_says_what_to_install(was, files, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    outcome = was("compare", *files["schedules"], "--plot", tmp_path / "p.svg")
    assert outcome.code == 1
    assert "pip install 'was-fx[plot]'" in outcome.error
    assert not (tmp_path / "p.svg").exists()
    assert was("compare", *files["schedules"]).code == 0
