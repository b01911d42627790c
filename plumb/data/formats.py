"""The forms that a row of a user's own file may have, and how each becomes a `Row`.

`form_of` recognises the form from the first row's fields, and `read_rows` holds every row to it.
Strings are used exactly as they stand (prompt "abc", response " def"); where something has to set
the turns apart, a row becomes chat messages. What no form reads goes with the row, for a chat
template may. A new form is one function with `@form`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from contextvars import ContextVar
from numbers import Integral
from typing import Any, NamedTuple

from plumb.data.files import (
    ROLES,
    Fits,
    Message,
    Messages,
    OnBad,
    RawRow,
    Text,
    and_more,
    describe,
    shorten,
    without_nulls,
)
from plumb.errors import UserError

ASSISTANT = "\n\nAssistant:"
PROMPTS_DIFFER = "prompts of the pair differ"
UNTRAINED = "no answer with a weight above 0"
BEHIND = "turns after the last answer"
TRANSCRIPTS = "chosen / rejected, each a whole dialogue"
EQUAL_SCORES = "equal scores"
# labels in words, in lower case, with spaces for - and _
DESIRABLE = frozenset(
    {"true", "1", "thumbs up", "thumb up", "up", "good", "desirable", "\U0001f44d"}
)
UNDESIRABLE = frozenset(
    {"false", "0", "thumbs down", "thumb down", "down", "bad", "undesirable", "\U0001f44e"}
)


class Row(NamedTuple):
    """Hold one prompt with its responses; this is what the rest of the code consumes."""

    prompt: Text
    responses: list[Text]
    pairs: list[tuple[int, int]]  # (preferred, dispreferred) indices into responses
    sft_target: Text | None
    # "my.jsonl:17": a line (jsonl, csv) or a row, from 1; "hh:123": the 123rd prompt of the split
    source: str
    scores: list[float] | None = None  # of the responses, one each, where they're known
    more: Mapping[str, Any] | None = (
        None  # fields that no form reads, such as tools; a chat template may
    )
    # one for each response: the higher, the better; None: only the pairs are known
    ranking: list[float] | None = None
    labels: list[bool] | None = None  # of the responses, one each: is it desirable?
    weight: float | None = None  # how many rows it counts as; None: not given
    # soft label of its pair: the probability that chosen is the preferred one
    p_chosen: float | None = None
    prefix: str = ""  # what its responses begin with beside their own text


class Fields(Mapping[str, Any]):
    """Hold a row's fields, and remember which were read."""

    def __init__(self, fields: Mapping[str, Any]):
        self._fields = fields
        self._read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        value = self._fields[name]
        self._read.add(name)
        return value

    def __contains__(self, name: object) -> bool:
        return name in self._fields

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    def unread(self) -> dict[str, Any]:
        """Return the fields that were not read and are neither null nor empty."""
        return {k: v for k, v in self._fields.items() if k not in self._read and not is_empty(v)}


def is_empty(value: Any) -> bool:
    return value in (None, "", "[]", "{}", [], {})


# get_dataset's; None: they are not counted
counted: ContextVar[Counter[str] | None] = ContextVar("counted", default=None)


def skipped(reason: str, n: int = 1) -> None:
    """Count `n` rows or pairs left out for `reason`. Forms and loaders call it; `get_dataset`
    reports the counts.
    """
    counter = counted.get()
    if counter is not None:
        counter[reason] += n


class Form(NamedTuple):
    """Describe one way to write a row of pairs or of SFT."""

    name: str  # as the form line calls it
    needs: tuple[str, ...]
    convert: Callable[[RawRow], Row | None]  # None: skipped, and counted

    @property
    def sft(self) -> bool:
        return self.name.endswith("(SFT)")

    @property
    def labelled(self) -> bool:
        return self.name.endswith("(labelled)")

    @property
    def dialogue(self) -> bool:
        return self.name == TRANSCRIPTS


FORMS: list[
    Form
] = []  # the first that fits the first row is taken, so the more specific stand first


def form(
    name: str, *needs: str
) -> Callable[[Callable[[RawRow], Row | None]], Callable[[RawRow], Row | None]]:
    """Register a form: its name in the form line, and the fields that every row must have."""

    def register(convert):
        FORMS.append(Form(name, needs, convert))
        return convert

    return register


# Fields that a form reads when they are there; with every form's `needs`, what `field_map` may
# name.
OPTIONAL = (
    "system",
    "input",
    "output",
    "sft_target",
    "score_chosen",
    "score_rejected",
    "weight",
    "p_chosen",
    "tools",
    "documents",
)
# Roles that ask or inform; every other one answers. In lower case.
ASKING = frozenset(
    {"user", "human", "prompter", "system", "developer", "tool", "function", "observation"}
    | {"ipython", "environment", "tool_response", "function_response"}
)
PAIR_NAMES = frozenset(
    {"prefs", "pref", "preference", "preferences", "dpo", "rm", "reward", "pairs"}
    | {"comparison", "comparisons"}
)
SFT_NAMES = frozenset({"sft", "instruct", "instruction", "instructions", "demonstrations"})


def answers(turn: Mapping[str, Any]) -> bool:
    """Return whether a model may be trained to write this turn."""
    return turn["role"].lower() not in ASKING


@form("prompt / chosen / rejected", "prompt", "chosen", "rejected")
def _prompt_pair(row: RawRow) -> Row | None:
    return _pair(row, row.text_or_messages("prompt"))


@form("conversations / chosen / rejected", "conversations", "chosen", "rejected")
def _conversation_pair(row: RawRow) -> Row | None:
    return _pair(row, row.messages("conversations"))


@form("instruction + input / chosen / rejected", "instruction", "chosen", "rejected")
def _instruction_pair(row: RawRow) -> Row | None:
    return _pair(row, _instruction(row), target="output")


@form("question / chosen / rejected", "question", "chosen", "rejected")
def _question_pair(row: RawRow) -> Row | None:
    return _pair(row, _asked(row, "question"))


@form("input / chosen / rejected", "input", "chosen", "rejected")
def _input_pair(row: RawRow) -> Row | None:
    return _pair(row, _asked(row, "input"))


@form(
    "input / preferred_output / non_preferred_output",
    "input",
    "preferred_output",
    "non_preferred_output",
)
def _openai_pair(row: RawRow) -> Row | None:
    """Read OpenAI's form: `input` is {messages, tools, ...}."""
    value = row.value("input")
    within = value if isinstance(value, dict) and "messages" in value else {"messages": value}
    field = "input.messages" if within is value else "input"
    prompt = row.check_text_or_messages(within["messages"], field)
    asked: Messages = [row.turn("user", prompt, field)] if isinstance(prompt, str) else prompt
    pair = _pair(row, asked, "preferred_output", "non_preferred_output")
    more = {k: v for k, v in within.items() if k != "messages" and not is_empty(v)}
    return pair and pair._replace(more=more)


@form(TRANSCRIPTS, "chosen", "rejected")
def _transcript_pair(row: RawRow) -> Row | None:
    """Read two complete dialogues, as HH transcripts or as messages, that differ in the last
    answer.
    """
    texts = {"chosen": row.text_or_messages("chosen"), **_several(row, "rejected")}
    if any(isinstance(text, list) for text in texts.values()):
        return _pair(row, [])
    halves = {field: _split_text(row, str(text), field) for field, text in texts.items()}
    return _pair_of(row, halves, "chosen", "chosen")


@form("prompt / responses / scores", "prompt", "responses", "scores")
def _scored(row: RawRow) -> Row:
    return _ranked(row, check_scores(row, row.value("scores"), "scores", _n_responses(row)), True)


@form("prompt / responses / ranks", "prompt", "responses", "ranks")
def _with_ranks(row: RawRow) -> Row:
    """Read ranks, of which 1 is the best. Ranks order responses, but do not say how far apart they
    are.
    """
    ranks = check_scores(row, row.value("ranks"), "ranks", _n_responses(row))
    return _ranked(row, [-rank for rank in ranks], False)


def _n_responses(row: RawRow) -> int:
    responses = row.value("responses")
    if not isinstance(responses, list) or not responses:
        raise row.error(
            f"field 'responses' is {describe(responses)}, not a list of responses",
            "write at least one",
        )
    return len(responses)


def _ranked(row: RawRow, ranking: list[float], as_scores: bool) -> Row:
    """Return the row of ranked responses, where a higher number is better; `as_scores`: the numbers
    say how far apart they are.
    """
    prompt, responses = row.text_or_messages("prompt"), row.value("responses")
    texts: list[Text] = [
        row.check_text(response, f"responses[{i}]") for i, response in enumerate(responses)
    ]
    if isinstance(prompt, list) or "system" in row.fields:
        prompt = _as_messages(row, prompt, "user", "prompt")
        texts = [
            _as_messages(row, text, "assistant", f"responses[{i}]") for i, text in enumerate(texts)
        ]
    return _of_ranking(row, prompt, texts, ranking, as_scores)


def _of_ranking(
    row: RawRow, prompt: Text, texts: list[Text], ranking: list[float], as_scores: bool
) -> Row:
    return Row(
        prompt=prompt,
        responses=texts,
        pairs=score_pairs(ranking),
        sft_target=texts[ranking.index(max(ranking))],
        source=row.source,
        scores=ranking if as_scores else None,
        ranking=ranking,
    )


@form("instruction / completions", "instruction", "completions")
def _ultrafeedback(row: RawRow) -> Row:
    """Read openbmb/UltraFeedback as published: a completion is {response, overall_score, ...}."""
    completions = row.value("completions")
    if not isinstance(completions, list) or not completions:
        raise row.error(
            f"field 'completions' is {describe(completions)}, not a list of completions",
            "write at least one",
        )
    for i, completion in enumerate(completions):
        if (
            not isinstance(completion, dict)
            or not {"response", "overall_score"} <= completion.keys()
        ):
            raise row.error(
                f"field 'completions[{i}]' is {describe(completion)}",
                "write {response, overall_score}",
            )
    scores = [completion["overall_score"] for completion in completions]
    scores = check_scores(row, scores, "completions.overall_score", len(completions))
    texts: list[Text] = [
        _as_messages(
            row,
            row.check_text(completion["response"], f"completions[{i}].response"),
            "assistant",
            f"completions[{i}].response",
        )
        for i, completion in enumerate(completions)
    ]
    return _of_ranking(row, _instruction(row), texts, scores, True)


@form("question / response_j / response_k", "question", "response_j", "response_k")
def _stack_exchange_pair(row: RawRow) -> Row:
    """Read lvwerra/stack-exchange-paired, where response_j is preferred. Turned into HH's dialogue,
    as `get_se` does.
    """
    chosen, rejected = " " + row.text("response_j"), " " + row.text("response_k")
    return Row(
        prompt=hh_prompt(row.text("question")),
        responses=[chosen, rejected],
        pairs=[(0, 1)],
        sft_target=chosen,
        source=row.source,
    )


@form("prompt / completion / label (labelled)", "prompt", "completion", "label")
def _labelled_completion(row: RawRow) -> Row | None:
    return _labelled(row, "completion")


@form("prompt / response / label (labelled)", "prompt", "response", "label")
def _labelled_response(row: RawRow) -> Row | None:
    return _labelled(row, "response")


@form("messages / label (labelled)", "messages", "label")
def _labelled_messages(row: RawRow) -> Row | None:
    return _labelled(row, "messages")


@form("conversations / label (labelled)", "conversations", "label")
def _labelled_conversations(row: RawRow) -> Row | None:
    return _labelled(row, "conversations")


def _labelled(row: RawRow, field: str) -> Row | None:
    """Return a row with one response, and whether it is desirable."""
    desirable = _desirable(row)
    is_dialogue = field in ("messages", "conversations")
    converted = _sft(row, [] if is_dialogue else row.text_or_messages("prompt"), field)
    return converted and converted._replace(sft_target=None, labels=[desirable])


def _desirable(row: RawRow) -> bool:
    """Return whether the row's label, or its score and `label_threshold`, call it desirable. Raise
    UserError for any other label.
    """
    label = row.value("label")
    if row.label_threshold is not None:
        return _number(row, "label") >= row.label_threshold
    if (desirable := label_of(label)) is None:
        number = isinstance(label, int | float) and not isinstance(label, bool)
        fix = "set label_threshold to read scores" if number else f"fix or remove the {row.unit}"
        raise row.error(f"field 'label' is {describe(label)}, not true or false", fix)
    return desirable


def label_of(value: Any) -> bool | None:
    """Return whether a label says desirable; None for what is no label.

    >>> label_of("thumbs_up"), label_of(0), label_of("False"), label_of(3)
    (True, False, False, None)
    """
    if isinstance(value, bool | int | float):
        return bool(value) if value in (0, 1) else None
    if not isinstance(value, str):
        return None
    word = value.strip().lower().replace("_", " ").replace("-", " ")
    return True if word in DESIRABLE else False if word in UNDESIRABLE else None


def is_boolean(value: Any) -> bool:
    """Return whether this is a boolean, or its text in a CSV's cell."""
    return str(value).lower() in ("true", "false")


def _number(row: RawRow, field: str) -> float:
    """Return a field's finite number, which a CSV holds as text. Raise UserError for others."""
    value = row.value(field)
    if isinstance(value, str):
        with suppress(ValueError):
            value = float(value)
    return _check_number(row, value, field)


def row_weight(row: RawRow) -> float | None:
    """Return the row's field `weight`; None where it has none. Raise UserError for what is no
    number of at least 0.
    """
    if row.fields.get("weight") in (None, ""):
        return None
    weight = _number(row, "weight")
    if weight < 0:
        raise row.error(
            f"field 'weight' is {weight:g}, which is negative",
            "write how many rows it counts as, such as 0.5 or 2",
        )
    return weight


def row_p_chosen(row: RawRow, n_pairs: int) -> float | None:
    """Return the row's field `p_chosen`; None where it has none. Raise UserError for what is no
    probability, and for one that does not belong to a single pair.
    """
    if row.fields.get("p_chosen") in (None, ""):
        return None
    p_chosen = _number(row, "p_chosen")
    if not 0 <= p_chosen <= 1:
        raise row.error(
            f"field 'p_chosen' is {p_chosen:g}, not a probability",
            "write a number from 0 to 1; 1 says that chosen is preferred for sure",
        )
    if n_pairs != 1:
        raise row.error(
            f"field 'p_chosen' is of one pair, and this row has {n_pairs} pairs",
            "write a row for each pair",
        )
    return p_chosen


@form("prompt / completion (SFT)", "prompt", "completion")
def _completion(row: RawRow) -> Row | None:
    return _sft(row, row.text_or_messages("prompt"), "completion")


@form("prompt / response (SFT)", "prompt", "response")
def _response(row: RawRow) -> Row | None:
    return _sft(row, row.text_or_messages("prompt"), "response")


@form("messages (SFT)", "messages")
def _sft_messages(row: RawRow) -> Row | None:
    return _sft(row, [], "messages")


@form("conversations (SFT)", "conversations")
def _sft_conversations(row: RawRow) -> Row | None:
    return _sft(row, [], "conversations")


@form("instruction + input / output (SFT)", "instruction", "output")
def _sft_instruction(row: RawRow) -> Row | None:
    return _sft(row, _instruction(row), "output")


@form("text (SFT)", "text")
def _sft_text(row: RawRow) -> Row | None:
    """Read a text, all of which is trained on."""
    text = row.text("text")
    return Row(
        prompt="",
        responses=[text],
        pairs=[],
        sft_target=text,
        source=row.source,
    )


def hh_prompt(question: str) -> str:
    return f"\n\nHuman: {question}{ASSISTANT}"


def split_transcript(row: RawRow, field: str) -> tuple[str, str]:
    """Split an HH transcript into (text through the last "\\n\\nAssistant:", the rest)."""
    return _split_text(row, row.text(field), field)


def _split_text(row: RawRow, text: str, field: str) -> tuple[str, str]:
    before, marker, response = text.rpartition(ASSISTANT)
    if not marker:
        raise row.error(
            f"field '{field}' holds no '\\n\\nAssistant:' to end the prompt",
            "add it, or a field 'prompt'",
        )
    return before + marker, response


# Elements that stand on their own lines. All others (links, bold, ...) are part of the text around
# them.
BLOCKS = frozenset(
    "blockquote body dd div dl dt h1 h2 h3 h4 h5 h6 hr li ol p pre table td th tr ul".split()  # noqa: SIM905
)


def strip_html(html: str) -> str:
    """Return the text of the HTML: blocks separated by a blank line, inline markup dropped, code
    kept inside <code>...</code>.

    The original code lost whatever was nested in a paragraph (links, bold), lists and quotes.

    >>> strip_html("<p>Use <b>this</b>:</p><pre><code>x = 1\\n</code></pre>")
    'Use this:\\n\\n<code>x = 1\\n</code>'
    """
    from selectolax.lexbor import LexborHTMLParser

    blocks: list[str] = []
    inline: list[str] = []

    def end_block() -> None:
        if text := "".join(inline).strip():
            blocks.append(text)
        inline.clear()

    # a stack, for quotes may be nested deeper than Python recurses
    stack: list[Any] = [LexborHTMLParser(html).body]
    while stack:
        node = stack.pop()
        if node is None:
            end_block()
        elif node.tag == "-text":
            inline.append(node.text_content or "")
        elif node.tag == "code":
            inline.append(f"<code>{node.text()}</code>")
        elif node.tag == "br":
            inline.append("\n")
        elif node.tag not in ("script", "style"):
            if node.tag in BLOCKS:
                end_block()
                stack.append(None)  # comes up once all its children have
            stack.extend(reversed(list(node.iter(include_text=True))))
    end_block()
    return "\n\n".join(blocks)


def check_scores(row: RawRow, scores: Any, field: str, n: int) -> list[float]:
    """Return the n scores of a row's responses as numbers. Raise UserError for anything else: NaN,
    and what float32 can't hold.
    """
    if not isinstance(scores, list) or len(scores) != n:
        raise row.error(
            f"field '{field}' is {describe(scores)}, not a list of {n} numbers",
            "write one for each response",
        )
    return [_check_number(row, score, f"{field}[{i}]") for i, score in enumerate(scores)]


def _check_number(row: RawRow, value: Any, field: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
        raise row.error(
            f"field '{field}' is {describe(value)}, not a finite number",
            f"fix or remove the {row.unit}",
        )
    return value


def score_pairs(scores: list[float]) -> list[tuple[int, int]]:
    """Return every (better, worse); equal scores carry no preference, and are counted.

    >>> score_pairs([1, 3, 1])
    [(1, 0), (1, 2)]
    """
    pairs = []
    for i in range(len(scores)):
        for j in range(i + 1, len(scores)):
            if scores[i] == scores[j]:
                skipped(EQUAL_SCORES)
            else:
                pairs.append((i, j) if scores[i] > scores[j] else (j, i))
    return pairs


def _instruction(row: RawRow) -> Messages:
    """Return instruction, a blank line, and the input as a user's turn, since a template has to
    separate the turns.
    """
    text = row.text("instruction")
    if row.fields.get("history"):
        raise row.error("field 'history' isn't read", "write the whole dialogue as messages")
    if row.fields.get("input"):  # absent, null and "" all mean none
        text += "\n\n" + row.text("input")
    return [row.turn("user", text, "instruction")]


def _asked(row: RawRow, field: str) -> Messages:
    """Return a question that is separate from its answers as a user's turn."""
    return _as_messages(row, row.text_or_messages(field), "user", field)


def _as_messages(row: RawRow, text: Text, role: str, field: str) -> Messages:
    """Return a string as one turn of `role`; the row's system field comes before a prompt, if it
    has no system turn.
    """
    turns: Messages = [row.turn(role, text, field)] if isinstance(text, str) else text
    if role == "user" and row.fields.get("system") and not (turns and turns[0]["role"] == "system"):
        return [row.turn("system", row.text("system"), "system"), *turns]
    return turns


def _several(row: RawRow, field: str) -> dict[str, Text]:
    """Return a response, or each of a list of them, with the field it is in."""
    value = row.value(field)
    if isinstance(value, list) and value and isinstance(value[0], str | list):
        return {
            f"{field}[{i}]": row.check_text_or_messages(each, f"{field}[{i}]")
            for i, each in enumerate(value)
        }
    return {field: row.check_text_or_messages(value, field)}


def _pair(
    row: RawRow,
    prompt: Text,
    chosen: str = "chosen",
    rejected: str = "rejected",
    target: str = "sft_target",
) -> Row | None:
    """Return chosen, and one or more rejected, after `prompt`; SFT imitates the field `target`
    instead of chosen, if it exists.
    """
    texts = {chosen: row.text_or_messages(chosen), **_several(row, rejected)}
    if row.fields.get(target) is not None:
        texts[target] = row.text_or_messages(target)
    if (
        all(isinstance(text, str) for text in (prompt, *texts.values()))
        and "system" not in row.fields
    ):
        halves = {field: (prompt, text) for field, text in texts.items()}
    else:
        before = _as_messages(row, prompt, "user", "prompt")
        halves = {field: _split_turns(row, before, text, field) for field, text in texts.items()}
    return _pair_of(row, halves, chosen, target if target in texts else chosen)


def _pair_of(
    row: RawRow, halves: Mapping[str, tuple[Text, Text]], chosen: str, target: str
) -> Row | None:
    """Return the row of (prompt, response) by field; a rejected response after a different prompt
    is skipped and counted.
    """
    prompt = halves[chosen][0]
    rejected = {field: half for field, half in halves.items() if field not in (chosen, target)}
    responses = [response for other, response in rejected.values() if other == prompt]
    if len(responses) < len(rejected):
        skipped(PROMPTS_DIFFER, len(rejected) - len(responses))
    if not responses:
        return None
    pairs = [(0, i + 1) for i in range(len(responses))]
    scores = pair_scores(row) if len(responses) == len(rejected) == 1 else None
    return Row(
        prompt=prompt,
        responses=[halves[chosen][1], *responses],
        pairs=pairs,
        sft_target=halves[target][1],
        source=row.source,
        scores=scores,
    )


def pair_scores(row: RawRow) -> list[float] | None:
    """Return the scores of chosen and rejected, if the row or its `metadata` has both
    (UltraFeedback).
    """
    for fields in (row.fields, row.fields.get("metadata")):
        for names in (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score")):
            values = [fields.get(name) for name in names] if isinstance(fields, Mapping) else [None]
            if all(value not in (None, "") for value in values):
                with suppress(ValueError):  # a CSV's cells are strings
                    values = [float(value) if isinstance(value, str) else value for value in values]
                return check_scores(row, values, ", ".join(names), 2)
    return None


def _sft(row: RawRow, prompt: Text, field: str) -> Row | None:
    """Return a row whose response is the target; of a dialogue, the last turn that answers and
    isn't marked as not to be trained on.
    """
    target = row.messages(field) if prompt == [] else row.text_or_messages(field)
    if isinstance(prompt, list) or isinstance(target, list) or "system" in row.fields:
        if isinstance(target, list):
            places = [i for i, turn in enumerate(target) if answers(turn)]
            trained = [i for i in places if not _unmarked(target[i])]
            if places and not trained:
                skipped(UNTRAINED)
                return None
            last = max(trained, default=len(target))
            if target[last + 1 :]:
                skipped(BEHIND, len(target[last + 1 :]))
            target = [_less_mark(turn) for turn in target[: last + 1]]
        prompt, target = _split_turns(
            row, _as_messages(row, prompt, "user", "prompt"), target, field
        )
    return Row(
        prompt=prompt,
        responses=[target],
        pairs=[],
        sft_target=target,
        source=row.source,
    )


MARKS = ("weight", "train")  # of a turn: 0 or false where it is not to be trained


def _unmarked(turn: Mapping[str, Any]) -> bool:
    return any(turn.get(mark) in (0, False) and turn.get(mark) is not None for mark in MARKS)


def _less_mark(turn: Mapping[str, Any]) -> Message:
    """Return the turn without the marks that say yes or no; a weight in between is not used, and
    stays so that it is reported.
    """
    assert isinstance(turn, Message)
    return turn.without(*(mark for mark in MARKS if turn.get(mark) in (0, 1)))


def _split_turns(
    row: RawRow, prompt: Messages, response: Text, field: str
) -> tuple[Messages, Messages]:
    """Return (all turns before the last, [the last]); the last must be an answer.

    `response` may begin with the prompt's own turns, as in UltraFeedback; otherwise it follows
    them.
    """
    turns = _as_messages(row, response, "assistant", field)
    system, before = prompt[: _n_system(prompt)], prompt[_n_system(prompt) :]
    own_system, after = turns[: _n_system(turns)], turns[_n_system(turns) :]
    if after[: len(before)] != before:
        if not after or after[0]["role"].lower() in ("user", "human", "system"):
            raise row.error(
                f"field '{field}' begins with a different prompt than the row's",
                "begin with the assistant's turn",
            )
        after = before + after
    if not after or not answers(after[-1]):
        raise row.error(
            f"field '{field}' has no assistant's turn at its end",
            f"add the response, or remove the {row.unit}",
        )
    if len(after) == 1:
        raise row.error(
            f"field '{field}' has no user's turn before the response", "add it, or a field 'prompt'"
        )
    return (own_system or system) + after[:-1], after[-1:]


def _n_system(turns: Messages) -> int:
    return int(bool(turns) and turns[0]["role"] == "system")


# ---- a file's rows ----


def form_of(
    first: RawRow, field_map: Mapping[str, str] | None, label_threshold: float | None = None
) -> Form:
    """Return the form of a file that begins with this row. Raise UserError for a field_map or
    fields that fit none.
    """
    check_field_map(field_map)
    row = _rename(first, field_map or {})
    return recognise(row._replace(label_threshold=label_threshold))


def read_rows(
    raw_rows: Iterable[RawRow],
    form_: Form,
    field_map: Mapping[str, str] | None = None,
    role_map: Mapping[str, str] | None = None,
    on_bad: OnBad | None = None,
    label_threshold: float | None = None,
) -> Iterator[Row]:
    """Yield one Row for each raw row, in order, except those that are skipped.

    A row that can't be used goes to `on_bad`. Without it, the first such row raises UserError once
    all have been read, so that it can say how many more there are.
    """
    roles = ROLES | dict(role_map or {})
    problem: UserError | None = None
    n_problems = 0
    in_messages: bool | None = None
    for raw in raw_rows:
        try:
            named = _rename(raw, field_map or {})
            row = _convert(form_, named._replace(roles=roles, label_threshold=label_threshold))
            if row and in_messages is None:
                in_messages = isinstance(row.prompt, list)
            if row and in_messages != isinstance(row.prompt, list):
                before, here = ("messages", "text") if in_messages else ("text", "messages")
                mixed = (
                    f"mixed forms: the file began with {before}, and field 'chosen' or 'prompt'"
                    f" here is {here}"
                )
                raise raw.error(mixed, "write all rows in the same format")
        except UserError as error:
            if on_bad:
                on_bad(error)
                continue
            problem = problem or error
            n_problems += 1
        else:
            if row and not problem:
                yield row
    if problem:
        raise UserError(f"{problem}{and_more(n_problems - 1, 'row')}")


def check_field_map(field_map: Mapping[str, str] | None) -> None:
    ours = sorted({field for form_ in FORMS for field in form_.needs}.union(OPTIONAL))
    for name in field_map or {}:
        if name not in ours:
            raise UserError(
                f"field_map.{name}: no form has such a field; the fields to map are"
                f" {', '.join(ours)}"
            )


def _rename(row: RawRow, field_map: Mapping[str, str]) -> RawRow:
    for ours, theirs in field_map.items():
        if theirs not in row.fields:
            raise row.error(
                f"no field '{theirs}', which field_map.{ours} names (the row has: {row.names})",
                "fix field_map",
            )
    if not field_map:
        return row
    kept = {name: value for name, value in row.fields.items() if name not in field_map.values()}
    return row._replace(
        fields=kept | {ours: row.fields[theirs] for ours, theirs in field_map.items()}
    )


def recognise(row: RawRow) -> Form:
    """Return the first form whose fields the row has. Raises UserError for a label in a row that is
    of no form with labels, and for fields that fit no form.
    """
    has = row.fields.keys()
    labelled = "label" in has and (
        row.label_threshold is not None or label_of(row.fields["label"]) is not None
    )
    # another label, a class for instance, is a field like others
    forms = [form_ for form_ in FORMS if not form_.labelled or labelled]
    if fits := next((form_ for form_ in forms if has >= set(form_.needs)), None):
        booleans = [f for f in ("label", "kto_tag") if f in has and is_boolean(row.fields[f])]
        if booleans and fits.sft:
            raise row.error(
                f"labelled data (field '{booleans[0]}' is a boolean) in another form",
                "write prompt, completion and label, or use field_map",
            )
        return fits
    near = max(forms, key=lambda form_: (len(has & set(form_.needs)), -len(form_.needs)))
    fix = "add it, or name the file's own fields in field_map"
    if not has & set(near.needs):
        raise row.error(
            f"no known fields (the row has: {row.names})",
            "write prompt, chosen and rejected, or use field_map",
        )
    missing = next(field for field in near.needs if field not in has)
    raise row.error(f"no field '{missing}' for {near.name} (the row has: {row.names})", f"{fix}")


def _convert(form_: Form, row: RawRow) -> Row | None:
    for field in form_.needs:
        if field not in row.fields:
            raise row.error(
                f"no field '{field}' (the row has: {row.names}), but the file began as"
                f" {form_.name}",
                "add it",
            )
    fields = Fields(without_nulls(row.fields) if row.arrow else row.fields)
    row = row._replace(fields=fields)
    converted = form_.convert(row)
    return converted and converted._replace(
        weight=row_weight(row),
        p_chosen=row_p_chosen(row, len(converted.pairs)),
        more={**fields.unread(), **(converted.more or {})} or None,
    )


def fitting(
    group: str | None,
    field_map: Mapping[str, str] | None = None,
    label_threshold: float | None = None,
) -> Fits:
    """Return which of a folder's splits serve a loss of this group: by their form, then by their
    name.

    `group` None: what is needed is not known, so all of them serve.
    """

    def fits(splits: Mapping[str, Callable[[], RawRow | None]]) -> list[str]:
        if group is None:
            return list(splits)
        forms: dict[str, Form] = {}
        for name, first in splits.items():
            with suppress(UserError):
                row = first()
                if row is not None:
                    forms[name] = form_of(row, field_map, label_threshold)
        of_pairs = [name for name, form_ in forms.items() if not (form_.sft or form_.labelled)]
        serve = of_pairs
        if group == "single":
            serve = [name for name, form_ in forms.items() if form_.sft] or list(forms)
        elif group == "labelled":
            serve = [name for name, form_ in forms.items() if form_.labelled] or of_pairs
        wanted = SFT_NAMES if group == "single" else PAIR_NAMES
        named = [
            name
            for name in serve
            if wanted & set(name.lower().replace("-", "_").replace(".", "_").split("_"))
        ]
        return named if len(named) == 1 else serve

    return fits


# ---- what a loader returns ----


def check_loaded(name: str, loaded: Any) -> Iterator[Row]:
    """Yield a loader's prompts as Rows. Raise UserError for what breaks the contract, naming
    loader, prompt and field.
    """
    if isinstance(loaded, Mapping):
        entries = ((prompt, entry) for prompt, entry in loaded.items())
    elif isinstance(loaded, Iterable) and not isinstance(loaded, str):
        entries = (
            (dict(entry).get("prompt") if isinstance(entry, Mapping) else None, entry)
            for entry in loaded
        )
    else:
        raise UserError(
            f"get_{name} returned {describe(loaded)}; return {{prompt: {{responses, pairs,"
            " sft_target}}"
        )
    for n, (prompt, entry) in enumerate(entries, 1):
        row = RawRow(entry, f"get_{name}", n, f"prompt {shorten(prompt)}, number")
        if not isinstance(entry, Mapping):
            raise row.error(
                f"it has {describe(entry)}", "return {responses, pairs, sft_target} for it"
            )
        row = row._replace(fields={"prompt": prompt, **entry})
        prompt, responses = row.text_or_messages("prompt"), row.value("responses")
        if not isinstance(responses, list):
            raise row.error(
                f"field 'responses' is {describe(responses)}, not a list",
                "return a list of strings",
            )
        for i, response in enumerate(responses):
            row.check_text(response, f"responses[{i}]")
        target = row.value("sft_target")
        target = None if target is None else row.check_text(target, "sft_target")
        scores = entry.get("scores")
        scores = None if scores is None else check_scores(row, scores, "scores", len(responses))
        pairs = _checked_pairs(row, len(responses))
        yield Row(
            prompt=prompt,
            responses=responses,
            pairs=pairs,
            sft_target=target,
            source=f"{name}:{n}",
            scores=scores,
            weight=row_weight(row),
            p_chosen=row_p_chosen(row, len(pairs)),
        )


def _checked_pairs(row: RawRow, n_responses: int) -> list[tuple[int, int]]:
    pairs = row.value("pairs")
    if not isinstance(pairs, list):
        raise row.error(
            f"field 'pairs' is {describe(pairs)}, not a list",
            "return (preferred, dispreferred) indices",
        )
    for i, pair in enumerate(pairs):
        good = (
            isinstance(pair, tuple | list)
            and len(pair) == 2
            and all(isinstance(index, Integral) for index in pair)
        )
        if not good or not all(0 <= index < n_responses for index in pair) or pair[0] == pair[1]:
            problem = (
                f"field 'pairs[{i}]' is {describe(pair)}, not two different indices into"
                f" {n_responses} responses"
            )
            raise row.error(problem, "return (preferred, dispreferred)")
    return [(int(preferred), int(dispreferred)) for preferred, dispreferred in pairs]


def shp_pair(row: RawRow) -> tuple[list[str], list[float], tuple[int, int]]:
    """Return (responses A and B, their scores, (preferred, dispreferred) by `labels`) for a row of
    SHP.
    """
    responses = [" " + row.text("human_ref_A"), " " + row.text("human_ref_B")]
    scores = check_scores(row, [row.value("score_A"), row.value("score_B")], "score_A, score_B", 2)
    label = row.value("labels")
    if label not in (0, 1):
        raise row.error(
            f"field 'labels' is {describe(label)}, not 1 (A preferred) or 0 (B preferred)",
            "fix the row",
        )
    return responses, scores, (0, 1) if label == 1 else (1, 0)
