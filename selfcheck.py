"""What the first step must show before hours are spent: policy = reference, no dropout, a gradient, an update, a save."""

from __future__ import annotations

import json
from typing import Any

import torch

import parallel
from batching import Batch, Step
from evaluation import Scored, as_data, given
from metrics import Means
from utils import NonFinite, rank, rank0_print

Trainer = Any  # trainers.BasicTrainer, which imports this


class FirstStep:
    """Made between the first backward pass and the first update; `check` is called after that update. Both raise NonFinite (exit
    code 4), which says what is wrong. All ranks must call both."""

    def __init__(self, trainer: Trainer, batch: Batch, scored: Scored, means: Means):
        self.trainer = trainer
        self._policy_is_reference(means)
        self._nothing_is_random(batch, scored)
        self.before = self._bits()

    def _policy_is_reference(self, means: Means) -> None:
        """Before the first update every reward is 0. Say so, or say what is wrong."""
        t, spec = self.trainer, self.trainer.config.model
        if not t.loss.needs_reference or "rewards_{}/chosen" not in means.sums:
            return
        reduced = Means()
        reduced.sums, reduced.counts = dict(means.sums), dict(means.counts)
        record = reduced.reduce()
        reward = max(abs(record["rewards_{}/chosen"]), abs(record["rewards_{}/rejected"]))
        live, other_dtype = t.scorer.reference is not None, spec.reference_dtype not in (None, spec.policy_dtype)
        # Cached log-probabilities were computed in other rows, whose products may be rounded otherwise.
        rounding = 4e-7 * abs(record["logps_{}/chosen"]) if t.dtype.itemsize >= 4 else 0.05
        if reward <= (0.0 if live or other_dtype else rounding):
            said = f"{reward:.0e}, rounding" if reward else "0"
            rank0_print(f"step 0: policy and reference agree (rewards {said}, {t.loss.name} loss {record['loss/{}']:.4f})")
            return
        said = (f"step 0: policy and reference DISAGREE: mean rewards {record['rewards_{}/chosen']:.2g} and "
                f"{record['rewards_{}/rejected']:.2g} instead of 0")  # fmt: skip
        if not other_dtype:
            raise NonFinite(f"{said}; {'compare with reference=live' if not live else 'is the model deterministic?'}")
        rank0_print(f"{said}, since model.reference_dtype={spec.reference_dtype} is not the policy's precision")

    @torch.no_grad()
    def _nothing_is_random(self, batch: Batch, scored: Scored) -> None:
        """The same microbatch a second time, in training mode: the same log-probabilities (or scores); and the loss of a policy
        that is its own reference (log 2 for DPO)."""
        t = self.trainer
        batch = batch.to(t.device)
        again = t.scorer.policys(batch)
        parallel.settle(t.policy)  # or the gradients of what FSDP has left gathered would not be found
        policy, tolerance = as_data(again, batch), (1e-3 if t.dtype.itemsize >= 4 else 0.05)
        off = max(parallel.from_all(float((scored.given - given(again)).abs().max())))
        if off > tolerance * (1 if t.loss.reads == "logps" else 1 + float(scored.given.abs().max())):
            what, unit = ("log-probabilities", " nats per token") if t.loss.reads == "logps" else ("scores", "")
            raise NonFinite(f"step 0: the same batch twice gives {what} that differ by {off:.2g}{unit}: is there dropout in the "
                            "model that its config does not name?")  # fmt: skip
        if t.loss.needs_reference and batch.reference is None and t.config.model.reference_dtype is None:
            expected = t.loss.compute(policy, policy).losses
            off = max(parallel.from_all(float((scored.output.losses.detach() - expected).abs().max())))
            if off > tolerance * (1 + float(expected.abs().max())):
                raise NonFinite(f"step 0: the loss is off by {off:.2g} from that of a policy which is its own reference")

    def _bits(self) -> torch.Tensor:
        """A sum of each parameter's bits, of this rank's part: changes when any number changes."""
        kind = {8: torch.int64, 4: torch.int32, 2: torch.int16}
        parameters = [parallel.region(p.detach())[1] for p in self.trainer.policy.parameters() if p.requires_grad]
        return torch.stack([p.view(kind[p.element_size()]).sum(dtype=torch.int64) for p in parameters])

    def check(self, grad_norm: float) -> None:
        """After the first update; `grad_norm` was the gradient's."""
        t = self.trainer
        if grad_norm == 0:
            raise NonFinite("step 1: the gradient is 0: nothing is learnt from these pairs; are chosen and rejected the same?")
        parallel.settle(t.policy)
        if not any(parallel.from_all(bool((self._bits() != self.before).any()))):
            said = f"step 1: no weight has changed (gradient norm {grad_norm:.2g}): lr={t.config.lr:g} is rounded away"
            dtype = next(t.policy.parameters()).dtype
            if dtype.itemsize >= 4:
                raise NonFinite(f"{said}; raise lr")
            rank0_print(f"{said} in {str(dtype)[6:]}; model.policy_dtype=float32 with model.fsdp_policy_mp=bfloat16 keeps it")
        t.rehearse_save()


def not_finite(trainer: Trainer, step: Step, grad_norm: float) -> NonFinite:
    """The error for a step that is not applied; its batch is dumped into the run directory."""
    t, path = trainer, trainer.run_dir / "non_finite.json"
    examples = [t.train_feed.examples[i] for i in step.indices.tolist()]
    rows = [{"source": e.source, "index": int(i), "prompt": e.prompt.tolist(), "responses": [r.tolist() for r in e.responses]}
            for e, i in zip(examples, step.indices, strict=True)]  # fmt: skip
    if rank() == 0:
        path.write_text(json.dumps({"step": t.n_updates + 1, "grad_norm": str(grad_norm), "examples": rows}) + "\n")
    ids = ", ".join(e.source for e in examples[:8]) + (", ..." if len(examples) > 8 else "")
    return NonFinite(f"step {t.n_updates + 1}: the gradient norm is {grad_norm}; stopped before the update; batch: {ids} "
                     f"(token ids: {path}); lower lr={t.config.lr:g}, or compute in float32; checkpoints are whole")  # fmt: skip
