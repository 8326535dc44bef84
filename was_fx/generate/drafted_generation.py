"""`model.generate` of a dense model that has sparse drafts: transformers' own, with a loop of ours for the drafts."""

import functools
import logging
import weakref
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from was_fx.compat.dynamo import settings_for_models
from was_fx.compat.generation import cache_among, decoding_method, full_length_cache, is_callers, uses_flash_attention
from was_fx.generate.compiled_step import CompiledStep
from was_fx.generate.decode_loop import LOOK_EVERY, is_plain
from was_fx.generate.direct_step import DirectStep
from was_fx.generate.drafted_loop import DraftedLoop, Steps
from was_fx.generate.generation import Generation, is_on_one_gpu, why_no_static_cache
from was_fx.generate.kept_cache import KeptCache
from was_fx.generate.model_step import ModelStep, runs_callers_code
from was_fx.generate.recorded_step import RecordedStep
from was_fx.kernels.parts.devices import on

log = logging.getLogger(__name__)

# A static cache is so much longer than asked for that calls of about the same length have it in common.
_BLOCK = 64


def use_drafts(model: nn.Module, draft: nn.Module) -> None:
    """Let `model.generate(..., assistant_model=draft)` be fast; a `generate` of somebody else's stays.

    Args:
        model: dense.
        draft: a sparsified model of the same architecture, whose keys and values can follow those of `model`.
    """
    if "generate" not in vars(model):
        model.generate = DraftedGeneration(model)  # type: ignore[assignment]
    generate = vars(model)["generate"]
    if isinstance(generate, DraftedGeneration):
        generate.drafts.add(draft)


class DraftedGeneration:
    """`model.generate(...)`; a copy or a pickle of it has no drafts.

    Attributes:
        drafts: the models for which our loop serves.
    """

    def __init__(self, model: Any) -> None:
        self.drafts: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._model = model
        self._kept = KeptCache()
        self._steps: dict[Any, CompiledStep] = {}
        functools.update_wrapper(self, type(model).generate)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """See `transformers.GenerationMixin.generate`."""
        generate = functools.partial(type(self._model).generate, self._model)
        draft = keywords.get("assistant_model")
        # A draft that was made dense again generates as any model.
        ours = draft is not None and draft in self.drafts and isinstance(vars(draft).get("generate"), Generation)
        others = any(keywords.get(name) for name in ("custom_generate", "prompt_lookup_num_tokens", "synced_gpus"))
        if not ours or others or self._model.config.is_encoder_decoder:
            return generate(*arguments, **keywords)
        del keywords["assistant_model"]
        # generate() itself keeps the streamer from a custom loop.
        keywords["custom_generate"] = functools.partial(self._decode, draft, streamer=keywords.get("streamer"))
        with settings_for_models():
            return generate(*arguments, **keywords)

    def __deepcopy__(self, memo: dict[int, Any]) -> "DraftedGeneration":
        return DraftedGeneration(memo.get(id(self._model), self._model))

    def __reduce__(self) -> Any:
        return DraftedGeneration, (self._model,)

    def _decode(
        self,
        draft: Any,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """A decoding method for `generate()`; what our loop can't serve is left to transformers' own."""
        given = dict(model_kwargs)
        reason = _why_theirs(model, input_ids, generation_config, model_kwargs)
        if reason:
            log.info("the draft is served by transformers' own loop, and slower: %s", reason)
            method = decoding_method(model, generation_config, {"assistant_model": draft})
            return method(
                input_ids,
                logits_processor=logits_processor,
                stopping_criteria=stopping_criteria,
                generation_config=generation_config,
                streamer=streamer,
                assistant_model=draft,
                **given,
            )
        loop = DraftedLoop(
            model,
            input_ids,
            logits_processor,
            stopping_criteria,
            generation_config,
            streamer,
            guesses=draft.generation_config.num_assistant_tokens or 1,
            confidence=draft.generation_config.assistant_confidence_threshold or 0.0,
        )
        length = -(-loop.text.shape[1] // _BLOCK) * _BLOCK
        direct = self._direct(draft, length)
        name, _ = cache_among(model_kwargs)
        cache = full_length_cache(model, length if direct else None)
        cache = model_kwargs[name] = self._kept.reused(cache, model, 1)
        look_every = 1 if runs_callers_code(logits_processor, stopping_criteria, streamer) else LOOK_EVERY
        steps = self._of(draft, model_kwargs, cache, direct, look_every)
        with on(input_ids.device):
            text = loop.run(model_kwargs, cache, steps)
        self._kept.keep(cache)
        return text

    def _direct(self, draft: Any, length: int) -> Any:
        """How steps go past the models, with a static cache for so many tokens; None: they run as they are."""
        model, (_, lowering) = self._model, draft.generate.settings
        if lowering == "eager" or uses_flash_attention(model):
            return None
        if lowering == "recorded" and model.device.type == "cpu":
            return RecordedStep
        if not is_on_one_gpu(model):
            return None
        reason = why_no_static_cache(model, 1, length)
        if reason:
            log.warning("generate() uses a cache that grows, with which steps are slower: %s", reason)
        return None if reason else DirectStep

    def _of(self, draft: Any, arguments: dict[str, Any], cache: Any, direct: Any, look_every: int) -> Steps:
        """The steps of both models."""
        make = functools.partial(direct, cache=cache, look_every=look_every) if direct else lambda _: None
        guess, verify = None, None
        if direct is DirectStep:
            options = draft.generate.settings[0]
            guess = draft.generate.compiled_step()
            verify = self._steps.get(repr(options))
            if verify is None:
                verify = CompiledStep(self._model, replace(options, as_step=True).given)
                self._steps[repr(options)] = verify
        every = {"logits_to_keep": 0} if "logits_to_keep" in arguments else {}
        return Steps(
            ModelStep(draft, arguments, call=guess, direct=make(draft)),
            ModelStep(self._model, arguments | every, call=verify, direct=make(self._model)),
            filled=direct is not None,
        )


def _why_theirs(model: Any, ids: Tensor, config: Any, model_kwargs: dict[str, Any]) -> str:
    """Why our loop can't serve a generation, or "". Takes a mask that says nothing out of `model_kwargs`."""
    _, cache = cache_among(model_kwargs)
    if cache is None or is_callers(cache):
        return "it has no cache, or one of the caller's"
    if config.cache_implementation not in (None, "static", "dynamic"):
        return f"the cache is to be {config.cache_implementation!r}"
    if getattr(config, "assistant_ensemble_weight", None) is not None:
        return "tokens that the dense model would not write are to be accepted"
    if len(ids) != 1 or config.max_length is None or not is_plain(config, model_kwargs):
        return "more is asked for than the tokens of one unpadded text"
    return ""
