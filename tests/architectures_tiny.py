"""Tiny random models of every architecture that ``AutoModelForCausalLM`` knows, for tests/architectures.py."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 32
NAMES: tuple[str, ...] = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
_MOST_PARAMETERS = 4_000_000

_SMALL: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "decoder_vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "lru_width", "moe_intermediate_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("decoder_layers", "encoder_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads", "attention_heads"), 4),
    **dict.fromkeys(("num_decoder_attention_heads", "num_encoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "d_inner", "dff"), 64),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "linear_num_heads", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "num_key_value_heads"), 2),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
    **dict.fromkeys(("head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "linear_head_dim"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_d_state", "state_size"), 8),
    "sliding_window": 8,
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "index_head_dim", "hidden_size_per_layer_input"), 16),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "num_shared_experts"), 1),
    **dict.fromkeys(("time_step_rank", "mamba_dt_rank", "rotary_dim", "index_topk"), 4),
    "index_n_heads": 16,  # of few, all may be silent on two keys, and which of these is chosen is then chance
    "shared_expert_intermediate_size": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

_DECODER = {"is_decoder": True}
_MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_chunk_size": 8}
_HALF_LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
_VISION = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
_GEMMA4 = {
    "per_layer_config": {},
    "layer_types": ["sliding_attention", "full_attention"],
    "hidden_size_per_layer_input": 0,
}

_OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        (
            *("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert"),
            *("rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl"),
        ),
        _DECODER,
    ),
    "bailing_hybrid": _HALF_LINEAR,
    "bamba": {**_MAMBA2, "attn_layer_indices": [1]},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("sliding_attention", "full_attention")
        },
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
        "d_model": 32,
    },
    "deepseek_v4": {"head_dim": 16, "index_n_heads": 4},
    "dots3_note": {
        "audio_config": {"adapter_in_dim": 32, "hidden_size": 32},
        "text_config": {"num_key_value_heads": 4, "per_layer_config": {}},
        "vision_config": {**_VISION, "per_layer_config": {}},
    },
    "dots3_note_text": {"num_key_value_heads": 4},
    "falcon": {"num_kv_heads": 2},
    "falcon_h1": {**_MAMBA2, "mamba_d_ssm": 64},
    "gemma3": {"vision_config": _VISION},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0],
        "laurel_rank": 8,
        "altup_num_inputs": 2,
    },
    "gemma4": {"text_config": _GEMMA4, "vision_config": _VISION},
    "gemma4_text": _GEMMA4,
    "git": {"vision_config": {**_VISION, "image_size": 16, "patch_size": 8}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_heads": 4, "window_size": 8},
    "granitemoehybrid": {**_MAMBA2, **_HALF_LINEAR, "shared_intermediate_size": 32},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": _HALF_LINEAR,
    "longcat_flash": {"head_dim": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 8},
    "minicpm3": {"scale_emb": 1, "dim_model_base": 32},
    "minimax": {"layer_types": ["linear_attention", "full_attention"]},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "full_attention"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "n_groups": 1,
        "ssm_state_size": 8,
        "chunk_size": 8,
    },
    "olmo_hybrid": _HALF_LINEAR,
    "opt": {"word_embed_proj_dim": 16, "do_layer_norm_before": False},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "qwen3_5": {"text_config": _HALF_LINEAR},
    "qwen3_5_moe": {"text_config": _HALF_LINEAR},
    "qwen3_5_moe_text": _HALF_LINEAR,
    "qwen4_exp": {"text_config": {"layer_types": ["linear_attention", "indexed_attention"]}},
    "qwen4_exp_text": {"layer_types": ["linear_attention", "indexed_attention"]},
    "qwen3_5_text": _HALF_LINEAR,
    "qwen3_next": _HALF_LINEAR,
    "recurrent_gemma": {"num_hidden_layers": 3, "attention_window_size": 8},
    "reformer": {
        "is_decoder": True,
        "num_hidden_layers": 2,
        "attn_layers": ["local", "lsh"],
        "axial_pos_embds": False,
        "attention_head_size": 8,
        "feed_forward_size": 32,
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
    },
    "roc_bert": {
        "is_decoder": True,
        "pronunciation_embed_dim": 8,
        "pronunciation_vocab_size": 8,
        "shape_embed_dim": 8,
        "shape_vocab_size": 8,
    },
    "rwkv": {"attention_hidden_size": 32},
    "xlm": {"causal": True},
    "xmod": {**_DECODER, "default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "n_mamba_heads": 2,
        "attention_head_dim": 16,
        "attention_hidden_size": 64,
    },
    "zamba2": {
        "num_hidden_layers": 3,
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid"],
        "n_mamba_heads": 4,
        "mamba_headdim": 16,
        "chunk_size": 8,
        "num_query_groups": 4,
        "adapter_rank": 8,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}
"""What an architecture needs beyond ``_SMALL``: to be small, to be valid, or to have layers of each of its kinds."""


class NotBuiltError(Exception):
    """No tiny model of an architecture: says why."""


def tiny_config(name: str) -> PretrainedConfig:
    """A config of few parameters."""
    own = dict(_OWN.get(name, {}))
    try:
        default = AutoConfig.for_model(name)
    except Exception:  # some configs have defaults that are not valid
        return AutoConfig.for_model(name, **{**_SMALL, **own})
    text = default if default.is_encoder_decoder else default.get_text_config(decoder=True)
    if text is default:
        return AutoConfig.for_model(name, **{**_sizes(default), **own})
    part = next(key for key, value in vars(default).items() if value is text)
    return AutoConfig.for_model(name, **{**own, part: {**_sizes(text), **own.get(part, {})}})


def _sizes(config: PretrainedConfig) -> dict[str, Any]:
    known = config.to_dict().keys() | config.attribute_map.keys()
    sizes = {key: value for key, value in _SMALL.items() if key in known}
    if "qk_rope_head_dim" in known:  # latent attention derives the one, and has as many of the other as of queries
        sizes = {**sizes, "num_key_value_heads": 4}
        sizes.pop("head_dim", None)
    return sizes


def tiny_model(name: str) -> PreTrainedModel:
    """A random model whose weights are wide enough that context and position matter.

    Raises:
        NotBuiltError: transformers does not make one this small.
    """
    try:
        config = tiny_config(name)
        with torch.device("meta"):
            size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
        if size > _MOST_PARAMETERS:
            raise NotBuiltError(f"{size / 1e6:.0f} million parameters at its smallest here")
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise NotBuiltError(lines[1 if lines[0].startswith("Class validation") and len(lines) > 1 else 0]) from error
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3.0 if p.ndim > 1 else 1.0).add_(0.05 * torch.randn_like(p))
    return model.eval()
