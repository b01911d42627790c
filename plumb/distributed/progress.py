"""Share how far each process of a run is, for the line that ends a run."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import psutil


@dataclass
class Progress:
    """Hold three numbers for each process of a group: optimizer steps, examples, and the time of
    its last heartbeat (seconds of the monotonic clock; 0: none yet).
    """

    shared: Any = field(default_factory=lambda: [0, 0, 0])  # [3 * processes]
    index: int = 0  # of this process
    started: float = field(default_factory=lambda: psutil.Process().create_time())  # the command

    def report(self, step: int, examples: int) -> None:
        """Set this process's optimizer steps and examples."""
        self.shared[3 * self.index : 3 * self.index + 2] = [step, examples]

    def furthest_behind(self) -> tuple[int, int]:
        """Return (optimizer steps, examples) of the slowest process."""
        return min(zip(self.shared[::3], self.shared[1::3], strict=True))

    def uptime_secs(self) -> float:
        """Return the seconds since the command was started."""
        return time.time() - self.started

    def step_of(self, index: int) -> int:
        return self.shared[3 * index]

    def seen_alive(self, index: int) -> int:
        return self.shared[3 * index + 2]

    def give_signs_of_life(self) -> None:
        """Write the time every second, for as long as this process runs."""
        while True:
            self.shared[3 * self.index + 2] = int(time.monotonic())
            time.sleep(1)


# Of this process's group; a process that launch.py started gets its launcher's numbers.
run_progress = Progress()
