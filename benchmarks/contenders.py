"""One contender of benchmarks/throughput.py, alone in this process: it builds its models, then takes one training step for each
line "go" on its standard input and answers with one JSON line.

A step is the same work for everyone, from token ids to updated weights: the batch of pairs is assembled, the policy goes forward
and backward, the reference forward, the loss, the gradient norm is clipped, the optimizer steps. `secs` is the wall time of that, on
a GPU between two synchronisations; models, data sets and compilation come before. Weights are drawn from a fixed seed on the
device, another seed for the reference, so that losses differ from log 2 and a wrong reference would show.

Contenders:
    plumb   this repository
    padded  the manner of the 2023 DPO code, written anew: chosen and rejected stacked, padded to the longest row of the whole batch,
            logits everywhere, float32 log_softmax over the vocabulary; microbatches are cut from that padded batch
    trl     trl.DPOTrainer in its own training loop, fed the same ids

Shapes: B pairs in a microbatch, R rows, T tokens in a row, V vocabulary, d hidden size.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # Plumb's modules lie at the repository's root

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import make_tokens
from make_tokens import Pair

BETA = 0.1


@dataclass
class Setting:
    """What one contender is to do; travels to its process as JSON."""

    contender: str  # plumb, padded, trl
    model: dict[str, Any]  # a transformers config, model_type included
    tokens: str  # file of make_tokens.py, or "synthetic:SCALE"
    label: str = ""  # how tables call it
    objective: str = "dpo"  # dpo, sft (the chosen response), reward (backbone and a score at each response's last token)
    device: str = "cpu"
    dtype: str = "float32"  # of all weights, gradients and optimizer moments
    n_pairs: int = 64  # of one step, over all microbatches
    n_steps: int = 1  # the most that will be asked for
    n_check: int = 8  # pairs of the check before the first step
    microbatch: int = 8  # pairs (padded, trl)
    budget: int = 4096  # tokens of a microbatch (plumb)
    reference: str = "live"  # "live": forward in the same step; "cached": computed before the first step
    compile: bool = False
    checkpointing: bool = False  # activations recomputed in the backward pass
    by_length: bool = False  # trl: longest pairs first within each batch
    responses_only: bool = False  # trl on a CPU: its LM head on response rows only, as it does on a GPU (a patch of ours)
    lr: float = 1e-5
    max_grad_norm: float = 10.0
    trace: str = ""  # write a profiler table of the last step to this file

    def to_json(self) -> str:
        return json.dumps(asdict(self))


class Pipe:
    """The line to the parent: waits for "go", tells results. Whatever libraries print goes to standard error instead."""

    def __init__(self) -> None:
        self.out: IO[str] = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def wait(self) -> bool:
        """True for "go", False when the parent wants no more."""
        return sys.stdin.readline().strip() == "go"

    def tell(self, **record: Any) -> None:
        self.out.write(json.dumps(record) + "\n")
        self.out.flush()


# ------------------------------------------------------------------------------------------------------------- the common part


class Contender(ABC):
    """Models and optimizer by a Setting; a subclass says how pairs become microbatches and log-probabilities."""

    def __init__(self, setting: Setting):
        self.setting, self.device = setting, torch.device(setting.device)
        self.policy = self.build(seed=0)
        self.reference = self.build(seed=1) if setting.objective == "dpo" else None
        self.score: nn.Linear | None = None
        if setting.objective == "reward":
            torch.manual_seed(2)
            self.score = nn.Linear(self.policy.config.hidden_size, 1, bias=False, dtype=self.dtype, device=self.device)
            self.policy.lm_head = nn.Identity()  # no vocabulary head: its weights would be memory and optimizer time for nothing
        self.optimizer = make_optimizer(self.parameters(), setting)
        self.processed = 0  # tokens, padding included, that the policy's forward passes have computed
        if self.reference is not None:
            self.reference.eval().requires_grad_(False)

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.setting.dtype)

    def build(self, seed: int) -> Any:
        return build_model(self.setting, seed)

    def parameters(self) -> list[nn.Parameter]:
        return [*self.policy.parameters(), *(self.score.parameters() if self.score is not None else ())]

    @abstractmethod
    def parts(self, pairs: Sequence[Pair]) -> Iterator[Tensor]:
        """The summed loss of one microbatch after the other, each ready for backward()."""

    def gradients(self, pairs: Sequence[Pair]) -> Tensor:
        """Accumulate the gradient of the mean loss over `pairs`. -> that mean"""
        total = torch.zeros((), device=self.device)
        for part in self.parts(pairs):
            loss = part / len(pairs)
            loss.backward()
            total += loss.detach()
        return total

    def step(self, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
        """One whole training step. -> mean loss, gradient norm before clipping"""
        loss = self.gradients(pairs)
        norm = nn.utils.clip_grad_norm_(self.parameters(), self.setting.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss, norm

    def check(self, pairs: Sequence[Pair]) -> tuple[float, float]:
        """Mean loss and gradient norm on `pairs` without an update; the warm-up as well."""
        loss = float(self.gradients(pairs))
        norm = float(nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None]))
        self.optimizer.zero_grad()
        return loss, norm

    def prepare(self, batches: Sequence[Sequence[Pair]]) -> None:
        """What a contender computes once before training (a cached reference)."""


def build_model(setting: Setting, seed: int) -> Any:
    """A causal language model with seeded random weights, drawn on the device it trains on."""
    import transformers

    transformers.logging.set_verbosity_error()
    fields = dict(setting.model)
    config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    torch.manual_seed(seed)
    with torch.device(setting.device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, setting.dtype))
    return model.train()


def make_optimizer(parameters: Sequence[nn.Parameter], setting: Setting) -> torch.optim.Optimizer:
    """Fused AdamW, the same for every contender."""
    return torch.optim.AdamW(parameters, lr=setting.lr, weight_decay=0.0, fused=True)


def dpo_loss(policy: tuple[Tensor, Tensor], reference: tuple[Tensor, Tensor]) -> Tensor:
    """Sum of -log sigmoid(beta h), h = (chosen - rejected) of the policy less that of the reference; each [B], nats."""
    return -F.logsigmoid(BETA * (policy[0] - policy[1] - (reference[0] - reference[1]))).sum()


# -------------------------------------------------------------------------------------------------------- the manner of 2023


class Padded(Contender):
    """Everything padded to the longest row of the whole batch, all logits in float32, prompts computed once per response."""

    def parts(self, pairs: Sequence[Pair]) -> Iterator[Tensor]:
        k = 1 if self.setting.objective == "sft" else 2
        ids, mask, labels = self.pad(pairs, k)
        for start in range(0, len(pairs), self.setting.microbatch):
            part = slice(start, start + self.setting.microbatch)
            yield self.loss(*(x[:, part].flatten(0, 1).to(self.device) for x in (ids, mask, labels)))

    def pad(self, pairs: Sequence[Pair], k: int) -> tuple[Tensor, Tensor, Tensor]:
        """-> ids, attention mask, labels (-100 on prompt and padding), each [k, B, T]"""
        rows = [[(p.prompt, r) for p in pairs] for r in ()] or [[(p[0], p[1 + i]) for p in pairs] for i in range(k)]
        width = max(len(prompt) + len(response) for side in rows for prompt, response in side)
        ids = torch.zeros(k, len(pairs), width, dtype=torch.int64)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for i, side in enumerate(rows):
            for j, (prompt, response) in enumerate(side):
                start, end = len(prompt), len(prompt) + len(response)
                ids[i, j, :start] = torch.from_numpy(prompt)
                ids[i, j, start:end] = labels[i, j, start:end] = torch.from_numpy(response)
                mask[i, j, :end] = 1
        return ids, mask, labels

    def loss(self, ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        self.processed += ids.numel()
        if self.setting.objective == "reward":
            assert self.score is not None
            hidden = self.policy.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state  # [R, T, d]
            last = mask.sum(1) - 1
            scores = self.score(hidden[torch.arange(len(ids), device=ids.device), last])[:, 0].float()  # [R]
            chosen, rejected = scores.chunk(2)
            return -F.logsigmoid(chosen - rejected).sum()
        policy = self.logps(self.policy, ids, mask, labels)
        if self.reference is None:
            return -policy.sum()
        with torch.no_grad():
            reference = self.logps(self.reference, ids, mask, labels)
        chosen, rejected = policy.chunk(2)
        return dpo_loss((chosen, rejected), (reference.chunk(2)[0], reference.chunk(2)[1]))

    @staticmethod
    def logps(model: Any, ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        """Sum of the response tokens' log-probabilities, from the logits of every position.  -> [R]"""
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()[:, :-1]  # [R, T-1, V]
        targets = labels[:, 1:]
        scored = targets != -100
        per_token = logits.log_softmax(-1).gather(2, targets.clamp(min=0).unsqueeze(2)).squeeze(2)  # [R, T-1]
        return (per_token * scored).sum(1)


# ------------------------------------------------------------------------------------------------------------------- plumb


class Plumb(Contender):
    """This repository's layout, heads and losses. Everything that knows its API is in this class."""

    def __init__(self, setting: Setting):
        super().__init__(setting)
        self.cache: dict[int, Tensor] = {}  # id of a pair -> the reference's [2] log-probabilities

    def parts(self, pairs: Sequence[Pair]) -> Iterator[Tensor]:
        from batching import collate, microbatches
        from tokenization import Example

        k = 1 if self.setting.objective == "sft" else 2
        examples = [Example(p.prompt, tuple(p[1 : 1 + k]), str(i), frozenset(), ()) for i, p in enumerate(pairs)]
        n = max(1, sum(k * (len(p.prompt) + len(p.chosen)) for p in pairs) // self.setting.budget)
        for part in microbatches(examples, n):
            batch = collate(part, 0).to(self.device)
            self.processed += batch.input_ids.numel()
            yield self.loss(batch, [id(pairs[int(e.source)]) for e in part])

    def loss(self, batch: Any, keys: list[int]) -> Tensor:
        from models import response_logps

        if self.setting.objective == "reward":
            assert self.score is not None
            inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
            hidden = self.policy.base_model(**inputs, use_cache=False).last_hidden_state
            last = batch.attention_mask.sum(1) - 1
            chosen, rejected = self.score(hidden[torch.arange(len(last)), last])[:, 0].float().chunk(2)
            return -F.logsigmoid(chosen - rejected).sum()
        policy = response_logps(self.policy, batch).sum
        if self.reference is None and not self.cache:
            return -policy.sum()
        if self.cache:
            reference = torch.stack([self.cache[key] for key in keys], 1).flatten()
        else:
            with torch.no_grad():
                reference = response_logps(self.reference, batch).sum
        (chosen, rejected), (ref_chosen, ref_rejected) = policy.chunk(2), reference.chunk(2)
        return dpo_loss((chosen, rejected), (ref_chosen, ref_rejected))


# --------------------------------------------------------------------------------------------------------------------- serve


def batches_of(setting: Setting) -> list[list[Pair]]:
    """The batches of all steps, the same for every contender: consecutive pairs of the file, from its start again at its end."""
    kind, _, scale = setting.tokens.partition(":")
    if kind == "synthetic":
        tokens = make_tokens.synthetic(1024, setting.model["vocab_size"], scale=float(scale or 1))
    else:
        tokens = make_tokens.load(Path(setting.tokens))
    if tokens.vocab_size > setting.model["vocab_size"]:
        raise SystemExit(f"{setting.tokens} has ids up to {tokens.vocab_size}, the model {setting.model['vocab_size']} embeddings")
    n = len(tokens.pairs)
    return [[tokens.pairs[i % n] for i in range(s * setting.n_pairs, (s + 1) * setting.n_pairs)] for s in range(setting.n_steps)]


def n_unique(pairs: Sequence[Pair], objective: str) -> int:
    """Real tokens of a batch, each prompt once."""
    return sum(len(p.prompt) + len(p.chosen) + (len(p.rejected) if objective != "sft" else 0) for p in pairs)


class Clock:
    """Wall seconds; on a GPU up to the end of all queued work."""

    def __init__(self, device: torch.device):
        self.device, self.started = device, 0.0

    def start(self) -> None:
        self.synchronize()
        self.started = time.perf_counter()

    def read(self) -> float:
        self.synchronize()
        return time.perf_counter() - self.started

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def memory(device: torch.device) -> dict[str, float]:
    """Peak so far, GB (1e9 bytes): resident set of this process; on a GPU also what torch allocated and reserved."""
    peak = {"peak_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}
    if device.type == "cuda":
        peak["peak_cuda_gb"] = torch.cuda.max_memory_allocated() / 1e9
        peak["peak_cuda_reserved_gb"] = torch.cuda.max_memory_reserved() / 1e9
    return peak


def serve(contender: Contender, batches: list[list[Pair]], pipe: Pipe) -> None:
    """Check, then one step per "go" until there are no more."""
    setting = contender.setting
    contender.prepare(batches)
    loss, norm = contender.check(batches[0][: setting.n_check])
    pipe.tell(event="check", loss=loss, grad_norm=norm, **memory(contender.device))
    clock = Clock(contender.device)
    for i, batch in enumerate(batches):
        if not pipe.wait():
            return
        before = contender.processed
        clock.start()
        step_loss, step_norm = contender.step(batch)
        secs = clock.read()
        tell_step(pipe, contender.device, setting, batch, i, secs, step_loss, step_norm, contender.processed - before)


def tell_step(pipe: Pipe, device, setting: Setting, batch: Sequence[Pair], i: int, secs: float, loss, norm, processed: int) -> None:
    pipe.tell(
        event="step", step=i, secs=secs, pairs_per_sec=len(batch) / secs, loss=float(loss), grad_norm=float(norm),
        unique_tokens=n_unique(batch, setting.objective), processed_tokens=processed, **memory(device),
    )  # fmt: skip


def main() -> None:
    setting, pipe = Setting(**json.loads(sys.argv[1])), Pipe()
    if setting.device == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    batches = batches_of(setting)
    try:
        if setting.contender == "trl":
            import trl_contender

            trl_contender.serve(setting, batches, pipe)
        else:
            serve({"plumb": Plumb, "padded": Padded}[setting.contender](setting), batches, pipe)
    except torch.OutOfMemoryError as error:
        pipe.tell(event="error", error="out of memory", detail=str(error).splitlines()[0])
        sys.exit(3)


if __name__ == "__main__":
    main()
