"""The embedded model: it loads offline, predicts prose, and its texts and tokenizer are whole."""

import math
import os
import subprocess
import sys

import pytest
import torch

from was_fx import embedded

# 3.773 nats/token were measured on this model (perplexity 43.5, in bfloat16 and float32); 10 % above that.
PERPLEXITY_BOUND = 47.9


@pytest.fixture(scope="module")
def loaded():
    return embedded.load(torch.float32)


def test_weights_load_as_stored_and_in_eval_mode():
    model, tokenizer = embedded.load()
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert model.num_parameters() == 5_770_496
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert len(tokenizer) == model.config.vocab_size == 4096
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)


def test_dtype_is_passed_through(loaded):
    assert loaded[0].dtype == torch.float32


def test_unseen_prose_is_predicted(loaded):
    ids = embedded.tokens("test", length=512, limit=8)
    with torch.inference_mode():
        loss = loaded[0](ids, labels=ids).loss
    assert math.exp(loss.item()) < PERPLEXITY_BOUND


def test_greedy_generation_continues_a_prompt(loaded):
    model, tokenizer = loaded
    prompt = tokenizer("It was a dark night, and", return_tensors="pt")
    out = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert out.shape[1] == prompt["input_ids"].shape[1] + 8


@pytest.mark.parametrize(
    "string",
    [
        "Plain words, 1234 of them.",
        " À propos «naïve» ",
        "日本語 🙂\u200d",
        "tabs\t\r\n\n  and\n\n\nbreaks\n",
        "",
    ],
)
def test_tokenizer_round_trips(loaded, string):
    tokenizer = loaded[1]
    assert tokenizer.decode(tokenizer(string)["input_ids"]) == string


def test_encoding_adds_no_special_tokens(loaded):
    tokenizer = loaded[1]
    assert not set(tokenizer("A book.")["input_ids"]) & set(tokenizer.all_special_ids)


@pytest.mark.parametrize("split", embedded.SPLITS)
def test_text_is_about_200_kilobytes(split):
    assert 150_000 <= len(embedded.text(split).encode()) <= 250_000


def test_splits_share_no_long_paragraph():
    paragraphs = [{p for p in embedded.text(s).split("\n\n") if len(p) > 80} for s in embedded.SPLITS]
    assert all(paragraphs)
    assert not paragraphs[0] & paragraphs[1]
    assert not paragraphs[0] & paragraphs[2]
    assert not paragraphs[1] & paragraphs[2]


def test_windows_are_the_text_in_order(loaded):
    ids = embedded.tokens("validation", length=64, limit=3)
    assert ids.shape == (3, 64)
    assert ids.dtype == torch.int64
    assert embedded.text("validation").startswith(loaded[1].decode(ids.flatten()))


def test_all_windows_come_without_a_limit():
    ids = embedded.tokens("test", length=1024)
    assert ids.shape == (56, 1024)
    assert torch.equal(ids[:2], embedded.tokens("test", length=1024, limit=2))


def test_folder_stays_small():
    size = sum(file.stat().st_size for file in embedded.path().iterdir() if file.is_file())
    assert size < 13_000_000


@pytest.mark.parametrize("call", [embedded.text, embedded.tokens])
def test_unknown_split_is_refused(call):
    with pytest.raises(ValueError, match=r"'train'.*calibration, validation, test"):
        call("train")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"length": 1}, "length is 1, expected 2 to"),
        ({"length": 10**6}, "length is 1000000, expected 2 to"),
        ({"limit": 0}, "limit is 0, expected at least 1"),
    ],
)
def test_bad_window_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        embedded.tokens("test", **arguments)


def test_module_itself_imports_neither_torch_nor_transformers():
    code = (
        "import runpy, sys; runpy.run_path(sys.argv[1]);"
        " sys.exit(', '.join({'torch', 'transformers', 'tokenizers'} & set(sys.modules)))"
    )
    file = os.fspath(embedded.path() / "__init__.py")
    done = subprocess.run([sys.executable, "-c", code, file], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""
