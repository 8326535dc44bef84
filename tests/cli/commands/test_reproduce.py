"""`was reproduce`, on the embedded model with a schedule, a text and tasks of its own."""

import json

import pytest

from was_fx import embedded
from was_fx.schedules.released.tables import published_table, published_tables

SHORT = ("--limit", 3, "--length", 64, "--batch-size", 4)
CHOICES = (
    "output_type: multiple_choice\ndoc_to_choice: [one, two]\nmetric_list:\n"
    "- {metric: acc, aggregation: mean, higher_is_better: true}\n"
    "- {metric: acc_norm, aggregation: mean, higher_is_better: true}\n"
)
ANSWERS = (
    'output_type: generate_until\ngeneration_kwargs: {until: ["\\n"], do_sample: false, max_gen_toks: 3}\n'
    "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\nfilter_list:\n"
    "- {name: strict-match, filter: [{function: regex, regex_pattern: '#### ([0-9]+)'}, {function: take_first}]}\n"
    "- {name: flexible-extract, filter: [{function: regex, regex_pattern: '([0-9]+)'}, {function: take_first}]}\n"
)


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """Options that replace what comes from the Hub: a text, and tasks of the names that tables have."""
    folder = tmp_path_factory.mktemp("offline")
    text, documents = folder / "text.txt", folder / "documents.jsonl"
    text.write_text(embedded.text("validation")[:6000], encoding="utf-8")
    rows = [{"question": f"thing {i}", "answer": ("one", "two")[i % 2]} for i in range(8)]
    documents.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for task in {task for table in published_tables() for task in table.tasks}:
        (folder / f"{task}.yaml").write_text(
            f"task: {task}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {documents}}}}}\n"
            "test_split: test\nfewshot_split: test\ndoc_to_text: question\ndoc_to_target: answer\n"
            + (ANSWERS if task == "gsm8k" else CHOICES)
        )
    return ("--dataset", f"wikitext2={text}", "--dataset", f"c4={text}", "--include-path", folder)


@pytest.mark.parametrize("name", ["was-notebook-llama-2-7b", "was-notebook-mistral-7b"])
def test_every_number_stands_beside_ours(was, schedule, offline, name):
    outcome = was("reproduce", name, "--model", "embedded", "--schedule", schedule, *offline, *SHORT, "--json")
    assert outcome.code == 0, outcome.stderr
    (level,) = published_table(name).levels
    rows = outcome.json["rows"]
    assert [(row["measure"], row["metric"], row["published"]) for row in rows] == [
        (value.measure, value.metric, value.value) for value in level.values
    ]
    for row in rows:
        assert row["difference"] == pytest.approx(row["ours"] - row["published"])
        assert row["schedule"] == str(schedule)
        assert row["nominal"] == pytest.approx(0.5)
        assert 0.3 < row["realised"] < 0.7
        if row["metric"] == "perplexity":
            assert row["ours"] > 10
        else:
            assert 0 <= row["ours"] <= 1
    assert not outcome.json["as_published"]


def test_perplexities_are_those_of_was_ppl_dense_beside_if_published(was, schedule, offline):
    three = ("--schedule", schedule) * 3
    outcome = was("reproduce", "was-paper-llama-2-7b", "--model", "embedded", *three, *offline[:2], *SHORT, "--json")
    assert outcome.code == 0, outcome.stderr
    rows = outcome.json["rows"]
    assert [row["level"] for row in rows] == [0, 0.4, 0.6, 0.75]
    assert [row["published"] for row in rows] == [5.47, 5.68, 6.56, 12.76]
    ppl = was("ppl", "embedded", "--schedule", schedule, *offline[:2], *SHORT, "--json").json["results"]
    assert [row["ours"] for row in rows[:2]] == [each["perplexity"] for each in ppl]
    assert rows[0]["schedule"] is None


def test_what_a_kill_left_is_measured_only(was, schedule, offline, tmp_path):
    log = tmp_path / "log.jsonl"
    arguments = ("reproduce", "was-notebook-llama-2-7b", "--model", "embedded", "--schedule", schedule, *offline)
    arguments += (*SHORT, "--only", "wikitext2,piqa", "--only", "arc_easy", "--log", log)
    whole = was(*arguments, "--json")
    assert whole.code == 0, whole.stderr
    lines = log.read_text().splitlines(keepends=True)
    assert [json.loads(line)["what"]["measure"] for line in lines] == ["wikitext2", "piqa", "arc_easy"]
    log.write_text(lines[0] + lines[1] + lines[2][:30])
    again = was(*arguments, "--json")
    assert again.json == whole.json
    assert log.read_text() == "".join(lines)
    assert "Evaluating arc_easy" in again.stderr
    assert "piqa" not in again.stderr
    shown = was(*arguments)
    assert "Loading" not in shown.stderr
    assert "are not numbers of the table" in " ".join(shown.stderr.split())
    assert max(map(len, shown.stdout.splitlines()[1:])) <= 80
    assert "arc_easy acc_norm" in " ".join(shown.stdout.split())


def test_the_list_says_what_each_table_needs(was):
    shown = was("reproduce", "--list")
    assert shown.code == 0, shown.stderr
    for table in published_tables():
        assert table.name in shown.stdout
        assert table.model in shown.stdout
    names = [each["name"] for each in was("reproduce", "--list", "--json").json["tables"]]
    assert names == [table.name for table in published_tables()]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "give the name of a table, or --list"),
        (["was-papr-llama-2-7b"], 1, "did you mean was-paper-llama-2-7b?"),
        (["was-paper-llama-2-7b", "--only", "wikitxt2"], 2, "did you mean wikitext2?"),
        (["was-paper-llama-2-7b", "--dataset", "wikitext=x"], 2, "expected wikitext2=PATH"),
        (["was-paper-llama-2-7b", "--dataset", "wikitext2=nowhere"], 1, "there is no such copy of the data set"),
        (["was-paper-llama-2-7b", "--schedule", "s"], 2, "1 given, but was-paper-llama-2-7b has 3 sparse"),
        (
            ["was-paper-llama-2-7b", "--model", "embedded"],
            1,
            "give a copy of meta-llama/Llama-2-7b-hf, or a --schedule",
        ),
        (["was-paper-llama-2-7b", "--model", "./nowhere"], 1, "there is no model directory"),
        (["was-paper-llama-2-7b", "--lowering", "recorded"], 2, "recorded steps can't count what they drop"),
    ],
)
def test_refusals(was, arguments, code, message):
    outcome = was("reproduce", *arguments)
    assert outcome.code == code, outcome
    assert message in " ".join(outcome.stderr.replace("│", " ").split())
    assert outcome.stdout == ""


def test_a_task_that_is_another_of_that_name_is_noticed(was, schedule, offline, tmp_path):
    text = (offline[-1] / "piqa.yaml").read_text().partition("- {metric: acc_norm")[0]
    (tmp_path / "piqa.yaml").write_text(text)
    arguments = ("was-notebook-llama-2-7b", "--model", "embedded", "--schedule", schedule, "--only", "piqa")
    outcome = was("reproduce", *arguments, "--include-path", tmp_path, *SHORT)
    assert outcome.code == 1
    assert "piqa gave no acc_norm,none" in " ".join(outcome.error.split())
