"""The page and the curves, from files in run directories, whole and broken; of runs that were
trained, see test_demo.py.
"""

import base64
import hashlib
import json
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import made_up_runs as made_up
import numpy as np
import pytest

import report
from plumb.errors import UserError
from plumb.losses import registry
from plumb.reports import comparison, curves, diagnosis, interactive
from plumb.runs import history
from plumb.settings import schema

ROOT = Path(__file__).parents[1]
library = interactive.library
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&\ud800\u202e\x00"
VOID = {"meta", "img", "br", "input"}


def write_run(folder, loss="dpo", beta=0.1, archive=None, records=None, **files):
    folder.mkdir(parents=True)
    steps = [
        {
            "step": 16 * (i + 1),
            "loss/train": 0.69 - i / 100,
            "rewards_train/accuracies": 0.9,
            "counters/updates": i + 1,
        }
        for i in range(20)
    ]
    evaluations = [
        {
            "step": step,
            "loss/eval": 0.69 - step / 2000,
            "rewards_eval/accuracies": 0.8 + beta,
            "rewards_eval/chosen": beta * 3,
            "rewards_eval/accuracies/length 32-63": 0.75,
        }
        for step in (0, 320)
    ]
    config = (
        f"exp_name: {folder.name}\nloss: {{name: {loss}, beta: {beta}}}\ndatasets:"
        " [mine.jsonl]\nlr: 1.0e-05\n"
    )
    config += (
        f"model: {{name_or_path: gpt2, archive: {archive or 'null'}, policy_dtype: float32}}\n"
    )
    lines = lambda rows: "".join(json.dumps(row) + "\n" for row in rows)
    samples = [
        {
            "table": table,
            "step": step,
            "prompt": f"p{i} {HOSTILE}",
            "sample": f"{i} {table} {step} {HOSTILE}",
        }
        for step in (0, 320)
        for table in ("policy_samples", "reference_samples")
        for i in range(4)
    ]
    status = {
        "state": "finished",
        "code": 0,
        "step": 20,
        "examples": 320,
        "time": "2026-01-01T00:01:00+0000",
    }
    content = {
        "metrics.jsonl": lines(
            [evaluations[0], *steps, evaluations[1]] if records is None else records
        ),
        "config.yaml": config,
        "samples.jsonl": lines(samples),
        "status.json": json.dumps(status),
        "env.json": json.dumps(
            {"command": ["python", "train.py", "a=<b>"], "started": "2026-01-01T00:00:00+00:00"}
        ),
    } | files
    for name, text in content.items():
        if text is not None:
            (folder / name).write_text(text)
    return folder


@pytest.fixture
def runs(tmp_path):
    return [write_run(tmp_path / name, beta=beta) for name, beta in (("low", 0.05), ("high", 0.1))]


@pytest.fixture(autouse=True)
def without_plotly(monkeypatch):
    """Pages have pictures; what is about curves with scripts brings plotly back."""
    monkeypatch.setattr(interactive, "library", lambda: None)


class Page(HTMLParser):
    """What a browser makes of it: elements, their text, pictures; the elements must close in the
    order they opened.
    """

    def __init__(self, path):
        super().__init__()
        self.open = []
        self.tags = []
        self.images = []
        self.text = []
        self.feed(path.read_text(encoding="utf-8"))
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        assert not [name for name, _ in attributes if name.startswith("on")]
        self.images += [dict(attributes)] if tag == "img" else []
        self.open += [] if tag in VOID else [tag]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)

    def __contains__(self, text):
        return text in " ".join(" ".join(self.text).split())


def command(*arguments):
    return subprocess.run(
        [sys.executable, "report.py", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def write(*runs, **options):
    report.main(
        report.parser().parse_args([*map(str, runs), *(f"--{k}={v}" for k, v in options.items())])
    )
    return Page(Path(options.get("out", runs[0] / "report.html")))


def test_what_other_commands_measured_comes_first(tmp_path, runs, capsys):
    """Win rates before accuracies, each with its interval: 8 of 10 by Wilson's formula; the same
    prompts in one row, escaped like all text; a file that is something else is refused.
    """
    files = {
        "winrate": {
            "judge": "out/reward",
            "baseline": "out/sft",
            "win_rates": {
                "out/dpo": {"value": 0.625, "low": 0.5, "high": 0.74, "n_prompts": 100, "wins": 60}
            },
        },
        "dpo": {
            "model": "out/dpo",
            "examples": {"all": 10, "length 8-15": 4},
            "metrics": {"rewards_eval/accuracies": 0.8, "loss/eval": 0.3},
        },
    }
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    answers = tmp_path / "answers.jsonl"
    lines = [
        {"prompt": prompt, "model": f"out/{model}", "answers": [f"{model} {HOSTILE[:20]}{i}"]}
        for model in ("sft", "dpo")
        for i, prompt in enumerate(["Why?", [{"role": "user", "content": "How?"}]])
    ]
    answers.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = runs[0] / "both.html"
    words = [runs[0], "--out", out, "--samples", answers, "--figures"]
    words += [tmp_path / f"{name}.json" for name in ("dpo", "winrate")]
    report.main(report.parser().parse_args([*map(str, words)]))
    page, said = Page(out), capsys.readouterr().out.splitlines()
    assert said[:2] == [
        "dpo: wins against sft, as judged by reward: 62.5% [50.0%, 74.0%] of 100 prompts",
        "dpo: accuracy: the chosen answer has the larger reward: 80.0% [49.0%, 94.3%] of 10"
        " held-out examples",
    ]
    shown = " ".join(" ".join(page.text).split())
    assert shown.index("What came of it") < shown.index("wins against sft") < shown.index("Diagn")
    assert "prompt sft dpo Why? sft <script>alert(1)</sc0 dpo <script>alert(1)</sc0 How?" in shown
    pairs = {"pairs": 4, "accuracy": 0.75, "accuracy_low": 0.3, "accuracy_high": 0.95}
    (tmp_path / "pairs.json").write_text(json.dumps({"scorer": "rm", "figures": {"hh": pairs}}))
    (figure,) = comparison.read_figures([tmp_path / "pairs.json"])
    assert str(figure) == "75.0% [30.0%, 95.0%] of 4 pairs" and figure.what == "accuracy on hh"
    with pytest.raises(UserError, match="--figures .*config.yaml: not what eval.py --out"):
        write(runs[0], figures=runs[0] / "config.yaml")


def test_a_page_that_stands_by_itself(runs, capsys, pictures):
    page = write(runs[0])
    assert (runs[0] / "report.png").read_bytes()[:4] == b"\x89PNG"
    out = capsys.readouterr().out
    assert out.splitlines()[0].startswith(
        "low: finished, 20 steps, 320 examples, 60 s, held-out loss 0.53, accuracy 0.85"
    )
    assert (
        out.splitlines()[1] == "  Nothing wrong was found."
        and f"report: {runs[0] / 'report.html'}" in out
    )
    assert (
        "Rewards: beta log pi(y|x)/pi_ref(y|x)" in page and "Accuracy: the share of pairs" in page
    )
    assert "Nothing wrong was found." in page and "gpt2 : pretrained weights, in float32" in page
    titles = {i["alt"].split(" over")[0] for i in page.images}
    ratio = "reward / beta: log-ratio to the reference (nats)"
    assert titles == {"dpo loss", "rewards", "reward accuracy (dotted: chance)", ratio}
    assert all(
        i["src"].startswith("data:image/png;base64,") and len(i["alt"]) > 30 for i in page.images
    )
    assert "held-out chosen: 0.15 to 0.15" in page.images[1]["alt"]
    html = (runs[0] / "report.html").read_text()
    assert not re.search(r"https?://|<script|<link|@import|url\(", html), (
        "it would ask the network for something, or run it"
    )


def test_curves_to_hover_over(runs, tmp_path, monkeypatch):
    """The page holds plotly, its own script, and the numbers, and its policy allows these two
    scripts by their digests: what a name or a sample holds stays text, and asks no network.
    """
    monkeypatch.setattr(interactive, "library", library)
    hostile = write_run(tmp_path / "x<script>&", beta=0.2)
    page = write(runs[0], hostile, out=tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
    scripts = re.findall(r"<script>(.*?)</script>", text, re.S)
    digest = lambda script: base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    allowed = " ".join(f"'sha256-{digest(script)}'" for script in scripts)
    assert len(scripts) == 2 and policy.endswith(f"; script-src {allowed}")
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert page.tags.count("script") == 3 and not page.images
    data = re.search(r'<script type="application/json" id="curves">(.*?)</script>', text, re.S)[1]
    assert "<" not in data and "&" not in data
    panels = json.loads(data)["panels"]
    assert text.count("data-panel=") == len(panels) and text.count("data-run=") == 2
    accuracy = next(p for p in panels if p["title"].startswith("reward accuracy"))
    assert accuracy["level"] == 0.5 and not accuracy["log"]
    raw, line, held_out = accuracy["traces"][:3]
    assert [t["kind"] for t in accuracy["traces"]] == ["raw", "line", "held-out"] * 2
    assert raw["x"][-1] == line["x"][-1] == 320 and line["share"][-1] == 100
    assert line["y"][-1] == 0.9 and held_out["y"] == [0.85, 0.85]
    assert accuracy["traces"][-1]["name"] == "x&lt;script&gt;&amp; held-out"
    assert line["color"] == curves.colour(0) and accuracy["traces"][4]["color"] == curves.colour(1)


def test_a_long_line_keeps_its_last_point():
    run = made_up.run(n=5000)
    loss, *_ = interactive.charts([curves.named(run)])
    raw = loss["traces"][0]
    assert len(raw["x"]) <= interactive.MAX_POINTS and raw["x"][-1] == run.steps[-1]["step"]
    assert raw["y"][-1] == pytest.approx(run.steps[-1]["loss/train"], rel=1e-5)


def test_what_samples_hold_is_shown_and_not_run(runs):
    page = write(*runs, out=runs[0] / "both.html")
    assert (
        not {"script", "link", "iframe"} & set(page.tags)
        and "<script>alert(1)</script><img src=x onerror=alert(2)>" in page
    )
    assert len(page.images) == len(
        curves.panels([curves.named(r) for r in history.read_runs(runs, schema.bookkeeping)])
    )
    assert (
        "policy, after 0 examples" in page
        and "policy, after 320 examples" in page
        and "reference_samples 320" in page
    )
    assert "reference_samples 0" not in page and "python train.py a=<b>" in page


def test_several_runs_side_by_side(runs):
    page = write(*runs)
    assert "knob low high loss.beta 0.05 0.1" in page and "exp_name 0" not in page
    assert "rewards_eval/accuracies 0.85 0.9 (best)" in page
    assert "rewards_eval/chosen 0.15 0.3 (best)" not in page  # more reward is not better
    assert "length 32-63 0.75 0.75" in page and "Samples at the end of each run" in page


PLUGIN = """
from plumb.losses import LossOutput, Pairs, loss

@loss(group="pair", needs_reference=True)
def from_a_plugin(policy: Pairs, reference: Pairs, *, beta: float) -> LossOutput:
    '''A line.

    Rewards: beta times a log-ratio.
    '''
    chosen = beta * (policy.chosen.sum - reference.chosen.sum)
    rejected = beta * (policy.rejected.sum - reference.rejected.sum)
    return LossOutput(rejected - chosen, chosen.detach(), rejected.detach())
"""


def test_the_loss_of_a_plugin_is_known_where_the_plugin_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "LOSSES", dict(registry.LOSSES))
    (tmp_path / "mine.py").write_text(PLUGIN)
    run = write_run(tmp_path / "run", loss="from_a_plugin")
    meaning = "Accuracy: the share of pairs whose chosen response has the larger reward"
    assert meaning not in write(run)
    assert meaning in write(run, plugin=tmp_path / "mine.py")


def test_best_only_where_it_can_be_compared(tmp_path, runs):
    other = write_run(
        tmp_path / "other",
        **{"config.yaml": "loss: {name: ipo, beta: 0.1}\ndatasets: [other.jsonl]\n"},
    )
    page = write(runs[0], runs[1], other)
    assert "(best)" not in page and "evaluated on different data" in page
    # losses of different kinds have their own rows
    assert "loss dpo/eval 0.53 0.53" in page and "loss ipo/eval 0.53" in page
    assert {"dpo loss", "ipo loss"} <= {i["alt"].split(" over")[0] for i in page.images}


def test_a_stage_has_held_out_data_of_its_own(runs):
    low, high = history.read_runs(runs, schema.bookkeeping)
    assert report.same_data([low, high])
    assert not report.same_data(
        [low, replace(high, config=high.config | {"data_split": "5,0,5", "stage": "policy"})]
    )


def test_the_chain_back_to_the_base_model(tmp_path, runs):
    sft = write_run(tmp_path / "sft", loss="sft")
    archive = sft / "step-320" / "policy.pt"
    dpo = history.read_run(write_run(tmp_path / "dpo", archive=archive))
    assert [stage.name for stage in history.lineage(dpo)] == ["dpo", "sft", "gpt2"]
    assert (
        history.lineage(dpo)[1].what
        == "sft (beta=0.1) on mine.jsonl; 320 examples in 20 steps; taken at step-320"
    )
    (tmp_path / "moved").mkdir()
    for folder in ("sft", "dpo"):
        (tmp_path / folder).rename(tmp_path / "moved" / folder)
    moved = history.read_run(tmp_path / "moved" / "dpo")
    assert [stage.name for stage in history.lineage(moved)] == ["dpo", "sft", "gpt2"]
    lone = history.read_run(write_run(tmp_path / "lone", archive="/elsewhere/policy.pt"))
    assert history.lineage(lone)[-1].what == "a checkpoint without a run's record beside it"
    circle = tmp_path / "circle"
    write_run(circle, archive=circle / "step-1" / "policy.pt")
    assert len(history.lineage(history.read_run(circle))) == 1


def test_a_run_as_it_stands(tmp_path, runs):
    """In the middle of a line, damaged, before its first record, without a config: said, and no
    reason to refuse.
    """
    with open(runs[0] / "metrics.jsonl", "a") as file:
        file.write('nonsense\n{"step": 400, "loss/tr')
    page = write(runs[0])
    assert (
        "metrics.jsonl, line 24: cut short (still being written, or the run was killed); left out"
        in page
    )
    assert (
        "metrics.jsonl: 1 of 24 lines are not records, the first of them line 23; left out" in page
    )
    new = write_run(
        tmp_path / "new",
        records=[],
        **{"samples.jsonl": None, "status.json": None, "env.json": None},
    )
    page = write(new)
    assert "no metrics yet" in page and "No metrics yet." in page and not page.images
    (runs[1] / "config.yaml").write_text("a: &b [1]\n")
    assert "(an anchor, alias or tag) is not accepted" in write(runs[1])
    (runs[1] / "config.yaml").unlink()
    assert "config.yaml: left out (No such file or directory)" in write(runs[1])


def test_numbers_that_no_run_writes(runs):
    """A step that is none, a value that no axis holds, a setting of another kind, a folder called
    like a picture.
    """
    with open(runs[0] / "metrics.jsonl", "a") as file:
        file.write(
            '{"step": 1e400, "loss/train": 1}\n{"step": NaN, "loss/train": 1}\n{"step": 321,'
            ' "loss/train": 1e308}\n'
        )
    with open(runs[0] / "config.yaml", "a") as file:
        file.write("warmup_steps: many\nmax_grad_norm: x\n")
    (runs[0] / "scores-999.png").mkdir()
    run = history.read_run(runs[0])
    assert run.steps[-1]["step"] == 321 and "2 of" in run.notes[0]
    assert curves.points(run.steps, "loss/train")[0][-1] < 321
    assert diagnosis.diagnose(run) is not None and report.pictures(run) == []


def test_names_tell_runs_apart(tmp_path):
    stamps = [f"x_2026-01-01_00-00-00_00000{i}" for i in range(2)]
    a, b = (
        write_run(tmp_path / stamp, beta=beta)
        for stamp, beta in zip(stamps, (0.05, 0.1), strict=True)
    )
    assert [run.name for run in history.read_runs([a], schema.bookkeeping)] == ["x"]
    assert [run.name for run in history.read_runs([a, b, a / "." / ""], schema.bookkeeping)] == [
        "x loss.beta=0.05",
        "x loss.beta=0.1",
    ]
    c, d = write_run(tmp_path / "c" / stamps[0]), write_run(tmp_path / "d" / stamps[0])
    assert [run.name for run in history.read_runs([c, d], schema.bookkeeping)] == [str(c), str(d)]


def test_a_reward_model_s_pictures(runs):
    for name in ("scores-80.png", "scores-320.png", "calibration-320.png", "curves.png"):
        (runs[0] / name).write_bytes(b"\x89PNG\r\n" + name.encode())
    alts = [i["alt"] for i in write(runs[0]).images][-2:]
    assert [alt.split(";")[0] for alt in alts] == [
        f"{x} after 320 training examples of low" for x in ("calibration", "scores")
    ]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ([], "the following arguments are required: RUN; see python report.py --help"),
        (
            ["{tmp}/nothing"],
            (
                "{tmp}/nothing: not a run directory (there is no such directory); give the"
                " directory that"
            ),
        ),
        (["{tmp}"], "{tmp}: not a run directory (it holds neither metrics.jsonl nor config.yaml)"),
        (
            ["{tmp}/low", "--out={tmp}/low/config.yaml/x.html"],
            "--out={tmp}/low/config.yaml/x.html: cannot be written (File",
        ),
        (["{tmp}/low", "--out=page.pdf"], "--out=page.pdf: expected a name that ends in .html"),
    ],
)
def test_mistakes(runs, tmp_path, monkeypatch, capsys, arguments, error):
    monkeypatch.setattr(sys, "argv", ["report.py", *(a.format(tmp=tmp_path) for a in arguments)])
    with pytest.raises(SystemExit) as end:
        if arguments:
            report.cli.run(report.parser(), report.main)
        else:
            report.cli.run(report.parser(), None)
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {error.format(tmp=tmp_path)}")


def test_the_command(runs):
    done = command(runs[0])
    assert (
        done.returncode == 0
        and done.stdout.splitlines()[-2] == f"report: {runs[0] / 'report.html'}"
    ), done.stderr


# ---- curves ----


def test_curves(runs, pictures):
    out = curves.draw_curves(runs)
    assert out == runs[0] / "curves.png" and out.read_bytes()[:4] == b"\x89PNG"
    assert curves.draw_curves(runs[:1], runs[0] / "x.png") == runs[0] / "x.png"
    assert not [p for p in runs[0].iterdir() if p.name.startswith(".")]


def test_what_is_drawn(runs):
    run = curves.named(
        replace(history.read_run(runs[0]), config={"loss": {"name": "dpo", "beta": 0.05}})
    )
    assert run.evaluations[0]["ratio_eval/chosen"] == pytest.approx(3.0)  # 0.15 / beta, nats
    free = replace(
        history.read_run(runs[0]),
        config={"loss": {"name": "dpo", "beta": 0.05, "reference_free": True}},
    )
    assert "ratio_eval/chosen" not in curves.named(free).evaluations[0]
    run.steps[1]["lr"] = 1e-5
    run.evaluations[1].update({"kl_eval/policy": 2.0, "perplexity/eval": 9.0})
    assert {"kl/policy", "perplexity"} <= {p.title for p in curves.panels([run])}
    assert {"kl/policy", "learning rate"}.isdisjoint(
        p.title for p in curves.panels([run], further=False)
    )


def test_a_legend_names_only_what_is_drawn(runs):
    """Log-probabilities of the chosen answers alone, as of SFT beside a list loss."""
    run = curves.named(history.read_run(runs[0]))
    for step in run.steps:
        step["logps_train/chosen"] = -40.0
    _, axes = curves._figure(1, 1)
    curves._draw(axes[0, 0], curves.LOGPS, [run])
    legend = axes[0, 0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["chosen"]


def test_learning_rate_and_memory_are_drawn_as_they_are():
    run = made_up.run(n=100)
    for i, step in enumerate(run.steps):
        step["lr"] = 1e-5 * (i >= 50)
    rate = next(p for p in curves.FURTHER if p.title == "learning rate")
    _, axes = curves._figure(1, 1)
    curves._draw(axes[0, 0], rate, [run])
    (line,) = axes[0, 0].get_lines()
    assert line.get_ydata().tolist() == [1e-5 * (i >= 50) for i in range(100)]


def test_sft_has_its_loss_once(tmp_path):
    """Its loss is the negative log-probability of its answers, unless averaged over tokens."""
    records = [
        {"step": 8 * i, "loss/train": 9.0 - i, "logps_train/chosen": i - 9.0} for i in (1, 2)
    ]
    run = history.read_run(write_run(tmp_path / "sft", loss="sft", records=records))
    titles = lambda run: [p.title for p in curves.panels([curves.named(run)])]
    assert titles(run) == ["sft loss"]
    run.steps[1]["loss/train"] = 0.5
    assert titles(run) == ["sft loss", "log-probability (nats)"]


def test_the_moving_average_stands_in_the_panels_of_the_policy(tmp_path, pictures):
    """Its metrics are no panels of their own: squares beside circles, and words for both."""
    records = [
        {"step": step, "loss/eval": 0.6, "loss/eval_ema": 0.5 + step / 1000}
        | {"rewards_eval/chosen": 0.3, "rewards_eval_ema/chosen": 0.2}
        for step in (0, 320)
    ]
    run = write_run(tmp_path / "ema", records=records)
    page = write(run)
    assert "Squares: the same, for the moving average of the policy." in page
    (loss,) = [i["alt"] for i in page.images if i["alt"].startswith("dpo loss")]
    assert "held-out: 0.6 to 0.6" in loss and "held-out, moving average: 0.5 to 0.82" in loss
    assert not [i for i in page.images if "ema" in i["alt"].partition(" over")[0]]
    (ratio,) = [i["alt"] for i in page.images if i["alt"].startswith("reward / beta")]
    assert "held-out, moving average chosen: 2 to 2" in ratio


def test_numbers_that_are_none_are_left_out():
    records = [
        {"step": i, "x": value} for i, value in enumerate([1.0, float("nan"), 3.0, float("inf")])
    ]
    steps, values = curves.points(records, "x")
    assert steps.tolist() == [0, 2] and values.tolist() == [1, 3]


def test_the_running_mean():
    values = np.random.default_rng(0).random(100)
    expected = [values[max(0, i - 4) : i + 1].mean() for i in range(100)]
    np.testing.assert_allclose(curves.running_mean(values), expected)
