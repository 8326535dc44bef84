"""Linears of checkpoints that other libraries quantised, read back: as rows of int8 where that loses nothing, else as
plain numbers.

int8 with one scale for each output (torchao, compressed-tensors W8, bitsandbytes LLM.int8, quanto) is what rows of
int8 hold, so its codes are only moved. Everything else (groups along the input channels, zero points, nf4, fp8, …) is
dequantised once. Nothing here quantises activations, so what a format does to those is left out.

Each library is asked to dequantise its own weights; it is installed wherever such a module exists, and is imported
only then. A format without a reader of its own is multiplied with the identity by its own kernel, which gives Wᵀ on
any device that the model runs on.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from was_fx.compat.quantizers import CONFIG_MARKS, MODEL_MARKS
from was_fx.kernels.quantized.rows import QuantizedRows, check_rows, pack_int8

_PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
_PIECE = 1024  # rows of the identity that are multiplied at a time

# What a model and its configuration remember of how it was quantised.
_MARKS = (
    "hf_quantizer",
    "quantization_method",
    *MODEL_MARKS,
    "is_loaded_in_8bit",
    "is_loaded_in_4bit",
    "quantize_config",
    "hqq_quantized",
)
_CONFIG_MARKS = ("quantization_config", *CONFIG_MARKS)

_OTHERWISE = "load it on a device where the quantised model itself runs, or load the unquantised checkpoint"
# By library: a way to load the checkpoint such that it can be read.
_WAYS_OUT = {
    "compressed_tensors": "load it with quantization_config=CompressedTensorsConfig(dequantize=True)",
    "gptqmodel": 'load it with backend="torch" in its GPTQConfig or AwqConfig, or load the unquantised checkpoint',
    "transformers": f"load it with dequantize=True in its quantization_config where that has it, or {_OTHERWISE}",
}


def foreign_linears(model: nn.Module) -> dict[str, nn.Module]:
    """The Linears of a model that hold weights which another library quantised, by qualified name."""
    return {name: module for name, module in model.named_modules() if _reader_of(module) is not None}


@torch.no_grad()
def read_foreign(name: str, module: nn.Module, dtype: torch.dtype) -> QuantizedRows | Tensor | None:
    """The weight of a Linear that another library quantised; the module is left as it is.

    Args:
        name: qualified name, for errors.
        module: any module.
        dtype: floating dtype of a weight that is dequantised.

    Returns:
        Rows of int8 that hold the weight without loss, W [N, K] dequantised, or None for a module that is no such
        Linear.

    Raises:
        ValueError: names the format and what to do.
    """
    reader = _reader_of(module)
    if reader is None:
        return None
    if any(tensor.is_meta for tensor in _own_tensors(module)):
        raise ValueError(
            f"{name} is stored as {_format(module)} and offloaded, so it has no values now; load the model so that "
            "it fits the memory of its devices"
        )
    try:
        read = reader.read(module, dtype)
        _check(name, read, _shape(module))
    except Exception as error:  # whatever a library raises on what it did not write
        said = str(error).strip().splitlines()
        reason = said[0] if said else type(error).__name__
        raise ValueError(
            f"{name} is stored as {_format(module)}, which can't be read: {reason}; {_way_out(module)}"
        ) from error
    return read


def make_plain(model: nn.Module, name: str, weight: Tensor) -> nn.Linear:
    """Put an `nn.Linear` with the weight W [N, K] in place of the module `name`, which keeps its bias.

    The weight keeps its dtype and device, and the bias takes them. Neither requires a gradient.
    """
    module = model.get_submodule(name)
    bias = getattr(module, "bias", None)
    outputs, channels = weight.shape
    with torch.device("meta"):
        plain = nn.Linear(channels, outputs, bias=bias is not None)
    plain.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        plain.bias = nn.Parameter(bias.detach().to(weight.device, weight.dtype), requires_grad=False)
    model.set_submodule(name, plain.train(module.training))
    return plain


def drop_quantizer_marks(model: nn.Module) -> None:
    """Make a model whose quantised Linears were all replaced forget its quantiser, so that it is saved as it is now.

    Also takes off what would act on the replaced modules later, such as the hook of compressed-tensors.
    """
    hook = getattr(model, "ct_decompress_hook", None)
    if hook is not None:
        hook.remove()
        del model.ct_decompress_hook
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if not hasattr(config, "get_text_config"):
            continue
        _delete(module, _MARKS)
        _delete(config, _CONFIG_MARKS)
        _delete(config.get_text_config(), _CONFIG_MARKS)
        if hasattr(module, "is_quantized"):
            setattr(module, "is_quantized", False)  # noqa: B010 - a checker takes it for a tensor


def _delete(thing: Any, names: tuple[str, ...]) -> None:
    for name in names:
        if name in vars(thing):
            delattr(thing, name)


@dataclass(frozen=True)
class _Reader:
    """How to tell the Linears of one format, and to read their weight."""

    holds: Callable[[Any], bool]
    read: Callable[[Any, torch.dtype], QuantizedRows | Tensor]


def _reader_of(module: nn.Module) -> _Reader | None:
    if any(kind.__module__.startswith("was_fx.") for kind in type(module).__mro__):
        return None  # quantised by this library
    return next((reader for reader in _READERS if reader.holds(module)), None)


# torchao: an nn.Linear whose weight is a tensor subclass.


def _is_torchao(module: Any) -> bool:
    return isinstance(module, nn.Linear) and _library(getattr(module, "weight", None)) == "torchao"


def _read_torchao(module: Any, dtype: torch.dtype) -> QuantizedRows | Tensor:
    weight = module.weight
    codes: Any = getattr(weight, "qdata", None)
    scales: Any = getattr(weight, "scale", None)
    zero = getattr(weight, "zero_point", None)
    before = getattr(weight, "act_pre_scale", None)  # [K], multiplies x
    if isinstance(scales, Tensor):
        _check_scales(scales)
    if _by_output(codes, scales, weight.shape) and before is None and (zero is None or not zero.any()):
        return _rows(codes, scales)
    if type(weight).dequantize is Tensor.dequantize:  # such as int4 that is packed for a kernel
        return _by_identity(module, dtype)
    plain = weight.dequantize()
    return plain.to(dtype) if before is None else (plain * before).to(dtype)


# compressed-tensors: an nn.Linear with a scheme, whose tensors the compressor of its format unpacks.


def _is_compressed(module: Any) -> bool:
    scheme = getattr(module, "quantization_scheme", None)
    return isinstance(module, nn.Linear) and getattr(scheme, "weights", None) is not None


def _read_compressed(module: Any, dtype: torch.dtype) -> QuantizedRows | Tensor:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization import QuantizationStatus

    if next(module.children(), None) is not None:
        raise ValueError("its inputs or outputs are transformed, such as by a Hadamard rotation")
    scheme = module.quantization_scheme
    if module.quantization_status == QuantizationStatus.DECOMPRESSED:  # it has run before
        return module.weight.detach().to(dtype)
    compressor = BaseCompressor.get_value_from_registry(scheme.format or infer_module_format(type(module), scheme))
    tensors = {name: tensor.detach() for name, tensor in module.state_dict(keep_vars=True).items()}
    if module.quantization_status < QuantizationStatus.COMPRESSED:  # it is quantised anew whenever it runs
        tensors = compressor.compress(tensors, scheme)
    scales, weights = tensors["weight_scale"], scheme.weights
    if scales.is_floating_point() and scales.element_size() > 1:
        _check_scales(scales)
    integers = getattr(weights.type, "value", weights.type) == "int"
    if integers and weights.symmetric and _one_for_each_output(scales, _shape(module)):
        ones = torch.ones_like(scales, dtype=torch.float32)
        return _rows(compressor.decompress(tensors | {"weight_scale": ones}, scheme)["weight"].to(torch.int8), scales)
    return compressor.decompress(tensors, scheme)["weight"].to(dtype)


# quanto


def _is_quanto(module: Any) -> bool:
    is_linear = isinstance(module, nn.Linear)
    return is_linear and _library(module) == "optimum" and getattr(module, "weight_qtype", None) is not None


def _read_quanto(module: Any, dtype: torch.dtype) -> QuantizedRows | Tensor:
    weight = module.qweight
    codes: Any = getattr(weight, "_data", None)
    scales: Any = getattr(weight, "_scale", None)
    if _by_output(codes, scales, weight.shape):
        return _rows(codes, scales)
    return weight.dequantize().to(dtype)


# bitsandbytes


def _is_bitsandbytes(module: Any) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(module, nn.Linear) and type(weight).__name__ in ("Int8Params", "Params4bit")


def _read_bitsandbytes(module: Any, dtype: torch.dtype) -> QuantizedRows | Tensor:
    from bitsandbytes import functional

    weight = module.weight
    if weight.is_floating_point():  # not quantised yet
        return weight.data.to(dtype)
    if type(weight).__name__ == "Int8Params":
        maxima = weight.SCB if weight.SCB is not None else module.state.SCB  # the first forward moves it
        return _rows(weight.data, maxima / 127)
    state = weight.quant_state if weight.quant_state is not None else module.quant_state
    if getattr(state, "packing_format_for_cpu", False):  # for a kernel, by a forward on a CPU with AVX-512
        return _by_identity(module, dtype)
    return functional.dequantize_4bit(weight.data, state).to(dtype)


# HQQ


def _is_hqq(module: Any) -> bool:
    return _kind(module, "HQQLinear")


def _read_hqq(module: Any, dtype: torch.dtype) -> Tensor:
    scales = module.meta.get("scale")
    if isinstance(scales, Tensor):
        _check_scales(scales)
    return module.dequantize().to(dtype)


# GGUF blocks that transformers left packed


def _is_gguf(module: Any) -> bool:
    return _kind(module, "GgufLinear")


def _read_gguf(module: Any, dtype: torch.dtype) -> Tensor:
    from transformers.integrations.gguf.dequant import dequantize

    outputs, channels = _shape(module)
    plain = dequantize(module.weight.data.flatten(), module.ggml_type, torch.float32).reshape(outputs, channels)
    order = module.input_permutation  # [K]; the module gathers x by it
    if order is not None:
        plain = torch.empty_like(plain).index_copy_(1, order, plain)
    return plain.to(dtype)


# fp8 with a scale for the whole weight, for each output or for each block: FineGrainedFP8, FBGEMM, compressed-tensors


def _is_fp8(module: Any) -> bool:
    weight = getattr(module, "weight", None)
    return (
        isinstance(module, nn.Linear)
        and isinstance(weight, Tensor)
        and weight.dtype in _FP8
        and not _kind(module, "FP8GroupedLinear")  # computes another product, and stays as it is
    )


def _read_fp8(module: Any, dtype: torch.dtype) -> Tensor:
    scales = getattr(module, "weight_scale_inv", getattr(module, "weight_scale", None))
    if not isinstance(scales, Tensor):
        raise ValueError("its fp8 numbers have no scales")
    outputs, channels = _shape(module)
    scales = torch.exp2(scales.float() - 127) if scales.dtype == torch.uint8 else scales.float()  # ue8m0
    block = getattr(module, "block_size", None)
    if scales.numel() in (1, outputs) and block is None:
        scales = scales.reshape(-1, 1)
    else:
        rows, columns = block or (0, 0)
        expected = [-(-outputs // rows), -(-channels // columns)] if rows and columns else [outputs, 1]
        if list(scales.shape) != expected:
            raise ValueError(f"its scales are {list(scales.shape)}, and {expected} were expected")
        scales = scales.repeat_interleave(rows, 0)[:outputs].repeat_interleave(columns, 1)[:, :channels]
    _check_scales(scales, zero=True)
    return (module.weight.float() * scales).to(dtype)


# Anything else: GPTQ and AWQ of gptqmodel, auto-round, EETQ, AQLM, VPTQ, BitNet, Quark, …


def _is_other(module: Any) -> bool:
    weight = getattr(module, "weight", None)
    if "linear" not in type(module).__name__.lower() or _kind(module, "FP8GroupedLinear"):
        return False
    if isinstance(weight, Tensor) and type(weight) in (Tensor, nn.Parameter) and weight.dtype in _PLAIN:
        return False
    return any(tensor.dim() > 1 and tensor.dtype not in (*_PLAIN, torch.bool) for tensor in _own_tensors(module))


def _by_identity(module: Any, dtype: torch.dtype) -> Tensor:
    """W [N, K], column by column: what the module computes of each row of the identity."""
    outputs, channels = _shape(module)
    tensors = _own_tensors(module)
    device = tensors[0].device
    computed = next((tensor.dtype for tensor in tensors if tensor.dtype in _PLAIN), dtype)
    weight = torch.empty(outputs, channels, dtype=dtype, device=device)
    bias = getattr(module, "bias", None)
    if bias is not None:
        module.bias = None
    try:
        for first in range(0, channels, _PIECE):
            columns = slice(first, min(first + _PIECE, channels))
            rows = torch.zeros(columns.stop - first, channels, dtype=computed, device=device)
            rows[:, columns].fill_diagonal_(1)
            weight[:, columns] = module(rows).t()
        x = torch.arange(4 * channels, device=device).sin().view(4, channels).to(computed)
        y, expected = module(x).float(), x.float() @ weight.float().t()
    finally:
        if bias is not None:
            module.bias = bias
    if (y - expected).norm() > 0.05 * expected.norm():
        raise ValueError("its product isn't x Wᵀ, since it rounds or moves the activations too")
    return weight


_READERS = (
    _Reader(_is_torchao, _read_torchao),
    _Reader(_is_compressed, _read_compressed),
    _Reader(_is_quanto, _read_quanto),
    _Reader(_is_bitsandbytes, _read_bitsandbytes),
    _Reader(_is_hqq, _read_hqq),
    _Reader(_is_gguf, _read_gguf),
    _Reader(_is_fp8, _read_fp8),
    _Reader(_is_other, _by_identity),
)


def _rows(codes: Tensor, scales: Tensor) -> QuantizedRows:
    """Rows of codes int8 [N, K] and scales [N], [N, 1] or one for all."""
    scales = scales.reshape(-1).float().expand(codes.shape[0])
    # Some writers give outputs whose weights are all 0 the scale 0; any scale does for those.
    scales = torch.where((scales == 0) & (codes == 0).all(1), 1.0, scales)
    return QuantizedRows(pack_int8(codes.t()), scales.contiguous(), None)


def _by_output(codes: object, scales: object, shape: tuple[int, ...]) -> bool:
    """Whether codes are int8 of that shape, with a scale for each output or one for all."""
    return (
        isinstance(codes, Tensor)
        and isinstance(scales, Tensor)
        and codes.dtype == torch.int8
        and codes.shape == shape
        and _one_for_each_output(scales, shape)
    )


def _one_for_each_output(scales: Tensor, shape: tuple[int, ...]) -> bool:
    return scales.numel() == 1 or (scales.numel() == shape[0] == scales.shape[0])


def _check_scales(scales: Tensor, zero: bool = False) -> None:
    """Refuse scales that no writer makes; `zero`: the writer gives 0 to what is all 0."""
    if not scales.isfinite().all():
        raise ValueError("its scales hold NaN or inf, so the file is corrupt")
    if not (scales.any() if zero else scales.all()):
        raise ValueError("its scales hold 0, so the file is truncated or corrupt")


def _check(name: str, read: QuantizedRows | Tensor, shape: tuple[int, int]) -> None:
    if isinstance(read, QuantizedRows):
        return check_rows(name, read, shape)
    if tuple(read.shape) != shape:
        raise ValueError(f"it gives a weight of {list(read.shape)}, and {list(shape)} was expected")
    if not read.isfinite().all():
        raise ValueError(f"its weight holds NaN or inf in {read.dtype}, so the file is corrupt or needs another dtype")
    if not read.any():
        raise ValueError("every weight is 0, so the file is truncated")
    return None


def _shape(module: Any) -> tuple[int, int]:
    """(N, K)."""
    outputs = getattr(module, "out_features", getattr(module, "outfeatures", None))
    channels = getattr(module, "in_features", getattr(module, "infeatures", None))
    if outputs is None or channels is None:
        raise ValueError("the module doesn't say its in_features and out_features")
    return outputs, channels


def _own_tensors(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers of the module itself."""
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return [tensor for tensor in tensors if isinstance(tensor, Tensor)]


def _kind(module: object, name: str) -> bool:
    """Whether a class of that name is the module's or one of its bases."""
    return any(kind.__name__ == name for kind in type(module).__mro__)


def _library(thing: object) -> str:
    """The top package that the class of a module or tensor is from."""
    return type(thing).__module__.partition(".")[0]


def _format(module: Any) -> str:
    """How a weight is stored, in words."""
    weight = getattr(module, "weight", None)
    if _is_compressed(module):
        scheme = module.quantization_scheme
        return f"compressed-tensors {getattr(scheme.format, 'value', scheme.format)}"
    if _library(module) == "torch":
        return f"{_library(weight)}'s {type(weight).__name__}"
    return f"{_library(module)}'s {type(module).__name__}"


def _way_out(module: Any) -> str:
    library = "compressed_tensors" if _is_compressed(module) else _library(module)
    return _WAYS_OUT.get(library, _OTHERWISE)
