"""score.py: scores are those of training, by hand; files of other forms; what a user gets wrong."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from runs import run_of
from tiny import save_tiny_llama, tiny_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
)
from transformers import BertForSequenceClassification as Bert

import score
from plumb.data.registry import get_dataset
from plumb.data.rows import Row
from plumb.errors import UserError
from plumb.models.find import find_model
from plumb.scoring.scorers import Causal, Classifier, knobs_of, load_scorer

ROWS = [
    ("\n\nHuman: Where is it?\n\nAssistant:", " Over there, by the old house.", " No idea."),
    (
        "\n\nHuman: Why is the sky blue on most days of the year?\n\nAssistant:",
        " Light scatters.",
        "",
    ),
    (
        "\n\nHuman: Go on.\n\nAssistant:",
        " a" * 60,
        " Fine, and then we went on and on until it was dark and cold.",
    ),
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(*arguments):
    score.main(score.parser().parse_args(list(map(str, arguments))))


def opened(name):
    ref = find_model(name)
    return load_scorer(ref, knobs_of(ref, {}), device="cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base, a policy that differs from it (of a run with beta 0.3), and a reward model, each as a
    run leaves it.
    """
    folder = tmp_path_factory.mktemp("models")
    base = save_tiny_llama(folder / "base")
    torch.manual_seed(1)
    state = {
        k: v + 0.05 * torch.randn_like(v)
        for k, v in AutoModelForCausalLM.from_pretrained(base).state_dict().items()
    }
    knobs = "max_length: 64\nmax_prompt_length: 32\nadd_bos: true\n"
    dpo = run_of(folder, base, state, "dpo")
    model = f"model: {{name_or_path: {base}, archive: null}}\n"
    (dpo / "config.yaml").write_text("seed: 0\nloss: {name: dpo, beta: 0.3}\n" + model + knobs)
    reward = run_of(folder, base, state | {"lm_head.weight": torch.randn(1, 32)}, "reward")
    (reward / "config.yaml").write_text((reward / "config.yaml").read_text() + knobs)
    return folder


@pytest.fixture
def pairs(tmp_path):
    return write(
        tmp_path / "pairs.jsonl",
        [dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in ROWS],
    )


def as_read(tokenizer, prompt, response, longest):
    """Token ids by the rules of training, written out: dialogues lose their start, and a response
    that is cut its EOS.
    """
    p = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    r = tokenizer(response, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    if len(p) + longest > 64 and len(p) > 32:
        p = p[-32:]
    return p, r[:32] if len(p) + longest > 64 else r


def by_hand(tokenizer, value):
    """What `value(ids, n_prompt)` gives each response of ROWS, read alone.  [3, 2]"""
    table = []
    for prompt, *responses in ROWS:
        longest = max(
            len(tokenizer(r, add_special_tokens=False)["input_ids"]) + 1 for r in responses
        )
        read = [as_read(tokenizer, prompt, r, longest) for r in responses]
        table.append([value(torch.tensor([p + r]), len(p)) for p, r in read])
    return np.array(table)


@torch.no_grad()
def test_a_reward_is_read_at_the_last_token(models, pairs, tmp_path, capsys):
    """Also of an answer that was cut, and of one that is empty."""
    run(
        "pairs",
        models / "reward",
        pairs,
        "--eval-share",
        1,
        "--out",
        tmp_path / "out.jsonl",
        "--json",
        tmp_path / "out.json",
        "--plots",
        tmp_path / "plots",
    )
    model = opened(str(models / "reward")).model
    tokenizer = AutoTokenizer.from_pretrained(models / "base")
    model.set_attn_implementation("sdpa")
    expected = by_hand(tokenizer, lambda ids, n: model(ids).logits[0, -1, 0].item())
    got = lines(tmp_path / "out.jsonl")
    np.testing.assert_allclose(
        [[r["chosen_score"], r["rejected_score"]] for r in got], expected, atol=1e-4
    )
    assert [r["chosen"] for r in got] == [row[1] for row in ROWS] and got[0]["source"].endswith(
        "pairs.jsonl:1"
    )
    figures = json.loads((tmp_path / "out.json").read_text())["figures"]
    assert figures["all"]["accuracy"] == np.mean(expected[:, 0] > expected[:, 1])
    assert figures["all"]["longer_accuracy"] == 1
    assert figures["all"]["margin"] == pytest.approx(np.mean(expected @ [1, -1]), abs=1e-4)
    assert sum(f["pairs"] for name, f in figures.items() if name.startswith("length ")) == 3
    assert {f.name for f in (tmp_path / "plots").iterdir()} == {"scores.png", "calibration.png"}
    assert "1 truncated" in capsys.readouterr().out


@torch.no_grad()
def test_an_implicit_reward_is_beta_times_the_log_ratio(models, pairs, tmp_path):
    """The reference is what the run started from, or --reference; beta the run's, or --beta."""
    tokenizer = AutoTokenizer.from_pretrained(models / "base")

    def logps(model):
        given = lambda ids, n: (
            model(ids).logits[0, n - 1 : -1].log_softmax(-1).gather(1, ids[0, n:, None])
        )
        return by_hand(tokenizer, lambda ids, n: given(ids, n).sum().item())

    base = AutoModelForCausalLM.from_pretrained(models / "base").eval()
    policy = AutoModelForCausalLM.from_pretrained(models / "base").eval()
    policy.load_state_dict(torch.load(models / "dpo/step-8/policy.pt")["state"])
    ratio = logps(policy) - logps(base)
    run("pairs", models / "dpo", pairs, "--eval-share", 1, "--out", tmp_path / "out.jsonl")
    scores = [[r["chosen_score"], r["rejected_score"]] for r in lines(tmp_path / "out.jsonl")]
    np.testing.assert_allclose(scores, 0.3 * ratio, atol=1e-3)
    run(
        "pairs",
        models / "base",
        pairs,
        "--eval-share",
        1,
        "--out",
        tmp_path / "out.jsonl",
        "--reference",
        models / "dpo",
        "--beta",
        2,
        "--max-length",
        64,
        "--max-prompt-length",
        32,
        "--tokens-per-microbatch",
        1,
    )
    scores = [[r["chosen_score"], r["rejected_score"]] for r in lines(tmp_path / "out.jsonl")]
    np.testing.assert_allclose(scores, -2 * ratio, atol=5e-3)


def test_a_policy_against_itself_ties_and_a_tie_is_no_hit(models, pairs, tmp_path):
    run(
        "pairs",
        models / "base",
        pairs,
        "--eval-share",
        1,
        "--json",
        tmp_path / "out.json",
        "--reference",
        models / "base",
        "--beta",
        1,
    )
    figures = json.loads((tmp_path / "out.json").read_text())["figures"]["all"]
    assert (figures["accuracy"], figures["ties"], figures["calibration_error"]) == (0, 3, 0)


def test_a_run_is_scored_as_its_evaluation_did(train, data, tmp_path):
    """Accuracy and margin of a DPO run on its held-out pairs, to the last decimals that are
    logged.
    """
    run_dir = train("sft", "loss=sft")
    dpo = train(
        "dpo", "loss=dpo", "loss.beta=0.5", f"model.archive={run_dir}", "lr=1e-3", "eval_every=8"
    )
    run("pairs", dpo, data, "--json", tmp_path / "out.json")
    figures = json.loads((tmp_path / "out.json").read_text())["figures"]["all"]
    last = [r for r in lines(dpo / "metrics.jsonl") if "rewards_eval/margins" in r][-1]
    assert figures["margin"] == pytest.approx(last["rewards_eval/margins"], abs=1e-5)
    assert (
        figures["accuracy"] == last["rewards_eval/accuracies"] and last["rewards_eval/margins"] != 0
    )


# ---- the rewards of other losses ----


def beside(models, loss):
    """The DPO run of `models`, as the run of another loss.  -> its folder"""
    folder = models / re.sub(r"\W+", "-", loss)
    if not folder.exists():
        shutil.copytree(models / "dpo", folder)
        config = (folder / "config.yaml").read_text()
        assert "{name: dpo, beta: 0.3}" in config
        (folder / "config.yaml").write_text(config.replace("{name: dpo, beta: 0.3}", loss))
    return folder


LD_DPO = "{name: ld_dpo, beta: 0.5, alpha: 0.25}"
MIX = "{name: mix, terms: {a: {name: nll, weight: 1.0}, b: {name: orpo, weight: 1.0, beta: 0.2}}}"


@pytest.mark.parametrize(
    ("loss", "reward"),
    [
        ("{name: simpo, beta: 2.0, gamma: 0.5, nll: 0.0}", lambda pi, ref, n: 2 * pi / n),
        (
            "{name: dpo, beta: 5.0, normalize: token}",
            lambda pi, ref, n: 5 * (pi - ref) / n,
        ),
        ("{name: dpo, beta: 0.3, reference_free: true}", lambda pi, ref, n: 0.3 * pi),
        ("{name: orpo, beta: 0.2}", lambda pi, ref, n: 0.2 * pi / n),
        ("{name: slic}", lambda pi, ref, n: pi),
        ("{name: odpo, beta: 0.3}", lambda pi, ref, n: 0.3 * (pi - ref)),
        ("{name: beta_dpo, beta: 0.3}", lambda pi, ref, n: 0.3 * (pi - ref)),
        ("{name: tdpo2, beta: 0.3}", lambda pi, ref, n: 0.3 * (pi - ref)),
        ("{name: wpo, beta: 0.3}", lambda pi, ref, n: 0.3 * (pi - ref)),
        ("{name: kto, beta: 0.3}", lambda pi, ref, n: 0.3 * (pi - ref)),
        ("{name: bco, beta: 0.3}", lambda pi, ref, n: 0.3 * (pi - ref)),
        ("{name: plackett_luce, beta: 0.3}", lambda pi, ref, n: 0.3 * (pi - ref)),
        (MIX, lambda pi, ref, n: pi / n),
    ],
)
def test_a_run_is_scored_by_the_rewards_of_its_loss(models, dpo_logps, loss, reward):
    """The first term's of a mixture. The pair's and those of each response alone are the same."""
    folder = beside(models, loss)
    policy, reference, tokens = dpo_logps
    expected = reward(policy, reference, tokens)
    scorer = opened(str(folder))
    assert (scorer.reference is None) == (reward(policy, 0, 1) == reward(policy, 1, 1)).all()
    both = scorer.score(pair_rows(), "keep_end").scores
    np.testing.assert_allclose(both, expected, rtol=1e-4, atol=1e-4)
    prompt, response, _ = ROWS[0]
    row = Row(prompt=prompt, responses=[response], pairs=[], sft_target=response, source="x:1")
    alone = scorer.score([row], "keep_end").scores
    np.testing.assert_allclose(alone, expected[:1, :1], rtol=1e-4, atol=1e-4)


def pair_rows():
    return [
        Row(prompt=prompt, responses=[a, b], pairs=[(0, 1)], sft_target=None, source="x:1")
        for prompt, a, b in ROWS
    ]


def test_where_a_reward_depends_on_the_other_response(models, dpo_logps):
    """ld_dpo counts what is beyond the shorter response a quarter; alone, it counts in full."""
    folder = beside(models, LD_DPO)
    policy, reference, tokens = dpo_logps
    ratio = 0.5 * (policy - reference)
    scores = opened(str(folder)).score(pair_rows(), "keep_end").scores
    shorter = tokens == tokens.min(1, keepdims=True)
    np.testing.assert_allclose(scores[shorter], ratio[shorter], atol=1e-4)
    assert (np.abs(scores - ratio)[~shorter] > 1e-3).all()


@pytest.fixture(scope="module")
def dpo_logps(models):
    """Of the DPO run and its reference, and the tokens of each response: [3, 2] each."""
    tokenizer = AutoTokenizer.from_pretrained(models / "base")
    base = AutoModelForCausalLM.from_pretrained(models / "base").eval()
    policy = AutoModelForCausalLM.from_pretrained(models / "base").eval()
    policy.load_state_dict(torch.load(models / "dpo/step-8/policy.pt")["state"])

    @torch.no_grad()
    def logps(model):
        given = lambda ids, n: (
            model(ids).logits[0, n - 1 : -1].log_softmax(-1).gather(1, ids[0, n:, None])
        )
        return by_hand(tokenizer, lambda ids, n: given(ids, n).sum().item())

    return logps(policy), logps(base), by_hand(tokenizer, lambda ids, n: ids.shape[1] - n)


@pytest.mark.parametrize(
    ("loss", "arguments", "said"),
    [
        ("{name: sft}", (), "the loss of its run .sft. has no rewards.; give a reward model, or"),
        ("{name: mine, beta: 1}", (), "loss.name=mine: no such loss; .*--beta and --reference"),
        ("{name: orpo}", ("--reference", "{base}"), "--reference=.*/base: .*orpo. need no ref"),
        ("{name: slic}", ("--beta", "1"), "--beta=1.0: its run's loss .slic. has no beta"),
        (MIX, ("--beta", "1"), "--beta=1.0: its run's loss .mix. has no beta of its own"),
    ],
)
def test_a_run_whose_rewards_cannot_be_had_so(models, pairs, loss, arguments, said):
    folder = beside(models, loss)
    arguments = [a.format(base=models / "base") for a in arguments]
    with pytest.raises(UserError, match=said):
        run("pairs", folder, pairs, "--eval-share", 1, *arguments)


def test_reference_and_beta_together_are_the_implicit_reward(models, dpo_logps, pairs, tmp_path):
    """Of any policy; and a beta alone is that of its run's loss."""
    policy, reference, tokens = dpo_logps
    free = beside(models, "{name: orpo, beta: 0.2}")
    for arguments, expected in (
        (("--beta", 2, "--reference", models / "base"), 2 * (policy - reference)),
        (("--beta", 2), 2 * policy / tokens),
    ):
        out = tmp_path / "out.jsonl"
        run("pairs", free, pairs, "--eval-share", 1, "--out", out, *arguments)
        scores = [[r["chosen_score"], r["rejected_score"]] for r in lines(out)]
        np.testing.assert_allclose(scores, expected, rtol=1e-3, atol=1e-3)


# ---- other people's models ----


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """An encoder with one label, the demo's tokenizer, and a PAD of its own."""
    folder = tmp_path_factory.mktemp("bert")
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=96,
        num_labels=1,
        pad_token_id=0,
        initializer_range=0.5,
    )
    Bert(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@torch.no_grad()
def test_an_encoder_scores_in_batches_as_alone(bert, tmp_path):
    model, tokenizer = Bert.from_pretrained(bert).eval(), AutoTokenizer.from_pretrained(bert)
    rows = [
        Row(
            prompt=prompt,
            responses=[a, b],
            pairs=[(0, 1)],
            sft_target=None,
            source="x:1",
        )
        for prompt, a, b in ROWS[:2]
    ]
    scorer = opened(str(bert))
    assert isinstance(scorer, Classifier) and not scorer.alone
    scored = scorer.score(rows, "keep_end")
    alone = [
        [model(**tokenizer(p + r, return_tensors="pt")).logits.item() for r in (a, b)]
        for p, a, b in ROWS[:2]
    ]
    np.testing.assert_allclose(scored.scores, alone, atol=1e-4)
    assert (
        scored.tokens.tolist() == [[len(a), len(b)] for _, a, b in ROWS[:2]]
        and not scored.cut.any()
    )
    prompt, response, _ = ROWS[2]
    row = Row(
        prompt=prompt,
        responses=[response],
        pairs=[],
        sft_target=response,
        source="x:1",
    )
    (long,) = scorer.score([row], "keep_end").scores
    text = (prompt + response)[-96:]  # a byte to a token: its start is lost
    assert long[0] == pytest.approx(
        model(**tokenizer(text, return_tensors="pt")).logits.item(), abs=1e-4
    )
    messages = Row(
        prompt=[{"role": "user", "content": "Why?"}],
        responses=[[{"role": "assistant", "content": "So."}]],
        pairs=[],
        sft_target=None,
        source="x:1",
    )
    hh = "\n\nHuman: Why?\n\nAssistant: So."
    expected = model(**tokenizer(hh, return_tensors="pt")).logits.item()
    assert scorer.score([messages], "keep_end").scores.item() == pytest.approx(expected, abs=1e-4)


def test_where_pad_could_be_text_each_text_is_a_batch(bert, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    Bert.from_pretrained(bert).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [
        Row(
            prompt=prompt,
            responses=[a],
            pairs=[],
            sft_target=a,
            source="x:1",
        )
        for prompt, a, _ in ROWS[:2]
    ]
    scorer, other = (opened(str(path)) for path in (tmp_path / "model", bert))
    assert scorer.alone and max(map(len, scorer._batches(np.array([3, 3])))) == 1
    np.testing.assert_allclose(
        scorer.score(rows, "keep_end").scores, other.score(rows, "keep_end").scores, atol=1e-4
    )


@torch.no_grad()
def test_a_decoder_with_a_score_is_read_in_packed_rows(models, tmp_path):
    """At the last response token, which is EOS here, though PAD is EOS, too."""
    model = AutoModelForSequenceClassification.from_pretrained(models / "base", num_labels=1)
    model.save_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(models / "base")
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path / "model")
    scorer = opened(str(tmp_path / "model"))
    assert isinstance(scorer, Causal) and scorer.forward_path is None
    scored = scorer.score(
        [
            Row(
                prompt=p,
                responses=[a, b],
                pairs=[(0, 1)],
                sft_target=None,
                source="x:1",
            )
            for p, a, b in ROWS
        ],
        "keep_end",
    )
    assert scorer.forward_path.packed
    ids = torch.tensor([sum(as_read(tokenizer, *ROWS[0][:2], 0), [])])
    expected = model.score(model.model(ids).last_hidden_state[0, -1]).item()
    assert scored.scores[0, 0] == pytest.approx(expected, abs=1e-4)


# ---- answers, easy and hard ----


def test_scores_are_added_to_answers(models, tmp_path):
    """All forms give the same question and answer the same score; what else a line holds stays."""
    question = [{"role": "user", "content": "Why?\n\nNow."}]
    hh = "\n\nHuman: Why?\n\nNow.\n\nAssistant:"
    file = write(
        tmp_path / "in.jsonl",
        [
            {"prompt": hh, "answers": [" So.", " Never"], "model": "m", "more": 1},
            {"prompt": hh, "response": " So."},
            {"prompt": question, "answers": [" So. "]},
            {"instruction": "Why?", "input": "Now.", "output_1": "So.", "output_2": "Never"},
            {"instruction": hh, "output": " So."},
        ],
    )
    run("answers", models / "reward", file, "--out", tmp_path / "out.jsonl")
    a, b, c, d, e = lines(tmp_path / "out.jsonl")
    assert a["more"] == 1 and len(a["scores"]) == 2 and abs(a["scores"][0] - a["scores"][1]) > 1e-3
    same = [a["scores"][0], b["score"], c["scores"][0], d["output_1_score"], e["score"]]
    np.testing.assert_allclose(same, same[0], atol=1e-5)
    assert d["output_2_score"] == pytest.approx(a["scores"][1], abs=1e-5)


def test_win_rates_by_a_reward_model(models, tmp_path):
    prompts = [row[0] for row in ROWS]
    write(tmp_path / "a.jsonl", [{"prompt": p, "answers": [" So.", " Yes"]} for p in prompts])
    write(
        tmp_path / "b.jsonl", [{"prompt": p, "answers": [" So.", " No, never."]} for p in prompts]
    )
    run(
        "winrate",
        tmp_path / "a.jsonl",
        tmp_path / "b.jsonl",
        "--baseline",
        "a",
        "--judge",
        models / "reward",
        "--json",
        tmp_path / "out.json",
        "--out",
        tmp_path / "out.jsonl",
    )
    run("answers", models / "reward", tmp_path / "b.jsonl", "--out", tmp_path / "scored.jsonl")
    scores = [r["scores"] for r in lines(tmp_path / "scored.jsonl")]
    out = lines(tmp_path / "out.jsonl")
    np.testing.assert_allclose([r["score"] for r in out], np.ravel(scores), atol=1e-5)
    wins = [
        (r["score"] > r["baseline_score"]) + (r["score"] == r["baseline_score"]) / 2 for r in out
    ]
    assert [r["points"] for r in out] == wins
    found = json.loads((tmp_path / "out.json").read_text())["win_rates"]["b"]
    assert (
        found["n"] == 6
        and found["n_prompts"] == 3
        and found["ties"] >= 3
        and found["swayed"] is None
    )


def test_easy_and_hard_pairs_are_data_sets(tmp_path, capsys):
    file = write(
        tmp_path / "in.jsonl",
        [
            {
                "prompt": "p1",
                "chosen": " c",
                "rejected": " r",
                "chosen_score": 0.5,
                "rejected_score": 0.0,
                "margin": 0.5,
            },
            {"prompt": "p2", "answers": [" low", " high"], "scores": [1, 2]},
            {"prompt": "p3", "answers": [" x", " y", " z"], "scores": [0.5, 4.5, -1]},
            {
                "instruction": "p4",
                "output_1": "same",
                "output_2": "same",
                "output_1_score": 2,
                "output_2_score": 2,
            },
            {
                "instruction": "p5",
                "output_1": "bad",
                "output_2": " good\n",
                "output_1_score": -2,
                "output_2_score": 0.2,
            },
        ],
    )
    run(
        "split",
        file,
        "--threshold",
        1.0,
        "--easy",
        tmp_path / "easy.jsonl",
        "--hard",
        tmp_path / "hard.jsonl",
        "--sort",
    )
    assert [r["margin"] for r in lines(tmp_path / "easy.jsonl")] == [5.5, 2.2, 1]
    assert "3 easy" in (said := capsys.readouterr().out) and "1 hard" in said and "1 ties" in said
    easy, *_ = get_dataset(str(tmp_path / "hard.jsonl"), "test", eval_share=1.0).rows
    assert (easy.prompt, easy.responses, easy.pairs) == ("p1", [" c", " r"], [(0, 1)])
    rows = lines(tmp_path / "easy.jsonl")
    assert [(r["chosen"], r["rejected"]) for r in rows] == [
        (" y", " z"),
        ("good", "bad"),
        (" high", " low"),
    ]
    assert rows[1]["prompt"] == [{"role": "user", "content": "p5"}]


# ---- what a user gets wrong ----


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["pairs", "{base}", "{pairs}"], "neither a reward model nor a run whose loss has rewards"),
        (["pairs", "{base}", "{pairs}", "--beta", "1"], "give --reference MODEL"),
        (
            ["pairs", "{base}", "{pairs}", "--beta", "1", "--reference", "{reward}"],
            "a reward model has no log-probabilities",
        ),
        (
            ["pairs", "{reward}", "{pairs}", "--beta", "1"],
            "--beta=1.0: .* is a reward model, which needs none",
        ),
        (
            ["pairs", "{reward}", "{pairs}", "--max-length", "16"],
            "--max-prompt-length=32: must be at least 1 and below max_length",
        ),
        (["pairs", "{reward}", "nothing"], "unknown data set 'nothing'"),
        (
            ["pairs", "{reward}", "Dahoas/rm-static", "--dataset-path", "rm_static={tmp}/none"],
            "none: no such file or folder",
        ),
        (["pairs", "{reward}", "{answers}"], "no pairs .chosen and rejected. in its test split"),
        (["pairs", "{reward}", "{pairs}", "--eval-share", "2"], "eval_share=2.0"),
        (
            ["pairs", "{reward}", "{pairs}", "--chat-template", "none.jinja"],
            "--chat-template=none.jinja: cannot be read",
        ),
        (
            ["pairs", "{reward}", "{pairs}", "--eval-share", "1", "--out", "{pairs}/x"],
            "--out=.*: cannot be written",
        ),
        (
            ["pairs", "{reward}", "{pairs}", "--eval-share", "1", "--plots", "{pairs}"],
            "--plots=.*: cannot be written",
        ),
        (["pairs", "{reward}", "{pairs}", "--n-examples", "0"], "--n-examples: 0: give at least 1"),
        (
            ["pairs", "{reward}", "{pairs}", "--field", "prompt"],
            "--field: 'prompt' is not of the form NAME=VALUE",
        ),
        (["pairs", "{tmp}", "{pairs}"], "not a model's folder, run, checkpoint or policy.pt"),
        (
            ["answers", "{reward}", "{tmp}/none.jsonl", "--out", "{tmp}/o"],
            "none.jsonl: no such file",
        ),
        (
            ["answers", "{reward}", "{pairs}", "--out", "{tmp}/o"],
            "pairs.jsonl, line 1: no answers .the row has: prompt, chosen",
        ),
        (
            ["split", "{answers}", "--easy", "{tmp}/e", "--hard", "{tmp}/h"],
            "answers.jsonl, line 1: no field 'score'",
        ),
        (
            ["split", "{pairs}", "--easy", "{tmp}/e", "--hard", "{tmp}/h"],
            "pairs.jsonl, line 1: no field 'chosen_score'",
        ),
        (
            ["split", "{pairs}", "--easy", "{tmp}/e", "--hard", "{tmp}/h", "--threshold", "0"],
            "--threshold=0.0: must be above 0",
        ),
        (
            ["pairs", "{reward}", "{pairs}", "--json", "{tmp}"],
            "--json=.*: cannot be written .it is a folder",
        ),
        (["pairs", "{dpo}", "{pairs}", "--beta", "0"], "--beta=0.0: must be above 0"),
        (["pairs", "{dpo}", "{pairs}", "--beta", "nan"], "--beta=nan: must be above 0"),
        (
            ["pairs", "{reward}", "{pairs}", "--dataset-path", "hh=x"],
            "--dataset-path=hh=x: is for a named set among DATA",
        ),
        (
            ["split", "{pairs}", "--easy", "{tmp}/e", "--hard", "{tmp}/e"],
            "--hard=.*/e: is also read, or written by another option",
        ),
        (["split", "{pairs}", "--easy", "{pairs}", "--hard", "{tmp}/h"], "--easy=.*: is also read"),
        ([], "are required"),
    ],
)
def test_what_is_refused(models, pairs, tmp_path, arguments, said):
    answers = write(tmp_path / "answers.jsonl", [{"prompt": "p", "response": "r"}] * 12)
    names = {name: models / name for name in ("base", "reward", "dpo")} | {
        "pairs": pairs,
        "answers": answers,
        "tmp": tmp_path,
    }
    with pytest.raises(UserError, match=said) as error:
        run(*(a.format(**names) for a in arguments))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "o").exists() and not (tmp_path / "e").exists()


def test_a_reference_with_another_tokenizer_is_refused(models, pairs, tmp_path):
    save_tiny_llama(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    with pytest.raises(
        UserError, match="--reference=.*other: its tokenizer encodes text differently"
    ):
        run("pairs", models / "dpo", pairs, "--eval-share", "1", "--reference", tmp_path / "other")


def test_models_that_score_nothing(models, bert, tmp_path):
    Bert(BertConfig.from_pretrained(bert, num_labels=2)).save_pretrained(tmp_path / "two")
    tiny_tokenizer().save_pretrained(tmp_path / "two")
    with pytest.raises(UserError, match="has num_labels=2"):
        opened(str(tmp_path / "two"))
    ref = find_model(bert)
    with pytest.raises(UserError, match="--device nowhere: not usable here"):
        load_scorer(ref, knobs_of(ref, {}), device="nowhere")
    bad = Bert.from_pretrained(bert)
    bad.classifier.weight.data.fill_(float("inf"))
    bad.save_pretrained(tmp_path / "inf")
    tiny_tokenizer().save_pretrained(tmp_path / "inf")
    with pytest.raises(UserError, match="holds NaN or infinity"):
        opened(str(tmp_path / "inf"))
