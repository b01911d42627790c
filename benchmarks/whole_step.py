"""Time whole steps of GRPO: Plumb, through train.py, beside TRL (see rollouts.py).

Each contender is a process that waits at each rollout's rewards (step_gate.py), so that they run
one at a time and take turns. Both start from the same weights, and have the same prompts, numbers
of responses, rewards and precision. TRL runs once for each size of microbatch.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[1]


class Task(NamedTuple):
    """Hold what all contenders work on."""

    model: Any
    ends: Sequence[int]  # tokens that end a response
    prompts: Sequence[Sequence[int]]
    n: int  # responses to each
    max_new_tokens: int
    rounds: int


class Step(NamedTuple):
    """Hold a step's report."""

    secs: float  # CPU time
    tokens: int  # of the responses


class Contender:
    """Run a training process that waits between steps, in a folder of its own."""

    def __init__(self, folder: Path, command: Sequence[object], n_responses: int):
        self.folder = folder
        self.steps: list[Step] = []  # the first one ends with the first rollout: the start
        (folder / "n_responses").write_text(str(n_responses))
        with open(folder / "log", "w") as log:
            self.process = subprocess.Popen(
                [str(word) for word in command],
                cwd=ROOT,
                env=os.environ | {"STEP_GATE": str(folder)},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def wait(self) -> None:
        """Wait for the report of a step; end if the process has ended."""
        report = self.folder / f"report_{len(self.steps)}"
        while not report.exists():
            if self.process.poll() is not None:
                sys.exit((self.folder / "log").read_text()[-3000:])
            time.sleep(0.02)
        self.steps.append(Step(**json.loads(report.read_text())))

    def step(self) -> None:
        """Let it make a step."""
        (self.folder / f"order_{len(self.steps) - 1}").touch()
        self.wait()


def compare(task: Task, folder: Path, trl: str, microbatches: Sequence[int]) -> str:
    """Return a table of the seconds of a step. `trl`: the Python whose environment has TRL; without
    TRL, Plumb is alone. `microbatches`: numbers of responses, for TRL.
    """
    write(task, folder)
    n_responses = len(task.prompts) * task.n
    commands = {"Plumb": plumb(task, folder)}
    with_trl = has_trl(trl)
    if with_trl:
        for size in microbatches:
            commands[f"TRL, microbatches of {size}"] = trl_command(task, folder, trl, size)
    contenders: dict[str, Contender] = {}
    try:
        for i, (name, command) in enumerate(commands.items()):
            own = folder / str(i)
            own.mkdir()
            contenders[name] = Contender(own, command, n_responses)
            contenders[name].wait()
        for _ in range(task.rounds + 1):  # the first step is a warm-up
            for contender in contenders.values():
                contender.step()
    finally:
        for contender in contenders.values():
            contender.process.kill()
            contender.process.wait()
    steps = {name: contender.steps[2:] for name, contender in contenders.items()}
    return table(steps, n_responses) + ("" if with_trl else "\n\nTRL is not installed: skipped.")


def has_trl(python: str) -> bool:
    """Return whether this interpreter's environment has TRL."""
    code = "import sys; from importlib.util import find_spec; sys.exit(not find_spec('trl'))"
    return subprocess.run([python, "-c", code]).returncode == 0


def write(task: Task, folder: Path) -> None:
    """Write the model, with a tokenizer that has a word for each token, and the prompts."""
    vocabulary = {word(i): i for i in range(task.model.config.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=word(0)))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=word(task.ends[0]), pad_token=word(0)
    ).save_pretrained(folder / "model")
    task.model.generation_config.eos_token_id = [*task.ends]
    task.model.save_pretrained(folder / "model")
    lines = [json.dumps({"prompt": text}) + "\n" for text in texts(task)]
    (folder / "prompts.jsonl").write_text("".join(lines))


def word(token: int) -> str:
    return f"w{token}"


def texts(task: Task) -> list[str]:
    return [" ".join(map(word, prompt)) for prompt in task.prompts]


def plumb(task: Task, folder: Path) -> list[object]:
    """Return the command of a run that makes as many steps as it is let."""
    longest = max(map(len, task.prompts))
    return [
        *(sys.executable, "train.py", "exp_name=whole_step", "loss=grpo"),
        *("loss.kl=none", "loss.beta=null", "optimizer=AdamW", "lr=1e-6", "warmup_steps=0"),
        f"model.name_or_path='{folder}/model'",
        f"datasets=['{folder}/prompts.jsonl']",
        f"eval_datasets=['{folder}/prompts.jsonl']",
        f"plugins=['{ROOT}/benchmarks/step_gate.py']",
        "reward.terms={enough: {function: enough_tokens}}",
        f"rollout.n={task.n}",
        f"rollout.max_new_tokens={task.max_new_tokens}",
        f"rollout.batch_size={len(task.prompts) * task.n}",
        f"max_length={longest + task.max_new_tokens}",
        f"max_prompt_length={longest}",
        f"batch_size={len(task.prompts)}",
        f"n_epochs={task.rounds + 3}",
        f"local_run_dir='{folder}/run'",
        f"local_dirs=['{folder}']",
        *("do_first_eval=false", "do_last_eval=false", "sample_during_eval=false"),
        *("debug=true", "max_grad_norm=1", "eval_every=1000000"),
    ]


def trl_command(task: Task, folder: Path, python: str, microbatch: int) -> list[object]:
    """Return the command of TRL's run."""
    setting = folder / f"trl_{microbatch}.json"
    given = {
        "model": str(folder / "model"),
        "prompts": texts(task),
        "n": task.n,
        "max_new_tokens": task.max_new_tokens,
        "microbatch": microbatch,
        "rollouts": task.rounds + 3,
    }
    setting.write_text(json.dumps(given))
    return [python, "benchmarks/step_gate.py", setting]


def table(steps: dict[str, list[Step]], n_responses: int) -> str:
    """Return the seconds of each contender's steps, and how many of Plumb's they take."""
    lines = [
        "| whole step of GRPO | seconds of CPU time, median | least | largest"
        " | tokens of a response | times Plumb's, by round |",
        "|---|---|---|---|---|---|",
    ]
    for name, own in steps.items():
        secs = [step.secs for step in own]
        ratios = sorted(a / b.secs for a, b in zip(secs, steps["Plumb"], strict=True))
        cells = [name, *(f"{f(secs):.2f}" for f in (statistics.median, min, max))]
        cells.append(f"{statistics.mean(step.tokens for step in own) / n_responses:.0f}")
        cells.append(f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
