"""Check in the first step what would waste hours otherwise: policy = reference, no dropout, a
gradient, a finite update, a save.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from plumb.batching.feed import Step
from plumb.batching.layout import Batch
from plumb.console import rank, rank0_print
from plumb.data.tokenization import Example
from plumb.distributed import collectives, sharding
from plumb.errors import NonFinite
from plumb.losses.contract import Logps, Scores
from plumb.models.logps import read_responses
from plumb.training.metrics import Means
from plumb.training.objective import (
    LOSS_INPUTS,
    Scored,
    Scorer,
    per_response,
    per_response_value,
)


class Computation(NamedTuple):
    """Hold what the checks need to know about the policy's training."""

    dtype: torch.dtype  # of computation
    reference_dtype: str | None  # of the reference's weights, if not the policy's
    lr: float  # for messages


class FirstStep:
    """Check the first step twice: the constructor between the first backward pass and the first
    update, `check` after that update. Both raise NonFinite (exit code 4) with the problem. All
    ranks must call both.
    """

    def __init__(
        self,
        scorer: Scorer,
        computation: Computation,
        batch: Batch,
        scored: Sequence[Scored],
        means: Means,
    ):
        """Take all microbatches of the step as `scored`; the last of them is `batch`. `means`:
        those of their metrics.
        """
        self.scorer = scorer
        self.computation = computation
        self._policy_is_reference(scored, means)
        self._nothing_is_random(batch, scored[-1])
        self.before = self._bits()

    def _policy_is_reference(self, microbatches: Sequence[Scored], means: Means) -> None:
        """Check that policy and reference give each response the same log-probability before the
        first update, up to rounding (so that all rewards are 0), and print the result.
        """
        loss = self.scorer.loss
        if not loss.needs_reference:
            return
        record = means.reduce()
        dtype = self.computation.dtype
        shares = [share for scored in microbatches for share in _shares_of_rounding(scored, dtype)]
        share, apart, n = max(max(some) for some in collectives.all_gather_object(shares))
        rewards = [record.get(f"rewards/{which}", 0.0) for which in ("chosen", "rejected")]
        if share <= 1:
            reward = max(map(abs, rewards))
            shown = f"{reward:.0e}, rounding" if reward else "0"
            rank0_print(
                f"step 0: policy and reference agree (rewards {shown}, {loss.name} loss"
                f" {record['loss']:.4f})"
            )
            return
        message = (
            f"step 0: policy and reference DISAGREE: mean rewards {rewards[0]:.2g} and"
            f" {rewards[1]:.2g} instead of 0; at worst {apart:.2g} nats in a response of {n}"
            f" tokens, {share:.2g} times what rounding explains"
        )
        other = self.computation.reference_dtype
        if other is None:
            live = self.scorer.reference is not None
            raise NonFinite(
                f"{message};"
                f" {'is the model deterministic?' if live else 'compare with reference=live'}"
            )
        rank0_print(f"{message}, since model.reference_dtype={other} is not the policy's precision")

    @torch.no_grad()
    def _nothing_is_random(self, batch: Batch, scored: Scored) -> None:
        """Check that the same microbatch, computed again in training mode, has the same
        log-probabilities (or scores), and the loss of a policy that is its own reference (log 2 for
        DPO).
        """
        scorer = self.scorer
        dtype = self.computation.dtype
        batch = batch.to(scorer.device)
        with scorer.precision():
            outputs = read_responses(
                scorer.loss.reads,
                scorer.policy,
                batch,
                scorer.forward_path,
                scorer.reference,
                scorer.temperature,
            )
        # otherwise FSDP would miss the gradients of what it has left gathered
        sharding.reshard(scorer.policy)
        tolerance = 1e-3 if dtype.itemsize >= 4 else 0.05
        again = outputs if isinstance(outputs, Scores) else per_response(outputs, batch)
        change = (scored.per_response - per_response_value(again)).abs()  # [R]
        if isinstance(again, Logps):
            allowed = rounding(again, dtype) / again.tokens.clamp(min=1)
            what = "log-probabilities"
            unit = " nats per token"
        else:
            allowed = tolerance * (1 + scored.per_response.abs().max()).expand_as(change)
            what = "scores"
            unit = ""
        shares = (change / allowed).nan_to_num(nan=torch.inf)
        share, off = max(
            collectives.all_gather_object((float(shares.max()), float(change[shares.argmax()])))
        )
        if share > 1:
            raise NonFinite(
                f"step 0: the same batch twice gives {what} that differ by {off:.2g}{unit}: is"
                " there dropout in the model that its config does not show?"
            )
        if (
            scorer.loss.needs_reference
            and "reference" not in {**batch.extras.response, **batch.extras.token}
            and self.computation.reference_dtype is None
        ):
            own = outputs if scorer.loss.reference_by_token else again
            inputs_of = LOSS_INPUTS[scorer.loss.group]
            policy, reference = inputs_of(outputs, batch), inputs_of(own, batch)
            expected = scorer.loss.compute(policy, reference, scored.context).losses
            off = max(
                collectives.all_gather_object(
                    float((scored.output.losses.detach() - expected).abs().max())
                )
            )
            if off > tolerance * (1 + float(expected.abs().max())):
                raise NonFinite(
                    f"step 0: the loss differs by {off:.2g} from that of a policy that is its own"
                    " reference"
                )

    def _bits(self) -> Tensor:
        """Return the sum of the bits of each parameter, this rank's part: it changes when any
        number does.
        """
        kind = {8: torch.int64, 4: torch.int32, 2: torch.int16}
        parameters = [
            sharding.region(p.detach())[1]
            for p in self.scorer.policy.parameters()
            if p.requires_grad
        ]
        return torch.stack(
            [p.view(kind[p.element_size()]).sum(dtype=torch.int64) for p in parameters]
        )

    def check(self, grad_norm: float) -> None:
        """Check the weights after the first update; `grad_norm`: of its gradient."""
        policy = self.scorer.policy
        lr = self.computation.lr
        if grad_norm == 0 and self.scorer.loss.group == "rollout":
            rank0_print(
                "step 1: the gradient is 0: the responses to each prompt have the same reward; if"
                " that goes on, nothing is learned: see rollout_train/equal_rewards"
            )
            return
        if grad_norm == 0:
            raise NonFinite(
                "step 1: the gradient is 0: nothing is learned from these pairs; are chosen and"
                " rejected the same?"
            )
        sharding.reshard(policy)
        if bad := sharding.not_finite(policy.named_parameters()):
            raise NonFinite(
                f"step 1: the update leaves NaN or infinity in {bad} (gradient norm"
                f" {grad_norm:.2g}): lower lr={lr:g}, or set model.policy_dtype=float32 or"
                " another optimizer"
            )
        if not any(collectives.all_gather_object(bool((self._bits() != self.before).any()))):
            message = (
                f"step 1: no weight has changed (gradient norm {grad_norm:.2g}): lr={lr:g}"
                " is rounded away"
            )
            dtype = next(policy.parameters()).dtype
            if dtype.itemsize >= 4:
                raise NonFinite(f"{message}; raise lr")
            rank0_print(
                f"{message} in {str(dtype)[6:]}; model.policy_dtype=float32 with"
                " model.fsdp_policy_mp=bfloat16 keeps it"
            )


def rounding(logps: Logps, dtype: torch.dtype) -> Tensor:
    """Return how much two computations of the same log-probabilities in `dtype` may differ, in
    other rows or another order of summation.  [R] -> [R], nats

    A token's log-probability l is a logit minus a log-sum-exp, both of a size of about 1 + |l|.
    Their relative error has two sources: results that are rounded to `dtype` on the way, for which
    4 eps are allowed, and sums of some thousand products in float32 or wider, whose errors grow
    with the square root of their number: 64 eps for 4,096. (Between packed and padded rows, a Llama
    of 24 layers and one of 260,000 weights differ by 0.2 to 0.9 eps in bfloat16, 4 to 20 in
    float32.) The errors of tokens are independent, so that of a sum of n is sqrt(n) times as large;
    other weights would shift it by about n times. An implicit reward, beta times a difference of
    such sums, may differ by beta times as much.
    """
    n = logps.tokens.clamp(min=1)
    sums = torch.promote_types(dtype, torch.float32)
    each = (4 * torch.finfo(dtype).eps + 64 * torch.finfo(sums).eps) * (
        1 + logps.sum.detach().abs() / n
    )
    return n.sqrt() * each


def _shares_of_rounding(scored: Scored, dtype: torch.dtype) -> list[tuple[float, float, int]]:
    """Return for each response: the difference between policy and reference, as a multiple of what
    rounding explains and in nats; and the number of tokens.
    """
    assert scored.compared is not None  # the loss needs a reference
    policy, reference = scored.compared
    apart = (policy.sum - reference.sum).abs()
    shares = (apart / rounding(policy, dtype)).nan_to_num(nan=torch.inf)
    return list(zip(shares.tolist(), apart.tolist(), policy.tokens.tolist(), strict=True))


def not_finite(
    examples: Sequence[Example], step: Step, n: int, grad_norm: float, lr: float, run_dir: Path
) -> NonFinite:
    """Return the error for the run's `n`-th step, which is not applied, and write its batch of the
    training `examples` to the run directory.
    """
    path = run_dir / "non_finite.json"
    batch = [examples[i] for i in step.indices.tolist()]
    rows = [
        {
            "source": e.source,
            "index": int(i),
            "prompt": e.prompt.tolist(),
            "responses": [r.tolist() for r in e.responses],
        }
        for e, i in zip(batch, step.indices, strict=True)
    ]
    if rank() == 0:
        path.write_text(
            json.dumps({"step": n, "grad_norm": str(grad_norm), "examples": rows}) + "\n"
        )
    ids = ", ".join(e.source for e in batch[:8]) + (", ..." if len(batch) > 8 else "")
    return NonFinite(
        f"step {n}: the gradient norm is {grad_norm}; stopped before the update;"
        f" batch: {ids} (token ids: {path}); lower lr={lr:g}, or compute in float32;"
        " checkpoints are valid"
    )
