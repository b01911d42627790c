"""Test what a kill, damage, a changed setting, a signal, a full disk or a malformed file does to a
DPO run, with trl.DPOTrainer and Plumb.

    python benchmarks/reliability_trl.py trl              # about 15 minutes on a CPU; also: plumb
    python benchmarks/reliability_trl.py --report    # writes benchmarks/results/reliability_trl.md

Both train the same Llama of 174,104 random parameters on the same 80 pairs for 40 steps of 4, on
one thread, and save after every step; they are started as a user starts them, one process per run.
A run that was disturbed and started again is *right* if it ends with exactly the weights of the
undisturbed run, or stops with one line that says why; it is wrong if it ends in a traceback, or
with other weights as if nothing had happened. If a setting was changed, continuing as if it had not
been is wrong, too.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from malformed import malformed

ROOT = Path(__file__).resolve().parents[1]
N_STEPS, BATCH, N_ROWS = 40, 4, 80
CUT = 15  # the damaged checkpoint's step
RESULTS = ROOT / "benchmarks/results/reliability_trl.md"
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_MODE": "disabled",
    "COLUMNS": "200",
}


# ---- the contenders ----


class Contender(NamedTuple):
    """Hold how a trainer is started, and where it keeps its files."""

    name: str
    command: Callable[[Run], list[str]]
    checkpoint: str  # name of a checkpoint, from its step
    weights: str  # files of a checkpoint
    optimizer: str
    state: str
    final: str  # the file whose tensors are the result
    jit: bool = False  # it has another way of handling SIGTERM, off by default


class Run(NamedTuple):
    """Hold the settings of a run."""

    model: Path
    data: Path
    run_dir: Path
    n_steps: int = N_STEPS
    resume: bool = False
    lr: float = 1e-3
    batch: int = BATCH
    jit: bool = False  # TRL's own way of handling SIGTERM


def trl_command(run: Run) -> list[str]:
    what = map(str, (run.model, run.data, run.run_dir, run.n_steps))
    line = [
        sys.executable,
        "benchmarks/trl_dpo.py",
        *what,
        f"--lr={run.lr}",
        f"--batch={run.batch}",
    ]
    return line + ["--resume"] * run.resume + ["--jit"] * run.jit


def plumb_command(run: Run) -> list[str]:
    return [
        sys.executable,
        "train.py",
        "exp_name=reliability",
        "loss=dpo",
        "loss.beta=0.1",
        f"model.name_or_path='{run.model}'",
        f"datasets=['{run.data}']",
        f"local_run_dir='{run.run_dir}'",
        f"local_dirs=['{run.run_dir.parent}']",
        f"lr={run.lr}",
        f"batch_size={run.batch}",
        "n_epochs=null",
        f"n_examples={run.n_steps * BATCH}",
        f"eval_every={BATCH}",
        "optimizer=AdamW",
        "warmup_steps=2",
        "max_length=96",
        "max_prompt_length=48",
        "do_first_eval=false",
        "sample_during_eval=false",
        "wandb.enabled=false",
        "minimum_log_interval_secs=-1",
        *["resume=auto"] * run.resume,
    ]


CONTENDERS = {
    "trl": Contender(
        name="TRL",
        command=trl_command,
        checkpoint="checkpoint-{}",
        weights="model.safetensors",
        optimizer="optimizer.pt",
        state="trainer_state.json",
        final="model.safetensors",
        jit=True,
    ),
    "plumb": Contender(
        name="Plumb",
        command=plumb_command,
        checkpoint="step-{}",
        weights="policy.pt",
        optimizer="state-0-of-1.safetensors",
        state="manifest.json",
        final="policy.pt",
    ),
}


def checkpoint(contender: Contender, run_dir: Path, step: int) -> Path:
    return run_dir / contender.checkpoint.format(
        step * BATCH if contender.name == "Plumb" else step
    )


def newest(contender: Contender, run_dir: Path) -> int:
    """Return the step of the newest checkpoint by name, complete or not; 0: none."""
    steps = [
        int(p.name.rpartition("-")[2])
        for p in run_dir.glob(contender.checkpoint.format("*"))
        if p.name[-1].isdigit()
    ]
    return max(steps, default=0) // (BATCH if contender.name == "Plumb" else 1)


def final_weights(contender: Contender, run_dir: Path, n_steps: int = N_STEPS) -> str | None:
    """Return a digest of the result's tensors, and nothing else; None if there is no result."""
    path = checkpoint(contender, run_dir, n_steps) / contender.final
    if not path.is_file():
        return None
    if path.suffix == ".pt":
        import torch

        tensors = {k: v.numpy() for k, v in torch.load(path, weights_only=True)["state"].items()}
    else:
        from safetensors.numpy import load_file

        tensors = load_file(path)
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].tobytes())
    return digest.hexdigest()


# ---- a run and its end ----


class End(NamedTuple):
    """Hold how a command ended."""

    code: int
    out: str
    err: str

    def unusual_line(self, usual: set[str]) -> str:
        """Return the first line that an undisturbed run does not print."""
        return next((line.strip() for line in self.lines() if shape(line) not in usual), "")

    def lines(self) -> list[str]:
        return [
            line
            for line in (self.err + "\n" + self.out).replace("\r", "\n").splitlines()
            if line.strip()
        ]


def shape(line: str) -> str:
    """Return the words of a line, since numbers and paths differ from run to run."""
    return re.sub(r"\S*/\S*|\d[\d.,e+-]*|[0-9a-f]{8,}|[^A-Za-z]", "", line)


@contextmanager
def running(command: list[str], log: Path) -> Iterator[subprocess.Popen]:
    """Run a command in its own process group, which is killed afterwards."""
    with open(log.with_suffix(".out"), "w") as out, open(log.with_suffix(".err"), "w") as err:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def ended(process: subprocess.Popen, log: Path, timeout: float = 300) -> End:
    return End(process.wait(timeout), *read_log(log))


def read_log(log: Path) -> list[str]:
    return [log.with_suffix(suffix).read_text(errors="replace") for suffix in (".out", ".err")]


def run(command: list[str], log: Path) -> End:
    with running(command, log) as process:
        return ended(process, log)


# ---- the table ----


class Case(NamedTuple):
    """Hold a line of the table. `verdict`: right, traceback or wrong (anything else); for a file:
    one line, traceback, said or silent.
    """

    group: str
    name: str
    verdict: str
    outcome: str  # in words


def judge(
    end: End, weights: str | None, expected: str | None, usual: set[str], going_on_is_right: bool
) -> tuple[str, str]:
    """Return the verdict, and what happened in words."""
    if end.code:
        frames = end.err.count('  File "')
        if "Traceback" in end.err:
            return (
                "traceback",
                f"exit {end.code}, traceback of {frames} frames: {clip(last_line(end))}",
            )
        one = len(end.err.strip().splitlines()) == 1
        return "right" if one else "wrong", f"exit {end.code}: {clip(end.err.strip() or 'nothing')}"
    same = weights == expected
    line = end.unusual_line(usual)
    went = "finished with the undisturbed run's weights" if same else "finished with other weights"
    outcome = f"{went}; said: {clip(line)}" if line else f"{went}, and said nothing"
    return "right" if same and going_on_is_right else "wrong", outcome


def last_line(end: End) -> str:
    lines = [
        line
        for line in end.err.splitlines()
        if re.match(r"\w[\w.]*(Error|Exception|Iteration|Exit)\b", line)
    ]
    return (lines or end.err.strip().splitlines())[-1]


def clip(text: str, length: int = 150) -> str:
    text = re.sub(r"\S*/(?=[\w.-]+/[\w.-]+)", ".../", text.replace("|", "/"))
    return (
        "`"
        + (text if len(text) <= length else text[: length - 3] + "...")
        .replace("`", "'")
        .replace("\n", " ")
        + "`"
    )


class Bench:
    """Run one contender's cases, all in one folder."""

    def __init__(self, contender: Contender, folder: Path, seed: int):
        self.contender = contender
        self.folder = folder
        self.rng = random.Random(seed)
        self.seed = seed
        self.cases: list[Case] = []
        self.record: dict[str, Any] = {}
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.model = folder / "model"
        self.data = folder / "pairs.jsonl"
        make_model(self.model)
        rows = (ROOT / "demo/train.jsonl").read_text().splitlines()[:N_ROWS]
        self.rows = [
            {k: json.loads(row)[k] for k in ("prompt", "chosen", "rejected")} for row in rows
        ]
        self.data.write_text("".join(json.dumps(row) + "\n" for row in self.rows))

    def command(self, run_dir: Path, **changes: Any) -> list[str]:
        return self.contender.command(Run(self.model, self.data, run_dir)._replace(**changes))

    def wait_for(
        self, step: int, run_dir: Path, process: subprocess.Popen, secs: float = 120
    ) -> None:
        """Wait until the checkpoint of that step or a later one has its name, or the process has
        ended.
        """
        end = time.monotonic() + secs
        while (
            newest(self.contender, run_dir) < step
            and process.poll() is None
            and time.monotonic() < end
        ):
            time.sleep(0.002)

    def add(self, group: str, name: str, verdict: str, outcome: str) -> None:
        self.cases.append(Case(group, name, verdict, outcome))
        print(f"{group:<10} {name:<45} {verdict:<10} {outcome}", flush=True)

    def undisturbed(self) -> None:
        """Run twice: the weights must be the same, otherwise nothing below means anything. Then
        make the base: the same run, killed after step CUT.
        """
        run_dirs = [self.folder / "whole", self.folder / "whole2"]
        digests = []
        for run_dir in run_dirs:
            with running(self.command(run_dir), self.folder / "whole") as process:
                self.wait_for(1, run_dir, process)
                began = time.monotonic()
                self.wait_for(N_STEPS, run_dir, process)
                self.secs = time.monotonic() - began  # from the first checkpoint to the last
                end = ended(process, self.folder / "whole")
            if end.code:
                raise SystemExit(f"{self.contender.name} does not run: {end.err[-2000:]}")
            digests.append(final_weights(self.contender, run_dir))
        if digests[0] is None or digests[0] != digests[1]:
            raise SystemExit(
                f"{self.contender.name}: two undisturbed runs differ, or end without weights"
            )
        self.expected = digests[0]
        self.base = self.folder / "base"
        with running(self.command(self.base), self.folder / "base") as process:
            self.wait_for(CUT + 1, self.base, process)
        for step in range(CUT + 1, N_STEPS + 1):  # the kill may have damaged one of these
            shutil.rmtree(checkpoint(self.contender, self.base, step), ignore_errors=True)
        end, weights = self.resume(self.copy("usual"))
        self.usual = {shape(line) for line in end.lines()}
        self.add(
            "control",
            "killed between two saves, started again",
            *judge(end, weights, self.expected, self.usual, True),
        )

    def copy(self, name: str) -> Path:
        run_dir = self.folder / name
        shutil.rmtree(run_dir, ignore_errors=True)
        return Path(shutil.copytree(self.base, run_dir, symlinks=True))

    def resume(self, run_dir: Path, **changes: Any) -> tuple[End, str | None]:
        end = run(self.command(run_dir, resume=True, **changes), self.folder / run_dir.name)
        return end, final_weights(self.contender, run_dir)

    # ---- the groups ----

    def kills(self, n: int) -> None:
        """Send SIGKILL at a random moment after the first checkpoint, start again, compare. Each
        trial is its own run.
        """
        broken, older = 0, 0
        for i in range(n):
            run_dir, delay = self.folder / f"kill-{i}", self.rng.uniform(0, self.secs)
            with running(self.command(run_dir), self.folder / "killed") as process:
                self.wait_for(1, run_dir, process)
                time.sleep(delay)
            at = newest(self.contender, run_dir)
            end, weights = self.resume(run_dir)
            verdict, outcome = judge(end, weights, self.expected, self.usual, True)
            if verdict != "right":
                broken, older = broken + 1, older + (at > 1)
            name = f"SIGKILL {i + 1}, {delay:.2f} s after the first save"
            self.add("kills", name, verdict, f"newest checkpoint: step {at}; {outcome}")
            shutil.rmtree(run_dir)
        self.record["kills"] = {
            "n": n,
            "broken": broken,
            "older_checkpoint_beside": older,
            "seed": self.seed,
        }

    def damage(self) -> None:
        files = {
            "weights": self.contender.weights,
            "optimizer": self.contender.optimizer,
            "state": self.contender.state,
        }
        for kind, file in files.items():
            for forward_path, spoil in WAYS.items():
                if kind == "state" and "bit" in forward_path:
                    continue  # in text it may be a syntax error as well as a changed number
                run_dir = self.copy("damaged")
                spoil(checkpoint(self.contender, run_dir, CUT) / file)
                self.started_again(
                    "damage", f"the newest checkpoint's {kind} file {forward_path}", run_dir, True
                )
        run_dir = self.copy("damaged")
        for path in checkpoint(self.contender, run_dir, CUT).iterdir():
            path.unlink()
        self.started_again("damage", "the newest checkpoint is an empty directory", run_dir, True)

    def started_again(
        self, group: str, name: str, run_dir: Path, going_on_is_right: bool, **changes: Any
    ) -> None:
        end, weights = self.resume(run_dir, **changes)
        self.add(group, name, *judge(end, weights, self.expected, self.usual, going_on_is_right))

    def changes(self) -> None:
        original = self.data.read_text()
        others = (ROOT / "demo/train.jsonl").read_text().splitlines()[N_ROWS : 2 * N_ROWS]
        for name, text in {
            "the data file holds other rows": "\n".join(others) + "\n",
            "one letter of the data file differs": original.replace("coffee", "toffee", 1),
        }.items():
            self.data.write_text(text)
            self.started_again("changes", name, self.copy("changed"), False)
            self.data.write_text(original)
        self.started_again("changes", "lr=0.1", self.copy("changed"), False, lr=0.1)
        self.started_again(
            "changes", "half the batch size", self.copy("changed"), False, batch=BATCH // 2
        )

    def signals(self) -> None:
        for name, number in {"SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}.items():
            for jit in [False, True] if self.contender.jit and name == "SIGTERM" else [False]:
                run_dir = self.folder / "signalled"
                shutil.rmtree(run_dir, ignore_errors=True)
                with running(
                    self.command(run_dir, n_steps=400, jit=jit), self.folder / "signalled"
                ) as process:
                    self.wait_for(5, run_dir, process)
                    process.send_signal(number)
                    end = ended(process, self.folder / "signalled")
                shell = end.code if end.code >= 0 else 128 - end.code
                verdict = (
                    "traceback"
                    if "Traceback" in end.err
                    else "right"
                    if shell == 128 + number
                    else "wrong"
                )
                how = (
                    f"exit {end.code} (a shell says {shell}) after"
                    f" {newest(self.contender, run_dir)} of 400 steps"
                )
                line = (
                    last_line(end)
                    if verdict == "traceback"
                    else (end.err.strip().splitlines() or ["nothing"])[-1]
                )
                self.add(
                    "signals",
                    name + (" with enable_jit_checkpoint" if jit else ""),
                    verdict,
                    f"{how}; said: {clip(line)}",
                )

    def full_disk(self) -> None:
        """Fill up a small file system during a run, then free some space and start again."""
        disk, size = self.folder / "disk", 200 << 20
        disk.mkdir()
        one = sum(f.stat().st_size for f in checkpoint(self.contender, self.base, CUT).iterdir())
        run_dir, logs = disk / "run", (self.folder / "full", self.folder / "freed")
        sh = [
            f"mount -t tmpfs -o size={size} none '{disk}'",
            f"head -c {size - 8 * one} /dev/zero > '{disk}/filler'",
        ]
        for log, resume in zip(logs, (False, True), strict=True):
            line = shlex.join(self.command(run_dir, resume=resume))
            sh += [
                f"{line} > '{log}.out' 2> '{log}.err' < /dev/null; echo $? > '{log}.code'",
                f"rm -f '{disk}/filler'",
            ]
        sh.append(f"cp -r '{run_dir}' '{self.folder}/after'")
        subprocess.run(
            ["unshare", "-rm", "bash", "-c", "\n".join(sh)],
            cwd=ROOT,
            env=ENVIRONMENT,
            stdin=subprocess.DEVNULL,
        )
        names = ("the disk fills up", "space is freed, started again")
        for log, name, again in zip(logs, names, (False, True), strict=True):
            if not log.with_suffix(".code").exists():
                return self.add("disk", name, "not run", "no unshare -rm here")
            end = End(int(log.with_suffix(".code").read_text()), *read_log(log))
            weights = final_weights(self.contender, self.folder / "after") if again else None
            self.add("disk", name, *judge(end, weights, self.expected, self.usual, again))

    def malformed(self) -> None:
        rows = self.rows[20:40]
        good = "".join(json.dumps(row) + "\n" for row in rows).encode()
        files = {"(the file without a mistake)": good} | malformed(rows)
        usual: set[str] = set()
        counts: Counter[str] = Counter()
        for i, (name, contents) in enumerate(files.items()):
            path, run_dir = self.folder / f"file{i:02}.jsonl", self.folder / f"malformed-{i}"
            path.write_bytes(contents)
            end = run(self.command(run_dir, data=path, n_steps=2), self.folder / "malformed")
            usual = usual or {shape(line) for line in end.lines()}
            if end.code == 0:
                message = end.unusual_line(usual)
                verdict, outcome = (
                    ("said", f"trained; said: {clip(message)}")
                    if message
                    else ("silent", "trained, and said nothing")
                )
            else:
                verdict, outcome = judge(end, None, "", usual, False)
                verdict = {"right": "one line"}.get(verdict, verdict)
            if i:
                counts[verdict] += 1
                self.add("files", name, verdict, outcome)
            elif end.code:
                raise SystemExit(f"{self.contender.name} refuses a good file: {end.err[-2000:]}")
            shutil.rmtree(run_dir, ignore_errors=True)
        self.record["files"] = counts


def flip(path: Path) -> None:
    """Flip one bit in the middle of the file, where the tensors are."""
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 0b0000_0100]))


WAYS: dict[str, Callable[[Path], Any]] = {
    "is missing": lambda path: path.unlink(),
    "is cut in half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "is empty": lambda path: os.truncate(path, 0),
    "has one bit flipped": flip,
}


def make_model(folder: Path) -> None:
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "demo/tokenizer")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=56,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("contender", choices=CONTENDERS, nargs="?")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--kills", type=int, default=28)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--groups", default="kills,damage,changes,signals,full_disk,malformed")
    parser.add_argument("--folder", type=Path, default=ROOT / ".cache/benchmarks/reliability")
    at = parser.parse_args()
    if at.contender:
        began = time.monotonic()
        bench = Bench(CONTENDERS[at.contender], at.folder.resolve() / at.contender, at.seed)
        bench.undisturbed()
        for group in at.groups.split(","):
            if group == "kills":
                bench.kills(at.kills)
            else:
                getattr(bench, group)()
            keep(bench, at.folder / f"{at.contender}.json", round(time.monotonic() - began))
        shutil.rmtree(at.folder / at.contender)
    if at.report:
        write_report(
            {
                name: json.loads(path.read_text())
                for name in CONTENDERS
                if (path := at.folder / f"{name}.json").exists()
            }
        )


def keep(bench: Bench, path: Path, secs: int) -> None:
    """Write the record; groups that were run now replace those of the same name."""
    libraries = ("torch", "transformers", "safetensors", *["trl"] * (bench.contender.name == "TRL"))
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    )
    old = json.loads(path.read_text()) if path.exists() else {"cases": []}
    mine = {case.group for case in bench.cases}
    record = (
        old
        | bench.record
        | {
            "cases": [case for case in old["cases"] if case[0] not in mine] + bench.cases,
            "versions": {name: version(name) for name in libraries},
            "date": time.strftime("%Y-%m-%d"),
            "seconds": secs,
            "commits": old.get("commits", {}) | dict.fromkeys(mine, commit.stdout.strip()),
        }
    )
    path.write_text(json.dumps(record, indent=1))


GROUPS = {
    "control": "Control",
    "kills": "SIGKILL at a random moment",
    "damage": "A damaged newest checkpoint, fourteen complete ones beside it",
    "changes": "Something is changed when the run is started again",
    "signals": "Signals",
    "disk": "A full disk",
    "files": "Malformed files",
}


def write_report(records: dict[str, Any]) -> None:
    """Write the report: counts first, then what happened in each case."""
    names = [CONTENDERS[name].name for name in records]
    lines = ["# What breaks a run, compared with TRL", "", REPORT.strip(), ""]
    for name, record in records.items():
        versions = ", ".join(
            f"{library} {number}" for library, number in record["versions"].items()
        )
        commits = ", ".join(
            f"{commit} ({group})"
            for group, commit in record["commits"].items()
            if group != "control"
        )
        seed = record["kills"]["seed"]
        lines.append(
            f"- {CONTENDERS[name].name}: {versions}; seed {seed}; {record['date']}; commits"
            f" {commits}"
        )
    lines += ["", f"| | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    for group, title in GROUPS.items():
        cells = []
        for record in records.values():
            counts = Counter(verdict for g, _, verdict, _ in record["cases"] if g == group)
            cells.append(", ".join(f"{n} {verdict}" for verdict, n in counts.most_common()))
        lines.append(f"| {title} | {' | '.join(cells)} |")
    sentences = []
    for name, record in records.items():
        n, broken, older = (record["kills"][k] for k in ("n", "broken", "older_checkpoint_beside"))
        beside = f" ({older} of them with an older checkpoint beside it)" * bool(broken)
        late = sum(
            group == "kills" and f"newest checkpoint: step {N_STEPS};" in outcome
            for group, *_, outcome in record["cases"]
        )
        sentences.append(
            f"{CONTENDERS[name].name} {broken} of {n}{beside}; {late} of the {n} kills came after"
            " the last save"
        )
    lines += [
        "",
        f"Runs that could not continue after a kill: {'. '.join(sentences)}.",
        "Both read the gzip correctly.",
    ]
    for group, title in GROUPS.items():
        lines += [
            "",
            f"## {title}",
            "",
            f"| | {' | '.join(names)} |",
            "|---" * (1 + len(names)) + "|",
        ]
        tables = [
            {
                name: f"{verdict}: {outcome}"
                for g, name, verdict, outcome in r["cases"]
                if g == group
            }
            for r in records.values()
        ]
        if group == "kills":  # moments differ, so rows are numbered
            tables = [
                {
                    f"{i}": f"{k.partition(', ')[2]}: {outcome}"
                    for i, (k, outcome) in enumerate(t.items(), 1)
                }
                for t in tables
            ]
            tables = [
                {i: outcome for i, outcome in table.items() if ": right: " not in outcome}
                for table in tables
            ]
            lines.insert(-2, "Those that were not right:\n")
        for row in dict.fromkeys(name for table in tables for name in table):
            lines.append(f"| {row} | {' | '.join(table.get(row, '-') for table in tables)} |")
    RESULTS.write_text("\n".join(lines) + "\n")


REPORT = """
Command: `python benchmarks/reliability_trl.py trl`, the same with `plumb`, then `--report`. Both
train the same Llama of 174,104 random parameters by DPO on the same 80 pairs of `demo/train.jsonl`,
40 steps of 4, and save after every step; one thread of a CPU, each run its own command. TRL
runs as its documentation shows (`trl_dpo.py`) and is started again with
`resume_from_checkpoint=True`; Plumb is started again with `resume=auto`.

*Right*: the run ended with exactly the weights of the undisturbed run, or stopped with one line
that says why (if a setting was changed, only the latter); for a signal: an exit code that says so.
*Traceback*: it ended in one. *Wrong*: it ended with other weights, or the change had no effect, or
the exit code says finished. A malformed file is refused in *one line*, ends in a *traceback*, or is
trained on, with a message about it (*said*) or without (*silent*). Not every malformed file must be
refused, but none should pass unnoticed. The weights, optimizer and state files are TRL's
model.safetensors, optimizer.pt and trainer_state.json, and Plumb's policy.pt,
state-0-of-1.safetensors (optimizer state; it resumes from this and policy.pt) and manifest.json.
"""


if __name__ == "__main__":
    main()
