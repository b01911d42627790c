"""Run one contender of benchmarks/throughput.py, alone in this process: it imports, waits for a
line, builds its models and checks itself on a few pairs, then makes one training step for each line
on its standard input and answers with one JSON line.

A step is the same work for every contender, from token ids to updated weights: assemble the batch,
compute the policy forward and backward, the reference forward, and the loss, clip the gradient
norm, update the weights. `secs` is its wall time, on a GPU between two synchronizations; imports,
models, data sets and compilation come before. Weights are drawn from a fixed seed on the device,
and from another one for the reference, so that losses differ from log 2 and a wrong reference would
show.

    plumb   this repository
    padded  as the 2023 DPO code computes, rewritten: chosen and rejected stacked, padded to the
            longest row of the whole batch, logits at every position, float32 log_softmax over the
            vocabulary; microbatches are cut from that padded batch
    trl     trl.DPOTrainer in its own training loop, fed the same ids (trl_contender.py)

Shapes: B pairs in a microbatch, k responses each, R = k * B rows, T tokens in a row, V vocabulary,
d hidden size.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import os
import re
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

# Plumb's modules are at the repository's root
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import make_tokens
import numpy as np
import torch
import torch.nn.functional as F
from make_tokens import Pair
from settings import Pipe, Setting
from torch import Tensor, nn
from tqdm import tqdm

BETA = 0.1


# ---- the common part ----


class Contender(ABC):
    """Hold the models and the optimizer of a Setting; a subclass turns pairs into microbatches and
    log-probabilities.
    """

    def __init__(self, setting: Setting):
        self.setting = setting
        self.device = torch.device(setting.device)
        self.policy = build_model(setting, seed=0)
        self.reference = (
            build_model(setting, seed=1).eval().requires_grad_(False)
            if setting.objective == "dpo"
            else None
        )
        self.score: nn.Linear | None = None
        # no vocabulary head, which would waste memory and optimizer time
        if setting.objective == "reward":
            self.policy.set_output_embeddings(nn.Identity())
            torch.manual_seed(2)
            dtype = getattr(torch, setting.dtype)
            self.score = nn.Linear(
                self.policy.config.hidden_size, 1, bias=False, dtype=dtype, device=self.device
            )
        self.optimizer = make_optimizer(self.parameters(), setting)
        self.processed = (
            0  # tokens that the policy's forward passes have computed, padding included
        )

    def parameters(self) -> list[nn.Parameter]:
        return [
            *self.policy.parameters(),
            *(self.score.parameters() if self.score is not None else ()),
        ]

    @abstractmethod
    def parts(self, pairs: Sequence[Pair], step: int | None) -> Iterator[tuple[Tensor, int]]:
        """Yield (summed loss, pairs) of one microbatch after another, ready for backward(). `step`
        None: all of them.
        """

    def gradients(self, pairs: Sequence[Pair], step: int | None) -> Tensor:
        """Accumulate the gradient of the mean loss over the timed pairs. Return that mean."""
        n = (self.setting.n_timed or len(pairs)) if step is not None else len(pairs)
        total = torch.zeros((), device=self.device)
        for part, _ in self.parts(pairs, step):
            loss = part / n
            loss.backward()
            total += loss.detach()
        return total

    def step(self, pairs: Sequence[Pair], step: int) -> tuple[Tensor, Tensor]:
        """Make one training step. Return the mean loss and the gradient norm before clipping."""
        loss = self.gradients(pairs, step)
        norm = nn.utils.clip_grad_norm_(self.parameters(), self.setting.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss, norm

    def check(self, pairs: Sequence[Pair]) -> tuple[float, float]:
        """Return mean loss and gradient norm on `pairs` without an update; also the warm-up."""
        loss = float(self.gradients(pairs, None))
        norm = float(
            nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None])
        )
        self.optimizer.zero_grad()
        return loss, norm

    def change(self, changes: dict[str, Any], batches: Sequence[Sequence[Pair]]) -> None:
        """Continue with other settings (Plumb's variants)."""
        for name, value in changes.items():
            setattr(self.setting, name, value)


def build_model(setting: Setting, seed: int) -> Any:
    """Return a causal language model with seeded random weights, drawn on its device."""
    import transformers

    transformers.logging.set_verbosity_error()
    fields = dict(setting.model)
    config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    torch.manual_seed(seed)
    with torch.device(setting.device):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, setting.dtype)
        )
    return model.train()


def make_optimizer(parameters: Sequence[nn.Parameter], setting: Setting) -> torch.optim.Optimizer:
    """Return fused AdamW, the same for every contender."""
    return torch.optim.AdamW(parameters, lr=setting.lr, weight_decay=0.0, fused=True)


def reward_loss(scores: Tensor) -> Tensor:
    """Return the sum of -log sigmoid(chosen - rejected) over pairs; scores [R], chosen first."""
    chosen, rejected = scores.float().chunk(2)
    return -F.logsigmoid(chosen - rejected).sum()


# ---- as in 2023 ----


class Padded(Contender):
    """Pad everything to the longest row of the whole batch, with all logits in float32 and the
    prompt computed once per response.
    """

    def parts(self, pairs: Sequence[Pair], step: int | None) -> Iterator[tuple[Tensor, int]]:
        setting = self.setting
        batch = self.pad(pairs, k=1 if setting.objective == "sft" else 2)
        for start in (
            range(0, len(pairs), setting.microbatch) if step is None else setting.starts(step)
        ):
            part = slice(start, start + setting.microbatch)
            rows = [x[:, part].flatten(0, 1).to(self.device) for x in batch]
            yield self.loss(*rows), len(batch[0][0, part])

    def pad(self, pairs: Sequence[Pair], k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return ids, attention mask and labels (-100 on prompt and padding), [k, B, T] each."""
        width = max(
            len(pair.prompt) + len(response) for pair in pairs for response in pair[1 : 1 + k]
        )
        ids = torch.zeros(k, len(pairs), width, dtype=torch.int64)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for j, pair in enumerate(pairs):
            for i, response in enumerate(pair[1 : 1 + k]):
                start, end = len(pair.prompt), len(pair.prompt) + len(response)
                ids[i, j, :start] = torch.from_numpy(pair.prompt)
                ids[i, j, start:end] = labels[i, j, start:end] = torch.from_numpy(response)
                mask[i, j, :end] = 1
        return ids, mask, labels

    def loss(self, ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        """Return the summed loss of one padded microbatch, each input [R, T]."""
        self.processed += ids.numel()
        if self.score is not None:
            hidden = self.policy.base_model(
                input_ids=ids, attention_mask=mask, use_cache=False
            ).last_hidden_state  # [R, T, d]
            return reward_loss(
                self.score(hidden[torch.arange(len(ids), device=ids.device), mask.sum(1) - 1])[:, 0]
            )
        policy = self.logps(self.policy, ids, mask, labels)
        if self.reference is None:
            return -policy.sum()
        with torch.no_grad():
            reference = self.logps(self.reference, ids, mask, labels)
        (chosen, rejected), (ref_chosen, ref_rejected) = policy.chunk(2), reference.chunk(2)
        return -F.logsigmoid(BETA * (chosen - rejected - (ref_chosen - ref_rejected))).sum()

    @staticmethod
    def logps(model: Any, ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        """Return the summed log-probabilities of the response tokens, from the logits of every
        position.  [R]
        """
        # [R, T-1, V]
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()[:, :-1]
        targets = labels[:, 1:]
        # [R, T-1]
        per_token = logits.log_softmax(-1).gather(2, targets.clamp(min=0).unsqueeze(2)).squeeze(2)
        return (per_token * (targets != -100)).sum(1)


# ---- plumb ----


class PlainIds:
    """Stand in for a tokenizer, where texts are ids already: all of them are ordinary tokens."""

    pad_token_id = 0
    all_special_ids: Sequence[int] = ()

    def __init__(self, n: int):
        self.n = n

    def __len__(self) -> int:
        return self.n


class Plumb(Contender):
    """Run this repository's BasicTrainer, one `step` at a time. Only this class knows its API.

    A reward model does not use the trainer: the body runs on the same rows, with a score at each
    last token.
    """

    def __init__(self, setting: Setting, batches: Sequence[Sequence[Pair]]):
        from plumb.batching.feed import Feed
        from plumb.batching.microbatches import Packing
        from plumb.data.tokenization import Example
        from plumb.models.forward_path import use_tree_attention
        from plumb.training import budget as sizing

        super().__init__(setting)
        k = 1 if setting.objective == "sft" else 2
        examples = [
            Example(pair.prompt, tuple(pair[1 : 1 + k]), "") for batch in batches for pair in batch
        ]
        for model in (self.policy, self.reference):
            if model is not None:
                use_tree_attention(model)
        if setting.compile and setting.device == "cpu":  # --smoke: no compiler is needed
            nn.Module.compile = functools.partialmethod(nn.Module.compile, backend="aot_eager")  # type: ignore[assignment]
        if self.score is None:
            self.trainer = self.make_trainer(examples)
            self.feed = self.trainer.train_feed
            self.optimizer = self.trainer.optimizer
        else:
            spec, dtype = self.policy.config, getattr(torch, setting.dtype)
            free = sizing.memory_at_hand(self.device)
            default = int(free / 2 / sizing.activation_bytes(spec, dtype, 1.0)) // 256 * 256
            budget = setting.budget or max(
                1024, min(16384 if self.device.type == "cuda" else 1024, default)
            )
            self.feed = Feed(
                examples, Packing(True, budget, world_size=1, pad_token_id=0, longest=512), rank=0
            )
        self.where = {
            id(pair.prompt): i for i, pair in enumerate(pair for b in batches for pair in b)
        }
        setting.budget = self.feed.packing.budget

    def make_trainer(self, examples: list[Any]) -> Any:
        """Return the trainer as train.py would build it, with a config composed without Hydra."""
        from omegaconf import OmegaConf

        from plumb.data.examples import lengths_of
        from plumb.losses.registry import build_loss
        from plumb.training.metrics import TrainingLog
        from plumb.training.run_plan import numbers_at_hand, plan_run
        from plumb.training.setup import Data, Reference, Run
        from trainers import BasicTrainer

        setting, root = self.setting, Path(__file__).resolve().parents[1]
        config: Any = OmegaConf.load(root / "config" / "config.yaml")
        config.model = OmegaConf.load(root / "config" / "model" / "blank_model.yaml")
        config.model.policy_dtype = setting.dtype
        config.update(
            {
                "device": setting.device,
                "batch_size": setting.n_pairs,
                "tokens_per_microbatch": setting.budget or None,
                "optimizer": "AdamW",
                "optimizer_args": {"weight_decay": 0.0, "fused": True},
                "lr": setting.lr,
                "warmup_steps": 0,
                "max_grad_norm": setting.max_grad_norm,
                "max_length": 512,
                "compile": setting.compile,
                "shuffle": False,
                "n_epochs": 1,
                "n_examples": None,
                "debug": True,
                "activation_checkpointing": setting.checkpointing,
            }
        )
        knobs: dict[str, Any] = {"name": "sft", "average_over": "examples"}
        if setting.objective == "dpo":
            knobs = {
                "name": "dpo",
                "beta": BETA,
                "label_smoothing": 0.0,
                "divergence": "reverse_kl",
                "alpha": None,
                "normalize": "sum",
                "reference_free": False,
                "nll": 0.0,
            }
        self.log = TrainingLog([], float("inf"))
        tokenizer: Any = PlainIds(self.policy.config.vocab_size)
        loss = build_loss(knobs)
        data: Any = (examples, [])
        lengths = lengths_of(examples).tokens()
        numbers = numbers_at_hand(
            self.policy,
            self.device,
            None,
            mean_tokens=float(lengths.mean()),
            longest=int(lengths.max()),
            repeats=False,
        )
        trainer = BasicTrainer(
            config,
            self.policy,
            Reference(self.reference),
            Run(
                loss=loss,
                data=Data(tokenizer, *data),
                plan=plan_run(config, self.policy.config, loss.needs_reference, numbers),
                fingerprint={},
                run_dir=Path(),
                log=self.log,
            ),
        )
        # The reference is another model on purpose, so that the loss depends on it; the check of
        # the first step would refuse that.
        trainer.state.position.checked = True
        return trainer

    def ready(self, pairs: Sequence[Pair]) -> Any:
        """Return the assembled batch."""
        return self.feed.step(np.array([self.where[id(pair.prompt)] for pair in pairs]))

    def parts(self, pairs: Sequence[Pair], step: int | None) -> Iterator[tuple[Tensor, int]]:
        for batch, _, _ in self.ready(pairs).microbatches:
            self.processed += batch.n_processed(True)
            yield (
                (
                    self.reward(batch)
                    if self.score is not None
                    else self.trainer.scorer(batch).weighted_losses().sum()
                ),
                0,
            )

    def reward(self, batch: Any) -> Tensor:
        """Return the summed loss of one microbatch: its row through the body, then scores of each
        response's last token.
        """
        from plumb.models import tree_attention

        batch = batch.to(self.device)
        hidden = self.policy.base_model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            segments=batch.segments,
            use_cache=False,
            attention_mask=tree_attention.no_mask(self.device),
        ).last_hidden_state  # [1, T, d]
        last = torch.from_numpy(batch.spans[:, 2] + batch.spans[:, 3] - 1).to(self.device)  # [R]
        assert self.score is not None
        return reward_loss(self.score(hidden[0].index_select(0, last))[:, 0])

    def step(self, pairs: Sequence[Pair], step: int) -> tuple[Tensor, Tensor]:
        if self.score is not None:
            return super().step(pairs, step)
        ready = self.ready(pairs)
        self.processed += sum(m.batch.n_processed(True) for m in ready.microbatches)
        self.trainer.started = time.monotonic()
        self.trainer.step(ready, 0.0)
        means, counters = self.log.waiting[-1]
        total, count = means.sums["loss"]
        return total / count, torch.tensor(counters["grad_norm"])

    def change(self, changes: dict[str, Any], batches: Sequence[Sequence[Pair]]) -> None:
        super().change(changes, batches)
        trainer = self.trainer
        if "budget" in changes:
            trainer.packing = self.feed.packing = replace(trainer.packing, budget=changes["budget"])
        if changes.get("reference") == "cached" and self.reference is not None:
            from plumb.training.evaluator import all_logps

            everything, silent = np.arange(len(self.feed.examples)), tqdm(disable=True)
            self.feed.reference = all_logps(
                trainer.scorer, self.reference, self.feed, everything, True, silent
            )
            self.reference = None
            trainer.scorer = replace(trainer.scorer, reference=None)
            gc.collect()


# ---- serve ----


def batches_of(setting: Setting) -> list[list[Pair]]:
    """Return the batches of all steps, the same for every contender: consecutive pairs of the file,
    which starts again when it ends.
    """
    kind, _, scale = setting.tokens.partition(":")
    if kind == "synthetic":
        tokens = make_tokens.synthetic(1024, setting.model["vocab_size"], scale=float(scale or 1))
    else:
        tokens = make_tokens.load(Path(setting.tokens))
    if tokens.vocab_size > setting.model["vocab_size"]:
        raise SystemExit(
            f"{setting.tokens} has {tokens.vocab_size} ids, but the model has"
            f" {setting.model['vocab_size']} embeddings"
        )
    n, size = len(tokens.pairs), setting.n_pairs
    return [
        [tokens.pairs[i % n] for i in range(step * size, (step + 1) * size)]
        for step in range(setting.n_steps)
    ]


class Seconds(NamedTuple):
    """Hold a duration."""

    wall: float
    cpu: float  # of this process, all threads


class Clock:
    """Measure the seconds since `start`; on a GPU until all queued work is done."""

    def __init__(self, device: torch.device):
        self.device = device
        self.started = Seconds(0, 0)

    def start(self) -> None:
        self.synchronize()
        self.started = Seconds(time.perf_counter(), time.process_time())

    def read(self) -> Seconds:
        self.synchronize()
        return Seconds(
            time.perf_counter() - self.started.wall, time.process_time() - self.started.cpu
        )

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def resident(what: str = "VmRSS") -> float:
    """Return this process's resident set, GB (1e9 bytes): now (VmRSS) or at its peak (VmHWM)."""
    status = Path("/proc/self/status")
    if status.exists():  # not getrusage's ru_maxrss, which starts at the parent's peak
        return int(re.findall(rf"{what}:\s+(\d+) kB", status.read_text())[0]) * 1024 / 1e9
    import resource

    return (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        * (1 if sys.platform == "darwin" else 1024)
        / 1e9
    )


class Memory:
    """Measure peaks since the last reset, GB: the resident set of this process, and on a GPU also
    what torch allocated and reserved.

    `working` is the peak minus what is held all the time: what was there before the models were
    built (the imports), the policy's weights, gradients and two moments, and the reference's
    weights.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.base = resident()

    def reset(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    def peaks(self, policy: nn.Module, reference: nn.Module | None) -> dict[str, float]:
        def size(model: nn.Module | None) -> float:
            return (
                sum(p.numel() * p.element_size() for p in model.parameters()) / 1e9
                if model is not None
                else 0.0
            )

        held = 4 * size(policy) + size(reference)
        peak = {"peak_rss_gb": resident("VmHWM")}
        if self.device.type != "cuda":
            return peak | {"working_gb": peak["peak_rss_gb"] - self.base - held}
        allocated = torch.cuda.max_memory_allocated() / 1e9
        return peak | {
            "peak_cuda_gb": allocated,
            "peak_cuda_reserved_gb": torch.cuda.max_memory_reserved() / 1e9,
            "working_gb": allocated - held,
        }


def report(
    setting: Setting,
    pairs: Sequence[Pair],
    step: int,
    secs: Seconds,
    loss: Any,
    norm: Any,
    processed: int,
) -> dict[str, Any]:
    """Return the record of one step, without its memory. Tokens are per pair; `unique` counts each
    prompt once.

    On a CPU the rate is per second of CPU time: the same as wall time on a quiet machine, and still
    meaningful on a shared one.
    """
    unique = sum(
        len(p.prompt) + len(p.chosen) + (len(p.rejected) if setting.objective != "sft" else 0)
        for p in pairs
    )
    n_timed = setting.n_timed or len(pairs)
    return {
        "event": "step",
        "step": step,
        "secs": secs.wall,
        "cpu_secs": secs.cpu,
        "n_timed": n_timed,
        "pairs_per_sec": n_timed / (secs.cpu if setting.device == "cpu" else secs.wall),
        "loss": float(loss),
        "grad_norm": float(norm),
        "unique_tokens": unique / len(pairs),
        "processed_tokens": processed / n_timed,
    }


def serve(contender: Contender, batches: list[list[Pair]], pipe: Pipe, memory: Memory) -> None:
    """Check, then make one step per order until there are no more."""
    setting, device = contender.setting, contender.device
    memory.reset()
    loss, norm = contender.check(batches[0][: setting.n_check])
    pipe.send(event="check", loss=loss, grad_norm=norm, budget=setting.budget)
    clock = Clock(device)
    while (order := pipe.wait()) is not None:
        step, trace = order.pop("step"), order.pop("trace", None)
        if order:
            clock.start()
            contender.change(order, batches)
            pipe.send(event="changed", secs=clock.read().wall, **order)
            memory.reset()
            continue
        before = contender.processed
        with profiler(trace, device):
            clock.start()
            step_loss, step_norm = contender.step(batches[step], step)
            secs = clock.read()
        record = report(
            setting, batches[step], step, secs, step_loss, step_norm, contender.processed - before
        )
        pipe.send(**record, **memory.peaks(contender.policy, contender.reference))


@contextlib.contextmanager
def profiler(path: str | None, device: torch.device) -> Iterator[None]:
    """Write a table of the operators that run in the context, by their own time on the device, to
    `path`.
    """
    if path is None:
        yield
        return
    on_gpu = device.type == "cuda"
    activities = [
        torch.profiler.ProfilerActivity.CPU,
        *([torch.profiler.ProfilerActivity.CUDA] if on_gpu else []),
    ]
    with torch.profiler.profile(activities=activities) as profile:
        yield
    order = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    table = profile.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=60)
    Path(path).write_text(table + "\n")


def main() -> None:
    setting, pipe = Setting(**json.loads(sys.argv[1])), Pipe()
    if setting.device == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    run = serve_trl if setting.contender == "trl" else serve_ours
    batches = batches_of(setting)
    try:
        run(setting, batches, pipe)
    except torch.OutOfMemoryError as error:
        pipe.send(event="error", error="out of memory", detail=str(error).splitlines()[0])
        sys.exit(3)


def serve_ours(setting: Setting, batches: list[list[Pair]], pipe: Pipe) -> None:
    if pipe.wait() is not None:
        memory = Memory(torch.device(setting.device))
        contender = Plumb(setting, batches) if setting.contender == "plumb" else Padded(setting)
        serve(contender, batches, pipe, memory)


def serve_trl(setting: Setting, batches: list[list[Pair]], pipe: Pipe) -> None:
    import trl_contender  # after torch's settings, before the order to build

    if pipe.wait() is not None:
        trl_contender.serve(setting, batches, pipe)


if __name__ == "__main__":
    main()
