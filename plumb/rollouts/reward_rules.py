"""Rewards by rule: a response, and perhaps the data's own answer, -> a number. No model."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from plumb.errors import UserError
from plumb.rollouts.answered import Answered
from plumb.scoring import judges

OfOne = Callable[[Answered], float]

NUMBER = re.compile(r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
FORMS = "length=TOKENS, regex=PATTERN, exact, number, json, json=SCHEMA.json, contains=TEXT, longer"
# JSON Schema's type -> Python's; a boolean is no number
TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "number": (int, float),
    "integer": (int,),
    "boolean": (bool,),
    "null": (type(None),),
}


def rule(spec: str, where: str) -> OfOne:
    """Return the reward of a rule, such as `length=200`, or `length:200`, which the command line
    takes without quotation marks. Raise UserError, which begins with `where`, the knob, for a rule
    that does not exist.

    >>> rule("number", "")(Answered("2 + 2 =", "It is 4.0.", "4", 5, "eos", "sums.jsonl:1"))
    1.0
    """
    name, equals, text = (re.split("([=:])", spec.removeprefix("rule:"), maxsplit=1) + ["", ""])[:3]
    if name in ("contains", "longer", "shorter"):
        score = judges.rule(f"rule:{name}{equals and '='}{text}")
        return lambda answered: score(answered.response)
    if name in WITHOUT_TEXT and not equals:
        return WITHOUT_TEXT[name]
    if name in WITH_TEXT and text:
        return WITH_TEXT[name](text, f"{where}={spec}")
    raise UserError(f"{where}={spec}: no such rule; give one of {FORMS}, shorter")


def exact(answered: Answered) -> float:
    """Return 1 where the response is the data's own answer, less white space; 0 otherwise."""
    return float(" ".join(answered.response.split()) == " ".join(answered.target.split()))


def number(answered: Answered) -> float:
    """Return 1 where the last number of the response is that of the data's own answer; 0 otherwise,
    and where either has none.
    """
    ours, wanted = _last_number(answered.response), _last_number(answered.target)
    if ours is None or wanted is None:
        return 0.0
    return float(math.isclose(ours, wanted, rel_tol=1e-6, abs_tol=1e-9))


def is_json(answered: Answered) -> float:
    """Return 1 where the response is JSON, 0 otherwise."""
    return float(_parsed(answered.response) is not INVALID)


def length(text: str, where: str) -> OfOne:
    """Return 0 for a response of the given number of tokens, and -x for one that is x times that
    number away from it, at least -1.
    """
    if not text.isdigit() or not int(text):
        raise UserError(f"{where}: expected a number of tokens, 1 or more")
    wanted = int(text)
    return lambda answered: -min(1.0, abs(answered.n_tokens - wanted) / wanted)


def regex(text: str, where: str) -> OfOne:
    """Return 1 for a response in which the pattern is found, 0 otherwise."""
    try:
        pattern = re.compile(text, re.DOTALL)
    except re.error as error:
        raise UserError(f"{where}: not a regular expression: {error}") from None
    return lambda answered: float(pattern.search(answered.response) is not None)


def json_schema(text: str, where: str) -> OfOne:
    """Return 1 for a response that is JSON as the schema in this file wants it, 0 otherwise."""
    try:
        schema = json.loads(Path(text).expanduser().read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: cannot be read ({error}); give a file with a schema") from None
    check_schema(schema, where)

    def score(answered: Answered) -> float:
        value = _parsed(answered.response)
        return float(value is not INVALID and fits(value, schema))

    return score


WITHOUT_TEXT: dict[str, OfOne] = {"exact": exact, "number": number, "json": is_json}
WITH_TEXT: dict[str, Callable[[str, str], OfOne]] = {
    "length": length,
    "regex": regex,
    "json": json_schema,
}

# ---- JSON ----

INVALID = object()


def _parsed(text: str) -> Any:
    """Return the value of JSON, also within a block of code; INVALID where the text is none."""
    block = re.fullmatch(r"\s*```(?:json)?\s*\n(.*?)\n?```\s*", text, re.DOTALL)
    try:
        return json.loads(block[1] if block else text)
    except (ValueError, RecursionError):
        return INVALID


# the keywords of JSON Schema that are checked: whether a value, of the type that the keyword is
# about, is as it says
KEYWORDS: dict[str, tuple[tuple[type, ...], Callable[[Any, Any, Mapping[str, Any]], bool]]] = {
    "type": ((object,), lambda x, wanted, _: _is_of(x, wanted)),
    "enum": ((object,), lambda x, some, _: x in some),
    "const": ((object,), lambda x, one, _: x == one),
    "minimum": ((int, float), lambda x, least, _: x >= least),
    "maximum": ((int, float), lambda x, most, _: x <= most),
    "minLength": ((str,), lambda x, least, _: len(x) >= least),
    "maxLength": ((str,), lambda x, most, _: len(x) <= most),
    "pattern": ((str,), lambda x, pattern, _: re.search(pattern, x) is not None),
    "items": ((list,), lambda x, schema, _: all(fits(one, schema) for one in x)),
    "minItems": ((list,), lambda x, least, _: len(x) >= least),
    "maxItems": ((list,), lambda x, most, _: len(x) <= most),
    "required": ((dict,), lambda x, names, _: all(name in x for name in names)),
    "properties": (
        (dict,),
        lambda x, own, _: all(fits(x[name], schema) for name, schema in own.items() if name in x),
    ),
    "additionalProperties": (
        (dict,),
        lambda x, allowed, schema: allowed or set(x) <= set(schema.get("properties", {})),
    ),
}
NOTES = {"$schema", "$id", "title", "description", "default", "examples"}


def check_schema(schema: Any, where: str) -> None:
    """Raise UserError for a schema with a keyword that would be ignored."""
    if not isinstance(schema, dict):
        raise UserError(f"{where}: a schema is a JSON object, not {json.dumps(schema)[:40]}")
    for keyword, value in schema.items():
        if keyword not in KEYWORDS and keyword not in NOTES:
            raise UserError(
                f"{where}: its keyword {keyword!r} is not supported; these are:"
                f" {', '.join(KEYWORDS)}"
            )
        if keyword == "type" and not {*(value if isinstance(value, list) else [value])} <= {*TYPES}:
            raise UserError(f"{where}: type {value!r} is none of {', '.join(TYPES)}")
        if keyword == "additionalProperties" and not isinstance(value, bool):
            raise UserError(f"{where}: additionalProperties must be true or false")
        for inner in {"items": [value], "properties": _values(value)}.get(keyword, []):
            check_schema(inner, where)


def fits(value: Any, schema: Mapping[str, Any]) -> bool:
    """Return whether a value is as a schema wants it.

    >>> schema = {"type": "object", "required": ["n"], "properties": {"n": {"type": "integer"}}}
    >>> fits({"n": 1}, schema), fits({"n": "1"}, schema), fits({}, schema)
    (True, False, False)
    """
    for keyword, wanted in schema.items():
        if keyword in KEYWORDS:
            types, holds = KEYWORDS[keyword]
            if isinstance(value, types) and not holds(value, wanted, schema):
                return False
    return True


def _is_of(value: Any, wanted: Any) -> bool:
    names = wanted if isinstance(wanted, list) else [wanted]
    if isinstance(value, bool):
        return "boolean" in names
    return any(isinstance(value, TYPES.get(name, ())) for name in names)


def _values(of: Any) -> list[Any]:
    return list(of.values()) if isinstance(of, dict) else [of]


def _last_number(text: str) -> float | None:
    """Return the last number in a text.

    >>> _last_number("3 + 4 = 1,007."), _last_number("none")
    (1007.0, None)
    """
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None
