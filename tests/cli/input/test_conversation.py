"""A chat's turns, and what the model is given of them."""

import pytest

from was_fx import embedded
from was_fx.cli.input.conversation import Conversation
from was_fx.cli.input.models import Loaded

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}x"


@pytest.fixture
def loaded(embedded_model):
    _, tokenizer = embedded.load()
    return Loaded("the model", embedded_model, tokenizer)


def given(conversation, loaded):
    ids = conversation.tokens(loaded)["input_ids"][0]
    return loaded.tokenizer.decode(ids, skip_special_tokens=False)


def test_the_template_gets_every_turn_but_the_answer_that_is_asked_for(loaded):
    loaded.tokenizer.chat_template = TEMPLATE
    chat = Conversation("Be brief.")
    chat.ask("One?")
    first = "<system>Be brief.\n<user>One?\n<assistant>"
    assert given(chat, loaded) == first
    chat.answer("Yes.")
    assert given(chat, loaded) == first  # to answer it again
    chat.answer("No.")
    chat.ask("Two?")
    assert given(chat, loaded) == "<system>Be brief.\n<user>One?\n<assistant>No.\n<user>Two?\n<assistant>"
    chat.withdraw()
    assert [turn["content"] for turn in chat.turns] == ["One?", "No."]
    chat = chat.anew()
    chat.ask("Three?")
    assert given(chat, loaded) == "<system>Be brief.\n<user>Three?\n<assistant>"


def test_without_a_template_the_turns_are_one_text(loaded):
    chat = Conversation("A tale.")
    chat.ask("It was")
    chat.answer(" night.")
    chat.ask("Then")
    assert given(chat, loaded) == "A tale.\nIt was night.\nThen"


def test_what_the_model_cannot_take_is_an_error(loaded):
    chat = Conversation()
    with pytest.raises(ValueError, match="no tokens"):
        chat.tokens(loaded)
    chat.ask("word " * 1100)
    with pytest.raises(ValueError, match=r"takes 1024 with the answer; /new begins another"):
        chat.tokens(loaded)


def test_a_template_that_takes_no_system_message_says_so(loaded):
    loaded.tokenizer.chat_template = NO_SYSTEM
    chat = Conversation("Be brief.")
    chat.ask("One?")
    with pytest.raises(ValueError, match=r"refuses this: no system role; .*leave out --system"):
        chat.tokens(loaded)
