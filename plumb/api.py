"""Use models from Python: `import plumb`. See docs/api.md.

The commands call the same functions. Training and evaluation belong to the files at the root:
train.train_on and eval.evaluate_on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from plumb.data.files import Text
from plumb.data.prompts import Prompt
from plumb.data.registry import Reading, get_dataset
from plumb.data.rows import Row
from plumb.models import find
from plumb.models.find import Opened, template_of
from plumb.rollouts.decoding import Decoding
from plumb.rollouts.hf_engine import answers
from plumb.rollouts.sampling import longest_prompt, open_policy, read_prompts
from plumb.scoring.scorers import Scored, knobs_of, load_scorer
from plumb.settings.cli import temporary_jsonl


def open_model(name: str | Path, device: str | None = None) -> Opened:
    """Open a policy: a run, a checkpoint, a policy.pt, a folder or a name on the hub. `device`:
    None is the GPU if there is one. Raises UserError if there is no such model.
    """
    return open_policy(find.find_model(str(name)), device)


def score(
    scorer: str | Path,
    rows: Sequence[Mapping[str, Any]],
    reference: str | None = None,
    beta: float | None = None,
    **knobs: Any,
) -> Scored:
    """Score the pairs of `rows` (prompt, chosen, rejected, or another form of docs/data.md) by a
    reward model, or by a policy beside its reference. -> scores [n, 2] of chosen and rejected

    `knobs` override the run's: max_length, max_prompt_length, chat_template, truncation_mode.
    """
    ref = find.find_model(str(scorer))
    config = knobs_of(ref, knobs)
    with temporary_jsonl(rows, "rows.jsonl") as file:
        reading = Reading(group="pair")
        data = get_dataset(str(file), "train", reading=reading, eval_share=0.0)
        pairs = [
            Row(
                prompt=row.prompt,
                responses=[row.responses[i], row.responses[j]],
                pairs=[(0, 1)],
                sft_target=None,
                source=row.source,
            )
            for row in data.rows
            for i, j in row.pairs
        ]
    keep_end = config.truncation_mode or data.truncation
    return load_scorer(ref, config, reference, beta).score(pairs, keep_end)


def sample(
    model: Opened,
    prompts: Sequence[Text],
    mode: str = "sample",
    *,
    max_new_tokens: int,
    seed: int = 0,
    batch_size: int = 8,
    chat_template: str | None = None,
    **options: Any,
) -> list[list[str]]:
    """Sample answers to prompts, each a string or a list of messages. -> the answers to each

    `mode` and `options` (n, temperature, top_p, stop, ...) are those of sample.py. Raises UserError
    for options that the mode would ignore.
    """
    decoding = Decoding(mode, max_new_tokens=max_new_tokens, **options).checked()
    asked = [Prompt(text, f"prompt {i}") for i, text in enumerate(prompts, 1)]
    template = template_of(model.ref, chat_template, model.tokenizer)
    add_bos = bool(model.ref.config.get("add_bos", True))
    read = read_prompts(model, asked, template, add_bos, longest_prompt(model, decoding))
    drawn = answers(
        model.model,
        model.tokenizer,
        [prompt.ids for prompt in read],
        decoding,
        batch_size=batch_size,
        seed=seed,
    )
    return [[answer.text for answer in some] for some in drawn]
