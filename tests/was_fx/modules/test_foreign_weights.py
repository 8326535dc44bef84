"""Checkpoints that other libraries quantised, written by those libraries where they install, else by their layout."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from was_fx.kernels.quantized.rows import QuantizedRows
from was_fx.modules.foreign_weights import drop_quantizer_marks, foreign_linears, make_plain, read_foreign

pytestmark = pytest.mark.filterwarnings("ignore")

HIDDEN, BODY = 128, 7
Q_PROJ = "model.layers.0.self_attn.q_proj"
TOKENS = torch.randint(2, 128, (2, 16), generator=torch.Generator().manual_seed(0))
DENSE = LlamaConfig(
    hidden_size=HIDDEN,
    intermediate_size=256,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=128,
    max_position_embeddings=256,
    initializer_range=0.1,
    tie_word_embeddings=False,
    attention_bias=True,
)


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    """A checkpoint in fp32."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dense")
    model = LlamaForCausalLM(DENSE)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    model.save_pretrained(folder)
    return folder


def load(folder: Path, **kwargs) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32, **kwargs}).eval()


def torchao(kind: str, **arguments) -> Callable[[Path, Path], PreTrainedModel]:
    def made(dense: Path, folder: Path) -> PreTrainedModel:
        quantization = pytest.importorskip("torchao.quantization")
        from transformers import TorchAoConfig

        given = {
            name: getattr(quantization, value[0])(*value[1:]) if isinstance(value, tuple) else value
            for name, value in arguments.items()
        }
        return load(dense, quantization_config=TorchAoConfig(getattr(quantization, kind)(**given)))

    return made


def saved(make: Callable[[Path, Path], PreTrainedModel]) -> Callable[[Path, Path], PreTrainedModel]:
    """What is made, saved and loaded: a quantised checkpoint."""

    def made(dense: Path, folder: Path) -> PreTrainedModel:
        make(dense, folder).save_pretrained(folder)
        return load(folder)

    return made


def bitsandbytes(**arguments) -> Callable[[Path, Path], PreTrainedModel]:
    def made(dense: Path, folder: Path) -> PreTrainedModel:
        pytest.importorskip("bitsandbytes")
        from transformers import BitsAndBytesConfig

        return load(dense, quantization_config=BitsAndBytesConfig(**arguments))

    return made


def quanto(weights: str) -> Callable[[Path, Path], PreTrainedModel]:
    def made(dense: Path, folder: Path) -> PreTrainedModel:
        pytest.importorskip("optimum.quanto")
        from transformers import QuantoConfig

        return load(dense, quantization_config=QuantoConfig(weights=weights))

    return made


def compressed(preset: str, loaded: bool = True, **weights) -> Callable[[Path, Path], PreTrainedModel]:
    """A preset of compressed-tensors, with another layout of its weights if `weights` says so."""

    def made(dense: Path, folder: Path) -> PreTrainedModel:
        pytest.importorskip("compressed_tensors")
        from compressed_tensors.compressors import ModelCompressor
        from compressed_tensors.compressors.format import infer_model_format
        from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config, preset_name_to_scheme

        model = load(dense, dtype=torch.bfloat16)
        scheme = preset_name_to_scheme(preset, ["Linear"])
        scheme.weights = type(scheme.weights)(**{**scheme.weights.model_dump(), **weights})
        config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"])
        apply_quantization_config(model, config)
        for module in model.modules():
            if hasattr(module, "quantization_scheme"):
                observe(module)
        config.format = infer_model_format(model).value
        compressor = ModelCompressor(quantization_config=config)
        if not loaded:
            return model
        compressor.compress_model(model)
        model.save_pretrained(folder)
        compressor.update_config(folder)
        return load(folder, dtype=torch.bfloat16)

    return made


@torch.no_grad()
def observe(module: nn.Module) -> None:
    """Set the scales of a Linear of compressed-tensors by the range of its weights."""
    from compressed_tensors.quantization.utils import calculate_qparams

    weight, scales = module.weight.float(), module.weight_scale
    rows, columns = scales.shape if scales.dim() == 2 else (1, 1)
    high, wide = -(-weight.shape[0] // rows), -(-weight.shape[1] // columns)
    blocks = weight.view(rows, high, columns, wide)
    whole = getattr(module, "weight_global_scale", None)
    if whole is not None:
        whole.fill_(448 * 6 / weight.abs().max())
    made, zero = calculate_qparams(
        blocks.amin((1, 3)), blocks.amax((1, 3)), module.quantization_scheme.weights, global_scale=whole
    )
    scales.copy_(made.view(scales.shape))
    if hasattr(module, "weight_zero_point"):
        module.weight_zero_point.copy_(zero.view(scales.shape))


def replaced(replace: Callable[[nn.Linear], nn.Module]) -> Callable[[Path, Path], PreTrainedModel]:
    """The dense model with other modules in place of its Linears, for what transformers can't load here."""

    def made(dense: Path, folder: Path) -> PreTrainedModel:
        model = load(dense)
        for name, module in list(model.named_modules()):
            if type(module) is nn.Linear and name != "lm_head":
                model.set_submodule(name, replace(module))
        return model

    return made


def hqq(linear: nn.Linear, **config) -> nn.Module:
    quantize = pytest.importorskip("hqq.core.quantize")
    settings = quantize.BaseQuantizeConfig(**{"nbits": 4, "group_size": 64, **config})
    return quantize.HQQLinear(linear, settings, compute_dtype=torch.float32, device="cpu")


def gguf(linear: nn.Linear, kind: str = "Q8_0", shuffled: bool = False) -> nn.Module:
    library = pytest.importorskip("gguf")
    utils = pytest.importorskip("transformers.integrations.gguf.utils")
    number = library.GGMLQuantizationType[kind]
    made = utils.GgufLinear(linear.in_features, linear.out_features, int(number), linear.bias is not None)
    made.weight.data = torch.from_numpy(library.quants.quantize(linear.weight.detach().numpy(), number))
    made.bias = linear.bias
    if shuffled:
        made.input_permutation = torch.randperm(linear.in_features, generator=torch.Generator().manual_seed(0))
    return made


def fp8(linear: nn.Linear, block: tuple[int, int] | None = (96, 48)) -> nn.Module:
    made = pytest.importorskip("transformers.integrations.finegrained_fp8").FP8Linear(
        linear.in_features, linear.out_features, block_size=block, has_bias=linear.bias is not None
    )
    scales = torch.rand(made.weight_scale_inv.shape) + 0.5
    made.weight.data, made.weight_scale_inv.data = linear.weight.detach().to(torch.float8_e4m3fn), scales
    made.bias = linear.bias
    return made


class PackedLinear(nn.Module):
    """A Linear of int4 as GPTQ and AWQ lay it: groups of 32 input channels, eight numbers in an int32.

    GPTQ packs along K and stores zero points less one; AWQ packs along N, in an order of its own.
    """

    def __init__(self, linear: nn.Linear, awq: bool):
        super().__init__()
        self.in_features, self.out_features, self.awq, self.bits = linear.in_features, linear.out_features, awq, 4
        groups = linear.weight.detach().t().unflatten(0, (-1, 32))
        low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
        scales = (high - low) / 15
        zeros = (-low / scales).round().clamp(0 if awq else 1, 15)
        q = (groups / scales + zeros).round().clamp(0, 15).flatten(0, 1).int()
        order = (0, 2, 4, 6, 1, 3, 5, 7) if awq else range(8)
        self.register_buffer("qweight", pack(q, order, 1) if awq else pack(q, order, 0))
        self.register_buffer("qzeros", pack(zeros.flatten(0, 1).int() - (0 if awq else 1), order, 1))
        self.register_buffer("scales", scales.flatten(0, 1).half())
        self.register_buffer("g_idx", torch.arange(self.in_features, dtype=torch.int32) // 32)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        order = (0, 2, 4, 6, 1, 3, 5, 7) if self.awq else range(8)
        q = unpack(self.qweight, order, 1 if self.awq else 0)
        zeros = unpack(self.qzeros, order, 1) + (0 if self.awq else 1)
        groups = self.g_idx.long()
        y = x.float() @ ((q - zeros[groups]) * self.scales.float()[groups])
        return y.to(x.dtype) if self.bias is None else (y + self.bias).to(x.dtype)


class RoundingLinear(PackedLinear):
    """One that rounds activations to a few levels."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward((x * 2).round() / 2)


def pack(numbers: Tensor, order, dim: int) -> Tensor:
    numbers = numbers.numpy() if dim else numbers.numpy().T
    parts = numbers.reshape(numbers.shape[0], -1, 8)[:, :, list(order)].astype(numpy.uint32)
    packed = (parts << (4 * numpy.arange(8, dtype=numpy.uint32))).sum(2, dtype=numpy.uint32).view(numpy.int32)
    return torch.from_numpy(numpy.ascontiguousarray(packed if dim else packed.T))


def unpack(packed: Tensor, order, dim: int) -> Tensor:
    packed = packed if dim else packed.t()
    parts = (packed[..., None] >> (4 * torch.arange(8))) & 15
    numbers = parts[:, :, [list(order).index(i) for i in range(8)]].flatten(1)
    return numbers if dim else numbers.t()


ROWS, PLAIN = QuantizedRows, Tensor
# How a model is made, what its weights are read as, how close its logits stay: those that round activations do so less.
FORMATS = {
    "torchao int8": (torchao("Int8WeightOnlyConfig"), ROWS, 1e-4),
    "torchao int8, saved": (saved(torchao("Int8WeightOnlyConfig")), ROWS, 1e-4),
    "torchao int8, one scale": (torchao("Int8WeightOnlyConfig", granularity=("PerTensor",)), ROWS, 1e-4),
    "torchao int8, groups": (torchao("Int8WeightOnlyConfig", granularity=("PerGroup", 32)), PLAIN, 1e-4),
    "torchao int8 activations": (torchao("Int8DynamicActivationInt8WeightConfig"), ROWS, 0.1),
    "torchao intx int4": (
        torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4, granularity=("PerGroup", 32)),
        PLAIN,
        1e-4,
    ),
    "torchao intx int4, outputs": (
        torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4, granularity=("PerAxis", 0)),
        ROWS,
        1e-4,
    ),
    "torchao fp8": (torchao("Float8WeightOnlyConfig"), PLAIN, 1e-4),
    "bitsandbytes int8": (bitsandbytes(load_in_8bit=True), ROWS, 0.1),
    "bitsandbytes int8, saved": (saved(bitsandbytes(load_in_8bit=True)), ROWS, 0.1),
    "bitsandbytes nf4": (
        bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
        PLAIN,
        0.02,
    ),
    "bitsandbytes fp4, saved": (saved(bitsandbytes(load_in_4bit=True)), PLAIN, 0.02),
    "quanto int8": (quanto("int8"), ROWS, 1e-4),
    "quanto int4": (quanto("int4"), PLAIN, 1e-4),
    "quanto int2": (quanto("int2"), PLAIN, 1e-4),
    "quanto fp8": (quanto("float8"), PLAIN, 1e-4),
    "compressed-tensors W8A16": (compressed("W8A16", strategy="channel", group_size=None), ROWS, 0.02),
    "compressed-tensors W8A16, groups": (compressed("W8A16", group_size=32), PLAIN, 0.02),
    "compressed-tensors W8A8": (compressed("W8A8"), ROWS, 0.1),
    "compressed-tensors W4A16": (compressed("W4A16", group_size=32), PLAIN, 0.02),
    "compressed-tensors W4A16, asymmetric": (compressed("W4A16_ASYM", loaded=False, group_size=32), PLAIN, 0.02),
    "compressed-tensors fp8": (compressed("FP8_DYNAMIC"), PLAIN, 0.1),
    "compressed-tensors fp8 blocks": (compressed("FP8_BLOCK", block_structure=[64, 64]), PLAIN, 0.1),
    "compressed-tensors nvfp4": (compressed("NVFP4A16"), PLAIN, 0.02),
    "compressed-tensors mxfp4": (compressed("MXFP4A16"), PLAIN, 0.02),
    "compressed-tensors mxfp8": (compressed("MXFP8A16"), PLAIN, 0.02),
    "HQQ 8": (replaced(lambda linear: hqq(linear, nbits=8)), PLAIN, 1e-4),
    "HQQ 4": (replaced(hqq), PLAIN, 1e-4),
    "HQQ 3": (replaced(lambda linear: hqq(linear, nbits=3)), PLAIN, 1e-4),
    "GPTQ": (replaced(lambda linear: PackedLinear(linear, awq=False)), PLAIN, 1e-3),
    "AWQ": (replaced(lambda linear: PackedLinear(linear, awq=True)), PLAIN, 1e-3),
}


def plain(read: QuantizedRows | Tensor) -> Tensor:
    return read.dequantize(torch.float32).t().contiguous() if isinstance(read, QuantizedRows) else read


@pytest.mark.parametrize("name", FORMATS)
@torch.no_grad()
def test_formats(name, dense, tmp_path):
    make, kind, tolerance = FORMATS[name]
    model = make(dense, tmp_path / "quantised")
    linears = foreign_linears(model)
    assert len(linears) == BODY
    read = {name: read_foreign(name, module, torch.float32) for name, module in linears.items()}
    assert {type(each) for each in read.values()} == {kind}
    expected = model(TOKENS).logits
    again = read_foreign(Q_PROJ, model.get_submodule(Q_PROJ), torch.float32)
    torch.testing.assert_close(plain(again), plain(read[Q_PROJ]), rtol=1e-2, atol=1e-4)  # some are held otherwise now

    for each, weight in read.items():
        make_plain(model, each, plain(weight).to(model.dtype))
    drop_quantizer_marks(model)
    assert not foreign_linears(model)
    assert (model(TOKENS).logits - expected).norm() < tolerance * expected.norm()

    logits = model.float()(TOKENS).logits
    model.save_pretrained(tmp_path / "plain")
    again = load(tmp_path / "plain")
    assert not hasattr(again.config, "quantization_config")
    assert not hasattr(again, "hf_quantizer")
    torch.testing.assert_close(again(TOKENS).logits, logits, rtol=1e-3, atol=1e-3)


def int8_linear(**changes) -> nn.Linear:
    """A Linear of torchao's int8, with other tensors if `changes` says so."""
    quantization = pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)
    linear = nn.Linear(96, 40)
    quantization.quantize_(linear, quantization.Int8WeightOnlyConfig())
    for name, change in changes.items():
        setattr(linear.weight, name, change(getattr(linear.weight, name)))
    return linear


def int8_bitsandbytes() -> nn.Linear:
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    linear = nn.Linear(96, 64)
    made = bnb.nn.Linear8bitLt(96, 64, has_fp16_weights=False)
    made.weight = bnb.nn.Int8Params(linear.weight.detach(), requires_grad=False, has_fp16_weights=False).to("cpu")
    return made


def test_int8_is_moved_without_loss():
    linear = int8_linear()
    rows = read_foreign("q", linear, torch.bfloat16)
    assert rows.codes.shape == (96, 64)  # padded
    assert torch.equal(rows.codes[:, :40].t(), linear.weight.qdata)
    assert torch.equal(rows.scales, linear.weight.scale.flatten().float())
    torch.testing.assert_close(plain(rows), linear.weight.dequantize(torch.float32), rtol=0, atol=0)


def test_int8_of_bitsandbytes_is_moved_without_loss():
    from_library = pytest.importorskip("bitsandbytes.functional").int8_vectorwise_dequant
    linear = int8_bitsandbytes()
    rows = read_foreign("q", linear, torch.bfloat16)
    assert torch.equal(rows.codes.t(), linear.weight.data)
    torch.testing.assert_close(plain(rows), from_library(linear.weight.data, linear.weight.SCB), rtol=1e-6, atol=0)


def test_outputs_that_are_all_zero_keep_a_scale():
    linear = int8_bitsandbytes()
    linear.weight.data[3], linear.weight.SCB[3] = 0, 0
    rows = read_foreign("q", linear, torch.float32)
    assert rows.scales[3] > 0
    assert not plain(rows)[3].any()


def test_a_scale_of_the_inputs_is_multiplied_in():
    before = torch.rand(96) + 0.5
    linear = int8_linear(act_pre_scale=lambda _: before)
    weight = read_foreign("q", linear, torch.float32)
    torch.testing.assert_close(weight, linear.weight.dequantize() * before)
    x = torch.randn(5, 96)
    torch.testing.assert_close(linear(x), x @ weight.t() + linear.bias, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
@pytest.mark.parametrize("shuffled", [False, True])
def test_packed_gguf(kind, shuffled):
    library = pytest.importorskip("gguf")
    try:
        module = gguf(nn.Linear(64, 48), kind, shuffled)
    except KeyError:
        pytest.skip(f"this transformers does not keep {kind} packed")
    weight = read_foreign("q", module, torch.float32)
    blocks = library.quants.dequantize(module.weight.numpy(), library.GGMLQuantizationType[kind])
    x = torch.randn(3, 64)
    gathered = x[:, module.input_permutation] if shuffled else x
    torch.testing.assert_close(x @ weight.t(), gathered @ torch.from_numpy(blocks).t())


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K"])
def test_packed_gguf_of_superblocks(kind):
    library = pytest.importorskip("gguf")
    utils = pytest.importorskip("transformers.integrations.gguf.utils")
    number = library.GGMLQuantizationType[kind]
    module = utils.GgufLinear(512, 8, int(number))
    blocks = torch.randint(0, 256, module.weight.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    size = library.GGML_QUANT_SIZES[number][1]
    halves = blocks.view(-1, size)[:, slice(0, 4) if kind == "Q4_K" else slice(-2, None)]
    halves.copy_(torch.tensor([0.01, 0.02][: halves.shape[1] // 2]).half().view(torch.uint8))
    module.weight.data = blocks
    expected = torch.from_numpy(library.quants.dequantize(blocks.numpy(), number))
    torch.testing.assert_close(read_foreign("q", module, torch.float32), expected, rtol=1e-5, atol=1e-6)


def test_gguf_that_transformers_dequantises_is_plain(tmp_path):
    """Without the package `kernels`, which needs the hub, transformers dequantises what it loads."""
    library = pytest.importorskip("gguf")
    path = tmp_path / "model.gguf"
    writer = library.GGUFWriter(path, "llama")
    for what, value in {
        "block_count": 1,
        "context_length": 64,
        "embedding_length": 64,
        "feed_forward_length": 96,
        "head_count": 4,
        "head_count_kv": 4,
        "vocab_size": 32,
        "layer_norm_rms_eps": 1e-5,
        "rope_freq_base": 1e4,
    }.items():
        getattr(writer, f"add_{what}")(value)
    shapes = {
        "token_embd": (32, 64),
        "output": (32, 64),
        "output_norm": (64,),
        "blk.0.attn_norm": (64,),
        "blk.0.ffn_norm": (64,),
        "blk.0.ffn_gate": (96, 64),
        "blk.0.ffn_up": (96, 64),
        "blk.0.ffn_down": (64, 96),
    }
    shapes |= {f"blk.0.attn_{part}": (64, 64) for part in ("q", "k", "v", "output")}
    random = numpy.random.default_rng(0)
    for name, shape in shapes.items():
        numbers = random.normal(size=shape).astype(numpy.float32)
        if len(shape) == 2:
            kind = library.GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{name}.weight", library.quants.quantize(numbers, kind), raw_dtype=kind)
        else:
            writer.add_tensor(f"{name}.weight", numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = load(tmp_path, gguf_file=path.name)
    assert type(model.get_submodule(Q_PROJ)) is nn.Linear
    assert not foreign_linears(model)


@pytest.mark.parametrize("block", [None, (32, 32), (96, 48)])
def test_fp8_of_transformers(block):
    module = fp8(nn.Linear(128, 160), block)
    scales = module.weight_scale_inv.detach()
    rows, columns = block or (160, 128)
    expected = torch.stack(
        [
            torch.stack(
                [
                    module.weight[n, k].float() * (scales[n // rows, k // columns] if block else scales)
                    for k in range(128)
                ]
            )
            for n in range(160)
        ]
    )
    assert torch.equal(read_foreign("q", module, torch.float32), expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="stays fp8 on a GPU")
def test_fp8_that_transformers_dequantises_is_plain(dense, tmp_path):
    tensors = load_file(dense / "model.safetensors")
    scales = {
        f"{name}_scale_inv": torch.ones(weight.shape[0] // 64, weight.shape[1] // 64)
        for name, weight in tensors.items()
        if name.endswith("proj.weight")
    }
    codes = {
        name: weight.to(torch.float8_e4m3fn) if f"{name}_scale_inv" in scales else weight
        for name, weight in tensors.items()
    }
    save_file(codes | scales, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((dense / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [64, 64]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = load(tmp_path)
    assert not foreign_linears(model)
    assert torch.equal(model.get_submodule(Q_PROJ).weight, codes[f"{Q_PROJ}.weight"].float())


def test_what_this_library_quantised_is_not_foreign():
    ours = type("QuantizedLinear", (PackedLinear,), {"__module__": "was_fx.modules.quantized_linear"})
    assert read_foreign("q", ours(nn.Linear(64, 48), awq=False), torch.float32) is None


@pytest.mark.parametrize("awq", [False, True])
def test_gptq_and_awq_are_read_by_their_own_kernel(awq):
    torch.manual_seed(0)
    linear = nn.Linear(64, 48)
    weight = read_foreign("q", PackedLinear(linear, awq), torch.float32)
    step = linear.weight.detach().unflatten(1, (-1, 32))
    step = ((step.amax(2) - step.amin(2)) / 15).repeat_interleave(32, 1)
    assert ((weight - linear.weight).abs() < step).all()


def test_unknown_formats_that_round_activations_are_refused():
    with pytest.raises(ValueError, match=r"q is stored as .*RoundingLinear.*rounds or moves the activations.*; load"):
        read_foreign("q", RoundingLinear(nn.Linear(64, 48), awq=False), torch.float32)


def truncated(linear: nn.Linear) -> nn.Linear:
    module = fp8(linear)
    module.weight_scale_inv.data = module.weight_scale_inv[:1]
    return module


def bad_bitsandbytes(value: float) -> nn.Linear:
    module = int8_bitsandbytes()
    module.weight.SCB[2] = value
    return module


def short_gguf() -> nn.Module:
    module = gguf(nn.Linear(64, 48))
    module.weight.data = module.weight[:, :-34]
    return module


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: int8_linear(scale=torch.zeros_like), "scales hold 0"),
        (lambda: int8_linear(scale=lambda scale: scale.index_fill(0, torch.tensor([3]), torch.nan)), "NaN or inf"),
        (lambda: int8_linear(scale=lambda scale: scale * torch.inf), "NaN or inf"),
        (lambda: int8_linear(qdata=lambda codes: codes[:-1]), ""),
        (lambda: bad_bitsandbytes(0.0), "scales are not all positive"),
        (lambda: bad_bitsandbytes(torch.inf), "scales are not all positive"),
        (lambda: truncated(nn.Linear(128, 160)), r"scales are \[1, 3\], and \[2, 3\]"),
        (short_gguf, ""),
    ],
)
def test_corrupt_weights_are_refused(make, reason):
    with pytest.raises(ValueError, match=rf"q is stored as .*, which can't be read: .*{reason}.*; load"):
        read_foreign("q", make(), torch.float32)


def test_an_overflow_of_the_dtype_is_refused():
    module = fp8(nn.Linear(128, 160))
    module.weight_scale_inv.data = module.weight_scale_inv * 1e8
    assert read_foreign("q", module, torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"NaN or inf in torch.float16"):
        read_foreign("q", module, torch.float16)


def test_offloaded_weights_are_refused():
    with pytest.raises(ValueError, match=r"q is stored as transformers's FP8Linear and offloaded"):
        read_foreign("q", fp8(nn.Linear(64, 48)).to("meta"), torch.float32)


@pytest.mark.parametrize(
    "module", [nn.Linear(8, 8), nn.Linear(8, 8, dtype=torch.bfloat16), nn.Embedding(8, 8), nn.LayerNorm(8), nn.ReLU()]
)
def test_modules_that_are_no_foreign_linears(module):
    assert read_foreign("q", module, torch.float32) is None


def test_reading_leaves_the_module_as_it_is():
    module = PackedLinear(nn.Linear(64, 48), awq=False)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    read_foreign("q", module, torch.float32)
    assert list(module.state_dict()) == list(before)
    assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in before.items())


def test_what_peft_wraps_is_found_by_its_place():
    peft = pytest.importorskip("peft")
    adapters = peft.LoraConfig(target_modules=["q_proj"])
    model = peft.get_peft_model(LlamaForCausalLM(DENSE), adapters).get_base_model()
    layer = model.get_submodule(Q_PROJ)
    layer.base_layer = fp8(layer.base_layer)
    assert list(foreign_linears(model)) == [f"{Q_PROJ}.base_layer"]
    weight = read_foreign("q", layer.base_layer, torch.float32)
    assert make_plain(model, f"{Q_PROJ}.base_layer", weight) is layer.base_layer
    assert layer.base_layer.bias is not None
