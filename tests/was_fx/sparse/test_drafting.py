"""A sparse draft that shares its weights with the dense model that verifies."""

import copy

import pytest
import torch

import was_fx
from was_fx.sparse.drafting import acceptance
from was_fx.sparse.sparsify import sparse_state


def test_the_text_is_the_dense_one(llama, calibration, tokens):
    new = 13
    dense = copy.deepcopy(llama)
    sparse = was_fx.draft(llama, was_fx.uniform(calibration, 0.6), tokens=4)
    found = acceptance(llama, sparse, tokens[:3, :12], max_new_tokens=new)
    assert found.equal
    assert found.tokens == 3 * (new - 1)
    assert 1 <= found.tokens_per_step <= 5
    arguments = {"max_new_tokens": new, "do_sample": False, "attention_mask": torch.ones(1, 12, dtype=torch.long)}
    assisted = llama.generate(tokens[:1, :12], assistant_model=sparse, **arguments)
    assert assisted.equal(dense.generate(tokens[:1, :12], **arguments))


def test_a_draft_that_drops_nothing_is_accepted_whole(llama, calibration, tokens):
    sparse = was_fx.draft(llama, was_fx.uniform(calibration, 0.0), tokens=4)
    found = acceptance(llama, sparse, tokens[:2, :12], max_new_tokens=16)
    assert found.equal
    assert found.tokens_per_step == 5
    assert found.accepted_per_step == 4
    assert found.accepted_share == 1


def test_weights_are_shared_and_the_model_stays_dense(llama, calibration, tokens):
    before = copy.deepcopy(llama)
    sparse = was_fx.draft(llama, was_fx.uniform(calibration, 0.5))
    assert type(sparse) is type(llama)
    assert all(one is two for one, two in zip(llama.parameters(), sparse.parameters(), strict=True))
    assert sparse_state(llama) is None
    assert sparse_state(sparse) is not None
    assert sparse.generation_config.num_assistant_tokens == 5
    assert llama.generation_config.num_assistant_tokens == before.generation_config.num_assistant_tokens
    with torch.no_grad():
        torch.testing.assert_close(llama(tokens).logits, before(tokens).logits)


def test_densify_puts_everything_back(llama, calibration):
    before = copy.deepcopy(llama)
    was_fx.densify(was_fx.draft(llama, was_fx.uniform(calibration, 0.5)))
    for now, then in zip(llama.parameters(), before.parameters(), strict=True):
        assert now.equal(then)
        assert now.stride() == then.stride()
        assert now.requires_grad == then.requires_grad


def test_the_model_behind_a_draft_saves_a_dense_checkpoint(llama, calibration, tmp_path):
    llama.save_pretrained(tmp_path / "before")
    _draft = was_fx.draft(llama, was_fx.uniform(calibration, 0.5))
    llama.save_pretrained(tmp_path / "after")
    for path in (tmp_path / "before").iterdir():
        assert path.read_bytes() == (tmp_path / "after" / path.name).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"tokens": 0}, "tokens is 0"), ({"confidence": 1.0}, r"confidence 1\.0"), ({"confidence": -0.1}, "confidence")],
)
def test_bad_arguments_are_refused(llama, calibration, arguments, message):
    with pytest.raises(ValueError, match=message):
        was_fx.draft(llama, was_fx.uniform(calibration, 0.5), **arguments)


def test_a_sparsified_model_is_refused_as_the_one_that_verifies(llama, calibration):
    schedule = was_fx.uniform(calibration, 0.5)
    was_fx.sparsify(llama, schedule)
    with pytest.raises(ValueError, match="the model is sparsified"):
        was_fx.draft(llama, schedule)


def test_a_second_draft_has_numbers_of_its_own(llama, calibration, oracle, tokens):
    schedules = [was_fx.uniform(calibration, target) for target in (0.6, 0.2)]
    before = copy.deepcopy(llama)
    drafts = [was_fx.draft(llama, schedule) for schedule in schedules]
    with torch.no_grad():
        for sparse, schedule in zip(drafts, schedules, strict=True):
            cached = sparse(tokens[:1, :12], use_cache=True).past_key_values
            wanted = before(tokens[:1, :12], use_cache=True).past_key_values
            step = tokens[:1, 12:13]
            expected = oracle(before, schedule)(step, past_key_values=wanted).logits
            torch.testing.assert_close(sparse(step, past_key_values=cached).logits, expected, atol=2e-4, rtol=1e-4)
        was_fx.densify(drafts[0])
        torch.testing.assert_close(llama(tokens).logits, before(tokens).logits)
    assert sparse_state(drafts[1]) is not None


def test_rows_of_a_quantised_model_are_shared(llama, calibration, tokens):
    was_fx.quantize(llama, {"*proj": "int4", "*": "int8"})
    alone = copy.deepcopy(llama)
    sparse = was_fx.draft(llama, was_fx.uniform(was_fx.calibrate(llama, tokens), 0.5))
    buffers = dict(sparse.named_buffers())
    shared = [name for name, each in llama.named_buffers() if buffers[name] is each and "codes" in name]
    assert len(shared) == len([name for name in buffers if "codes" in name]) > 10
    found = acceptance(llama, sparse, tokens[:2, :12], max_new_tokens=13)
    assert found.equal
    assert found.steps > 0
    arguments = {"max_new_tokens": 13, "do_sample": False}
    assert llama.generate(tokens[:1, :12], **arguments).equal(alone.generate(tokens[:1, :12], **arguments))


@pytest.mark.filterwarnings("ignore:the schedule was made with weights not quantised")
def test_a_draft_with_weights_of_its_own_leaves_the_models_alone(llama, calibration, tokens):
    before = copy.deepcopy(llama)
    sparse = was_fx.draft(llama, was_fx.uniform(calibration, 0.5), weights={"*proj": "int8", "*": "none"})
    assert not [name for name, _ in llama.named_buffers() if "codes" in name]
    assert all(one.equal(two) for one, two in zip(llama.parameters(), before.parameters(), strict=True))
    assert sparse.model.norm.weight is llama.model.norm.weight
    assert llama.config.to_dict() == before.config.to_dict()
    assert acceptance(llama, sparse, tokens[:2, :12], max_new_tokens=13).equal


def test_a_draft_of_another_model_is_not_counted(llama, calibration, tokens):
    sparse = was_fx.draft(copy.deepcopy(llama), was_fx.uniform(calibration, 0.5))
    with pytest.raises(ValueError, match="served by transformers' own loop"):
        acceptance(llama, sparse, tokens[:1, :12], max_new_tokens=13)
