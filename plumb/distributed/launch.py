"""Start and watch processes, one per GPU (or CPU process), or join those started by torchrun.

The exit code of the first process, and its one line of output, say how the others ended.
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

import torch
import torch.distributed as dist
from tqdm import tqdm

from plumb import console
from plumb.console import under_torchrun
from plumb.distributed import collectives, signals
from plumb.distributed.progress import run_progress
from plumb.distributed.signals import Stopped
from plumb.errors import PeerLost, UserError

# after one process has failed: how long the others may take to say why, or to finish what they
# write
GRACE_SECS = 10
PR_SET_PDEATHSIG = 1


# ---- starting ----


def forks() -> bool:
    """Return whether `launch` forks its processes, so that they share what has been imported. On
    GPUs they are spawned: CUDA doesn't work in a process forked from one that has called it. Nor do
    the system's libraries on macOS.
    """
    return sys.platform == "linux" and not torch.cuda.is_available()


def launch(
    worker: Callable[..., None],
    arguments: tuple,
    *,
    n_cpu_processes: int | None,
    port: int | None,
    timeout: timedelta,
) -> None:
    """Run `worker(*arguments)` in one process per GPU (on a CPU: in n_cpu_processes), or join
    torchrun's group.

    When it returns, all processes have ended. A worker's UserError or Stopped is raised here as it
    was raised on the lowest rank that has one; PeerLost names the rank that died or hung, and its
    step. `timeout`: how long a process waits for another. Processes communicate over the loopback
    interface only. Raises UserError if there is neither a GPU nor a number of CPU processes (the
    original exited with 0 and trained nothing).
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
    method = "fork" if forks() else "spawn"
    context: Any = torch.multiprocessing.get_context(method)
    run_progress.shared = context.Array("q", 3 * n, lock=False)
    messages = context.SimpleQueue()
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
            (os.getpid(), run_progress.started),
            worker,
            arguments,
            timeout,
            run_progress.shared,
            messages,
        )
        group = [context.Process(target=_started, args=(i, *common)) for i in range(n)]
        signals.state.waits_for_the_loop = True
        for process in group:
            process.start()
        ended_by_us = _watch(group, timeout.total_seconds())
    errors: list[tuple[int, UserError | Stopped]] = []
    while not messages.empty():
        errors.append(messages.get())
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
        if signals.state.requested and not forwarded:
            forwarded = signals.state.requested
            for i in alive:
                os.kill(group[i].pid or 0, forwarded)
        now = time.monotonic()
        for i in alive:
            if 0 < run_progress.seen_alive(i) < now - timeout - 2:
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
    steps = lambda ranks: ", ".join(f"rank {r} at step {run_progress.step_of(r)}" for r in ranks)
    # NCCL aborts a process that has waited too long
    ours = {
        0,
        -signal.SIGABRT,
        -signals.state.requested,
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
    if signals.state.requested:
        raise Stopped(
            signals.exit_code(signals.state.requested),
            f"stopped by {signal.Signals(signals.state.requested).name}",
        )
    if any(
        code not in (0, PeerLost.exit_code, -signal.SIGABRT) and r not in ended_by_us
        for r, code in enumerate(codes)
    ):
        sys.exit(1)  # an internal error; its traceback is above
    if any(codes):
        slow = ended_by_us[:1] or [min(range(len(codes)), key=lambda r: run_progress.step_of(r))]
        raise PeerLost(
            f"{steps(slow)} did not answer in time (timeout_minutes), or its connection broke; the"
            " others were ended; resume=auto continues from the last checkpoint"
        )


def _started(
    index: int,
    n: int,
    port: int,
    parent: tuple[int, float],
    worker: Callable[..., None],
    arguments: tuple,
    timeout: timedelta,
    shared: Any,
    messages: Any,
) -> None:
    pid, run_progress.started = parent
    run_progress.shared = shared
    run_progress.index = index
    signals.reset()  # forked, it has its launcher's
    signals.state.has_launcher = True
    if sys.platform == "linux":  # a launcher that is killed takes its processes with it
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != pid:
            os._exit(1)
    os.environ |= {"RANK": str(index), "LOCAL_RANK": str(index)}
    if "OMP_NUM_THREADS" in os.environ:  # read by torch when it is imported
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    # its default is a semaphore, which Python reports as leaked when this process is ended
    tqdm.set_lock(threading.RLock())
    signals.listen()
    threading.Thread(target=run_progress.give_signs_of_life, daemon=True).start()
    try:
        store = dist.TCPStore("127.0.0.1", port, is_master=False)
        _work(index, worker, arguments, timeout, store=store, rank=index, world_size=n)
    except (UserError, Stopped) as error:
        text = console.one_line(error)  # short: a pipe takes 64 KiB before somebody reads
        messages.put(
            (index, Stopped(error.code, text) if isinstance(error, Stopped) else type(error)(text))
        )
        _leave(error.code if isinstance(error, Stopped) else error.exit_code)
    _leave(0)


def _leave(code: int) -> None:
    """End the process without waiting for threads and destructors, which may wait for a process
    that is gone.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _work(
    local_rank: int,
    worker: Callable[..., None],
    arguments: tuple,
    timeout: timedelta,
    **rendezvous: Any,
) -> None:
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(local_rank)
    collectives.timeout = timeout
    # Weights that are kept in RAM (fsdp_cpu_offload) are reduced and gathered on the CPU.
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=timeout, **rendezvous)
    try:
        worker(*arguments)
        dist.barrier()  # no rank leaves while another still communicates with it
    except RuntimeError as error:
        if not _broken_connection(error):
            raise
        why = str(error).splitlines()[0][:150]
        step, _ = run_progress.furthest_behind()
        raise PeerLost(
            f"another process was lost, or did not answer in time, at step {step} ({why});"
            " resume=auto continues from the last checkpoint"
        ) from None
    dist.destroy_process_group()


def _broken_connection(error: RuntimeError) -> bool:
    """Return whether a collective reports that it has lost another process. gloo's errors have no
    type of their own.
    """
    return isinstance(error, dist.DistError) or any(
        word in str(error) for word in ("gloo", "onnection", "Broken pipe", "NCCL")
    )
