"""Which tokens of a call drop channels: every kind of cache and of mask, by small fakes."""

import copy
import inspect
import pickle
import threading
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from was_fx.modules.token_rule import TokenRule, body_of, check_prefill, decided, prompt_begins

NEW = 10


class Probe(nn.Module):
    """Stands for a sparse Linear: notes what is decided for its input."""

    def __init__(self, rule: TokenRule, is_head: bool = False) -> None:
        super().__init__()
        self.was_rule, self.was_is_head = rule, is_head
        self.seen = []

    def forward(self, x):
        self.seen.append(decided(self, x))
        return x


class Body(nn.Module):
    """A decoder that takes what the decoders of transformers take."""

    def __init__(self, rule: TokenRule) -> None:
        super().__init__()
        self.linear = Probe(rule)

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        past_key_values=None,
        cache=None,
        cache_params=None,
        state=None,
        position_ids=None,
        inputs_embeds=None,
        **others,
    ):
        hidden = torch.zeros(*input_ids.shape, 4) if inputs_embeds is None else inputs_embeds
        return self.linear(hidden)


class Model(nn.Module):
    """A causal LM."""

    def __init__(self, prefill: str = "dense") -> None:
        super().__init__()
        self.rule = TokenRule(prefill)
        self.base_model = Body(self.rule)
        self.head = Probe(self.rule, is_head=True)
        self.last = 0
        self.handles = self.rule.watch(self)

    def forward(self, input_ids=None, attention_mask=None, past_key_values=None, **others):
        hidden = self.base_model(input_ids, attention_mask, past_key_values, **others)
        return self.head(hidden[:, -self.last :])

    def decision(self, *arguments, **keywords):
        """(dense, tokens) of the Linear in the body in one call."""
        self(*arguments, **keywords)
        return self.base_model.linear.seen[-1]


def layer(length, **others):
    return SimpleNamespace(get_seq_length=lambda: length, **others)


def cache(length, **others):
    return SimpleNamespace(get_seq_length=lambda: length, **others)


EMPTY = {
    "no cache": None,
    "legacy, empty": (),
    "legacy, without a first layer": (None, None),
    "length 0": cache(0),
    "no layers yet": cache(0, layers=[]),
    "a layer of length 0": cache(0, layers=[layer(0), layer(0)]),
    "a layer that is not initialised": cache(3, layers=[layer(3, is_initialized=False)]),
    "a static layer of length 0": cache(torch.tensor(0), layers=[layer(torch.tensor(0), is_initialized=True)]),
    "a static cache of length 0": cache(torch.tensor(0)),
    "states, none seen": cache(0, layers=[SimpleNamespace(has_previous_state=False)]),
    "states by name, none seen": cache(0, layers=[SimpleNamespace(has_previous_state={0: False, 1: False})]),
    "states and attention, none seen": cache(0, layers=[SimpleNamespace(has_previous_state=False), layer(0)]),
    "layers without either": cache(0, layers=[SimpleNamespace()]),
}
FILLED = {
    "legacy": ((torch.zeros(1), torch.zeros(1)),),
    "list": [torch.zeros(1)],
    "length 3": cache(3),
    "a layer of length 3": cache(3, layers=[layer(3), layer(3)]),
    "an initialised layer": cache(3, layers=[layer(3, is_initialized=True)]),
    "a static layer": cache(torch.tensor(3), layers=[layer(torch.tensor(3), is_initialized=True)]),
    "a static cache": cache(torch.tensor(3)),
    "states": cache(0, layers=[SimpleNamespace(has_previous_state=True)]),
    "states by name": cache(0, layers=[SimpleNamespace(has_previous_state={0: False, 1: True})]),
    "states that don't tell, and attention": cache(3, layers=[SimpleNamespace(has_previous_state=False), layer(3)]),
    "an object of no known kind": object(),
}
ONE = torch.ones(1, 1, dtype=torch.long)
MANY = torch.ones(2, NEW, dtype=torch.long)


@pytest.mark.parametrize("kind", EMPTY)
def test_one_token_and_an_empty_cache_are_a_prompt(kind):
    assert Model("dense").decision(ONE, past_key_values=EMPTY[kind]) == (True, None)


@pytest.mark.parametrize("prefill", ["dense", "sparse", "half", "all"])
@pytest.mark.parametrize("kind", FILLED)
def test_one_token_and_a_past_are_a_decode_step_whatever_prompts_are(kind, prefill):
    assert Model(prefill).decision(ONE, past_key_values=FILLED[kind]) == (False, None)


@pytest.mark.parametrize("name", ["past_key_values", "cache", "cache_params", "state"])
def test_a_cache_of_every_name(name):
    assert Model().decision(ONE, **{name: FILLED["length 3"]}) == (False, None)


@pytest.mark.parametrize("kind", FILLED)
def test_several_tokens_after_others_are_a_prompt(kind):
    assert Model("dense").decision(MANY, past_key_values=FILLED[kind]) == (True, None)
    assert Model("all").decision(MANY, past_key_values=FILLED[kind]) == (False, None)


@pytest.mark.parametrize(
    ("positions", "step"), [(None, False), ([[0]], False), ([[3]], True), ([[3], [0]], False), ([[3], [7]], True)]
)
def test_without_a_cache_one_token_after_others_is_a_step_of_a_model_that_keeps_its_own(positions, step):
    ids = torch.ones(len(positions or [0]), 1, dtype=torch.long)
    model = Model("dense")
    found = model.decision(ids, position_ids=None if positions is None else torch.tensor(positions))
    assert found == (not step, None)
    empty = model.decision(ids, past_key_values=EMPTY["length 0"], position_ids=torch.full_like(ids, 3))
    assert empty == (True, None)


def test_arguments_by_position_by_name_and_as_embeddings():
    model, past = Model(), FILLED["length 3"]
    assert model.decision(ONE, None, past) == (False, None)
    assert model.decision(input_ids=ONE, past_key_values=past) == (False, None)
    assert model.decision(inputs_embeds=torch.zeros(1, 1, 4), past_key_values=past) == (False, None)
    assert model.decision(inputs_embeds=torch.zeros(1, 2, 4), past_key_values=past) == (True, None)


def places(*rows):
    return torch.tensor([[mark == "x" for mark in row] for row in rows])


# Two rows: the first with three of padding on the left, the second with five on the right.
OWN = places("...xxxxxxx", "xxxxx.....")
HALF = places(".......xxx", "...xx.....")  # after 4 of 7, and 3 of 5
ALMOST = places("....xxxxxx", ".xxxx.....")  # after the first each


def additive(mask):
    """[B, 1, S, S], 0 where a token is seen: causal, and no padding."""
    seen = torch.tril(torch.ones(NEW, NEW, dtype=torch.bool))[None, None] & mask[:, None, None]
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)


MASKS = {
    "int64": OWN.long(),
    "bool": OWN,
    "float": OWN.float(),
    "4-D bool": additive(OWN) == 0,
    "4-D additive": additive(OWN),
    "4-D int": (additive(OWN) == 0).long(),
    "by kind of attention": {"full_attention": OWN.long(), "sliding_attention": None},
}


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize(("prefill", "expected"), [("half", HALF), ("sparse", ALMOST)])
def test_padding_is_not_counted_and_keeps_every_channel(kind, prefill, expected):
    dense, tokens = Model(prefill).decision(MANY, attention_mask=MASKS[kind])
    assert not dense
    assert tokens.equal(expected)


@pytest.mark.parametrize("mask", [None, {"sliding_attention": OWN}, {}, torch.ones(2, 3, NEW), torch.ones(2, NEW)])
def test_without_a_mask_of_every_token_none_is_padding(mask):
    _, tokens = Model("half").decision(MANY, attention_mask=mask)
    assert tokens.equal(places(".....xxxxx", ".....xxxxx"))


def test_one_row_of_a_mask_is_for_every_sequence():
    _, tokens = Model("half").decision(MANY, attention_mask=OWN[:1].long())
    assert tokens.equal(HALF[:1].expand(2, NEW))


@pytest.mark.parametrize(("length", "first"), [(2, 1), (99, 1), (100, 1), (101, 2), (200, 2), (201, 3)])
def test_sparse_is_all_but_the_first_hundredth_rounded_up(length, first):
    _, tokens = Model("sparse").decision(torch.ones(1, length, dtype=torch.long))
    assert tokens.sum() == length - first
    assert not tokens[0, :first].any()


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_tokens_in_the_cache_count_as_tokens_before(static, masked):
    """Chunks of a prompt: each knows what came before, not what comes after."""
    past = torch.tensor(6) if static else 6
    keywords = {"past_key_values": cache(past, layers=[layer(past, is_initialized=True)])}
    if masked:
        mask = torch.ones(1, 20 if static else 10, dtype=torch.long)  # a static cache's is as long as the cache
        mask[:, :2] = 0
        mask[:, 10:] = 0
        keywords["attention_mask"] = mask
    _, tokens = Model("half").decision(torch.ones(1, 4, dtype=torch.long), **keywords)
    # Without a mask 6 + 4 tokens, the first five dense: all new ones are sparse. With it 4 + 4, the first four dense.
    assert tokens.equal(places("xxxx"))
    _, tokens = Model("half").decision(torch.ones(1, 4, dtype=torch.long), past_key_values=cache(1))
    assert tokens.equal(places("..xx"))


# Sequences packed into one row, as continuous batching has them: lengths 3, 1 and 1.
BOUNDS = torch.tensor([0, 3, 4, 5], dtype=torch.int32)


@pytest.mark.parametrize(
    ("prefill", "positions", "expected"),
    [
        ("dense", None, "...xx"),
        ("dense", [0, 1, 2, 7, 9], "...xx"),
        ("dense", [0, 1, 2, 7, 0], "...x."),  # the last one is a prompt of one token
    ],
)
def test_packed_sequences_of_one_token_with_a_past_are_sparse(prefill, positions, expected):
    keywords = {} if positions is None else {"position_ids": torch.tensor([positions])}
    dense, tokens = Model(prefill).decision(torch.ones(1, 5, dtype=torch.long), cu_seq_lens_q=BOUNDS, **keywords)
    assert not dense
    assert tokens.equal(places(expected))


def test_packed_sequences_where_every_token_is_sparse():
    found = Model("all").decision(torch.ones(1, 5, dtype=torch.long), cu_seq_lens_q=BOUNDS)
    assert found == (False, None)


@pytest.mark.parametrize("prefill", ["sparse", "half"])
def test_shares_of_packed_sequences_are_refused(prefill):
    with pytest.raises(ValueError, match="continuous batching"):
        Model(prefill)(torch.ones(1, 5, dtype=torch.long), cu_seq_lens_q=BOUNDS)


@pytest.mark.parametrize(("prefill", "dense"), [("dense", True), ("all", False)])
def test_a_call_that_tells_nothing_about_its_tokens_is_a_prompt(prefill, dense):
    model = Model(prefill)
    model.rule.before_model(model, (), {})
    assert decided(model.base_model.linear, torch.zeros(5, 4)) == (dense, None)
    model.rule.after_model()


# Who asks.


def test_the_head_sees_the_last_tokens_only():
    model = Model("half")
    model.last = 3
    model(MANY, attention_mask=OWN.long())
    assert model.head.seen[-1][1].equal(HALF[:, -3:])


def test_flattened_tokens_and_those_of_no_known_shape():
    model = Model("half")
    model.rule.before_model(model, (MANY,), {})
    try:
        assert decided(model.base_model.linear, torch.zeros(2 * NEW, 4))[1].numel() == 2 * NEW
        with pytest.raises(ValueError, match=r"can't tell which tokens of \[2, 10\] an input \[7, 4\] holds"):
            decided(model.base_model.linear, torch.zeros(7, 4))
    finally:
        model.rule.after_model()


@pytest.mark.parametrize(
    ("prefill", "shape", "expected"),
    [
        ("dense", (1, NEW, 4), (True, None)),
        ("dense", (NEW, 4), (True, None)),
        ("dense", (3, 1, 4), (False, None)),
        ("dense", (4,), (False, None)),
        ("all", (1, NEW, 4), (False, None)),
        ("half", (2, 4, 4), (False, places("..xx", "..xx"))),
        ("half", (4, 4), (False, places("..xx"))),
    ],
)
def test_a_linear_that_is_called_by_itself(prefill, shape, expected):
    dense, tokens = decided(Probe(TokenRule(prefill)), torch.zeros(shape))
    assert dense == expected[0]
    assert tokens is expected[1] or tokens.equal(expected[1])


def test_a_body_alone_and_the_head_after_it():
    model, past = Model("dense"), FILLED["length 3"]
    model.base_model(MANY)
    assert model.base_model.linear.seen[-1] == (True, None)
    model.base_model(ONE, past_key_values=past)
    assert model.base_model.linear.seen[-1] == (False, None)
    model.base_model(MANY, past_key_values=past)
    assert decided(model.head, torch.zeros(2, 1, 4)) == (True, None)  # the last token of a prompt
    assert decided(model.base_model.linear, torch.zeros(2, 1, 4)) == (False, None)  # by itself
    model(ONE, past_key_values=past)
    assert decided(model.head, torch.zeros(2, NEW, 4)) == (True, None)  # by itself: the model's call is over


def test_within_the_models_call_the_body_decides_nothing():
    """It may be handed other arguments than the model was."""
    model = Model("dense")
    model.base_model.register_forward_pre_hook(lambda *_: None)
    seen = []
    model.rule.before_model(model, (ONE,), {"past_key_values": FILLED["length 3"]})
    model.base_model(MANY)
    seen.append(model.base_model.linear.seen[-1])
    model.rule.after_model()
    assert seen == [(False, None)]


def test_a_prompt_begins():
    model, found = Model("all"), []
    for module, role in ((model, "model"), (model.base_model, "body")):
        module.register_forward_pre_hook(lambda *_, role=role: found.append((role, prompt_begins(role))))
    model(MANY)
    model(ONE, past_key_values=FILLED["length 3"])
    model.base_model(MANY)
    assert found == [("model", True), ("body", False), ("model", False), ("body", False), ("body", True)]
    assert not prompt_begins("model")


def test_a_call_that_fails_is_over_all_the_same():
    model = Model("all")
    handle = model.base_model.linear.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(MANY)
    handle.remove()
    model.rule.prefill = "dense"
    assert decided(model.base_model.linear, torch.zeros(1, 1, 4)) == (False, None)
    assert decided(model.base_model.linear, torch.zeros(1, 3, 4)) == (True, None)


def test_threads_decide_for_themselves():
    model, inside, go = Model("dense"), threading.Event(), threading.Event()

    def wait(*_):
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            go.wait(10)

    model.base_model.linear.register_forward_pre_hook(wait)
    thread = threading.Thread(target=model, args=(MANY,))
    thread.start()
    assert inside.wait(10)
    assert model.decision(ONE, past_key_values=FILLED["length 3"]) == (False, None)
    go.set()
    thread.join()
    assert model.base_model.linear.seen[-1] == (True, None)


def test_hooks_are_removed_by_their_handles():
    model = Model("all")
    for handle in model.handles:
        handle.remove()
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_a_wrapped_forward_is_read_by_the_classes():
    """accelerate and others put a function of (*args, **kwargs) in the place of an instance's forward."""
    model = Model.__new__(Model)
    nn.Module.__init__(model)
    model.rule = TokenRule("dense")
    model.base_model, model.head, model.last = Body(model.rule), Probe(model.rule, is_head=True), 0
    forward = model.forward
    model.forward = lambda *arguments, **keywords: forward(*arguments, **keywords)
    model.rule.watch(model)
    assert "past_key_values" not in inspect.signature(model.forward).parameters
    assert model.decision(ONE, None, FILLED["length 3"]) == (False, None)


@pytest.mark.parametrize("module", [nn.Linear(2, 2), SimpleNamespace(base_model=3)])
def test_a_module_that_has_no_body(module):
    assert body_of(module) is None


# How prompts are treated.


@pytest.mark.parametrize("prefill", ["none", "", "Dense", None, 0.5])
def test_other_ways_to_treat_prompts_are_refused(prefill):
    for refuse in (check_prefill, TokenRule):
        with pytest.raises(ValueError, match="must be one of dense, sparse, half, all"):
            refuse(prefill)


def test_prompts_treated_otherwise_for_a_while():
    model = Model("dense")
    with model.rule.treating_prompts("all"):
        assert model.decision(MANY) == (False, None)
    assert model.decision(MANY) == (True, None)
    with pytest.raises(ZeroDivisionError), model.rule.treating_prompts("all"):
        _ = 1 / 0
    assert model.rule.prefill == "dense"
    with pytest.raises(ValueError, match="prefill"), model.rule.treating_prompts("some"):
        pass
    assert model.rule.prefill == "dense"


def test_a_text_that_grows_without_a_cache_is_told_once():
    model = Model("dense")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for length in (9, 4, 7):
            model(torch.ones(1, length, dtype=torch.long))  # texts of their own
        assert not caught
        with model.rule.treating_prompts("dense"):
            for length in (4, 5, 6):
                model(torch.ones(1, length, dtype=torch.long))  # asked for
        assert not caught
        for length in (8, 9, 10, 11):
            model(torch.ones(1, length, dtype=torch.long))
    (said,) = caught
    assert "use_cache=True" in str(said.message)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copys_hooks_are_its_own_rules(copied):
    model = Model("dense")
    twin = copied(model)
    twin.rule.prefill = "all"
    assert twin.decision(MANY) == (False, None)
    assert model.decision(MANY) == (True, None)
