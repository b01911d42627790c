"""Run all families of families.py through SFT, DPO, reward and export with the real code, and make
a table: `make families`.

Each run has a few steps, in this process; SFT is trained again by FSDPTrainer in two processes, and
its first step must equal that of BasicTrainer. Failures are caught, and their messages are in the
table. `--only llama,gemma4` selects families, `--report docs/models.md` writes the table there,
between its two marks.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/support")]

import torch  # noqa: E402
from conftest import compose_config  # noqa: E402
from families import FAMILIES, save_family  # noqa: E402
from groups import run_in_group  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402
from runs import records  # noqa: E402

BEGIN, END = "<!-- families: begin -->", "<!-- families: end -->"
HEAD = (
    "| family | class | batches | to | FSDP | SFT | DPO | reward | export"
    " |\n|---|---|---|---|---|---|---|---|---|\n"
)
WORDS = [
    "harbour",
    "lantern",
    "gravel",
    "willow",
    "copper",
    "saddle",
    "meadow",
    "ribbon",
    "anchor",
    "thistle",
]
SETTINGS = [
    "wandb.enabled=false",
    "max_length=64",
    "max_prompt_length=40",
    "batch_size=4",
    "eval_batch_size=4",
    "n_examples=8",
    "eval_every=8",
    "eval_share=0.2",
    "lr=1e-4",
    "warmup_steps=0",
    "do_first_eval=false",
    "minimum_log_interval_secs=-1",
    "n_eval_model_samples=1",
    "sample_max_new_tokens=3",
]


class Row(NamedTuple):
    """Hold one line of the table."""

    family: str
    kind: str = ""  # the class in transformers
    batches: str = ""  # packed or padded, and whose head
    to: str = ""  # how much the layout differs from each response alone, nats per token
    fsdp: str = ""
    sft: str = ""
    dpo: str = ""
    reward: str = ""
    export: str = ""


def pairs() -> list[dict[str, str]]:
    """Return pairs of 2 to 40 words, with neighbors of different lengths."""
    words = lambda n, start: " ".join(WORDS[(start + i * i) % len(WORDS)] for i in range(n))
    lengths = [(2, 3, 20), (14, 2, 3), (5, 16, 2), (9, 3, 9), (3, 20, 5)] * 3
    return [
        {"prompt": words(p, i) + "\n", "chosen": words(c, i + 1), "rejected": words(r, i + 3) + "."}
        for i, (p, c, r) in enumerate(lengths)
    ]


def caught(work: Callable[[], str]) -> str:
    """Return what `work` returns, or the last line of its error."""
    try:
        return work()
    except Exception as error:
        text = (str(error).strip().splitlines() or [""])[-1].replace("|", "/")
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = (
            ""
            if type(error).__name__ == "UserError"
            else f" ({Path(last.filename).name}:{last.lineno})"
        )
        return f"**{type(error).__name__}** {text[:160]}{where}"


def run(name: str, folder: Path, *options: str) -> Path:
    """Run train.py once, silently. Return its directory."""
    import train
    from plumb.runs import directory
    from plumb.settings.validation import validate

    base = [
        f"exp_name={name}",
        f"local_dirs=[{folder}]",
        f"local_run_dir={folder / name}",
        f"datasets=[{folder}/pairs.jsonl]",
    ]
    config = compose_config(*base, f"model.name_or_path={folder}/model", *SETTINGS, *options)
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        validate(config)
        config.local_run_dir = directory.find(config)
        OmegaConf.resolve(config)
        if config.trainer == "BasicTrainer":
            train.train(config)
        else:
            run_in_group(2, train.train, config, timeout=240)
    return folder / name


def one(family: str) -> Row:
    """Make all runs of a family. Return its row."""
    row = Row(family)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs()))
        save_family(folder / "model", family)
        kind = json.loads((folder / "model/config.json").read_text())["architectures"][0]
        row = row._replace(kind=kind)
        first: list[dict[str, float]] = []

        def sft() -> str:
            path = run(
                "sft",
                folder,
                "loss=sft",
                "debug=true",
                "sample_during_eval=false",
                "do_last_eval=false",
            )
            first.extend(records(path, "train"))
            return "yes"

        def fsdp() -> str:
            options = [
                "trainer=FSDPTrainer",
                "loss=sft",
                "debug=true",
                "sample_during_eval=false",
                "do_last_eval=false",
            ]
            path = run("fsdp", folder, *options)
            there = records(path, "train")[0]
            off = max(
                abs(there[key] - first[0][key]) / abs(first[0][key])
                for key in ("loss/train", "grad_norm")
            )
            return "yes" if off < 1e-4 else f"off by {off:.0e}"

        def dpo() -> str:
            nonlocal row
            options = [
                "loss=dpo",
                "loss.beta=0.1",
                "reference=live",
                "export=hf",
                "do_first_eval=true",
            ]
            path = run("dpo", folder, *options)
            layout = json.loads((path / "env.json").read_text())["layout"]
            off = re.search(r"(equal to|off from) each response alone to (\S+)", layout)
            batches = re.sub(r" \(.*|;.*", "", layout.removeprefix("batches: "))
            row = row._replace(batches=batches, to=off[2] if off else "")
            row = row._replace(export=caught(lambda: exported(path)))
            return "yes"

        def reward() -> str:
            run("reward", folder, "loss=reward", "debug=true")
            return "yes"

        row = row._replace(sft=caught(sft))
        row = row._replace(fsdp=caught(fsdp))
        outcome = caught(dpo)
        row = row._replace(dpo=outcome)
        return row._replace(reward=caught(reward))


def exported(path: Path) -> str:
    """Return whether the exported folder, read by transformers, gives the logits of the run's last
    checkpoint, in words.
    """
    from transformers import AutoModelForCausalLM

    from plumb.models.find import find_model, open_model

    folder = path / "hf"
    ids = torch.arange(5, 45)[None]
    with torch.no_grad(), redirect_stdout(io.StringIO()):
        ours = open_model(find_model(str(path)), "cpu").model.eval()(ids, use_cache=False).logits
        theirs = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=ours.dtype)
            .eval()(ids, use_cache=False)
            .logits
        )
    off = float((ours - theirs).abs().max())
    return "same logits" if off <= 1e-5 * float(ours.abs().max()) else f"**off by {off:.0e}**"


def table(rows: list[Row]) -> str:
    return HEAD + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="families, separated by commas")
    parser.add_argument(
        "--report", type=Path, help="file with the two marks, between which the table is written"
    )
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    names, start = arguments.only.split(",") if arguments.only else list(FAMILIES), time.monotonic()
    rows = []
    with ProcessPoolExecutor(
        arguments.jobs,
        mp_context=get_context("spawn"),
        initializer=torch.set_num_threads,
        initargs=(1,),
    ) as pool:
        for row in pool.map(one, names):
            rows.append(row)
            print(" | ".join(row), flush=True)
    print(f"{len(rows)} families in {time.monotonic() - start:.0f} s")
    if arguments.report:
        text = arguments.report.read_text(encoding="utf-8")
        before, after = text.partition(BEGIN)[0], text.partition(END)[2]
        arguments.report.write_text(f"{before}{BEGIN}\n{table(rows)}{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
