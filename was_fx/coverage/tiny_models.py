"""Small random models of the causal LM and multimodal classes of transformers, built from their configurations.

A configuration is made small by the names of its fields alone, which are much the same everywhere; `_OVERRIDES` holds
what a model type needs beyond that. Every kind of layer that a type mixes is kept, one layer of each.
"""

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from was_fx.modules.auto_class import auto_class
from was_fx.modules.linears import weight_bytes_per_token

VOCABULARY = 128
TEXT = 96  # ids of text lie below
IMAGE = 120

_SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embed_dim", "emb_dim", "embedding_size"), 64),
    "hidden_size_global": 64,
    "unpadded_vocab_size": VOCABULARY,
    **dict.fromkeys(("word_embed_proj_dim", "dim_model", "lru_width", "rotary_dim_total"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "dff", "d_ff", "dim_ff", "d_inner"), 96),
    **dict.fromkeys(("ffn_hidden_size", "shared_intermediate_size", "block_ff_dim", "intermediate_size_mlp"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_intermediate_size"), 32),
    **dict.fromkeys(("expert_ffn_hidden_size", "moe_shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "kv_n_heads"), 2),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "top_k", "moe_k", "moe_topk", "moe_top_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_groups", "mamba_n_groups", "first_k_dense_replace"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), 128),
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "qk_head_dim": 24,
    "head_dim": 16,
    "state_size": 8,
    "mamba_d_state": 8,
    "rotary_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    **dict.fromkeys(("sliding_window", "attention_window_size"), 8),
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 8,
    "vocab_size": VOCABULARY,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    **dict.fromkeys(("image_token_id", "image_token_index", "image_patch_id"), IMAGE),
    **dict.fromkeys(("video_token_id", "video_token_index"), IMAGE + 1),
    **dict.fromkeys(("audio_token_id", "audio_token_index"), IMAGE + 2),
    **dict.fromkeys(("vision_start_token_id", "image_start_token_id", "boi_token_id", "boi_token_index"), IMAGE + 3),
    **dict.fromkeys(("vision_end_token_id", "image_end_token_id", "eoi_token_id", "eoi_token_index"), IMAGE + 4),
}
# Of towers for images or audio, beyond these.
_TOWER_SIZES: dict[str, Any] = {
    **dict.fromkeys(("depth", "num_blocks", "encoder_layers", "num_global_layers", "n_layers"), 2),
    **dict.fromkeys(("num_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("out_hidden_size", "text_hidden_size", "projector_input_dim", "projector_output_dim"), 64),
    **dict.fromkeys(("projection_dim", "output_dim", "codebook_dim"), 64),
    **dict.fromkeys(("encoder_ffn_dim", "mlp_dim"), 96),
    "num_position_embeddings": 16,
}
_TOWERS = 40
_PATCHES = 4  # along a side of an image
_MAY_BE_NONE = {"n_inner", "pad_token_id", "bos_token_id", "eos_token_id", "head_dim", "num_key_value_heads"}
_MAY_BE_NONE |= {"num_experts_per_tok", "n_routed_experts", "indexer_n_heads", "indexer_head_dim"}

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_MROPE = {**_ROPE, "mrope_section": [4, 2, 2]}
_PER_LAYER_INPUT = {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": VOCABULARY}
_HYBRID = ["linear_attention", "full_attention"]
_INKLING2 = {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16}
_GEMMA4_VISION = {
    **dict.fromkeys(("hidden_size", "intermediate_size"), 64),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads"), 4),
    **dict.fromkeys(("num_hidden_layers", "pooling_kernel_size"), 2),
    "model_type": "gemma4_vision",
    "head_dim": 16,
}
_OVERRIDES: dict[str, dict[str, Any]] = {
    "apertus1p5": {
        "vision_config": {"codebook_size": 16},
        "audio_config": {"codebook_dim": 64, "codebook_size": 16},
        "image_token_offset": 80,
        "audio_token_offset": 96,
    },
    "chameleon": {"vocabulary_map": {"<image>": 5}},
    "cosmos3_edge_text": {"rope_parameters": {**_MROPE, "mrope_interleaved": True}},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2},
    "ernie4_5_vl_moe_text": {"moe_intermediate_size": [32, 32]},
    "emu3": {"vocabulary_map": {"<image>": 5, "<|extra_200|>": 6}},
    "gemma3": {"mm_tokens_per_image": 4},
    "gemma4": {"vision_config": _GEMMA4_VISION},
    **{each: {"rope_parameters": _MROPE} for each in ("glm4v_text", "glm_ocr_text", "paddleocr_vl_text")},
    "glm4v_moe_text": {"rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}},
    "glm5_next_text": {"index_kpool": 4, "qk_rope_head_dim": 0, "head_dim": 0},
    "granite4_vision": {"deepstack_layer_map": [[-1, 0]], "downsample_rate": "1/2"},
    "hy_v4_vl_text": {"rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]}},
    "inkling2_text": _INKLING2,
    "inkling2_loop_text": {
        **_INKLING2,
        "layer_types": ["hybrid_sliding", "hybrid", "hybrid"],
        "loop_layer_index_start": 1,
        "loop_layer_index_end": 2,
        "n_layers_per_attn_res_block": 1,
        "loop_gate_rank": 8,
    },
    "llama4": {"vision_config": {"intermediate_size": 256, "vision_output_dim": 64}},
    "mllama_text_model": {"cross_attention_layers": [1]},
    "molmo2": {"adapter_config": {"vision_feature_layer": [-1]}, "vision_config": {"image_size": [56, 56]}},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "muse_spark": {"audio_config": {"num_hidden_layers": 4}},
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {each: dict(_ROPE) for each in ("sliding_attention", "full_attention")},
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "bailing_hybrid": {"num_experts": 4, "num_expert_group": 1, "topk_group": 1, "num_experts_per_token": 2},
    "blt": {"encoder_hash_byte_group_vocab": 32, "encoder_hash_byte_group_size": [3]},
    "dots3_note_text": {
        **dict.fromkeys(("swa_num_attention_heads", "swa_num_key_value_heads"), 4),
        **dict.fromkeys(("swa_q_lora_rank", "swa_kv_lora_rank"), 32),
        **dict.fromkeys(("swa_qk_nope_head_dim", "swa_v_head_dim"), 16),
        "swa_head_dim": 24,
    },
    "dory": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "n_input_layers": 1,
        "n_recurrent_layers": 2,
        "n_output_layers": 1,
    },
    "dots1": {"n_shared_experts": 1},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_ssm": 128, "mamba_d_head": 16},
    "gemma3n_text": {"intermediate_size": [96, 96], "num_kv_shared_layers": 0, **_PER_LAYER_INPUT},
    "gemma4_text": {"global_head_dim": 16, **_PER_LAYER_INPUT},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": _HYBRID, "mamba_n_heads": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"num_experts": 4, "linear_head_dim": 16},
    "kolibri1": {"num_experts": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"zero_expert_num": 2},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
        "hc_lowrank": 8,
        "ngram_vocab_size_base": 64,
    },
    "xlstm": {"num_heads": 2, "qk_dim_factor": 1.0},
    **{each: {"rope_parameters": _MROPE} for each in ("qwen2_5_omni_text", "qwen3_omni_moe_text")},
    **{each: {"vision_start_token_id": IMAGE + 3} for each in ("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker")},
    "qwen2_vl_text": {"rope_parameters": _MROPE},
    "qwen2_5_vl_text": {"rope_parameters": _MROPE},
    "step3p5": {"sliding_window": 8},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"num_hidden_layers": 2, "layers_block_type": ["linear_attention", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}


def tiny_config(model_type: str) -> Any:
    """A small configuration of a model type of transformers, with a vocabulary of 128.

    Raises:
        whatever the configuration class raises for these sizes.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    cls = CONFIG_MAPPING[model_type]
    return cls(**_small(cls(), _OVERRIDES.get(model_type, {})))


def tiny_model(
    model_type: str, *, seed: int = 0, most_parameters: int = 3_000_000, rope: Mapping[str, Any] | None = None
) -> nn.Module:
    """A small causal LM of a model type, or a multimodal one, fp32, on the CPU, in eval mode, with random weights.

    Args:
        model_type: as in transformers' configurations.
        seed: of the weights.
        most_parameters: of the decoder.
        rope: settings of its rotary embedding that differ from its default.

    Raises:
        ValueError: its decoder has more than `most_parameters`, or a tower far more, although its configuration was
            made small.
    """
    config = tiny_config(model_type)
    if rope is not None:
        text = config.get_text_config(decoder=True)
        text.rope_parameters = {**text.rope_parameters, **rope}
    auto = auto_class(model_type, whole=True)
    with torch.device("meta"):
        skeleton = auto.from_config(config)
    size = weight_bytes_per_token(skeleton) // 4
    if size > most_parameters or sum(each.numel() for each in skeleton.parameters()) > _TOWERS * most_parameters:
        raise ValueError(f"its smallest configuration known here has {size / 1e6:.1f} million parameters")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto.from_config(config, dtype=torch.float32).eval()
        _spread(model)
    return model


def _small(default: Any, overrides: dict[str, Any], *, tower: bool = False) -> dict[str, Any]:
    """Arguments of the configuration class of `default` that make it small."""
    fields = _fields(type(default))
    sizes = {**_SIZES, **_TOWER_SIZES} if tower else dict(_SIZES)
    if "kv_lora_rank" in fields:  # latent attention: keys of all heads come from one vector
        sizes.update(head_dim=sizes["qk_rope_head_dim"], num_key_value_heads=sizes["num_attention_heads"])
    small = {name: size for name, size in sizes.items() if name in fields and _is_size(default, name)}
    if tower and {"image_size", "patch_size"} <= fields and isinstance(default.patch_size, int):
        small |= {"image_size": _PATCHES * default.patch_size, "patch_size": default.patch_size}
    kinds = overrides.get("layer_types") or list(dict.fromkeys(getattr(default, "layer_types", None) or ()))
    if "layer_types" in fields and len(kinds) > 1:
        small["layer_types"] = kinds
        small.update({name: len(kinds) for name in ("num_hidden_layers", "n_layer", "num_layers") if name in small})
    text = default.get_text_config(decoder=True)
    inner_names = tuple(getattr(default, "sub_configs", ()))
    for name in inner_names:
        inner = getattr(default, name, None)
        if inner is not None and not isinstance(inner, dict):
            own = {**_OVERRIDES.get(inner.model_type, {}), **overrides.get(name, {})}
            small[name] = type(inner)(**_small(inner, own, tower=inner is not text))
    rope = getattr(default, "rope_parameters", None)
    if isinstance(rope, dict) and "mrope_section" in rope:
        small["rope_parameters"] = {**rope, "mrope_section": [4, 2, 2]}
    return small | {name: value for name, value in overrides.items() if name not in small or name not in inner_names}


def _fields(cls: type) -> set[str]:
    if dataclasses.is_dataclass(cls):
        return {field.name for field in dataclasses.fields(cls)}
    return set(inspect.signature(cls).parameters)


def _is_size(default: Any, name: str) -> bool:
    value = vars(default).get(name)  # a plain getattr raises where the value may differ from layer to layer
    return (isinstance(value, int) and not isinstance(value, bool)) or (value is None and name in _MAY_BE_NONE)


@torch.no_grad()
def _spread(model: nn.Module) -> None:
    """Make random weights large enough that every Linear matters to the logits."""
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            parameter.normal_(0.0, 0.1)
