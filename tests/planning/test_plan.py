"""plan=true: exact numbers where they can be worked out by hand, and the same counts as real
models.
"""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import FAMILIES, SIZES, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from plumb.data.examples import lengths_of
from plumb.data.tokenization import Example
from plumb.errors import UserError
from plumb.losses.registry import build_loss
from plumb.models.adapter_sources import Adapted
from plumb.models.adapters import knobs_of
from plumb.models.blocks import block_class
from plumb.models.load import no_dropout
from plumb.planning import activations, plan
from plumb.settings.validation import validate
from plumb.training import budget, run_plan
from plumb.training.budget import ClusterShape, Precision, Weights

SFT = {"name": "sft", "average_over": "examples"}
REWARD = {"name": "reward", "read": "last", "margin": 0.0, "label_smoothing": 0, "centering": 0.0}
ARCHITECTURE = (
    "model_type: llama, hidden_size: 4096, intermediate_size: 11008, num_hidden_layers: 2,"
    " vocab_size: 32000"
)
RANDOM = [
    f"model.architecture={{{ARCHITECTURE}, num_attention_heads: 32}}",
    "model.name_or_path=null",
    "model.tokenizer_name_or_path=demo/tokenizer",
]


@pytest.fixture
def planned(compose, tmp_path):
    """`planned(*overrides)` -> (config, loss) of a plan for a wide model of two layers."""

    def run(*overrides):
        config = compose(
            "exp_name=x",
            f"local_dirs=[{tmp_path}]",
            "wandb.enabled=false",
            "plan=true",
            *RANDOM,
            *overrides,
        )
        return config, validate(config)

    return run


# ---- by hand ----

TWO = Weights([torch.Size([10, 4]), torch.Size([4])], [[torch.Size([4, 4]), torch.Size([4])]] * 3)


def test_memory_by_hand():
    """104 numbers: 40 + 4 of the root, 3 blocks of 16 + 4. float32, Adam, a live reference in 16
    bits.
    """
    assert TWO.n == 104
    got = budget.memory(
        TWO,
        ClusterShape(),
        Precision(4, 4, 2, 8.0),
        sharded=False,
        live=True,
        activations=1000,
        head=100,
        foreach=True,
    )
    assert got.kinds == {
        "weights": (416, 416, 416),
        "gradients": (416, 416, 416),
        "optimizer state": (832, 832, 832),
        "reference": (208, 208, 208),
        "activations": (1000, 0, 0),
        "head and loss": (100, 0, 0),
        "optimizer's temporaries": (0, 0, 416),
    }
    assert got.moments == (2972, 1872, 2288) and got.peak == 2972


def test_memory_of_an_adapter_by_hand():
    """20 numbers of adapters in float32 beside 104 of 2 bytes; 10 are trained. The live reference
    is part of the policy.
    """
    got = budget.memory(
        TWO._replace(adapters=20, trained=10),
        ClusterShape(),
        Precision(2, 2, 2, 8.0),
        sharded=False,
        live=True,
        activations=1000,
        head=100,
        foreach=True,
    )
    assert got.kinds == {
        "weights": (288, 288, 288),
        "gradients": (40, 40, 40),
        "optimizer state": (80, 80, 80),
        "activations": (1000, 0, 0),
        "head and loss": (100, 0, 0),
        "optimizer's temporaries": (0, 0, 40),
    }


def test_the_plan_of_an_adapter(planned):
    """2 layers of a 7B model: 4 matrices of 4,096 x 4,096 and 3 of 4,096 x 11,008 get rank 16."""
    config, loss = planned(*PAIRS, "adapter=lora", "lr=1e-5", "reference=live")
    shown = plan.show(config, loss)
    numbers = 2 * 16 * (4 * (4096 + 4096) + 3 * (4096 + 11008))
    assert f" and {numbers / 1e6:,.1f} M of an adapter, live reference" in shown
    assert not re.search("^reference ", shown, re.M)


def test_memory_of_shards_by_hand():
    """Over 4 ranks, computing in 16 bits: 10 rows are cut into 3 each, so a rank keeps 3 * 4 + 1 +
    3 * (4 + 1) = 28 numbers.
    """
    layout = ClusterShape(n_gpus=4)
    assert TWO.on_one(layout) == 28
    got = budget.memory(
        TWO,
        layout,
        Precision(4, 2, 4, 4.0),
        sharded=True,
        live=False,
        activations=0,
        head=0,
        foreach=False,
    )
    assert got.kinds == {
        "weights": (112, 112, 112),
        "gradients": (112, 112, 112),
        "optimizer state": (112, 112, 112),
        "gathered weights": ((44 + 40) * 2, 44 * 2, 0),
        "gradients on their way": (20 * 6, 44 * 6, 0),
    }
    offloaded = budget.memory(
        TWO,
        ClusterShape(4, 2, offload=True),
        Precision(4, 2, 4, 4.0),
        sharded=True,
        live=False,
        activations=0,
        head=0,
        foreach=True,
    )
    assert (
        offloaded.kinds.keys() == {"gathered weights", "gradients on their way"}
        and offloaded.host == 2 * 28 * 12
    )


def test_tensor_parallel_splits_the_matrices_of_blocks():
    """2-D on 4 GPUs: the root 22 on each of 2 ranks, a block's matrix a quarter, its bias a
    half.
    """
    layout = ClusterShape(n_gpus=4, tp_size=2)
    assert (layout.ranks, layout.shards) == (2, 2)
    assert TWO.on_one(layout) == 20 + 2 + 3 * (4 + 2)
    assert TWO.gathered(layout) == (44, 8 + 4)


def test_traffic_by_hand():
    """Two copies over 2 ranks each: half of 104 numbers is gathered twice per microbatch, and
    scattered after each or once; then shards of 52 are summed, once.
    """
    got = budget.traffic(
        TWO,
        ClusterShape(4, shard_size=2),
        Precision(4, 2, 4, 4.0),
        n_micro=3,
        live=False,
        each=True,
    )
    assert got == 3 * 52 * (2 + 2 + 4) + 2 * (1 / 2) * 52 * 4
    once = budget.traffic(
        TWO,
        ClusterShape(4, shard_size=2),
        Precision(4, 2, 4, 4.0),
        n_micro=3,
        live=False,
        each=False,
    )
    assert got - once == 2 * 52 * 4


@pytest.mark.parametrize(
    ("optimizer", "arguments", "expected"),
    [
        ("AdamW", "null", (8, False)),
        ("AdamW", "{amsgrad: true}", (12, False)),
        ("RMSprop", "null", (4, True)),
        ("SGD", "null", (0, False)),
        ("SGD", "{momentum: 0.9}", (4, False)),
        ("AdamW", "{foreach: true}", (8, True)),
        ("Adafactor", "null", (2 * 256 * 4 / 256**2, False)),
        ("muon", "null", (4, False)),
    ],
)
def test_optimizer_state(planned, optimizer, arguments, expected):
    config, _ = planned(f"optimizer={optimizer}", f"optimizer_args={arguments}")
    assert plan.optimizer_state(config, torch.float32) == expected


def test_optimizer_state_of_two_kinds_and_in_bfloat16(planned):
    """muon keeps 4 bytes for a weight in a matrix of a block, and AdamW's 8 for the others; either
    half of that in bfloat16. Weights of 2 bytes that are rounded stochastically have a state of 4.
    """
    muon = planned("optimizer=muon")[0]
    assert plan.optimizer_state(muon, torch.float32, matrices=0.75) == (0.75 * 4 + 0.25 * 8, False)
    half = planned("optimizer=muon", "optimizer_state=bfloat16")[0]
    assert plan.optimizer_state(half, torch.float32, matrices=0.75) == (0.75 * 2 + 0.25 * 4, False)
    bf16 = "model.policy_dtype=bfloat16"
    for knobs, expected in ((["stochastic_rounding=true"], 4), ([], 2)):
        config = planned("optimizer=RMSprop", bf16, *knobs)[0]
        assert plan.optimizer_state(config, torch.bfloat16)[0] == expected
    weights = Weights([torch.Size([10, 4])], [[torch.Size([4, 4]), torch.Size([4])]] * 2)
    assert plan.share_of_matrices(weights) == 32 / (40 + 40)


@pytest.mark.parametrize(
    ("options", "n_gpus", "expected"),
    [
        # a weight, its gradient and a moment of bfloat16, of half the embedding
        (["optimizer_state=bfloat16", "model.policy_dtype=bfloat16"], 2, 3 * 4 * 64 * 8),
        (["optimizer_state=bfloat16"], 1, 4 * 128 * 8),  # a moment only
        (["stochastic_rounding=true", "model.policy_dtype=bfloat16"], 1, 2 * 4 * 128 * 8),
        (["model.policy_dtype=bfloat16"], 1, 0),
        (["optimizer=muon"], 2, 3 * 4 * 20 * 20),  # the full matrix, which has one moment
        (["optimizer=muon"], 1, 0),
        (["optimizer=Adafactor"], 2, 2 * 4 * 128 * 8),
    ],
)
def test_stand_ins_of_a_step(options, n_gpus, expected, planned):
    config, _ = planned("optimizer=RMSprop", *options)
    dtype = getattr(torch, config.model.policy_dtype)
    weights = Weights([torch.Size([128, 8])], [[torch.Size([20, 20]), torch.Size([20])]])
    assert plan.stand_in_bytes(config, weights, ClusterShape(n_gpus), dtype) == expected


def test_stand_ins_count_as_the_optimizer_steps(planned):
    config, loss = planned(*PAIRS, "optimizer=AdamW", "optimizer_state=bfloat16")
    made = plan.make_plan(config, loss, plan.read_model(config, loss), plan.read_data(config, loss))
    assert made.memory.kinds["optimizer's temporaries"] == (0, 0, 2 * 4 * 32000 * 4096)


def test_a_share_of_blocks_is_planned_in_whole_ones(planned):
    """Of two blocks."""
    for share, expected in ((0.7, 0.5), (0.5, 0.5)):
        config, loss = planned(*PAIRS, f"activation_checkpointing={share}")
        model = plan.read_model(config, loss)
        assert plan.kept_share(config, model) == expected
        assert plan.kept_share(plan.changed(config, {"compile": True}), model) == share
    with pytest.raises(UserError, match="activation_checkpointing=0.3: keeps none of the 2"):
        plan.show(*planned(*PAIRS, "activation_checkpointing=0.3"))


def test_quantized_weights(compose):
    """Half a byte and the scales in the matrices of the blocks, the full size elsewhere."""
    weights = Weights([torch.Size([10, 4])], [[torch.Size([4, 4]), torch.Size([8])]] * 2)
    for kind, each in (("nf4", 0.5 + 1 / 64 + 4 / 256 / 64), ("int8", 1 + 4 / 256)):
        config = compose("exp_name=x", f"model.quantize={kind}")
        expected = (32 * each + 56 * 2) / 88
        assert plan.weight_bytes(config, weights, 2) == pytest.approx(expected)
    config = compose("exp_name=x")
    assert plan.weight_bytes(config, weights, 2) == 2
    assert plan.gathered_bytes(config, weights, 2) is None


def test_quantized_shards_by_hand(compose):
    """Over 4 ranks, computing in 16 bits: the root's 44 numbers are gathered as 2 bytes each, and
    the 16 + 4 of a block as half a byte and a scale, and 2 bytes; a matrix of 16 is dequantized, in
    float32 and in 16 bits. 10 numbers of 20 in adapters are trained.
    """
    config = compose("exp_name=x", "model.quantize=nf4")
    each = plan.BYTES["nf4"]
    precision = Precision(
        plan.weight_bytes(config, TWO, 4),
        2,
        4,
        4.0,
        in_blocks=plan.gathered_bytes(config, TWO, 2),
    )
    dequantized = plan.dequantized_bytes(config, TWO, torch.float32, torch.bfloat16)
    assert dequantized == 16 * (4 + 2)
    weights = TWO._replace(adapters=20, trained=10)
    got = budget.memory(
        weights,
        ClusterShape(n_gpus=4),
        precision,
        sharded=True,
        live=True,
        activations=0,
        head=0,
        foreach=False,
        dequantized=dequantized,
    )
    block = 16 * each + 4 * 2
    mean = (48 * each + 56 * 4) / 104
    assert got.kinds["weights"] == pytest.approx((28 * mean + 20 / 4 * 4,) * 3)
    assert got.kinds["gathered weights"] == pytest.approx((44 * 2 + 2 * block, 44 * 2, 0))
    assert got.kinds["a dequantized weight"] == (96, 0, 0)
    sent = budget.traffic(
        weights, ClusterShape(4, shard_size=2), precision, n_micro=3, live=True, each=False
    )
    assert sent == pytest.approx(3 * 3 * (44 * 2 + 3 * block) / 2 + 10 * 4 / 2 + 10 * 4 / 2)


# ---- as real models have it ----


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_of_a_family(family, compose):
    """The blank model's shapes are the real one's, and its activations can be counted, unless its
    attention says otherwise.
    """
    spec = {"model_type": family} | SIZES | FAMILIES[family]
    config = compose("exp_name=x", "model.name_or_path=null", *RANDOM)
    config.model.architecture = spec
    got, real = plan.read_model(config, build_loss(SFT)), tiny_model(family)
    scorer = plan.read_model(config, build_loss(REWARD))
    n_head = real.get_output_embeddings().weight.numel()
    tied = real.config.get_text_config().tie_word_embeddings
    bias = real.get_output_embeddings().bias is not None and SIZES["vocab_size"]
    assert scorer.n_out == 1 and scorer.weights.n == got.weights.n + 32 - (
        0 if tied else n_head + bias
    )
    assert got.weights.n == sum(p.numel() for p in real.parameters())
    assert len(got.weights.blocks) == sum(
        isinstance(m, block_class(real, None)) for m in real.modules()
    )
    assert got.cost == budget.cost_of(real)
    assert got.packed == (family not in ("gptj", "gemma2"))
    part = plan.Part((1, 64), 80, 40) if got.packed else plan.Part((4, 16), None, 40)
    most, least = (plan.count_body(got, part, torch.float32, None, kept) for kept in (1.0, 0.0))
    assert most and least and 0 < sum(least) < sum(most)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_fake_tensors_hold_what_real_ones_do(family, autocast):
    """The same pass with data, counted in the same way; and autograd's own count of what it saves
    is below, but not far.
    """
    config = AutoConfig.for_model(family, **(SIZES | FAMILIES[family]))
    no_dropout(config)
    got = activations.count(config, (1, 64), 80, torch.float32, autocast, False)

    model = tiny_model(family).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    no_dropout(model.config)
    model.set_attn_implementation(activations.NAME)
    body = model.base_model
    row = torch.zeros(1, 64, dtype=torch.int64)
    saved = {}
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    for p in body.parameters():
        p.grad = torch.zeros_like(p)
    known = [*body.parameters(), *body.buffers(), *(p.grad for p in body.parameters()), row]
    ours = {x.untyped_storage().data_ptr() for x in known}

    def keep(x):
        if x.untyped_storage().data_ptr() not in ours:
            saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with (
        activations._Counter(known, 32) as counter,
        torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
    ):
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            hidden = body(
                input_ids=row, position_ids=row, attention_mask=mask, n_keys=80, use_cache=False
            )[0]
        hidden.backward(torch.ones_like(hidden))
    assert sum(counter.most) == sum(got)
    assert 0.7 * sum(got) < sum(saved.values()) <= sum(got)


# ---- whole plans ----

PAIRS = ["loss=dpo", "loss.beta=0.1", "n_examples=1000", "batch_size=32"]


def test_a_plan_of_assumed_lengths(planned):
    text = plan.show(*planned(*PAIRS, "max_length=400", "max_prompt_length=200"))
    assert "dpo of LlamaForCausalLM, 666.9 M parameters, live reference" in text
    assert (
        "assumed: prompt and response of 100 tokens each, a quarter of max_length (hh not on this"
        " machine)" in text
    )
    assert "1,000 examples in 32 steps, 0.3 M tokens" in text
    assert re.search(r"^weights +2\.7 +2\.7 +2\.7$", text, re.M), text
    assert text.splitlines()[-1].startswith("fits: ")


def test_a_plan_of_real_lengths(planned, data, tmp_path):
    """18 pairs of the file are for training; what was tokenized for the plan is gone."""
    config, loss = planned("loss=dpo", "loss.beta=0.1", f"datasets=[{data}]")
    found = plan.read_data(config, loss)
    assert found.n == len(found.examples) and 0 < found.n < 20
    assert f"{found.n} pairs of" in plan.show(config, loss)
    assert [f.name for f in tmp_path.iterdir()] == [data.name], "a plan writes nothing"


def test_the_operations_of_a_forward_pass():
    """2 N T + 2 V d H + 4 q L A with N = 100, V d = 10, q L = 1, of two pairs.

    The first: prompt 4, responses 2 and 3. T = 9, H = 5; A = 4 * 4 / 2 + (4 * 2 + 2 * 2 / 2) + (4 *
    3 + 3 * 3 / 2) = 34.5. The second, with prompts 1 and 2 of its own and responses of 1: T = 5, H
    = 2; A = 1/2 + (1 + 1/2) + 4/2 + (2 + 1/2) = 6.5.
    """
    ids = lambda n: np.zeros(n, np.int32)
    pairs = [Example(ids(4), (ids(2), ids(3)), ""), Example((ids(1), ids(2)), (ids(1), ids(1)), "")]
    assert budget.Cost(100, 10, 1).forward(lengths_of(pairs)) == 200 * (9 + 5) + 20 * (
        5 + 2
    ) + 4 * (34.5 + 6.5)


def test_alternatives_fit(planned):
    """Each is a command of its own; planned by itself, it fits, and says the same number."""
    limited = [*PAIRS, "plan_gpu_gb=12", "reference=live", "tokens_per_microbatch=8192"]
    text = plan.show(*planned(*limited))
    assert "does not fit: needs " in text
    fixes = re.findall(r"^  (\S.*?)  +([\d.]+) GB \(-[\d.]+\)$", text, re.M)
    assert fixes, text
    for change, needs in fixes:
        assert (
            plan.show(*planned(*limited, *change.split())).splitlines()[-1]
            == f"fits: {needs} of 12 GB"
        ), change


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        (["loss=tdpo1", "optimizer=AdamW8bit", "plan_gpu_gb=7"], "reference"),
        (
            ["loss=dpo", "activation_offload=true", "reference=live", "plan_gpu_gb=12"],
            "activation_checkpointing",
        ),
        (
            [
                "loss=dpo",
                "trainer=FSDPTrainer",
                "fsdp_shard_size=3",
                "plan_gpus=3",
                "plan_gpu_gb=2",
            ],
            None,
        ),
    ],
)
def test_no_change_is_proposed_that_is_refused(options, refused, planned, capsys):
    """Neither a reference nor a trainer that the rest does not go with, nor GPUs that are not laid
    out evenly. The proposals' notes are not printed.
    """
    if "optimizer=AdamW8bit" in options:
        pytest.importorskip("bitsandbytes")
    limited = [*options, "loss.beta=0.1", "n_examples=64", "lr=1"]
    config, loss = planned(*limited)
    model, data = plan.read_model(config, loss), plan.read_data(config, loss)
    assert "note: unusual" in capsys.readouterr().out
    proposals = plan.alternatives(config, loss, model, data, validate)
    assert not capsys.readouterr().out
    for change, _ in proposals:
        planned(*limited, *plan.as_options(change).split())
    if refused:
        assert refused in {knob for change in plan.savers(config, loss) for knob in change}
        assert all(refused not in change for change, _ in proposals)
        assert bool(proposals) == (refused == "activation_checkpointing")


def test_a_fitting_size_is_the_edge(planned):
    same = [*PAIRS, "reference=live", "tokens_per_microbatch=2048", "activation_checkpointing=true"]
    needs = float(re.search(r"fits: ([\d.]+) of", plan.show(*planned(*same)))[1])
    assert "\nfits: " in plan.show(*planned(*same, f"plan_gpu_gb={needs + 0.1}"))
    assert "does not fit: " in plan.show(*planned(*same, f"plan_gpu_gb={needs - 0.1}"))


def test_sharding_and_precision_make_it_smaller(planned):
    def peak(*more):
        config, loss = planned(
            *PAIRS, "optimizer=AdamW", "tokens_per_microbatch=1024", "reference=live", *more
        )
        return plan.make_plan(
            config, loss, plan.read_model(config, loss), plan.read_data(config, loss)
        ).memory.peak

    one, eight = peak(), peak("trainer=FSDPTrainer", "plan_gpus=8")
    assert one > eight > peak("trainer=FSDPTrainer", "plan_gpus=8", "model.fsdp_policy_mp=bfloat16")
    assert one > peak("activation_checkpointing=true") and one > peak("reference=cached")
    averaged = "ema_decay=0.9"
    assert peak(averaged) - one == 8 * (
        peak(averaged, "trainer=FSDPTrainer", "plan_gpus=8") - eight
    )


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["plan_gpus=4"], "plan_gpus=4: BasicTrainer is planned on one GPU"),
        (
            ["trainer=FSDPTrainer", "plan_gpus=9", "plan_nodes=2"],
            "plan_gpus=9: the GPUs of all 2 nodes",
        ),
        (["plan_gpu=B52"], "plan_gpu=B52: expected one of H100"),
        (["plan_mfu=1.1"], "plan_mfu=1.1: expected a number in"),
        (["device=cpu"], "device=cpu: a plan is for GPUs"),
        (["plan=false", "plan_gpus=8"], "plan_gpus=8: is for plan=true"),
        (["datasets=[./nosuch.jsonl]"], "nosuch.jsonl"),
        (["model.architecture={model_type: nosuch}"], "model.architecture="),
    ],
)
def test_wrong_input_is_one_line(planned, overrides, said):
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        plan.show(*planned(*overrides))
    assert "\n" not in str(caught.value)


def test_the_command(run_train, tmp_path, tiny_model):
    """Exit code 0, nothing left behind, from a folder's config.json alone, and before there is an
    archive.
    """
    folder = tmp_path / "config-only"
    folder.mkdir()
    (folder / "config.json").write_text((tiny_model / "config.json").read_text())
    done = run_train(
        "exp_name=x",
        "plan=true",
        f"model.name_or_path={folder}",
        "loss=dpo",
        "loss.beta=0.1",
        "n_examples=64",
        "model.archive='.cache/nosuch/*'",
        "trainer=FSDPTrainer",
        "plan_gpus=16",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("fits: 0.")
    assert "16 x H100, nodes: 2, FSDPTrainer, a copy of the model over 16" in done.stdout
    assert [f.name for f in tmp_path.iterdir()] == ["config-only"] and json.loads(
        (folder / "config.json").read_text()
    )


def test_a_cached_reference_that_moves_is_computed_again(planned):
    """Two epochs: one pass over all examples and the held-out ones, or one for each move."""
    demo = ["datasets=[./demo]", "max_length=64", "max_prompt_length=32", "n_examples=null"]
    config, loss = planned(*PAIRS, *demo, "n_epochs=2", "reference=cached")
    model, data = plan.read_model(config, loss), plan.read_data(config, loss)
    assert data.n_held_out > 0
    secs = []
    for every in (None, 1):
        config.reference_update_every = every
        made = plan.make_plan(config, loss, model, data)
        schedule = plan.make_schedule(config, data.n)
        n_fills = 1 if every is None else schedule.n_steps
        seen = data.n if every is None else schedule.n_examples
        n = plan.reference_passes(schedule, every, data.n_held_out)
        assert n == seen + n_fills * data.n_held_out and made.cached
        (line,) = [x for x in plan._run(config, model, data, made) if x.startswith("time")]
        secs.append(line)
    assert secs[0] != secs[1]


# ---- the run decides the same ----


@pytest.mark.parametrize(
    ("gb", "options", "reference"),
    [
        (80, [], "live"),
        (12, [], "cached"),  # a second model would take more than a quarter of what is left
        (80, ["n_epochs=2"], "cached"),
        (80, ["reference=cached", "tokens_per_microbatch=2048"], "cached"),
    ],
)
def test_the_run_decides_as_the_plan(gb, options, reference, planned, monkeypatch):
    """On a card with as much memory, from the model itself."""
    config, loss = planned(*PAIRS, f"plan_gpu_gb={gb}", *options)
    model, mean_tokens, numbers, decided = decisions(config, loss, monkeypatch)
    policy = activations.blank_model(model.config, torch.float32)
    here = numbers_of_run(policy, numbers, mean_tokens, monkeypatch)
    assert here == numbers
    assert run_plan.plan_run(config, policy.config, True, here) == decided
    assert decided.reference == reference


def decisions(config, loss, monkeypatch):
    """-> the model, mean tokens, the plan's numbers, and what it decides from them."""
    model, data = plan.read_model(config, loss), plan.read_data(config, loss)
    made = []

    def noting(*arguments):
        made.append((arguments[3], run_plan.plan_run(*arguments)))
        return made[-1][1]

    monkeypatch.setattr(plan, "plan_run", noting)
    plan.make_plan(config, loss, model, data)
    ((numbers, decided),) = made
    return model, float(lengths_of(data.examples).tokens().mean()), numbers, decided


def numbers_of_run(policy, numbers, mean_tokens, monkeypatch, ranks=None):
    """`ranks`: over how many the policy is sharded; None: it is not."""
    loaded = 0 if ranks is None else numbers.weights  # a part of it is, before memory is measured
    monkeypatch.setattr(
        "plumb.training.budget.memory_at_hand", lambda device: numbers.memory - loaded
    )
    return run_plan.numbers_at_hand(
        policy,
        torch.device("cuda"),
        ranks and SimpleNamespace(n_shards=ranks, tp_size=1, n_rows=ranks),
        mean_tokens=mean_tokens,
        longest=numbers.longest,
        repeats=numbers.repeats,
    )


@pytest.mark.parametrize(("kind", "ranks"), [("nf4", None), ("int8", None), ("nf4", 2)])
def test_the_run_decides_as_the_plan_on_a_quantized_base(kind, ranks, planned, monkeypatch):
    """In one process, and with the base sharded over two."""
    pytest.importorskip("bitsandbytes")
    small = ARCHITECTURE.replace("4096", "512").replace("11008", "1536").replace("32000", "512")
    config, loss = planned(
        *PAIRS,
        f"model.architecture={{{small}, num_attention_heads: 8}}",
        "plan_gpu_gb=0.6",
        "adapter=lora",
        "lr=1e-5",
        "max_length=128",
        "max_prompt_length=64",
        "model.policy_dtype=bfloat16",
        f"model.quantize={kind}",
        *([] if ranks is None else ["trainer=FSDPTrainer", f"plan_gpus={ranks}"]),
    )
    model, mean_tokens, numbers, decided = decisions(config, loss, monkeypatch)
    made = AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16)
    base = SimpleNamespace(whole=lambda device_map: made.requires_grad_(False))
    policy = Adapted(base, knobs_of(config), None, seed=0).whole()
    here = numbers_of_run(policy, numbers, mean_tokens, monkeypatch, ranks)
    assert here.weights == pytest.approx(numbers.weights, rel=1e-4)
    assert here.memory == pytest.approx(numbers.memory, rel=1e-4)
    assert here == replace(numbers, weights=here.weights, memory=here.memory)
    assert run_plan.plan_run(config, policy.config, True, here) == decided


def test_a_rank_that_a_matrix_cannot_have_is_refused(planned):
    """As the run refuses it."""
    pytest.importorskip("peft")
    config, loss = planned(*PAIRS, "adapter=lora", "lr=1e-5", "adapter_rank=5000")
    with pytest.raises(UserError, match="adapter_rank=5000: model.layers.0.* give 4096 or less"):
        plan.show(config, loss)


def test_what_cannot_be_quantized_is_refused(planned):
    """As the run refuses it: the layers of GPT-2 are no linear layers."""
    pytest.importorskip("bitsandbytes")
    config, loss = planned(*PAIRS, "adapter=lora", "lr=1e-5", "model.quantize=nf4")
    config.model.architecture = {"model_type": "gpt2", "n_embd": 64, "n_layer": 1, "n_head": 2}
    with pytest.raises(UserError, match="model.quantize: the layers of GPT2LMHeadModel are not"):
        plan.show(config, loss)


def test_what_samples_beside_the_policy_counts(planned):
    """Keys and values of a token by hand; and what 512 tokens take, held by something else, leaves
    256 tokens less to a microbatch, since half of what is free is for activations. Rows of compiled
    blocks, which have one length, hold the longest tree.
    """
    spec = AutoConfig.for_model("llama", **SIZES | FAMILIES["llama"])
    heads, head_dim = spec.num_key_value_heads, spec.hidden_size // spec.num_attention_heads
    by_hand = 2 * spec.num_hidden_layers * heads * head_dim * 2
    assert budget.cache_bytes(spec, torch.bfloat16) == by_hand

    config, _ = planned(*PAIRS)
    model_config = plan.read_model(config, build_loss(SFT)).config
    numbers = run_plan.Numbers(
        device=torch.device("cuda"),
        memory=40e9,
        weights=2e9,
        trained=2e9,
        reference=0,
        n_weights=0.5e9,
        ranks=1,
        mean_tokens=310.0,
        longest=3000,
        repeats=False,
    )
    tokens = [
        run_plan.plan_run(config, model_config, False, numbers, beside=held).budget
        for held in (20e9, 20e9 + 512 * budget.activation_bytes(model_config, torch.float32, 1))
    ]
    assert tokens[0] - tokens[1] == 256
    compiled = plan.changed(config, {"compile": True, "batch_size": 1})
    assert run_plan.plan_run(compiled, model_config, False, numbers).budget == 3000
