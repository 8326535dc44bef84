"""The model card's section and its table."""

import pytest
from huggingface_hub import ModelCard

from was_fx.schedules.files.schedule import LinearSchedule, Schedule
from was_fx.sparse.model_card import schedule_section, schedule_table, update_card


def schedule_of(sparsities: dict[str, float], exponents: tuple[float, ...] = (1.0,)) -> Schedule:
    linears = {
        name: LinearSchedule(share, 0.1, exponents[i % len(exponents)])
        for i, (name, share) in enumerate(sparsities.items())
    }
    return Schedule(linears, dict.fromkeys(sparsities, (8, 8)))


@pytest.mark.parametrize(
    ("sparsities", "rows"),
    [
        (
            {"m.0.q": 0.5, "m.0.up": 0.25, "m.1.q": 0.5, "m.1.up": 0.25},
            ["| block | q | up |", "| --- | ---: | ---: |", "| 0–1 | 50.0 | 25.0 |"],
        ),
        (
            {"m.0.q": 0.5, "m.1.q": 0.6, "m.2.up": 0.6},
            [
                "| block | q | up |",
                "| --- | ---: | ---: |",
                "| 0 | 50.0 | – |",
                "| 1 | 60.0 | – |",
                "| 2 | – | 60.0 |",
            ],
        ),
        (
            {"a.0.q": 0.5, "b.1.q": 0.5},
            ["| block | q |", "| --- | ---: |", "| a.0 | 50.0 |", "| b.1 | 50.0 |"],
        ),
        (
            {"m.0.q": 0.5, "head": 0.125},
            [
                "| block | q |",
                "| --- | ---: |",
                "| 0 | 50.0 |",
                "",
                "| Linear | sparsity |",
                "| --- | ---: |",
                "| head | 12.5 |",
            ],
        ),
    ],
    ids=["equal blocks", "unlike blocks", "two stacks", "outside the blocks"],
)
def test_table(sparsities, rows):
    assert schedule_table(schedule_of(sparsities)).split("\n") == rows


def test_section_names_the_score_and_the_sparsity():
    section = schedule_section(schedule_of({"m.0.q": 0.5, "m.1.q": 0.75}, (0.5, 1.0)), "me/model")
    assert "2 Linears at a model sparsity of\n62.5 %" in section
    assert "α from 0.5 to 1" in section
    assert "score |x|·‖W‖₁^1, " in schedule_section(schedule_of({"m.0.q": 0.5}))


def test_a_card_is_made_where_there_is_none(tmp_path):
    update_card(tmp_path / "README.md", schedule_of({"m.0.q": 0.5}))
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.tags == ["was-fx", "activation-sparsity"]
    assert "## Sparse decoding" in card.text


def test_a_section_from_before_is_replaced_where_it_stands(tmp_path):
    path = tmp_path / "README.md"
    update_card(path, schedule_of({"m.0.q": 0.5}))
    path.write_text(path.read_text() + "\nMy own words.\n")
    update_card(path, schedule_of({"m.0.q": 0.75}))
    text = path.read_text()
    assert "| 0 | 75.0 |" in text
    assert "| 0 | 50.0 |" not in text
    assert text.index("| 0 | 75.0 |") < text.index("My own words.")
