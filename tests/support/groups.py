"""Run groups of gloo processes for tests: forked, which saves all imports, and ended when one of
them fails or hangs.
"""

import os
import socket
import sys
import time
import traceback
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_in_group(n, work, *arguments, timeout=600):
    """Run `work(*arguments)` in each of n processes of one gloo group. Fails with the first
    traceback, or when the time is up, which is for a hang: the limit is long, so that a busy
    machine is not mistaken for one.
    """
    context = mp.start_processes(
        _member, args=(work, n, _free_port(), arguments), nprocs=n, join=False, start_method="fork"
    )
    end = time.monotonic() + timeout
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < end, (
                f"{work.__name__} on {n} processes: no end after {timeout} s"
            )
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()


def _member(rank, work, n, port, arguments):
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "WORLD_SIZE": str(n),
    }
    os.environ["TOKENIZERS_PARALLELISM"] = (
        "false"  # a fork lacks the threads that the parent's tokenizers wait for
    )
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=300))
    try:
        work(*arguments)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # a peer may be waiting for this rank in a collective
    dist.barrier()
    os._exit(0)  # the forked test session must not be torn down here


def _free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Halt(BaseException):
    """End a run at once, in this process, without any cleanup: the disk is as after a kill."""


@contextmanager
def halted_after(n_updates):
    """End a run within the context after this update, if it has one."""
    import trainers

    step = trainers.BasicTrainer.step

    def failing(self, *arguments):
        step(self, *arguments)
        if self.n_updates == n_updates:
            raise Halt

    trainers.BasicTrainer.step = failing
    try:
        with suppress(Halt):
            yield
    finally:
        trainers.BasicTrainer.step = step


def train_until(config_of, halt):
    """Train, in each process of a group, to the end or until update `halt`."""
    import train

    with halted_after(halt):
        train.train(config_of())
