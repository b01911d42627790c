"""Real processes that are stopped, killed, or lose one another: exit codes, one line, status.json,
and a run that goes on.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import PATIENCE, ROOT
from runs import DPO, FAST, outcome, records, same

from plumb.distributed.progress import run_progress
from plumb.runs import checkpoints, directory

SLOW_STEPS = """
import os, time, trainers
step = trainers.BasicTrainer.step
def slow(self, *arguments):
    time.sleep(float(os.environ.get("STEP_SECS", "0.3")))
    step(self, *arguments)
trainers.BasicTrainer.step = slow
"""


def as_on_a_terminal():
    """A shell starts what it puts in the background with SIGINT ignored, and nohup with SIGHUP;
    children inherit it, and a run leaves an ignored signal ignored.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture
def start(tmp_path, data, tiny_model, here, warm):
    """`start(*overrides)`: the command, running, its steps 0.3 s apart. -> (process, run directory)

    `cold`: by a new interpreter, and not forked after the imports.
    """
    plugin = tmp_path / "slow.py"
    plugin.write_text(SLOW_STEPS)
    started = []

    def begin(*overrides, cold=False, **environment):
        run_dir = tmp_path / "run"
        options = [
            *here,
            "exp_name=run",
            f"local_run_dir={run_dir}",
            f"model.name_or_path={tiny_model}",
            f"datasets=[{data}]",
            *FAST,
            *DPO,
            "n_epochs=8",
            "save_every=4",
            f"plugins=[{plugin}]",
            "resume=auto",
            *overrides,
        ]
        command = ["train.py", *map(str, options)]
        if cold:
            process = subprocess.Popen(
                [sys.executable, *command],
                cwd=ROOT,
                env=os.environ | environment,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                preexec_fn=as_on_a_terminal,
            )
        else:
            process = warm.start(command, ROOT, os.environ | environment)
        started.append(process)
        return process, run_dir

    yield begin
    for process in started:
        process.kill()
        process.wait()


def wait_for(condition):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.05)


def trained(run_dir, steps):
    return lambda: (run_dir / "metrics.jsonl").exists() and len(records(run_dir, "train")) >= steps


def errors(text):
    return [line for line in text.splitlines() if line.strip()]


def the_error(stderr):
    """Return the one line of a run that has lost a rank. Threads of torch may log the lost
    connection as well, but nothing may print a traceback.
    """
    assert "Traceback" not in stderr, stderr
    lines = [line for line in errors(stderr) if line.startswith("error: ")]
    assert len(lines) == 1, stderr
    return lines[0]


def children(process):
    try:
        listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    except FileNotFoundError:  # it has ended
        return []
    return [int(pid) for pid in listed.split()]


def workers(process, n=2):
    """The ranks of a launcher, in their order, once all have been forked."""
    found = children(process)
    return found if len(found) == n else []


TWO = ["trainer=FSDPTrainer", "n_cpu_processes=2"]


@pytest.mark.parametrize(
    "number, code, where",
    [
        (signal.SIGTERM, 143, []),
        (signal.SIGINT, 130, []),
        (signal.SIGTERM, 143, TWO),
    ],
)
def test_a_signal_finishes_the_step_saves_and_says_so(
    number, code, where, start, train, train_here
):
    process, run_dir = start(*where, cold=number == signal.SIGTERM and not where)
    wait_for(trained(run_dir, 2))
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == code, stderr
    (line,) = errors(stderr)
    step = checkpoints.latest_valid(run_dir).manifest.step
    assert (
        line.startswith(f"stopped by {number.name} after step {step} of 40")
        and "resume=auto" in line
    )
    assert len(records(run_dir, "train")) == step
    status = directory.status(run_dir)
    assert (status["state"], status["code"], status["step"]) == ("stopped", code, step)
    if not where:  # and to the end, as if nothing had been
        process, _ = start(STEP_SECS="0")
        assert (
            process.wait(timeout=PATIENCE) == 0 and directory.status(run_dir)["state"] == "finished"
        )
        assert same(outcome(run_dir), outcome(train("whole", "n_epochs=8", *DPO, "save_every=4")))


def test_a_second_signal_quits_at_once(start):
    process, run_dir = start("plugins=[]", "n_epochs=4000")
    wait_for(trained(run_dir, 2))
    os.kill(process.pid, signal.SIGSTOP)  # so that both are there when it looks
    for number in (signal.SIGTERM, signal.SIGINT):
        process.send_signal(number)
    os.kill(process.pid, signal.SIGCONT)
    process.communicate(timeout=PATIENCE)
    assert process.returncode in (130, 143)


def test_the_time_of_a_run_counts_from_the_start_of_its_process():
    since = time.time() - psutil.Process().create_time()
    assert run_progress.uptime_secs() == pytest.approx(since, abs=1)


AN_HOUR_AGO = """
import trainers
from plumb.distributed.progress import run_progress
step = trainers.BasicTrainer.step
def late(self, *arguments):
    step(self, *arguments)
    if self.n_updates == 3:
        run_progress.started -= 3600 - 10  # 10 s are kept for the save
trainers.BasicTrainer.step = late
"""


def test_max_hours_stops_before_the_limit(start, tmp_path):
    """As if the command had been started an hour before its third step."""
    (tmp_path / "late.py").write_text(AN_HOUR_AGO)
    process, run_dir = start("max_hours=1", f"plugins=[{tmp_path}/late.py]")
    stdout, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == 143 and "stopped by max_hours=1 after step 3 of 40" in stderr
    assert checkpoints.latest_valid(run_dir).manifest.step == 3


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_rank_is_named_and_everything_is_gone(number, start):
    """Killed: at once. Hanging: after timeout_minutes, here 6 s."""
    process, run_dir = start(*TWO, "timeout_minutes=0.1", cold=number == signal.SIGKILL)
    wait_for(trained(run_dir, 3))
    ranks = workers(process)
    assert len(ranks) == 2
    os.kill(ranks[1], number)
    begun = time.monotonic()
    stdout, stderr = process.communicate(timeout=PATIENCE)
    assert time.monotonic() - begun < 45 + 6 * (number == signal.SIGSTOP)
    line = the_error(stderr)
    assert process.returncode == 6 and line.startswith("error: rank 1 at step "), stderr
    assert (
        "was killed by SIGKILL" if number == signal.SIGKILL else "did not answer in time"
    ) in line
    assert all(not os.path.exists(f"/proc/{pid}") for pid in ranks)
    status = directory.status(run_dir)
    assert (status["state"], status["code"]) == ("failed", 6) and "rank 1" in status["reason"]
    assert checkpoints.latest_valid(run_dir).manifest.step >= 2


def test_a_launcher_that_is_killed_takes_its_ranks_along_and_the_run_goes_on(start):
    process, run_dir = start(*TWO, "n_examples=24")
    wait_for(trained(run_dir, 3))
    ranks = workers(process)
    process.kill()
    process.wait()
    wait_for(
        lambda: all(
            not os.path.exists(f"/proc/{pid}") or "Z" in Path(f"/proc/{pid}/stat").read_text()
            for pid in ranks
        )
    )
    process, _ = start(*TWO, "n_examples=24")
    assert process.wait(timeout=PATIENCE) == 0
    assert directory.status(run_dir)["step"] == 7


def test_two_commands_on_one_run_directory(start):
    first, run_dir = start("n_epochs=4000")
    wait_for(trained(run_dir, 1))
    second, _ = start("n_epochs=4000")
    assert second.wait(timeout=PATIENCE) == 2
    (line,) = errors(second.communicate()[1])
    assert (
        line
        == f"error: local_run_dir={run_dir}: in use by process {first.pid}; wait for it, or stop it"
    )
    assert first.poll() is None and directory.status(run_dir)["state"] == "running"


def test_ranks_meet_on_the_loopback_only(start):
    """Every socket that listens, of the launcher and of its ranks."""
    process, run_dir = start(*TWO)
    wait_for(trained(run_dir, 2))
    mine = {
        os.readlink(f"/proc/{pid}/fd/{fd}")[8:-1]
        for pid in (process.pid, *workers(process))
        for fd in os.listdir(f"/proc/{pid}/fd")
        if os.path.islink(f"/proc/{pid}/fd/{fd}")
        and os.readlink(f"/proc/{pid}/fd/{fd}").startswith("socket:")
    }
    listening = []
    for table in ("tcp", "tcp6"):
        for row in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            address = row.split()[1]
            state = row.split()[3]
            inode = row.split()[9]
            if state == "0A" and inode in mine:
                listening.append(address.split(":")[0])
    loopback = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}
    assert listening and set(listening) <= loopback, listening


# Where a rank may be when it is killed: (what is patched, whether before the first checkpoint).
PHASES = {
    "data": "plumb.data.prepare.token_stores",
    "building": "plumb.training.setup.choose_forward_path",
    "forward": "plumb.training.objective.Scorer.__call__",
    "backward": "trainers.FSDPTrainer.backward",
    "clip": "trainers.BasicTrainer.clip",
    "update": "torch.optim.RMSprop.step",
    "agreement": "plumb.distributed.collectives.all_reduce_max",
    "gathering": "plumb.distributed.sharding.gathered_state",
    "writing": "plumb.runs.durable_files.write",
    "renaming": "plumb.runs.durable_files.rename",
    "evaluation": "plumb.training.evaluator.evaluate",
}
DYING = """
import os, torch, torch.distributed as dist
import plumb.data.prepare, plumb.distributed.collectives, plumb.distributed.sharding
import plumb.runs.durable_files, plumb.training.objective, trainers
calls = 0
def dying(real):
    def call(*arguments, **options):
        global calls
        calls += 1
        if dist.get_rank() == {rank} and calls == {nth}:
            os.kill(os.getpid(), 9)
        return real(*arguments, **options)
    return call
{what} = dying({what})
"""
ALL = os.environ.get("PHASES") == "all"


@pytest.mark.parametrize("phase", PHASES if ALL else ["backward", "writing"])
@pytest.mark.parametrize("rank", [0, 1] if ALL else [1])
def test_a_rank_killed_in_each_phase(phase, rank, start, tmp_path):
    """One line that names it, everything is gone, and what was saved before is whole. PHASES=all:
    every phase, both ranks.
    """
    early = phase in ("data", "building") or (phase == "renaming" and rank == 1)
    if phase == "renaming" and rank == 1:
        pytest.skip("rank 0 alone renames")
    nth = 1 if early else 3 if phase == "evaluation" else 12
    (tmp_path / "dying.py").write_text(DYING.format(rank=rank, nth=nth, what=PHASES[phase]))
    process, run_dir = start(*TWO, f"plugins=[{tmp_path}/dying.py]", "eval_every=8", "n_epochs=6")
    ranks = []
    wait_for(lambda: ranks or ranks.extend(workers(process)) or process.poll() is not None)
    _, stderr = process.communicate(timeout=PATIENCE)
    line = the_error(stderr)
    assert (
        process.returncode == 6
        and line.startswith(f"error: rank {rank} at step ")
        and "was killed by SIGKILL" in line
    ), stderr
    assert all(not os.path.exists(f"/proc/{pid}") for pid in ranks)
    if not early:
        assert checkpoints.latest_valid(run_dir).manifest.step >= 1
        assert directory.status(run_dir)["code"] == 6


OUT_OF_MEMORY = """
import torch, torch.distributed as dist
from plumb.training.objective import Scorer
calls, real = 0, Scorer.__call__
def full(self, *arguments):
    global calls
    calls += 1
    if dist.get_rank() == 1 and calls == 6:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
    return real(self, *arguments)
Scorer.__call__ = full
"""


def test_a_rank_without_memory_says_which_knob_and_holds_up_nobody(start, tmp_path):
    """In a microbatch of one of two ranks, while the other waits for its gradients."""
    (tmp_path / "full.py").write_text(OUT_OF_MEMORY)
    process, _ = start(*TWO, f"plugins=[{tmp_path}/full.py]")
    ranks = []
    wait_for(lambda: ranks or ranks.extend(workers(process)) or process.poll() is not None)
    _, stderr = process.communicate(timeout=PATIENCE)
    line = the_error(stderr)
    assert process.returncode == 2, stderr
    assert line.startswith("error: out of GPU memory: set tokens_per_microbatch below "), stderr
    assert all(not os.path.exists(f"/proc/{pid}") for pid in ranks)


SLOW_DISK = """
import time
from plumb.runs import durable_files as storage
write = storage.write
def slow(path, fill):
    if path.name == "policy.pt":
        time.sleep(9)
    return write(path, fill)
storage.write = slow
"""


def test_a_slow_disk_on_rank_0_is_waited_for(start, tmp_path):
    """Longer than timeout_minutes: that is for ranks that do not answer, not for one that
    writes.
    """
    (tmp_path / "disk.py").write_text(SLOW_DISK)
    process, run_dir = start(
        *TWO,
        f"plugins=[{tmp_path}/disk.py]",
        "timeout_minutes=0.1",
        "n_examples=4",
        "do_first_eval=false",
    )
    stdout, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, stderr
    assert checkpoints.latest_valid(run_dir).manifest.finished
