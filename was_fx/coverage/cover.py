"""Which causal LM classes of transformers are covered: each is built small, sparsified and compared.

`candidates` says which classes are meant, `cover` tries one of them. It decodes given tokens after a prompt, every
token sparse, and compares logits: at 0 % with the dense model's, at 50 % with those of the same model with the dropped
channels set to zero by forward hooks.
"""

import contextlib
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from was_fx.coverage.tiny_models import VOCABULARY, tiny_model
from was_fx.measure.calibrate import calibrate
from was_fx.modules.linears import body_linears, dense_expert_share, expert_parameters, find_linears, looking_at_inputs
from was_fx.passes.graph.context import Context
from was_fx.passes.pipeline import observers
from was_fx.schedules.files.schedule import Schedule
from was_fx.schedules.score import channel_norms
from was_fx.schedules.search.uniform import uniform
from was_fx.sparse.sparsify import densify, sparsify

TOLERANCE = 1e-4
_PROMPT, _NEW, _TARGET = 12, 6, 0.5

# Decoder-only text models that the rules of `candidates` would not recognise as something else.
_NOT_DECODER_ONLY = {
    "bert-generation": "an encoder family; its causal head is the decoder of an encoder-decoder model",
    "trocr": "the decoder of an image-to-text model; it attends to an image encoder",
    "musicgen": "makes audio codes, not text",
    "musicgen_melody": "makes audio codes, not text",
    "moshi": "makes audio codes, not text",
    "xlnet": "a permutation language model; it does not decode from left to right with a cache",
    "gemma4_assistant": "a draft model; it runs on the hidden states of another model",
    "gemma4_unified_assistant": "a draft model; it runs on the hidden states of another model",
}
_MASKED = "an encoder family (masked LM), whose causal head needs is_decoder=True"
_ENCODER_DECODER = "the decoder of an encoder-decoder model"
_MULTIMODAL = "takes images or audio"


@dataclass(frozen=True)
class Coverage:
    """What was found for one model type.

    Attributes:
        model_type: as in transformers' configurations.
        model_class: name of the causal LM class.
        linears: Linears of the model, its head among them.
        rewritten: Linears that are sparse in the graph of a decode step and in that of a prompt.
        declined: reason by qualified name, for every Linear but the head that is not.
        experts: qualified names of the weights held as 3-D parameters, such as experts, which stay dense.
        experts_dense: their share of the weight bytes of a decode step.
        prompt_graphs: graphs that the prompt took.
        decode_graphs: graphs that the steps after it took; more than one where a sliding window fills up. None if the
            model has no cache, so that each step is a prompt again.
        graph_breaks: reasons of graph breaks; a model that has any is not sparsified.
        exact: largest difference of logits at 0 % from the dense model's, relative to the largest logit.
        oracle: the same at 50 %, from the model with weak channels zeroed by hooks.
        effect: how far dropping half of the channels moves the logits; a comparison that moves nothing proves nothing.
        error: what went wrong, or nothing.
    """

    model_type: str
    model_class: str
    linears: int = 0
    rewritten: int = 0
    declined: dict[str, str] = field(default_factory=dict)
    experts: tuple[str, ...] = ()
    experts_dense: float = 0.0
    prompt_graphs: int = 0
    decode_graphs: int = 0
    graph_breaks: tuple[str, ...] = ()
    exact: float | None = None
    oracle: float | None = None
    effect: float | None = None
    error: str = ""

    @property
    def complete(self) -> bool:
        """Every Linear but the head rewritten, in whole graphs of prompt and decode step, equal to both references."""
        equal = all(each is not None and each <= TOLERANCE for each in (self.exact, self.oracle))
        moved = self.effect is not None and self.effect > 100 * TOLERANCE
        whole = min(self.prompt_graphs, self.decode_graphs) > 0 and not self.graph_breaks
        return equal and moved and whole and not (self.error or self.declined)


def candidates() -> dict[str, str | None]:
    """Every model type that transformers maps to a causal LM class, with the reason why it is none that decodes text
    alone from left to right, or None if it is one. A class that several types share counts once."""
    from transformers.models.auto import modeling_auto as auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    found: dict[str, str | None] = {}
    for model_type in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        config = CONFIG_MAPPING[model_type]
        found[model_type] = _NOT_DECODER_ONLY.get(model_type)
        if model_type in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES:
            found[model_type] = _MASKED
        if getattr(config, "is_encoder_decoder", False):
            found[model_type] = _ENCODER_DECODER
        images = model_type in auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
        if images or {"vision_config", "audio_config"} & set(config.sub_configs):
            found[model_type] = _MULTIMODAL
    names = {each: str(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[each]) for each in found if found[each] is None}
    first: dict[str, str] = {}  # the type that a class is named after comes before others
    for model_type in sorted(names, key=lambda each: not _named_after(names[each], each)):
        same = first.setdefault(names[model_type], model_type)
        found[model_type] = None if same == model_type else f"the same class as {same}"
    return found


def _named_after(name: str, model_type: str) -> bool:
    return name.lower().startswith(re.sub("_text$|[-_]", "", model_type))


def cover(model_type: str) -> Coverage:
    """Build a small model of `model_type`, sparsify it and compare; whatever goes wrong is in the result."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    name = str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type, "unknown"))
    found: dict[str, Any] = {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the model's own code, and of Dynamo about it
            model = tiny_model(model_type)
            found |= {"linears": len(find_linears(model)), "experts": tuple(expert_parameters(model))}
            found["experts_dense"] = dense_expert_share(model)
            _compare(model, found)
    except Exception as error:
        found["error"] = _first_line(error)
    return Coverage(model_type, name, **found)


def _compare(model: nn.Module, found: dict[str, Any]) -> None:
    """Fill `found` with the fields of `Coverage` as they become known."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, VOCABULARY, (2, _PROMPT + _NEW), generator=generator)
    try:
        dense, unreached = _dense(model, tokens[:1])
    except Exception as error:
        raise RuntimeError(f"the dense model itself can't generate: {_first_line(error)}") from error
    declined = dict.fromkeys(unreached, "its module is never called, only its weight is read, if at all")
    found["declined"] = declined
    calibration = calibrate(model, tokens, exclude=unreached)
    refused: dict[str, str] = {}
    for _ in range(3):  # a graph's error names only the Linears of that graph
        schedule = uniform(calibration, _TARGET, exclude=refused)
        expected = _oracle(model, schedule, tokens[:1])
        found["effect"] = _difference(expected, dense)
        sparsify(model, schedule, prefill="all", executor="eager")
        contexts: list[Context] = []
        try:
            with _observing(contexts.append):
                found["oracle"] = _difference(_logits(model, tokens[:1]), expected)
            break
        except Exception as error:
            refusal: Any = getattr(error, "inner_exception", error)
            densify(model)
            if not getattr(refusal, "linears", None):
                found["graph_breaks"] = _graph_breaks(model, tokens[:1])
                if not found["graph_breaks"]:
                    raise
                return
            refused |= refusal.linears
            declined |= refusal.linears
    sparsify(model, uniform(calibration, 0.0, exclude=refused), prefill="all", executor="eager")
    found["exact"] = _difference(_logits(model, tokens[:1]), dense)
    sparse = [{site.name for site in context.sites if site.sparse} for context in contexts]
    rewritten = set.intersection(*sparse) if sparse else set()
    declined |= {name: "not in every graph" for name in schedule.linears if name not in rewritten}
    decode = sum(context.phase == "decode" for context in contexts)
    found |= {"rewritten": len(rewritten), "prompt_graphs": len(contexts) - decode, "decode_graphs": decode}


def _oracle(model: nn.Module, schedule: Schedule, tokens: Tensor) -> Tensor:
    """Logits of a dense model whose weak channels are zeroed as they come in: what the sparsified one must equal."""
    linears = {name: each for name, each in find_linears(model).items() if name in schedule.linears}
    thresholds = {
        name: schedule.linears[name].channel_thresholds(channel_norms(each.weight, schedule.norm))
        for name, each in linears.items()
    }

    def drop(name: str, x: Tensor) -> Tensor:
        return x.masked_fill(x.abs() <= thresholds[name], 0)

    with looking_at_inputs(linears, drop):
        return _logits(model, tokens)


@torch.no_grad()
def _logits(model: Any, tokens: Tensor) -> Tensor:
    """Logits [NEW, V] of a prompt's last token and of the given tokens after it, decoded with the model's own cache."""
    forced = tokens[0].tolist()
    result = model.generate(
        tokens[:, :_PROMPT],
        attention_mask=torch.ones_like(tokens[:, :_PROMPT]),
        max_new_tokens=_NEW,
        min_new_tokens=_NEW,
        use_cache=True,
        do_sample=False,
        prefix_allowed_tokens_fn=lambda _, ids: [forced[len(ids)]],
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.cat(result.logits).float()


def _difference(found: Tensor, expected: Tensor) -> float:
    difference = float((found - expected).abs().max() / expected.abs().max())
    return difference if difference == difference else float("inf")


def _dense(model: nn.Module, tokens: Tensor) -> tuple[Tensor, list[str]]:
    """Logits of a dense model, and the Linears of its body whose module is not called on the way."""
    linears = body_linears(model)
    called: set[str] = set()

    def note(name: str, x: Tensor) -> None:
        called.add(name)

    with looking_at_inputs(linears, note):
        logits = _logits(model, tokens)
    return logits, [name for name in linears if name not in called]


def _graph_breaks(model: nn.Module, tokens: Tensor) -> tuple[str, ...]:
    """Why Dynamo can't take the dense model as one graph; empty if it can."""
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    model._compiled_call_impl = torch.compile(model._call_impl, backend="eager", dynamic=True)  # type: ignore[attr-defined]
    try:
        _logits(model, tokens)
    except Exception as error:
        return (_first_line(error),)
    return tuple(_break_reason(reason) for reason in counters["graph_break"])


def _break_reason(text: str) -> str:
    """The headline of Dynamo's account and its explanation."""
    explanation = re.search(r"^\s*Explanation: (.*)$", text, re.MULTILINE)
    return ": ".join([_first_line(text), *([explanation[1]] if explanation else [])])


@contextlib.contextmanager
def _observing(observer: Callable[[Context], None]) -> Iterator[None]:
    observers.append(observer)
    try:
        yield
    finally:
        observers.remove(observer)


def _first_line(error: object) -> str:
    text = str(error).strip() or type(error).__name__
    prefix = f"{type(error).__name__}: " if isinstance(error, Exception) else ""
    return prefix + text.splitlines()[0][:300]


__all__ = ["TOLERANCE", "Coverage", "candidates", "cover"]
