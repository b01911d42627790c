"""When a run stops early: a signal, or max_hours. All ranks agree before any of them stops."""

from __future__ import annotations

import signal
from collections.abc import Callable

from plumb.distributed import collectives
from plumb.distributed.progress import run_progress
from plumb.distributed.signals import Stopped, exit_code, stop_requested


class StopRule:
    """Decide when this process is to stop. `max_hours`: from the start of the command; None: no
    limit. `save_secs`: returns how long the last save took.
    """

    def __init__(self, max_hours: float | None, save_secs: Callable[[], float]):
        self.max_hours = max_hours
        self.save_secs = save_secs
        self.longest_step_secs = 0.0

    def wishes(self) -> list[float]:
        """Return what this rank would stop for: [is the time up, number of a signal or 0]. Signals
        wait to be asked for from the first call on.
        """
        return [self.out_of_time(), stop_requested()]

    def agreed(self) -> list[int]:
        """Return the wishes of all ranks, the same on each."""
        return [int(wish) for wish in collectives.all_reduce_max(self.wishes())]

    def out_of_time(self) -> bool:
        """Return whether another step and a save, each twice as long as so far, would end after
        max_hours.
        """
        margin = 2 * (self.longest_step_secs + self.save_secs()) + 10
        return (
            self.max_hours is not None
            and run_progress.uptime_secs() + margin > 3600 * self.max_hours
        )

    def stopped(self, number: int, where: str, resumable: bool) -> Stopped:
        """Return what to raise. `number`: of the signal, or 0 when the time is up; `where`: how far
        the run is.
        """
        why = signal.Signals(number).name if number else f"max_hours={self.max_hours:g}"
        then = "resume with resume=auto" if resumable else "nothing is saved"
        return Stopped(exit_code(number), f"stopped by {why} after {where}; {then}")
