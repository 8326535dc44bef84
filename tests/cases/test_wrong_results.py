"""What a sparsified model returns does not depend on what else is going on: earlier turns, neighbours in a batch,
timing, threads, hooks that come later."""

import inspect
import threading
import warnings

import pytest
import torch
from torch import nn
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

import was_fx

COMPILED = {"lowering": "eager"}
HOW = [{}, COMPILED]
CACHES = ["dynamic", "static"]
# With each cache as it is, and compiled with the one for which less is compiled.
WAYS = pytest.mark.parametrize(
    ("kind", "how"),
    [("dynamic", {}), ("static", {}), ("static", COMPILED)],
    ids=["dynamic cache", "static cache", "static cache, compiled"],
)


def fed(model):
    """A list that the number of tokens of each call of the model's body is appended to."""
    counts = []

    def count(_, arguments, keywords):
        ids = arguments[0] if arguments else keywords.get("input_ids")
        counts.append((keywords["inputs_embeds"] if ids is None else ids).shape[1])

    model.base_model.register_forward_pre_hook(count, with_kwargs=True)
    return counts


def chat(case, model, kind, turns=2):
    """Replies of a conversation with one cache of the caller's, and the cache."""
    cache, conversation, replies = case.cache(kind, 128), case.prompt, []
    for turn in range(turns):
        reply = case.greedy(model, conversation, max_new_tokens=6, **case.cached(cache))
        question = case.tokens[1:2, 5 * turn : 5 * turn + 5]
        conversation = torch.cat([conversation, reply, question], dim=1)
        replies.append(reply)
    return torch.cat(replies, dim=1), cache


# Conversations.


@WAYS
def test_a_conversation_with_the_callers_cache(block, kind, how):
    model, oracle = block.sparse(**how), block.oracle("dense")
    ours, theirs = fed(model), fed(oracle)
    found, cache = chat(block, model, kind)
    expected, their_cache = chat(block, oracle, kind)
    assert ours == theirs
    assert ours == [12, 1, 1, 1, 1, 1, 6, 1, 1, 1, 1, 1]
    assert int(cache.get_seq_length()) == int(their_cache.get_seq_length())
    assert found.equal(expected)
    assert not found.equal(chat(block, block.dense(), kind)[0])


@pytest.mark.parametrize("kind", CACHES)
def test_a_conversation_equals_one_from_scratch_where_prompts_are_as_sparse_as_steps(case, kind):
    model = case.sparse(prefill="all")
    cache = case.cache(kind, 128)
    first = case.greedy(model, case.prompt, **case.cached(cache))
    conversation = torch.cat([case.prompt, first, case.tokens[1:2, :5]], dim=1)
    counts = fed(model)
    second = case.greedy(model, conversation, **case.cached(cache))
    assert counts == [6] + [1] * 7
    assert second.equal(case.greedy(case.sparse(prefill="all"), conversation))
    assert second.equal(case.greedy(case.oracle(), conversation))
    assert not second.equal(case.greedy(case.dense(), conversation))


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("new", [1, 2, 9])
def test_the_callers_cache_holds_every_token_but_the_last(case, kind, new):
    model, cache = case.sparse(), case.cache(kind)
    found = case.greedy(model, case.prompt, max_new_tokens=new, **case.cached(cache))
    assert found.shape[1] == new
    assert int(cache.get_seq_length()) == case.prompt.shape[1] + new - 1


@pytest.mark.parametrize("kind", CACHES)
def test_the_cache_of_a_text_that_ends_early(case, kind):
    model, oracle = case.sparse(), case.oracle("dense")
    text = case.greedy(oracle, case.prompt, max_new_tokens=12)[0].tolist()
    end = next(i for i in range(2, 12) if text[i] not in text[:i])
    ids, lengths = [], []
    for each in (model, oracle):
        cache = case.cache(kind)
        ids.append(case.greedy(each, case.prompt, max_new_tokens=12, eos_token_id=text[end], **case.cached(cache)))
        lengths.append(int(cache.get_seq_length()))
    assert ids[0].equal(ids[1])
    assert ids[0].shape[1] == end + 1
    assert lengths[0] == lengths[1]


def test_the_content_of_the_callers_cache_is_the_oracles(case):
    caches = [case.cache(), case.cache()]
    for model, cache in zip((case.sparse(), case.oracle("dense")), caches, strict=True):
        case.greedy(model, case.prompt, **case.cached(cache))
    dense = case.cache()
    case.greedy(case.dense(), case.prompt, **case.cached(dense))
    for ours, theirs in zip(caches[0].layers, caches[1].layers, strict=True):
        case.assert_close(ours.keys, theirs.keys)
        case.assert_close(ours.values, theirs.values)
    assert not torch.allclose(caches[0].layers[1].values, dense.layers[1].values, atol=1e-3)


# Sampling, and what is called in each step.


@WAYS
def test_seeded_sampling_is_repeatable_and_leaves_the_generators_state_as_transformers_does(block, kind, how):
    model = block.sparse(**how)
    drawn, states = [], []
    for each in (model, model, block.oracle("dense"), block.dense()):
        torch.manual_seed(7)
        arguments = {"do_sample": True, "top_k": 20, "max_new_tokens": 10, "cache_implementation": kind}
        drawn.append(block.greedy(each, block.prompt, **arguments))
        states.append(torch.get_rng_state())
    assert drawn[0].equal(drawn[1])
    assert drawn[0].equal(drawn[2])
    assert not drawn[0].equal(drawn[3])
    assert states[0].equal(states[1])
    assert states[0].equal(states[2])


class Asked(StoppingCriteria):
    """Notes the length of the text each time it is asked, and ends it at one."""

    def __init__(self, end: int) -> None:
        self.lengths, self.end = [], end

    def __call__(self, ids, scores, **_):
        self.lengths.append(ids.shape[1])
        return torch.full((ids.shape[0],), ids.shape[1] >= self.end)


class Seen(LogitsProcessor):
    """Notes the text each time it is called, and fails at a length."""

    def __init__(self, fail: int | None = None) -> None:
        self.texts, self.fail = [], fail

    def __call__(self, ids, scores):
        self.texts.append(ids.tolist())
        if ids.shape[1] == self.fail:
            raise RuntimeError("the grammar allows nothing here")
        return scores


class Streamed(BaseStreamer):
    """Notes what it is given."""

    def __init__(self) -> None:
        self.parts, self.ends = [], 0

    def put(self, value):
        self.parts.append(value.flatten().tolist())

    def end(self):
        self.ends += 1


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("end", [13, 16, 99])
def test_processors_criteria_and_streamers_are_called_as_often_as_by_transformers(case, kind, end):
    calls, texts = [], []
    for model in (case.sparse(), case.oracle("dense")):
        seen, asked, streamed = Seen(), Asked(end), Streamed()
        texts.append(
            case.greedy(
                model,
                case.prompt,
                logits_processor=LogitsProcessorList([seen]),
                stopping_criteria=StoppingCriteriaList([asked]),
                streamer=streamed,
                cache_implementation=kind,
            )
        )
        calls.append((seen.texts, asked.lengths, streamed.parts, streamed.ends))
    assert texts[0].equal(texts[1])
    assert calls[0] == calls[1]
    assert len(calls[0][0]) == min(end, 20) - 12


@WAYS
def test_a_processor_that_raises_leaves_the_model_usable(block, kind, how):
    model = block.sparse(**how)
    for length in (12, 15):
        with pytest.raises(RuntimeError, match="the grammar allows nothing here"):
            block.greedy(model, block.prompt, logits_processor=[Seen(length)], cache_implementation=kind)
    with pytest.raises(RuntimeError, match="the grammar allows nothing here"):
        block.greedy(model, block.prompt, logits_processor=[Seen(14)])
    expected = block.greedy(block.oracle("dense"), block.prompt)
    assert block.greedy(model, block.prompt, cache_implementation=kind).equal(expected)
    assert block.greedy(model, block.prompt).equal(expected)
    block.assert_close(block.logits(model, block.prompt), block.logits(block.dense(), block.prompt))


def test_a_call_that_fails_halfway_does_not_change_the_next_one(case):
    """What a call decided about its tokens ends with it."""
    model = case.sparse(prefill="half")
    handle = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        case.logits(model, case.tokens[:3, :20])
    handle.remove()
    expected = case.logits(case.oracle("half"), case.prompt)
    case.assert_sparse(case.logits(model, case.prompt), expected, case.logits(case.dense(), case.prompt))


def test_calls_of_other_lengths_in_between_change_nothing(case):
    """Decode steps of one conversation between the calls of another."""
    model, oracle, dense = case.sparse(prefill="half"), case.oracle("half"), case.dense()
    found = []
    for each in (model, oracle, dense):
        first, second = case.cache(), case.cache()
        parts = [
            case.logits(each, case.tokens[:1, :9], use_cache=True, **case.cached(first)),
            case.logits(each, case.tokens[1:3, :14], use_cache=True, **case.cached(second)),
            case.logits(each, case.tokens[:1, 9:10], use_cache=True, **case.cached(first)),
            case.logits(each, case.tokens[3:, :11]),
            case.logits(each, case.tokens[1:3, 14:15], use_cache=True, **case.cached(second)),
        ]
        found.append(parts)
    for ours, theirs, full in zip(*found, strict=True):
        case.assert_sparse(ours, theirs, full)


# Neighbours in a batch.

LENGTHS = (16, 9, 5, 2)


def padded(case, side, dtype=torch.long):
    """Four sequences of unequal length in one batch: ids, mask, positions, and where each one's own tokens are."""
    width = max(LENGTHS)
    ids, mask = torch.zeros(4, width, dtype=torch.long), torch.zeros(4, width, dtype=torch.long)
    own = [slice(width - n, width) if side == "left" else slice(0, n) for n in LENGTHS]
    for row, (place, n) in enumerate(zip(own, LENGTHS, strict=True)):
        ids[row, place], mask[row, place] = case.tokens[row, :n], 1
    return {
        "input_ids": ids,
        "attention_mask": mask.to(dtype),
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
    }, own


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("prefill", ["sparse", "half", "all"])
@pytest.mark.parametrize("kind", ["case", "gpt2"])
def test_logits_do_not_depend_on_padding_or_neighbours(request, kind, prefill, side):
    case = request.getfixturevalue(kind)
    model, oracle, dense = case.sparse(prefill=prefill), case.oracle(prefill), case.dense()
    batch, own = padded(case, side)
    together = case.logits(model, **batch)
    for row, (place, n) in enumerate(zip(own, LENGTHS, strict=True)):
        alone = case.tokens[row : row + 1, :n]
        expected = case.logits(oracle, alone)[0]
        case.assert_close(together[row, place], expected)
        case.assert_close(case.logits(model, alone)[0], expected)
        if n > 2:
            case.assert_apart(expected, case.logits(dense, alone)[0])


@pytest.mark.parametrize(
    "how", [{"lowering": "eager"}, {"backend": "eager"}, {"backend": "was", "options": {"lowering": "eager"}}], ids=str
)
def test_logits_of_a_compiled_call_do_not_depend_on_padding(block, how):
    own_call = "lowering" in how
    model = block.sparse(prefill="half", **(how if own_call else {}))
    call = model if own_call else torch.compile(lambda **keywords: model(**keywords).logits, **how)
    for side in ("left", "right"):
        batch, own = padded(block, side)
        together = block.logits(call, **batch)
        for row, (place, n) in enumerate(zip(own, LENGTHS, strict=True)):
            expected = block.logits(block.oracle("half"), block.tokens[row : row + 1, :n])[0]
            block.assert_close(together[row, place], expected)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32], ids=str)
def test_masks_of_other_dtypes(case, dtype):
    model = case.sparse(prefill="half")
    batch, _ = padded(case, "left")
    other, _ = padded(case, "left", dtype)
    expected = case.logits(case.oracle("half"), **batch)
    places = batch["attention_mask"].bool()
    case.assert_close(case.logits(model, **other)[places], expected[places])


def test_the_batch_as_embeddings(case):
    model = case.sparse(prefill="half")
    batch, own = padded(case, "left")
    embeddings = case.dense().get_input_embeddings()(batch.pop("input_ids")).detach()
    together = case.logits(model, inputs_embeds=embeddings, **batch)
    for row, (place, n) in enumerate(zip(own, LENGTHS, strict=True)):
        case.assert_close(together[row, place], case.logits(case.oracle("half"), case.tokens[row : row + 1, :n])[0])


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("prefill", ["dense", "sparse", "half", "all"])
def test_texts_do_not_depend_on_padding_or_neighbours(case, prefill, kind):
    model, oracle = case.sparse(prefill=prefill), case.oracle(prefill)
    batch, _ = padded(case, "left")
    ids, mask = batch["input_ids"][:3], batch["attention_mask"][:3]
    arguments = {"output_logits": True, "return_dict_in_generate": True}
    found = case.greedy(model, ids, attention_mask=mask, cache_implementation=kind, **arguments)
    logits = torch.stack(found.logits, 1)
    for row, n in enumerate(LENGTHS[:3]):
        alone = case.greedy(oracle, case.tokens[row : row + 1, :n], **arguments)
        assert found.sequences[row, ids.shape[1] :].equal(alone.sequences[0, n:])
        case.assert_close(logits[row], torch.stack(alone.logits, 1)[0])
    dense = torch.stack(case.greedy(case.dense(), ids, attention_mask=mask, **arguments).logits, 1)
    case.assert_apart(logits, dense)


def test_losses_do_not_depend_on_the_batch_size(case):
    model = case.sparse()
    found = [was_fx.evaluate(model, case.tokens, prefill="sparse", batch_size=size) for size in (1, 4)]
    logits = case.logits(case.oracle("sparse"), case.tokens)[:, :-1]
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), case.tokens[:, 1:].flatten()).item()
    for each in found:
        assert each.loss == pytest.approx(expected, abs=1e-4)
    assert found[0].linears == pytest.approx(found[1].linears, abs=1e-3)
    assert abs(was_fx.evaluate(case.dense(), case.tokens).loss - expected) > 0.001


def test_sequences_packed_into_one_row(case):
    """As a data collator without padding makes them: positions begin anew, and transformers lets nothing through."""
    model, oracle, dense = case.sparse(prefill="half"), case.oracle("half"), case.dense()
    rows = [case.tokens[row : row + 1, :n] for row, n in enumerate(LENGTHS)]
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    arguments = {"input_ids": torch.cat(rows, 1), "position_ids": positions, "use_cache": False}
    alone, without = (torch.cat([case.logits(each, row) for row in rows], 1) for each in (oracle, dense))
    case.assert_sparse(case.logits(model, **arguments), alone, without)


@pytest.mark.parametrize("kept", [3, torch.tensor([0, 3, 11])], ids=["the last", "by index"])
def test_a_sparse_head_that_reads_some_tokens(tied, kept):
    model, oracle = tied.sparse(prefill="half"), tied.oracle("half")
    found = tied.logits(model, tied.prompt, logits_to_keep=kept)
    expected = tied.logits(oracle, tied.prompt)
    tied.assert_close(found, expected[:, kept] if isinstance(kept, torch.Tensor) else expected[:, -kept:])


# A call within another.


@pytest.mark.parametrize("what", ["model", "body"])
@pytest.mark.parametrize(("prefill", "length"), [("dense", 1), ("half", 12)])
def test_a_hook_that_calls_a_sparse_model(case, prefill, length, what):
    model, oracle, inner = case.sparse(prefill=prefill), case.oracle(prefill), case.sparse(prefill="all")
    called = inner if what == "model" else inner.model
    expected, seen = case.oracle()(case.tokens[1:, :5], output_hidden_states=True).hidden_states[-1], []

    def call(*_):
        seen.append(called(case.tokens[1:, :5], output_hidden_states=True).hidden_states[-1])

    model.model.layers[0].register_forward_hook(call)
    ids, mask = case.tokens[:2, :length], torch.ones(2, length, dtype=torch.long)
    mask[0, : length // 3] = 0
    places = mask.bool()
    found = case.logits(model, ids, attention_mask=mask)[places]
    case.assert_close(found, case.logits(oracle, ids, attention_mask=mask)[places])
    case.assert_close(seen[0], expected)


# Gradient checkpointing, which computes blocks again in the backward pass.


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("prefill", ["dense", "sparse", "half", "all"])
def test_gradients_with_checkpoints_are_those_without(case, prefill, reentrant):
    batch, _ = padded(case, "left")
    places = batch["attention_mask"].bool()

    def gradients(model):
        model.train()
        model.enable_input_require_grads()
        model(**batch, use_cache=False).logits[places].square().mean().backward()
        return {name: each.grad for name, each in model.named_parameters()}

    model = case.sparse(prefill=prefill)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found, expected = gradients(model), gradients(case.oracle(prefill))
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], atol=1e-4, rtol=1e-3)


def test_a_checkpointed_prompt_of_one_token_is_dense_again(case):
    model, dense = case.sparse(), case.dense()
    for each in (model, dense):
        each.train().gradient_checkpointing_enable()
        each(case.tokens[:2, :1], use_cache=False).logits.square().mean().backward()
    name = "model.layers.0.mlp.down_proj"
    torch.testing.assert_close(model.get_submodule(name).weight.grad, dense.get_submodule(name).weight.grad)


# Hooks that come after the first call.


def double(_, __, output):
    return output * 2


def steer(_, __, output):
    hidden = output[0] if isinstance(output, tuple) else output
    hidden = hidden + 0.5
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


HOOKS = {
    "a scheduled Linear": ("model.layers.0.mlp.up_proj", double),
    "a block": ("model.layers.0", steer),
    "the last norm": ("model.norm", double),
    "the head": ("lm_head", double),
}


@pytest.mark.parametrize(
    ("where", "how"),
    [*((each, {}) for each in HOOKS), ("a scheduled Linear", COMPILED), ("a block", COMPILED)],
    ids=str,
)
def test_hooks_that_are_registered_after_the_first_call_are_honoured(block, where, how):
    name, hook = HOOKS[where]
    model, oracle, dense = block.sparse(prefill="all", **how), block.oracle(), block.dense()
    before = block.logits(model, block.prompt)
    text = block.greedy(model, block.prompt, max_new_tokens=3)
    handles = [each.get_submodule(name).register_forward_hook(hook) for each in (model, oracle, dense)]
    found, expected, full = (block.logits(each, block.prompt) for each in (model, oracle, dense))
    block.assert_sparse(found, expected, full)
    block.assert_apart(found, before)
    steered = block.greedy(model, block.prompt, max_new_tokens=3)
    assert steered.equal(block.greedy(oracle, block.prompt, max_new_tokens=3))
    handles[0].remove()
    block.assert_close(block.logits(model, block.prompt), before)
    assert block.greedy(model, block.prompt, max_new_tokens=3).equal(text)


@pytest.mark.parametrize("how", HOW, ids=["plain", "compiled"])
def test_a_probe_sees_every_step(block, how):
    model, oracle = block.sparse(**how), block.oracle("dense")
    seen = {}
    block.greedy(model, block.prompt, max_new_tokens=4)
    for which, each in (("ours", model), ("theirs", oracle)):
        seen[which] = []
        module = each.model.layers[0].mlp.down_proj
        module.register_forward_hook(lambda _, __, output, which=which: seen[which].append(output.detach().clone()))
        block.greedy(each, block.prompt, max_new_tokens=4)
    assert len(seen["ours"]) == len(seen["theirs"]) == 4
    for ours, theirs in zip(seen["ours"], seen["theirs"], strict=True):
        block.assert_close(ours, theirs)


def test_a_pre_hook_on_a_scheduled_linear_changes_what_is_dropped(block):
    model, dense = block.sparse(prefill="all"), block.dense()
    block.logits(model, block.prompt)
    for each in (model, dense):
        each.model.layers[0].mlp.up_proj.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 0.5,))
    expected = block.oracle(model=dense)  # its own hooks come after
    found = block.logits(model, block.prompt)
    block.assert_sparse(found, block.logits(expected, block.prompt), block.logits(dense, block.prompt))


# Continuous batching.


def continuous_batching():
    """A small pool of pages; the name of its argument depends on transformers' version."""
    from transformers import ContinuousBatchingConfig

    known = inspect.signature(ContinuousBatchingConfig).parameters
    size = {"page_size" if "page_size" in known else "block_size": 32}
    return ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64, **size)


def generate_batch(case, model, ids):
    found = model.generate_batch(
        ids.tolist(),
        max_new_tokens=6,
        warmup=False,
        progress_bar=False,
        continuous_batching_config=continuous_batching(),
    )
    assert len(found) == len(ids)
    assert all(each.error is None for each in found.values()), [each.error for each in found.values()]
    by_prompt = {tuple(each.prompt_ids): each.generated_tokens for each in found.values()}
    return torch.tensor([by_prompt[tuple(row)] for row in ids.tolist()])


@pytest.mark.parametrize("prefill", ["dense", "all"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_continuous_batching_works_or_says_that_it_does_not(case, prefill):
    ids = case.tokens[:2, :12]
    expected = case.greedy(case.oracle(prefill), ids, max_new_tokens=6)
    assert not expected.equal(case.greedy(case.dense(), ids, max_new_tokens=6))
    with case.works_or_says("continuous batching", "generate_batch", "paged"):
        assert generate_batch(case, case.sparse(prefill=prefill), ids).equal(expected)


@pytest.mark.parametrize("prefill", ["dense", "all"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_paged_cache_works_or_says_that_it_does_not(case, prefill):
    ids = case.tokens[:2, :12]
    expected = case.greedy(case.oracle(prefill), ids, max_new_tokens=6)
    model = case.sparse(prefill=prefill)
    with case.works_or_says("continuous batching", "generate_batch", "paged"):
        found = model.generate(
            ids,
            max_new_tokens=6,
            do_sample=False,
            cache_implementation="paged",
            continuous_batching_config=continuous_batching(),
        )
        assert found.reshape(2, -1)[:, -6:].equal(expected)


# Threads.


@pytest.mark.parametrize(("threads", "how"), [(2, {}), (4, {}), (2, COMPILED), (4, COMPILED)], ids=str)
def test_threads_that_start_together_on_a_cold_model(block, how, threads):
    if how and torch.__version__ < "2.12":
        pytest.skip("torch 2.11 itself crashes where threads call what is compiled, a plain Linear too")
    model, oracle, dense = block.sparse(**how), block.oracle("dense"), block.dense()
    prompts = [block.tokens[i : i + 1, : 8 + i] for i in range(threads)]
    expected = [block.greedy(oracle, each, max_new_tokens=4) for each in prompts]
    assert any(
        not text.equal(block.greedy(dense, ids, max_new_tokens=4)) for text, ids in zip(expected, prompts, strict=True)
    )
    barrier, found, errors = threading.Barrier(threads), [None] * threads, []

    def run(i):
        try:
            barrier.wait()
            found[i] = [block.greedy(model, prompts[i], max_new_tokens=4) for _ in range(2)]
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=run, args=(i,)) for i in range(threads)]
    with warnings.catch_warnings():
        for each in workers:
            each.start()
        for each in workers:
            each.join(timeout=120)
    assert not errors, errors
    for texts, wanted in zip(found, expected, strict=True):
        assert all(text.equal(wanted) for text in texts)


def test_threads_whose_calls_are_a_prompt_and_a_step_at_once(block):
    """What one thread's call decided about its tokens is not the other's."""
    model, oracle = block.sparse(), block.oracle("dense")
    prompt, dense = block.tokens[:1, :40], block.logits(block.dense(), block.tokens[:1, :40])
    steps = block.steps(oracle, block.prompt)
    wrong, stop = [], threading.Event()

    def prompts():
        while not stop.is_set():
            if not torch.allclose(block.logits(model, prompt), dense, atol=2e-4):
                wrong.append("a prompt was sparse")

    thread = threading.Thread(target=prompts)
    thread.start()
    try:
        for _ in range(20):
            if not torch.allclose(block.steps(model, block.prompt), steps, atol=2e-4):
                wrong.append("a step was not what the oracle says")
    finally:
        stop.set()
        thread.join()
    assert not wrong, wrong[:3]
    block.assert_apart(steps[:, 8:], block.steps(block.dense(), block.prompt)[:, 8:])
