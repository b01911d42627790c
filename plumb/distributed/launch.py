"""Processes and signals: one process per GPU (or CPU process) started and watched here, or joined
where torchrun started them.

Once training has begun a signal only sets a flag, for which the training loop asks after each step
(see trainers.py). What became of a process is said by its exit code, and by one line of the process
that was started first.
"""

from __future__ import annotations

import ctypes
import multiprocessing.connection
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.process import BaseProcess
from typing import Any

import psutil
import torch
import torch.distributed as dist
from tqdm import tqdm

from plumb import console
from plumb.console import under_torchrun
from plumb.distributed import collectives
from plumb.errors import PeerLost, UserError

# after one process has failed: how long the others may take to say why, or to finish what they
# write
GRACE_SECS = 10
REPEAT_SECS = (
    10  # torchrun and the queue may both pass a signal on: within this time it is the same one
)
PR_SET_PDEATHSIG = 1


class Stopped(BaseException):
    """The run was asked to stop. Not an Exception, for the same reason as KeyboardInterrupt.
    `code`: 130 or 143.
    """

    def __init__(self, code: int, reason: str):
        super().__init__(code, reason)
        self.code = code
        self.reason = reason

    def __str__(self) -> str:
        return self.reason


class _Signals:
    """What this process was asked. `gentle`: the training loop looks at `requested`; until then a
    signal ends the process.
    """

    requested = 0
    at = 0.0
    gentle = False


def listen() -> None:
    """Handle SIGTERM, SIGHUP and SIGINT from here on. A second one, once training has begun, quits
    at once.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, _handle)


def _handle(number: int, _frame: Any) -> None:
    again = _Signals.requested
    _Signals.requested = _Signals.requested or number
    if not _Signals.gentle:
        # a terminal and a launcher may both pass one on, while the first is being handled
        if again:
            if time.monotonic() - _Signals.at > 1:
                os._exit(exit_code(again))
            return
        _Signals.at = time.monotonic()
        raise Stopped(
            exit_code(number), f"stopped by {signal.Signals(number).name} before the first step"
        )
    if (
        again
        and time.monotonic() - _Signals.at > (REPEAT_SECS if under_torchrun() else 0)
        and not _watched
    ):
        os._exit(exit_code(again))
    _Signals.at = time.monotonic()


def end_quietly() -> None:
    """From here on a signal ends this process without a word: another one has said what there is to
    say.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def begin() -> None:
    """Another run in the same process (a sweep): no signal is waiting, and no step was made."""
    _Signals.requested = 0
    _Signals.gentle = False
    report(0, 0)


def exit_code(number: int) -> int:
    """Of a run that was stopped: 130 for SIGINT, 143 for all others and for 0 (its time was up)."""
    return 128 + (signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)


def stop_requested() -> int:
    """The number of the signal that asked this process to stop, or 0. From the first call on,
    signals wait to be asked for.
    """
    _Signals.gentle = True
    return _Signals.requested


def uptime_secs() -> float:
    """Since the command was started."""
    return time.time() - _started


_started = psutil.Process().create_time()
# optimizer steps, examples, and when it last gave a sign of life, of each process started here
_progress: Any = [
    0,
    0,
    0,
]
_watched = False  # another process started this one, passes signals on, and says what is to be said
_index = 0


def report(step: int, examples: int) -> None:
    """Where this process's training is: for whoever has to say so, should it end."""
    _progress[3 * _index : 3 * _index + 2] = [step, examples]


def reported() -> tuple[int, int]:
    """Optimizer steps and examples of the process that is furthest behind."""
    return min(zip(_progress[::3], _progress[1::3], strict=True))


def _live() -> None:
    """Give a sign of life, for as long as this process has one."""
    while True:
        _progress[3 * _index + 2] = int(time.monotonic())
        time.sleep(1)


# ---- starting ----


def launch(
    worker: Callable[..., None],
    arguments: tuple,
    *,
    n_cpu_processes: int | None,
    port: int | None,
    timeout: timedelta,
) -> None:
    """Run `worker(*arguments)` in one process per GPU (on a CPU: in n_cpu_processes), or join the
    group of torchrun.

    On return all are gone. A UserError or Stopped of theirs is raised here, in the form of the
    lowest rank that has one; PeerLost names the rank that died or hung, and its step. `timeout`:
    how long a process waits for another. They meet on the loopback interface only. Raises UserError
    where there is neither a GPU nor a number of CPU processes (2023: exit 0, nothing trained).
    """
    if under_torchrun():
        _work(int(os.environ["LOCAL_RANK"]), worker, arguments, timeout)
        return
    n = torch.cuda.device_count() or n_cpu_processes
    if not n:
        raise UserError(
            "trainer=FSDPTrainer or TensorParallelTrainer: there is no GPU here; use"
            " trainer=BasicTrainer, or n_cpu_processes=2 to try it on the CPU"
        )
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    os.environ |= {
        "WORLD_SIZE": str(n),
        "GLOO_SOCKET_IFNAME": loopback,
        "NCCL_SOCKET_IFNAME": loopback,
    }
    if not torch.cuda.is_available():
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // n)))
    global _progress
    spawn = torch.multiprocessing.get_context("spawn")
    _progress, said = spawn.Array("q", 3 * n, lock=False), spawn.SimpleQueue()
    with socket.create_server(("127.0.0.1", port or 0)) as server:
        store = dist.TCPStore(
            "127.0.0.1",
            server.getsockname()[1],
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=os.dup(server.fileno()),
        )
        common = (
            n,
            store.port,
            (os.getpid(), _started),
            worker,
            arguments,
            timeout,
            _progress,
            said,
        )
        group = [spawn.Process(target=_spawned, args=(i, *common)) for i in range(n)]
        _Signals.gentle = True
        for process in group:
            process.start()
        ended_by_us = _watch(group, timeout.total_seconds())
    errors: list[tuple[int, UserError | Stopped]] = []
    while not said.empty():
        errors.append(said.get())
    _judge([p.exitcode or 0 for p in group], ended_by_us, sorted(errors, key=lambda e: e[0]))


def _watch(group: Sequence[BaseProcess], timeout: float) -> list[int]:
    """Wait for all; pass a signal on; after one has failed, or given no sign of life for `timeout`
    seconds, give the others GRACE_SECS. -> those that were killed for that, in that order
    """
    forwarded = 0
    deadline = float("inf")
    killed = list[int]()
    while alive := [i for i, p in enumerate(group) if p.exitcode is None]:
        multiprocessing.connection.wait([group[i].sentinel for i in alive], timeout=0.2)
        if _Signals.requested and not forwarded:
            forwarded = _Signals.requested
            for i in alive:
                os.kill(group[i].pid or 0, forwarded)
        now = time.monotonic()
        for i in alive:
            if 0 < _progress[3 * i + 2] < now - timeout - 2:
                killed.append(i)
                group[i].kill()
        if any(p.exitcode for p in group):
            # the others still close their logs
            asked = all(p.exitcode in (None, 0, 130, 143) for p in group)
            deadline = min(deadline, now + (12 if asked else 1) * GRACE_SECS)
        if time.monotonic() > deadline:
            killed += alive
            for i in alive:
                group[i].kill()
            deadline = float("inf")
    return killed


def _judge(
    codes: list[int], ended_by_us: list[int], errors: list[tuple[int, UserError | Stopped]]
) -> None:
    """Raise what the group's end was, if not success."""
    if not any(codes):
        return
    steps = lambda ranks: ", ".join(f"rank {r} at step {_progress[3 * r]}" for r in ranks)
    # NCCL aborts a process that has waited too long
    ours = {
        0,
        -signal.SIGABRT,
        -_Signals.requested,
    }
    died = [
        r for r, code in enumerate(codes) if code < 0 and code not in ours and r not in ended_by_us
    ]
    if died:
        names = {signal.Signals(-codes[r]).name for r in died}
        raise PeerLost(
            f"{steps(died)} was killed by {' and '.join(sorted(names))}; the others were ended; "
            "resume=auto continues from the last checkpoint"
        )
    for _, error in errors:
        if not isinstance(error, PeerLost):
            raise error
    if _Signals.requested:
        raise Stopped(
            exit_code(_Signals.requested), f"stopped by {signal.Signals(_Signals.requested).name}"
        )
    if any(
        code not in (0, PeerLost.exit_code, -signal.SIGABRT) and r not in ended_by_us
        for r, code in enumerate(codes)
    ):
        sys.exit(1)  # a mistake of ours, whose traceback stands above
    if any(codes):
        slow = ended_by_us[:1] or [min(range(len(codes)), key=lambda r: _progress[3 * r])]
        raise PeerLost(
            f"{steps(slow)} did not answer in time (timeout_minutes), or its connection broke; the"
            " others were ended; resume=auto continues from the last checkpoint"
        )


def _spawned(
    index: int,
    n: int,
    port: int,
    parent: tuple[int, float],
    worker: Callable[..., None],
    arguments: tuple,
    timeout: timedelta,
    progress: Any,
    said: Any,
) -> None:
    global _progress, _watched, _index, _started
    _progress = progress
    _watched = True
    _index = index
    (pid, _started) = parent
    if sys.platform == "linux":  # a launcher that is killed takes its processes with it
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != pid:
            os._exit(1)
    os.environ |= {"RANK": str(index), "LOCAL_RANK": str(index)}
    # its default is a semaphore, which Python reports as leaked when this process is ended
    tqdm.set_lock(threading.RLock())
    listen()
    threading.Thread(target=_live, daemon=True).start()
    try:
        store = dist.TCPStore("127.0.0.1", port, is_master=False)
        _work(index, worker, arguments, timeout, store=store, rank=index, world_size=n)
    except (UserError, Stopped) as error:
        text = console.one_line(error)  # short: a pipe takes 64 KiB before somebody reads
        said.put(
            (index, Stopped(error.code, text) if isinstance(error, Stopped) else type(error)(text))
        )
        _leave(error.code if isinstance(error, Stopped) else error.exit_code)
    _leave(0)


def _leave(code: int) -> None:
    """End without asking threads and destructors, which may be waiting for a process that is
    gone.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _work(
    local_rank: int,
    worker: Callable[..., None],
    arguments: tuple,
    timeout: timedelta,
    **meeting: Any,
) -> None:
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(local_rank)
    collectives.timeout = timeout
    # Weights that wait in RAM (fsdp_cpu_offload) are talked about on the CPU.
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=timeout, **meeting)
    try:
        worker(*arguments)
        dist.barrier()  # no rank leaves while another still talks to it
    except RuntimeError as error:
        if not _broken_connection(error):
            raise
        why = str(error).splitlines()[0][:150]
        raise PeerLost(
            f"another process was lost, or did not answer in time, at step {reported()[0]} ({why});"
            " resume=auto continues from the last checkpoint"
        ) from None
    dist.destroy_process_group()


def _broken_connection(error: RuntimeError) -> bool:
    """Does a collective say that it has lost another process? gloo's errors have no type of their
    own.
    """
    return isinstance(error, dist.DistError) or any(
        word in str(error) for word in ("gloo", "onnection", "Broken pipe", "NCCL")
    )
