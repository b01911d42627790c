"""Every optimizer: what it steps, what two processes and a resumed run make of it, and what is
refused.
"""

import json
from importlib.util import find_spec

import pytest
import torch
import torch.distributed as dist
from groups import halted_after, run_in_group, train_until
from runs import DPO, evaluate, outcome, records, same, state_of
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from plumb.console import to_dict
from plumb.distributed import sharding
from plumb.errors import UserError
from plumb.losses.registry import build_loss
from plumb.runs.policy_file import load_policy_state
from plumb.training.optimizers import averaged_weights, make_optimizer

CPU = torch.device("cpu")
DECAY = "optimizer_args={weight_decay: 0.5}"
ROUNDED = ["stochastic_rounding=true", "model.policy_dtype=bfloat16"]
CASES = {
    "muon": ["optimizer=muon"],
    "Adafactor": ["optimizer=Adafactor"],
    "Rprop": ["optimizer=Rprop"],
    "AdamW, state": ["optimizer=AdamW", "optimizer_state=bfloat16"],
    "muon, state": ["optimizer=muon", "optimizer_state=bfloat16"],
    "RMSprop, rounded": ["optimizer=RMSprop", *ROUNDED],
    "muon, rounded": ["optimizer=muon", "optimizer_state=bfloat16", *ROUNDED],
    "decay": ["optimizer=AdamW", DECAY, "weight_decay_on=matrices"],
    "AdamWScheduleFree": ["optimizer=AdamWScheduleFree"],
    "AdamW8bit": ["optimizer=AdamW8bit", "optimizer_args={min_8bit_size: 64}"],
}
PACKAGE_OF = {"AdamWScheduleFree": "schedulefree", "AdamW8bit": "bitsandbytes"}
SHARDED = [name for name in CASES if PACKAGE_OF.get(name) != "bitsandbytes"]


def skip_without_package(case):
    if case in PACKAGE_OF:
        pytest.importorskip(PACKAGE_OF[case])


@pytest.fixture
def knobs(compose):
    return lambda *overrides: compose(
        "exp_name=x", "model.name_or_path=y", "lr=0.01", "warmup_steps=0", *overrides
    )


# ---- one step after another, on layers with gradients that are made up ----


def layers(dtype):
    torch.manual_seed(0)
    parts = (nn.Embedding(6, 5), nn.Linear(5, 7), nn.Linear(7, 3), nn.LayerNorm(3))
    return nn.Sequential(*parts).to(dtype)


def give_gradients(model, step):
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        drawn = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        cut = isinstance(p, DTensor)
        p.grad = distribute_tensor(drawn, p.device_mesh, p.placements) if cut else drawn


def three_steps(config, model):
    """Return the weights and the optimizer's state after three steps, and the weights that are
    evaluated, all in full.
    """
    optimizer = make_optimizer(config, model, CPU)
    for step in range(3):
        give_gradients(model, step)
        optimizer.step()
    tensors = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        of_p = {k: v for k, v in optimizer.state[p].items() if torch.is_tensor(v)}
        tensors |= {f"{name} {key}": x for key, x in of_p.items()}
    with averaged_weights(model, optimizer):
        tensors |= {f"{name} averaged": p.detach().clone() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        assert torch.equal(sharding.local(p), sharding.local(tensors[name]))
    return {name: sharding.full_tensor(x) for name, x in tensors.items()}


def compare_sharded(configs):
    """Step each optimizer on two processes, and on one."""
    for name, config in configs.items():
        dtype = getattr(torch, config.model.policy_dtype)
        model = layers(dtype)
        fully_shard(model)
        assert any(isinstance(p, DTensor) for p in model.parameters()), dist.get_rank()
        two, one = three_steps(config, model), three_steps(config, layers(dtype))
        assert two.keys() == one.keys()
        for key in one:
            torch.testing.assert_close(two[key], one[key], atol=1e-12, rtol=0, msg=f"{name} {key}")


def test_two_processes_step_as_one(knobs):
    """In float64 within rounding; rounded at random, to the bit: the random numbers are those of a
    number's place in the full matrix.
    """
    installed = [name for name in SHARDED if find_spec(PACKAGE_OF.get(name, "torch"))]
    wide = ["model.policy_dtype=float64"]
    configs = {name: knobs(*wide, *CASES[name]) for name in installed}
    assert len(configs) >= 8
    run_in_group(2, compare_sharded, configs)


def test_muon_steps_matrices_and_adamw_the_rest(compose):
    """Each as torch's own does, with its own arguments; the matrices are those of the blocks."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": False}
    model, other = (LlamaForCausalLM(LlamaConfig(**sizes, **heads)) for _ in range(2))
    other.load_state_dict(model.state_dict())
    options = ["optimizer=muon", "optimizer_args={momentum: 0.9, betas: [0.8, 0.9]}", "lr=0.01"]
    optimizer = make_optimizer(compose(*options), model, CPU)
    in_blocks = {p for name, p in other.named_parameters() if ".layers." in name and p.ndim == 2}
    assert len(in_blocks) == 7
    rest = [p for p in other.parameters() if p not in in_blocks]
    by_hand = [
        torch.optim.Muon(in_blocks, lr=0.01, momentum=0.9, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=0.01, betas=(0.8, 0.9)),
    ]
    for step in range(3):
        for each in (model, other):
            give_gradients(each, step)
        for each in (optimizer, *by_hand):
            each.step()
    for name, p in model.named_parameters():
        assert torch.equal(p, other.get_parameter(name)), name


def test_only_matrices_decay(knobs):
    """With gradients of 0, AdamW shrinks a weight by lr * weight_decay and nothing else. A head's
    learning rate of its own stays beside that.
    """
    model = layers(torch.float32)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = make_optimizer(knobs(*CASES["decay"]), model, CPU)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        shrinks = name in ("1.weight", "2.weight")
        torch.testing.assert_close(p.detach(), before[name] * (1 - 0.01 * 0.5 * shrinks))


def test_a_second_moment_in_bfloat16_follows_that_in_float32(knobs):
    """With beta2 = 0.999 an average moves by a thousandth, which bfloat16 rounds away: to the
    nearest it would stand still. Rounded stochastically it stays within some percent.
    """
    moments = {}
    for state in ("full", "bfloat16"):
        p = nn.Linear(64, 64, bias=False)
        optimizer = make_optimizer(knobs("optimizer=AdamW", f"optimizer_state={state}"), p, CPU)
        generator = torch.Generator().manual_seed(0)
        for step in range(600):
            size = 1.0 if step < 300 else 0.1
            p.weight.grad = size * torch.randn(64, 64, generator=generator)
            optimizer.step()
        moments[state] = optimizer.state[p.weight]["exp_avg_sq"]
    assert moments["bfloat16"].dtype == torch.bfloat16
    ratio = moments["bfloat16"].double() / moments["full"].double()
    assert ratio.mean() == pytest.approx(1, abs=2e-3) and ratio.std() < 0.06
    nearest = torch.tensor(0.5, dtype=torch.bfloat16)
    assert nearest.mul(0.999).add(0) == nearest


# ---- in runs ----


@pytest.mark.parametrize("case", [case for case in CASES if case not in ("Rprop", "decay")])
def test_halted_and_resumed_it_ends_the_same(case, train):
    skip_without_package(case)
    options = [*DPO, *CASES[case], "n_examples=12", "save_every=4", "warmup_steps=0", "lr=1e-4"]
    options += ["n_eval_examples=1", "do_first_eval=false", "resume=auto"]
    whole = outcome(train("whole", *options))
    with halted_after(2):
        train("halted", *options)
        pytest.fail("it was not halted")
    if case == "AdamW, state":  # whose steps are counted for each group of parameters
        with pytest.raises(UserError, match="counts the steps of 1 groups of parameters, and here"):
            train("halted", *options, "weight_decay_on=matrices", "resume_allow=[weight_decay_on]")
    assert same(outcome(train("halted", *options)), whole)


@pytest.mark.parametrize("name", ["muon", "Adafactor"])
def test_what_steps_whole_matrices_resumes_under_the_other_trainer(name, train, of_two, tmp_path):
    """One process, then two, as if it had been one."""
    options = [*DPO, *CASES[name], "n_examples=12", "save_every=4", "warmup_steps=0", "lr=1e-4"]
    options += ["n_eval_examples=1", "do_first_eval=false", "resume=auto"]
    options += ["model.policy_dtype=float64"]
    whole = outcome(train("whole", *options))
    with halted_after(2):
        train("halted", *options)
        pytest.fail("it was not halted")
    run_in_group(2, train_until, of_two("halted", *options), None)
    assert same(outcome(tmp_path / "halted"), whole, tolerance=1e-8)


def test_the_average_of_schedule_free_is_evaluated_saved_and_read(train, tmp_path):
    """policy.pt holds the average, of which eval.py finds the loss that the run found; the state
    holds what is trained, which is another model.
    """
    skip_without_package("AdamWScheduleFree")
    options = [*CASES["AdamWScheduleFree"], "sample_during_eval=true", "n_eval_model_samples=1"]
    options += ["sample_max_new_tokens=2", "warmup_steps=0", "do_first_eval=false"]
    run_dir = train("run", *DPO, *options)
    saved, trained = load_policy_state(str(run_dir)), state_of(run_dir)
    apart = max(float((saved[n] - trained[f"policy.{n}"]).abs().max()) for n in saved)
    assert apart > 1e-4
    evaluate(run_dir, "--out", tmp_path / "eval.json")
    found = json.loads((tmp_path / "eval.json").read_text())["metrics"]["loss/eval"]
    assert found == pytest.approx(records(run_dir, "eval")[-1]["loss/eval"], abs=1e-6)


REFUSED = {
    "optimizer=Muon: expected one of .*, muon": ["optimizer=Muon"],
    "weight_decay_on=matrices: no weight decays with optimizer=RMSprop": [
        "weight_decay_on=matrices"
    ],
    "optimizer_state=bfloat16: is for optimizer=Adam, AdamW": [
        "optimizer=Adafactor",
        "optimizer_state=bfloat16",
    ],
    "SGD without momentum has no state": ["optimizer=SGD", "optimizer_state=bfloat16"],
    "is for model.policy_dtype=bfloat16, and here it is float32": ["stochastic_rounding=true"],
    "adapter=lora trains float32 adapters": [*ROUNDED, "adapter=lora"],
    "optimizer=adamw: expected .*; did you mean optimizer=AdamW\\?": ["optimizer=adamw"],
    "optimizer=paged_adamw_8bit: .*; did you mean optimizer=PagedAdamW8bit\\?": [
        "optimizer=paged_adamw_8bit"
    ],
    "optimizer=muon optimizer_args={'nosuch': 1}: nosuch is no argument of Muon .*, nor of AdamW": [
        "optimizer=muon",
        "optimizer_args={nosuch: 1}",
    ],
    "stochastic_rounding=True: is not made for the critic": [
        *ROUNDED,
        "loss=ppo",
        "loss.critic=policy",
        "reward.terms={brief: {rule: shorter}}",
        "max_length=512",
        "max_prompt_length=128",
    ],
    "activation_offload=true: is not made for the critic": [
        "activation_offload=true",
        "loss=ppo",
        "loss.critic=policy",
        "reward.terms={brief: {rule: shorter}}",
        "max_length=512",
        "max_prompt_length=128",
    ],
}
OF_SCHEDULE_FREE = {
    "lr_schedule=cosine: optimizer=AdamWScheduleFree takes the place of a schedule; set"
    " lr_schedule=constant": ["lr_schedule=cosine"],
    "ema_decay=0.9: .*; set ema_decay=null": ["ema_decay=0.9"],
    "set reference_update_every=null": ["reference_update_every=2"],
    "which bfloat16 rounds away; set float32": ["model.policy_dtype=bfloat16"],
}
OF_BITSANDBYTES = {
    "optimizer=AdamW8bit: bitsandbytes does not take weights that are sharded": [
        "optimizer=AdamW8bit",
        "trainer=FSDPTrainer",
    ],
    "there is no GPU here; set optimizer=AdamW8bit": ["optimizer=PagedAdamW8bit"],
    "optimizer=AdamW8bit: bitsandbytes does not take float64": [
        "optimizer=AdamW8bit",
        "model.policy_dtype=float64",
    ],
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_does_not_fit_is_refused(message, train):
    with pytest.raises(UserError, match=message):
        train("refused", *DPO, *REFUSED[message])


@pytest.mark.parametrize("message", OF_SCHEDULE_FREE)
def test_what_schedule_free_does_not_take_is_refused(message, train):
    skip_without_package("AdamWScheduleFree")
    with pytest.raises(UserError, match=message):
        train("refused", *DPO, *CASES["AdamWScheduleFree"], *OF_SCHEDULE_FREE[message])


@pytest.mark.parametrize(("name", "advised"), [("AdamW", True), ("AdamW8bit", False)])
def test_what_coarse_weights_are_advised_is_possible(name, advised, train, capsys):
    skip_without_package(name)
    coarse = ["model.policy_dtype=bfloat16", "n_examples=4", "do_first_eval=false"]
    train("run", *DPO, f"optimizer={name}", *coarse, "do_last_eval=false")
    (note,) = [x for x in capsys.readouterr().out.splitlines() if "round small updates" in x]
    assert ("stochastic_rounding=true" in note) == advised


def test_what_is_advised_without_memory_is_not_done_yet(compose):
    from train import fewer_bytes, smaller_steps

    def bytes_of(*options):
        config = compose("exp_name=x", "model.name_or_path=y", *options)
        return fewer_bytes(config, build_loss(to_dict(config.loss)))

    plain = compose("exp_name=x", "model.name_or_path=y", *DPO)
    assert "adapter=lora with model.quantize=nf4, reference=cached, a sm" in bytes_of(*DPO)
    single = bytes_of("loss=sft")
    assert "reference" not in single and "adapter=lora," not in single
    assert "nf4" not in bytes_of(*DPO, "compile=true")
    assert "checkpointing=true, or model.fsdp_policy_mp=bfloat16" in smaller_steps(plain, None)
    lean = ["adapter=lora", "model.quantize=nf4", "model.fsdp_policy_mp=bfloat16"]
    done = compose("exp_name=x", "model.name_or_path=y", *DPO, *lean)
    assert bytes_of(*DPO, *lean).endswith(": trainer=FSDPTrainer on more GPUs, a smaller model")
    assert "fsdp_policy_mp" not in smaller_steps(done, 512)


@pytest.mark.parametrize("message", OF_BITSANDBYTES)
def test_what_bitsandbytes_does_not_take_is_refused(message, train):
    skip_without_package("AdamW8bit")
    with pytest.raises(UserError, match=message):
        train("refused", *DPO, *OF_BITSANDBYTES[message])


@pytest.mark.parametrize("name", ["AdamWScheduleFree", "AdamW8bit"])
def test_an_optimizer_that_is_not_installed_is_named_with_its_requirements(
    name, train, monkeypatch
):
    from plumb.settings import optimizer_checks

    monkeypatch.setattr(optimizer_checks, "find_spec", lambda package: None)
    with pytest.raises(UserError, match=f"optimizer={name}: needs .* -r requirements-"):
        train("refused", *DPO, f"optimizer={name}")
