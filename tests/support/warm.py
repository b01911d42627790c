"""Run commands without their imports: one process has imported torch, transformers and Plumb, and
forks a child for each command.

A child is like `python train.py ...` after its imports: a process with its own arguments,
environment, working directory, standard streams, signal handlers and process group. It runs the
script as `__main__`.

As a script, `warm.py ADDRESS train.py ...` lets such a server run the command on the script's own
standard streams, and ends with its exit code: a `python` for shell scripts.
"""

from __future__ import annotations

import array
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).resolve()
POLL_SECS = 0.005


# ---- the client ----


def ask(address: str, command: list[str], cwd: str, env: dict[str, str], streams: list[int]):
    """Start a command. `streams`: its stdin, stdout and stderr. Return (connection, pid).

    The connection gives the exit code when the command has ended; closing it kills the command.
    """
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    request = json.dumps({"command": command, "cwd": cwd, "env": env}).encode()
    handles = array.array("i", streams).tobytes()
    connection.sendmsg(
        [struct.pack("!I", len(request))], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, handles)]
    )
    connection.sendall(request)
    return connection, read_number(connection)


def read_number(connection: socket.socket) -> int:
    (number,) = struct.unpack("!i", read(connection, 4))
    return number


def read(connection: socket.socket, n: int) -> bytes:
    content = b""
    while len(content) < n:
        more = connection.recv(n - len(content))
        if not more:
            raise EOFError("the other side of a warm command is gone")
        content += more
    return content


class WarmProcess:
    """A running command, with the part of subprocess.Popen that tests use, in text mode."""

    def __init__(self, address: str, command: list[str], cwd: Path, env: dict[str, str]):
        self.args = command
        self.returncode: int | None = None
        folder = tempfile.mkdtemp(dir=os.path.dirname(address))
        self.files = [Path(folder, name) for name in ("stdout", "stderr")]
        with (
            open(os.devnull) as nothing,
            open(self.files[0], "wb") as output,
            open(self.files[1], "wb") as errors,
        ):
            streams = [file.fileno() for file in (nothing, output, errors)]
            self.connection, self.pid = ask(address, command, str(cwd), env, streams)

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code, negative for a signal. Raises subprocess.TimeoutExpired."""
        if self.returncode is None:
            self.connection.settimeout(timeout)
            try:
                self.returncode = read_number(self.connection)
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired(self.args, timeout or 0) from None
            self.connection.close()
        return self.returncode

    def poll(self) -> int | None:
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the end. Return stdout and stderr."""
        self.wait(timeout)
        output, errors = (file.read_text() for file in self.files)
        return output, errors

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def close(self) -> None:
        """Kill it and its process group if it still runs."""
        self.connection.close()


class WarmServer:
    """The process that has imported everything; it ends with the process that started it."""

    def __init__(self, environment: dict[str, str]):
        self.folder = tempfile.TemporaryDirectory()
        self.address = f"{self.folder.name}/socket"
        self.python = Path(self.folder.name, "python")  # in place of an interpreter
        self.python.write_text(
            f'#!/bin/sh\nexec {sys.executable} -SE {SCRIPT} {self.address} "$@"\n'
        )
        self.python.chmod(0o755)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(self.address)
            listener.listen(64)  # early connections wait for the imports
            self.process = subprocess.Popen(
                [sys.executable, SCRIPT, "--serve", str(listener.fileno()), self.python],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                cwd=ROOT,
                env=environment | {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"},  # CUDA forbids forks
                pass_fds=[listener.fileno()],
            )

    def start(self, command: list[str], cwd: Path, env: dict[str, str]) -> WarmProcess:
        """Start a command: a script and its arguments."""
        return WarmProcess(self.address, command, cwd, env)

    def run(
        self, command: list[str], cwd: Path, env: dict[str, str], timeout: float
    ) -> subprocess.CompletedProcess:
        process = self.start(command, cwd, env)
        try:
            output, errors = process.communicate(timeout)
        finally:
            process.close()
        return subprocess.CompletedProcess(command, process.returncode or 0, output, errors)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        self.folder.cleanup()


# ---- the server ----


def import_all() -> None:
    """Import everything that a run imports, early or late, and fill the caches of parsers. Create
    no tensors: threads that have computed do not survive a fork.
    """
    import importlib
    import pkgutil

    import hydra
    import transformers.conversion_mapping as mapping
    import transformers.models.llama.modeling_llama  # noqa: F401

    import plumb

    for module in pkgutil.walk_packages(plumb.__path__, "plumb."):
        importlib.import_module(module.name)
    for name in ("eval", "report", "sample", "score", "train", "trainers"):
        importlib.import_module(name)
    with hydra.initialize_config_dir(str(ROOT / "config"), version_base="1.3"):
        hydra.compose("config", ["exp_name=x", "loss=dpo", "loss.beta=0.1"])
    getattr(mapping, "get_checkpoint_conversion_mapping", str)("llama")


def serve(listener: socket.socket, python: str) -> None:
    """Fork a process for each connection, until stdin ends. `python`: the interpreter of those
    processes, so that the commands they start run warm, too.
    """
    import select

    sys.path[0] = str(ROOT)  # in place of this script's folder
    import_all()
    sys.executable = python
    children = set()
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        children -= {pid for pid in children if os.waitpid(pid, os.WNOHANG)[0]}
        if sys.stdin in ready:
            break
        connection, _ = listener.accept()
        pid = os.fork()
        if pid == 0:
            listener.close()
            attend(connection)
            os._exit(0)
        children.add(pid)
        connection.close()
    for pid in children:
        os.waitpid(pid, 0)
    os._exit(0)  # the imports need no teardown


def attend(connection: socket.socket) -> None:
    """Start one command, and send its pid and its exit code; kill it if the client is gone."""
    header, ancillary, _, _ = connection.recvmsg(4, socket.CMSG_SPACE(3 * 4))
    (size,) = struct.unpack("!I", header)
    streams = array.array("i")
    streams.frombytes(ancillary[0][2])
    request = json.loads(read(connection, size))
    pid = os.fork()
    if pid == 0:
        connection.close()
        be(request, list(streams))
    for stream in streams:
        os.close(stream)
    connection.sendall(struct.pack("!i", pid))
    connection.setblocking(False)
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            break
        try:
            if connection.recv(1) == b"":
                os.killpg(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                return
        except BlockingIOError:
            time.sleep(POLL_SECS)
    connection.setblocking(True)
    connection.sendall(struct.pack("!i", os.waitstatus_to_exitcode(status)))


def be(request: dict, streams: list[int]) -> None:
    """Become the command. Does not return."""
    import atexit
    import runpy
    import threading
    import traceback

    code: object = 1
    try:
        os.setpgid(0, 0)
        for stream, handle in zip(streams, (0, 1, 2), strict=True):
            os.dup2(stream, handle)
            os.close(stream)
        for stream in (sys.stdout, sys.stderr):  # as Python begins on a terminal
            stream.reconfigure(line_buffering=stream.isatty())
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ.update(request["env"])
        started_just_now()
        script, *arguments = request["command"]
        if script == "-c":
            code_text, *arguments = arguments
            sys.argv = [script, *arguments]
            exec(code_text, {"__name__": "__main__"})
        else:
            sys.argv = [script, *arguments]
            sys.path[0] = os.path.dirname(os.path.abspath(script))
            runpy.run_path(script, run_name="__main__")
        code = 0
    except SystemExit as exit:
        code = exit.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1 if code else 0)


def started_just_now() -> None:
    """Replace what Plumb's modules know about the importing process."""
    import psutil

    from plumb.distributed.progress import run_progress
    from plumb.reports import curves

    run_progress.started = psutil.Process().create_time()
    curves.draw_all = lambda runs, further=True: b""  # takes longer than a tiny run


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve(socket.socket(fileno=int(sys.argv[2])), sys.argv[3])
    else:
        words = [word for word in sys.argv[2:] if word != "-u"]
        connection, _ = ask(sys.argv[1], words, os.getcwd(), dict(os.environ), [0, 1, 2])
        code = read_number(connection)
        sys.exit(code if code >= 0 else 128 - code)
