"""Train a LoRA adapter by DPO with TRL's DPOTrainer and peft, for benchmarks/adapters.py:
`python benchmarks/trl_adapter.py FOLDER OPTION ...`.

The options are those of train.py exp=demo_dpo: model, data, order of the examples, token ids, beta,
learning rate, warmup and AdamW are those of Plumb's own run, and so are the adapter's rank, alpha
and modules. The reference is the model with its adapter off, as DPOTrainer has it. Prints one line
of JSON with what adapters.py shows of a run.
"""

from __future__ import annotations

import json
import resource
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train  # noqa: E402, F401  registers the resolver of the config
from plumb.data.prepare import load_examples  # noqa: E402
from plumb.models.adapters import target_modules  # noqa: E402
from plumb.models.load import load_policy, load_tokenizer  # noqa: E402
from plumb.settings.hydra_guard import spelled_out  # noqa: E402
from plumb.training.optimizers import lr_factor, make_schedule  # noqa: E402

datasets.disable_progress_bars()
MICROBATCH = 4


class PreTokenized(DPOTrainer):
    """Take rows of ids, in their order."""

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        return dataset

    def _get_train_sampler(self, train_dataset=None):
        return torch.utils.data.SequentialSampler(train_dataset or self.train_dataset)


def main() -> None:
    folder, *overrides = sys.argv[1:]
    import hydra

    with hydra.initialize_config_dir(str(ROOT / "config"), version_base="1.3"):
        config = hydra.compose("config", spelled_out(["exp=demo_dpo", *overrides]))
    tokenizer = load_tokenizer(config)
    train_examples, held_out = load_examples(config, tokenizer, "pair")
    steps = list(make_schedule(config, len(train_examples)))
    model: Any = load_policy(config)
    model.set_attn_implementation("sdpa")  # Plumb's own needs its batches
    lora = LoraConfig(
        r=config.adapter_rank,
        lora_alpha=config.adapter_alpha,
        lora_dropout=0.0,
        target_modules=target_modules(model, None, config.model.block_name),
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, lora)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.lr)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor(config, len(steps)))
    pad = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0}, "<pad>")), pad_token="<pad>"
    )
    trainer = PreTokenized(
        model=model,
        args=arguments(config, Path(folder) / "trl", len(steps)),
        processing_class=pad,
        train_dataset=rows(train_examples, chain.from_iterable(steps)),
        eval_dataset=rows(held_out, range(len(held_out))),
        optimizers=(optimizer, scheduler),
    )
    trainer.train()
    after = trainer.evaluate()
    first = next(log["loss"] for log in trainer.state.log_history if "loss" in log)
    files = [file for file in (Path(folder) / "trl").rglob("*") if file.is_file()]
    shown = {
        "first_loss": first,
        "accuracy": after["eval_rewards/accuracies"],
        "margin": after["eval_rewards/margins"],
        "trained": sum(p.numel() for p in trained),
        "memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "checkpoint_mb": sum(file.stat().st_size for file in files) / 1e6,
    }
    print(json.dumps(shown))


def rows(examples: Any, order: Any) -> datasets.Dataset:
    """Return the examples in this order, as DPOTrainer's collator reads them."""
    made = []
    for i in order:
        example = examples[int(i)]
        chosen, rejected = (ids.tolist() for ids in example.responses)
        prompt = example.prompt.tolist()
        made.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
    return datasets.Dataset.from_list(made)


def arguments(config: Any, folder: Path, n_steps: int) -> DPOConfig:
    """Return the arguments of the run; a checkpoint is written after its last step."""
    return DPOConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        beta=config.loss.beta,
        max_length=None,
        per_device_train_batch_size=MICROBATCH,
        per_device_eval_batch_size=MICROBATCH,
        gradient_accumulation_steps=config.batch_size // MICROBATCH,
        max_steps=n_steps,
        gradient_checkpointing=False,
        max_grad_norm=config.max_grad_norm,
        report_to="none",
        logging_steps=1,
        save_strategy="steps",
        save_steps=n_steps,
        disable_tqdm=True,
    )


if __name__ == "__main__":
    main()
