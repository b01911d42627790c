"""Write the recipes of docs/hardware.md: `python docs/list_recipes.py`, a minute or two. Each is
planned for its machine, and one that would not fit is an error. The page's introduction stays.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from plumb.planning import answers, plan  # noqa: E402
from plumb.settings.validation import validate  # noqa: E402

MARK = "<!-- From here on written by docs/list_recipes.py -->\n"
DPO = "loss=dpo loss.beta=0.1 batch_size=32 max_length=1024 max_prompt_length=512"


class Recipe(NamedTuple):
    title: str
    model: str  # a file of config/model, or a name on the hub
    shape: str  # its sizes, as plumb.planning.answers names them
    options: str
    why: str


class Machine(NamedTuple):
    name: str
    n_gpus: int
    gigabytes: int
    recipes: tuple[Recipe, ...]


MACHINES = [
    Machine(
        "A laptop with 16 GB and no GPU",
        1,
        16,
        (
            Recipe(
                "DPO of all weights, 135 M parameters",
                "smollm2-135m",
                "SmolLM2 135M",
                "loss=dpo loss.beta=0.1 lr=1e-6 batch_size=16 max_length=512 max_prompt_length=256"
                " tokens_per_microbatch=2048",
                "Everything is computed in float32.",
            ),
            Recipe(
                "LoRA, 0.6 B parameters",
                "qwen3-0.6b",
                "Qwen3 0.6B",
                "loss=dpo loss.beta=0.1 adapter=lora lr=1e-5 batch_size=16 max_length=512"
                " max_prompt_length=256 tokens_per_microbatch=1024",
                "The reference is the model without its adapter, so there is no second one.",
            ),
        ),
    ),
    Machine(
        "One GPU of 24 GB",
        1,
        24,
        (
            Recipe(
                "All weights, 1 B parameters",
                "llama3.2-1b",
                "Llama 3.2 1B",
                f"{DPO} lr=1e-6 model.fsdp_policy_mp=bfloat16 reference=cached"
                " activation_checkpointing=true optimizer_args='{foreach: false}'",
                "RMSprop keeps one number per weight; without `foreach`, its step needs no copy of"
                " the weights.",
            ),
            Recipe(
                "LoRA on a base of 4 bits, 8 B parameters",
                "llama3.1-8b",
                "Llama 3.1 8B",
                f"{DPO} lr=1e-5 adapter=lora model.policy_dtype=bfloat16 model.quantize=nf4"
                " activation_checkpointing=true",
                "QLoRA; `pip install -r requirements-lora.txt -r requirements-quant.txt`.",
            ),
        ),
    ),
    Machine(
        "One GPU of 80 GB",
        1,
        80,
        (
            Recipe(
                "All weights in float32, 4 B parameters",
                "qwen3-4b",
                "Qwen3 4B",
                f"{DPO} lr=1e-6 model.fsdp_policy_mp=bfloat16 reference=cached"
                " activation_checkpointing=true",
                "The masters stay in float32; matrix products are in bfloat16.",
            ),
            Recipe(
                "All weights in bfloat16, 8 B parameters",
                "llama3.1-8b",
                "Llama 3.1 8B",
                f"{DPO} lr=1e-6 model.policy_dtype=bfloat16 stochastic_rounding=true"
                " optimizer_state=bfloat16 reference=cached activation_checkpointing=true",
                "Weights are rounded stochastically, so that small updates are not lost.",
            ),
            Recipe(
                "LoRA, 8 B parameters",
                "llama3.1-8b",
                "Llama 3.1 8B",
                f"{DPO} lr=1e-5 adapter=lora model.policy_dtype=bfloat16",
                "The simplest of the three.",
            ),
        ),
    ),
    Machine(
        "Eight GPUs of 80 GB",
        8,
        80,
        (
            Recipe(
                "All weights, 8 B parameters",
                "llama3.1-8b",
                "Llama 3.1 8B",
                f"{DPO} lr=1e-6 optimizer=AdamW model.fsdp_policy_mp=bfloat16 trainer=FSDPTrainer",
                "One command starts a process per GPU.",
            ),
            Recipe(
                "LoRA, 70 B parameters",
                "meta-llama/Llama-3.1-70B",
                "Llama 3.1 70B",
                f"{DPO} lr=1e-5 adapter=lora model.policy_dtype=bfloat16 trainer=FSDPTrainer"
                " activation_checkpointing=true",
                "The base is sharded over the GPUs.",
            ),
        ),
    ),
]


def planned(machine: Machine, recipe: Recipe) -> float:
    """Return the GB that a recipe needs on each of the machine's GPUs."""
    options = shlex.split(f"{model(recipe)} {recipe.options}")
    where = ["plan=true", f"plan_gpus={machine.n_gpus}", f"plan_gpu_gb={machine.gigabytes}"]
    config = train.compose(["exp_name=mine", "datasets=[my.jsonl]", *options, *where])
    loss = validate(config)
    shape = next(shape for shape in answers.SHAPES if shape.name == recipe.shape)
    config = answers.of_shape(config, shape)
    quarter = config.max_length // 4
    data = plan.assumed_data(config, loss, quarter, quarter, "")
    return plan.make_plan(config, loss, plan.read_model(config, loss), data).memory.peak / 1e9


def model(recipe: Recipe) -> str:
    """Return the options that name a recipe's model: a file of config/model, or a name on the
    hub.
    """
    if "/" in recipe.model:
        return f"model=blank_model model.name_or_path={recipe.model}"
    return f"model={recipe.model}"


def text(machine: Machine, recipe: Recipe) -> str:
    """Return a recipe as Markdown. Raise ValueError if it does not fit."""
    needed = planned(machine, recipe)
    if needed > machine.gigabytes:
        raise ValueError(f"{machine.name}, {recipe.title}: needs {needed:.1f} GB")
    each = " on each GPU" if machine.n_gpus > 1 else ""
    return (
        f"**{recipe.title}.** {recipe.why} Planned: {needed:.0f} of {machine.gigabytes} GB{each}.\n"
        f"\n```bash\npython train.py exp_name=mine {model(recipe)} datasets=[my.jsonl] \\\n"
        f"    {wrapped(recipe.options)}\n```\n"
    )


def wrapped(options: str, width: int = 110) -> str:
    """Return options on lines that a shell joins.

    >>> wrapped("a=1 b=2 c=3", width=8)
    'a=1 b=2 \\\\\\n    c=3'
    """
    lines = [""]
    for word in re.findall(r"(?:[^\s']|'[^']*')+", options):
        if lines[-1] and len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] += (" " if lines[-1] else "") + word
    return " \\\n    ".join(lines)


def sections() -> Iterator[str]:
    """Yield the part of the page on each machine."""
    for machine in MACHINES:
        recipes = "\n".join(text(machine, recipe) for recipe in machine.recipes)
        yield f"## {machine.name}\n\n{recipes}"


def main() -> None:
    page = ROOT / "docs/hardware.md"
    introduction = page.read_text(encoding="utf-8").partition(MARK)[0]
    page.write_text(introduction + MARK + "\n" + "\n".join(sections()), encoding="utf-8")


if __name__ == "__main__":
    main()
