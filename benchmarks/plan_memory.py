"""Compare the memory that plan=true predicts with the peak memory of small real runs on a CPU; on a
GPU, gpu.py does.

    python benchmarks/plan_memory.py [--savers] [--only WORD] [--out FOLDER]

Each run has its own process (two for FSDPTrainer): two steps of several microbatches on synthetic
texts. The measured value is the resident peak from the first step on, minus what the process held
after all imports. Freed memory goes back to the system at once (MALLOC_MMAP_THRESHOLD_), so the
peak counts what is in use, not what the allocator keeps. The plan is made for a CPU: the head in
smaller chunks, the optimizer one weight at a time. A run that fails leaves the others alone.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from datetime import timedelta
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SIZES = {
    "llama": (
        "hidden_size: 512, intermediate_size: 1376, num_hidden_layers: 8, num_attention_heads: 8,"
        " vocab_size: 32000"
    ),
    "gpt_neox": (
        "hidden_size: 640, intermediate_size: 2560, num_hidden_layers: 10, num_attention_heads: 10,"
        " vocab_size: 16000"
    ),
    "qwen3": (
        "hidden_size: 512, intermediate_size: 1536, num_hidden_layers: 8, num_attention_heads: 8,"
        " num_key_value_heads: 4, head_dim: 64, vocab_size: 32000"
    ),
}
DPO = ["loss=dpo", "loss.beta=0.1"]
FSDP = ["trainer=FSDPTrainer"]
# long responses, and no one to end them: a random model ends one token in 32,000
ROLLOUT = [
    "reward.terms={brief: {rule: shorter}}",
    "rollout.n=8",
    "rollout.max_new_tokens=64",
    "max_prompt_length=256",
]
CASES: list[tuple[str, list[str]]] = [
    ("llama", ["loss=sft", "optimizer=RMSprop"]),
    ("llama", ["loss=sft", "optimizer=AdamW", "activation_checkpointing=true"]),
    ("llama", [*DPO, "optimizer=AdamW", "reference=live"]),
    ("llama", [*DPO, "optimizer=SGD", "reference=cached"]),
    ("gpt_neox", [*DPO, "optimizer=RMSprop", "reference=live"]),
    ("gpt_neox", ["loss=sft", "optimizer=RMSprop", "activation_checkpointing=true"]),
    ("qwen3", ["loss=sft", "optimizer=AdamW"]),
    ("llama", ["loss=sft", "optimizer=RMSprop", "model.fsdp_policy_mp=bfloat16"]),
    ("llama", [*FSDP, "loss=sft", "optimizer=RMSprop"]),
    ("llama", [*FSDP, *DPO, "optimizer=AdamW", "reference=live"]),
    (
        "llama",
        [*FSDP, *DPO, "optimizer=AdamW", "reference=cached", "activation_checkpointing=true"],
    ),
    ("gpt_neox", [*FSDP, "loss=sft", "optimizer=RMSprop", "model.fsdp_policy_mp=bfloat16"]),
    ("llama", [*ROLLOUT, "loss=rloo", "optimizer=AdamW"]),
    ("llama", [*ROLLOUT, "loss=rloo", "optimizer=SGD", "rollout.batch_size=128"]),
    ("llama", [*ROLLOUT, "loss=ppo", "loss.critic=policy", "optimizer=AdamW"]),
    ("gpt_neox", [*ROLLOUT, "loss=ppo", "loss.critic=policy", "optimizer=RMSprop"]),
    ("llama", [*FSDP, *ROLLOUT, "loss=ppo", "loss.critic=policy", "optimizer=AdamW"]),
]


# A run whose activations are the largest part, and what makes it smaller, each alone.
FULL = [*DPO, "optimizer=AdamW", "reference=live", "tokens_per_microbatch=2048"]
SAVERS: list[list[str]] = [
    [],
    ["tokens_per_microbatch=512"],
    ["reference=cached"],
    ["activation_checkpointing=0.5"],
    ["activation_checkpointing=true"],
    ["model.fsdp_policy_mp=bfloat16"],
    ["model.policy_dtype=bfloat16", "stochastic_rounding=true"],
    ["optimizer_state=bfloat16"],
    ["optimizer=AdamW8bit", "optimizer_args=null"],
    ["optimizer=Adafactor", "optimizer_args=null"],
    ["adapter=lora", "lr=1e-5"],
    ["adapter=lora", "lr=1e-5", "model.quantize=nf4"],
]

TINY = (
    "hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2, num_attention_heads: 4,"
    " vocab_size: 16000"
)
# Qwen3 has 32 key heads by default
SMOKE_SIZES = {
    "llama": TINY,
    "gpt_neox": TINY,
    "qwen3": f"{TINY}, num_key_value_heads: 2, head_dim: 16",
}


def overrides(model: str, sizes: str, case: list[str], folder: Path) -> list[str]:
    """Return the options of a case."""
    return [
        "exp_name=plan",
        f"model.architecture={{model_type: {model}, {sizes}, max_position_embeddings: 512}}",
        "model.name_or_path=null",
        f"model.tokenizer_name_or_path={ROOT}/demo/tokenizer",
        f"datasets=[{folder}/texts.jsonl]",
        "eval_share=0.1",
        f"local_dirs=[{folder}/runs]",
        "wandb.enabled=false",
        "debug=true",
        "do_first_eval=false",
        "do_last_eval=false",
        "warmup_steps=0",
        "tokens_per_microbatch=1024",
        "batch_size=16",
        "n_examples=32",
        "optimizer_args={foreach: false}",
        *case,
    ]


def write_texts(file: Path, n: int) -> None:
    """Write n pairs of random words, of different lengths."""
    rng = random.Random(0)
    words = [
        "what",
        "make",
        "people",
        "help",
        "number",
        "water",
        "think",
        "house",
        "good",
        "answer",
    ]
    text = lambda low, high: " " + " ".join(rng.choices(words, k=rng.randint(low, high)))
    rows = [
        {"prompt": text(40, 160), "chosen": text(20, 80), "rejected": text(20, 80)}
        for _ in range(n)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


# ---- the measured processes ----


def status(field: str) -> int:
    """Return VmRSS or VmHWM of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def work(config, out: str) -> None:
    """Train, and write the peak beyond what the process held before."""
    import train
    import trainers
    from plumb.console import rank
    from plumb.distributed import collectives

    before, loop = status("VmRSS"), trainers.BasicTrainer.train

    def from_here(self):
        Path("/proc/self/clear_refs").write_text("5")  # loading is not part of the plan
        return loop(self)

    trainers.BasicTrainer.train = from_here  # type: ignore[method-assign]
    train.train(config)
    peak = max(collectives.all_gather_object(status("VmHWM") - before))
    if rank() == 0:
        Path(out).write_text(json.dumps(peak))


def measure(arguments: list[str], out: str) -> None:
    """Measure one run, started as its trainer starts."""
    import hydra

    import train  # noqa: F401  registers the resolver
    from plumb.distributed import launch
    from plumb.settings.validation import validate

    with hydra.initialize_config_dir(str(ROOT / "config"), version_base="1.3"):
        config = hydra.compose("config", arguments)
    validate(config)
    if config.trainer == "BasicTrainer":
        work(config, out)
    else:
        launch.launch(
            work, (config, out), n_cpu_processes=2, port=None, timeout=timedelta(minutes=10)
        )


def predict(arguments: list[str], gpu: bool) -> dict[str, float]:
    """Return the GB by kind of the plan, made for a CPU or for one GPU."""
    import hydra
    import torch

    import train  # noqa: F401
    from plumb.planning import plan
    from plumb.settings.validation import validate

    plan.GPU = torch.device("cuda" if gpu else "cpu")
    several = "trainer=FSDPTrainer" in arguments and not gpu
    with hydra.initialize_config_dir(str(ROOT / "config"), version_base="1.3"):
        config = hydra.compose(
            "config", [*arguments, "plan=true", f"plan_gpus={2 if several else 1}"]
        )
    loss = validate(config)
    planned = plan.make_plan(
        config, loss, plan.read_model(config, loss), plan.read_data(config, loss)
    )
    kinds = {kind: values[0] / 1e9 for kind, values in planned.memory.kinds.items()}
    return kinds | {"all": planned.memory.peak / 1e9}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="only the cases whose text has this word")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(".cache/benchmarks/plan"),
        help="folder (default %(default)s)",
    )
    parser.add_argument(
        "--smoke", action="store_true", help="tiny models: tests the code, measures nothing"
    )
    parser.add_argument(
        "--savers",
        action="store_true",
        help="one run, and again with each option that saves memory",
    )
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    failed = []
    rows = ["| run | GB planned | GB measured | error |", "|---|---|---|---|"]
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "OMP_NUM_THREADS": "1",
    }
    cases = [("llama", [*FULL, *more]) for more in SAVERS] if options.savers else CASES
    with tempfile.TemporaryDirectory() as name, (options.out / "plan.jsonl").open("w") as log:
        folder = Path(name)
        write_texts(folder / "texts.jsonl", 48)
        for model, case in cases:
            text = f"{model} {' '.join(case[len(FULL) :] if options.savers else case)}".strip()
            if options.only not in text:
                continue
            sizes = (SMOKE_SIZES if options.smoke else SIZES)[model]
            arguments = overrides(model, sizes, case, folder)
            call = json.dumps([arguments, str(folder / "peak")])
            command = [
                sys.executable,
                "-c",
                (
                    "import json, sys; sys.path.insert(0, sys.argv[1]); import plan_memory as p; "
                    "p.measure(*json.loads(sys.argv[2]))"
                ),
                str(Path(__file__).parent),
                call,
            ]
            done = subprocess.run(command, cwd=ROOT, env=environment, stdout=sys.stderr)
            if done.returncode:
                failed.append(text)
                rows.append(f"| {text} | failed | | |")
                continue
            measured = json.loads((folder / "peak").read_text()) / 1e9
            planned = predict(arguments, False)
            error = planned["all"] / measured - 1
            rows.append(f"| {text} | {planned['all']:.2f} | {measured:.2f} | {error:+.1%} |")
            record = {"run": text, "planned_gb": planned["all"], "measured_gb": measured}
            print(json.dumps(record), file=log, flush=True)
            print(rows[-1], {k: round(v, 3) for k, v in planned.items()}, flush=True)
    (options.out / "plan.md").write_text("\n".join(rows) + "\n")
    print("\n".join(rows))
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
