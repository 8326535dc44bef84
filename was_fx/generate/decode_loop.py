"""A decoding loop for `generate()` that never waits for the GPU.

transformers' own loop reads after every token whether to go on, so the GPU idles while Python prepares the next step:
1 to 3 ms per token on an H200. Here the steps are queued ahead, and the answer is read when it has arrived.
`generate()` takes such a loop as `custom_generate`; everything else (cache, logits processors, stopping criteria) stays
its own.

    model.generate(ids, custom_generate=was_fx.decode, cache_implementation="static")

`sparsify` makes this the default of a model on a GPU.
"""

import functools
import inspect
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from was_fx.compile.cuda_graphs import Call, CudaGraphs, noting_calls

# Steps that may be queued before the first of them has been read: more than Python needs to keep the GPU busy, few
# enough that little is thrown away after the last token.
AHEAD = 4

# The static cache of a model's last `generate()`, where that made it itself: the next call of the same size takes it,
# so that the decode steps captured with it serve again.
_kept: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()

# What `generate()` may hand to a model besides its token ids.
_KNOWN = {"past_key_values", "position_ids", "attention_mask", "use_cache", "logits_to_keep"}


def decode(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    synced_gpus: bool = False,
    streamer: Any = None,
    keep_cache: bool = False,
    **model_kwargs: Any,
) -> Any:
    """Greedy decoding or sampling with a static cache; whatever else is asked for is left to transformers.

    The arguments are those that `generate()` gives to a decoding method, and:

    Args:
        keep_cache: the cache is nobody else's, and may be kept for the next call.

    Returns:
        LongTensor [B, tokens] of prompt and new tokens, or what transformers' method returns.
    """
    mask = model_kwargs.get("attention_mask")
    if mask is not None and mask.ndim == 2 and bool(mask.all()):
        model_kwargs["attention_mask"] = None  # no padding: it says nothing
    if not _serves(generation_config, synced_gpus, model_kwargs):
        method = _own_method(model, generation_config, model_kwargs)
        return method(
            input_ids,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            generation_config=generation_config,
            synced_gpus=synced_gpus,
            streamer=streamer,
            **model_kwargs,
        )
    if keep_cache:
        model_kwargs["past_key_values"] = _reused(model, model_kwargs["past_key_values"], len(input_ids))
    loop = _Loop(model, input_ids, logits_processor, stopping_criteria, generation_config, streamer, model_kwargs)
    text = loop.run()
    if keep_cache:
        _kept[model] = model_kwargs["past_key_values"]
    return text


def use_decode(model: nn.Module) -> None:
    """Let `model.generate` use `decode` and a static cache where its arguments don't say otherwise."""
    model.generate = functools.partial(_generate, model)  # type: ignore[assignment]


def restore_generate(model: nn.Module) -> None:
    """Undo `use_decode`."""
    model.__dict__.pop("generate", None)
    _kept.pop(model, None)


def _generate(model: Any, *arguments: Any, **keywords: Any) -> Any:
    config = keywords.get("generation_config") or model.generation_config
    others = ("custom_generate", "assistant_model", "prompt_lookup_num_tokens", "synced_gpus")
    # Guesses of a draft that are turned down are taken out of its cache, which a static one can't do.
    plain = not any(keywords.get(name) for name in others) and not config.is_assistant
    beams = keywords.get("num_beams", config.num_beams)
    if plain and (beams or 1) == 1:
        # generate() itself keeps the streamer from a custom loop.
        own = keywords.get("past_key_values") is None
        keywords["custom_generate"] = functools.partial(decode, streamer=keywords.get("streamer"), keep_cache=own)
        chosen = keywords.get("cache_implementation", config.cache_implementation)
        cached = keywords.get("use_cache", config.use_cache) is not False
        if chosen is None and cached and own:
            keywords["cache_implementation"] = "static"
    return type(model).generate(model, *arguments, **keywords)


def _serves(config: Any, synced_gpus: bool, model_kwargs: dict[str, Any]) -> bool:
    cache = model_kwargs.get("past_key_values")
    return (
        not synced_gpus
        and not config.return_dict_in_generate
        and (config.num_beams or 1) == 1
        and config.prefill_chunk_size is None
        and set(model_kwargs) <= _KNOWN
        and model_kwargs.get("attention_mask") is None
        and getattr(cache, "is_compileable", False)
        and not getattr(cache, "offloading", False)
    )


def _reused(model: Any, cache: Any, batch: int) -> Any:
    """The kept cache, emptied, if it is like `cache`, which has not been used; else `cache`."""
    from transformers.cache_utils import StaticLayer

    kept = _kept.pop(model, None)  # nobody else's while it is in use
    if kept is None or len(kept.layers) != len(cache.layers):
        return cache
    for ours, theirs in zip(kept.layers, cache.layers, strict=True):
        if type(ours) is not type(theirs) or not isinstance(ours, StaticLayer):
            return cache
        if (ours.max_cache_len, ours.batch_size) != (theirs.max_cache_len, batch):
            return cache
        keys = ours.keys
        if keys is None or (keys.dtype, keys.device.type) != (model.dtype, model.device.type):
            return cache
    kept.reset()
    return kept


def _own_method(model: Any, config: Any, model_kwargs: dict[str, Any]) -> Any:
    """The decoding method of transformers for these settings."""
    from transformers.generation.utils import GENERATION_MODES_MAPPING

    mode = config.get_generation_mode(model_kwargs.get("assistant_model"))
    return getattr(model, GENERATION_MODES_MAPPING[mode])


class _Loop:
    def __init__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        config: Any,
        streamer: Any,
        model_kwargs: dict[str, Any],
    ) -> None:
        self.model, self.processor, self.criteria, self.config = model, logits_processor, stopping_criteria, config
        self.streamer, self.kwargs = streamer, model_kwargs
        batch, self.start = input_ids.shape
        self.end = stopping_criteria.max_length
        self.text = input_ids.new_empty((batch, self.end if self.end is not None else self.start + 256))
        self.text[:, : self.start] = input_ids
        self.pads = any(hasattr(each, "eos_token_id") for each in stopping_criteria)
        self.unfinished = torch.ones(batch, dtype=torch.bool, device=input_ids.device)
        self.waiting: deque[tuple[int, Tensor, Tensor, Any]] = deque()
        takes = inspect.signature(model.forward).parameters
        keywords = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in takes.values())
        self.takes_positions = "position_ids" in takes or keywords
        self.shortcut = _Shortcut(model, model_kwargs["past_key_values"])

    def run(self) -> Tensor:
        length, stopped = self.start, None
        logits = self._prefill()
        position = self._next_position()
        while stopped is None:
            token = self._choose(length, logits)
            length += 1
            self._queue(length, token)
            stopped = self._read(length)
            if stopped is None:
                logits = self._step(token, position)
                position = position + 1
        if self.streamer is not None:
            self.streamer.end()
        return self.text[:, :stopped].clone()

    def _prefill(self) -> Tensor:
        inputs = self.model.prepare_inputs_for_generation(
            self.text[:, : self.start], is_first_iteration=True, **self.kwargs
        )
        return self.model(**inputs, return_dict=True).logits

    def _next_position(self) -> Tensor:
        known = self.kwargs.get("position_ids")
        if known is not None:
            return known[:, -1:] + 1
        return torch.full((self.text.shape[0], 1), self.start, device=self.text.device)

    def _step(self, token: Tensor, position: Tensor) -> Tensor:
        changing = [token[:, None], position]
        found = self.shortcut.logits(changing)
        if found is not None:
            return found
        names = ("past_key_values", "use_cache", "logits_to_keep")
        arguments = {name: self.kwargs[name] for name in names if name in self.kwargs}
        if self.takes_positions:
            arguments["position_ids"] = position
        with noting_calls() as calls:
            logits = self.model(input_ids=changing[0], **arguments).logits
        self.shortcut.learn(calls, changing, logits)
        return logits

    def _choose(self, length: int, logits: Tensor) -> Tensor:
        """The next token of each sequence, [B]."""
        scores = logits[:, -1].to(torch.float32, copy=True)
        if self.processor:
            scores = self.processor(self.text[:, :length], scores)
        if self.config.do_sample:
            token = torch.multinomial(torch.softmax(scores, dim=-1), num_samples=1).squeeze(1)
        else:
            token = scores.argmax(dim=-1)
        if self.pads:
            token = torch.where(self.unfinished, token, self.config._pad_token_tensor)
        return token

    def _queue(self, length: int, token: Tensor) -> None:
        """Write the tokens down, and send for them and for whether all sequences have ended."""
        if length > self.text.shape[1]:
            self.text = torch.cat([self.text, torch.empty_like(self.text)], dim=1)
        self.text[:, length - 1] = token
        self.unfinished = self.unfinished & ~self.criteria(self.text[:, :length], None)
        flag = self.unfinished.any()
        if not token.is_cuda:
            self.waiting.append((length, token, flag, None))
            return
        event = torch.cuda.Event()
        # Into pinned memory: a copy to any other waits for the GPU.
        token, flag = (
            torch.empty(each.shape, dtype=each.dtype, pin_memory=True).copy_(each, non_blocking=True)
            for each in (token, flag)
        )
        event.record()
        self.waiting.append((length, token, flag, event))

    def _read(self, length: int) -> int | None:
        """Take what has arrived, in order; the length at which all sequences have ended, if they have."""
        last = self.end is not None and length >= self.end
        while self.waiting:
            at, token, flag, event = self.waiting[0]
            if event is not None and not event.query():
                if not last and len(self.waiting) <= AHEAD:
                    return None
                event.synchronize()
            self.waiting.popleft()
            if self.streamer is not None:
                self.streamer.put(token)
            if not flag or (self.end is not None and at >= self.end):
                self.waiting.clear()
                return at
        return None


@dataclass(frozen=True)
class _Pattern:
    """How a step called its compiled graph: which inputs were the step's token and position, which output its logits.

    `state` are the numbers that the cache keeps in Python.
    """

    step: CudaGraphs
    inputs: tuple[Any, ...]
    places: tuple[int | None, ...]
    output: int
    state: list[Any]

    def repeats(self, other: "_Pattern") -> bool:
        """Whether the other step differed in nothing but its token and position."""
        ours, theirs = ((each.step, each.places, each.output, each.state) for each in (self, other))
        return ours == theirs and all(map(_same, self.inputs, other.inputs))


class _Shortcut:
    """From a step of a generation to the next one's logits, past the model.

    To find that nothing has changed takes Dynamo's guards, transformers and our own inputs 1 to 2 ms of Python per
    token, longer than the step of a small model. Within a generation nothing does change: once two steps have called
    one compiled graph with the same weights and cache, and left the cache's Python state alone, the graph is called
    directly.
    """

    def __init__(self, model: nn.Module, cache: Any) -> None:
        # What a hook does in Python is done by the model's call only.
        self._off = any(each._forward_hooks or each._forward_pre_hooks for each in model.modules())
        self._cache = cache
        self._last: _Pattern | None = None
        self._found: _Pattern | None = None

    def logits(self, changing: Sequence[Tensor]) -> Tensor | None:
        """Logits [B, 1, V] of a step with this token [B, 1] and position [B, 1]; None if it is not known how."""
        if self._found is None:
            return None
        inputs = list(self._found.inputs)
        for place, each in zip(self._found.places, changing, strict=True):
            if place is not None:
                inputs[place] = each
        result: Tensor = self._found.step(*inputs)[self._found.output]
        return result

    def learn(self, calls: Sequence[Call], changing: Sequence[Tensor], logits: Tensor) -> None:
        """Note what a step through the model called."""
        before, self._last = self._last, None
        if self._off or len(calls) != 1:
            return
        step, inputs, outputs = calls[0].step, list(calls[0].inputs), calls[0].outputs
        places = tuple(next((i for i, given in enumerate(inputs) if given is each), None) for each in changing)
        output = next((i for i, given in enumerate(outputs) if given is logits), None)
        if places[0] is None or output is None:
            return
        for place in places:
            if place is not None:
                inputs[place] = None
        state = [
            {name: item for name, item in vars(layer).items() if isinstance(item, int | float)}
            for layer in self._cache.layers
        ]
        self._last = _Pattern(step, tuple(inputs), places, output, state)
        if before is not None and self._last.repeats(before):
            self._found = self._last


def _same(one: Any, other: Any) -> bool:
    return one is other or (isinstance(one, int | float) and one == other)


__all__ = ["decode", "restore_generate", "use_decode"]
