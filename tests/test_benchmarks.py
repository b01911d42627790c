"""Each script in benchmarks/ runs to its end at its smallest: a benchmark is run by hand, and rots
unseen otherwise.

Numbers mean nothing here. The scripts run warm (see warm.py), and so do the processes they start.
"""

import argparse
import contextlib
import gzip
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import psutil
import pytest
from conftest import PATIENCE, ROOT
from runs import ROWS
from shell import BASH, commands_of

import report
import score
from plumb.settings.validation import validate

BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def benchmark(warm):
    """`benchmark(script, *arguments)` -> what it printed."""

    def run(script, *arguments, cwd=ROOT):
        command = [str(BENCHMARKS / script), *map(str, arguments)]
        done = warm.run(command, cwd, dict(os.environ), PATIENCE)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    return run


@pytest.fixture
def hh(tmp_path):
    """A folder with files in the form of Anthropic/hh-rlhf."""
    for part in ("harmless-base", "helpful-base"):
        rows = [
            {key: row["prompt"].replace("What", f"{part} {i}: what") + row[key] for key in row}
            for i in range(6)
            for row in ROWS
        ]
        path = tmp_path / "hh" / part / "test.jsonl.gz"
        path.parent.mkdir(parents=True)
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return tmp_path / "hh"


def test_throughput(benchmark, tmp_path):
    """Plumb and the manner of 2023 agree; TRL is skipped where it is not installed."""
    out = benchmark("throughput.py", "--smoke", "--scenarios", "dpo", "--out", tmp_path)
    records = [json.loads(line) for line in (tmp_path / "throughput.jsonl").open()]
    events = {(r.get("label"), r["event"]) for r in records}
    assert {("plumb", "step"), ("2023 manner", "step"), ("2023 manner", "agrees")} <= events
    assert ("TRL, best", "step") in events or "TRL is not installed" in out
    assert (tmp_path / "throughput.png").is_file()


def test_kto(benchmark, tmp_path):
    """However Plumb's batch is split, the numbers are the same; TRL is skipped where it is not
    installed.
    """
    out = benchmark("kto.py", "--smoke", "--out", tmp_path / "kto.md")
    rows = [line.split("|")[1:-1] for line in out.splitlines() if line.startswith("| Plumb")]
    assert len(rows) == 4 and all(float(row[-1]) < 1e-5 and float(row[-2]) > 0 for row in rows)
    assert "TRL, per_device_train_batch_size=4" in out or "TRL is not installed" in out
    assert "| TRL" in (tmp_path / "kto.md").read_text()


def test_adapters(benchmark, tiny_model, tmp_path):
    """An adapter's checkpoint is smaller. From the tiny model, which saves a run of SFT."""
    options = ["--smoke", "--model", tiny_model, "--out", tmp_path / "adapters.md"]
    out = benchmark("adapters.py", *options)
    rows = [line.split("|")[1:-1] for line in out.splitlines() if line.startswith("| ")][1:]
    sizes = {row[0].strip(): float(row[-1]) for row in rows}
    assert sizes["LoRA"] < sizes["all weights"]
    assert (tmp_path / "adapters.md").read_text() == out


def test_rounding(benchmark, tmp_path):
    out = benchmark("rounding.py", "--smoke", "--out", tmp_path / "rounding.md")
    rows = [line.split("|")[1:-1] for line in out.splitlines() if line.startswith("| ")][1:]
    ends = {row[0].strip(): float(row[-1]) for row in rows}
    assert len(ends) == 4 and all(0 < x < 1e4 for x in ends.values())
    assert (tmp_path / "rounding.md").read_text() == out


def test_rollouts(benchmark, tmp_path):
    """Sampling, and whole steps of GRPO; TRL is skipped where it is not installed."""
    out = benchmark("rollouts.py", "--smoke", "--out", tmp_path / "rollouts.md")
    rows = [line.split("|")[1:-1] for line in out.splitlines() if line.startswith("| ")]
    sampling, step = (row for row in rows if row[0].strip() == "Plumb")
    assert float(sampling[1].replace(",", "")) > 0 and float(step[4]) > 0
    assert "| transformers' generate |" in out
    assert "| TRL, microbatches of 2 |" in out or "TRL is not installed" in out
    assert (tmp_path / "rollouts.md").read_text() == out


def test_random_walks(benchmark, tmp_path):
    """Plumb learns; TRL is skipped where it is not installed."""
    out = benchmark(
        "random_walks.py", "--smoke", "--seeds", 0, "--losses", "rloo", "--out", tmp_path
    )
    assert "| rloo | Plumb | 0 |" in out and (tmp_path / "random_walks.png").is_file()
    assert "| rloo | TRL 1" in out or "TRL's rloo is skipped" in out


def test_walks_from_held_out_nodes_are_taught(monkeypatch):
    """All shortest walks from some prompt of the training pass through each of them."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import walks

    left = walks.nodes_to_goal()

    def shortest(walk):
        if walk[-1] == walks.GOAL:
            return [walk]
        near = [there for there in walks.graph()[walk[-1]] if left[there] < left[walk[-1]]]
        return [further for there in near for further in shortest(walk + there)]

    prompts = set(walks.NODES[1:]) - set(walks.HELD_OUT)
    for node in walks.HELD_OUT:
        assert any(all(node in walk for walk in shortest(prompt)) for prompt in prompts)


def test_host_work(benchmark, tmp_path):
    assert "digests" in benchmark("host_work.py", "--smoke", "--out", tmp_path)


def test_balance(benchmark, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import make_tokens

    make_tokens.save(tmp_path / "tokens.npz", make_tokens.synthetic(128, 1000, scale=0.2))
    benchmark(
        "balance.py", "--tokens", tmp_path / "tokens.npz", "--pairs", 64, "--out", tmp_path / "out"
    )
    assert (tmp_path / "out/balance.md").read_text().count("\n") > 2


def test_make_tokens_and_input(benchmark, hh, tmp_path):
    tokenizer = ["--tokenizer", ROOT / "demo/tokenizer/tokenizer.json"]
    data = hh / "harmless-base/test.jsonl.gz"
    tokens = tmp_path / "tokens.npz"
    out = benchmark(
        "make_tokens.py", "--data", data, *tokenizer, "--eos", "<|end|>", "--out", tokens
    )
    assert "120 pairs" in out
    out = benchmark(
        "input.py", "--hh", hh, *tokenizer, "--pairs", 300, "--questions", 20, "--out", tmp_path
    )
    assert [line.split("  ")[0].strip() for line in out.splitlines()] == [
        "cold",
        *["warm"] * 3,
        "assembly",
        "written",
        "questions, cold",
        "questions, warm",
    ]


def test_plan_memory(benchmark, tmp_path):
    out = benchmark("plan_memory.py", "--smoke", "--only", "gpt_neox loss=sft", "--out", tmp_path)
    assert out.count("| gpt_neox ") == 2  # once as it comes, once in the table


def test_gpu(benchmark, tmp_path):
    """All parts on a CPU, from another folder: each writes its numbers and its log, and the summary
    has them.
    """
    benchmark("gpu.py", "--smoke", "--out", "out", cwd=tmp_path)
    head, *parts = [json.loads(line) for line in (tmp_path / "out/summary.jsonl").open()]
    assert "numbers mean nothing" in head["head"][1]
    results = {part["part"]: part["result"] for part in parts}
    names = ["trees", "throughput", "steps", "adapters", "fsdp", "sampler", "memory"]
    assert list(results.items()) == [(name, "ok") for name in names]
    assert all(part["rows"] for part in parts)
    assert len(parts[0]["rows"]) == 8 and all(row["ok"] for row in parts[0]["rows"])
    planned = {row["run"] for part in parts for row in part["rows"] if "GB planned" in row}
    assert planned == {"QLoRA", "FSDPTrainer", "activation checkpointing"}
    page = (tmp_path / "out/summary.md").read_text()
    assert all(f"## {part['title']}" in page for part in parts)


@pytest.fixture
def gpu(monkeypatch):
    """benchmarks/gpu.py as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu

    return gpu


@pytest.fixture
def runner(gpu):
    import gpu_runner

    return gpu_runner


def part_of(gpu, run, rows, needs=()):
    return gpu.Part("A part", 1.0, run, rows, needs=needs)


def place_of(gpu, tmp_path, secs=60.0):
    return gpu.Place(
        folder=tmp_path / "part", device="cpu", smoke=True, tokens="synthetic:1", secs=secs
    )


@pytest.mark.parametrize(
    ("run", "row", "result"),
    [
        (lambda at: None, {"x": 1.0}, "ok"),
        (lambda at: None, {"x": 1.0, "ok": False}, "failed"),  # a number is wrong
        (lambda at: sys.exit("it broke"), {"x": 1.0}, "failed"),
        (lambda at: time.sleep(60), {"x": 1.0}, "out of time"),
        (lambda at: None, None, "failed"),  # nothing was measured
    ],
)
def test_how_a_part_of_gpu_ends(run, row, result, gpu, tmp_path):
    """Whatever happens in it, the run goes on, and what it has written is kept."""
    part = part_of(gpu, run, lambda at: [row] if row else [])
    place = place_of(gpu, tmp_path, secs=0.5)
    state, why = gpu.run_part(part, place, {})
    assert gpu.measured(part, place, state) == (result, [row] if row else [])
    assert why == {"failed": "it broke" if row and "ok" not in row else "", "ok": ""}.get(
        result, "after 0 s"
    )


def start_another(at):
    """A part that waits for a process which it has started."""
    other = subprocess.Popen(["sleep", "60"])
    (at.folder / "pid").write_text(str(other.pid))
    other.wait()


def assert_ended(pid):
    with contextlib.suppress(psutil.NoSuchProcess):
        assert psutil.Process(int(pid)).status() == psutil.STATUS_ZOMBIE


def test_a_part_of_gpu_out_of_time_leaves_nothing_behind(gpu, tmp_path):
    place = place_of(gpu, tmp_path, secs=0.5)
    state, _ = gpu.run_part(part_of(gpu, start_another, lambda at: []), place, {})
    assert state == "out of time"
    assert_ended((place.folder / "pid").read_text())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_gpu_after_a_signal(number, gpu, tmp_path, monkeypatch):
    """The part that runs ends with all that it has started, none follows, and the summary has what
    was measured.
    """
    monkeypatch.setattr(gpu, "NEEDED", {})
    part = part_of(gpu, start_another, lambda at: [{"x": 1.0}])
    monkeypatch.setattr(gpu, "PARTS", {"a": part._replace(secs=60.0), "b": part})
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--smoke", "--out", "out"])
    monkeypatch.chdir(tmp_path)
    pid = tmp_path / "out/a/pid"

    def send():
        while not (pid.exists() and pid.read_text()):
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    # a suite that was started in the background ignores it
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=send, daemon=True).start()
    with mock.patch.dict(os.environ), pytest.raises(SystemExit) as ended:
        gpu.main()
    for n, handler in handlers.items():
        signal.signal(n, handler)
    assert ended.value.code == 130
    _, *parts = [json.loads(line) for line in (tmp_path / "out/summary.jsonl").open()]
    assert [(part["result"], part["rows"]) for part in parts] == [("stopped", [{"x": 1.0}])]
    assert_ended(pid.read_text())


def test_a_run_of_gpu_that_fails_leaves_the_next(gpu, tmp_path):
    """And the reason is the log's last error."""

    def run(at):
        gpu.run_train(at, {"a b": ["lr=-1"], "c": ["batch_size=0"]}, "model=demo", plan=False)

    state, why = gpu.run_part(part_of(gpu, run, lambda at: []), place_of(gpu, tmp_path), {})
    assert state == "failed" and why.startswith("a b, c failed; error: batch_size=0")


def test_a_part_of_gpu_without_its_library(gpu, runner, tmp_path):
    """It is skipped, and the command names the pinned version."""
    runner.find_lacking(["json", "nosuch"], tmp_path / "lacking")
    (found,) = [row for row in gpu.read_rows(tmp_path / "lacking") if "nosuch" in row]
    part = part_of(gpu, lambda at: None, lambda at: [], ["nosuch"])
    place = place_of(gpu, tmp_path)
    assert gpu.run_part(part, place, found) == (
        "skipped",
        "without nosuch (No module named 'nosuch')",
    )
    line = gpu.missing_line({"trl": "of an older torch"}, tmp_path)
    assert "trl (of an older torch)" in line and f"pip wheel -w {tmp_path} trl==1.16.0`" in line
    assert gpu.missing_line(found, tmp_path) is None


def test_gpu_forks_where_a_fork_can_use_cuda(runner, monkeypatch):
    """What all parts share does not call CUDA, which importing bitsandbytes does; after a call, a
    part is a new process.
    """
    for name in ("peft", "bitsandbytes"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    runner.import_once()
    assert not {"peft", "bitsandbytes"} & set(sys.modules)
    kinds = []
    for called in (False, True):
        monkeypatch.setattr("torch.cuda._is_in_bad_fork", lambda called=called: called)
        process = runner.start(time.sleep, 0)
        process.join()
        kinds.append((type(process).__name__, process.exitcode))
    assert kinds == [("ForkProcess", 0), ("SpawnProcess", 0)]


def test_what_gpu_measures_first(gpu):
    """Scenarios of the throughput in the order given, the aims of results/gpu.md before others; and
    few enough forward passes of the samplers, at 20 ms each.
    """
    import throughput

    asked = argparse.Namespace(
        smoke=False, device="cuda", tokens="synthetic:1", whole=False, scenarios="2.8b,sweep,1b"
    )
    scenarios = throughput.chosen(asked)
    assert [scenario.name for scenario in scenarios] == ["2.8b", "sweep", "1b"]
    assert [setting.contender for setting in scenarios[0].settings][:2] == ["plumb", "trl"]
    assert gpu.sampler_passes() * 0.02 < gpu.PARTS["sampler"].secs
    assert sum(part.secs for part in gpu.PARTS.values()) <= gpu.MINUTES * 60 - 15


def test_mfu_of_gpu(gpu, tmp_path, monkeypatch):
    """Pairs of a known card per second: 4 forward passes' operations with a live reference, 3
    without.
    """
    monkeypatch.setattr(gpu, "gpu_name", lambda: "NVIDIA H100 80GB HBM3")
    place = gpu.Place(tmp_path, "cuda", False, "synthetic:1")
    live, cached = (gpu.mfu(place, 10.0, "1b", live) for live in (True, False))
    assert live / cached == pytest.approx(4 / 3)
    import make_tokens  # beside gpu.py

    pairs = make_tokens.synthetic(1024, 50304, scale=1.0).pairs[:512]
    n_tokens = sum(len(ids) for pair in pairs for ids in pair) / len(pairs)
    body = 16 * 12 * 2048**2  # and biases; the head and attention add up to a fifth
    assert 1 < cached * 989e12 / (10 * 3 * 2 * body * n_tokens) < 1.2


@pytest.mark.skipif(BASH is None, reason="no bash")
def test_the_shell_of_gpu(tmp_path):
    """It starts the script, which refuses a part that it does not have, and a machine without a
    GPU.
    """
    for words, said in ((["--parts", "tree"], "--parts tree: expected some of"), ([], "no GPU")):
        done = subprocess.run(
            [BASH, "benchmarks/gpu.sh", *words],
            cwd=ROOT,
            env=os.environ | {"PYTHON": sys.executable, "PATH": "/bin:/usr/bin"},
            capture_output=True,
            text=True,
        )
        if "no GPU" not in said or not shutil.which("nvidia-smi"):
            assert done.returncode == 1 and said in done.stderr


def test_reward_hh(benchmark, hh, tiny_model, tmp_path):
    out = benchmark(
        "reward_hh.py",
        tmp_path / "out",
        *("--model", tiny_model, "--data", hh, "--smoke"),
        *("--parts", "frozen", "final", "--final", "n_examples=8", "batch_size=4"),
    )
    assert "| fitted |" in out and "| final |" in out


def test_losses(benchmark, tmp_path):
    """A loss that is a mixture, one of scores, one on flipped labels: a second call trains none of
    them again.
    """
    command = ["losses.py", "--smoke", "--losses", "mix", "reward", "--noise", "robust"]
    command += ["--ultrafeedback", "nowhere", "--out", tmp_path / "out"]
    command += ["--results", tmp_path / "results"]
    benchmark(*command)
    page = (tmp_path / "results/losses.md").read_text()
    assert all(f"| {name} |" in page for name in ("`mix`", "`reward`", "demo | robust"))
    assert (tmp_path / "results/losses.png").is_file()
    assert "'part'" not in benchmark(*command)


def test_malformed():
    files = runpy.run_path(str(BENCHMARKS / "malformed.py"))["malformed"](ROWS)
    assert len(files) == 30 and all(isinstance(content, bytes) for content in files.values())


def test_reliability(benchmark, tmp_path):
    """Plumb's side: a run, one that is killed, and its resume."""
    benchmark(
        *("reliability_trl.py", "plumb", "--groups", "kills", "--kills", 1, "--folder", tmp_path)
    )
    cases = json.loads((tmp_path / "plumb.json").read_text())["cases"]
    assert cases and all(verdict == "right" for _, _, verdict, _ in cases), cases


SCRIPTS = {
    "benchmarks/reward.sh": ["train.py", "score.py"],
    "benchmarks/real_input.sh": ["train.py", "train.py", "train.py", "report.py"],
}


@pytest.mark.skipif(BASH is None, reason="no bash")
@pytest.mark.parametrize("script", SCRIPTS)
def test_the_commands_of_a_script_are_understood(script, compose, tmp_path, monkeypatch):
    """They take up to an hour; that each composes, or is parsed, shows that none is out of date."""
    monkeypatch.chdir(ROOT)
    done, commands = commands_of(script, tmp_path, MODEL="gpt2", RUNS=f"{tmp_path}/runs")
    assert done.returncode == 0, done.stderr
    assert [command[0] for command in commands] == SCRIPTS[script]
    parsers = {"score.py": score, "report.py": report}
    for name, *words in commands:
        if name == "train.py":
            config = compose(*words)
            validate(config)
            policy = Path(config.local_run_dir, "LATEST/policy.pt")  # a later stage starts here
            policy.parent.mkdir(parents=True)
            policy.touch()
        else:
            parsers[name].parser().parse_args(words)
