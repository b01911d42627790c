"""Run everything worth knowing on one 80 GB GPU, in at most 9 minutes and without a network:
`bash benchmarks/gpu.sh`.

    trees       log-probabilities and gradients of packed trees beside padded rows, eight families
    steps       the first step and 20 steps of DPO, on the GPU beside a CPU
    throughput  DPO of 1B and 2.8B shapes beside TRL and the manner of 2023 (throughput.py)
    fsdp        FSDPTrainer on one GPU beside BasicTrainer
    memory      peak memory beside what plan=true says (plan_memory.py)
    adapters    all weights, LoRA and, where a quantized base exists, QLoRA
    sampler     tokens per second beside transformers' generate (rollouts.py)

Each part is a process group of its own with a time limit, and none stops the others. The folder
--out gets summary.md, summary.jsonl and a folder for each part, with its log and what it measured.
A part is `ok`, `failed` (it ended with an error, or a number is wrong), `out of time` (what it had
measured stands) or `skipped` (a library is missing).

Written for torch 2.11 to 2.13 and transformers 5.17 to 5.23. Libraries that are missing are named,
with the command that makes their wheels elsewhere; those in the folder --wheels are installed, for
this run only. `--smoke` runs all of it on a CPU at tiny shapes, where the numbers mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import math
import multiprocessing
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE)]

MINUTES = 8.8  # for all parts; what is left of nine is for the start and the summary
# module -> distribution; what Plumb needs to train, and then what a part compares with
NEEDED = {
    "omegaconf": "omegaconf",
    "antlr4": "antlr4-python3-runtime",
    "hydra": "hydra-core",
    "datasets": "datasets",
    "psutil": "psutil",
    "selectolax": "selectolax",
    "peft": "peft",
    "matplotlib": "matplotlib",
    "jinja2": "jinja2",
    "trl": "trl",
    "accelerate": "accelerate",
    "bitsandbytes": "bitsandbytes",
}
FORK = multiprocessing.get_context("fork")  # no part waits for imports that another has made
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
Row = dict[str, Any]


class Place(NamedTuple):
    """Hold where a part computes and writes."""

    folder: Path  # of this part
    device: str
    smoke: bool
    tokens: str  # ids for the throughput, as throughput.py takes them


class Part(NamedTuple):
    """Hold one part: what computes it, and what reads its files afterwards, however it ended."""

    title: str
    secs: float  # time limit
    run: Callable[[Place], None]
    rows: Callable[[Place], list[Row]]
    needs: Sequence[str] = ("omegaconf", "hydra")


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

    def compute(model: Any, packed: bool) -> tuple[Any, Any]:
        model.zero_grad()
        logps = response_logps(model, batch, ForwardPath(packed, plain_head=True))
        logps.mean().sum().backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        return logps.mean().detach().double(), torch.cat(gradients).double()

    with (at.folder / "trees.jsonl").open("w") as file:
        for family, changes in FAMILIES.items():
            torch.manual_seed(0)
            config = AutoConfig.for_model(family, **(SIZES | changes))
            model: Any = AutoModelForCausalLM.from_config(config).to(at.device)
            use_tree_attention(model)
            row: Row = {"family": family, "head size": head_size(config)}
            truth = compute(model, False)
            results = {"trees, float32": compute(model, True)}
            model.to(torch.bfloat16)
            results["padded, bfloat16"] = compute(model, False)
            results["trees, bfloat16"] = compute(model, True)
            for name, (logps, gradients) in results.items():
                row[f"{name}: nats per token"] = float((logps - truth[0]).abs().max())
                error = (gradients - truth[1]).norm() / truth[1].norm()
                row[f"{name}: gradient"] = float(error)
            print(json.dumps(row), file=file, flush=True)


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


def run_train(at: Place, name: str, *options: str) -> None:
    """Run train.py in a process of its own. Raise SystemExit if it fails."""
    words = [f"exp_name={name}", f"local_run_dir={at.folder / name}", *DEMO, *options]
    process = FORK.Process(target=_train, args=(words,))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"the run {name} ended with code {process.exitcode}")


def _train(words: Sequence[str]) -> None:
    import train

    train.run(train.compose(words))


def architecture(at: Place) -> list[str]:
    """Return the options of a Llama with random weights, of SHAPE."""
    shape = (TINY_SHAPE if at.smoke else SHAPE) | {"vocab_size": 2048 if at.smoke else 32000}
    fields = ", ".join(f"{key}: {value}" for key, value in shape.items())
    return [
        f"model.architecture={{model_type: llama, {fields}, max_position_embeddings: 512}}",
        "model.name_or_path=null",
        "model.tokenizer_name_or_path=demo/tokenizer",
        "batch_size=8" if at.smoke else "batch_size=128",
        "n_examples=24" if at.smoke else "n_examples=1280",
        "reference=live",
        *([] if at.smoke else ["model.fsdp_policy_mp=bfloat16"]),
    ]


def read_rows(file: Path) -> list[Row]:
    """Return the rows of a file of JSON lines, without a cut last one; none without the file."""
    rows = []
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def speed_and_memory(at: Place, name: str) -> Row | None:
    """Return what a run's steps show, after two that warm it up; None if it made no step."""
    steps = [row for row in read_rows(at.folder / name / "metrics.jsonl") if "loss/train" in row]
    if not steps:
        return None
    return {
        "run": name,
        "steps": len(steps),
        "pairs per second": statistics.median(s["examples_per_second"] for s in steps[2:] or steps),
        "MFU": statistics.median(s.get("mfu", math.nan) for s in steps[2:] or steps),
        "peak GB": max(s["peak_memory_gb"] for s in steps),
        "first loss": steps[0]["loss/train"],
        "last loss": steps[-1]["loss/train"],
    }


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
    for name, options in STEP_RUNS.items():
        run_train(at, name, *common, *options)


def rows_of_steps(at: Place) -> list[Row]:
    """Return what each run's steps show. In float32 the GPU's losses equal the CPU's to 1e-3, and
    every first step has margin 0 and loss log 2.
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
            row["ok"] = margin == 0 and abs(loss - math.log(2)) < 1e-6
            row["ok"] &= differs < (5e-2 if "16" in name else 1e-3)
            rows.append(row)
    return rows


# ---- FSDPTrainer beside BasicTrainer ----

FSDP_RUNS = {"BasicTrainer": [], "FSDPTrainer": ["trainer=FSDPTrainer"]}


def run_fsdp(at: Place) -> None:
    for name, options in FSDP_RUNS.items():
        processes = ["n_cpu_processes=1"] if at.smoke and options else []
        run_train(at, name, *architecture(at), "lr=1e-5", *options, *processes)


def rows_of_fsdp(at: Place) -> list[Row]:
    """Return both; their losses agree: to 1e-4 in float32, to 2e-2 in bfloat16."""
    rows = [row for name in FSDP_RUNS if (row := speed_and_memory(at, name))]
    for row in rows[1:]:
        differs = largest_difference(at, row["run"], rows[0]["run"])
        row["losses differ by"] = differs
        row["ok"] = differs < (1e-4 if at.smoke else 2e-2)
    return rows


# ---- adapters ----

ADAPTER_RUNS = {
    "all weights": ["lr=1e-5"],
    "LoRA": ["adapter=lora", "lr=1e-4"],
    "QLoRA": ["adapter=lora", "lr=1e-4", "model.quantize=nf4"],
}


def has_quantized_base() -> bool:
    from plumb.settings.schema import KNOBS

    library = importlib.util.find_spec("bitsandbytes") is not None
    return "model.quantize" in KNOBS and library


def run_adapters(at: Place) -> None:
    for name, options in ADAPTER_RUNS.items():
        if name != "QLoRA" or has_quantized_base():
            run_train(at, name.replace(" ", "_"), *architecture(at), *options)


def rows_of_adapters(at: Place) -> list[Row]:
    """Return each run; the first loss of an adapter without effect is log 2."""
    rows = [row for name in ADAPTER_RUNS if (row := speed_and_memory(at, name.replace(" ", "_")))]
    for row in rows:
        row["ok"] = abs(row["first loss"] - math.log(2)) < 1e-6
    if rows and not has_quantized_base():
        rows.append({"run": "QLoRA", "note": "not run: no quantized base, or no bitsandbytes here"})
    return rows


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
    minutes = f"{(PARTS['throughput'].secs - 15) / 60:.2f}"
    common += ["--tokens", at.tokens, "--minutes", minutes, "--scenarios", "2.8b,1b,compiled"]
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
            live = "cached" not in label
            small = scenario == "1b" or "1B" in label
            row["MFU"] = mfu(at, speed, "1b" if small else "2.8b", live)
        rows.append(row)
    for r in records:
        if r["event"] in ("failed", "skipped"):
            note = r.get("error") or r.get("why")
            rows.append({"scenario": r["scenario"], "contender": r["label"], "note": note})
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


def run_memory(at: Place) -> None:
    only = ["--smoke", "--only", "gpt_neox loss=sft"] if at.smoke else ["--device", "cuda"]
    run_script(at, "plan_memory.py", "--out", str(at.folder), *only)


def rows_of_memory(at: Place) -> list[Row]:
    rows = read_rows(at.folder / "plan.jsonl")
    return [row | {"error": row["planned_gb"] / row["measured_gb"] - 1} for row in rows]


def run_sampler(at: Place) -> None:
    sizes = ["--smoke"]
    if not at.smoke:
        sizes = ["--device", "cuda", "--width", "2048", "--layers", "16", "--prompts", "32"]
        sizes += ["--rounds", "2", "--mean-tokens", "100", "--max-new-tokens", "200"]
    run_script(at, "rollouts.py", "--out", str(at.folder / "rollouts.md"), *sizes)


def rows_of_sampler(at: Place) -> list[Row]:
    """Return the rows of the first table of rollouts.py."""
    file = at.folder / "rollouts.md"
    table = file.read_text().split("| tokens of an update")[0] if file.exists() else ""
    cells = [line.strip("| ").split(" | ") for line in table.splitlines() if "|" in line]
    names = ["sampler", "tokens per second", "least", "largest"]
    return [
        dict(zip(names, [row[0], *(float(x.replace(",", "")) for x in row[1:])], strict=True))
        for row in cells[2:]
    ]


PARTS: dict[str, Part] = {
    "trees": Part("Trees beside padded rows", 50, run_trees, rows_of_trees, needs=()),
    "steps": Part("20 steps of DPO beside a CPU", 60, run_steps, rows_of_steps),
    "throughput": Part(
        "DPO throughput", 210, run_throughput, rows_of_throughput, needs=["omegaconf"]
    ),
    "fsdp": Part("FSDPTrainer beside BasicTrainer", 50, run_fsdp, rows_of_fsdp),
    "memory": Part("Peak memory beside plan=true", 70, run_memory, rows_of_memory),
    "adapters": Part("Adapters", 50, run_adapters, rows_of_adapters, needs=["hydra", "peft"]),
    "sampler": Part("Sampling", 40, run_sampler, rows_of_sampler, needs=()),
}


# ---- running the parts ----


def run_part(part: Part, at: Place, secs: float) -> tuple[str, str]:
    """Run a part in a process group of its own. Return how it ended, and why."""
    missing = [name for name in part.needs if importlib.util.find_spec(name) is None]
    if missing:
        return "skipped", f"without {', '.join(NEEDED[name] for name in missing)}"
    at.folder.mkdir(parents=True)
    process = FORK.Process(target=_in_group, args=(part.run, at))
    process.start()
    process.join(secs)
    if process.exitcode is None:
        assert process.pid is not None
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
        return "out of time", f"after {secs:.0f} s"
    if process.exitcode == 0:
        return "ok", ""
    lines = (at.folder / "log.txt").read_text(errors="replace").strip().splitlines()
    return "failed", lines[-1][:200] if lines else f"code {process.exitcode}"


def _in_group(run: Callable[[Place], None], at: Place) -> None:
    os.setsid()
    with (at.folder / "log.txt").open("w", buffering=1) as log:
        os.dup2(log.fileno(), 1)  # of the processes that it starts
        os.dup2(log.fileno(), 2)
        sys.stdout = sys.stderr = log
        try:
            run(at)
        except SystemExit as ended:
            print(ended.code, file=sys.stderr)
            raise SystemExit(1) from None


def measured(part: Part, at: Place, state: str) -> tuple[str, list[Row]]:
    """Return how the part ended, now that its numbers are known, and these."""
    try:
        rows = part.rows(at)
    except Exception as error:  # a cut file must not take the other parts' summary with it
        return "failed", [{"note": f"its files cannot be read: {error!r}"}]
    wrong = any(row.get("ok") is False for row in rows)
    return "failed" if state == "ok" and (wrong or not rows) else state, rows


def import_once() -> None:
    """Import what most parts need, so that none of them waits for it."""
    for name in ("contenders", "plumb.models.logps", "train", "trainers", "peft"):
        with contextlib.suppress(ImportError):  # then the parts that need it say so
            importlib.import_module(name)


# ---- wheels ----


def install(wheels: Path, folder: Path) -> None:
    """Install the missing libraries that have a wheel in the folder, for this run only."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    names = {NEEDED[name].replace("-", "_").lower() for name in missing}
    files = [str(f) for f in sorted(wheels.glob("*.whl")) if f.name.split("-")[0].lower() in names]
    if files:
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
        subprocess.run([*command, "--target", str(folder), *files], check=False)
        sys.path.append(str(folder))
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [before, str(folder)]))
        importlib.invalidate_caches()


def missing_line(wheels: Path) -> str | None:
    """Return which libraries are missing, and how to bring them; None if none is."""
    missing = [d for name, d in NEEDED.items() if importlib.util.find_spec(name) is None]
    if not missing:
        return None
    pins = dict(re.findall(r"^([\w-]+)==([\w.]+)", (ROOT / "requirements.txt").read_text(), re.M))
    wanted = " ".join(f"{d}=={pins[d]}" if d in pins else d for d in missing)
    return (
        f"missing here: {', '.join(missing)}. On a machine with a network, `pip wheel --no-deps -w"
        f" {wheels} {wanted}`; carry that folder, and give it as --wheels"
    )


# ---- the summary ----


def gpu_name() -> str:
    """Return the name of the GPU; an empty text without one."""
    try:
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        lines = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()
    except FileNotFoundError:
        return ""
    return lines[0].strip() if lines else ""


def environment(at: argparse.Namespace) -> Iterator[str]:
    """Yield the lines that say where and with what the numbers came about."""
    arguments = " ".join(sys.argv[1:])
    yield f"`bash benchmarks/gpu.sh {arguments}`".replace(" `", "`")
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    versions = []
    for name in ("torch", "transformers", "trl", "peft", "bitsandbytes"):
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            versions.append(f"no {name}")
    where = "a CPU, with tiny shapes: the numbers mean nothing" if at.smoke else gpu_name()
    yield f"{where}; {', '.join(versions)}; Python {platform.python_version()}; commit {commit}"
    if not at.smoke:
        yield f"throughput on {at.tokens}"


def shown(value: Any) -> str:
    """Return a cell of a table.

    >>> shown(0.6931471), shown(12345.6), shown(3e-7), shown(None), shown(True)
    ('0.6931', '12,346', '3e-07', '', 'yes')
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def table(rows: Sequence[Row]) -> list[str]:
    """Return rows as Markdown, with the columns that any of them has and a value is in."""
    keys = [
        key
        for key in dict.fromkeys(key for row in rows for key in row)
        if any(shown(row.get(key)) for row in rows)
    ]
    lines = [f"| {' | '.join(keys)} |", f"|{'---|' * len(keys)}"]
    return lines + [f"| {' | '.join(shown(row.get(key)) for key in keys)} |" for row in rows]


def write_summary(folder: Path, head: Sequence[str], ended: Sequence[Row]) -> None:
    """Write summary.md and summary.jsonl: a line for each part, then its numbers."""
    overview = [{key: part[key] for key in ("part", "result", "seconds", "why")} for part in ended]
    lines = ["# One GPU", "", *(f"{line}  " for line in head), "", *table(overview)]
    for part in ended:
        lines += ["", f"## {part['title']}", "", f"{part['result']}. {part['why']}".strip(), ""]
        lines += table(part["rows"]) if part["rows"] else []
    (folder / "summary.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    records = [{"head": [*head]}, *ended]
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "summary.jsonl").write_text(text, encoding="utf-8")


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
    if unknown := set(at.parts.split(",")) - {*PARTS}:
        raise SystemExit(f"--parts {','.join(sorted(unknown))}: expected some of {','.join(PARTS)}")
    if folder.exists() and any(folder.iterdir()):
        raise SystemExit(f"--out {folder}: is not empty; name a new folder")
    if not at.smoke and not gpu_name():
        raise SystemExit("no GPU here (nvidia-smi names none); --smoke runs all of it on a CPU")
    folder.mkdir(parents=True, exist_ok=True)
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # asking for a GPU must not forbid forks
    }
    if at.smoke:
        os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    install(at.wheels, folder / "wheels")
    head = [*environment(at)]
    if line := missing_line(at.wheels):
        head.append(line)
    print("\n".join(head), flush=True)
    import_once()
    ended: list[Row] = []
    for name in at.parts.split(","):
        part = PARTS[name]
        place = Place(folder / name, "cpu" if at.smoke else "cuda", at.smoke, at.tokens)
        left = MINUTES * 60 - (time.monotonic() - began)
        start = time.monotonic()
        state, why = run_part(part, place, max(1.0, min(part.secs, left)))
        secs = round(time.monotonic() - start, 1)
        state, rows = measured(part, place, state)
        row = {"part": name, "title": part.title, "result": state, "seconds": secs, "why": why}
        ended.append(row | {"rows": rows})
        write_summary(folder, head, ended)  # after each, so that an end from outside keeps it
        print(f"{name:<12}{state:<13}{secs:6.1f} s  {why}", flush=True)
    print(f"{time.monotonic() - began:.0f} s; {folder}/summary.md")
    if at.smoke and any(part["result"] not in ("ok", "skipped") for part in ended):
        sys.exit(1)


if __name__ == "__main__":
    main()
