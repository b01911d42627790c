"""What `python train.py --help` and `--help TOPIC` print, from the comments in config/."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from textwrap import fill, shorten

from plumb.errors import UserError
from plumb.paths import CONFIG, version
from plumb.settings.mistakes import hint
from plumb.settings.options import Option, comments, options, sections

WIDTH = 80
OVERVIEW = """\
usage: python train.py exp_name=NAME model=NAME datasets=[...] loss=NAME ...

  python train.py exp_name=my_sft model=smollm2-135m datasets=[my.jsonl] \\
      loss=sft
  python train.py exp_name=my_dpo model=smollm2-135m datasets=[my.jsonl] \\
      loss=dpo loss.beta=0.1 model.archive='.cache/*/my_sft_*'

topics of --help (a knob's name works too):
{topics}

flags:
  --config FILE      a YAML file of knobs; those on the command line win
  --config-dir DIR   a folder with model/, loss/ or exp/ files of your own
  -m                 one run for each of several values: -m loss.beta=0.05,0.1
  --cfg job          print the config and stop
  --version          Plumb's version
"""
# A heading of config.yaml -> its topic.
TOPICS = {
    "the run": "run",
    "the data": "data",
    "the training": "training",
    "evaluating, logging and saving": "saving",
}


def answer(arguments: Sequence[str]) -> str | None:
    """Return what to print for --version or --help instead of a run; None for other arguments."""
    if "--version" in arguments:
        return version()
    flags = [a for a in arguments if a in ("-h", "--help") or a.startswith("--help=")]
    if not flags:
        return None
    topic = flags[0].partition("=")[2]
    after = [*arguments, ""][arguments.index(flags[0]) + 1]
    return screen(topic or (after if re.fullmatch(r"[\w.-]+", after) else ""))


def screen(topic: str) -> str:
    """Return the screen of a topic: a group of knobs, a loss, or one knob; the overview for "".
    Raises UserError for none of them.
    """
    if not topic:
        return overview()
    groups = {topic_of(heading): knobs for heading, knobs in sections().items()}
    groups["model"] = options("model/blank_model.yaml", "model.")
    if topic in groups:
        more = f"model=NAME: {', '.join(_names('model'))}" if topic == "model" else ""
        return listing(_folded(groups[topic]), more)
    if topic == "loss":
        return "\n".join(_line(name, _about(name), 20) for name in _names("loss"))
    if topic in _names("loss"):
        return listing(options(f"loss/{topic}.yaml", "loss."), f"loss={topic}: {_about(topic)}")
    every = [option for knobs in groups.values() for option in knobs]
    if nested := [option for option in every if option.name.startswith(f"{topic}.")]:
        return listing(nested)
    for option in every:
        if option.name == topic:
            return f"{topic}={option.default}\n\n{fill(option.meaning, WIDTH)}"
    raise UserError(f"--help {topic}: no such topic, loss or knob{hint(topic)}; see --help alone")


def overview() -> str:
    """Return the screen of --help alone."""
    topics = [
        _line(f"  {topic_of(heading)}", ", ".join(o.name for o in _folded(knobs)))
        for heading, knobs in sections().items()
    ]
    topics.append(
        _line("  model", f"model=NAME, such as {', '.join(_names('model')[-2:])}; model.*")
    )
    topics.append(_line("  loss", "loss=NAME, such as sft, dpo, kto, reward; --help dpo lists its"))
    return OVERVIEW.format(topics="\n".join(topics))


def listing(knobs: Iterable[Option], heading: str = "") -> str:
    """Return a line for each knob: its default, and the beginning of its meaning."""
    lines = [fill(heading, WIDTH), ""] if heading else []
    lines += [_line(f"{o.name}={o.default}", o.meaning, 34) for o in knobs]
    return "\n".join([*lines, "", "--help KNOB shows all that is said about one."])


def _folded(knobs: Iterable[Option]) -> list[Option]:
    """Return the knobs with those of a nested group as one."""
    notes = comments((CONFIG / "config.yaml").read_text("utf-8"))
    folded: dict[str, Option] = {}
    for option in knobs:
        group, dot, _ = option.name.partition(".")
        if dot and group != "model":
            meaning = notes[group].replace("[ours]", "") or f"see --help {group}"
            option = Option(f"{group}.*", "...", meaning, option.new)
        folded.setdefault(option.name, option)
    return list(folded.values())


def topic_of(heading: str) -> str:
    """Return what --help calls a heading of config.yaml."""
    return TOPICS.get(heading, heading.split()[-1])


def _line(name: str, meaning: str, width: int = 12) -> str:
    """Return a name and the beginning of its meaning, which starts in column `width` if it can."""
    left = f"{name:<{width - 1}} "
    return left + shorten(meaning, WIDTH - len(left), placeholder=" ...")


def _names(group: str) -> list[str]:
    return sorted(file.stem for file in (CONFIG / group).glob("*.yaml"))


def _about(loss: str) -> str:
    """Return the first comment of a loss's file."""
    return (CONFIG / f"loss/{loss}.yaml").read_text("utf-8").splitlines()[0].lstrip("# ")
