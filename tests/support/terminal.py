"""Run a command in a pseudo-terminal and read its screen as a person sees it."""

import array
import fcntl
import os
import pty
import select
import signal
import termios
import time

import pyte
from warm import WarmServer, ask, read_number


class Terminal:
    """A command that runs in a terminal of `columns` x 300 places."""

    def __init__(self, warm: WarmServer, command, cwd, env, columns):
        master, slave = pty.openpty()
        size = array.array("H", [300, columns, 0, 0])
        fcntl.ioctl(slave, termios.TIOCSWINSZ, size)
        os.set_blocking(master, False)
        env = {name: value for name, value in env.items() if name not in ("COLUMNS", "LINES")}
        self.master = master
        self.screen = pyte.Screen(columns, 300)
        self.stream = pyte.ByteStream(self.screen)
        self.connection, self.pid = ask(warm.address, command, str(cwd), env, [slave] * 3)
        os.close(slave)

    def lines(self):
        """Return what is on the screen, without spaces at the end of a line."""
        return "\n".join(line.rstrip() for line in self.screen.display).rstrip().split("\n")

    def screens(self, patience):
        """Yield the lines of the screen after each output, until the command ends."""
        end = time.monotonic() + patience
        while time.monotonic() < end:
            if not select.select([self.master], [], [], 1)[0]:
                continue
            try:
                content = os.read(self.master, 1 << 16)
            except OSError:  # the other side is closed
                return
            self.stream.feed(content)
            yield self.lines()
        raise TimeoutError("the command did not end")

    def press_ctrl_c(self):
        """Type it, which the terminal shows as ^C, and send what a shell's terminal sends."""
        os.write(self.master, b"\x03")
        os.kill(self.pid, signal.SIGINT)

    def exit_code(self):
        return read_number(self.connection)

    def close(self):
        """Kill the command if it still runs."""
        self.connection.close()
        os.close(self.master)
