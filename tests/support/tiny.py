"""Make real but tiny parts for tests: a byte-level tokenizer and models of several families."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tiny_tokenizer(bos: bool = False, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose tokens are bytes, <s>, </s> and <pad>; `bos`: it adds <s> itself."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE({c: i for i, c in enumerate(["<pad>", "<s>", "</s>", *alphabet])}, [])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    if bos:
        fast._tokenizer.post_processor = processors.TemplateProcessing(
            "<s> $A", special_tokens=[("<s>", 1)]
        )
    fast.chat_template = chat_template
    return fast


SIZES = {
    "vocab_size": 259,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
FAMILIES = {
    "llama": LLAMA | {"attention_dropout": 0.5, "tie_word_embeddings": False},
    "qwen3": LLAMA | {"head_dim": 8},
    "mistral": LLAMA | {"sliding_window": 8},
    "gemma3_text": LLAMA | {"head_dim": 8, "sliding_window": 8, "num_key_value_heads": 1},
    "gemma2": LLAMA | {"head_dim": 8, "sliding_window": 8, "final_logit_softcapping": 5.0},
    "gpt_neox": {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}
    | {"hidden_dropout": 0.5},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.5},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
}


def tiny_model(family: str = "llama"):
    """Return a random model of this family in float32, in train mode, dropout as configured."""
    import torch

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **(SIZES | FAMILIES[family]))
    ).train()


def save_tiny_llama(folder: Path) -> Path:
    """Write, in Hugging Face form, a Llama of hidden size 32 with 2 layers, seeded random weights
    and the demo's tokenizer.
    """
    import torch

    tokenizer = AutoTokenizer.from_pretrained(Path(__file__).parents[2] / "demo/tokenizer")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
