"""Texts tokenised in pieces: the same ids as at once, in bounded memory."""

import itertools

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from was_fx import embedded
from was_fx.cli.input.token_stream import in_a_file, token_ids

TEXT = embedded.text("test")[:20_000] + "Ünïcode 😀😀 — 漢字かな交じり文。\r\n\r\n\t  end" * 40


@pytest.fixture(scope="module")
def byte_level():
    """The embedded model's tokenizer: byte-level BPE, without special tokens."""
    return AutoTokenizer.from_pretrained(embedded.path())


@pytest.fixture(scope="module")
def like_llama_2():
    """BPE over the whole text with "▁" for spaces, bytes for what it doesn't know, and a token before the text."""
    inner = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trained = Tokenizer(models.BPE())
    trained.normalizer = inner.normalizer
    trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trained.train_from_iterator([TEXT[:20_000]], trainers.BpeTrainer(vocab_size=1200, special_tokens=special))
    inner.model = trained.model
    inner.model.byte_fallback, inner.model.unk_token, inner.model.fuse_unk = True, "<unk>", True
    inner.decoder = decoders.ByteFallback()
    inner.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", special.index("<s>"))])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", unk_token="<unk>")


def cut(text, size):
    return [text[start : start + size] for start in range(0, len(text), size)]


@pytest.mark.parametrize("kind", ["byte_level", "like_llama_2"])
@pytest.mark.parametrize(("piece", "overlap", "part"), [(1000, 200, 37), (777, 300, 5000), (4096, 512, 10**9)])
def test_pieces_give_the_ids_of_the_whole_text(kind, piece, overlap, part, request):
    tokenizer = request.getfixturevalue(kind)
    whole = tokenizer(TEXT)["input_ids"]
    pieces = list(token_ids(tokenizer, cut(TEXT, part), piece, overlap))
    assert len(pieces) > 4
    assert list(itertools.chain(*pieces)) == whole


def test_only_what_is_wanted_is_tokenised(byte_level):
    asked = []

    def parts():
        for part in cut(TEXT, 500):
            asked.append(part)
            yield part

    ids = in_a_file(token_ids(byte_level, parts(), 1000, 200), 400)
    assert ids.tolist() == byte_level(TEXT)["input_ids"][:400]
    assert len(asked) * 500 < len(TEXT) / 4


def test_a_tokenizer_in_plain_python_gets_the_text_as_a_whole(byte_level):
    class Slow:
        is_fast = False

        def __call__(self, text):
            return {"input_ids": [len(text)]}

    assert list(token_ids(Slow(), ["ab", "c"])) == [[3]]


def test_no_text_has_no_tokens(byte_level):
    assert in_a_file(token_ids(byte_level, []), None).tolist() == []


def test_memory_does_not_grow_with_the_text(byte_level):
    """Python's own memory at its highest, while 60 and 240 kilobytes are tokenised in pieces of 8."""
    import tracemalloc

    peaks = []
    for copies in (3, 12):
        parts = itertools.repeat(TEXT[:20_000], copies)
        tracemalloc.start()
        in_a_file(token_ids(byte_level, parts, 2**13, 2**9), None)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0]


def test_a_tokenizer_that_reads_every_cut_differently_is_refused():
    class Whole:
        is_fast = True

        def __call__(self, text, **settings):
            return {"input_ids": [0], "offset_mapping": [(0, len(text))]}

    with pytest.raises(ValueError, match="can't be read in pieces"):
        list(token_ids(Whole(), cut("a" * 1000, 100), 200, 50))
