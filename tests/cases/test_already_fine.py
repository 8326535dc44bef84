"""What has always worked, and must go on working."""

import copy
import itertools

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import was_fx


def with_adapters(model, **how):
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, **how)
    return peft.get_peft_model(model, config).eval()


def test_a_batch_padded_on_the_left_with_dense_prompts(case):
    model, oracle = case.sparse(), case.oracle("dense")
    ids, mask = case.tokens[:3, :12].clone(), torch.ones(3, 12, dtype=torch.long)
    for row, pad in ((1, 4), (2, 9)):
        ids[row, :pad], mask[row, :pad] = 0, 0
    found = case.greedy(model, ids, attention_mask=mask)
    assert found.equal(case.greedy(oracle, ids, attention_mask=mask))
    assert not found.equal(case.greedy(case.dense(), ids, attention_mask=mask))
    for row, pad in ((0, 0), (1, 4), (2, 9)):
        assert found[row : row + 1].equal(case.greedy(model, ids[row : row + 1, pad:]))


# Adapters.


def test_adapters_that_come_after_the_first_generate_and_go_again(case, drop):
    model = case.sparse(prefill="all")
    before = case.greedy(model, case.prompt)
    assert before.equal(case.greedy(case.oracle(), case.prompt))
    adapted, expected = with_adapters(model), drop(with_adapters(case.dense()), case.schedule)
    dense = with_adapters(case.dense())
    found, wanted, full = (case.logits(each, case.prompt) for each in (adapted, expected, dense))
    case.assert_sparse(found, wanted, full)
    case.assert_apart(found, case.logits(case.oracle(), case.prompt))
    text = [
        each.generate(input_ids=case.prompt, attention_mask=torch.ones_like(case.prompt), max_new_tokens=8)
        for each in (adapted, expected)
    ]
    assert text[0].equal(text[1])
    with adapted.disable_adapter():
        case.assert_close(case.logits(adapted, case.prompt), case.logits(case.oracle(), case.prompt))
    unloaded = adapted.unload()
    assert case.greedy(unloaded, case.prompt).equal(before)


def test_adapters_that_are_merged_and_unloaded(case):
    merged = with_adapters(case.dense()).merge_and_unload()
    model = case.sparse(prefill="all")
    case.greedy(model, case.prompt)
    found = with_adapters(model).merge_and_unload()
    assert type(found) is type(merged)
    expected, dense = case.logits(case.oracle(model=merged), case.prompt), case.logits(merged, case.prompt)
    case.assert_sparse(case.logits(found, case.prompt), expected, dense)


def test_adapters_are_trained_while_the_model_is_sparse(case, drop):
    found = []
    for model in (
        with_adapters(case.sparse(prefill="all")),
        drop(with_adapters(case.dense()), case.schedule),
        with_adapters(case.dense()),
    ):
        trained = [each for each in model.parameters() if each.requires_grad]
        assert 0 < len(trained) < len(list(model.parameters()))
        optimizer = torch.optim.SGD(trained, lr=0.1)
        losses = []
        for _ in range(3):
            loss = model(input_ids=case.tokens[:2, :16], labels=case.tokens[:2, :16]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        found.append(losses)
    assert found[0] == pytest.approx(found[1], abs=2e-3)
    assert found[0][2] < found[0][0]
    assert abs(found[0][2] - found[2][2]) > 4e-3


# Embeddings.


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["case", "gpt2", "tied"])
@pytest.mark.parametrize("size", [96, 160])
def test_resized_embeddings(request, kind, size):
    case = request.getfixturevalue(kind)
    prompt = case.prompt.clamp(max=95)

    def resized(model):
        torch.manual_seed(0)
        model.resize_token_embeddings(size, mean_resizing=False)
        return model

    model, dense = resized(case.sparse(prefill="all")), resized(case.dense())
    found, expected, full = (case.logits(each, prompt) for each in (model, case.oracle(model=dense), dense))
    assert found.shape[-1] == size
    case.assert_sparse(found, expected, full)
    if case.dense().config.tie_word_embeddings:
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_a_tied_head_stays_tied(tied):
    model = tied.sparse()
    tied.greedy(model, tied.prompt)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    was_fx.densify(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("kind", ["case", "gpt2"])
def test_embeddings_in_place_of_ids(request, kind):
    case = request.getfixturevalue(kind)
    embeddings = case.dense().get_input_embeddings()(case.prompt).detach()
    found, expected, dense = (
        case.logits(model, inputs_embeds=embeddings)
        for model in (case.sparse(prefill="all"), case.oracle(), case.dense())
    )
    case.assert_sparse(found, expected, dense)
    text = [
        model.generate(inputs_embeds=embeddings, max_new_tokens=8, do_sample=False)
        for model in (case.sparse(), case.oracle("dense"), case.dense())
    ]
    assert text[0].equal(text[1])
    assert not text[0].equal(text[2])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_ids_of_either_integer_type(case, dtype):
    ids = case.prompt.to(dtype)
    found, expected, dense = (
        case.logits(model, ids) for model in (case.sparse(prefill="all"), case.oracle(), case.dense())
    )
    case.assert_sparse(found, expected, dense)
    assert case.greedy(case.sparse(), ids).equal(case.greedy(case.oracle("dense"), ids))


# Modes of torch.


def test_inference_mode_around_everything(case):
    with torch.inference_mode():
        model = case.sparse()
        text = case.greedy(model, case.prompt)
        steps = case.steps(model, case.prompt)
        dense = case.logits(was_fx.densify(copy.deepcopy(model)), case.prompt)
    assert text.equal(case.greedy(case.oracle("dense"), case.prompt))
    assert text.equal(case.greedy(model, case.prompt))
    case.assert_close(steps, case.steps(case.oracle("dense"), case.prompt))
    assert dense.equal(case.logits(case.dense(), case.prompt))
    case.assert_apart(steps[:, 8:], case.steps(case.dense(), case.prompt)[:, 8:])


def test_inference_mode_around_sparsify_alone(case):
    with torch.inference_mode():
        model = case.sparse(prefill="all")
    found, expected, dense = (case.logits(each, case.prompt) for each in (model, case.oracle(), case.dense()))
    case.assert_sparse(found, expected, dense)


def trained(model, tokens, steps=3):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(steps):
        loss = model(tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_training_after_densify(case):
    model, dense = case.sparse(), case.dense()
    case.greedy(model, case.prompt)
    was_fx.densify(model)
    assert trained(model, case.tokens) == trained(dense, case.tokens)
    assert all(one.equal(two) for one, two in zip(model.parameters(), dense.parameters(), strict=True))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(case, reentrant):
    found = []
    for model in (case.sparse(prefill="all"), case.oracle(), case.dense()):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        model.train()
        model(case.tokens[:2, :16], labels=case.tokens[:2, :16], use_cache=False).loss.backward()
        found.append(model.model.layers[0].mlp.up_proj.weight.grad)
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-3)
    case.assert_apart(found[0], found[2])


def test_half(case):
    model, oracle, dense = (
        case.sparse(prefill="all").half(),
        case.oracle(model=case.dense().half()),
        case.dense().half(),
    )
    found, expected, full = (case.logits(each, case.prompt) for each in (model, oracle, dense))
    assert found.dtype == torch.float16
    case.assert_nearer(found, expected, full)
    assert case.greedy(model, case.prompt).shape == (1, 8)


# A caller's cache.


def test_the_callers_cache_over_the_turns_of_a_conversation(case):
    texts = []
    for model in (case.sparse(), case.oracle("dense"), case.dense()):
        cache, conversation = case.cache(), case.prompt
        for turn in range(3):
            reply = case.greedy(model, conversation, max_new_tokens=5, **case.cached(cache))
            conversation = torch.cat([conversation, reply, case.tokens[2:3, 4 * turn : 4 * turn + 4]], dim=1)
        texts.append(conversation)
        assert int(cache.get_seq_length()) == conversation.shape[1] - 5
    assert texts[0].equal(texts[1])
    assert not texts[0].equal(texts[2])


# Around the model.


def test_data_parallel(case):
    model = nn.DataParallel(case.sparse(prefill="all"))
    found, expected, dense = (case.logits(each, case.prompt) for each in (model, case.oracle(), case.dense()))
    case.assert_sparse(found, expected, dense)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_prepared_by_accelerate(case):
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.Accelerator(cpu=True).prepare(case.sparse())
    text = case.greedy(model, case.prompt)
    assert text.equal(case.greedy(case.oracle("dense"), case.prompt))
    assert not text.equal(case.greedy(case.dense(), case.prompt))


def test_another_implementation_of_attention(case):
    model = case.sparse(prefill="all")
    expected, dense = case.logits(case.oracle(), case.prompt), case.logits(case.dense(), case.prompt)
    for implementation in ("eager", "sdpa", "eager"):
        model.set_attn_implementation(implementation)
        case.assert_sparse(case.logits(model, case.prompt), expected, dense)
        assert case.greedy(model, case.prompt).equal(case.greedy(case.oracle(), case.prompt))


# Files.


def test_twelve_shards(case, tmp_path):
    case.sparse(prefill="all").save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) >= 12
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    found, expected, dense = (case.logits(each, case.prompt) for each in (model, case.oracle(), case.dense()))
    case.assert_sparse(found, expected, dense)
    was_fx.densify(model)
    assert all(value.equal(case.dense().state_dict()[name]) for name, value in model.state_dict().items())


def test_a_search_that_is_killed_goes_on_where_it_was(case, tmp_path):
    recipe = {"tokens": case.tokens[:, :24], "target": 0.5, "recipe": "exact", "trials": 2, "batch_size": 4}
    whole = tmp_path / "whole.jsonl"
    expected = was_fx.search(case.dense(), case.calibration, log=whole, **recipe)
    trials = whole.read_text().splitlines()
    killed = tmp_path / "killed.jsonl"
    counter = itertools.count()

    def kill(*_):
        lines = killed.read_text().count("\n") if killed.is_file() else 0
        if lines >= max(1, len(trials) - 1) or next(counter) > 100_000:
            raise KeyboardInterrupt

    model = case.dense()
    with pytest.raises(KeyboardInterrupt):
        was_fx.search(model, case.calibration, log=killed, progress=kill, **recipe)
    assert case.logits(model, case.prompt).equal(case.logits(case.dense(), case.prompt))
    found = was_fx.search(model, case.calibration, log=killed, resume=True, **recipe)
    assert found.linears == expected.linears
    assert found.sparsity == pytest.approx(0.5, abs=1e-6)
    assert len(killed.read_text().splitlines()) == len(trials)
    case.assert_apart(case.logits(case.oracle(schedule=found), case.prompt), case.logits(case.dense(), case.prompt))
