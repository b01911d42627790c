"""The layout that a run chooses: what each fault looks like, and that none depends on the data."""

import json
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from tiny import LLAMA, SIZES
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from plumb.batching.layout import pack
from plumb.data.tokenization import Example
from plumb.errors import UserError
from plumb.models import layout_probe, tree_attention
from plumb.models import logps as models
from plumb.models.forward_path import ForwardPath, use_tree_attention
from plumb.models.layout_probe import Precision
from plumb.models.scalar_head import put_scalar_head

PACKED = ForwardPath(packed=True, plain_head=True)


def made(family, dtype=torch.float32, **knobs):
    """A random model with larger matrices, so that differences of computation show; its attention
    exchanged if it can be.
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **(SIZES | LLAMA | knobs))
    ).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(3)
    model = model.to(dtype)
    use_tree_attention(model)
    return model


def choose(model, longest=64, row_tokens=600, gradients=True, precisions=None):
    return layout_probe.choose_forward_path(
        model,
        device=torch.device("cpu"),
        longest=longest,
        vocabulary=np.arange(3, 259),
        row_tokens=lambda forward_path: row_tokens,
        precisions=precisions or [Precision(nullcontext, model.dtype)],
        gradients=gradients,
    )


MOE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
LLAMA4 = {
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
    "intermediate_size_mlp": 64,
    "no_rope_layers": [1, 0],
    "interleave_moe_layer_step": 1,
    "layer_types": ["full_attention", "full_attention"],
    "head_dim": 8,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_window_that_a_model_keeps_in_its_mask_alone_is_found(dtype):
    """Qwen2-MoE does not hand its window to the attention function; shorter sequences than the
    window cannot show it.
    """
    window = MOE | {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}
    forward_path, line = choose(
        made("qwen2_moe", dtype, **window, layer_types=["sliding_attention"] * 2)
    )
    assert forward_path == ForwardPath(False, True) and "packed, it would be off by 0." in line
    assert choose(made("qwen2_moe", dtype, **MOE))[0] == PACKED


@pytest.mark.parametrize(
    "family, knobs, why",
    [
        (
            "lfm2",
            {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
            "its conv layers run",
        ),
        (
            "llama4_text",
            LLAMA4 | {"layer_types": ["chunked_attention", "full_attention"]},
            "its chunked_attention layers run",
        ),
        (
            "llama4_text",
            LLAMA4 | {"attn_temperature_tuning": True},
            "its attention temperature counts along the row",
        ),
        (
            "falcon",
            {"alibi": True, "num_key_value_heads": 4},
            "its ALiBi bias counts along the row",
        ),
        ("mamba", {"state_size": 4}, "layers run along the row"),
    ],
)
def test_what_runs_along_the_row_is_known_from_the_config(family, knobs, why):
    """Even where short rows or large steps of rounding would hide it: no row is needed to tell."""
    model = made(family, torch.bfloat16, **knobs)
    assert why in layout_probe.cannot_pack(model)
    forward_path, line = choose(model)
    assert not forward_path.packed and why in line


@pytest.fixture
def attend():
    """`attend(f)`: models call f(original, *arguments, **options) in place of the attention over
    trees.
    """
    original = tree_attention.tree_attention
    yield lambda f: AttentionInterface.register(
        tree_attention.NAME, lambda *a, **k: f(original, *a, **k)
    )
    AttentionInterface.register(tree_attention.NAME, original)


@pytest.mark.parametrize("words", ["CUDA out of memory", "CUDA error: out of memory"])
def test_a_gpu_without_memory_is_no_reason_for_padding(attend, words):
    """The run ends, and its one line names the knob; any other error would mean padded rows."""
    kind = torch.OutOfMemoryError if words.startswith("CUDA out") else RuntimeError

    def full(*arguments, **options):
        raise kind(words)

    attend(full)
    with pytest.raises(RuntimeError, match=words):
        choose(made("llama", torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_neighbour_that_is_seen_is_found(attend, dtype):
    """A function that looks at the whole row, whatever the segments say."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    model = made("llama", dtype)
    assert choose(model)[0] == PACKED
    attend(lambda original, *a, segments=None, **k: sdpa_attention_forward(*a, **k))
    forward_path, line = choose(model)
    assert forward_path == ForwardPath(False, True) and "would be off by" in line


def test_what_only_a_full_microbatch_reveals_is_found(attend):
    """Queries beyond the 400th token of the row are scaled: rows of 200 tokens are right, a
    microbatch of 600 is not.
    """

    def scaled(original, module, query, *arguments, **options):
        far = torch.arange(query.shape[2]) >= 400
        return original(module, query * (1 + 0.1 * far[None, None, :, None]), *arguments, **options)

    attend(scaled)
    assert choose(made("llama"), row_tokens=300)[0] == PACKED
    forward_path, line = choose(made("llama"), row_tokens=600)
    assert not forward_path.packed and "would be off by" in line


def test_a_wrong_gradient_is_found(attend):
    """Values are right, but keys get no gradient. Scoring, which needs none, may use it."""

    def detached(original, module, query, key, *arguments, segments=None, **options):
        key = key if segments is None else key.detach()
        return original(module, query, key, *arguments, segments=segments, **options)

    attend(detached)
    forward_path, line = choose(made("llama"))
    assert not forward_path.packed and "of the gradient" in line
    assert choose(made("llama"), gradients=False)[0] == PACKED


def test_float32_is_held_to_its_own_rounding(attend):
    """A fault of 2e-5 to 1e-3 nats per token is twenty times what rounding makes, and refused."""

    def slightly(original, module, query, *arguments, segments=None, **options):
        return original(
            module, query * (1.001 if segments else 1), *arguments, segments=segments, **options
        )

    attend(slightly)
    forward_path, line = choose(made("llama"), gradients=False)
    assert not forward_path.packed and "would be off by" in line


def test_weights_of_32_bits_show_what_autocast_hides(attend):
    """Under autocast a layout must also hold in the weights' own precision."""

    def slightly(original, module, query, *arguments, segments=None, **options):
        return original(
            module, query * (1.001 if segments else 1), *arguments, segments=segments, **options
        )

    autocast = Precision(lambda: torch.autocast("cpu", torch.bfloat16), torch.bfloat16)
    both = [Precision(nullcontext, torch.float32), autocast]
    assert choose(made("llama"), precisions=both)[0] == PACKED
    attend(slightly)
    assert choose(made("llama"), precisions=[autocast])[0] == PACKED
    assert not choose(made("llama"), precisions=both)[0].packed


CHANGED_LOGITS = [
    ("gemma2", {"head_dim": 8, "final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
    (
        "gemma3_text",
        {"head_dim": 8, "final_logit_softcapping": 30.0, "sliding_window": 8},
        "final_logit_softcapping=30.0",
    ),
    ("cohere", {"logit_scale": 0.9}, "logit_scale=0.9"),
    ("granite", {"logits_scaling": 1.1}, "logits_scaling=1.1"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family, knobs, named", CHANGED_LOGITS)
def test_a_head_whose_logits_are_changed_stays_the_models_own(family, knobs, named, dtype):
    """A soft cap of 30 changes these logits by less than bfloat16 rounds them; it is found all the
    same.
    """
    forward_path, line = choose(made(family, dtype, **knobs))
    assert not forward_path.plain_head and named in line
    neutral = {"logit_scale": 1.0, "logits_scaling": 1.0, "final_logit_softcapping": None}
    assert choose(made(family, dtype, **(knobs | neutral)))[0].plain_head


def test_a_head_with_a_computation_of_its_own_stays_the_models_own():
    """A hook on its output; and a class that is a Linear by name only."""
    model = made("llama", torch.bfloat16)
    model.lm_head.register_forward_hook(lambda module, arguments, output: output * 1.001)
    assert choose(model)[0] == ForwardPath(True, False)

    class Scaled(torch.nn.Linear):
        def forward(self, hidden):
            return super().forward(hidden) * 2

    model = made("llama")
    model.lm_head.__class__ = Scaled
    forward_path, line = choose(model)
    assert forward_path == ForwardPath(True, False) and "its head is not a plain matrix" in line


def test_the_choice_knows_no_data(train, data):
    """The same line in env.json, whichever rows come first."""
    lines = []
    for order in (1, -1):
        data.write_text("".join(data.read_text().splitlines(keepends=True)[::order]))
        run_dir = train(f"order{order}", "loss=sft", "n_examples=4", "do_first_eval=false")
        lines.append(json.loads((run_dir / "env.json").read_text())["layout"])
    assert lines[0].startswith("batches: packed") and lines[0] == lines[1]


def test_a_reward_model_is_tried_by_its_scores():
    model = made("qwen3", head_dim=8)
    put_scalar_head(model, seed=0)
    forward_path, line = choose(model)
    assert forward_path == ForwardPath(True, False) and line.startswith(
        "batches: packed trees, own head; equal to each response alone to"
    )
    assert "nats" not in line


def test_padding_that_changes_results_is_said(attend):
    """A model whose rows see their padding: no layout is right, and the line says so."""
    model = made("llama")
    model.set_attn_implementation("eager")
    hook = lambda module, arguments, output: output + 0.1 * output.mean(1, keepdim=True)
    model.model.layers[0].mlp.register_forward_hook(hook)
    forward_path, line = choose(model)
    assert not forward_path.packed and "WARNING: results depend on padding" in line


ROPES = {
    "longrope": (
        "phi3",
        {
            "max_position_embeddings": 256,
            "original_max_position_embeddings": 32,
            "partial_rotary_factor": 1.0,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "original_max_position_embeddings": 32,
                "short_factor": [1.0] * 4,
                "long_factor": [4.0] * 4,
            },
        },
    ),
    "dynamic": (
        "llama",
        {
            "max_position_embeddings": 32,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
        },
    ),
}


@pytest.mark.parametrize("kind", ROPES)
def test_rope_that_looks_at_the_whole_batch_is_refused_beyond_its_length(kind):
    """Up to 32 tokens a pair's log-probabilities are the same beside any neighbour. Beyond, a long
    one would change them.
    """
    family, knobs = ROPES[kind]
    model = made(family, **knobs)
    with pytest.raises(
        UserError,
        match=f"max_length=33: .*{kind}.* more than 32 tokens.*; set max_length=32 or less",
    ):
        choose(model, longest=33)
    forward_path, _ = choose(model, longest=32)
    rng = np.random.default_rng(0)
    some = lambda *lengths: Example(
        rng.integers(3, 259, 4), tuple(rng.integers(3, 259, n) for n in lengths), ""
    )
    short = some(5, 6)
    fitting = some(28, 3)
    long = some(60, 3)

    def logps(*neighbours):
        with torch.no_grad():
            batch = pack([short, *neighbours], pad_token_id=0, longest=64)
            return models.response_logps(model, batch, forward_path).sum.view(2, -1)[:, 0]

    torch.testing.assert_close(logps(fitting), logps(), atol=1e-5, rtol=0)
    assert (logps(long) - logps()).abs().max() > 1e-3, "the refusal would be for nothing"


def test_rope_is_checked_before_data_are_read(train, tmp_path):
    family, knobs = ROPES["dynamic"]
    made(family, **knobs).save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="max_length=96: the model's rotary embeddings"):
        train(
            "rope", "loss=sft", f"model.name_or_path={tmp_path}/model", "datasets=[nowhere.jsonl]"
        )


def test_ordinary_ids_leave_special_tokens_out(tiny_model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    ids = layout_probe.ordinary_ids(model, tokenizer)
    assert (
        not set(ids.tolist()) & set(tokenizer.all_special_ids)
        and ids.max() < model.get_input_embeddings().num_embeddings
    )
