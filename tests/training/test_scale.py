"""The same numbers, however a model lies over processes: FSDP, hybrid sharding, tensor parallelism
and both.

Groups of gloo processes are forked, and each runs many small trainings. `SCALE=all python -m pytest
tests/training/test_scale.py` runs every combination; the suite runs each layout, family, loss and
precision at least once.
"""

import copy
import itertools
import json
import os
from functools import partial

import pytest
import torch
from conftest import ROOT, compose_config
from groups import run_in_group, train_until
from omegaconf import OmegaConf
from runs import FAST, OF_THE_MACHINE, ROWS, STEADY, outcome, records, same
from tiny import FAMILIES, SIZES
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import train
from plumb.console import rank
from plumb.errors import UserError
from plumb.rollouts.rewards import reward
from plumb.settings.validation import validate

ALL = os.environ.get("SCALE") == "all"
MATRIX = [
    "warmup_steps=2",
    "batch_size=4",
    "n_epochs=2",
    "n_examples=37",
    "eval_every=20",
    "max_grad_norm=1",
    STEADY,
]
LOSSES = {
    "sft": ["loss=sft"],
    "live": ["loss=dpo", "loss.beta=0.1", "reference=live"],
    "cached": ["loss=dpo", "loss.beta=0.1", "reference=cached"],
}
LAYOUTS = {
    2: {
        "fsdp": ["trainer=FSDPTrainer"],
        "fsdp, accumulated": ["trainer=FSDPTrainer", "gradient_accumulation_steps=2"],
        "tp": ["trainer=TensorParallelTrainer"],
        "fsdp, reduced each time": [
            "trainer=FSDPTrainer",
            "gradient_accumulation_steps=2",
            "fsdp_reduce=each",
        ],
    },
    4: {
        "fsdp x tp": ["trainer=TensorParallelTrainer", "tp_size=2"],
        "fsdp x tp, accumulated": [
            "trainer=TensorParallelTrainer",
            "tp_size=2",
            "gradient_accumulation_steps=2",
        ],
        "hsdp": ["trainer=FSDPTrainer", "fsdp_shard_size=2"],
        "hsdp, accumulated": [
            "trainer=FSDPTrainer",
            "fsdp_shard_size=2",
            "gradient_accumulation_steps=2",
        ],
    },
}
# Losses and norms are sums of some thousand terms, through two layers, and over ten steps: each is
# off by some tens of units in its last place, 2e-16 * 50 = 1e-14 and 6e-8 * 50 = 3e-6; what is
# wrong, such as a row counted twice, is so by 1e-3 and more.
TOLERANCE = {"float64": 1e-12, "float32": 5e-6}
# Families with an RMS norm compute it in float32 whatever their weights are. Numbers that differ by
# 1e-16 are mostly rounded to the same one, but of the millions that pass through in ten steps one
# may fall to the other side: that is 6e-8 of a term of a gradient, of which the largest are 0.1:
# 6e-9.
ROUNDED_NORMS = 1e-8


def bound_of(family, dtype):
    return max(TOLERANCE[dtype], ROUNDED_NORMS if family in ("llama", "qwen3") else 0)


def run_all(configs):
    """In each process: one training after the other."""
    os.chdir(ROOT)
    for config in configs:
        validate(config)
        OmegaConf.resolve(config)
        train.train(config)


def run_all_and_resume(configs, halted):
    """In each process: trainings, and one that is halted after its third step and resumed."""
    run_all(configs)
    train_until(lambda: halted, 3)
    run_all([halted])


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A folder per family, in float32, with the demo's tokenizer; tied weights where the family has
    them.
    """
    tokenizer, folders = AutoTokenizer.from_pretrained(ROOT / "demo/tokenizer"), {}
    for family in ("llama", "gpt_neox", "qwen3", "gpt2"):
        folders[family] = tmp_path_factory.mktemp("scale") / family
        torch.manual_seed(0)
        sizes = SIZES | FAMILIES[family] | {"vocab_size": len(tokenizer)}
        config = AutoConfig.for_model(
            family, **sizes | ({"tie_word_embeddings": True} if family == "qwen3" else {})
        )
        AutoModelForCausalLM.from_config(config).save_pretrained(folders[family])
        tokenizer.save_pretrained(folders[family])
    return folders


@pytest.fixture
def command(tmp_path, models):
    """`command(name, family, *overrides)`: the config of a small run into tmp_path/name, composed
    here and not in each process.
    """
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return lambda name, family, *overrides: compose_config(
        f"exp_name={name}",
        f"local_run_dir={tmp_path}/{name}",
        f"local_dirs=[{tmp_path}/runs]",
        "wandb.enabled=false",
        f"model.name_or_path={models[family]}",
        f"datasets=[{data}]",
        *FAST,
        *overrides,
    )


def differences(expected, found, rounding=TOLERANCE["float64"]):
    """The largest relative difference of any number of two runs' records.

    An accuracy counts signs of margins. Before the first update those to a cached reference are
    nothing but rounding, whose sign is the machine's; so accuracies are compared where the mean
    margin is a thousand times what `rounding` makes of it, or more.
    """
    assert len(expected) == len(found) > 0
    worst = {}
    for a, b in zip(expected, found, strict=True):
        for key in a.keys() - OF_THE_MACHINE:
            if (
                "rewards" in key
                and "accuracies" in key
                and abs(a[key.replace("accuracies", "margins")]) < 1000 * rounding
            ):
                continue
            worst[key] = max(worst.get(key, 0), abs(a[key] - b[key]) / max(1, abs(a[key])))
    return worst


def chosen(layouts):
    """Every combination, or each layout with each family, loss and precision in turn."""
    whole = itertools.product(layouts, ("llama", "gpt_neox"), LOSSES, TOLERANCE)
    if ALL:
        return list(whole)
    turns = itertools.cycle(
        [
            ("llama", "live", "float64"),
            ("gpt_neox", "cached", "float32"),
            ("gpt_neox", "sft", "float64"),
            ("llama", "cached", "float64"),
            ("gpt_neox", "live", "float64"),
        ]
    )
    return [(layout, *turn) for layout, turn in zip(layouts, turns, strict=False)]


@pytest.mark.parametrize("n", LAYOUTS)
def test_the_numbers_of_one_process(n, command, tmp_path):
    """Ten steps and an evaluation between them and after: every number of metrics.jsonl that is not
    of the machine.
    """
    cases = chosen(LAYOUTS[n])
    options = {
        case: [*MATRIX, *LOSSES[case[2]], f"model.policy_dtype={case[3]}", "lr=1e-3"]
        for case in cases
    }
    run_all(
        command("-".join(x), x[0], *options[case])
        for x, case in {case[1:]: case for case in cases}.items()
    )
    run_in_group(
        n,
        run_all,
        [
            command(f"case{i}", case[1], *options[case], *LAYOUTS[n][case[0]])
            for i, case in enumerate(cases)
        ],
        timeout=600 + 60 * len(cases),
    )
    for i, (layout, *rest) in enumerate(cases):
        expected = records(tmp_path / "-".join(rest))
        worst = differences(
            expected, records(tmp_path / f"case{i}"), bound := bound_of(rest[0], rest[-1])
        )
        assert len([r for r in expected if "loss/train" in r]) == 10
        assert {"grad_norm", "loss/train", "loss/eval"} <= worst.keys()
        print(f"{layout:24} {' '.join(rest):24}: {max(worst.values()):.1e}")
        # Rewards are small differences of large log-probabilities.
        bounds = {
            key: bound if key.startswith(("loss", "grad_norm")) else 4 * bound for key in worst
        }
        assert not (over := {key: x for key, x in worst.items() if x > bounds[key]}), (
            layout,
            rest,
            over,
        )


def test_a_reward_model_over_processes(command, tmp_path):
    """Its head, one row, lies on one process of several; it stays in float32 where the model
    computes in bfloat16.
    """
    options = [*MATRIX, "loss=reward", "loss.read=tokens", "lr=1e-3"]
    kinds = {"fsdp": ["trainer=FSDPTrainer"], "tp": ["trainer=TensorParallelTrainer"]}
    exact = [*options, "model.policy_dtype=float64"]
    mixed = [*options, "model.fsdp_policy_mp=bfloat16", "n_examples=8"]
    run_all([command("one", "gpt_neox", *exact)])
    run_in_group(
        2,
        run_all,
        [
            *(command(kind, "gpt_neox", *exact, *more) for kind, more in kinds.items()),
            *(command(f"{kind}-mixed", "llama", *mixed, *more) for kind, more in kinds.items()),
        ],
    )
    a = torch.load(tmp_path / "one/LATEST/policy.pt", weights_only=True)["state"]
    assert a["lm_head.weight"].shape == (1, 32)
    for kind in kinds:
        assert (
            max(differences(records(tmp_path / "one"), records(tmp_path / kind)).values()) <= 1e-12
        ), kind
        b = torch.load(tmp_path / kind / "LATEST/policy.pt", weights_only=True)["state"]
        assert a.keys() == b.keys() and all((a[k] - b[k]).abs().max() <= 1e-12 for k in a), kind
        assert all(r["loss/eval"] > 0 for r in records(tmp_path / f"{kind}-mixed", "eval"))


def test_a_head_is_fitted_over_processes(command, tmp_path, monkeypatch):
    """Every process computes its part of the frozen states, and keeps its part of one fit."""
    monkeypatch.setattr("plumb.models.scalar_head.MIN_PAIRS", 5)
    options = [
        "loss=reward",
        "lr=1e-12",
        "n_examples=4",
        "batch_size=4",
        "model.policy_dtype=float64",
        "do_first_eval=false",
    ]
    kinds = {"fsdp": ["trainer=FSDPTrainer"], "tp": ["trainer=TensorParallelTrainer"]}
    run_all([command("one", "llama", *options)])
    run_in_group(
        2, run_all, [command(kind, "llama", *options, *more) for kind, more in kinds.items()]
    )
    heads = [
        torch.load(tmp_path / run / "LATEST/policy.pt", weights_only=True)["state"][
            "lm_head.weight"
        ]
        for run in ("one", *kinds)
    ]
    assert heads[0].abs().max() > 1e-3
    # The states agree to 1e-14 or so; a regression may blow that up by its condition, at most 1e3
    # at the least ridge.
    assert all((head - heads[0]).abs().max() <= 1e-9 * heads[0].abs().max() for head in heads[1:])


GPT2_PLAN = OmegaConf.to_container(OmegaConf.load(ROOT / "config/model/gpt2-large.yaml").tp_plan)


@pytest.mark.parametrize("layout", ["trainer=FSDPTrainer", "trainer=TensorParallelTrainer"])
def test_other_families(layout, command, tmp_path):
    """Tied weights and norms within heads (Qwen 3), and matrices that lie the other way round, with
    a plan of our own (GPT-2).
    """
    families = {
        "qwen3": [],
        "gpt2": [f"model.tp_plan={json.dumps(GPT2_PLAN).replace(chr(34), '')}"],
    }
    options = [
        *MATRIX,
        *LOSSES["live"],
        "lr=1e-3",
        "model.policy_dtype=float64",
        "optimizer=AdamW",
        "sample_during_eval=true",
        "n_eval_model_samples=2",
        "sample_max_new_tokens=4",
        "sample_temperature=0",
    ]
    run_all(command(f"one-{family}", family, *options) for family in families)
    run_in_group(
        2,
        run_all,
        [
            command(f"two-{family}", family, *options, *more, layout)
            for family, more in families.items()
        ],
    )
    for family in families:
        one, two = tmp_path / f"one-{family}", tmp_path / f"two-{family}"
        bound = bound_of(family, "float64")
        assert max(differences(records(one), records(two), bound).values()) <= bound, family
        assert (one / "samples.jsonl").read_text() == (two / "samples.jsonl").read_text()
        a, b = (torch.load(d / "LATEST/policy.pt", weights_only=True)["state"] for d in (one, two))
        assert a.keys() == b.keys() and all((a[k] - b[k]).abs().max() <= bound for k in a), family


def test_adapters_over_split_matrices(command, tmp_path):
    """Four processes, of which two share each matrix: of B A, each has its part of what meets the
    split. With another start of the adapter, whose frozen copy is the reference, and with matrices
    that lie the other way round. Halted and resumed it ends the same, to the bit.
    """
    families = {
        "llama": [],
        "gpt2": [f"model.tp_plan={json.dumps(GPT2_PLAN).replace(chr(34), '')}"],
    }
    options = [
        *MATRIX,
        *LOSSES["live"],
        "adapter=lora",
        "adapter_init=pissa",
        "adapter_rank=4",
        "lr=1e-3",
        "model.policy_dtype=float64",
        "n_examples=17",
        "save_every=8",
        "resume=auto",
    ]
    run_all(command(f"one-{family}", family, *options) for family in families)
    split = {
        f"four-{family}": command(
            f"four-{family}",
            family,
            *options,
            *more,
            "trainer=TensorParallelTrainer",
            "tp_size=2",
        )
        for family, more in families.items()
    }
    halted = copy.deepcopy(split["four-llama"])
    halted.local_run_dir = f"{tmp_path}/halted"
    run_in_group(4, run_all_and_resume, list(split.values()), halted)
    for family in families:
        one, four = tmp_path / f"one-{family}", tmp_path / f"four-{family}"
        bound = bound_of(family, "float64")
        assert max(differences(records(one), records(four), bound).values()) <= bound, family
        a, b = (torch.load(d / "LATEST/policy.pt", weights_only=True)["state"] for d in (one, four))
        assert a.keys() == b.keys() and all((a[k] - b[k]).abs().max() <= bound for k in a), family
    assert same(outcome(tmp_path / "halted"), outcome(tmp_path / "four-llama"))


@pytest.mark.parametrize(
    "n, trainer, sizes",
    [
        *(
            [
                (2, ["trainer=FSDPTrainer"], ()),
                (4, ["trainer=FSDPTrainer", "fsdp_shard_size=2"], ()),
            ]
            if ALL
            else []
        ),
        (3, ["trainer=FSDPTrainer"], (2, 17)),
        (4, ["trainer=TensorParallelTrainer", "tp_size=2"], (1, 5)),
    ],
)
def test_uneven_rows(n, trainer, sizes, command, tmp_path):
    """Rows to train and to evaluate on that don't divide by anything, or that are fewer than the
    groups of ranks that see the same ones: no hang, every row once, the numbers of one process.

    Of two rows on three ranks, one rank has none. It computes the first a second time, to make the
    same calls as the others, with weight 0: counted, the means would be (2 a + b) / 3 instead of (a
    + b) / 2.
    """
    sizes = range(1, 18) if ALL else sizes
    runs = {}
    for rows in sizes:
        path = tmp_path / f"{rows}.jsonl"
        path.write_text(
            "".join(
                json.dumps(row | {"prompt": f"{row['prompt']} {i}"}) + "\n"
                for i, row in enumerate(ROWS[:rows])
            )
        )
        runs[rows] = [
            *LOSSES["live"],
            f"datasets=[{path}]",
            f"eval_datasets=[{path}]",
            "batch_size=6",
            "eval_batch_size=7",
            "data_rules.prompt_in_eval=keep",
            "eval_every=6",
            "lr=1e-3",
            "model.policy_dtype=float64",
            "gradient_accumulation_steps=2",
        ]
    run_all(command(f"one{rows}", "llama", *options) for rows, options in runs.items())
    run_in_group(
        n,
        run_all,
        [command(f"many{rows}", "llama", *options, *trainer) for rows, options in runs.items()],
    )
    for rows in sizes:
        one, many = records(tmp_path / f"one{rows}"), records(tmp_path / f"many{rows}")
        bound = bound_of("llama", "float64")
        assert max(differences(one, many, bound).values()) <= bound, rows
        assert [r for r in many if "loss/train" in r][-1]["counters/examples"] == rows


ON_SAMPLES = [
    "reward.scale=running",
    "rollout.n=3",
    "rollout.max_new_tokens=4",
    "rollout.batches=2",
    "rollout.uses=2",
    "batch_size=3",
    "n_examples=9",
    "eval_every=6",
    "save_every=3",
    "do_first_eval=false",
    "warmup_steps=2",
    "max_grad_norm=0.05",  # all norms are larger, the critic's too
    "lr=1e-3",
    "model.policy_dtype=float64",
    STEADY,
]
BY_RULE = "reward.terms={brief: {rule: shorter}, vowel: {rule: 'regex=[aeiou]'}}"
LEARNED = {
    "grpo": ["loss=grpo", BY_RULE],
    "pairs": ["loss=dpo", "loss.beta=0.1", "rollout=pairs", BY_RULE],
    "ppo": ["loss=ppo", "loss.critic=policy", "loss.critic_lr=1e-3", "loss.entropy=0.1", BY_RULE],
    # what pissa puts into the adapter is taken off by a frozen one; the critic has both, too
    "adapter": [
        "loss=ppo",
        "loss.critic=policy",
        "loss.critic_lr=1e-3",
        "loss.critic_warmup=0",
        "adapter=lora",
        "adapter_rank=4",
        "adapter_init=pissa",
        BY_RULE,
    ],
    # beside rows of a data set, in several microbatches
    "ptx": ["loss=rloo", "rollout.ptx_weight=2", "tokens_per_microbatch=64", BY_RULE],
}


@reward
def fails_on_rank_1(answered):
    if rank() == 1:
        raise ValueError("no reward today")
    return 1.0


def run_all_and_fail(configs, halted, failing):
    """In each process: trainings, one that is halted after its third step and resumed, and one that
    ends everywhere with the line of the process whose reward raises.
    """
    run_all_and_resume(configs, halted)
    with pytest.raises(UserError, match="reward r: ValueError: no reward today, for the response"):
        run_all([failing])


def test_the_policys_own_samples(command, tmp_path):
    """Six steps on two blocks of samples: the same responses and rewards, and weights and metrics
    within rounding, also with adapters and with a data set that is mixed in; and for a run that is
    halted in the middle of a block on one process and goes on on two. One that is halted on two
    processes goes on to the same bits.
    """
    fsdp, tp = ["trainer=FSDPTrainer"], ["trainer=TensorParallelTrainer"]
    failing = "reward.terms={r: {function: fails_on_rank_1}}"
    cases = {"grpo-fsdp": fsdp, "pairs-fsdp": fsdp, "ppo-tp": tp, "adapter-fsdp": fsdp}
    cases |= {"ptx-fsdp": [*fsdp, "fsdp_reduce=each"], "ptx-tp": tp, "adapter-tp": tp}
    mixed = {"ptx": [f"rollout.ptx_datasets=[{tmp_path}/pairs.jsonl]"]}
    run_all(
        command(loss, "llama", *ON_SAMPLES, *options, *mixed.get(loss, []))
        for loss, options in LEARNED.items()
    )
    resumed = ["resumed", "llama", *ON_SAMPLES, *LEARNED["ppo"], "resume=auto"]
    train_until(partial(command, *resumed), 2)
    halted = ["halted", "llama", *ON_SAMPLES, *LEARNED["adapter"], *fsdp, "resume=auto"]
    run_in_group(
        2,
        run_all_and_fail,
        [
            *(
                command(
                    name,
                    "llama",
                    *ON_SAMPLES,
                    *LEARNED[loss := name.split("-")[0]],
                    *mixed.get(loss, []),
                    *how,
                )
                for name, how in cases.items()
            ),
            command(*resumed, *fsdp),
        ],
        command(*halted),
        command("failing", "llama", *ON_SAMPLES, "loss=grpo", *fsdp, failing),
    )
    assert same(outcome(tmp_path / "halted"), outcome(tmp_path / "adapter-fsdp"))
    for name in (*cases, "resumed"):
        one = tmp_path / ("ppo" if name == "resumed" else name.split("-")[0])
        two = tmp_path / name
        assert (one / "rollouts.jsonl").read_text() == (two / "rollouts.jsonl").read_text(), name
        a, b = (torch.load(d / "LATEST/policy.pt", weights_only=True)["state"] for d in (one, two))
        bound = bound_of("llama", "float64")
        assert a.keys() == b.keys() and all((a[k] - b[k]).abs().max() <= bound for k in a), name
        worst = differences(records(one), records(two))
        print(f"{name:12}: {max(worst.values()):.1e}")
        assert max(worst.values()) <= 4 * bound, (name, worst)
