"""Small models with a schedule each, and an oracle of what they compute when they are sparse.

The oracle is written apart from the package: a dense copy whose scheduled Linears see their input with the dropped
channels set to zero, by hooks. Thresholds are recomputed here from the weights and the schedule's numbers.
"""

import copy
import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import was_fx
from was_fx.generate.compiled_step import CompiledModel

# Sentences that may stand for "this is not supported": short, and about the thing itself.
_LONGEST_SENTENCE = 400


class _Phase:
    """Which tokens of the running call are sparse, [batch, tokens]; decided when the model's body is called."""

    def __init__(self, prefill: str) -> None:
        self.prefill = prefill
        self.sparse: Tensor | None = None

    def __call__(self, body: nn.Module, arguments: tuple, keywords: dict[str, Any]) -> None:
        ids = arguments[0] if arguments else keywords.get("input_ids")
        ids = keywords.get("inputs_embeds") if ids is None else ids
        batch, new = ids.shape[:2]
        caches = [each for each in map(keywords.get, ("cache", "past_key_values")) if each is not None]
        if self.prefill == "all" or (new == 1 and caches and int(caches[0].get_seq_length()) > 0):
            self.sparse = torch.ones(batch, new, dtype=torch.bool)
        elif self.prefill == "dense":
            self.sparse = torch.zeros(batch, new, dtype=torch.bool)
        else:
            mask = keywords.get("attention_mask")
            own = torch.ones(batch, new, dtype=torch.bool) if mask is None else mask[:, -new:].bool()
            share = {"sparse": 0.01, "half": 0.5}[self.prefill]
            dense = torch.tensor([[math.ceil(share * int(row.sum()))] for row in own])
            self.sparse = own.cumsum(1) > dense

    def of(self, x: Tensor) -> Tensor | bool:
        """The same for each row of x [..., K]: of the last tokens only, where x has no others."""
        if self.sparse is None:  # the body was not called: a part of the model runs alone
            return True
        if x.dim() == 2 and self.sparse.shape[0] * self.sparse.shape[1] == x.shape[0]:
            return self.sparse.reshape(-1, 1)
        return self.sparse[:, -x.shape[-2] :, None]


def drop_channels(model: nn.Module, schedule: was_fx.Schedule, prefill: str = "all") -> nn.Module:
    """Make the scheduled Linears of a dense model ignore |x_j| ≤ τ/g_j^α, by hooks on the model itself.

    Linears below adapters of PEFT are found by the name they have without them.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    phase = _Phase(prefill)
    if getattr(inner, "base_model", inner) is not inner:
        inner.base_model.register_forward_pre_hook(phase, with_kwargs=True)
    for name, entry in schedule.linears.items():
        module = inner.get_submodule(name)
        module = getattr(module, "base_layer", module)
        weight = module.weight.detach().double()
        outputs = 1 if type(module).__name__ == "Conv1D" else 0
        norms = weight.abs().sum(outputs) if schedule.norm == 1 else weight.square().sum(outputs).sqrt()
        limits = (entry.threshold / norms**entry.exponent).float()
        limits = limits if entry.channel_threshold is None else entry.channel_threshold

        def drop(_, inputs, limits=limits):
            x, *others = inputs
            weak = (x.abs().float() <= limits) & phase.of(x)
            return torch.where(weak, torch.zeros_like(x), x), *others

        module.register_forward_pre_hook(drop)
    return model


class Case:
    """A dense model and a schedule for it.

    Attributes:
        tokens: LongTensor [4, 64], what it was calibrated on.
        prompt: the first twelve of them, [1, 12].
        calibration, schedule: with the WAS score unless told otherwise, whose thresholds depend on the weights.
    """

    def __init__(self, model: nn.Module, tokens: Tensor, target: float = 0.7, **calibrate: Any) -> None:
        self._model = copy.deepcopy(model).eval()
        self._model.generation_config.eos_token_id = None
        self._model.generation_config.pad_token_id = 0
        self.tokens, self.prompt = tokens, tokens[:1, :12]
        self.calibration = was_fx.calibrate(self._model, tokens, **calibrate)
        self.schedule = was_fx.uniform(self.calibration, target)

    def dense(self) -> nn.Module:
        """A copy of the model."""
        return copy.deepcopy(self._model)

    def sparse(self, schedule: was_fx.Schedule | None = None, **how: Any) -> nn.Module:
        """A sparsified copy. With lowering="eager", compiled as a whole by the backend, its graphs run node by node."""
        model = was_fx.sparsify(self.dense(), schedule or self.schedule, **how)
        if how.get("lowering") == "eager":
            model._compiled_call_impl = CompiledModel(model, {"lowering": "eager", "disable": how.get("disable", ())})
        return model

    def oracle(
        self, prefill: str = "all", *, schedule: was_fx.Schedule | None = None, model: nn.Module | None = None
    ) -> nn.Module:
        """What a copy (or a copy of another dense model) computes when it is sparse."""
        model = self.dense() if model is None else copy.deepcopy(model)
        return drop_channels(model, schedule or self.schedule, prefill)

    def cache(self, kind: str = "dynamic", length: int = 64) -> Any:
        """An empty cache for the model."""
        from transformers import DynamicCache, StaticCache

        config = self._model.config
        return DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=length)

    # What follows is the same for all models.

    @staticmethod
    def cached(cache: Any) -> dict[str, Any]:
        """The argument that hands a cache to a model or to `generate`; its name depends on transformers' version."""
        from transformers import LlamaForCausalLM

        known = inspect.signature(LlamaForCausalLM.forward).parameters
        return {"cache" if "cache" in known else "past_key_values": cache}

    @staticmethod
    def logits(model: Callable, *arguments: Any, **keywords: Any) -> Tensor:
        """The logits of one call."""
        with torch.no_grad():
            found = model(*arguments, **keywords)
        return getattr(found, "logits", found)

    def steps(self, model: Callable, ids: Tensor, prompt: int = 8, kind: str = "dynamic", **keywords: Any) -> Tensor:
        """Logits of a prompt and of decode steps over the rest of `ids`, [batch, tokens, vocabulary]."""
        cache = self.cache(kind)
        parts = [ids[:, :prompt], *ids[:, prompt:].split(1, dim=1)]
        keywords = {**keywords, "use_cache": True, **self.cached(cache)}
        return torch.cat([self.logits(model, part, **keywords) for part in parts], dim=1)

    @staticmethod
    def greedy(model: nn.Module, ids: Tensor, **keywords: Any) -> Any:
        """What `generate` adds to `ids`, eight tokens unless told otherwise."""
        given = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids), **keywords}
        found = model.generate(ids, **given)
        return found if not isinstance(found, Tensor) else found[:, ids.shape[1] :]

    @staticmethod
    def assert_close(found: Tensor, expected: Tensor) -> None:
        """Equal up to the order of sums."""
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)

    @staticmethod
    def assert_apart(found: Tensor, other: Tensor) -> None:
        """Not equal, by a margin that no rounding explains."""
        assert (found - other).abs().max() > 0.1 * other.abs().max()

    def assert_sparse(self, found: Tensor, expected: Tensor, dense: Tensor) -> None:
        """As the oracle says, and not as the dense model."""
        self.assert_close(found, expected)
        self.assert_apart(found, dense)

    @staticmethod
    def assert_nearer(found: Tensor, expected: Tensor, dense: Tensor) -> None:
        """In low precision a channel near its threshold may fall on either side: much nearer to the oracle's."""
        found, expected, dense = found.float(), expected.float(), dense.float()
        assert (found - expected).norm() < 0.25 * (dense - expected).norm()

    @staticmethod
    @contextmanager
    def works_or_says(*words: str) -> Iterator[None]:
        """What is inside works, or raises an error of one sentence with one of `words` in it."""
        try:
            yield
        except AssertionError:
            raise
        except Exception as error:
            text = str(error)
            assert len(text) < _LONGEST_SENTENCE, text
            assert "\n" not in text.strip(), text
            assert any(word.lower() in text.lower() for word in words), text


@pytest.fixture(scope="session")
def case(_llama, tokens) -> Case:
    """A Llama of two blocks."""
    return Case(_llama, tokens)


@pytest.fixture(scope="session")
def block(_llama, tokens) -> Case:
    """A Llama of one block, where much is compiled."""
    config = copy.deepcopy(_llama.config)
    config.num_hidden_layers = 1
    torch.manual_seed(0)
    return Case(type(_llama)(config), tokens)


@pytest.fixture(scope="session")
def teal(_llama, tokens) -> Case:
    """The same Llama with thresholds of |x| alone, which don't depend on the weights."""
    return Case(_llama, tokens, score=was_fx.Score(0.0, 1))


@pytest.fixture(scope="session")
def gpt2(tokens) -> Case:
    """A GPT-2: `Conv1D` in place of `nn.Linear`, biases, positions by number, a head tied to the embedding."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=64, n_layer=2, n_head=4, n_positions=128, vocab_size=128, bos_token_id=1, initializer_range=0.1
    )
    return Case(GPT2LMHeadModel(config), tokens)


@pytest.fixture(scope="session")
def tied(_llama, tokens) -> Case:
    """A Llama whose head is tied to the embedding and scheduled too."""
    config = copy.deepcopy(_llama.config)
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    return Case(type(_llama)(config), tokens, include="*")


@pytest.fixture(params=["case", "gpt2", "tied"])
def each(request) -> Case:
    """Each of the models in turn."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def drop() -> Callable:
    """`drop_channels`, for dense models that are no copies of a case's own."""
    return drop_channels
