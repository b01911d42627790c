"""plan=fewest_gpus, longest_rows and largest_model: what they answer fits, as plan=true counts it,
and the table of docs/plan.md is what the script writes.
"""

import importlib.util

import pytest
from conftest import ROOT

from plumb.errors import UserError
from plumb.planning import answers, plan
from plumb.settings.validation import validate

SMALL = (
    "{model_type: llama, hidden_size: 1024, intermediate_size: 2816, num_hidden_layers: 2,"
    " num_attention_heads: 8, vocab_size: 32000, max_position_embeddings: 1024}"
)
RANDOM = [
    f"model.architecture={SMALL}",
    "model.name_or_path=null",
    "model.tokenizer_name_or_path=demo/tokenizer",
]
PAIRS = ["exp_name=x", "loss=dpo", "loss.beta=0.1", "batch_size=32", "optimizer=AdamW"]


@pytest.fixture
def asked(compose, monkeypatch):
    """`asked(question, *overrides)` -> (config, loss), for models of two layers."""
    widths = {"small": 256, "larger": 1024}
    some = [answers.Shape(n, answers.llama(w, 3 * w, 2, 4, 4, 32_000)) for n, w in widths.items()]
    monkeypatch.setattr(answers, "SHAPES", some)

    def run(question, *overrides):
        config = compose(*PAIRS, f"plan={question}", *overrides)
        return config, validate(config)

    return run


def rows_of(text):
    """The lines below the titles, split where two spaces stand."""
    lines = text.splitlines()[3:]
    return [[cell for cell in line.split("  ") if cell.strip()] for line in lines]


def peak_with(compose, options, *overrides):
    config = compose(*PAIRS, "plan=true", *overrides, *options.split())
    loss = validate(config)
    model, data = plan.read_model(config, loss), plan.read_data(config, loss)
    return plan.make_plan(config, loss, model, data).memory.peak / 1e9


def test_the_fewest_gpus(asked, compose):
    """Of 2 GB each. Each row is a command of its own: planned by itself, it needs as much."""
    limit = [*RANDOM, "plan_gpu_gb=2", "reference=live", "tokens_per_microbatch=2048"]
    rows = rows_of(answers.answer(*asked("fewest_gpus", *limit), validate))
    assert len(rows) >= 2
    for n, gigabytes, options in rows:
        options = options.strip()
        assert f"plan_gpus={n.strip()}" in options
        needed = peak_with(compose, options, *limit)
        assert f"{needed:.1f}" == gigabytes.strip() and needed <= 2
    n_changes = [len(row[-1].split()) for row in rows]
    assert n_changes[-1] == 2, "the last has no other change than trainer and plan_gpus"


def test_numbers_of_gpus_that_are_not_laid_out_are_left_out(asked):
    """A shard over 4 takes 4 or more; one over 3, none of them."""
    sharded = [*RANDOM, "trainer=FSDPTrainer"]
    config, loss = asked("fewest_gpus", *sharded, "fsdp_shard_size=4")
    rows = rows_of(answers.answer(config, loss, validate))
    assert [row[0].strip() for row in rows] == ["4"]
    with pytest.raises(UserError, match="fsdp_shard_size=3: does not divide the 64 processes"):
        answers.answer(*asked("fewest_gpus", *sharded, "fsdp_shard_size=3"))


def test_the_longest_rows(asked):
    """Up to the positions of the model where memory is ample, and no further than fits where it is
    not.
    """
    rows = rows_of(answers.answer(*asked("longest_rows", *RANDOM)))
    lengths = [row[0].strip() for row in rows]
    assert lengths == ["256", "384", "512", "768", "1,024", "1,536"]
    assert rows[-1][-1].strip() == "more than the model's 1,024 positions"
    rows = rows_of(answers.answer(*asked("longest_rows", *RANDOM, "plan_gpu_gb=1.3")))
    assert rows[-1][-1].strip() == "does not fit" and len(rows) < 6
    assert "max_length=256 max_prompt_length=128" in rows[0][-1] or len(rows) == 1


def test_the_largest_model(asked):
    """Without a model named; the first that does not fit ends it."""
    rows = rows_of(answers.answer(*asked("largest_model", "plan_gpu_gb=0.8")))
    assert [row[0].strip() for row in rows] == ["small", "larger"]
    assert rows[1][-1].strip() == "does not fit"
    rows = rows_of(answers.answer(*asked("largest_model"), validate))
    assert rows[1][-1].strip() == "nothing"


def test_what_is_refused(asked):
    with pytest.raises(UserError, match="plan=longest: expected true, false, fewest_gpus"):
        asked("longest", *RANDOM)


def test_the_shapes_are_those_of_their_names():
    """In billions of parameters; embeddings count once where they are the head."""
    published = {"Qwen3 0.6B": 0.596, "Llama 3.2 1B": 1.236, "Llama 3.1 8B": 8.030}
    import torch
    from transformers import AutoConfig

    from plumb.planning.activations import blank_model

    for shape in answers.SHAPES:
        if shape.name in published:
            config = AutoConfig.for_model(**shape.architecture)
            n = sum(p.numel() for p in blank_model(config, torch.bfloat16).parameters())
            assert n / 1e9 == pytest.approx(published[shape.name], abs=1e-3)


def of_docs(name):
    """A script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"docs/{name}.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_the_table_of_the_docs():
    """One cell of it, for all take minutes; `python docs/list_plans.py` writes it anew."""
    kind, n = "LoRA", 1
    script = of_docs("list_plans")
    page = (ROOT / "docs/plan.md").read_text(encoding="utf-8")
    table = page.partition(script.BEGIN)[2].partition(script.END)[0]
    model = script.MODELS[0]
    (row,) = [line for line in table.splitlines() if line.startswith(f"| {model} | {kind} |")]
    cells = row.strip("| ").split(" | ")[2:]
    assert cells[script.GPUS.index(n)] == script.cell(model, kind, n)
    assert len(table.splitlines()) == 2 + len(script.MODELS) * len(script.KINDS)


def test_the_recipes_of_the_docs(capsys):
    """All commands, and the smallest recipe as it is planned; `python docs/list_recipes.py` writes
    them anew.
    """
    script = of_docs("list_recipes")
    page = (ROOT / "docs/hardware.md").read_text(encoding="utf-8").partition(script.MARK)[2]
    recipes = [(machine, recipe) for machine in script.MACHINES for recipe in machine.recipes]
    assert page.count("```bash") == len(recipes)
    for _, recipe in recipes:
        assert script.wrapped(recipe.options) in page
    assert script.text(*recipes[0]) in page
