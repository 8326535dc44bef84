"""Which causal LM and multimodal classes of transformers are covered: each is built small, sparsified and compared.

`candidates` says which classes are meant, `cover` tries one of them. It decodes given tokens after a prompt, every
token sparse, and compares logits: at 0 % with the dense model's, at 50 % with those of the same model with the dropped
channels set to zero by forward hooks. What each Linear did in each call of the model is noted. Nothing is compiled for
that; how many graphs `torch.compile` makes is looked at afterwards. Then the same is compared with a static cache, with
every kind of rotary embedding that the class takes, and with an image in the prompt.
"""

import re
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from was_fx.compat.dynamo import noting_graph_breaks, settings_for_models
from was_fx.coverage.decoding import TOKENS, difference, logits, oracle
from was_fx.coverage.full_size import full_size
from was_fx.coverage.tiny_models import tiny_model
from was_fx.coverage.variants import differences
from was_fx.kernels.parts.served import noting_served
from was_fx.measure.calibrate import calibrate
from was_fx.measure.realised import counting
from was_fx.modules.auto_class import auto_class
from was_fx.modules.linears import (
    body_linears,
    dense_expert_parameters,
    find_linears,
    looking_at_inputs,
)
from was_fx.modules.text_decoder import takes_more_than_text
from was_fx.modules.weights_read import noting_reads
from was_fx.passes.graph.context import Context
from was_fx.passes.pipeline import observers
from was_fx.schedules.experts import group_of, groups
from was_fx.schedules.files.schedule import Schedule
from was_fx.schedules.search.uniform import uniform
from was_fx.sparse.sparsify import densify, prompts_treated, sparsify

TOLERANCE = 1e-4
_TARGET = 0.5

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
_OTHERS = {
    "diffusion_gemma": "a diffusion model; it does not decode from left to right",
    "pi0": "makes actions of a robot, not text",
    "vision-encoder-decoder": "the decoder of an encoder-decoder model",
    "evolla": "listed for AutoModelForImageTextToText, which doesn't load it",
}
_MASKED = "an encoder family (masked LM), whose causal head needs is_decoder=True"
_ENCODER_DECODER = "the decoder of an encoder-decoder model"


@dataclass(frozen=True)
class Coverage:
    """What was found for one model type.

    Attributes:
        model_type: as in transformers' configurations.
        model_class: name of the class.
        multimodal: it takes more than text; Linears are those of its text decoder and its head.
        linears: Linears of the model, its head among them; the experts of a parameter count as one.
        sparse: Linears whose sparse product was made wherever they were called: in the prompt, and in each decode step
            after a dense prompt.
        by_model: qualified names of the Linears whose weight the model multiplies by itself, without a call of their
            module, as it does with parameters that no Linear holds. They stay dense.
        by_model_share: of the weight bytes of a token in a model of full size; None if that one can't be built.
        declined: reason by qualified name, for every other Linear but the head that is not sparse.
        experts: qualified names of the weights held as 3-D parameters that stay dense.
        share: of the weight bytes of a token that lie in Linears found sparse here, in the model that the type's
            default configuration describes, of which a token reads the experts that it is sent to; None if that one
            can't be built.
        billions: parameters of that model.
        experts_dense: share of those bytes in `experts`.
        decode_steps: calls after the prompt that were taken for decode steps; 0 if each is a prompt again, because the
            model has no cache, or is given all tokens in spite of it.
        prompt_graphs: graphs that `torch.compile` makes of the prompt; 0 also if nothing was compiled.
        decode_graphs: graphs of the steps after it; more than one where a sliding window fills up.
        graph_breaks: reasons of graph breaks, or why nothing can be compiled; the modules are right all the same.
        exact: largest difference of logits at 0 % from the dense model's, relative to the largest logit.
        oracle: the same at 50 %, from the model with weak channels zeroed by hooks.
        compiled: the same of the compiled model.
        variants: the same with other caches, rotary embeddings and an image in the prompt, of those that the dense
            model itself takes.
        effect: how far dropping half of the channels moves the logits; a comparison that moves nothing proves nothing.
        error: what went wrong, or nothing.
    """

    model_type: str
    model_class: str
    multimodal: bool = False
    linears: int = 0
    sparse: int = 0
    by_model: tuple[str, ...] = ()
    by_model_share: float | None = None
    declined: dict[str, str] = field(default_factory=dict)
    experts: tuple[str, ...] = ()
    share: float | None = None
    billions: float | None = None
    experts_dense: float = 0.0
    decode_steps: int = 0
    prompt_graphs: int = 0
    decode_graphs: int = 0
    graph_breaks: tuple[str, ...] = ()
    exact: float | None = None
    oracle: float | None = None
    compiled: float | None = None
    variants: dict[str, float] = field(default_factory=dict)
    effect: float | None = None
    error: str = ""

    @property
    def complete(self) -> bool:
        """Every Linear but the head is sparse in prompt and decode steps, wherever it is called, and logits are equal
        to both references."""
        equal = all(each is not None and each <= TOLERANCE for each in (self.exact, self.oracle))
        others = [*self.variants.values(), *([] if self.compiled is None else [self.compiled])]
        equal = equal and all(each <= TOLERANCE for each in others)
        moved = self.effect is not None and self.effect > 100 * TOLERANCE
        return equal and moved and self.sparse > 0 and self.decode_steps > 0 and not (self.error or self.declined)


def candidates() -> dict[str, str | None]:
    """Every model type that transformers maps to a causal LM class or to one for images and text, with the reason why
    it is none that decodes text from left to right, or None if it is one. A class that several types share counts
    once."""
    from transformers.models.auto import modeling_auto as auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    found: dict[str, str | None] = {}
    classes = {**auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, **auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
    for model_type in classes:
        found[model_type] = (_NOT_DECODER_ONLY | _OTHERS).get(model_type)
        if model_type in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES:
            found[model_type] = _MASKED
        if getattr(CONFIG_MAPPING[model_type], "is_encoder_decoder", False):
            found[model_type] = _ENCODER_DECODER
    names = {each: str(classes[each]) for each in found if found[each] is None}
    first: dict[str, str] = {}  # the type that a class is named after comes before others
    for model_type in sorted(names, key=lambda each: not _named_after(names[each], each)):
        same = first.setdefault(names[model_type], model_type)
        found[model_type] = None if same == model_type else f"the same class as {same}"
    return found


def _named_after(name: str, model_type: str) -> bool:
    return name.lower().startswith(re.sub("_text$|[-_]", "", model_type))


def cover(model_type: str, *, graphs: bool = True) -> Coverage:
    """Build a small model of `model_type`, sparsify it and compare; whatever goes wrong is in the result.

    Args:
        model_type: as in transformers' configurations.
        graphs: look at what `torch.compile` makes of it, which takes most of the time.
    """
    name = "unknown"
    found: dict[str, Any] = {"multimodal": auto_class(model_type, whole=True) is not auto_class("")}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the model's own code, and of Dynamo about it
            model = tiny_model(model_type)
            name = type(model).__name__
            found["multimodal"] = takes_more_than_text(model)
            head = [each for each in find_linears(model).values() if each.head]
            found["linears"] = len(groups(body_linears(model))) + len(head)
            found["experts"] = tuple(dense_expert_parameters(model))
            compared = _compare(model, found)
            if compared is not None:
                schedule, expected = compared
                found["variants"] = differences(model_type, densify(model), schedule)
                if graphs:
                    sparsify(model, schedule, prefill="all")
                    _compile(model, expected, found)
            found |= full_size(model_type, found["declined"], found["by_model"])
    except Exception as error:
        found["error"] = _first_line(error)
    return Coverage(model_type, name, **found)


def _compare(model: nn.Module, found: dict[str, Any]) -> tuple[Schedule, Tensor] | None:
    """Fill `found` with the fields of `Coverage` as they become known; the schedule at 50 %, and what it must give."""
    try:
        dense, unreached = _dense(model)
        by_model = _multiplied_by_model(model, unreached)
    except Exception as error:
        raise RuntimeError(f"the dense model itself can't generate: {_first_line(error)}") from error
    reason = "no token of a text reaches it" if found["multimodal"] else "its module is never called"
    declined = found["declined"] = {name: reason for name in unreached if name not in by_model}
    found["by_model"] = tuple(by_model)
    calibration = calibrate(model, TOKENS, exclude=unreached)
    for _ in range(2):  # again without what ran dense, so that the others are compared
        schedule = uniform(calibration, _TARGET, exclude=[name for name in declined if name not in unreached])
        expected = oracle(model, schedule)
        found["effect"] = difference(expected, dense)
        sparsify(model, schedule, prefill="all")
        with _noting_calls(model) as sparse_calls:
            found["oracle"] = difference(logits(model), expected)
        with prompts_treated(model, "dense"), _noting_calls(model) as calls:
            logits(model)
        steps = [called for called, ran_dense in calls[1:] if ran_dense != called]
        judged = [*sparse_calls[:1], *(calls[1:] if steps else [])]
        refused = set().union(*(ran_dense for _, ran_dense in judged))
        found |= {"decode_steps": len(steps), "sparse": len(groups(schedule.linears)) - len(refused)}
        if not refused:
            break
        declined |= dict.fromkeys(sorted(refused), "it is called, and no sparse product is made")
        densify(model)
    else:
        return None
    sparsify(model, uniform(calibration, 0.0, exclude=set(declined) - set(unreached)), prefill="all")
    found["exact"] = difference(logits(model), dense)
    return schedule, expected


def _compile(model: Any, expected: Tensor, found: dict[str, Any]) -> None:
    """What torch.compile makes of the sparsified model; it stays compiled."""
    contexts: list[Context] = []
    torch.compiler.reset()
    model.compile(backend="was", dynamic=True, options={"lowering": "eager"})
    observers.append(contexts.append)
    try:
        with settings_for_models(), noting_graph_breaks() as breaks:
            found["compiled"] = difference(logits(model), expected)
    except Exception as error:
        breaks = [_first_line(error)]
    finally:
        observers.remove(contexts.append)
    contexts = [each for each in contexts if each.counts["sparse"]]  # Dynamo makes some of the hooks on the model, too
    decode = sum(context.decode for context in contexts)
    found |= {"prompt_graphs": len(contexts) - decode, "decode_graphs": decode}
    found["graph_breaks"] = tuple(_break_reason(reason) for reason in breaks)


@contextmanager
def _noting_calls(model: Any) -> Iterator[list[tuple[set[str], set[str]]]]:
    """Of each call of a sparsified model while the context lasts: the names of the scheduled Linears (or groups of
    experts) whose modules were called, and of those without a sparse product."""
    scheduled = model._was_state.schedule.linears
    linears = {name: each for name, each in find_linears(model).items() if name in scheduled}
    by_module: dict[nn.Module, set[str]] = {}
    for name, linear in linears.items():
        by_module.setdefault(linear.module, set()).add(group_of(name))
    calls: list[tuple[set[str], set[str]]] = []
    now: set[str] = set()

    def after(*_: object) -> None:
        tokens = counts.realised().tokens
        weights = {weight for each in served for weight in each.weights}
        made = (name for name, each in linears.items() if tokens.get(name) and each.matrix.data_ptr() in weights)
        sparse = {group_of(name) for name in made}
        calls.append((set(now), now - sparse))
        now.clear()
        served.clear()
        counts.reset()

    def before(module: nn.Module, _: object) -> None:
        now.update(by_module[module])

    with counting(model) as counts, noting_served() as served:
        handles = [module.register_forward_pre_hook(before) for module in by_module]
        handles.append(model.register_forward_hook(after))
        try:
            yield calls
        finally:
            for handle in handles:
                handle.remove()


def _dense(model: nn.Module) -> tuple[Tensor, list[str]]:
    """Logits of a dense model, and the Linears (or groups of experts) of its body that are not called on the way."""
    linears = body_linears(model)
    called: set[str] = set()
    with looking_at_inputs(linears, lambda name, _: called.add(group_of(name))):
        found = logits(model)
    return found, [group for group in groups(linears) if group not in called]


def _multiplied_by_model(model: nn.Module, uncalled: Collection[str]) -> list[str]:
    """Those of the Linears (or groups of experts) that are not called whose weight the model reads all the same."""
    linears = {name: each for name, each in body_linears(model).items() if group_of(name) in uncalled}
    if not linears:
        return []
    with noting_reads(linears) as read:
        logits(model)
    return list(groups(name for name in linears if name in read))


def _break_reason(text: str) -> str:
    """The headline of Dynamo's account and its explanation."""
    explanation = re.search(r"^\s*Explanation: (.*)$", text, re.MULTILINE)
    return ": ".join([_first_line(text), *([explanation[1]] if explanation else [])])


def _first_line(error: object) -> str:
    text = str(error).strip() or type(error).__name__
    prefix = f"{type(error).__name__}: " if isinstance(error, Exception) else ""
    return prefix + text.splitlines()[0][:300]
