"""Writes a model of transformers as a GGUF file for llama.cpp, without its tokenizer: token ids are handed over."""

from pathlib import Path
from typing import Any

import gguf
import torch
from gguf.quants import quantize

ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2"}
_LINEARS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}


def write(model: Any, path: Path, weights: str) -> None:
    """Write a model with weights of `weights` ("F16", "BF16", "Q8_0", "Q4_0", "Q4_1", …); embeddings and head of a
    quantised one in Q8_0 at most.

    Raises:
        ValueError: the model is of a kind whose names and layout this does not know.
    """
    config = model.config
    if config.model_type not in ARCHITECTURES:
        raise ValueError(f"{config.model_type} models are not known here; known: {', '.join(ARCHITECTURES)}")
    architecture = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    kind = gguf.GGMLQuantizationType[weights]
    head = kind if weights in ("F32", "F16", "BF16") else gguf.GGMLQuantizationType.Q8_0
    for name, tensor in _tensors(model, architecture):
        data = tensor.float().numpy()
        chosen = gguf.GGMLQuantizationType.F32
        if data.ndim == 2:
            chosen = head if name.startswith(("token_embd", "output.")) else kind
        writer.add_tensor(name, quantize(data, chosen), raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(model: Any, architecture: str) -> Any:
    """(name in GGUF, tensor) of every parameter."""
    config, parameters = model.config, dict(model.named_parameters())
    yield "token_embd.weight", parameters["model.embed_tokens.weight"].detach()
    yield "output_norm.weight", parameters["model.norm.weight"].detach()
    if not config.tie_word_embeddings:
        yield "output.weight", parameters["lm_head.weight"].detach()
    for i in range(config.num_hidden_layers):
        block = f"model.layers.{i}."
        for ours, theirs in _NORMS.items():
            yield f"blk.{i}.{theirs}.weight", parameters[f"{block}{ours}.weight"].detach()
        for ours, theirs in _LINEARS.items():
            for part in ("weight", "bias"):
                tensor = parameters.get(f"{block}{ours}.{part}")
                if tensor is None:
                    continue
                tensor = tensor.detach()
                heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(theirs)
                if architecture == "llama" and heads:
                    tensor = _turned_in_pairs(tensor, heads)
                yield f"blk.{i}.{theirs}.{part}", tensor


def _turned_in_pairs(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp turns neighbouring channels of a Llama head by RoPE where transformers turns its halves."""
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)
