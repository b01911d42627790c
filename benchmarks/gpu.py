"""Run everything worth knowing on one 80 GB GPU, in at most 9 minutes and without a network:
`bash benchmarks/gpu.sh`.

    trees       log-probabilities and gradients of packed trees beside padded rows, eight families
    throughput  DPO of 2.8B and 1B shapes beside TRL and the manner of 2023 (throughput.py)
    steps       the first step and 20 steps of DPO, on the GPU beside a CPU
    adapters    all weights, LoRA and, with bitsandbytes, QLoRA
    fsdp        FSDPTrainer on one GPU beside BasicTrainer
    sampler     tokens per second beside transformers' generate (rollouts.py)
    memory      further peaks beside what plan=true says, as adapters and fsdp have them, too

Each part is a process group of its own with a time limit, and none stops the others; what a part
has measured stands, however it ends. The folder --out gets summary.md, summary.jsonl and a folder
for each part, with its log and what it measured. A part is `ok`, `failed` (it ended with an error,
or a number is wrong), `out of time`, `stopped` (Ctrl-C or SIGTERM, which end the whole run) or
`skipped` (a library is missing). The exit code is 1 if any is neither ok nor skipped.

Written for torch 2.11 to 2.13 and transformers 5.17 to 5.23. Libraries that cannot be imported are
named, with the command that makes their wheels elsewhere; those in the folder --wheels are
installed, for this run only. `--smoke` runs all of it on a CPU at tiny shapes, where the numbers
mean nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gpu_runner import (
    HERE,
    NEEDED,
    ROOT,
    TRAINING,
    Part,
    Place,
    Row,
    environment,
    find_lacking,
    gpu_name,
    import_once,
    install,
    measured,
    missing_line,
    read_rows,
    run_part,
    start,
    write_summary,
)

sys.path.insert(0, str(ROOT))

MINUTES = 8.8  # for all parts; what is left of nine is for the start and the summary
DEMO = [
    "wandb.enabled=false",
    "datasets=[./demo]",
    "loss=dpo",
    "loss.beta=0.1",
    "debug=true",
    "do_first_eval=false",
    "do_last_eval=false",
    "sample_during_eval=false",
    "minimum_log_interval_secs=0",
    "warmup_steps=0",
    "optimizer=AdamW",
    "tokens_per_microbatch=8192",
    "max_length=128",
    "max_prompt_length=64",
]
SHAPE = {  # 0.55 billion parameters: large enough for a GPU, small enough to start in seconds
    "hidden_size": 1536,
    "intermediate_size": 4096,
    "num_hidden_layers": 16,
    "num_attention_heads": 12,
}
TINY_SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


# ---- trees beside padded rows ----

# head sizes: 64, 128, 256; 80 as Pythia 2.8B; 36, no multiple of 8; 320, more than flash attention
# has; fewer key heads; windows
FAMILIES: dict[str, Row] = {
    "llama": {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2},
    "gpt_neox": {"hidden_size": 320, "num_attention_heads": 4, "rotary_pct": 0.25},
    "mistral": {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 48},
    "qwen2": {"hidden_size": 144, "num_attention_heads": 4, "num_key_value_heads": 2},
    "qwen3": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128},
    "gemma3_text": {
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "sliding_window": 48,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "olmo2": {"hidden_size": 640, "num_attention_heads": 2, "num_key_value_heads": 2},
    "phi3": {"num_attention_heads": 4, "num_key_value_heads": 4, "pad_token_id": 0},
}
SIZES = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.06,  # three times as wide as usual, so that differences show
}


def run_trees(at: Place) -> None:
    """Compare each family in a process of its own: what CUDA makes of one stays with it."""
    failed = []
    for family in FAMILIES:
        process = start(compare_trees, at, family)
        process.join()
        if process.exitcode:
            failed.append(family)
    if failed:
        raise SystemExit(f"{', '.join(failed)} failed")


def compare_trees(at: Place, family: str) -> None:
    """Compare packed trees with padded rows: in float32, which must agree, and in bfloat16, where
    both differ from float32 by as much.
    """
    import make_tokens
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from plumb.batching.layout import pack
    from plumb.data.tokenization import Example
    from plumb.models.forward_path import ForwardPath, use_tree_attention
    from plumb.models.logps import response_logps

    pairs = make_tokens.synthetic(2 if at.smoke else 8, 2000, scale=0.3 if at.smoke else 1).pairs
    examples = [Example(pair.prompt, pair[1:], "") for pair in pairs]
    batch = pack(examples, pad_token_id=0, longest=512).to(torch.device(at.device))
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(SIZES | FAMILIES[family]))
    model: Any = AutoModelForCausalLM.from_config(config).to(at.device)
    use_tree_attention(model)

    def compute(packed: bool) -> tuple[Any, Any]:
        model.zero_grad()
        logps = response_logps(model, batch, ForwardPath(packed, plain_head=True))
        logps.mean().sum().backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        return logps.mean().detach().double(), torch.cat(gradients).double()

    row: Row = {"family": family, "head size": head_size(config)}
    truth = compute(False)
    results = {"trees, float32": compute(True)}
    model.to(torch.bfloat16)
    results["padded, bfloat16"] = compute(False)
    results["trees, bfloat16"] = compute(True)
    for name, (logps, gradients) in results.items():
        row[f"{name}: nats per token"] = float((logps - truth[0]).abs().max())
        row[f"{name}: gradient"] = float((gradients - truth[1]).norm() / truth[1].norm())
    with (at.folder / "trees.jsonl").open("a") as file:
        print(json.dumps(row), file=file)


def head_size(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def rows_of_trees(at: Place) -> list[Row]:
    """Return the errors of each family. Those of trees in bfloat16 may be three times as large as
    those of padded rows, which are rounded in another order.
    """
    rows = read_rows(at.folder / "trees.jsonl")
    for row in rows:
        exact = row["trees, float32: nats per token"] < 1e-4
        exact = exact and row["trees, float32: gradient"] < 1e-3
        rounded = all(
            row[f"trees, bfloat16: {what}"] < 3 * row[f"padded, bfloat16: {what}"] + 1e-3
            for what in ("nats per token", "gradient")
        )
        row["ok"] = exact and rounded
    return rows


# ---- runs of train.py ----


def run_train(
    at: Place, runs: Mapping[str, Sequence[str]], *common: str, plan: bool = True
) -> None:
    """Run train.py once for each of `runs`, name -> options, whatever became of the one before, and
    write what plan=true says of its memory (--smoke: of the last only). Raise SystemExit at the end
    if one failed.
    """
    failed = []
    for name, options in runs.items():
        folder = at.folder / name.replace(" ", "_")
        words = [f"exp_name={folder.name}", f"local_run_dir={folder}", *DEMO, *common, *options]
        process = start(_train, words)
        if plan and (not at.smoke or name == [*runs][-1]):  # meanwhile
            planning = start(_plan, words, at.device, at.folder / f"{folder.name}.planned")
            planning.join()
            if planning.exitcode:
                failed.append(f"the plan of {name}")
        process.join()
        if process.exitcode:
            failed.append(name)
    if failed:
        raise SystemExit(f"{', '.join(failed)} failed")


def _train(words: Sequence[str]) -> None:
    import train

    train.run(train.compose(words))


def _plan(words: list[str], device: str, file: Path) -> None:
    import plan_memory

    file.write_text(str(plan_memory.predict(words, device == "cuda")["all"]))


def common_options(at: Place) -> list[str]:
    """Return the options of runs of a Llama of SHAPE, whose random weights are drawn on the device
    and saved, once for all parts, since a CPU would take longer than the steps.
    """
    folder = at.folder.parent / "model"
    if not folder.exists():
        process = start(_save_model, at, folder)
        process.join()
    return [
        f"model.name_or_path={folder}",
        "model.tokenizer_name_or_path=demo/tokenizer",
        "batch_size=8" if at.smoke else "batch_size=128",
        "n_examples=24" if at.smoke else "n_examples=1280",
        "reference=live",
        *([] if at.smoke else ["model.fsdp_policy_mp=bfloat16"]),
    ]


def _save_model(at: Place, folder: Path) -> None:
    from contenders import build_model
    from settings import Setting

    shape = (TINY_SHAPE if at.smoke else SHAPE) | {"vocab_size": 2048 if at.smoke else 32000}
    fields = {"model_type": "llama", **shape, "max_position_embeddings": 512}
    setting = Setting("", "plumb", fields, at.tokens, device=at.device, dtype="bfloat16")
    build_model(setting, seed=0).save_pretrained(folder.with_suffix(".part"))
    folder.with_suffix(".part").rename(folder)


def speed_and_memory(at: Place, runs: Mapping[str, Sequence[str]]) -> list[Row]:
    """Return what the steps of each run show, after two that warm it up; a run that made none has
    no row. On a GPU the plan may be a fifth off, and the first loss is log 2.
    """
    rows: list[Row] = []
    for name in runs:
        folder = at.folder / name.replace(" ", "_")
        steps = [row for row in read_rows(folder / "metrics.jsonl") if "loss/train" in row]
        if not steps:
            continue
        counted = steps[2:] or steps
        row: Row = {
            "run": name,
            "steps": len(steps),
            "pairs per second": statistics.median(s["examples_per_second"] for s in counted),
            "MFU": statistics.median(s.get("mfu", math.nan) for s in counted),
            "peak GB": max(s["peak_memory_gb"] for s in steps),
            "first loss": steps[0]["loss/train"],
            "last loss": steps[-1]["loss/train"],
            "ok": abs(steps[0]["loss/train"] - math.log(2)) < 1e-3,
        }
        file = at.folder / f"{folder.name}.planned"
        if planned := file.read_text() if file.exists() else "":
            row["GB planned"] = float(planned)
            row["plan's error"] = float(planned) / row["peak GB"] - 1
            row["ok"] &= at.smoke or abs(row["plan's error"]) < 0.2
        rows.append(row)
    return rows


def largest_difference(at: Place, name: str, other: str) -> float:
    """Return the largest relative difference between the losses of two runs' steps."""
    a, b = (
        [row["loss/train"] for row in read_rows(at.folder / x / "metrics.jsonl")]
        for x in (name, other)
    )
    return max((abs(x / y - 1) for x, y in zip(a, b, strict=False)), default=math.nan)


# ---- DPO on the GPU beside a CPU ----

STEP_RUNS = {
    "cpu": ["device=cpu"],
    "gpu": [],
    "gpu_bfloat16": ["model.fsdp_policy_mp=bfloat16"],
}


def run_steps(at: Place) -> None:
    size, steps = (4, 3) if at.smoke else (16, 20)
    common = ["model=demo", f"batch_size={size}", f"n_examples={size * steps}"]
    common += ["lr=1e-4", "reference=live"]
    run_train(at, STEP_RUNS, *common, plan=False)


def rows_of_steps(at: Place) -> list[Row]:
    """Return what each run's steps show. In float32 the GPU's losses equal the CPU's to 1e-3, and
    every first step has margin 0 and loss log 2, up to what another kernel rounds.
    """
    rows = []
    for name in STEP_RUNS:
        steps = read_rows(at.folder / name / "metrics.jsonl")
        if steps:
            loss, margin = (steps[0][key] for key in ("loss/train", "rewards_train/margins"))
            differs = largest_difference(at, name, "cpu")
            row = {"run": name, "steps": len(steps), "first loss": loss, "first margin": margin}
            row |= {
                "last loss": steps[-1]["loss/train"],
                "losses differ from the CPU's by": differs,
            }
            rounded = "16" in name
            row["ok"] = max(abs(margin), abs(loss - math.log(2))) < (1e-2 if rounded else 1e-5)
            row["ok"] &= differs < (5e-2 if rounded else 1e-3)
            rows.append(row)
    return rows


# ---- FSDPTrainer beside BasicTrainer ----

FSDP_RUNS = {"BasicTrainer": [], "FSDPTrainer": ["trainer=FSDPTrainer"]}


def run_fsdp(at: Place) -> None:
    runs = dict(FSDP_RUNS)
    if at.smoke:
        runs["FSDPTrainer"] = [*runs["FSDPTrainer"], "n_cpu_processes=1"]
    run_train(at, runs, *common_options(at), "lr=1e-5")


def rows_of_fsdp(at: Place) -> list[Row]:
    """Return both; their losses agree: to 1e-4 in float32, to 2e-2 in bfloat16."""
    rows = speed_and_memory(at, FSDP_RUNS)
    for row in rows:
        if row["run"] != "BasicTrainer":
            differs = largest_difference(at, row["run"], "BasicTrainer")
            row["losses differ by"] = differs
            row["ok"] &= differs < (1e-4 if at.smoke else 2e-2)
    return rows


# ---- adapters ----

ADAPTER_RUNS = {
    "all weights": ["lr=1e-5"],
    "LoRA": ["adapter=lora", "lr=1e-4"],
    "QLoRA": ["adapter=lora", "lr=1e-4", "model.quantize=nf4"],
}


def run_adapters(at: Place) -> None:
    runs = dict(ADAPTER_RUNS)
    if importlib.util.find_spec("bitsandbytes") is None:
        del runs["QLoRA"]
    run_train(at, runs, *common_options(at))


def rows_of_adapters(at: Place) -> list[Row]:
    rows = speed_and_memory(at, ADAPTER_RUNS)
    if rows and importlib.util.find_spec("bitsandbytes") is None:
        rows.append({"run": "QLoRA", "note": "not run: no bitsandbytes here"})
    return rows


# ---- peak memory beside plan=true ----

MEMORY_RUNS = {
    "activation checkpointing": ["activation_checkpointing=true"],
    "bfloat16 weights": ["model.policy_dtype=bfloat16", "optimizer=RMSprop"],
    "cached reference": ["reference=cached"],
}


def run_memory(at: Place) -> None:
    names = list(MEMORY_RUNS)[: 1 if at.smoke else None]
    run_train(at, {name: MEMORY_RUNS[name] for name in names}, *common_options(at), "lr=1e-5")


def rows_of_memory(at: Place) -> list[Row]:
    return speed_and_memory(at, MEMORY_RUNS)


# ---- the parts that are benchmarks of their own ----


def run_script(at: Place, script: str, *arguments: str) -> None:
    """Run a benchmark. Raise SystemExit if it fails."""
    command = [sys.executable, str(HERE / script), *arguments]
    code = subprocess.run(command, cwd=ROOT).returncode
    if code:
        raise SystemExit(f"{script} ended with code {code}")


def run_throughput(at: Place) -> None:
    common = ["--out", str(at.folder)]
    if at.smoke:
        run_script(at, "throughput.py", "--smoke", "--scenarios", "sweep", *common)
        return
    minutes = f"{max(at.secs - 15, 5) / 60:.2f}"
    common += ["--tokens", at.tokens, "--minutes", minutes, "--scenarios", "2.8b,compiled,1b"]
    run_script(at, "throughput.py", "--device", "cuda", *common)


def rows_of_throughput(at: Place) -> list[Row]:
    """Return the median of each contender's steps, and Plumb's MFU on a known card."""
    records = read_rows(at.folder / "throughput.jsonl")
    steps = [r for r in records if r["event"] == "step"]
    rows: list[Row] = []
    for scenario, label in dict.fromkeys((r["scenario"], r["label"]) for r in steps):
        mine = [r for r in steps if (r["scenario"], r["label"]) == (scenario, label)]
        speed = statistics.median(r["pairs_per_sec"] for r in mine)
        row = {"scenario": scenario, "contender": label, "pairs per second": speed}
        row["least"] = min(r["pairs_per_sec"] for r in mine)
        row["largest"] = max(r["pairs_per_sec"] for r in mine)
        memory = "peak_rss_gb" if at.device == "cpu" else "peak_cuda_gb"
        row["peak GB"] = max(r[memory] for r in mine)
        if mine[0]["contender"] == "plumb":
            size = "1b" if scenario == "1b" else "2.8b"
            row["MFU"] = mfu(at, speed, size, live="cached" not in label)
        rows.append(row)
    for r in records:
        if r["event"] in ("failed", "skipped"):
            note = str(r.get("error") or r.get("why"))
            row = {"scenario": r["scenario"], "contender": r["label"], "note": note}
            if r["contender"] == "plumb" and "time" not in note:
                row["ok"] = False
            rows.append(row)
        elif r["event"] == "device" and "tflops" in r:
            rows.append({"scenario": "device", "contender": r["what"], "TFLOP/s": r["tflops"]})
        elif r["event"] == "device" and not r["ok"]:
            rows.append({"scenario": "device", "contender": r["what"], "ok": False})
    return rows


def mfu(at: Place, pairs_per_sec: float, size: str, live: bool) -> float | None:
    """Return the share of the card's peak: 3 passes of the policy, and one of a live reference,
    over the first batch's pairs; None for an unknown card or a CPU.
    """
    import contenders
    import scenarios
    from settings import Setting
    from transformers import AutoConfig

    from plumb.data.examples import lengths_of
    from plumb.data.tokenization import Example
    from plumb.planning.activations import blank_model
    from plumb.training.budget import PEAK, cost_of

    peak = PEAK.get(gpu_name())
    if at.device == "cpu" or peak is None:
        return None
    import torch

    fields: dict[str, Any] = dict({"1b": scenarios.PYTHIA_1B, "2.8b": scenarios.PYTHIA_3B}[size])
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    setting = Setting("", "plumb", {"vocab_size": config.vocab_size}, at.tokens)
    pairs = [pair for batch in contenders.batches_of(setting) for pair in batch]
    lengths = lengths_of([Example(pair.prompt, pair[1:], "") for pair in pairs])
    each = cost_of(blank_model(config, torch.bfloat16)).forward(lengths) / len(pairs)
    return pairs_per_sec * each * (3 + live) / peak


# a forward pass takes some milliseconds: all measurements together are sampler_passes() of them
SAMPLER = {
    "width": 2048,
    "layers": 16,
    "prompts": 16,
    "n": 8,
    "rounds": 2,
    "mean-tokens": 48,
    "max-new-tokens": 64,
}
SAMPLER_SIZES = (128, 32)  # responses at the same time


def sampler_passes() -> int:
    """Return the most forward passes of both samplers: each size once, and the rounds at the one
    that needs the most.
    """
    each = [SAMPLER["prompts"] * SAMPLER["n"] // size for size in SAMPLER_SIZES]
    return 2 * SAMPLER["max-new-tokens"] * (sum(each) + SAMPLER["rounds"] * max(each))


def run_sampler(at: Place) -> None:
    options = ["--smoke", "--no-steps"]
    if not at.smoke:
        options = ["--device", "cuda", "--sizes", *map(str, SAMPLER_SIZES)]
        options += [word for name, n in SAMPLER.items() for word in (f"--{name}", str(n))]
    run_script(at, "rollouts.py", "--out", str(at.folder / "rollouts.md"), *options)


def rows_of_sampler(at: Place) -> list[Row]:
    """Return each sampler's speeds at each batch size, the one try at each included."""
    speeds: dict[tuple[str, int], list[float]] = {}
    for row in read_rows(at.folder / "rollouts.jsonl"):
        speeds.setdefault((row["sampler"], row["size"]), []).append(row["tokens_per_second"])
    return [
        {
            "sampler": name,
            "responses at once": size,
            "runs": len(values),
            "tokens per second": statistics.median(values),
            "least": min(values),
            "largest": max(values),
        }
        for (name, size), values in speeds.items()
    ]


# in order of value; the limits add up to a little less than MINUTES
PARTS: dict[str, Part] = {
    "trees": Part(
        "Trees beside padded rows", 45, run_trees, rows_of_trees, needs=["plumb.models.logps"]
    ),
    "throughput": Part("DPO throughput", 235, run_throughput, rows_of_throughput),
    "steps": Part("20 steps of DPO beside a CPU", 40, run_steps, rows_of_steps),
    "adapters": Part("Adapters", 60, run_adapters, rows_of_adapters, needs=[*TRAINING, "peft"]),
    "fsdp": Part("FSDPTrainer beside BasicTrainer", 45, run_fsdp, rows_of_fsdp),
    "sampler": Part("Sampling", 40, run_sampler, rows_of_sampler),
    "memory": Part("Peak memory beside plan=true", 45, run_memory, rows_of_memory),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="new folder (default: in .cache/benchmarks)")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on a CPU")
    parser.add_argument("--parts", default=",".join(PARTS), help="default: %(default)s")
    parser.add_argument("--tokens", default="synthetic:1", help="ids, as throughput.py takes them")
    parser.add_argument("--wheels", type=Path, default=ROOT / ".cache" / "wheels")
    at = parser.parse_args()
    began = time.monotonic()
    stamp = time.strftime("%Y%m%d_%H%M%S")
    folder = (at.out or ROOT / ".cache" / "benchmarks" / f"gpu_{stamp}").resolve()
    wheels = at.wheels.resolve()
    if not at.tokens.startswith("synthetic"):
        at.tokens = str(Path(at.tokens).resolve())
    if unknown := set(at.parts.split(",")) - {*PARTS}:
        raise SystemExit(f"--parts {','.join(sorted(unknown))}: expected some of {','.join(PARTS)}")
    if folder.exists() and any(folder.iterdir()):
        raise SystemExit(f"--out {folder}: is not empty; name a new folder")
    if not at.smoke and not gpu_name():
        raise SystemExit("no GPU here (nvidia-smi names none); --smoke runs all of it on a CPU")
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(ROOT)  # where the runs find demo/
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # asking for a GPU must not forbid forks
    }
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    if at.smoke:
        os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    install(wheels, folder / "wheels")
    modules = [*NEEDED, *(name for part in PARTS.values() for name in part.needs)]
    looking = start(find_lacking, modules, folder / "lacking.json")
    import_once()
    looking.join(60)
    looking.kill()
    lacking = {
        name: reason for row in read_rows(folder / "lacking.json") for name, reason in row.items()
    }
    head = [*environment(at)]
    if line := missing_line(lacking, wheels):
        head.append(line)
    print("\n".join(head), flush=True)
    ended: list[Row] = []
    for name in at.parts.split(","):
        part = PARTS[name]
        limit = min(part.secs, MINUTES * 60 - (time.monotonic() - began))
        place = Place(
            folder=folder / name,
            device="cpu" if at.smoke else "cuda",
            smoke=at.smoke,
            tokens=at.tokens,
            secs=max(1.0, limit),
        )
        began_part = time.monotonic()
        state, reason = run_part(part, place, lacking)
        secs = round(time.monotonic() - began_part, 1)
        state, rows = measured(part, place, state)
        row = {"part": name, "title": part.title, "result": state, "seconds": secs, "why": reason}
        ended.append(row | {"rows": rows})
        write_summary(folder, head, ended)  # after each, so that an end from outside keeps it
        print(f"{name:<12}{state:<13}{secs:6.1f} s  {reason}", flush=True)
        if state == "stopped":
            break
    for unneeded in folder.glob("model*"):
        shutil.rmtree(unneeded)
    print(f"{time.monotonic() - began:.0f} s; {folder}/summary.md")
    results = {part["result"] for part in ended}
    sys.exit(130 if "stopped" in results else 1 if results - {"ok", "skipped"} else 0)


if __name__ == "__main__":
    main()
