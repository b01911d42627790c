"""Show the answers of one or more models side by side: `python sample.py MODEL [MODEL ...]`. See
docs/sampling.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

import preference_datasets  # noqa: F401  registers its sets
from plumb.console import to_dict
from plumb.data import prompts
from plumb.data.registry import Reading, get_dataset
from plumb.data.tokenization import own_template
from plumb.errors import UserError
from plumb.paths import get_local_dir, new_file
from plumb.rollouts.decoding import MODES, Decoding, flag
from plumb.settings.cli import Parser, run

if TYPE_CHECKING:
    from plumb.models.find import ModelRef
    from plumb.rollouts.hf_engine import Answer

FIELDS = sorted({name for takes in MODES.values() for name in takes})
TYPES = {"top_k": int, "num_beams": int, "num_beam_groups": int}


def parser() -> argparse.ArgumentParser:
    """Return the parser. Options of a decoding mode are present only if they were given."""
    p = Parser("Show the answers of one or more models side by side.")
    p.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help="hub name, folder, .gguf file, run, checkpoint or policy.pt",
    )
    source = p.add_mutually_exclusive_group()
    source.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help=".jsonl, .json, .csv or .parquet file with one prompt per row",
    )
    source.add_argument(
        "--dataset", metavar="NAME_OR_PATH", help="take the prompts from a data set's test split"
    )
    source.add_argument(
        "--language",
        choices=prompts.BUILT_IN,
        default="english",
        help="language of the built-in prompts",
    )
    source.add_argument("--chat", action="store_true", help="chat with the models in the terminal")
    p.add_argument(
        "--field", default="prompt", help="field of --prompts that holds a string or messages"
    )
    p.add_argument(
        "--raw",
        action="store_true",
        help="use strings from --prompts verbatim, not as a user's turn",
    )
    p.add_argument("--split", choices=("train", "test"), default="test", help="split of --dataset")
    p.add_argument(
        "--plain-prompts",
        choices=("verbatim", "chat"),
        help="how strings of --dataset are read (default: as by the model's run, or verbatim)",
    )
    p.add_argument("--dataset-path", metavar="PATH", help="local copy of a named --dataset")
    p.add_argument(
        "--eval-share",
        type=share,
        default=0.1,
        help="share held out from a --dataset without a test split",
    )
    p.add_argument(
        "--n-prompts", type=positive, help="number of prompts, drawn with --seed (default: all)"
    )
    how = p.add_argument_group("decoding")
    how.add_argument("--mode", choices=MODES, default="sample", help="how answers are generated")
    for name in FIELDS:
        defaults = ", ".join(
            f"{mode} {takes[name]}" for mode, takes in MODES.items() if name in takes
        )
        how.add_argument(
            flag(name),
            type=TYPES.get(name, float),
            default=argparse.SUPPRESS,
            metavar="N",
            help=f"defaults by mode: {defaults}",
        )
    how.add_argument("--n", type=positive, default=1, help="number of answers per prompt")
    how.add_argument("--max-new-tokens", type=positive, default=128)
    how.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="STRING",
        help="string that ends an answer; may be repeated",
    )
    how.add_argument(
        "--seed", type=seed, default=0, help="seed for sampling answers and choosing prompts"
    )
    p.add_argument("--batch-size", type=positive, default=8, help="prompts per batch")
    p.add_argument(
        "--base",
        help="base model of a policy.pt that has no config.yaml, or of a run whose base has moved",
    )
    p.add_argument("--tokenizer", help="tokenizer to use in place of the model's own")
    p.add_argument(
        "--chat-template",
        metavar="hh|NAME|FILE",
        help="template to use in place of the run's or the tokenizer's",
    )
    p.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="dtype of the weights",
    )
    p.add_argument("--device", help="cpu, cuda or cuda:1 (default: the GPU if there is one)")
    p.add_argument(
        "--out",
        type=Path,
        metavar="FILE.jsonl",
        help="write all answers, with the settings needed to reproduce them",
    )
    p.add_argument(
        "--format",
        choices=("answers", "pairs"),
        default="answers",
        help=(
            "format of --out: one line per prompt and model, or {instruction, output_1,"
            " output_2} with"
            " --n 2"
        ),
    )
    p.add_argument(
        "--show", type=not_negative, default=20, help="maximum number of prompts to print"
    )
    return p


def positive(text: str) -> int:
    if (n := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{n} is below 1")
    return n


def not_negative(text: str) -> int:
    if (n := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{n} is below 0")
    return n


def seed(text: str) -> int:
    # within what torch accepts, even after some batches and turns
    if (n := not_negative(text)) >= 2**62:
        raise argparse.ArgumentTypeError(f"{n} is not below 2**62")
    return n


def share(text: str) -> float:
    if not 0 <= (value := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"{value} is not in [0, 1]")
    return value


def decoding_of(options: argparse.Namespace) -> Decoding:
    """Return the decoding. Raise UserError for numbers out of range, and for what
    `Decoding.checked` refuses.
    """
    values = {name: value for name, value in vars(options).items() if name in FIELDS}
    ranges: dict[str, tuple[Callable[[float], bool], str]] = {
        "temperature": (
            lambda v: 1e-4 <= v < 1e4,
            "from 0.0001 to 10000; --mode greedy for the most probable",
        ),
        "top_k": (lambda v: v >= 0, "0 (all) or more"),
        "top_p": (lambda v: 0 < v <= 1, "in (0, 1]"),
        "num_beams": (lambda v: v >= 2, "at least 2"),
        "num_beam_groups": (lambda v: v >= 2, "at least 2"),
        "diversity_penalty": (lambda v: 0 < v < 1e4, "above 0, and below 10000"),
        "penalty_alpha": (lambda v: 0 <= v <= 1, "in [0, 1]"),
    }
    for name, value in values.items():
        fits, expected = ranges[name]
        if not fits(value):
            raise UserError(f"{flag(name)} {value:g}: must be {expected}")
    if options.mode == "contrastive" and values.get("top_k", 1) < 1:
        raise UserError("--top-k 0: contrastive search needs candidates; give 2 or more")
    if "" in options.stop:
        raise UserError(
            "--stop '': an empty string would end every answer; give one that ends an answer"
        )
    return Decoding(
        options.mode, options.n, options.max_new_tokens, tuple(options.stop), **values
    ).checked()


def prompts_of(options: argparse.Namespace, models: list[ModelRef]) -> list[prompts.Prompt]:
    """Return the prompts that the options select; see data/prompts.py for the errors."""
    if options.prompts:
        available: Any = prompts.of_file(options.prompts, options.field, options.raw)
    elif options.dataset:
        cache = str(get_local_dir([".cache"]))
        reading, field_map = reading_of(models, options)
        data = get_dataset(
            options.dataset,
            options.split,
            path=options.dataset_path,
            field_map=field_map,
            reading=reading,
            eval_share=options.eval_share,
            cache_dir=cache,
        )
        available = prompts.of_dataset(data)
    else:
        available = prompts.built_in(options.language)
    return prompts.some_of(available, options.n_prompts, options.seed)


def reading_of(
    models: list[ModelRef], options: argparse.Namespace
) -> tuple[Reading, dict[str, str] | None]:
    """Return how --dataset is read, and its field_map: as by the runs that the models come from.
    Raise UserError if these differ, since all models answer the same prompts.
    """
    by_run: dict[str, dict[str, Any]] = {}
    for ref in models:
        if ref.run_dir is not None:
            knobs = ["plain_prompts", "role_map"]
            if options.dataset in (ref.config.get("datasets") or []):
                knobs += ["split_names", "field_map", "dataset_revisions"]
            by_run[ref.name] = {
                knob: to_dict(value) if isinstance(value, DictConfig) else value
                for knob in knobs
                if (value := ref.config.get(knob)) is not None
            }
    first, of_run = next(iter(by_run.items()), ("", {}))
    for name, other in by_run.items():
        if other != of_run:
            raise UserError(
                f"--dataset {options.dataset}: {first} and {name} read it in different ways,"
                f" {of_run} and {other}; sample from them one at a time"
            )
    reading = Reading(
        role_map=of_run.get("role_map"),
        split_names=of_run.get("split_names"),
        plain_prompts=options.plain_prompts or of_run.get("plain_prompts", "verbatim"),
        revisions=of_run.get("dataset_revisions"),
    )
    return reading, of_run.get("field_map")


def answered(
    ref: ModelRef,
    prompt_list: list[prompts.Prompt],
    decoding: Decoding,
    options: argparse.Namespace,
) -> Iterator[tuple[dict[str, Any], list[Answer]]]:
    """Load one model, and return (its details, its answers) for each prompt."""
    from plumb.models.find import template_of
    from plumb.models.reference_cache import weights_digest
    from plumb.rollouts.hf_engine import answers
    from plumb.rollouts.sampling import longest_prompt, open_policy, read_prompts

    if ref.name != options.models[0]:
        say_loading(ref.name)
    model = open_policy(ref, options.device)
    template = template_of(ref, options.chat_template, model.tokenizer)
    add_bos = bool(ref.config.get("add_bos", True))
    room = longest_prompt(model, decoding)
    read = read_prompts(model, prompt_list, template, add_bos, room)
    if n_cut := sum(prompt.cut for prompt in read):
        print(
            f"{ref.name}: {n_cut} of {len(prompt_list)} prompts exceed {room} tokens; only their"
            " ends are read",
            file=sys.stderr,
        )
    settings = (
        vars(decoding)
        | {
            "seed": options.seed,
            "batch_size": options.batch_size,
            "dtype": options.dtype,
            "device": model.model.device.type,
            "add_bos": add_bos,
            "chat_template": template or own_template(model.tokenizer),
            "tokenizer": model.tokenizer.name_or_path,
            "eos_token_id": model.model.generation_config.eos_token_id,
        }
        | {name: version(name) for name in ("torch", "transformers", "tokenizers")}
    )
    archive = ref.archive and str(ref.archive.resolve())
    about = {
        "model": ref.name,
        "archive": archive,
        "weights": weights_digest(model.model),
        "settings": settings,
    }
    drawn = answers(
        model.model,
        model.tokenizer,
        [prompt.ids for prompt in read],
        decoding,
        batch_size=options.batch_size,
        seed=options.seed,
    )
    for prompt, one, some in zip(prompt_list, read, drawn, strict=True):
        yield (
            {
                "prompt": prompt.text,
                "source": prompt.source,
                "rendered": one.text,
                "prompt_cut": one.cut,
            }
            | about,
            some,
        )


def line(about: dict[str, Any], some: list[Answer], form: str) -> dict[str, Any]:
    """Return the line of --out for a prompt and a model."""
    if form == "pairs":
        prompt = about["prompt"]
        plain = prompt[0]["content"] if isinstance(prompt, list) and len(prompt) == 1 else prompt
        details = {
            name: about[name]
            for name in ("prompt", "source", "model", "archive", "weights", "settings")
        }
        return {"instruction": plain, "output_1": some[0].text, "output_2": some[1].text} | details
    fields = {
        "answers": [a.text for a in some],
        "n_tokens": [a.n_tokens for a in some],
        "ended": [a.ended for a in some],
    }
    return (
        {name: value for name, value in about.items() if name != "settings"}
        | fields
        | {"settings": about["settings"]}
    )


def table(shown: list[list[tuple[dict[str, Any], list[Answer]]]], n: int) -> str:
    """Return a block of text for each prompt: the prompt, then each model's answers."""
    from plumb.rollouts.chat import terminal_width, wrapped

    width = terminal_width()
    blocks = []
    for i, of_prompt in enumerate(zip(*shown, strict=True), 1):
        prompt = of_prompt[0][0]["prompt"]
        text = (
            prompt
            if isinstance(prompt, str)
            else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)
        )
        lines = [
            f"==== {i} of {n}  {of_prompt[0][0]['source']} ".ljust(width, "="),
            *wrapped(text, width),
        ]
        for about, some in of_prompt:
            for j, answer in enumerate(some, 1):
                number = f" {j}/{len(some)}" if len(some) > 1 else ""
                lines.append(
                    f"---- {about['model']}{number} ({answer.n_tokens} tokens, {answer.ended})"
                )
                lines += wrapped(answer.text, width)
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def chat(refs: list[ModelRef], decoding: Decoding, options: argparse.Namespace) -> None:
    """Chat turn by turn, until /quit or the end of the input."""
    from plumb.rollouts.chat import Chat, speaker
    from plumb.rollouts.sampling import open_policy

    speakers = []
    for ref in refs:
        if ref is not refs[0]:
            say_loading(ref.name)
        speakers.append(speaker(open_policy(ref, options.device), decoding, options.chat_template))
    conversation = Chat(speakers, options.seed)
    print(conversation.greeting(), flush=True)
    while True:
        print("> ", end="", flush=True)
        text = sys.stdin.readline()
        reply = conversation.reply(text) if text else None
        if reply is None:
            print(end="" if text else "\n")
            return
        if reply:
            print(reply, flush=True)


def say_loading(name: str) -> None:
    """Print what takes the first seconds."""
    print(f"loading {name}", file=sys.stderr, flush=True)


def check(options: argparse.Namespace) -> None:
    """Raise UserError for options that would be ignored or that conflict."""
    ignored = [
        ("field", "prompt", options.prompts, "--prompts"),
        ("raw", False, options.prompts, "--prompts"),
        ("split", "test", options.dataset, "--dataset"),
        ("dataset_path", None, options.dataset, "--dataset"),
        ("eval_share", 0.1, options.dataset, "--dataset"),
        ("plain_prompts", None, options.dataset, "--dataset"),
        ("format", "answers", options.out, "--out"),
        ("out", None, not options.chat, "all but --chat"),
        ("n_prompts", None, not options.chat, "all but --chat"),
        ("n", 1, not options.chat, "all but --chat"),
    ]
    for name, default, used, where in ignored:
        if getattr(options, name) != default and not used:
            raise UserError(f"{flag(name)} {getattr(options, name)}: is for {where}; leave it out")
    if options.dataset_path and Path(options.dataset).expanduser().exists():
        raise UserError(
            f"--dataset-path {options.dataset_path}: is for named sets, and --dataset"
            f" {options.dataset} is a path; leave it out"
        )
    if twice := [name for i, name in enumerate(options.models) if name in options.models[:i]]:
        raise UserError(
            f"{twice[0]}: given twice, so its answers could not be distinguished; give it once,"
            " and --n for more"
        )
    if options.format == "pairs" and (options.n != 2 or len(options.models) > 1):
        raise UserError(
            "--format pairs: needs --n 2 and one model, whose two answers form a line; set them"
        )


def main(options: argparse.Namespace) -> None:
    """Run the command."""
    check(options)
    decoding = decoding_of(options)
    say_loading(options.models[0])  # and torch, which takes as long

    from plumb.models.find import find_model

    models = [
        find_model(name, options.base, options.tokenizer, options.dtype) for name in options.models
    ]
    for ref in models:
        if ref.scalar:
            raise UserError(
                f"{ref.name}: a reward model, which gives scores, not answers; give a policy"
            )
    if options.chat:
        return chat(models, decoding, options)
    prompt_list = prompts_of(options, models)
    shown: list[list[tuple[dict[str, Any], list[Answer]]]] = [[] for _ in models]
    with new_file(options.out, "--out") if options.out else nullcontext() as file:
        for ref, rows in zip(models, shown, strict=True):
            for about, some in answered(ref, prompt_list, decoding, options):
                if len(rows) < options.show:
                    rows.append((about, some))
                if file:
                    file.write(
                        json.dumps(line(about, some, options.format), ensure_ascii=False) + "\n"
                    )
    print(table(shown, len(prompt_list)))
    if (more := len(prompt_list) - options.show) > 0:
        print(f"\n{more} more prompts are not shown (--show {options.show})")
    if options.out:
        print(f"\n{options.out}: {len(prompt_list) * len(models)} lines")


if __name__ == "__main__":
    run(parser(), main)
