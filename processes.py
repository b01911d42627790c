"""Processes: one per GPU (or CPU process) started and watched here, or joined where torchrun started them."""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tqdm import tqdm

from utils import UserError, under_torchrun


def launch(worker: Callable[..., None], arguments: tuple, n_cpu_processes: int | None, port: int | None) -> None:
    """Run `worker(*arguments)` in one process per GPU (on a CPU: in n_cpu_processes), or join the group of torchrun.

    A worker that ends with a UserError has said so on rank 0; this process then exits with the same code.
    Raises UserError where there is neither a GPU nor a number of CPU processes (2023: exit code 0, nothing trained).
    """
    if under_torchrun():
        _work(int(os.environ["LOCAL_RANK"]), worker, arguments)
        return
    n = torch.cuda.device_count() or n_cpu_processes
    if not n:
        raise UserError("trainer=FSDPTrainer: no GPU here; use trainer=BasicTrainer, or n_cpu_processes=2 to run it on the CPU")
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port or _free_port()), "WORLD_SIZE": str(n)}
    if not torch.cuda.is_available():
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // n)))
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # its farewell to workers is no news to a user
    try:
        mp.spawn(_spawned, args=(worker, arguments), nprocs=n)
    except mp.ProcessExitedException as error:
        sys.exit(error.exit_code)


def _spawned(index: int, worker: Callable[..., None], arguments: tuple) -> None:
    os.environ |= {"RANK": str(index), "LOCAL_RANK": str(index)}
    tqdm.set_lock(threading.RLock())  # its default is a semaphore, which Python reports as leaked when this process is ended
    _work(index, worker, arguments)


def _work(local_rank: int, worker: Callable[..., None], arguments: tuple) -> None:
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(local_rank)
    dist.init_process_group("nccl" if gpu else "gloo")
    try:
        worker(*arguments)
        dist.barrier()  # no rank leaves while another still talks to it
    finally:
        dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
