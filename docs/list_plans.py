"""Write the table of docs/plan.md on what fits where: `python docs/list_plans.py`, some minutes.
The rest of the page stays as it is.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from plumb.planning import answers, plan  # noqa: E402
from plumb.settings.validation import validate  # noqa: E402

BEGIN, END = "<!-- written by docs/list_plans.py: begin -->\n", "<!-- end -->\n"
COMMON = [
    "exp_name=plan",
    "plan=largest_model",
    "loss=dpo",
    "loss.beta=0.1",
    "optimizer=AdamW",
    "batch_size=64",
    "max_length=1024",
    "max_prompt_length=512",
]
KINDS = {
    "all weights": ["model.fsdp_policy_mp=bfloat16"],
    "LoRA": ["model.policy_dtype=bfloat16", "adapter=lora", "lr=5e-6"],
    "LoRA on nf4": ["model.policy_dtype=bfloat16", "adapter=lora", "lr=5e-6", "model.quantize=nf4"],
}
MODELS = ("Llama 3.2 1B", "Llama 3.1 8B", "Llama 3.1 70B")
GPUS = (1, 2, 8)


def cell(model: str, kind: str, n: int) -> str:
    """Return what one run needs on each of n GPUs of 80 GB, and the numbers of the changes."""
    several = ["trainer=FSDPTrainer"] if n > 1 else []
    config = train.compose([*COMMON, *KINDS[kind], f"plan_gpus={n}", *several])
    loss = validate(config)
    shape = next(shape for shape in answers.SHAPES if shape.name == model)
    config = answers.of_shape(config, shape)
    quarter = config.max_length // 4
    data = plan.assumed_data(config, loss, quarter, quarter, "")
    fit = answers.least(config, loss, plan.read_model(config, loss), data)
    if fit is None:
        return "no"
    return f"{fit.gigabytes:.0f} GB{marks(fit.changes)}"


def marks(changes: dict[str, Any]) -> str:
    """Return the marks of changes, in the order in which they are tried.

    >>> marks({}), marks({"activation_checkpointing": True, "reference": "cached"})
    ('', ' (a, b)')
    """
    known = {"activation_checkpointing": "a", "reference": "b"}
    return f" ({', '.join(known[knob] for knob in changes)})" if changes else ""


def lines() -> Iterator[str]:
    """Yield the lines of the table."""
    titles = " | ".join("1 GPU" if n == 1 else f"{n} GPUs" for n in GPUS)
    yield f"| model | trained | {titles} |"
    yield "|---|---|" + "---|" * len(GPUS)
    for model in MODELS:
        for kind in KINDS:
            yield f"| {model} | {kind} | {' | '.join(cell(model, kind, n) for n in GPUS)} |"


def main() -> None:
    page = ROOT / "docs/plan.md"
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    table = "".join(line + "\n" for line in lines())
    page.write_text(before + BEGIN + table + END + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    main()
