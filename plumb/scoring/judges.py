"""Decide which of two answers is better: by a rule, or by a language model at an OpenAI-compatible
endpoint.

The replies of an endpoint are kept on disk, one line per question, so that no question is paid for
twice.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import httpx
from tqdm import tqdm

from plumb.console import quiet
from plumb.errors import UserError

PROMPTS = Path(__file__).with_name("prompts")
TEMPLATES = ("hh", "tldr", "tldr_concise")  # the prompts of arXiv:2305.18290, appendix C.2
MARKS = r"""[ "'*.()<>\[\]“”`]*"""
VERDICT_LINE = re.compile(
    rf"^\W*(?:[\w ]+:{MARKS}(?:(?:response|summary) {MARKS})?)?(A|B|tie){MARKS}\r?$",
    re.MULTILINE | re.IGNORECASE,
)
# seconds before a question is asked again; each wait is twice the one before
FIRST_WAIT = 1.0
LONGEST_WAIT = 60.0

Verdict = Literal["a", "b", "tie"]


class Comparison(NamedTuple):
    """Hold a question to a judge, in one order."""

    prompt: str
    a: str
    b: str


def rule(spec: str) -> Callable[[str], float]:
    """Return the function that scores an answer by a rule: `rule:longer`, `rule:shorter` (in
    characters), or `rule:contains=TEXT`.

    >>> rule("rule:contains=Thank")("I thank you")
    1.0
    """
    name, _, text = spec.removeprefix("rule:").partition("=")
    if name == "contains" and text:
        return lambda answer: float(text.casefold() in answer.casefold())
    if name in ("longer", "shorter") and not text:
        sign = 1.0 if name == "longer" else -1.0
        # white space around an answer comes from the template
        return lambda answer: sign * len(answer.strip())
    raise UserError(
        f"--judge={spec}: no such rule; give rule:longer, rule:shorter or rule:contains=TEXT"
    )


def read_template(name: str) -> str:
    """Return the judge's prompt: one of TEMPLATES, or the contents of a file with {prompt}, {a} and
    {b}.
    """
    path = PROMPTS / f"{name}.txt" if name in TEMPLATES else Path(name).expanduser()
    try:
        template = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        names = ", ".join(TEMPLATES)
        raise UserError(
            f"--judge-template={name}: cannot be read ({error}); give a file, or one of {names}"
        ) from None
    if missing := [field for field in ("{prompt}", "{a}", "{b}") if field not in template]:
        raise UserError(
            f"--judge-template={name}: {missing[0]} is missing; put it where that text belongs"
        )
    return template.strip()


def fill(template: str, comparison: Comparison) -> str:
    """Return the judge's prompt for these answers, whose braces are taken literally."""
    return re.sub(r"\{(prompt|a|b)\}", lambda field: str(comparison._asdict()[field[1]]), template)


def verdict_of(reply: str) -> Verdict | None:
    """Return the verdict in a judge's reply: its last line that consists of A, B or tie, with or
    without "More helpful:" before it; None if there is none.

    >>> verdict_of('Comparison: B is vague.\\nMore helpful: "A"'), verdict_of("Both are fine.")
    ('a', None)
    """
    verdicts = VERDICT_LINE.findall(reply)
    return verdicts[-1].lower() if verdicts else None


class Verdicts:
    """Keep verdicts in a file, one per line, added as they come. A line truncated by a crash is
    skipped.
    """

    def __init__(self, path: Path):
        self.path = path
        self.by_key = dict[str, Verdict]()
        self.lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "a+b") as file:
                file.seek(0)
                content = file.read()
                if content and not content.endswith(b"\n"):
                    file.write(b"\n")
        except OSError as error:
            raise UserError(
                f"--verdicts={path}: cannot be written ({error.strerror}); give another file"
            ) from None
        for line in content.splitlines():
            try:
                row = json.loads(line)
                if row["verdict"] in ("a", "b", "tie"):
                    self.by_key[row["key"]] = row["verdict"]
            except (ValueError, KeyError, TypeError):
                continue

    def add(self, key: str, verdict: Verdict, **what: Any) -> None:
        """Store a verdict and its details. Raises UserError."""
        line = json.dumps({"key": key, "verdict": verdict, **what}, ensure_ascii=False) + "\n"
        try:
            with self.lock, open(self.path, "a", encoding="utf-8") as file:
                file.write(line)
                self.by_key[key] = verdict
        except OSError as error:
            raise UserError(
                f"--verdicts={self.path}: cannot be written ({error.strerror}); give another file"
            ) from None


@dataclass(frozen=True)
class Endpoint:
    """Ask a language model that speaks OpenAI's chat completions."""

    url: str  # http://host:port/v1
    model: str
    template: str
    verdicts: Verdicts
    key: str | None = None  # sent as a bearer token, never shown
    parallel: int = 4  # questions at a time
    timeout: float = 60.0  # seconds for a reply
    tries: int = 5
    max_tokens: int = 512

    def key_of(self, comparison: Comparison) -> str:
        """Return the key a verdict is stored under. The order of the answers is part of it; the
        address of the server is not.
        """
        return hashlib.sha256(
            json.dumps([self.model, self.template, *comparison]).encode()
        ).hexdigest()

    def judge(self, comparisons: Sequence[Comparison]) -> list[Verdict | None]:
        """Return a verdict for each comparison, None if the reply held none. The first is asked
        alone, so that a dead endpoint is noticed at once.

        Raises UserError, in one line; the verdicts received before are kept.
        """
        new = {self.key_of(c): c for c in comparisons if self.key_of(c) not in self.verdicts.by_key}
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        with (
            httpx.Client(
                timeout=self.timeout,
                headers=headers,
                limits=httpx.Limits(max_connections=self.parallel),
            ) as client,
            tqdm(
                total=len(new), desc=f"asking {self.model}", unit="question", disable=quiet()
            ) as progress,
        ):
            rest = iter(new.items())
            for key, comparison in rest:
                self._ask(client, key, comparison, tries=1)
                progress.update()
                break
            pool = ThreadPoolExecutor(self.parallel)
            try:
                for done in as_completed(
                    [pool.submit(self._ask, client, key, c, self.tries) for key, c in rest]
                ):
                    done.result()
                    progress.update()
            finally:
                pool.shutdown(cancel_futures=True)
        return [self.verdicts.by_key.get(self.key_of(c)) for c in comparisons]

    def _ask(self, client: httpx.Client, key: str, comparison: Comparison, tries: int) -> None:
        """Ask until there is a reply, and store its verdict, if it has one. `tries` limits the
        attempts if nobody answers; an overloaded server always gets self.tries.
        """
        question = [{"role": "user", "content": fill(self.template, comparison)}]
        body = {
            "model": self.model,
            "messages": question,
            "temperature": 0,
            "max_tokens": self.max_tokens,
        }
        for attempt in range(1, self.tries + 1):
            wait = FIRST_WAIT * random.uniform(0.5, 1) * 2 ** (attempt - 1)
            try:
                response = client.post(f"{self.url.rstrip('/')}/chat/completions", json=body)
                if response.is_success:
                    reply = response.json()["choices"][0]["message"]["content"]
                    if (verdict := verdict_of(str(reply))) is not None:
                        self.verdicts.add(key, verdict, model=self.model, reply=reply)
                    return
                problem = f"HTTP {response.status_code}: {response.text[:150]}"
                if response.status_code not in (408, 409, 429) and response.status_code < 500:
                    break
                wait = _seconds(response.headers.get("retry-after"), wait)
            except httpx.HTTPError as error:  # refused, reset, too slow
                problem = f"{type(error).__name__}: {error}".removesuffix(": ")
                if attempt >= tries:
                    break
            except httpx.InvalidURL as error:
                problem = str(error)
                break
            except (ValueError, KeyError, IndexError, TypeError):
                problem = f"not a chat completion: {response.text[:100]!r}"
            if attempt < self.tries:
                time.sleep(min(wait, LONGEST_WAIT))
        problem = problem.replace(self.key, "<secret>") if self.key else problem
        n = len(self.verdicts.by_key)
        raise UserError(
            f"--judge={self.url}: no answer from {self.model} ({problem}); check the server,"
            f" --judge-model and --key-env; verdicts kept in {self.verdicts.path}: {n}"
        )


def _seconds(header: str | None, otherwise: float) -> float:
    """Return a Retry-After in seconds; dates are ignored."""
    return float(header) if header and header.strip().isdigit() else otherwise


def key_from(variable: str | None) -> str | None:
    """Return the endpoint's key from the environment variable of that name."""
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UserError(
            f"--key-env={variable}: no such environment variable is set; export it, or leave the"
            " option out"
        )
    if not (key.isascii() and key.isprintable()):
        raise UserError(
            f"--key-env={variable}: its value is not a key; export one line of plain characters"
        )
    return key
