"""Train DPO with trl.DPOTrainer as its documentation shows, saving after every step: the other
contender of reliability_trl.py.

    python benchmarks/trl_dpo.py MODEL DATA.jsonl RUN_DIR N_STEPS
        [--resume] [--lr X] [--batch N] [--jit]

--resume: `resume_from_checkpoint=True` if there is a checkpoint (without one, TRL refuses, and a
script would start from the beginning). --jit: transformers' `enable_jit_checkpoint`, which handles
SIGTERM.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("n_steps", type=int)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--jit", action="store_true")
    at = parser.parse_args()
    arguments = DPOConfig(
        output_dir=str(at.run_dir),
        per_device_train_batch_size=at.batch,
        max_steps=at.n_steps,
        learning_rate=at.lr,
        warmup_steps=2,
        max_length=96,
        seed=0,
        save_strategy="steps",
        save_steps=1,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        bf16=False,
        enable_jit_checkpoint=at.jit,
        disable_tqdm=True,
    )
    rows = load_dataset(
        "json", data_files=at.data, split="train", cache_dir=str(at.run_dir.with_suffix(".cache"))
    )
    model = AutoModelForCausalLM.from_pretrained(at.model)
    tokenizer = AutoTokenizer.from_pretrained(at.model)
    trainer = DPOTrainer(
        model=model, args=arguments, processing_class=tokenizer, train_dataset=rows
    )
    trainer.train(
        resume_from_checkpoint=True if at.resume and any(at.run_dir.glob("checkpoint-*")) else None
    )


if __name__ == "__main__":
    main()
