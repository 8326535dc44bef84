"""The published tables."""

import pytest

from was_fx.measure.conventions import CONVENTIONS
from was_fx.schedules.released.published import load_published
from was_fx.schedules.released.tables import published_table, published_tables


@pytest.mark.parametrize("table", published_tables(), ids=lambda table: table.name)
def test_a_table_is_of_its_schedules(table):
    assert table.convention in CONVENTIONS
    assert table.source
    assert (table.fewshot is None) == (not table.tasks)
    assert [level.level for level in table.levels] == sorted({level.level for level in table.levels})
    for level in table.levels:
        assert level.values
        assert (level.schedule is None) == (level.level == 0)
        if level.schedule:
            source = load_published(level.schedule).metadata.source
            assert (source["model"], source["level"]) == (table.model, level.level)
        for value in level.values:
            assert value.value > 1 if value.metric == "perplexity" else 0 < value.value < 1
            assert value.error is None or 0 < value.error < 0.1


def test_sources_agree_where_both_have_a_number():
    def perplexities(name):
        return {
            level.level: value.value
            for level in published_table(name).levels
            for value in level.values
            if value.measure == "wikitext2"
        }

    for model in ("llama-2-7b", "mistral-7b"):
        paper, notebook = perplexities(f"was-paper-{model}"), perplexities(f"was-notebook-{model}")
        for level, value in notebook.items():
            assert round(value, 2) == paper[level]


def test_strict_and_flexible_answers_are_those_of_the_source():
    (level,) = published_table("was-notebook-mistral-7b").levels
    found = {value.metric: value.value for value in level.values if value.measure == "gsm8k"}
    assert found == {"exact_match,strict-match": 0.0402, "exact_match,flexible-extract": 0.0417}


def test_the_nearest_name_is_said():
    with pytest.raises(ValueError, match=r"did you mean was-paper-llama-2-7b\?"):
        published_table("was-papr-llama-2-7b")
