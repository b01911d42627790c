"""Run trl.DPOTrainer as a contender: its own training loop, fed with the ids of the other
contenders (see contenders.py).

DPOTrainer 1.16 tokenizes in `_prepare_dataset`; its collator then reads the columns prompt_ids,
chosen_ids and rejected_ids. The data set is built with these columns and `_prepare_dataset` is
skipped, so that ids, EOS and truncation are exactly those of the others. Logging, saving and
evaluation are off, and the order is the data set's. Its time runs from the end of one optimizer
step to the end of the next: fetching and collating batches, forward, backward, reference, clipping,
update.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Sequence
from typing import Any

import datasets
import torch
import trl.trainer.utils
from contenders import BETA, Clock, Memory, build_model, make_optimizer, report
from make_tokens import Pair
from settings import Pipe, Setting
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer

datasets.disable_progress_bars()


class PreTokenized(DPOTrainer):
    """Run DPOTrainer on ready ids, and keep the loss and the gradient norm of each step on the
    device for the check.
    """

    def __init__(self, *arguments: Any, **options: Any):
        self.losses: list[Tensor] = []
        self.norm: Any = None
        self.processed = 0
        super().__init__(*arguments, **options)
        clip = self.accelerator.clip_grad_norm_

        def keep_norm(*a: Any, **k: Any):
            self.norm = clip(*a, **k)
            return self.norm

        self.accelerator.clip_grad_norm_ = keep_norm

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        return dataset

    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self.losses.append(loss.detach())
        self.processed += inputs["input_ids"].numel()
        return loss


class Stamps(TrainerCallback):
    """Check at the start of training, then allow one optimizer step for each order."""

    def __init__(self, setting: Setting, batches: Sequence[Sequence[Pair]], pipe: Pipe):
        self.setting = setting
        self.batches = batches
        self.pipe = pipe
        self.clock = Clock(torch.device(setting.device))
        self.memory = Memory(torch.device(setting.device))
        self.trainer: Any = None
        # seconds to build the trainer, with precompute_ref_log_probs including a pass over the data
        self.prepared_secs = 0.0

    def on_train_begin(self, args, state, control, model=None, **_):
        self.memory.reset()
        loss, norm = check(self.trainer, model, self.setting)
        self.pipe.send(event="check", loss=loss, grad_norm=norm, prepared_secs=self.prepared_secs)
        self.await_order()

    def on_step_end(self, args, state, control, **_):
        secs, trainer = self.clock.read(), self.trainer
        i, loss = state.global_step - 1, torch.stack(trainer.losses).mean()
        record = report(
            self.setting, self.batches[i], i, secs, loss, trainer.norm, trainer.processed
        )
        self.pipe.send(**record, **self.memory.peaks(trainer.model, trainer.ref_model))
        self.await_order()

    def await_order(self) -> None:
        self.trainer.losses.clear()
        self.trainer.processed = 0
        if self.pipe.wait() is None:
            raise SystemExit(0)
        self.clock.start()


def check(trainer: PreTokenized, model: nn.Module, setting: Setting) -> tuple[float, float]:
    """Return mean loss and gradient norm of the check's pairs, the last of the data set, with TRL's
    collator and loss, without an update.
    """
    data: Any = trainer.train_dataset
    rows = [data[len(data) - setting.n_check + i] for i in range(setting.n_check)]
    total = 0.0
    model.train()
    for start in range(0, len(rows), setting.microbatch):
        part = rows[start : start + setting.microbatch]
        inputs = trainer._prepare_inputs(trainer.data_collator(part))
        loss = trainer.compute_loss(model, inputs) * (len(part) / len(rows))
        loss.backward()
        total += float(loss.detach())
    norm = float(
        nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    )
    model.zero_grad()
    return total, norm


def as_row(pair: Pair) -> dict[str, list[int]]:
    return {f"{name}_ids": ids.tolist() for name, ids in zip(Pair._fields, pair, strict=True)}


def pad_only_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer for DPOTrainer, which uses only its padding id: 0, which is masked."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0}, "<pad>")), pad_token="<pad>"
    )


def serve(setting: Setting, batches: list[list[Pair]], pipe: Pipe) -> None:
    """Run one trainer.train() over all batches; each step waits for an order in the callback."""
    n_timed = setting.n_timed or setting.n_pairs
    if n_timed % setting.microbatch:
        raise SystemExit(
            f"{n_timed} pairs are not a multiple of the microbatch of {setting.microbatch}"
        )
    # this name decides which rows the head computes; the kernels have their own
    if setting.responses_only:
        trl.trainer.utils._use_triton = lambda device: True
    stamps = Stamps(setting, batches, pipe)
    policy, reference = build_model(setting, seed=0), build_model(setting, seed=1)
    rows = [
        as_row(pair) for step, batch in enumerate(batches) for pair in timed(setting, batch, step)
    ]
    # after the last step, for the check only
    rows += [as_row(pair) for pair in batches[0][: setting.n_check]]
    with tempfile.TemporaryDirectory() as folder:
        arguments = DPOConfig(
            output_dir=folder,
            use_cpu=setting.device == "cpu",
            bf16=False,
            beta=BETA,
            max_length=None,
            per_device_train_batch_size=setting.microbatch,
            gradient_accumulation_steps=n_timed // setting.microbatch,
            max_steps=setting.n_steps,
            gradient_checkpointing=setting.checkpointing,
            precompute_ref_log_probs=setting.reference == "cached",
            torch_compile=setting.compile,
            max_grad_norm=setting.max_grad_norm,
            learning_rate=setting.lr,
            lr_scheduler_type="constant",
            report_to="none",
            logging_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
            dataset_num_proc=None,
        )
        stamps.clock.start()
        trainer = PreTokenized(
            model=policy,
            ref_model=reference,
            args=arguments,
            processing_class=pad_only_tokenizer(),
            train_dataset=datasets.Dataset.from_list(rows),
            callbacks=[stamps],
            optimizers=(make_optimizer(list(policy.parameters()), setting), None),
        )
        stamps.trainer = trainer
        stamps.prepared_secs = stamps.clock.read().wall
        # as if no reference were given: the precomputed columns take its place
        if setting.reference == "cached":
            trainer.ref_model = None
            del reference
            gc.collect()
        trainer.train()


def timed(setting: Setting, batch: Sequence[Pair], step: int) -> list[Pair]:
    """Return the pairs of a batch that a step runs, in the order of their microbatches."""
    if setting.by_length:
        batch = sorted(
            batch,
            key=lambda pair: len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)),
            reverse=True,
        )
    return [
        pair for start in setting.starts(step) for pair in batch[start : start + setting.microbatch]
    ]
