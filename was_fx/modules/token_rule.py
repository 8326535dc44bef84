"""Which tokens of a call drop channels: decided once per call of a model, and read by its sparse Linears.

    call                                                    decision
    one new token per sequence, cache not empty             a decode step: every token
    anything else                                           a prompt: by `prefill`, counted per sequence
    several sequences packed into one (continuous           those with one token and a past: decode;
      batching)                                               the others by `prefill`

Hooks on the model and on its body decide before the call and take the decision back after it, so that a model may be
called within another's call. The decision is held per thread. Dynamo traces the hooks with the model, so a compiled
call decides by the same lines. What gradient checkpointing computes again is decided as the model's last call was.
"""

import inspect
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from was_fx.compat.generation import CACHE_NAMES
from was_fx.compat.tensors import in_backward

Prefill = Literal["dense", "sparse", "half", "all"]

# Names that transformers has for the cache of a model's forward.
_CACHES = (*CACHE_NAMES, "past_key_value", "state")


class _Call(threading.local):
    """The call that this thread is in.

    Attributes:
        within: "model" while a model runs, "body" while its body runs alone, "head" once that has ended, else "".
        prompt: it is no decode step.
        dense: no token drops channels.
        tokens: bool [B, S], the tokens that do; None for all.
        kept: LongTensor, the places in a sequence that the head reads; None where it reads all, or the last ones.
        rule: whose call it is.
        outer: the call that this one is within, as all of these; None if it is in none.
    """

    def __init__(self) -> None:  # in each thread: torch 2.13 can't guard attributes that a thread has not set
        self.within: str = ""
        self.prompt: bool = False
        self.dense: bool = False
        self.tokens: Tensor | None = None
        self.kept: Tensor | None = None
        self.rule: TokenRule | None = None
        self.outer: tuple[Any, ...] | None = None

    def enter(self, within: str, rule: "TokenRule") -> None:
        nested = self.within in ("model", "body")
        self.outer = (
            (self.within, self.prompt, self.dense, self.tokens, self.kept, self.rule, self.outer) if nested else None
        )
        self.within, self.rule = within, rule

    def leave(self, within: str) -> None:
        """Back to the call that this one was within; from the outermost, to what `within` says."""
        self.within = within
        if self.outer is not None:
            self.within, self.prompt, self.dense, self.tokens, self.kept, self.rule, self.outer = self.outer


_call = _Call()


def check_prefill(prefill: str) -> None:
    """Refuse what is no way to treat prompts.

    Raises:
        ValueError: names those there are.
    """
    if prefill not in get_args(Prefill):
        raise ValueError(f"prefill is {prefill!r}; it must be one of {', '.join(get_args(Prefill))}")


class TokenRule:
    """How one model's calls are decided.

    Attributes:
        prefill: which tokens of a prompt are sparse: "dense" none; "sparse" all but the first 1 % of a sequence's own
            tokens (WAS); "half" their last half (TEAL); "all" every one. May be changed at any time.
        last: of the last call with gradients, whether all tokens were dense, and else which were sparse.
    """

    def __init__(self, prefill: Prefill) -> None:
        check_prefill(prefill)
        self.prefill: Prefill = prefill
        self._names: dict[str, tuple[str, ...]] = {}
        self._warned = False
        self._last_length = -1
        self.last: tuple[bool, Tensor | None] | None = None

    @contextmanager
    def treating_prompts(self, prefill: Prefill) -> Iterator[None]:
        """Other prompts than usual, in every thread, while the context lasts."""
        check_prefill(prefill)
        before = self.prefill, self._warned
        self.prefill, self._warned = prefill, True
        try:
            yield
        finally:
            self.prefill, self._warned = before

    def watch(self, model: nn.Module) -> list[Any]:
        """Decide before every call of `model`, and of its body where that is called alone.

        Returns:
            Handles of the hooks, in the order to remove them.
        """
        handles: list[Any] = []
        for role, module, before, after in (
            ("model", model, self.before_model, self.after_model),
            ("body", body_of(model), self.before_body, self.after_body),
        ):
            if module is None:
                continue
            # The class's forward, for an instance's own may be a wrapper that takes anything.
            self._names[role] = tuple(inspect.signature(type(module).forward).parameters)[1:]
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True, prepend=True))
            handles.append(module.register_forward_hook(after, always_call=True))
        return handles

    def before_model(self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        """Hook: decide."""
        _call.enter("model", self)
        self._decide({**dict(zip(self._names["model"], arguments, strict=False)), **keywords})

    def after_model(self, *_: Any) -> None:
        """Hook: the call is over."""
        _call.tokens = _call.kept = None
        _call.leave("")

    def before_body(self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        """Hook: decide, unless the model's call has."""
        if _call.within != "model" or _call.rule is not self:
            _call.enter("body", self)
            self._decide({**dict(zip(self._names["body"], arguments, strict=False)), **keywords})

    def after_body(self, *_: Any) -> None:
        """Hook: what was decided for a body that was called alone still holds for the head after it."""
        if _call.within == "body":
            _call.leave("head")

    def _decide(self, given: Mapping[str, Any]) -> None:
        kept = given.get("logits_to_keep")
        _call.kept = kept if isinstance(kept, Tensor) else None
        self._decide_tokens(given)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self.last = _call.dense, _call.tokens

    def _decide_tokens(self, given: Mapping[str, Any]) -> None:
        inputs = given.get("input_ids")
        inputs = given.get("inputs_embeds") if inputs is None else inputs
        _call.prompt, _call.dense, _call.tokens = True, False, None
        if inputs is None or inputs.dim() < 2:
            _call.dense = self.prefill == "dense"
            return
        cache = next((given[name] for name in _CACHES if given.get(name) is not None), None)
        if given.get("cu_seq_lens_q") is not None:
            self._decide_packed(inputs.shape[1], given)
            return
        if inputs.shape[1] == 1 and (_has_past(cache) or (cache is None and _is_later(given.get("position_ids")))):
            _call.prompt = False
            return
        if self.prefill == "dense":
            _call.dense = True
            if cache is None and not torch.compiler.is_compiling():
                self._say_once_that_nothing_is_cached(inputs.shape[1])
        elif self.prefill != "all":
            mask, positions = given.get("attention_mask"), given.get("position_ids")
            _call.tokens = _after_the_first(inputs, mask, cache, self.prefill, positions)

    def _decide_packed(self, length: int, given: Mapping[str, Any]) -> None:
        """Sequences one after the other in one row; `cu_seq_lens_q` says where each begins."""
        if self.prefill == "all":
            return
        if self.prefill != "dense":
            raise ValueError(
                f"prefill={self.prefill!r} can't be told for sequences that are packed into one, as in continuous "
                "batching; sparsify with prefill='dense' or 'all'"
            )
        bounds = given["cu_seq_lens_q"]
        place = torch.arange(length, device=bounds.device)
        sequence = torch.searchsorted(bounds, place, right=True).clamp(1, bounds.shape[0] - 1)
        single = (bounds[sequence] - bounds[sequence - 1]) == 1
        positions = given.get("position_ids")
        _call.tokens = (single if positions is None else single & (positions.reshape(-1) > 0))[None]

    def _say_once_that_nothing_is_cached(self, length: int) -> None:
        """A text that grows by a token from call to call is being generated."""
        grown, self._last_length = length == self._last_length + 1, length
        if not grown or self._warned:
            return
        self._warned = True
        warnings.warn(
            "generating without a cache: every call is then a prompt, and prompts are dense. Use a cache "
            "(use_cache=True) for sparse decode steps, or sparsify with prefill='all'",
            stacklevel=2,
        )


def decided(module: Any, x: Tensor) -> tuple[bool, Tensor | None]:
    """For a sparse Linear and its input x [..., K]: whether all its tokens are dense, and else which are sparse.

    A module that is called by itself, outside of a call of its model, takes the sequences of x [B, S, K] for prompts,
    unless they have one token each.
    """
    if _call.within in ("model", "body") or (_call.within == "head" and module.was_is_head):
        if _call.dense or _call.tokens is None:
            return _call.dense, None
        kept = _call.kept if module.was_is_head else None
        return False, _for_rows(_call.tokens if kept is None else _call.tokens[:, kept], x)
    if module.was_rule.last is not None and not torch.compiler.is_compiling() and in_backward():
        dense, tokens = module.was_rule.last
        return dense, None if tokens is None else _for_rows(tokens, x)
    prefill = module.was_rule.prefill
    length = x.shape[-2] if x.dim() > 1 else 1
    if length == 1 or prefill == "all":
        return False, None
    if prefill == "dense":
        return True, None
    return False, _for_rows(_after_the_first(x if x.dim() > 2 else x[None], None, None, prefill), x)


def prompt_begins(role: Literal["model", "body"]) -> bool:
    """Whether this thread is in a prompt's call of a model, or of its body alone."""
    return _call.within == role and _call.prompt


def body_of(model: nn.Module) -> nn.Module | None:
    """The decoder of a causal LM, whose output the head reads; None for any other module."""
    body = getattr(model, "base_model", None)
    return body if isinstance(body, nn.Module) and body is not model else None


def _has_past(cache: Any) -> bool:
    """Whether a cache holds tokens already. Of a static cache under a tracer: whether it has been used."""
    if cache is None:
        return False
    if isinstance(cache, (tuple, list)):
        return len(cache) > 0 and cache[0] is not None
    layers = getattr(cache, "layers", None)
    if layers is not None:
        if len(layers) == 0:
            return False
        for layer in layers:
            states = getattr(layer, "has_previous_state", None)
            if states is not None:
                if any(states.values()) if isinstance(states, dict) else states:
                    return True
            elif hasattr(layer, "get_seq_length"):
                return _is_filled(layer)
        return False
    if hasattr(cache, "get_seq_length"):
        length = cache.get_seq_length()
        return bool(length > 0)
    return True


def _is_later(positions: Any) -> bool:
    """Whether tokens stand after others by their positions: of a model that is given no cache and keeps one itself."""
    if not isinstance(positions, Tensor):
        return False
    return True if torch.compiler.is_compiling() else bool((positions > 0).all())


def _is_filled(layer: Any) -> bool:
    if not getattr(layer, "is_initialized", True):
        return False
    length = layer.get_seq_length()
    if isinstance(length, Tensor):  # a static cache's, which a tracer can't read
        return True if torch.compiler.is_compiling() else bool(length > 0)
    return length > 0


def _after_the_first(inputs: Tensor, mask: Any, cache: Any, prefill: str, positions: Any = None) -> Tensor:
    """bool [B, S]: the tokens of each sequence after its first 1 % ("sparse") or its first half ("half"), rounded up;
    padding is not counted and keeps every channel. Without a mask and a cache, a sequence begins where positions [B, S]
    don't go on, as transformers has it."""
    batch, new = inputs.shape[0], inputs.shape[1]
    past = _past_length(cache)
    found = _own_tokens(mask, batch, new, past)
    if mask is None and cache is None and isinstance(positions, Tensor) and positions.dim() == 2:
        place, length = _places(positions)
    elif found is None:
        place, length = (torch.arange(new, device=inputs.device) + past)[None], new + past
    else:
        own, before = found
        place, length = own.cumsum(-1) - 1 + before, own.sum(-1, keepdim=True) + before
    tokens = place >= dense_length(length, prefill)
    return tokens.expand(batch, new) if found is None else tokens & found[0]


def _places(positions: Tensor) -> tuple[Tensor, Tensor]:
    """Of sequences one after the other in rows of positions [B, S]: each token's place in its own, and how long that
    is, [B, S]."""
    begins = torch.nn.functional.pad(positions.diff(dim=-1) != 1, (1, 0), value=True)
    index = torch.arange(positions.shape[1], device=positions.device)
    place = index - (index * begins).cummax(-1).values
    sequence = begins.cumsum(-1) - 1
    length = torch.zeros_like(sequence).scatter_add(-1, sequence, torch.ones_like(sequence)).gather(-1, sequence)
    return place, length


def dense_length(length: Any, prefill: str) -> Any:
    """How many tokens at the beginning of a prompt of `length` (a number or a tensor) keep every channel."""
    if prefill == "sparse":
        return (length + 99) // 100
    if prefill == "half":
        return (length + 1) // 2
    return length if prefill == "dense" else 0


def leading_tokens(x: Tensor) -> int:
    """How many tokens at the beginning of each sequence of x [n, seq, K] keep every channel while something is measured
    on the others: as many as in a prompt whose other tokens are sparse, but not all. Rows [rows, K], as experts see
    them, have none.

    Models hang what they attend to by default on the first tokens. Those are in prompts, which are dense.
    """
    return min(int(dense_length(x.shape[1], "sparse")), x.shape[1] - 1) if x.dim() == 3 else 0


def _past_length(cache: Any) -> Any:
    """Tokens in the cache, a number or a tensor of one."""
    if not _has_past(cache) or not hasattr(cache, "get_seq_length"):
        return 0
    return cache.get_seq_length()


def _own_tokens(mask: Any, batch: int, new: int, past: Any) -> tuple[Tensor, Any] | None:
    """Of an attention mask: which of the new tokens are no padding, bool [B, S], and how many [B, 1] came before."""
    if isinstance(mask, dict):  # one for each kind of attention
        mask = mask.get("full_attention")
    if not isinstance(mask, Tensor):
        return None
    if mask.dim() == 4:  # what the last token sees, of a row for each
        mask = mask[:, 0, -1]
        mask = mask if mask.dtype == torch.bool else mask >= 0 if mask.is_floating_point() else mask != 0
    if mask.dim() != 2:
        return None
    mask = mask.expand(batch, mask.shape[1]) != 0
    if isinstance(past, Tensor):  # a static cache's mask is as long as the cache
        place = torch.arange(mask.shape[1], device=mask.device)
        before = (mask & (place < past)).sum(-1, keepdim=True)
        return mask.gather(1, (past + torch.arange(new, device=mask.device)).expand(batch, new)), before
    return mask[:, past : past + new], mask[:, :past].sum(-1, keepdim=True)


def _for_rows(tokens: Tensor, x: Tensor) -> Tensor:
    """The part of `tokens` [B, S] that is for the rows of x: all, or the last of each sequence."""
    rows = x.shape[:-1].numel()
    if rows == tokens.numel():
        return tokens
    if x.dim() == 3 and x.shape[0] == tokens.shape[0] and x.shape[1] < tokens.shape[1]:
        return tokens[:, tokens.shape[1] - x.shape[1] :]
    raise ValueError(
        f"can't tell which tokens of {list(tokens.shape)} an input {list(x.shape)} holds, as prefill='sparse' and "
        "'half' need; sparsify with prefill='dense' or 'all'"
    )
