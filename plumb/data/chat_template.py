"""Render conversations with a chat template, and find out what the template leaves out.

A message is passed to the template complete, with its tool calls, reasoning and all its other
fields, and so are the row's tools, documents and other variables that the template reads. What it
does not render is found by trying.
"""

from __future__ import annotations

import inspect
import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jinja2
import jinja2.ext
import jinja2.meta

from plumb.data.files import Messages, describe, place_of, shorten
from plumb.data.forms.turns import ASKING
from plumb.data.rows import is_empty
from plumb.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BASIC = frozenset(("system", "user", "assistant"))  # roles for which no mapping is proposed
TOOL = frozenset(("function", "observation", "ipython", "function_response", "tool_response"))
MARK = "Zq7Zq7Zq7"  # stands in a message to see whether its content is rendered
TRIES = 100  # rows that are tried before a field counts as not rendered
SHORTENED = "earlier turns shortened by the chat template"
SHORTENED_ANSWER = "answers shortened by the chat template"


def variables_of(template: str) -> frozenset[str]:
    """Return the variables that a template reads but does not set itself; none if it is not a valid
    template.

    >>> sorted(variables_of("{% for m in messages %}{{ m.role }}{% endfor %}{{ tools }}"))
    ['messages', 'tools']
    """
    environment = jinja2.Environment(extensions=[jinja2.ext.loopcontrols])  # noqa: S701  nothing is rendered here
    text = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", template)  # transformers' own tag
    try:
        return frozenset(jinja2.meta.find_undeclared_variables(environment.parse(text)))
    except jinja2.TemplateError:  # reported when it is rendered
        return frozenset()


class ChatTemplate:
    """Render conversations with a chat template, and record what it leaves out.

    `unused`: fields that it does not render -> rows that have them. `altered`: turns whose text is
    incomplete.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str):
        self.tokenizer = tokenizer
        self.text = text
        taken = set(inspect.signature(tokenizer.apply_chat_template).parameters) - {
            "tools",
            "documents",
        }
        self._reserved = taken | {"messages"} | set(tokenizer.special_tokens_map)
        self._variables = variables_of(text) - self._reserved
        self._roles: set[str] = set()  # of which content is known to be rendered
        self._read: set[str] = set()  # fields of messages that are known to be rendered
        self._tries: Counter[str] = Counter()
        self._unread: Counter[str] = Counter()
        self._unused: Counter[str] = Counter()  # fields of rows
        self.altered: Counter[str] = Counter()

    @property
    def unused(self) -> Counter[str]:
        fields = {
            f"{name} (of messages)": n for name, n in self._unread.items() if name not in self._read
        }
        return self._unused + Counter(fields)

    def render(
        self,
        prompt: Messages,
        responses: Sequence[Messages],
        source: str,
        more: Mapping[str, Any] | None = None,
    ) -> tuple[str, list[str]]:
        """Return the prompt with the opening of an answer, and for each response what the template
        appends to that.

        A response ends before the EOS that ends its turn, which is added later. `more`: the row's
        other fields. Raises UserError if the template refuses the conversation, does not render
        part of it, or renders it differently once the answer is there.
        """
        variables = self._variables_of(
            more or {}, place_of(prompt[0], source, 0)[0] if prompt else source
        )
        head, renderings = self._rendered(prompt, responses, variables, source)
        tails, unread = [], set[str]()
        for response, rendering in zip(responses, renderings, strict=True):
            turns = [*prompt, *response]
            if not rendering.startswith(head):
                raise self._differs(prompt, response, variables, source, (head, rendering))
            unread |= self._unread_of(turns, rendering, variables)
            self._check_contents(turns, rendering, variables, source)
            self._check_answer(turns, source)
            tail = rendering[len(head) :]
            body, eos, after = tail.rpartition(str(self.tokenizer.eos_token or "\0"))
            tails.append(body if eos and not after.strip() else tail)
        self._unread.update(unread)
        return head, tails

    def _rendered(
        self,
        prompt: Messages,
        responses: Sequence[Messages],
        variables: Mapping[str, Any],
        source: str,
    ) -> tuple[str, list[str]]:
        turns = prompt
        try:
            head = self._text(prompt, variables, opens=True)
            renderings = []
            for response in responses:
                turns = [*prompt, *response]
                renderings.append(self._text(turns, variables))
        except Exception as error:  # jinja2's, and the template's own raise_exception
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            if proposed := self._role_map(turns, len(prompt), variables):
                raise self._bad_role(turns, proposed, f"refuses ({reason})", source) from None
            where = place_of(turns[0], source, 0)[0] if turns else source
            fix = "give another with chat_template=FILE, or chat_template=hh"
            raise UserError(
                f"{where}: the chat template refuses this conversation: {reason}; {fix}"
            ) from None
        return head, renderings

    def _text(
        self, turns: Sequence[Mapping[str, Any]], variables: Mapping[str, Any], opens: bool = False
    ) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                list(turns),  # type: ignore[arg-type]
                chat_template=self.text,
                tokenize=False,
                add_generation_prompt=opens,
                **variables,
            )
        )

    # ---- variables ----

    def _variables_of(self, more: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Return those of a row's fields that the template reads as variables; count the others."""
        named = more.get("chat_template_kwargs")
        named = _json("chat_template_kwargs", named, dict, where) if named else {}
        variables = {}
        fields = [(k, k, v) for k, v in more.items() if k != "chat_template_kwargs"]
        for shown, name, value in [
            *fields,
            *((f"chat_template_kwargs.{k}", k, v) for k, v in named.items()),
        ]:
            if name in self._variables:
                variables[name] = value
            else:
                self._unused[shown] += 1
        for name in {"tools", "documents"} & variables.keys():
            variables[name] = values = _json(name, variables[name], list, where)
            variables[name] = [
                _json(f"{name}[{i}]", value, dict, where) for i, value in enumerate(values)
            ] or None
        return variables

    # ---- what is left out ----

    def _unread_of(self, turns: Messages, rendering: str, variables: Mapping[str, Any]) -> set[str]:
        """Return the fields of these messages that are not known to be rendered, after
        trying them.
        """
        names = {name for turn in turns for name in _extras(turn)} - self._read
        for name in sorted(names):
            if self._tries[name] < TRIES:
                self._tries[name] += 1
                less = [{k: v for k, v in turn.items() if k != name} for turn in turns]
                if self._changes(less, rendering, variables):
                    self._read.add(name)
        return names - self._read

    def _changes(
        self, turns: Sequence[Mapping[str, Any]], rendering: str, variables: Mapping[str, Any]
    ) -> bool:
        try:
            return self._text(turns, variables) != rendering
        except Exception:  # it needs what was removed
            return True

    def _check_contents(
        self, turns: Messages, rendering: str, variables: Mapping[str, Any], source: str
    ) -> None:
        """Raise UserError for a message that is not rendered at all; count those whose text is
        incomplete.
        """
        squeezed = ""
        for i, turn in enumerate(turns):
            content, role = turn["content"], turn["role"]
            if not content.strip() or (role in self._roles and content in rendering):
                continue
            squeezed = squeezed or _squeeze(rendering)
            is_there = _squeeze(content) in squeezed
            if role in self._roles and is_there:
                continue
            if self._renders(turns, i, variables):
                self._roles.add(role)
                if not is_there:
                    self.altered[SHORTENED_ANSWER if i == len(turns) - 1 else SHORTENED] += 1
            elif beside := [name for name in _extras(turn) if name in self._read]:
                self.altered[f"contents left out by the chat template beside {beside[0]}"] += 1
            else:
                raise self._vanished(turns, i, variables, source)

    def _renders(self, turns: Messages, i: int, variables: Mapping[str, Any]) -> bool:
        """Return whether the content of this message changes the rendering."""
        marked = [*turns[:i], {**turns[i], "content": MARK}, *turns[i + 1 :]]
        try:
            return MARK in self._text(marked, variables)
        except Exception:
            return True

    def _vanished(
        self, turns: Messages, i: int, variables: Mapping[str, Any], source: str
    ) -> UserError:
        does = "renders nothing of"
        if proposed := self._role_map(turns, len(turns) - 1, variables):
            return self._bad_role(turns, proposed, does, source)
        where, field = place_of(turns[i], source, i)
        role = turns[i]["role"]
        return UserError(
            f"{where}: the chat template {does} field '{field}' (role {role!r}); "
            "give another with chat_template=FILE, or chat_template=hh, or remove the turn"
        )

    def _check_answer(self, turns: Messages, source: str) -> None:
        """Raise UserError for an answer without content whose other fields the template does not
        read.
        """
        answer = turns[-1]
        extras = _extras(answer)
        if answer["content"].strip() or not extras or self._read & set(extras):
            return
        where, field = place_of(answer, source, len(turns) - 1)
        raise UserError(
            f"{where}: the chat template renders nothing of field '{field}': its content is empty,"
            f" and {', '.join(extras)} is not read; give a template that reads it with"
            " chat_template=FILE"
        )

    # ---- roles, and answers that cannot be told from the prompt ----

    def _differs(
        self,
        prompt: Messages,
        response: Messages,
        variables: Mapping[str, Any],
        source: str,
        texts: tuple[str, str],
    ) -> UserError:
        turns = [*prompt, *response]
        if proposed := self._role_map(turns, len(prompt), variables):
            return self._bad_role(turns, proposed, "does not open an answer for", source)
        same = len(os.path.commonprefix(texts))
        alone, with_answer = (shorten(text[same : same + 60]) for text in texts)
        where, _ = place_of(turns[-1], source, len(turns) - 1)
        return UserError(
            f"{where}: the chat template ends the prompt with {alone} where, with the answer after"
            f" it, stands {with_answer}, so that they cannot be separated; give another with"
            " chat_template=FILE, or chat_template=hh"
        )

    def _role_map(
        self, turns: Messages, n_prompt: int, variables: Mapping[str, Any]
    ) -> dict[str, str]:
        """Return other names for the roles with which the template accepts this conversation; {} if
        there are none.
        """
        roles = {turn["role"] for turn in turns} - BASIC
        for rename in (_usual, _plain, _plainest):
            proposed = {role: rename(role) for role in sorted(roles) if rename(role) != role}
            named = [{**turn, "role": proposed.get(turn["role"], turn["role"])} for turn in turns]
            if proposed and self._takes(named, n_prompt, variables):
                return proposed
        return {}

    def _takes(self, turns: Messages, n_prompt: int, variables: Mapping[str, Any]) -> bool:
        try:
            head = self._text(turns[:n_prompt], variables, opens=True)
            if n_prompt < len(turns) and not self._text(turns, variables).startswith(head):
                return False
        except Exception:
            return False
        return all(
            self._renders(turns, i, variables)
            for i, turn in enumerate(turns)
            if turn["content"].strip()
        )

    def _bad_role(
        self, turns: Messages, proposed: Mapping[str, str], does: str, source: str
    ) -> UserError:
        i = next(i for i, turn in enumerate(turns) if turn["role"] in proposed)
        where, field = place_of(turns[i], source, i)
        names = ", ".join(f"{theirs}: {ours}" for theirs, ours in proposed.items())
        return UserError(
            f"{where}: field '{field}.role' is {describe(turns[i]['role'])}, a role that the chat"
            f" template {does}; set role_map='{{{names}}}', or give a template that accepts it with"
            " chat_template=FILE"
        )


def _extras(turn: Mapping[str, Any]) -> list[str]:
    """Return the fields of a message other than role and content that are not empty."""
    return [
        name
        for name, value in turn.items()
        if name not in ("role", "content") and not is_empty(value)
    ]


def _squeeze(text: str) -> str:
    return "".join(text.split())


def _usual(role: str) -> str:
    """Return what most templates call this role."""
    low = role.lower()
    if low in BASIC | {"tool"}:
        return low
    return "tool" if low in TOOL else _plain(role)


def _plain(role: str) -> str:
    """Return which of system, user and assistant a role is closest to."""
    low = role.lower()
    return "system" if low in ("system", "developer") else _plainest(role)


def _plainest(role: str) -> str:
    return "user" if role.lower() in ASKING else "assistant"


KINDS: dict[type, str] = {list: "a list", dict: "an object"}


def _json(field: str, value: Any, kind: type, where: str) -> Any:
    """Return a list or object that may be given as JSON in a string. Raise UserError for anything
    else.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            problem = f"field '{field}' is {describe(value)}, which is not valid JSON"
            raise UserError(f"{where}: {problem}; write {KINDS[kind]}") from None
    if not isinstance(value, kind):
        raise UserError(f"{where}: field '{field}' is {describe(value)}; write {KINDS[kind]}")
    return value
