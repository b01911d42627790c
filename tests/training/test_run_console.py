"""What a person sees of a run: at a terminal of 80 columns, read from its screen."""

import os
import re

import pytest
from conftest import PATIENCE, ROOT
from runs import DPO, FAST, records
from terminal import Terminal

COLUMNS = 80
SLOW = """
import time, trainers
step = trainers.BasicTrainer.step
def slow(self, *arguments):
    time.sleep(0.1)
    step(self, *arguments)
trainers.BasicTrainer.step = slow
"""


@pytest.fixture
def terminal(tmp_path, data, tiny_model, here, warm):
    """`terminal(*overrides)`: a DPO run of 12 steps in a terminal, its directory tmp_path/run."""
    plugin = tmp_path / "slow.py"
    plugin.write_text(SLOW)
    opened = []

    def start(*overrides):
        command = [
            f"{ROOT}/train.py",
            *here,
            "exp_name=run",
            "local_run_dir=run",  # a longer path may end at the edge of the terminal
            f"model.name_or_path={tiny_model}",
            f"datasets=[{data}]",
            *FAST,
            *DPO,
            "n_epochs=3",
            "n_examples=48",
            "eval_every=24",
            f"plugins=[{plugin}]",
            *overrides,
        ]
        opened.append(Terminal(warm, command, tmp_path, os.environ, COLUMNS))
        return opened[-1]

    yield start
    for one in opened:
        one.close()


def without_numbers(lines):
    """
    >>> without_numbers(["loss 0.6931  lr 5.0e-7", "|███   |  50%"])
    ['loss N  lr N', '|BAR|  N%']
    """
    lines = [re.sub(r"\|[^|]*\|", "|BAR|", line) for line in lines]
    lines = [re.sub(r"((?<!\w)-)?\d+([.,]\d+)*(e-?\d+)?", "N", line) for line in lines]
    return [line.replace("N min", "N s") for line in lines]  # of a busy machine


def plain(lines, tmp_path):
    """Return the lines without numbers, as they were before the terminal's edge broke them."""
    text = "".join(line if len(line) == COLUMNS else f"{line}\n" for line in lines).strip()
    text = re.sub(r"\n  (?=\S)", " ", text).replace(str(tmp_path), "PATH")
    return "\n".join(without_numbers(text.split("\n")))


BAR = (
    "dpo  N/N steps |BAR| N%  N s left",
    "loss N  accuracy N%  margin N  N pairs/s  lr N",
)
TRAINED = """\
eval before training  loss N  accuracy N%  margin N  perplexity N
step N: policy and reference agree (rewards N, dpo loss N)
a checkpoint takes N MB and N s; written, verified and deleted
eval at N pairs  loss N  accuracy N%  margin N  perplexity N
saved run/step-N
eval at N pairs  loss N  accuracy N%  margin N  perplexity N
saved run/step-N
dpo  N/N steps |BAR| N%  in N s
loss N  accuracy N%  margin N  N pairs/s  lr N"""


def test_the_screen_of_a_run(terminal, tmp_path):
    """One bar and one line of metrics below it, both steady: no snapshot has a second one, and no
    line of ours is cut by the edge. At the end stand the evaluations, and the last step.
    """
    run, seen = terminal(), set()
    for lines in run.screens(PATIENCE):
        bars = [i for i, line in enumerate(lines) if " steps |" in line]
        assert len(bars) <= 1, lines
        seen |= {tuple(without_numbers(lines[i : i + 2])) for i in bars}
    assert run.exit_code() == 0
    assert BAR in seen
    lines = run.lines()
    begin, end = (
        next(i for i, line in enumerate(lines) if line.startswith(words))
        for words in ("eval before", "done in")
    )
    assert plain(lines[begin:end], tmp_path) == TRAINED
    last = records(tmp_path / "run", "train")[-1]
    assert f"  margin {last['rewards_train/margins']:.3g}  " in "\n".join(lines)
    assert run.screen.cursor.x == 0


def test_ctrl_c_leaves_a_clean_screen(terminal, tmp_path):
    """The answer comes at once, the run ends after its step, and neither ^C nor a part of the bar
    is left.
    """
    run = terminal("n_epochs=30", "n_examples=null")
    pressed = False
    for lines in run.screens(PATIENCE):
        if not pressed and any(re.match(r"dpo +3/", line) for line in lines):
            run.press_ctrl_c()
            pressed = True
    assert run.exit_code() == 130
    lines = run.lines()
    said = lines.index("stopping after this step; Ctrl-C again quits at once")
    assert plain(lines[said + 1 :], tmp_path) == (
        "saved run/interim-N\n"
        "stopped by SIGINT after step N of N, N examples; resume with resume=auto"
    )
    assert run.screen.cursor.x == 0


def test_ctrl_c_before_the_first_step(terminal):
    """During the first evaluation, whose bar is a third one: no part of any is left."""
    run = terminal("n_epochs=30", "n_examples=null")
    pressed = False
    for lines in run.screens(PATIENCE):
        if not pressed and any(" steps |" in line for line in lines):
            run.press_ctrl_c()
            pressed = True
    assert run.exit_code() == 130
    lines = run.lines()
    assert not [line for line in lines if "█" in line or "^" in line or " steps |" in line]
    assert any(line.startswith("stopped by SIGINT after step ") for line in lines)


START = """\
run        PATH/run
model      MODEL: LlamaForCausalLM, N M parameters
data       N pairs of PATH/pairs.jsonl; N held out
steps      N of N pairs; N in all, N epochs
loss       dpo, beta=N
lr         N (RMSprop), N steps of warm-up, then constant
precision  weights in floatN, computed in floatN on cpu by BasicTrainer
reference  the policy as it starts, cached (examples are used more than once)
note: loss=dpo starts from a model without a chat template, and compares answers that this model\
 may never give: train it with loss=sft first, and start from that run with model.archive=RUN
"""
NEXT = """\
next:
  python eval.py PATH/run
  python sample.py PATH/run --chat
  python report.py PATH/run
  python export.py PATH/run --out FOLDER
"""


def test_what_is_said_at_the_start_and_at_the_end(train, tmp_path, tiny_model, capsys):
    train("run", *DPO, "n_epochs=3")
    out = capsys.readouterr().out.replace(str(tmp_path), "PATH").replace(str(tiny_model), "MODEL")
    assert START in "\n".join(without_numbers(out.split("\n")))
    assert out.endswith(NEXT)


def test_a_run_within_its_warmup_is_told_the_fix(train, tmp_path, capsys):
    """The warm-up of 150 steps leaves 4 steps at 3 % of lr, as when AmberSafe's settings are tried
    on 64 pairs. From a checkpoint of SFT there is no note on a missing SFT.
    """
    train("sft", "loss=sft", "n_examples=4", "batch_size=4", "lr=1e-5")
    capsys.readouterr()
    train("dpo", "loss=dpo", "loss.beta=0.1", "batch_size=4", f"model.archive={tmp_path}/sft")
    out = capsys.readouterr().out
    notes = [line for line in out.splitlines() if line.startswith("note: ")]
    assert notes == [
        "note: the run ends within its warmup, at 3% of lr; warmup_steps=0 would be a tenth of its"
        " steps"
    ]
    assert "(RMSprop), all of it warm-up\n" in out
