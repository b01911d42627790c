"""Which knob people mean by what they write: other trainers' names, and misspellings."""

from __future__ import annotations

import difflib

import yaml

from plumb.paths import CONFIG
from plumb.settings.schema import KNOBS

# Names of TRL, transformers and LLaMA-Factory whose value is the same here.
SAME_VALUE = {
    "learning_rate": "lr",
    "num_train_epochs": "n_epochs",
    "epochs": "n_epochs",
    "train_batch_size": "batch_size",
    "per_device_eval_batch_size": "eval_batch_size",
    "model_name_or_path": "model.name_or_path",
    "model_name": "model.name_or_path",
    "tokenizer_name": "model.tokenizer_name_or_path",
    "model_revision": "model.revision",
    "torch_dtype": "model.policy_dtype",
    "dtype": "model.policy_dtype",
    "gradient_checkpointing": "activation_checkpointing",
    "lr_scheduler_type": "lr_schedule",
    "max_seq_length": "max_length",
    "cutoff_len": "max_length",
    "truncation_side": "truncation_mode",
    "output_dir": "local_run_dir",
    "run_name": "exp_name",
    "project": "wandb.project",
    "template": "chat_template",
    "val_size": "eval_share",
    "save_total_limit": "keep_checkpoints",
    "pref_beta": "loss.beta",
    "dpo_beta": "loss.beta",
    "rpo_alpha": "loss.nll",
    "pref_ftx": "loss.nll",
    "max_samples": "n_examples",
    "train_dataset": "datasets",
    "eval_dataset": "eval_datasets",
    "simpo_gamma": "loss.gamma",
    "dpo_label_smoothing": "loss.label_smoothing",
    "kto_chosen_weight": "loss.desirable_weight",
    "kto_rejected_weight": "loss.undesirable_weight",
    "f_divergence_type": "loss.divergence",
    "f_alpha_divergence_coef": "loss.alpha",
    "center_rewards_coefficient": "loss.centering",
    "router_aux_loss_coef": "router_aux_loss",
    "ref_model_sync_steps": "reference_update_every",
    "ref_model_mixup_alpha": "reference_update_weight",
    "num_generations": "rollout.n",
    "max_completion_length": "rollout.max_new_tokens",
    "temperature": "rollout.temperature",
    "num_iterations": "rollout.uses",
    "ppo_epochs": "rollout.uses",
    "steps_per_generation": "rollout.batches",
    "epsilon": "loss.clip_low",
    "epsilon_high": "loss.clip_high",
    "importance_sampling_level": "loss.ratio",
    "scale_rewards": "loss.scale",
    "ppo_target": "loss.kl_target",
    "vllm_gpu_memory_utilization": "rollout.vllm_memory",
    "create_new_adapter": "adapter_previous",
    "lora_r": "adapter_rank",
    "lora_rank": "adapter_rank",
    "lora_alpha": "adapter_alpha",
    "lora_target": "adapter_targets",
    "lora_target_modules": "adapter_targets",
    "use_rslora": "adapter_rslora",
}
# Those that say something in another way: what to write here.
OTHERWISE = {
    "loss_type": "loss=dpo for sigmoid, otherwise the loss of that name, such as loss=ipo",
    "pref_loss": "loss=dpo for sigmoid, otherwise the loss of that name, such as loss=simpo",
    "loss_weights": "loss=mix",
    "reward_funcs": "reward.terms, as docs/rollouts.md describes",
    "reward_weights": "reward.terms, each with its weight",
    "reward_model": "reward.terms='{rm: {model: RUN}}'",
    "precompute_ref_log_probs": "reference=cached",
    "sync_ref_model": "reference_update_every, in optimizer steps",
    "use_vllm": "rollout.engine=vllm",
    "ld_alpha": "loss=ld_dpo",
    "use_weighting": "loss=wpo",
    "use_dora": "adapter=dora",
    "pissa_init": "adapter_init=pissa",
    "pure_bf16": "model.policy_dtype=bfloat16 stochastic_rounding=true",
    "ppo_score_norm": "reward.scale=running",
    "mask_truncated_completions": "reward.missing_eos and reward.overlong, which are penalties",
    "top_k": "nothing: what is trained is sampled from the whole distribution",
    "top_p": "nothing: what is trained is sampled from the whole distribution",
    "per_device_train_batch_size": "batch_size, which counts the examples of a step on all GPUs",
    "max_steps": "n_examples, which is steps times batch_size",
    "warmup_ratio": "warmup_steps, a number of steps",
    "optim": "optimizer, a name in torch.optim such as AdamW",
    "weight_decay": "optimizer=AdamW optimizer_args='{weight_decay: 0.01}'",
    "adam_beta1": "optimizer_args='{betas: [0.9, 0.999]}'",
    "adam_beta2": "optimizer_args='{betas: [0.9, 0.999]}'",
    "bf16": "model.fsdp_policy_mp=bfloat16",
    "fp16": "model.fsdp_policy_mp=bfloat16",
    "dataset": "datasets=[my.jsonl] or datasets=[owner/name]",
    "dataset_name": "datasets=[owner/name]",
    "dataset_dir": "datasets=[/path/to/folder]",
    "dataset_config": "datasets=[owner/name:subset]",
    "train_file": "datasets=[my.jsonl]",
    "eval_steps": "eval_every, in training examples",
    "save_steps": "save_every, in training examples",
    "eval_strategy": "eval_every, in training examples",
    "save_strategy": "save_every, in training examples, or save_every_minutes",
    "logging_steps": "minimum_log_interval_secs; metrics.jsonl has every step",
    "resume_from_checkpoint": "resume=auto",
    "report_to": "wandb.enabled=true or false",
    "ref_model": "model.archive or model.name_or_path, from which the reference is loaded too",
    "pref_loss_type": "loss=dpo, or another file of config/loss",
    "use_peft": "adapter=lora",
    "load_in_4bit": "adapter=lora model.quantize=nf4",
    "load_in_8bit": "adapter=lora model.quantize=int8",
    "quantization_bit": "adapter=lora model.quantize=nf4, or int8",
    "finetuning_type": "adapter=lora, or adapter=none to train all weights",
    "do_train": "nothing: train.py trains",
    "packing": "nothing: rows are always packed",
    "deepspeed": "trainer=FSDPTrainer",
    "fsdp": "trainer=FSDPTrainer",
    "num_gpus": "trainer=FSDPTrainer, which uses all visible GPUs",
    "push_to_hub": "export=hf, then upload the folder",
}


def hint(argument: str) -> str:
    """Return which knob an unknown one may mean, as "; did you mean ...?"; "" for none.

    >>> hint("learning_rate=1e-5"), hint("bach_size=8"), hint("beta=0.1"), hint("zzz=1")
    ('; did you mean lr=1e-5?', '; did you mean batch_size=8?', '; did you mean loss.beta=0.1?', '')
    """
    name, equals, value = argument.partition("=")
    name = name.lstrip("+-").replace("-", "_")
    if name in OTHERWISE:
        return f"; here: {OTHERWISE[name]}"
    ours = SAME_VALUE.get(name) or _nearest(name)
    return f"; did you mean {ours}{equals}{value}?" if ours else ""


def _nearest(name: str) -> str | None:
    """Return the knob with this last part, otherwise the most similar one."""
    known = [*KNOBS, *_loss_knobs()]
    by_last_part = [knob for knob in known if knob.rpartition(".")[2] == name]
    if by_last_part:
        return by_last_part[0]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    return near[0] if near and near[0] != name else None


def _loss_knobs() -> list[str]:
    """Return the knobs of all losses, those of the most losses first."""
    counts: dict[str, int] = {}
    for file in sorted((CONFIG / "loss").glob("*.yaml")):
        for key in yaml.safe_load(file.read_text("utf-8")) or {}:
            if key != "name":
                counts[f"loss.{key}"] = counts.get(f"loss.{key}", 0) + 1
    return sorted(counts, key=lambda knob: -counts[knob])
