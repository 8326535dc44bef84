"""Shapes of well-known models, to measure with random weights where the weights themselves aren't needed."""

from typing import Any

_LLAMA_3 = {"vocab_size": 128256, "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "max_position_embeddings": 8192}

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-3-8b": (
        "llama",
        {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
         "num_key_value_heads": 8, **_LLAMA_3},
    ),
    "llama-3.2-1b": (
        "llama",
        {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
         "num_key_value_heads": 8, "tie_word_embeddings": True, **_LLAMA_3},
    ),
    "llama-2-13b": (
        "llama",
        {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40,
         "num_key_value_heads": 40, "vocab_size": 32000, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
    ),
    "mistral-7b": (
        "mistral",
        {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
         "num_key_value_heads": 8, "vocab_size": 32768, "sliding_window": None, "max_position_embeddings": 32768},
    ),
    "qwen2.5-7b": (
        "qwen2",
        {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
         "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 32768},
    ),
    "mixtral-8x7b": (
        "mixtral",
        {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
         "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 32000,
         "rope_theta": 1e6, "rms_norm_eps": 1e-5, "sliding_window": None, "max_position_embeddings": 32768},
    ),
    "qwen3-30b-a3b": (
        "qwen3_moe",
        {"hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 48,
         "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
         "num_experts_per_tok": 8, "norm_topk_prob": True, "decoder_sparse_step": 1, "vocab_size": 151936,
         "rope_theta": 1e6, "rms_norm_eps": 1e-6, "max_position_embeddings": 32768},
    ),
}  # fmt: skip


def config(name: str, **changes: Any) -> Any:
    """The configuration of a named shape, for `AutoModelForCausalLM.from_config`.

    Args:
        name: one of SHAPES.
        changes: settings to replace, such as num_hidden_layers=4.

    Raises:
        ValueError: no such name; lists those there are.
    """
    from transformers import AutoConfig

    if name not in SHAPES:
        raise ValueError(f"there is no shape {name!r}; choose one of {', '.join(SHAPES)}")
    kind, settings = SHAPES[name]
    return AutoConfig.for_model(kind, **settings | changes)
