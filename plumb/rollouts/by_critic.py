"""Learn from a rollout with a critic: what the policy's steps are made of, and which of them it
gets; the critic is trained on all of them.

Shapes: n prompts, k responses to each, together R; N response tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from plumb.batching.feed import Step
from plumb.data.examples import lengths_of
from plumb.data.extras import Extras
from plumb.distributed import sharding
from plumb.losses.advantage_rules import GaeRule
from plumb.losses.policy_gradient import k3
from plumb.rollouts.critic import Critic
from plumb.rollouts.gae import advantages_by_token, kl_of_tokens
from plumb.rollouts.kl_control import KlControl
from plumb.rollouts.learning import SampledLogps
from plumb.rollouts.rollout import Lessons, Rollout, column_of


@dataclass
class ByCritic:
    """Give each token an advantage by a critic, and train the critic on the steps of the policy.
    Every rank must make each call.
    """

    rule: GaeRule
    logps: SampledLogps
    critic: Critic
    control: KlControl
    n_rollouts: int = 0
    stopped: bool = False  # the policy has moved beyond stop_kl in this rollout

    def __call__(self, rollout: Rollout) -> Lessons:
        """Return one tree for each prompt. The extras are by token: old_logps, and reference where
        there is one; values, returns and advantages.
        """
        self.n_rollouts += 1
        self.stopped = False
        trees = rollout.trees
        logps = self.logps(rollout)
        lengths = np.array([len(ids) for tree in trees for ids in tree.responses])  # [R]
        values = np.concatenate(self.logps.read(trees, self.critic.values))  # [N]
        weight = self.control.weight
        kl = np.zeros_like(values)
        counters = dict(logps.counters)
        if logps.reference is not None:
            old, reference = np.concatenate(logps.old), np.concatenate(logps.reference)
            kl = weight * kl_of_tokens(old, reference, self.rule.kl_token)
            nats = float((old - reference).sum()) / len(lengths)
            counters |= {"rollout_train/kl": nats, "rollout_train/beta": weight}
            self.control.update(nats, len(lengths))
        made = advantages_by_token(rollout.rewards.reshape(-1), kl, values, lengths, self.rule)
        ends = np.cumsum([sum(map(len, tree.responses)) for tree in trees])[:-1]
        by_tree = lambda of_tokens: column_of(np.split(of_tokens, ends))
        own = {"values": values, "returns": made.returns, "advantages": made.values}
        token = {name: by_tree(of_tokens) for name, of_tokens in own.items()}
        return Lessons(
            prompts=rollout.prompts,
            trees=trees,
            columns=Extras(token={**logps.columns(), **token}),
            counters=counters,
        )

    def step(self, step: Step) -> Step:
        """Train the critic on a step of the rollout. Return the step of the policy: the same one,
        or one without microbatches while the critic warms up, and after the policy has moved too
        far.
        """
        idle = self.n_rollouts <= self.rule.critic_warmup or self._is_too_far(step)
        counters = {**step.counters, **self.critic.update(step), "critic_train/alone": float(idle)}
        if idle:
            step = replace(step, lengths=lengths_of([]), microbatches=[])
        return replace(step, counters=counters)

    def _is_too_far(self, step: Step) -> bool:
        """Return whether the policy's KL to the one that sampled is, or was, beyond stop_kl."""
        if self.rule.stop_kl is None or self.stopped:
            return self.stopped
        sums = torch.zeros(2, dtype=torch.float64)
        for batch, weight, _ in step.microbatches:
            old = batch.extras.token["old_logps"]
            now = self.logps.policy(batch).to(old)
            sums += weight * torch.stack([k3(old, now).sum(), old.new_tensor(len(batch.spans))])
        total, n = sharding.all_reduce_sum(sums).tolist()
        self.stopped = total / n > self.rule.stop_kl
        return self.stopped

    def tensors(self) -> dict[str, Tensor]:
        """Return what a run resumes from, by name: the critic, and "rollout.critic"."""
        state = [self.n_rollouts, self.stopped, self.control.weight]
        return {
            "rollout.critic": torch.tensor(state, dtype=torch.float64),
            **self.critic.tensors(),
        }

    def restore(self, stored: Mapping[str, Tensor]) -> None:
        """Continue from "rollout.critic" of a checkpoint. The critic's own tensors, which `tensors`
        names from now on, are to be filled.
        """
        n_rollouts, stopped, weight = stored["rollout.critic"].tolist()
        self.n_rollouts, self.stopped = int(n_rollouts), bool(stopped)
        self.control.weight = weight
        if self.n_rollouts:
            self.critic.expect_state()
