"""What a model has room for: positions, and token ids that have an embedding."""

import json

import numpy as np
import pytest
import torch
from tiny import FAMILIES, LLAMA, SIZES, tiny_model, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from plumb.data.tokenization import Example
from plumb.errors import UserError
from plumb.models.limits import check_positions, check_vocabulary, pad_within, positions_of
from plumb.rollouts.hf_engine import sample

SMALL = {"vocab_size": 259, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LIMITED = {  # family -> (its config, positions, what limits them)
    "gpt2": (FAMILIES["gpt2"] | {"n_positions": 48}, 48, "table"),
    "opt": (
        SMALL | {"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 48},
        48,
        "table",
    ),
    "gptj": (FAMILIES["gptj"] | {"n_positions": 48}, 48, "table"),
    "gpt_bigcode": ({"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 48}, 48, "table"),
    "llama": (LLAMA | {"max_position_embeddings": 48}, 48, "rotary"),
    "gpt_neox": (FAMILIES["gpt_neox"] | {"max_position_embeddings": 48}, 48, "rotary"),
    "gemma3_text": (FAMILIES["gemma3_text"] | {"max_position_embeddings": 48}, 48, "rotary"),
}
FREE = {
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 48},
    "falcon": SMALL | {"alibi": True, "max_position_embeddings": 48},
    "mamba": SMALL | {"state_size": 4},
}


def on_meta(family, **given):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **given))


@pytest.mark.parametrize("family", LIMITED)
def test_positions(family):
    given, n, kind = LIMITED[family]
    model = on_meta(family, **given)
    known = positions_of(model)
    assert known and known[0] == n and kind in known[1]
    check_positions(model, 48, "max_length")
    with pytest.raises(
        UserError, match="^max_length=49: the model has 48 positions .*; give max_length=48 or less"
    ):
        check_positions(model, 49, "max_length")


@pytest.mark.parametrize("family", FREE)
def test_no_limit(family):
    assert positions_of(on_meta(family, **FREE[family])) is None


@pytest.mark.parametrize(
    ("rope", "n"),
    [
        ({"rope_type": "linear", "factor": 4.0}, 192),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 48}, 192),
        (
            {
                "rope_type": "llama3",
                "factor": 2.0,
                "original_max_position_embeddings": 16,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            },
            48,
        ),  # 48 already are the stretched ones
    ],
)
def test_scaling_stretches_rotary_positions(rope, n):
    given = LLAMA | {
        "max_position_embeddings": 48,
        "rope_parameters": rope | {"rope_theta": 10000.0},
    }
    known = positions_of(on_meta("llama", **given))
    assert known and known[0] == n


def test_max_length_is_checked_before_the_data_are_read(train_here, tiny_model):
    with pytest.raises(UserError, match="max_length=513: the model has 512 positions .rotary"):
        train_here(
            f"model.name_or_path={tiny_model}", "datasets=[hh]", "max_length=513", "loss=sft"
        )


def test_an_answer_ends_with_the_positions():
    """GPT-2 would fail in the middle of a run: its table has no more rows."""
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("gpt2", **(SIZES | FAMILIES["gpt2"] | {"n_positions": 16}))
    )
    prompt = np.arange(3, 15)
    (text,) = sample(
        model,
        tiny_tokenizer(),
        [prompt],
        batch_size=1,
        max_length=16,
        max_new_tokens=9,
        temperature=0,
        seed=0,
    )
    assert isinstance(text, str)


def with_token(name, role):
    """A tokenizer with one token more than the model has embeddings."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({role: name})
    return tokenizer


def test_pad_without_an_embedding_is_no_hindrance(capsys):
    """Llama-2 with an added [PAD]: what is masked may be any token."""
    model, tokenizer = tiny_model("llama"), with_token("[PAD]", "pad_token")
    assert tokenizer.pad_token_id == 259 == model.config.vocab_size
    check_vocabulary(model, tokenizer, 258, "m")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert "PAD ('[PAD]', number 259) has no embedding" in capsys.readouterr().out
    whole = tiny_tokenizer()
    pad_within(model, whole)
    assert whole.pad_token == "<pad>"  # has one


@pytest.mark.parametrize(
    ("role", "where"),
    [
        ("eos_token", "its EOS, which ends every"),
        ("bos_token", "its BOS"),
        (None, "occurs in the data"),
    ],
)
def test_a_token_without_an_embedding_is_named(role, where):
    tokenizer = with_token("<x>", role or "pad_token")
    if role is None:
        tokenizer.pad_token = "<pad>"
    ids = np.array([5, 259])
    examples = [Example(ids[:1], (ids[:1],), "d:1"), Example(ids[:1], (ids,), "d:2")]
    with pytest.raises(
        UserError, match=f"has 259 tokens.*id 259: '<x>', .*{where}.*first in d:2; give"
    ):
        check_vocabulary(tiny_model("llama"), tokenizer, 259, "m", examples)


def test_a_run_with_pad_beyond(train_here, tmp_path, data, tiny_model):
    folder = tmp_path / "pad"
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    run_dir = train_here(
        f"model.name_or_path={folder}",
        f"datasets=[{data}]",
        "n_examples=4",
        "n_eval_examples=2",
        "loss=dpo",
        "loss.beta=0.1",
        "sample_max_new_tokens=3",
        "n_eval_model_samples=2",
    )
    assert all(
        np.isfinite(json.loads(line).get("loss/train", 0))
        for line in (run_dir / "metrics.jsonl").open()
    )
