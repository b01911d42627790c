"""Losses on lists and on labelled responses: from rows to runs. k differs from example to example,
and a loss may see the whole batch.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from runs import DPO, FAST, STEADY, evaluate, records
from stores import view_of, write

import eval as eval_command
from plumb.batching.feed import Feed
from plumb.batching.layout import by_example, pack
from plumb.batching.microbatches import Packing, split_into_microbatches
from plumb.console import to_dict
from plumb.data.examples import concatenate, contradicted, ids_of, lengths_of
from plumb.data.extras import Extras
from plumb.errors import UserError
from plumb.losses import BatchContext, LossOutput, Mean, registry
from plumb.losses.registry import build_loss
from plumb.models.forward_path import PLAIN_PATH
from plumb.planning import plan
from plumb.training import setup

RANKED = [
    {"prompt": "a", "responses": ["x", "yy", "zzz"], "ranks": [2, 3, 1]},
    {"prompt": "b", "responses": ["x", "yy"], "ranks": [1, 2]},
]
SCORED = {"prompt": "c", "responses": ["1", "22", "333", "4444"], "scores": [1, 4, 3, 2]}
PAIR = {"prompt": "d", "chosen": "good", "rejected": "bad"}


@pytest.fixture
def mixed(tmp_path):
    """Lists of 3 and 2, of 4, and of a pair."""
    parts = [
        view_of(write(tmp_path, *rows), tmp_path / str(i), "list")
        for i, rows in enumerate((RANKED, [SCORED], [PAIR]))
    ]
    return concatenate(parts)


def test_lists_stand_from_best_to_worst(mixed):
    """Ranks count from the best, scores to it; a pair is a list of two. One more id per response is
    its EOS.
    """
    lengths = [[len(r) - 1 for r in e.responses] for e in mixed]
    assert lengths == [[3, 1, 2], [1, 2], [2, 3, 4, 1], [4, 3]]
    assert mixed.k == 4 and lengths_of(mixed).counts.tolist() == [3, 2, 4, 2]
    as_list = list(mixed)
    for column in ("prompts", "responses", "roots", "counts"):
        ours, theirs = (getattr(lengths_of(some), column) for some in (mixed, as_list))
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(ids_of(mixed), ids_of(as_list))


def test_a_row_holds_trees_of_any_size(mixed):
    """Responses are numbered firsts first; extras follow examples and responses."""
    table = np.arange(16.0).reshape(4, 4)
    extras = Extras(example={"n": np.arange(4)}, response={"reference": table})
    batch = pack(list(mixed), pad_token_id=0, longest=64, extras=extras)
    assert batch.n_responses.tolist() == [3, 2, 4, 2] and len(batch.spans) == 11
    lengths = torch.from_numpy(batch.spans[:, 3])
    expected = [[4, 2, 3, 0], [2, 3, 0, 0], [3, 4, 5, 2], [5, 4, 0, 0]]
    assert by_example(lengths, batch.n_responses).tolist() == expected
    reference = by_example(batch.extras.response["reference"], batch.n_responses, -1).tolist()
    assert reference == [[0, 1, 2, -1], [4, 5, -1, -1], [8, 9, 10, 11], [12, 13, -1, -1]]


def test_padded_rows_are_counted_by_responses(mixed):
    """11 rows of at most 6 tokens: a budget of 66 holds them, one of 65 does not."""
    packing = Packing(packed=False, budget=66, world_size=1, pad_token_id=0, longest=64)
    assert len(split_into_microbatches(lengths_of(mixed), packing, 1)) == 1
    assert len(split_into_microbatches(lengths_of(mixed), replace(packing, budget=65), 1)) > 1
    steps = [Feed(mixed, packing, 0, np.zeros((4, 4))).step(np.array([3, 0]))]
    (part,) = steps[0].microbatches
    assert part.batch.n_responses.sum() == 5 and len(part.batch.extras.response["reference"]) == 5


# ---- runs ----

ROWS = [
    {
        "prompt": f"\n\nHuman: What is {a} and {b}?\n\nAssistant:",
        "responses": [f" It makes {a + b}.", f" Perhaps {a}.", " No."][: 2 + (a + b) % 2],
        "scores": [3, 2, 1][: 2 + (a + b) % 2],
    }
    for a in range(4)
    for b in range(5)
]
LISTS = ["loss=plackett_luce", "loss.beta=0.1", *DPO[2:], "n_examples=12"]


@pytest.fixture
def lists(tmp_path):
    path = tmp_path / "lists.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def losses_of(run):
    return [row["loss/train"] for row in records(run, "train")]


def test_how_lists_are_computed_changes_nothing(train, lists):
    """Lists of two and three: one microbatch or several, live or cached reference. It starts at
    log 2 for lists of two and log 6 for three (each order is as likely), and falls.
    """
    options = [*LISTS, *FAST, STEADY, f"datasets=[{lists}]"]
    live = losses_of(train("live", *options, "reference=live"))
    assert np.log(2) <= live[0] <= np.log(6) and live[-1] < live[0]
    for name, *more in (
        ("several", "reference=live", "gradient_accumulation_steps=3"),
        ("cached", "reference=cached"),
    ):
        assert losses_of(train(name, *options, *more)) == pytest.approx(live, rel=2e-5)


def test_lists_that_rank_nothing_are_refused_or_left_out(train, lists, tmp_path, capsys):
    """Equal scores carry no preference, as in pairs: a list of nothing else is left out and
    counted. A list of one response is a mistake.
    """
    options = [*LISTS, f"datasets=[{lists}]"]
    equal = [ROWS[0] | {"scores": [2, 2]}, *ROWS[1:]]
    lists.write_text("".join(json.dumps(row) + "\n" for row in equal))
    train("equal", *options)
    assert "lists of one response, or whose ranks are all equal" in capsys.readouterr().out
    for n, fields, problem in (
        (2, {"responses": [" a"], "scores": [1]}, "a list of one response"),
    ):
        bad = [ROWS[0] | fields, *ROWS[1:]]
        lists.write_text("".join(json.dumps(row) + "\n" for row in bad))
        with pytest.raises(UserError, match=f"lists.jsonl:1: {problem}.*data_rules.bad_row=drop"):
            train(f"bad{n}", *options, "eval_share=0.1")
    train("drop", *options, "data_rules.bad_row=drop")
    assert "lists of one response, or whose ranks are all equal" in capsys.readouterr().out
    lists.write_text(json.dumps({"prompt": "p", "completion": "c"}) + "\n")
    with pytest.raises(UserError, match="holds no ranked lists .prompt, responses, and ranks or"):
        train("sft", *options)


# ---- labelled responses, and the batch context ----


def test_labelled_rows_and_pairs_are_labelled_responses(tmp_path):
    """A pair is a desirable and an undesirable response; a response with both labels is
    contradictory.
    """
    row = {"prompt": "a", "completion": "x", "label": True}
    rows = write(tmp_path, row, row | {"label": False}, row | {"completion": "y"})
    votes = view_of(rows, tmp_path / "rows", "labelled")
    some = concatenate([votes, view_of(write(tmp_path, PAIR), tmp_path / "pair", "labelled")])
    labels = some.extras().example["labels"]
    assert labels.tolist() == [1, 0, 1, 1, 0]
    assert [len(e.responses[0]) - 1 for e in some] == [1, 1, 1, 4, 3]
    assert contradicted(votes).tolist() == [True, True, False]


def labelled_rows():
    for row in ROWS:
        for i, response in enumerate(row["responses"][:2]):
            yield {"prompt": row["prompt"], "completion": response, "label": i == 0}


KTO = ["loss=kto", "loss.beta=0.1", *DPO[2:], "batch_size=6", "n_examples=24"]


@pytest.fixture
def votes(tmp_path):
    path = tmp_path / "votes.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in labelled_rows()))
    return path


def test_how_kto_is_computed_changes_nothing(train, votes):
    """One microbatch or several, packed or padded, live or cached reference: the reference point is
    the batch's. At the reference it is 0 and each loss is 1 - sigmoid(0) = 1/2.
    """
    options = [*KTO, *FAST, STEADY, f"datasets=[{votes}]"]
    live = train("live", *options, "reference=live", "eval_every=12")
    first, *_, last = records(live, "train")
    assert first["loss/train"] == pytest.approx(0.5, abs=1e-5) and first["kl_train/z0"] < 1e-4
    assert last["loss/train"] < 0.5
    assert last["rewards_train/chosen"] > last["rewards_train/rejected"]
    assert any(row["kl_train/z0"] > 1e-3 for row in records(live, "train"))
    names = ("loss/train", "kl_train/z0", "rewards_train/chosen")
    for name, *more in (
        ("several", "reference=live", "gradient_accumulation_steps=3"),
        ("cached", "reference=cached"),
        ("batch", "reference=live", "eval_batch_size=2"),
    ):
        run = train(name, *options, "eval_every=12", *more)
        for split in ("train", "eval"):
            for ours, theirs in zip(records(run, split), records(live, split), strict=True):
                for metric in (n.replace("train", split) for n in names):
                    assert ours[metric] == pytest.approx(theirs[metric], rel=1e-3, abs=2e-5)


def test_kto_says_what_is_wrong(train, votes):
    with pytest.raises(UserError, match="batch_size=1: this loss .kto. pairs prompts with"):
        train("one", *KTO, "batch_size=1", f"datasets=[{votes}]")
    rows = [{"prompt": "a", "completion": "x"}] * 4
    votes.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match="holds no responses with a label"):
        train("sft", *KTO, f"datasets=[{votes}]")


def test_two_processes_see_one_batch(train, run_train, tmp_path, votes, tiny_model):
    """The reference point of two gloo ranks, of which one has no part at times, is that of one."""
    options = [
        *KTO,
        *FAST,
        STEADY,
        "batch_size=3",
        "reference=live",
        f"datasets=[{votes}]",
        f"model.name_or_path={tiny_model}",
        "n_eval_examples=4",
        "n_examples=9",
    ]
    one = train("one", *options)
    done = run_train(
        *options,
        "exp_name=two",
        f"local_run_dir={tmp_path}/two",
        "trainer=FSDPTrainer",
        "n_cpu_processes=2",
    )
    assert done.returncode == 0, done.stderr
    for ours, theirs in zip(records(tmp_path / "two", "train"), records(one, "train"), strict=True):
        for name in ("loss/train", "kl_train/z0", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=2e-5), name


@pytest.mark.parametrize("loss", ["tdpo2", "ld_dpo", "wpo"])
def test_token_wise_losses_in_one_process_and_in_two(
    loss, train, run_train, tmp_path, data, tiny_model
):
    """Sharded over two gloo ranks, the reference as well: the same losses. They fall from log 2,
    and wpo's from less, since it weighs pairs.
    """
    options = [
        f"loss={loss}",
        "loss.beta=0.1",
        *DPO[2:],
        *FAST,
        STEADY,
        "reference=live",
        "n_examples=12",
        f"datasets=[{data}]",
    ]
    one = records(train("one", *options), "train")
    assert one[-1]["loss/train"] < one[0]["loss/train"] <= np.log(2) + 1e-5
    done = run_train(
        *options,
        f"model.name_or_path={tiny_model}",
        "exp_name=two",
        f"local_run_dir={tmp_path}/two",
        "trainer=FSDPTrainer",
        "n_cpu_processes=2",
    )
    assert done.returncode == 0, done.stderr
    for ours, theirs in zip(records(tmp_path / "two", "train"), one, strict=True):
        for name in ("loss/train", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=2e-5), name


def test_a_loss_may_compare_each_example_with_the_whole_batch(train, data, monkeypatch):
    """A plugin's loss, whose context is the mean log-ratio of the batch's own pairs: in one
    microbatch or in three it is the same number.
    """
    monkeypatch.setattr(registry, "LOSSES", dict(registry.LOSSES))

    def mean_margin(policy, reference):
        h = policy.sum - reference.sum
        return (h[:, 0] - h[:, 1]).mean()

    @registry.loss(group="pair", needs_reference=True, context=BatchContext("own", mean_margin))
    def centred(policy, reference, context, *, beta: float) -> LossOutput:
        h = policy.chosen.sum - policy.rejected.sum
        h = h - (reference.chosen.sum - reference.rejected.sum)
        return LossOutput((h - 1 - context.to(h)) ** 2, metrics={"mean/h": Mean(context + 0 * h)})

    options = [
        *DPO[1:],
        *FAST,
        STEADY,
        "loss=robust",
        "loss.name=centred",
        "~loss.label_smoothing",
        "n_examples=16",
        f"datasets=[{data}]",
        "reference=live",
    ]
    runs = [
        records(train(name, *options, f"gradient_accumulation_steps={n}"), "train")
        for name, n in (("one", 1), ("three", 3))
    ]
    assert abs(runs[0][-1]["mean_train/h"]) > 1e-3
    for ours, theirs in zip(*runs, strict=True):
        for name in ("loss/train", "mean_train/h"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=2e-5)


def test_conditional_sft_puts_the_prefix_before_each_response(train, votes, tmp_path, capsys):
    """Of labelled rows and of pairs, whose two responses get different ones; another prefix makes
    other tokens.
    """
    votes.write_text(
        "".join(
            json.dumps({"prompt": f"What is {a}?", "chosen": " It is.", "rejected": " No."}) + "\n"
            for a in range(8)
        )
    )
    options = [*DPO[2:], *FAST, "loss=csft", f"datasets=[{votes}]", "n_examples=8"]
    train("one", *options)
    shown = capsys.readouterr().out
    assert "<|good|> It is." in shown and "  desirable" in shown
    run = train(
        "two",
        *options,
        "loss.desirable_prefix=' Yes:'",
        "sample_during_eval=true",
        "n_eval_model_samples=2",
        "sample_max_new_tokens=3",
        "eval_share=0.3",
    )
    assert " Yes: It is." in capsys.readouterr().out
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert samples and all(row["prompt"].endswith("? Yes:") for row in samples)
    with pytest.raises(UserError, match="holds no responses with a label"):
        train("none", *options, "unpair=false")


def test_the_labels_that_are_out_of_balance_are_said(train, votes, capsys):
    rows = [
        {"prompt": f"What is {a}?", "completion": f" {a}", "label": a % 4 == 0} for a in range(16)
    ]
    votes.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = [*KTO, *FAST, f"datasets=[{votes}]", "eval_share=0"]
    train("one", *options)
    line = "labels: weight times count of desirable over undesirable responses is 0.333"
    assert line in capsys.readouterr().out
    train("two", *options, "loss.desirable_weight=3.5")
    assert "labels:" not in capsys.readouterr().out


def test_a_balanced_weight_is_a_number_of_the_run(train, votes, tmp_path, capsys):
    """4 desirable and 12 undesirable responses: a weight of 3, printed, and in the run's record. It
    trains as that number does; a run that resumes counts again; evaluations have the number.
    """
    rows = [
        {"prompt": f"What is {a}?", "completion": f" {a}", "label": a % 4 == 0} for a in range(16)
    ]
    votes.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = [*KTO, *FAST, f"datasets=[{votes}]", "eval_share=0"]
    three = train("three", *options, "loss.desirable_weight=3")
    options.append("loss.desirable_weight=balanced")
    run = train("balanced", *options)
    shown = capsys.readouterr().out
    assert "loss.desirable_weight=balanced: 3, for 4 desirable and 12 undesirable" in shown
    assert "labels:" not in shown
    assert yaml.safe_load((run / "config.yaml").read_text())["loss"]["desirable_weight"] == 3
    for ours, theirs in zip(records(run, "train"), records(three, "train"), strict=True):
        assert ours["loss/train"] == theirs["loss/train"]
    train("balanced", *options, "resume=must", "eval_every=8", "resume_allow=[eval_every]")
    shown = capsys.readouterr().out
    assert "resuming from" in shown and "loss.desirable_weight=balanced: 3, for 4" in shown
    with pytest.raises(UserError, match="^loss.desirable_weight=balanced: a training run computes"):
        eval_command.evaluate_on(run, rows, "loss.desirable_weight=balanced")
    assert eval_command.evaluate_on(run, rows)["loss/eval"] > 0


# ---- weights ----


@pytest.mark.parametrize("loss", ["dpo", "kto", "plackett_luce"])
def test_a_row_of_weight_two_counts_like_the_row_twice(train, tmp_path, loss):
    """One step on all rows, and an evaluation: 8 rows, of which 4 weigh 2, and the same with those
    4 written twice. In one microbatch or in three. (The context of kto pairs the batch's prompts,
    each once, so a weight is not a second row there; at the reference it is 0 either way.)
    """
    rows = [
        {"prompt": f"What is {a}?", "chosen": f" It is {a}{a}.", "rejected": " Who knows?"}
        for a in range(8)
    ]
    weighted = [row | {"weight": 2 if i < 4 else 1} for i, row in enumerate(rows)]
    once, twice = tmp_path / "once.jsonl", tmp_path / "twice.jsonl"
    once.write_text("".join(json.dumps(row) + "\n" for row in weighted))
    twice.write_text("".join(json.dumps(row) + "\n" for row in (*rows, *rows[:4])))

    def run(name, path, *more):
        run = train(
            name,
            *DPO[2:],
            *FAST,
            STEADY,
            f"loss={loss}",
            "loss.beta=0.1",
            "eval_share=0",
            f"datasets=[{path}]",
            f"eval_datasets=[{path}]",
            "data_rules.duplicate=keep",
            "n_examples=null",
            "n_epochs=1",
            "batch_size=24",
            "n_eval_examples=null",
            "reference=live",
            *more,
        )
        (step,) = records(run, "train")
        evaluated = records(run, "eval")[-1]
        names = [name for name in evaluated if name.startswith(("loss", "rewards", "logps"))]
        return [step["loss/train"], step["grad_norm"], *(evaluated[name] for name in names)]

    expected = pytest.approx(run("twice", twice), rel=2e-4, abs=1e-6)
    assert run("once", once) == expected
    assert run("three", once, "gradient_accumulation_steps=3") == expected


# ---- every new loss, from its data to its evaluation ----

NEW = {
    "simpo": (["loss=simpo", "loss.beta=2", "loss.gamma=0.5"], "data"),
    "plackett_luce": (["loss=plackett_luce", "loss.beta=0.1"], "lists"),
    "kto": (["loss=kto", "loss.beta=0.1"], "votes"),
    "bco": (["loss=bco", "loss.beta=0.1"], "votes"),
    "csft": (["loss=csft"], "votes"),
    "unlikelihood": (["loss=unlikelihood"], "votes"),
    "softmax_dpo": (["loss=softmax_dpo", "loss.beta=0.1"], "lists"),
    "aot_unpaired": (["loss=aot_unpaired", "loss.beta=0.1"], "data"),
    "mix": (["loss=mix"], "data"),
}


@pytest.fixture(params=NEW)
def new_loss(request):
    """`(options of the loss, its data)`, of each in turn."""
    options, rows = NEW[request.param]
    return [*options, f"datasets=[{request.getfixturevalue(rows)}]", *FAST]


SHORT = [*DPO[2:], "n_examples=12", "batch_size=6", STEADY]


def test_the_layout_of_a_batch_changes_nothing(train, new_loss, monkeypatch):
    """Packed trees, padded rows, and three microbatches of either."""

    def run(name, *more):
        return [
            (row["loss/train"], row["grad_norm"])
            for row in records(train(name, *new_loss, *SHORT, "reference=auto", *more), "train")
        ]

    first = run("packed")
    assert first[-1][0] < first[0][0]
    others = [run("packed3", "gradient_accumulation_steps=3")]
    padded = lambda *a, **k: (PLAIN_PATH, "as told")
    monkeypatch.setattr(setup, "choose_forward_path", padded)
    others += [run("padded"), run("padded3", "gradient_accumulation_steps=3")]
    for other in others:
        assert other == [pytest.approx(step, rel=2e-4) for step in first]


def test_eval_says_what_training_said(train, new_loss, tmp_path):
    """On all held-out examples, from the run directory alone."""
    run_dir = train("run", *new_loss, *SHORT, "eval_share=0.3", "n_eval_examples=null")
    out = tmp_path / "numbers.json"
    evaluate(run_dir, "--out", out)
    found, said = json.loads(out.read_text())["metrics"], records(run_dir, "eval")[-1]
    expected = {name: value for name, value in said.items() if name != "step"}
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_a_plan_of_it(new_loss, compose, here, tiny_model):
    config = compose(
        *here, "exp_name=x", *new_loss, f"model.name_or_path={tiny_model}", "plan=true"
    )
    text = plan.show(config, build_loss(to_dict(config.loss)))
    assert "\nfits: " in text and "read here" in text
