"""Stop a run early: on a signal, or after max_hours. All ranks agree before any of them stops."""

from __future__ import annotations

import signal

from plumb.distributed import collectives
from plumb.distributed.progress import run_progress
from plumb.distributed.signals import Stopped, exit_code, stop_requested
from plumb.training.saving import RunSaver


class StopRule:
    """Decide when a run stops, and stop it. `max_hours` count from the start of the command; None:
    no limit.
    """

    def __init__(self, max_hours: float | None, saver: RunSaver):
        self.max_hours = max_hours
        self.saver = saver
        self.longest_step_secs = 0.0

    def wishes(self) -> list[float]:
        """Return why this rank would stop: [whether the time is up, number of a signal or 0]. From
        the first call on, a signal no longer ends the process, but waits for the next call.
        """
        return [self.out_of_time(), stop_requested()]

    def check(self) -> None:
        """Stop during an evaluation, between batches, if any rank must. All ranks must call it."""
        late, number = (int(wish) for wish in collectives.all_reduce_max(self.wishes()))
        if late or number:
            self.saver.state.position.finished = False
            self.stop(number)

    def out_of_time(self) -> bool:
        """Return whether another step and a save, each taking twice its longest time so far, would
        end after max_hours.
        """
        margin = 2 * (self.longest_step_secs + self.saver.saver.secs) + 10
        return (
            self.max_hours is not None
            and run_progress.uptime_secs() + margin > 3600 * self.max_hours
        )

    def stop(self, number: int) -> None:
        """Save, unless nothing was trained, and raise Stopped. `number`: of the signal, or 0 when
        the time is up. Every rank must call it.
        """
        state = self.saver.state
        position = state.position
        if position.n_updates:
            self.saver.save({}, interim=True)
            self.saver.wait()
        why = signal.Signals(number).name if number else f"max_hours={self.max_hours:g}"
        resumable = position.n_updates > 0 and self.saver.writes
        then = "resume with resume=auto" if resumable else "nothing is saved"
        raise Stopped(
            exit_code(number),
            f"stopped by {why} after step {position.n_updates:,} of {state.n_steps:,},"
            f" {position.n_seen:,} examples; {then}",
        )
