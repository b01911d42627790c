"""Chat with one or more models in a terminal, for sample.py."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from plumb.data import prompts
from plumb.data.tokenization import HH_TEMPLATE, own_template
from plumb.errors import UserError
from plumb.models.find import ModelRef, Opened, template_of
from plumb.rollouts.decoding import Decoding
from plumb.rollouts.hf_engine import answers
from plumb.rollouts.sampling import longest_prompt

HELP = """\
/reset           forget the conversation (or: clear)
/system TEXT     begin again with this system prompt; without TEXT: with none
/model N or all  who answers from here on
/quit            end (or: quit)"""


@dataclass
class Speaker:
    """Hold one model and its side of the conversation."""

    model: Opened
    template: str | None  # None: the tokenizer's own, or HH's
    decoding: Decoding
    room: int  # tokens of a prompt
    add_bos: bool
    messages: list[dict[str, str]] = field(default_factory=list)

    def answer(self, text: str, system: str, seed: int) -> str:
        """Return the answer to a user's turn, and keep both turns. Raise UserError where the chat
        template refuses the messages, which are then as before.
        """
        tokenizer = self.model.tokenizer
        first = [{"role": "system", "content": system}] if system else []
        messages = [*self.messages, *prompts.user_turn(text)]
        notes = []
        for dropped in range(0, len(messages), 2):
            shown = prompts.Prompt([*first, *messages[dropped:]], "chat")
            rendered = prompts.rendered(shown, tokenizer, self.template)
            ids, cut = prompts.token_ids(rendered, tokenizer, self.add_bos, self.room)
            if not cut:
                break
        messages = messages[dropped:]
        if dropped:
            notes.append(
                f"(only {self.room} tokens fit; the oldest turns are dropped: {dropped // 2})"
            )
        if cut:
            notes.append(f"(too long: only {self.room} tokens fit; only its end is read)")
        ((one,),) = answers(
            self.model.model, tokenizer, [ids], self.decoding, batch_size=1, seed=seed
        )
        self.messages = [*messages, {"role": "assistant", "content": one.text.strip()}]
        return "\n".join([*notes, *wrapped(one.text, terminal_width())])


def speaker(model: Opened, decoding: Decoding, chat_template: str | None) -> Speaker:
    """Return a model that is ready to chat. `chat_template`: what the user chose. Raise UserError
    for a template that does not exist, and where no room is left for a prompt.
    """
    template = template_of(model.ref, chat_template, model.tokenizer)
    room = longest_prompt(model, decoding)
    if (template or own_template(model.tokenizer)) == HH_TEMPLATE:
        # otherwise a model continues and speaks for both
        decoding = replace(decoding, stop=(*decoding.stop, "\n\nHuman:"))
    add_bos = bool(model.ref.config.get("add_bos", True))
    return Speaker(model=model, template=template, decoding=decoding, room=room, add_bos=add_bos)


class Chat:
    """Hold a conversation with several models, each of which continues its own."""

    def __init__(self, speakers: Sequence[Speaker], seed: int):
        """Let all of the speakers answer; their draws depend on `seed` and the turn."""
        self.speakers = list(speakers)
        self.active = list(speakers)
        self.system = ""
        self.seed = seed
        self.turn = 0

    def greeting(self) -> str:
        """Return what is shown first."""
        return f"{names([s.model.ref for s in self.speakers])}; /help shows the commands"

    def reply(self, line: str) -> str | None:
        """Return what is shown after a typed line: answers, or what it did; None: the end."""
        text = line.strip()
        command, _, rest = text.partition(" ")
        if text in ("quit", "/quit"):
            return None
        if text in ("clear", "/reset"):
            return self.reset()
        if command == "/system":
            self.system = rest.strip()
            return self.reset()
        if command == "/model":
            return self.choose(rest.strip())
        if text.startswith("/"):
            return HELP
        return self.answers(text) if text else ""

    def reset(self) -> str:
        """Forget what was said, by all models."""
        for one in self.speakers:
            one.messages = []
        return "(begun again" + (
            f", with the system prompt: {self.system})" if self.system else ")"
        )

    def choose(self, which: str) -> str:
        """Choose who answers: by number, by name, or all."""
        by_name = {one.model.ref.name: one for one in self.speakers}
        numbered = {str(i): one for i, one in enumerate(self.speakers, 1)}
        if which == "all":
            self.active = self.speakers
        elif chosen := numbered.get(which) or by_name.get(which):
            self.active = [chosen]
        else:
            listed = "\n".join(f"  {i}  {name}" for i, name in enumerate(by_name, 1))
            return f"/model N, or /model all:\n{listed}"
        return f"({names([one.model.ref for one in self.active])} will answer)"

    def answers(self, text: str) -> str:
        """Return the active models' answers, below their names if there are several."""
        shown = []
        for one in self.active:
            if len(self.speakers) > 1:
                shown.append(f"---- {one.model.ref.name}")
            try:
                shown.append(one.answer(text, self.system, self.seed + self.turn))
            except UserError as error:  # of the chat template, which may know no system prompt
                shown.append(f"({error})")
        self.turn += 1
        return "\n".join(shown)


def names(refs: Sequence[ModelRef]) -> str:
    return " and ".join(ref.name for ref in refs)


def terminal_width() -> int:
    return min(shutil.get_terminal_size().columns, 120)


def wrapped(text: str, width: int) -> list[str]:
    """Return the text as lines for a terminal, without control characters."""
    clean = [
        "".join(c if c.isprintable() else " " for c in part) for part in text.strip().splitlines()
    ]
    pieces = [
        textwrap.wrap(part, width - 2, initial_indent="  ", subsequent_indent="  ") or [""]
        for part in clean
    ]
    return [piece for some in pieces for piece in some]
