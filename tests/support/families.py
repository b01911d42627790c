"""Make tiny random models of the families in transformers, with the demo's tokenizer:
`family_model(name)`, `save_family`.

They have two layers of width 48, windows and chunks of 16 tokens, and ropes that change at 64, so
that short texts reveal them. Drawn matrices are multiplied by three, so that differences in
computation show. `python tests/support/families.py OUT [NAME ...]` writes a folder of each.
"""

import shutil
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

transformers.utils.logging.disable_progress_bar()

TOKENIZER = Path(__file__).parents[2] / "demo/tokenizer"
VOCABULARY = 2048  # of the embeddings; the tokenizer has 2,000 tokens
# in tokens; ORIGINAL: the length up to which longrope and dynamic ropes keep the frequencies
WINDOW = 16
ORIGINAL = 64

BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 512,
    "bos_token_id": None,
}
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
WINDOWED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
DELTA_NET = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 12,
}
LATENT = {  # attention of DeepSeek
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 8,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "topk_group": 1,
}
LLAMA4 = {
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
    "intermediate_size_mlp": 96,
    "attention_chunk_size": WINDOW,
    "no_rope_layers": [1, 0],
    "interleave_moe_layer_step": 1,
    "layer_types": ["chunked_attention", "full_attention"],
}
GPT2 = {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 512}
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 12, "mamba_d_state": 8, "mamba_n_groups": 1}
BLOOM = {"n_layer": 2, "n_head": 4}
MPT = {"d_model": 48, "n_heads": 4, "n_layers": 2, "max_seq_len": 512}


def rope(kind: str, **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **settings}}


# name -> the type in transformers, and what its config adds to or changes in BASE
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama_dynamic": ("llama", rope("dynamic", factor=2.0) | {"max_position_embeddings": ORIGINAL}),
    "llama_yarn": ("llama", rope("yarn", factor=4.0, original_max_position_embeddings=128)),
    "mistral_sw": ("mistral", {"sliding_window": WINDOW}),
    "ministral": ("ministral", WINDOWED),
    "ministral3": ("ministral3", {}),
    "qwen2": ("qwen2", {}),
    "qwen2_sw": ("qwen2", WINDOWED | {"use_sliding_window": True}),
    "qwen2_moe": ("qwen2_moe", EXPERTS),
    "qwen2_moe_sw": ("qwen2_moe", EXPERTS | WINDOWED | {"use_sliding_window": True}),
    "qwen3": ("qwen3", {}),
    "qwen3_moe": ("qwen3_moe", EXPERTS),
    "qwen3_next": ("qwen3_next", EXPERTS | DELTA_NET),
    "qwen3_5": ("qwen3_5_text", DELTA_NET),
    "mixtral": ("mixtral", EXPERTS),
    "gpt_oss": ("gpt_oss", WINDOWED | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v2": ("deepseek_v2", EXPERTS | LATENT | {"n_group": 1}),
    "deepseek_v3": ("deepseek_v3", EXPERTS | LATENT | {"n_group": 2}),
    "llama4": ("llama4_text", LLAMA4),
    "llama4_temp": (
        "llama4_text",
        LLAMA4
        | {
            "attention_chunk_size": 8192,
            "attn_temperature_tuning": True,
            "floor_scale": 256,
            "attn_scale": 0.5,
        },
    ),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", WINDOWED | {"query_pre_attn_scalar": 12}),
    "gemma3": ("gemma3_text", WINDOWED | {"query_pre_attn_scalar": 12}),
    "gemma3_capped": (
        "gemma3_text",
        WINDOWED | {"query_pre_attn_scalar": 12, "final_logit_softcapping": 30.0},
    ),
    "gemma3n": (
        "gemma3n_text",
        WINDOWED
        | {
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8,
            "num_kv_shared_layers": 0,
            "laurel_rank": 8,
            "intermediate_size": [96, 96],
            "activation_sparsity_pattern": [0.0, 0.0],
        },
    ),
    "gemma4": (
        "gemma4_text",
        WINDOWED
        | {
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8,
        },
    ),
    "phi": ("phi", {}),
    "phi3": ("phi3", {"sliding_window": WINDOW}),
    "phi3_longrope": (
        "phi3",
        {
            "sliding_window": None,
            "original_max_position_embeddings": ORIGINAL,
            **rope(
                "longrope",
                short_factor=[1.0] * 6,
                long_factor=[4.0] * 6,
                original_max_position_embeddings=ORIGINAL,
            ),
        },
    ),
    "phimoe": ("phimoe", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "phimoe_sw": (
        "phimoe",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW},
    ),
    "olmo": ("olmo", {}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", WINDOWED),
    "olmoe": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "granite": (
        "granite",
        {
            "logits_scaling": 4.0,
            "attention_multiplier": 0.2,
            "embedding_multiplier": 6.0,
            "residual_multiplier": 0.5,
        },
    ),
    "granitemoe": (
        "granitemoe",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "logits_scaling": 4.0},
    ),
    "granitemoehybrid": (
        "granitemoehybrid",
        MAMBA2
        | {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 32,
            "layer_types": ["mamba", "attention"],
        },
    ),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "falcon": (
        "falcon",
        {
            "alibi": False,
            "new_decoder_architecture": False,
            "multi_query": True,
            "num_kv_heads": 1,
            "ffn_hidden_size": 96,
            "head_dim": None,
        },
    ),
    "falcon_alibi": (
        "falcon",
        {
            "alibi": True,
            "new_decoder_architecture": False,
            "multi_query": False,
            "ffn_hidden_size": 96,
            "head_dim": None,
        },
    ),
    "falcon_h1": ("falcon_h1", MAMBA2 | {"mamba_n_heads": 4, "mamba_d_ssm": 48, "mamba_expand": 1}),
    "falcon_mamba": ("falcon_mamba", {"state_size": 8, "expand": 2}),
    "mamba": ("mamba", {"state_size": 8}),
    "mamba2": (
        "mamba2",
        {"state_size": 8, "num_heads": 8, "head_dim": 12, "expand": 2, "n_groups": 1},
    ),
    "jamba": (
        "jamba",
        {
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
        },
    ),
    "bamba": ("bamba", MAMBA2 | {"attn_layer_indices": [1]}),
    "zamba2": (
        "zamba2",
        {
            "num_hidden_layers": 3,
            "layers_block_type": ["mamba", "hybrid", "mamba"],
            "mamba_d_state": 8,
            "n_mamba_heads": 8,
            "mamba_ngroups": 1,
            "num_mem_blocks": 1,
            "num_key_value_heads": 4,
            "attention_head_dim": 24,
            "use_mem_rope": True,
            "adapter_rank": 8,
        },
    ),
    "nemotron": ("nemotron", {}),
    "nemotron_h": (
        "nemotron_h",
        {
            "hybrid_override_pattern": "M*",
            "mamba_num_heads": 8,
            "mamba_head_dim": 12,
            "ssm_state_size": 8,
            "n_groups": 1,
        },
    ),
    "lfm2": (
        "lfm2",
        {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    ),
    "stablelm": (
        "stablelm",
        {"use_qkv_bias": True, "partial_rotary_factor": 0.5, "head_dim": None},
    ),
    "cohere": ("cohere", {"logit_scale": 0.25}),
    "cohere2": ("cohere2", WINDOWED | {"logit_scale": 0.25}),
    "starcoder2": ("starcoder2", {"sliding_window": WINDOW}),
    "gpt2": ("gpt2", GPT2),
    "gptj": ("gptj", GPT2 | {"rotary_dim": 8}),
    "gpt_neo": (
        "gpt_neo",
        {
            "attention_types": [[["global", "local"], 1]],
            "num_layers": 2,
            "num_heads": 4,
            "window_size": WINDOW,
        },
    ),
    "gpt_neox": ("gpt_neox", {}),
    "gpt_bigcode": ("gpt_bigcode", GPT2 | {"multi_query": True}),
    "opt": ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 48}),
    "bloom": ("bloom", BLOOM),
    "mpt": ("mpt", MPT | {"expansion_ratio": 2}),
    "glm": ("glm", {}),
    "glm4": ("glm4", {}),
    "glm4_moe": (
        "glm4_moe",
        EXPERTS
        | {
            "first_k_dense_replace": 1,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "exaone4": ("exaone4", WINDOWED | {"sliding_window_pattern": 2}),
    "ernie4_5": ("ernie4_5", {}),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        {
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": 32,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
        },
    ),
    "hunyuan": ("hunyuan_v1_dense", {}),
    "dbrx": (
        "dbrx",
        MPT
        | {
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
            "ffn_config": {
                "ffn_hidden_size": 96,
                "moe_num_experts": 4,
                "moe_top_k": 2,
                "hidden_size": 48,
            },
        },
    ),
    "seed_oss": ("seed_oss", {}),
    "apertus": (
        "apertus",
        rope(
            "llama3",
            factor=2.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=128,
        ),
    ),
    "arcee": ("arcee", {}),
    "bitnet": ("bitnet", {}),
    "minimax": (
        "minimax",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "layer_types": ["linear_attention", "full_attention"],
            "block_size": WINDOW,
        },
    ),
    "persimmon": ("persimmon", {"num_key_value_heads": 4}),
    "rwkv": ("rwkv", {"attention_hidden_size": 48, "context_length": 512}),
    "recurrent_gemma": (
        "recurrent_gemma",
        {
            "block_types": ["recurrent", "attention"],
            "attention_window_size": WINDOW,
            "lru_width": 48,
        },
    ),
    "helium": ("helium", {}),
    "diffllama": ("diffllama", {}),
}


@cache
def family_tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TOKENIZER)


def family_config(name: str) -> Any:
    """Return the transformers config of a tiny model of this family."""
    kind, settings = FAMILIES[name]
    of_tokenizer = {
        f"{x}_token_id": getattr(family_tokenizer(), f"{x}_token_id") for x in ("eos", "pad")
    }
    spec = BASE | of_tokenizer | settings
    if spec["head_dim"] is None:  # some families do not take the entry at all
        del spec["head_dim"]
    return AutoConfig.for_model(kind, **spec)


def family_model(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """Return a random model of this family, in train mode, with the same weights at each call,
    rounded to `dtype`.
    """
    config = family_config(name)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for p in model.parameters():
            if p.ndim >= 2 and p.shape[-1] >= 8:  # no convolutions over four tokens
                p.mul_(3)
        if dtype != torch.float32:  # buffers in the types that transformers gives them
            wide, model = model, AutoModelForCausalLM.from_config(config, dtype=dtype)
            for p, value in zip(model.parameters(), wide.parameters(), strict=True):
                p.copy_(value)
    return model.train()


def save_family(folder: Path, name: str, dtype: torch.dtype = torch.float32) -> Path:
    """Write the model and its tokenizer in Hugging Face form. Return the folder."""
    family_model(name, dtype).save_pretrained(folder)
    shutil.copytree(TOKENIZER, folder, dirs_exist_ok=True)
    return folder


if __name__ == "__main__":
    out, *names = sys.argv[1:]
    for each in names or FAMILIES:
        print(save_family(Path(out) / each, each))
