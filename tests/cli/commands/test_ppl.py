"""`was ppl`."""

import lzma

import pytest
import torch

from was_fx.cli.input.datasets import NAMED, _joined, read_dataset


def test_json_holds_the_dense_model_and_each_schedule(was, schedule):
    outcome = was("ppl", "embedded", "--schedule", schedule, "--limit", 2, "--length", 128, "--json")
    assert outcome.code == 0, outcome.stderr
    dense, sparse = outcome.json["results"]
    assert (dense["schedule"], dense["realised"], dense["tokens"]) == (None, 0.0, 2 * 127)
    assert sparse["schedule"] == str(schedule)
    assert sparse["nominal"] == 0.5
    assert sparse["realised"] == pytest.approx(0.5, abs=0.05)
    assert 1 < dense["perplexity"] < sparse["perplexity"]


def test_table_fits_eighty_columns(was, schedule):
    outcome = was("ppl", "embedded", "--schedule", schedule, "--limit", 1, "--length", 64)
    assert outcome.code == 0, outcome.stderr
    assert max(map(len, outcome.stdout.splitlines())) <= 80
    assert "63 tokens in windows of 64" in outcome.stdout
    assert "50.0 %" in outcome.stdout


def test_a_schedule_counts_the_same_after_one_of_another_norm(was, schedule, tmp_path):
    wina = tmp_path / "wina.was.safetensors"
    calibration = tmp_path / "wina.safetensors"
    common = ("--limit", 1, "--length", 64, "--json")
    was("calibrate", "embedded", "--score", "wina", "--tokens", 512, "--length", 256, "--out", calibration)
    was("make", calibration, "--target", "0.5", "--out", wina)
    alone = was("ppl", "embedded", "--schedule", wina, *common).json["results"][-1]
    after = was("ppl", "embedded", "--schedule", schedule, "--schedule", wina, *common).json["results"][-1]
    assert after == alone


def test_refuses_the_schedule_of_another_model(was, schedule, other_model, text):
    outcome = was("ppl", other_model, "--schedule", schedule, "--text", text, "--limit", 1)
    assert outcome.code == 1
    assert "does not fit the model" in outcome.error
    assert "model.layers.5.mlp.down_proj" in outcome.error


def test_the_remedy_names_the_option_of_the_command_line(was, schedule, tmp_path):
    from was_fx import Schedule

    found = Schedule.load(schedule)
    stranger = found.replace({}, fingerprint={**found.metadata.fingerprint, "weights": "0" * 64})
    path = tmp_path / "s.was.safetensors"
    stranger.save(path)
    arguments = ("ppl", "embedded", "--schedule", path, "--limit", 1, "--length", 32)
    assert "--allow-other-model skips" in was(*arguments).error
    assert was(*arguments, "--allow-other-model").code == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["embedded", "--schedule", "{calibration}"], 1, "is a calibration, not a schedule"),
        (["embedded", "--schedule", "none.safetensors"], 1, "there is no was-fx schedule here"),
        (["embedded", "--prefill", "dense"], 2, "sparse"),
        (["embedded", "--limit", "0"], 2, "--limit"),
        (["embedded", "--text", "none.txt"], 1, "none.txt: No such file"),
        (["./model"], 2, "needs a text"),
    ],
)
def test_refusals(was, calibration, arguments, code, message):
    outcome = was("ppl", *[each.replace("{calibration}", str(calibration)) for each in arguments])
    assert outcome.code == code, outcome
    assert message in " ".join(outcome.stderr.replace("│", " ").split())
    assert outcome.stdout == ""


def test_a_checkpoint_that_was_saved_sparse_is_dense_here(was, other_model, text, tmp_path):
    """Its schedule is one among those that the command is given."""
    import was_fx
    from was_fx.cli.input.models import load_model

    loaded = load_model(str(other_model), device="cpu")
    calibration = was_fx.calibrate(loaded.model, torch.randint(2, 4096, (2, 64)))
    was_fx.sparsify(loaded.model, was_fx.uniform(calibration, 0.5)).save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    dense = was("ppl", other_model, "--text", text, "--length", 64, "--json")
    saved = was("ppl", tmp_path, "--text", text, "--length", 64, "--json")
    assert saved.json["results"] == dense.json["results"]
    assert "--schedule" in saved.stderr


ROWS = ["", " = A ship = \n", "", " It was a dark and stormy night , and the rain fell in torrents . \n" * 30] * 12


class Hub:
    """In place of `datasets`: notes what is asked for, and gives rows."""

    def __init__(self, rows, **found):
        self.rows, self.found, self.asked = rows, found, []

    def load_dataset(self, *arguments, **keywords):
        self.asked.append((arguments, keywords))
        if isinstance(self.rows, Exception):
            raise self.rows
        import datasets

        return datasets.Dataset.from_dict({"text": self.rows, **self.found})


@pytest.fixture
def hub(monkeypatch):
    """A function that makes the Hub's data sets have these rows."""
    import datasets

    def made(rows, **found):
        stand_in = Hub(rows, **found)
        monkeypatch.setattr(datasets, "load_dataset", stand_in.load_dataset)
        return stand_in

    return made


def scored(was, *arguments):
    outcome = was("ppl", "embedded", *arguments, "--length", 64, "--limit", 3, "--json")
    assert outcome.code == 0, outcome.stderr
    return outcome.json


def test_wikitext2_is_its_test_split_joined_by_blank_lines(was, hub, tmp_path):
    asked = hub(ROWS).asked
    found = scored(was, "--dataset", "wikitext2")
    assert asked == [(("Salesforce/wikitext",), {"name": "wikitext-2-raw-v1", "split": "test"})]
    assert (found["text"], found["convention"], found["prefill"]) == ("wikitext2", "was", "sparse")
    joined = tmp_path / "joined.txt"
    joined.write_text("\n\n".join(ROWS), encoding="utf-8")
    assert scored(was, "--text", joined)["results"] == found["results"]


def test_c4_is_the_start_of_its_validation_split_joined_by_spaces(was, hub, tmp_path):
    rows = ["Before the storm.\n", "After the storm came the sun." * 20] * 600
    asked = hub(rows, url=["http://example.org"] * 1200).asked
    found = scored(was, "--dataset", "c4", "--convention", "all")
    files = {"validation": "en/c4-validation.00000-of-00008.json.gz"}
    assert asked == [(("allenai/c4",), {"data_files": files, "split": "validation"})]
    joined = tmp_path / "joined.txt"
    joined.write_text(" ".join(rows), encoding="utf-8")
    assert scored(was, "--text", joined, "--prefill", "all")["results"] == found["results"]


def test_c4_ends_after_its_first_texts_and_tokens():
    text = _joined("c4", NAMED["c4"], [str(number) for number in range(2000)])
    assert "".join(text.parts()) == " ".join(str(number) for number in range(1100))
    assert text.tokens == 256 * 2048


@pytest.mark.parametrize("form", ["txt", "txt.xz", "jsonl", "parquet", "folder", "folder of splits"])
def test_a_local_copy_gives_what_the_hub_gives(tmp_path, form):
    import datasets

    expected = "\n\n".join(ROWS)
    path = tmp_path / f"copy.{form}"
    rows = datasets.Dataset.from_dict({"text": ROWS})
    if form.startswith("txt"):
        rows_of_lines = ["", " = A ship = \n", "", " It was dark . \n"] * 3
        expected = "\n\n".join(rows_of_lines)
        with (lzma.open if form.endswith("xz") else open)(path, "wt", encoding="utf-8") as file:
            file.write("".join(row or " \n" for row in rows_of_lines))
    elif form == "jsonl":
        rows.to_json(path)
    elif form == "parquet":
        rows.to_parquet(path)
    elif form == "folder":
        rows.save_to_disk(path)
    else:
        datasets.DatasetDict({"test": rows}).save_to_disk(path)
    assert "".join(read_dataset(f"wikitext2={path}").parts()) == expected


def test_a_text_file_is_a_data_set_as_it_is(was, text):
    assert scored(was, "--dataset", text)["results"] == scored(was, "--text", text)["results"]


@pytest.mark.parametrize(
    ("convention", "length", "prefill", "tokens"),
    [("was", 64, "sparse", 3 * 63), ("teal", 64, "half", 3 * 12), ("all", 64, "all", 3 * 63)],
)
def test_conventions_are_scaled_to_the_length(was, schedule, text, convention, length, prefill, tokens):
    found = scored(was, "--text", text, "--convention", convention, "--schedule", schedule)
    assert (found["convention"], found["length"], found["prefill"]) == (convention, length, prefill)
    assert [row["tokens"] for row in found["results"]] == [tokens] * 2


def test_decoding_token_by_token_gives_what_the_prompt_gives(was, text):
    exact, blocks = (
        was("ppl", "embedded", "--text", text, "--convention", name, "--length", 32, "--limit", 1, "--json").json
        for name in ("decode-exact", "was")
    )
    for one, other in zip(exact["results"], blocks["results"], strict=True):
        assert one["perplexity"] == pytest.approx(other["perplexity"], rel=1e-3)
        assert one["realised"] == pytest.approx(other["realised"], abs=1e-3)


def test_a_model_that_takes_less_says_that_tables_differ(was, other_model, text):
    outcome = was("ppl", other_model, "--text", text, "--convention", "teal", "--limit", 1)
    assert outcome.code == 0, outcome.stderr
    assert "Sequences of 128 tokens instead of 2560" in " ".join(outcome.stderr.split())
    assert "in sequences of 128" in outcome.stdout


def test_without_the_hub_the_error_says_what_to_do(was, hub):
    hub(ConnectionError("Couldn't reach 'Salesforce/wikitext' on the Hub (OfflineModeIsEnabled)"))
    outcome = was("ppl", "embedded", "--dataset", "wikitext2")
    assert outcome.code == 1
    error = " ".join(outcome.error.split())
    assert "Salesforce/wikitext could not be had from the Hub (Couldn't reach" in error
    assert "--dataset wikitext2=PATH" in error


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--dataset", "wikitext"], 2, "no data set and no file 'wikitext' (did you mean wikitext2?)"),
        (["--dataset", "c4=nowhere"], 1, "nowhere: there is no such copy of the data set"),
        (["--dataset", "c4={tmp}/rows.jsonl"], 1, "has the columns content; expected 'text' among them"),
        (["--dataset", "c4={tmp}"], 1, "is no copy of allenai/c4 with the split 'validation'"),
        (["--dataset", "wikitext2={tmp}/bad.parquet"], 1, "bad.parquet is no copy of Salesforce/wikitext"),
        (["--text", "{tmp}/bad.txt.xz"], 1, "is a damaged compressed file"),
        (["--text", "{tmp}/latin.txt"], 1, "is not UTF-8 text (byte 1)"),
        (["--dataset", "c4", "--text", "x.txt"], 2, "either a data set or a --text"),
        (["--convention", "was", "--prefill", "half"], 2, "says already which tokens are sparse"),
        (["--convention", "was", "--length", "5000"], 1, "takes at most 1024 tokens"),
        (["--convention", "wass"], 2, "wass"),
        (["--text", "{tmp}/short.txt", "--convention", "was"], 1, "too few for one sequence of 1024"),
    ],
)
def test_refusals_of_data_sets_and_conventions(was, tmp_path, arguments, code, message):
    (tmp_path / "rows.jsonl").write_text('{"content": "a"}\n')
    (tmp_path / "bad.parquet").write_bytes(b"nothing")
    (tmp_path / "bad.txt.xz").write_bytes(b"nothing")
    (tmp_path / "latin.txt").write_bytes(b"a\xe4b")
    (tmp_path / "short.txt").write_text("It was dark.")
    outcome = was("ppl", "embedded", *[each.replace("{tmp}", str(tmp_path)) for each in arguments])
    assert outcome.code == code, outcome
    assert message in " ".join(outcome.stderr.replace("│", " ").split()), outcome.stderr
