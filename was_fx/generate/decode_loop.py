"""A decoding loop for `generate()` that never waits for the GPU.

transformers' own loop reads after every token whether to go on, so the GPU idles while Python prepares the next step:
1 to 3 ms per token on an H200. Here the steps are queued ahead, and the answer is read when it has arrived.
`generate()` takes such a loop as `custom_generate`; everything else (cache, logits processors, stopping criteria) stays
its own.

    model.generate(ids, custom_generate=was_fx.decode, cache_implementation="static")

`sparsify` makes this the default of a model on a GPU. Nothing is left of the steps that were queued past the end: the
text has its exact length, the random numbers they took are given back, and where a caller's own processor or criterion
would see them, none is queued.
"""

from collections import deque
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from was_fx.compat.generation import cache_among, decoding_method, end_tokens, is_callers, pad_token
from was_fx.generate.direct_step import DirectStep
from was_fx.generate.greedy import Greedy
from was_fx.generate.model_step import ModelStep, position_after, prompt_logits, runs_callers_code
from was_fx.kernels.parts.devices import on

# Steps that may be queued before the first of them has been read: more than Python needs to keep the GPU busy, few
# enough that little is thrown away after the last token.
AHEAD = 4

# Steps after which a model is looked at again for changes, where no code of the caller's runs in between.
LOOK_EVERY = 16

# What `generate()` may hand to a model besides its token ids.
_KNOWN = {"past_key_values", "cache", "position_ids", "attention_mask", "use_cache", "logits_to_keep"}


def decode(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    synced_gpus: bool = False,
    streamer: Any = None,
    step: Any = None,
    ahead: int = AHEAD,
    direct: Any = DirectStep,
    **model_kwargs: Any,
) -> Any:
    """Greedy decoding or sampling with a static cache that `generate()` made; whatever else is asked for is left to
    transformers.

    The arguments are those that `generate()` gives to a decoding method, and:

    Args:
        step: calls the model for one token, by keywords; the model itself by default.
        ahead: steps that may be queued before the first of them has been read.
        direct: how steps go past the model once it is known how: `DirectStep` or `RecordedStep`.

    Returns:
        LongTensor [B, tokens] of prompt and new tokens, or what transformers' method returns.
    """
    if not serves(generation_config, synced_gpus, model_kwargs):
        method = decoding_method(model, generation_config, model_kwargs)
        return method(
            input_ids,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            generation_config=generation_config,
            synced_gpus=synced_gpus,
            streamer=streamer,
            **model_kwargs,
        )
    call = step or model
    loop = _Loop(model, call, input_ids, logits_processor, stopping_criteria, generation_config, streamer, direct)
    with on(input_ids.device):
        return loop.run(model_kwargs, ahead)


def serves(config: Any, synced_gpus: bool, model_kwargs: dict[str, Any]) -> bool:
    """Whether the loop can serve a generation; takes a mask that says nothing out of `model_kwargs`."""
    _, cache = cache_among(model_kwargs)
    return (
        is_plain(config, model_kwargs)
        and not synced_gpus
        and getattr(cache, "is_compileable", False)
        and not getattr(cache, "offloading", False)
        and not is_callers(cache)
    )


def is_plain(config: Any, model_kwargs: dict[str, Any]) -> bool:
    """Whether nothing but tokens of unpadded texts is asked for, and a model given nothing else; takes a mask that says
    nothing out of `model_kwargs`."""
    mask = model_kwargs.get("attention_mask")
    if mask is not None and mask.ndim == 2 and bool(mask.all()):
        model_kwargs["attention_mask"] = None  # no padding
    return (
        not config.return_dict_in_generate
        and (config.num_beams or 1) == 1
        and config.prefill_chunk_size is None
        and set(model_kwargs) <= _KNOWN
        and model_kwargs.get("attention_mask") is None
    )


@dataclass
class _Sent:
    """What a step has sent to the CPU: its tokens [B], for a streamer, and which sequences go on [B], if that is open.

    `random` is the state of the GPU's random numbers after it.
    """

    length: int
    tokens: Tensor | None
    goes_on: Tensor | None
    event: Any
    random: Tensor | None


class _Mail:
    """Sends tokens and flags to the CPU without waiting for the GPU, into pinned memory that is used again."""

    def __init__(self, batch: int, device: torch.device, slots: int) -> None:
        self._slots: Any = None
        if device.type == "cuda":  # a copy to memory that is not pinned waits for the GPU
            tokens = torch.empty((slots, batch), dtype=torch.long, pin_memory=True)
            flags = torch.empty((slots, batch), dtype=torch.bool, pin_memory=True)
            self._slots = cycle([(tokens[i], flags[i], torch.cuda.Event()) for i in range(slots)])

    def send(self, tokens: Tensor | None, flags: Tensor | None) -> tuple[Tensor | None, Tensor | None, Any]:
        """Both as they will be on the CPU once the event has come to pass."""
        if self._slots is None:
            return tokens, flags, None
        own_tokens, own_flags, event = next(self._slots)
        tokens = None if tokens is None else own_tokens.copy_(tokens, non_blocking=True)
        flags = None if flags is None else own_flags.copy_(flags, non_blocking=True)
        event.record()
        return tokens, flags, event


class _Loop:
    def __init__(
        self,
        model: Any,
        step: Any,
        input_ids: Tensor,
        processor: Any,
        criteria: Any,
        config: Any,
        streamer: Any,
        direct: Any,
    ) -> None:
        self.model, self.call, self.processor, self.criteria = model, step, processor, criteria
        self.config, self.streamer, self.make_direct = config, streamer, direct
        batch, self.start = input_ids.shape
        self.end = criteria.max_length
        self.text = input_ids.new_empty((batch, self.end if self.end is not None else self.start + 256))
        self.text[:, : self.start] = input_ids
        # Without criteria of a caller's own, all there is to ask after a step is whether it gave an end-of-text token.
        ends = end_tokens(criteria)
        self.ends = None if ends is None else ends.to(input_ids.device)
        self.may_end = self.ends is None or self.ends.numel() > 0
        self.pads = batch > 1 and any(hasattr(each, "eos_token_id") for each in criteria)
        self.likeliest = Greedy()
        self.unfinished = torch.ones(batch, dtype=torch.bool, device=input_ids.device)
        self.waiting: deque[_Sent] = deque()

    def run(self, model_kwargs: dict[str, Any], ahead: int) -> Tensor:
        self.ahead = ahead
        self.mail = _Mail(self.text.shape[0], self.text.device, ahead + 2)
        _, cache = cache_among(model_kwargs)
        # To look at a whole model costs 0.1 to 0.3 ms. In this thread only a caller's code can change it.
        look_every = 1 if runs_callers_code(self.processor, self.criteria, self.streamer) else LOOK_EVERY
        direct = self.make_direct(self.model, cache, look_every=look_every)
        step = ModelStep(self.model, model_kwargs, call=self.call, direct=direct)
        length, stopped = self.start, None
        prompt = self.text[:, : self.start]
        logits = prompt_logits(self.model, prompt, model_kwargs)
        position = position_after(prompt, model_kwargs)
        while stopped is None:
            token = self._choose(length, logits)
            length += 1
            self._queue(length, token)
            stopped = self._read(length)
            if stopped is None:
                logits = step(token[:, None], position)
                position = position + 1
        if self.streamer is not None:
            self.streamer.end()
        return self.text[:, :stopped].clone()

    def _choose(self, length: int, logits: Tensor) -> Tensor:
        """The next token of each sequence, [B]."""
        scores = logits[:, -1]
        if self.processor or self.config.do_sample:
            scores = scores.to(torch.float32, copy=True)
        if self.processor:
            scores = self.processor(self.text[:, :length], scores)
        if self.config.do_sample:
            token = torch.multinomial(torch.softmax(scores, dim=-1), num_samples=1).squeeze(1)
        else:
            token = self.likeliest(scores)
        if self.pads:
            token = torch.where(self.unfinished, token, pad_token(self.config))
        return token

    def _queue(self, length: int, token: Tensor) -> None:
        """Write the tokens down, and send for them and for whether all sequences have ended."""
        if length > self.text.shape[1]:
            self.text = torch.cat([self.text, torch.empty_like(self.text)], dim=1)
        self.text[:, length - 1] = token
        if self.may_end:
            if self.ends is None:
                going = ~self.criteria(self.text[:, :length], None)
            else:
                going = (token[:, None] != self.ends).all(dim=-1)
            self.unfinished = self.unfinished & going
        random = None
        if self.config.do_sample and token.is_cuda:
            random = torch.cuda.get_rng_state(token.device)  # the CPU holds it
        tokens, goes_on, event = self.mail.send(
            token if self.streamer is not None else None, self.unfinished if self.may_end else None
        )
        self.waiting.append(_Sent(length, tokens, goes_on, event, random))

    def _read(self, length: int) -> int | None:
        """Take what has arrived, in order; the length at which all sequences have ended, if they have."""
        last = self.end is not None and length >= self.end
        while self.waiting:
            first = self.waiting[0]
            if first.event is not None and not first.event.query():
                if not last and len(self.waiting) <= self.ahead:
                    return None
                first.event.synchronize()
            self.waiting.popleft()
            if self.streamer is not None:
                self.streamer.put(first.tokens if first.event is None else first.tokens.clone())  # type: ignore[union-attr]
            ended = first.goes_on is not None and not first.goes_on.any()
            if ended or (self.end is not None and first.length >= self.end):
                if first.random is not None and self.waiting:
                    torch.cuda.set_rng_state(first.random, self.text.device)
                self.waiting.clear()
                return first.length
        return None
