"""What a run does between two steps, if it is due: log, evaluate, save, stop."""

from __future__ import annotations

import math
from dataclasses import dataclass

from plumb.distributed import collectives
from plumb.training.metrics import Record, TrainingLog
from plumb.training.optimizers import averages
from plumb.training.run_evaluator import RunEvaluator
from plumb.training.saving import RunSaver
from plumb.training.stopping import StopRule
from plumb.training.throughput import Pace
from plumb.training.train_state import TrainState


@dataclass(frozen=True)
class BetweenSteps:
    """Log, evaluate, save and stop a run between its steps. Every rank must make each call."""

    state: TrainState
    log: TrainingLog
    evaluator: RunEvaluator
    saver: RunSaver
    stop_rule: StopRule
    eval_every: int  # training examples
    do_last_eval: bool
    pace: Pace

    def after_step(self, n: int) -> None:
        """Do what all ranks agree is due after a step of `n` examples. Raise Stopped when
        the run is asked to stop.
        """
        position = self.state.position
        is_last = position.n_updates == self.state.n_steps
        position.evaluation_due = is_last or position.passed(self.eval_every, n)
        if position.evaluation_due:
            self.saver.mark()
        flush, failed, save, late, number = collectives.all_reduce_max(
            [self.log.due(), self.saver.saver.failed(), self.saver.due(n), *self.stop_rule.wishes()]
        )
        if flush:
            self.log.flush()
        if failed:
            self.saver.wait()
        if number or late:
            self.stop_rule.stop(int(number))
        if position.evaluation_due:
            self.evaluate_and_save()
        elif save:
            self.saver.save({}, interim=True)

    def evaluate_and_save(self) -> None:
        """Evaluate, and save a checkpoint with the metrics."""
        position = self.state.position
        position.evaluation_due = True
        position.finished = position.n_updates >= self.state.n_steps
        with self.pace.evaluation():
            record = self.evaluate() if not position.finished or self.do_last_eval else {}
            position.evaluation_due = False
            self.saver.save(record)

    def seconds_left(self) -> float:
        """Return the estimated time to the end of the run, after a step of this start."""
        n_examples = self.state.schedule.n_examples - self.state.position.n_seen
        n_evaluations = max(1, math.ceil(n_examples / self.eval_every))  # the last one is to come
        return self.pace.seconds_left(self.state.n_steps_left(), n_evaluations)

    def evaluate(self) -> Record:
        """Evaluate, log the metrics and return them."""
        n_seen, check = self.state.position.n_seen, self.stop_rule.check
        if not averages(self.state.optimizer):
            return self.evaluator.evaluate(n_seen, check)
        # a stop saves the policy, so it waits until the policy has its own weights again
        with self.state.averaged():
            record = self.evaluator.evaluate(n_seen, lambda: None)
        check()
        return record
