"""The Linears of a model, seen alike whatever module class holds them."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from was_fx.compat.dynamo import WRAPPED
from was_fx.kernels.quantized.rows import QuantizedRows
from was_fx.modules.experts import expert_names, is_experts, running_by_hand
from was_fx.modules.quantized_experts import QuantizedExperts, is_quantized, rows_of
from was_fx.modules.quantized_linear import QuantizedLinear
from was_fx.modules.text_decoder import TextDecoder, refuse_encoder_decoder
from was_fx.modules.weights import is_sharded

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True, eq=False)
class LinearModule:
    """A Linear y = x Wᵀ + b of a model.

    Attributes:
        name: qualified name of the module.
        module: `nn.Linear`, a subclass of it, or transformers' `Conv1D`.
        input_major: the parameter is Wᵀ [K, N] (Conv1D), not W [N, K].
        head: it computes the logits (the model's output embedding).
        held: the attribute of the module that holds the weight.
        expert: which matrix of a 3-D parameter it is; None where the weight is a parameter of its own.
    """

    name: str
    module: nn.Module
    input_major: bool
    head: bool
    held: str = "weight"
    expert: int | None = None

    @property
    def rows(self) -> QuantizedRows | None:
        """The weight, if it is quantised."""
        if self.expert is not None:
            quantised = is_quantized(self.module, self.held)
            return rows_of(self.module, self.held, self.expert) if quantised else None
        return self.module.was_rows if isinstance(self.module, QuantizedLinear) else None

    @property
    def parameter(self) -> Tensor:
        """What the module holds the weight in: its Parameter, or the codes of a quantised one. Experts share it."""
        module: Any = self.module
        if self.expert is not None and is_quantized(module, self.held):
            return getattr(module, f"{self.held}_codes")
        return module.codes if isinstance(module, QuantizedLinear) else getattr(module, self.held)

    @property
    def matrix(self) -> Tensor:
        """Its own part of the parameter: a view."""
        return self.parameter if self.expert is None else self.parameter[self.expert]

    @property
    def weight(self) -> Tensor:
        """W [N, K]: a view, or the dequantised weight, made anew."""
        if self.expert is not None and self.rows is not None:
            return self.rows.dequantize(self.module.was_like.dtype).t()  # type: ignore[union-attr,arg-type]
        weight = getattr(self.module, self.held)
        if self.expert is not None:
            weight = weight[self.expert]
        return weight.t() if self.input_major else weight

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        if self.rows is not None:
            return self.rows.shape
        n, k = self.weight.shape
        return n, k

    @property
    def nbytes(self) -> int:
        """Bytes of the weight."""
        return self.matrix.numel() * self.matrix.element_size() if self.rows is None else self.rows.nbytes


def find_linears(model: nn.Module) -> dict[str, LinearModule]:
    """Every Linear of a model by qualified name, the head included.

    A Linear that adapters of PEFT wrap keeps the name it has without them, and the adapters' own are left out, so a
    schedule of the model fits it with and without adapters; so do the Linears of a part that torch.compile wraps.

    Raises:
        ValueError: the model has none, or wraps the one that has.
    """
    inner = getattr(model, "get_base_model", None)
    if inner is not None and inner() is not model:
        raise ValueError(
            f"{type(model).__name__} wraps a model with adapters; give that model instead, which keeps its adapters: "
            "model.get_base_model()"
        )
    head = embedding(model, "get_output_embeddings")
    found = {}
    for name, module in _modules_without_adapters(model):
        if isinstance(module, QuantizedLinear):
            found[name] = LinearModule(name, module, module.was_input_major, module is head)
            continue
        if isinstance(module, QuantizedExperts) or is_experts(module):
            found |= _experts(name, module)
            continue
        weight = getattr(module, "weight", None)
        if not (isinstance(module, nn.Linear) or is_conv1d(module)) or not isinstance(weight, Tensor):
            continue
        stored = unsupported_format(weight)
        if stored is not None:
            raise ValueError(_no_plain_weights(f"{name} is stored as {stored}", model))
        if weight.dim() == 2 and weight.is_floating_point() and computes_product(module):
            found[name] = LinearModule(name, module, is_conv1d(module), module is head)
    if not any(not linear.head for linear in found.values()) and quantised_by(model):
        raise ValueError(_no_plain_weights(f"the weights of {type(model).__name__} are quantised", model))
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no Linear with a floating-point weight; "
            "expected a causal LM such as AutoModelForCausalLM.from_pretrained(...) returns"
        )
    return found


def _experts(path: str, module: Any) -> dict[str, LinearModule]:
    return {
        name: LinearModule(name, module, module.is_transposed, False, held, expert)
        for name, (held, expert) in expert_names(path, module).items()
    }


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' `Conv1D`, a Linear that stores Wᵀ [K, N]."""
    return hasattr(module, "nf") and any(kind.__name__ == "Conv1D" for kind in type(module).__mro__)


def unsupported_format(weight: Tensor) -> str | None:
    """How a weight is stored, if not as plain floating-point numbers that a Linear can be multiplied with."""
    if type(weight) not in (Tensor, nn.Parameter) and not is_sharded(weight):
        return f"a {type(weight).__name__}"
    if weight.dtype not in _DTYPES:
        return str(weight.dtype)
    return None


def _no_plain_weights(what: str, model: nn.Module) -> str:
    method = quantised_by(model)
    by = f" by {method}" if method else ""
    return (
        f"{what}{by}, and was-fx needs weights in bf16, fp16 or fp32: load the checkpoint without quantisation, or "
        f"call model.dequantize() first where {type(model).__name__} has it"
    )


@torch.no_grad()
def computes_product(module: nn.Module) -> bool:
    """Whether a Linear's class computes x Wᵀ + b; tried on one input where the class has a forward of its own."""
    kind = type(module)
    if kind.forward is nn.Linear.forward or is_conv1d(module) or getattr(kind, "was_product", False):
        return True
    weight: Any = module.weight
    if weight.is_meta or is_sharded(weight):  # nothing to try with
        return _computes_product.get(kind, True)
    if kind not in _computes_product:
        _computes_product[kind] = _try_product(module)
    return _computes_product[kind]


_computes_product: WeakKeyDictionary[type, bool] = WeakKeyDictionary()


def _try_product(module: Any) -> bool:
    weight = module.weight
    x = torch.linspace(-1, 1, 2 * weight.shape[1], device=weight.device).view(2, -1).to(weight.dtype)
    expected = torch.nn.functional.linear(x, weight, getattr(module, "bias", None))
    try:
        y = type(module).forward(module, x)
    except Exception:
        return False  # it takes other arguments, or other inputs
    return isinstance(y, Tensor) and y.shape == expected.shape and torch.allclose(y, expected, rtol=1e-2, atol=1e-2)


def quantised_by(model: nn.Module) -> str:
    """The quantisation method that a model's configuration names, or ""."""
    config: Any = getattr(getattr(model, "config", None), "quantization_config", None)
    method = config.get("quant_method", "") if isinstance(config, dict) else getattr(config, "quant_method", "")
    return str(getattr(method, "value", method))


def body_linears(model: nn.Module) -> dict[str, LinearModule]:
    """The Linears that are scheduled by default: all but the head; of a multimodal model, those of its text decoder.

    Raises:
        ValueError: there are none, or the model is an encoder-decoder model.
    """
    refuse_encoder_decoder(model)
    decoder = TextDecoder(model)
    found = {name: each for name, each in find_linears(model).items() if not each.head and decoder.holds(name)}
    if not found:
        raise ValueError(f"{type(model).__name__} has no Linear besides its head; there is nothing to make sparse")
    return found


def head_linears(model: nn.Module) -> dict[str, LinearModule]:
    """The output head of a model by its qualified name; empty where none is a Linear."""
    return {name: linear for name, linear in find_linears(model).items() if linear.head}


def outside_decoder(model: nn.Module) -> tuple[list[str], float]:
    """Of a multimodal model: the Linears outside of its text decoder but for the head, and the share of all weight
    bytes that lies outside. They work on images or audio, once in a prompt; a decode step does not read them."""
    decoder, linears = TextDecoder(model), find_linears(model)
    heads = {id(linear.parameter) for linear in linears.values() if linear.head}
    named = [(name, each.nbytes) for name, each in model.named_parameters() if id(each) not in heads]
    outside = sum(size for name, size in named if not decoder.holds(name))
    everything = sum(each.nbytes for each in model.parameters())
    names = [name for name, each in linears.items() if not each.head and not decoder.holds(name)]
    return names, outside / everything if everything else 0.0


def experts_per_token(model: nn.Module) -> int | None:
    """How many experts a token is sent to, by the model's configuration; None where it doesn't say."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    return getattr(config, "num_experts_per_tok", None)


def expert_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Matrices that are held together as parameters [E, N, K] or [E, K, N], by qualified name: experts, and gates of
    some recurrent blocks. Of a multimodal model, those of its text decoder."""
    decoder = TextDecoder(model)
    return {
        f"{name}.{each}" if name else each: parameter
        for name, module in model.named_modules()
        if not isinstance(module, (nn.Conv1d, nn.ConvTranspose1d)) and decoder.holds(f"{name}.")
        for each, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3
        and min(parameter.shape) > 1
        and parameter.shape[0] == getattr(module, "num_experts", parameter.shape[0])
    }


def dense_expert_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Those of `expert_parameters` that no Linear lies in: they are not scheduled, and stay dense."""
    read = {id(linear.parameter) for linear in find_linears(model).values()}
    return {name: each for name, each in expert_parameters(model).items() if id(each) not in read}


def dense_expert_share(model: nn.Module) -> float:
    """Share of the weight bytes of a decode step that lies in `dense_expert_parameters`."""
    experts = _expert_bytes(model, {id(parameter) for parameter in dense_expert_parameters(model).values()})
    return experts / weight_bytes_per_token(model) if experts else 0.0


def bytes_per_token(model: nn.Module, linear: LinearModule) -> float:
    """Bytes of a Linear's weight that a token reads: of an expert's, in the mean over the experts."""
    if linear.expert is None:
        return linear.nbytes
    count = linear.parameter.shape[0]
    return linear.nbytes * min(experts_per_token(model) or count, count) / count


def byte_share(model: nn.Module, linears: Iterable[LinearModule]) -> float:
    """Share of the weight bytes of a decode step that lies in some of a model's Linears."""
    return sum(bytes_per_token(model, linear) for linear in linears) / weight_bytes_per_token(model)


def weight_bytes_per_token(model: nn.Module, linears: Iterable[LinearModule] | None = None) -> int:
    """Bytes of weights that one dense decode step reads: every parameter except input embeddings, of which it reads
    a row only, unless the head shares them, except the experts that a token is not sent to, and of a multimodal model
    except what lies outside of its text decoder and its head.

    Args:
        model: any model.
        linears: its Linears, if they are known already.
    """
    linears = list(find_linears(model).values()) if linears is None else list(linears)
    read = {id(linear.parameter) for linear in linears}
    embeddings = {id(m._parameters.get("weight")) for m in model.modules() if isinstance(m, nn.Embedding)} - read
    experts = {id(parameter) for parameter in expert_parameters(model).values()}
    decoder, heads = TextDecoder(model), {id(linear.parameter) for linear in linears if linear.head}
    inside = [p for name, p in model.named_parameters() if decoder.holds(name) or id(p) in heads]
    others = [p for p in inside if id(p) not in embeddings | experts]
    rows = [linear for linear in linears if linear.rows is not None and (linear.head or decoder.holds(linear.name))]
    quantised = sum(bytes_per_token(model, linear) for linear in rows)
    return round(sum(p.numel() * p.element_size() for p in others) + quantised + _expert_bytes(model, experts))


def _expert_bytes(model: nn.Module, experts: Collection[int]) -> int:
    """Bytes that a token reads of the parameters with these ids: those of the experts that it is sent to."""
    chosen = experts_per_token(model)
    parameters = [parameter for parameter in model.parameters() if id(parameter) in experts]
    return sum(min(chosen or p.shape[0], p.shape[0]) * p[0].numel() * p.element_size() for p in parameters)


@contextmanager
def looking_at_inputs(
    linears: Mapping[str, LinearModule], look: Callable[[str, Tensor], Tensor | None]
) -> Iterator[None]:
    """Call `look(name, x)` with the input x [..., K] of each Linear before it runs, while the context lasts.

    A tensor that it returns takes the place of x. An expert's x [P, K] holds the tokens that are sent to it, and it is
    not called for those that get none.
    """

    def hook(name: str, module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        x, *others = arguments
        replaced = look(name, x)
        return None if replaced is None else (replaced, *others)

    with ExitStack() as stack:
        experts: dict[nn.Module, dict[tuple[str, int], str]] = {}
        for name, linear in linears.items():
            if linear.expert is not None:
                experts.setdefault(linear.module, {})[linear.held, linear.expert] = name
                continue
            handle = linear.module.register_forward_pre_hook(partial(hook, name))
            stack.callback(handle.remove)
        for module, names in experts.items():
            stack.enter_context(
                running_by_hand(module, partial(_matrix, module), partial(_look_at_expert, look, names))
            )
        yield


def _matrix(module: Any, held: str, expert: int) -> Tensor:
    return LinearModule("", module, module.is_transposed, False, held, expert).weight


def _look_at_expert(
    look: Callable[[str, Tensor], Tensor | None],
    names: Mapping[tuple[str, int], str],
    held: str,
    expert: int,
    x: Tensor,
) -> Tensor | None:
    name = names.get((held, expert))
    return None if name is None else look(name, x)


@contextmanager
def dropping(
    linears: Mapping[str, LinearModule],
    thresholds: Mapping[str, Tensor | None],
    *,
    first: int | Callable[[Tensor], int] = 0,
    look: Callable[[str, Tensor], None] | None = None,
    dropped: Callable[[str, Tensor], None] | None = None,
) -> Iterator[None]:
    """Zero the weak channels of each Linear's input while the context lasts: the meaning of a schedule, by hooks.

    Args:
        linears: by qualified name.
        thresholds: t [K] fp32 by qualified name; None drops nothing.
        first: leading tokens of each sequence that keep every channel, a number or a function of the input; inputs
            [rows, K], as those of experts, have none.
        look: called first, with the name and the input x [..., K] of the other tokens.
        dropped: called with the name and a mask [..., K] of what is dropped.
    """

    def zero(name: str, x: Tensor) -> Tensor | None:
        leading = 0 if x.dim() < 3 else first(x) if callable(first) else first
        if look is not None:
            look(name, x[:, leading:] if leading else x)
        threshold = thresholds[name]
        if threshold is None:
            return None
        weak = x.abs() <= threshold
        if leading:
            weak[:, :leading] = False
        if dropped is not None:
            dropped(name, weak)
        return x.masked_fill(weak, 0)

    with looking_at_inputs(linears, zero):
        yield


def _modules_without_adapters(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules by qualified name, with what an adapter layer of PEFT wraps (its `base_layer`) in the adapter's place."""
    adapted: list[str] = []
    for name, module in model.named_modules():
        if isinstance(getattr(module, "base_layer", None), nn.Module):
            adapted.append(name)
        inside = [outer for outer in adapted if name.startswith(f"{outer}.")]
        if not inside or name == f"{inside[-1]}.base_layer":
            yield plain_name(name), module


def plain_name(name: str) -> str:
    """The qualified name that a module has without what wraps it or a part of the model that it is in."""
    return ".".join(part for part in name.split(".") if part not in ("base_layer", *WRAPPED))


def embedding(model: nn.Module, getter: str) -> nn.Module | None:
    """What a model of transformers answers; None for any other module."""
    get: Any = getattr(model, getter, None)
    return get() if get is not None else None
