"""Judges: rules, and a language model behind a URL, which is a small server on this machine that
behaves well, or badly.
"""

import json
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import score
from plumb.errors import UserError
from plumb.scoring import judges, winrates
from plumb.scoring.judges import Comparison, Endpoint, Verdicts, fill, read_template, verdict_of


class Server:
    """Chat completions on a free port. `say(prompt)` is the reply: a text, or (status, body); a
    ConnectionError ends the talk.
    """

    def __init__(self, say):
        self.asked = []
        lock = threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(handler):
                body = json.loads(handler.rfile.read(int(handler.headers["content-length"])))
                with lock:
                    self.asked.append((handler.path, dict(handler.headers), body))
                try:
                    said = say(body["messages"][0]["content"])
                except ConnectionError:
                    return handler.connection.close()
                status, text = said if isinstance(said, tuple) else (200, completion(said))
                handler.send_response(status)
                handler.send_header("content-length", str(len(text.encode())))
                handler.end_headers()
                handler.wfile.write(text.encode())

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


def completion(text):
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})


def politer(prompt):
    """Prefers the answer that says please, wherever it stands; neither or both: A."""
    first, second = (prompt.partition(f"Response {x}:\n")[2].partition("\n\n")[0] for x in "AB")
    return (
        "Comparison: one is kinder.\nMore helpful:"
        f' "{"B" if "please" in second and "please" not in first else "A"}"'
    )


@pytest.fixture(autouse=True)
def no_long_waits(monkeypatch):
    monkeypatch.setattr(judges, "FIRST_WAIT", 0.01)


def endpoint(url, tmp_path, **options):
    return Endpoint(url, "m", read_template("hh"), Verdicts(tmp_path / "verdicts.jsonl"), **options)


TWO = [Comparison("Why?", "please", "no"), Comparison("Why?", "no", "please")]


def test_the_shipped_prompts_ask_for_what_is_read():
    for name in judges.TEMPLATES:
        template = read_template(name)
        format_asked_for = template.splitlines()[-1].replace('<"A" or "B">', '"B"')
        assert verdict_of("Comparison: A is fine, and so is B.\n" + format_asked_for) == "b"
        assert verdict_of(template) is None  # a model that repeats the question has said nothing
        filled = fill(template, Comparison("Is {a} {b}?", "{prompt}", "second"))
        assert filled.index("Is {a} {b}?") < filled.index("{prompt}") < filled.index("second")


@pytest.mark.parametrize(
    "reply, verdict",
    [
        ("Comparison: x.\nMore helpful: A", "a"),
        ('Comparison: B.\nPreferred: "B".', "b"),
        ("B", "b"),
        ("**B**", "b"),
        ("Preferred: A\n", "a"),
        ("Comparison: A is short.\nMore helpful: tie", "tie"),
        ("A is better.", None),
        ("", None),
        ("**More helpful:** A", "a"),
        ("More helpful: A or B", None),
        ("Comparison: A\nMore helpful: B", "b"),
        ('More helpful: <"A">', "a"),
        ("**Preferred:** Summary B", "b"),
        ("More helpful: [B]\r\n", "b"),
        ("Response A:\nfine", None),
        ("* " * 3000 + "x", None),
    ],
)
def test_what_a_reply_says(reply, verdict):
    assert verdict_of(reply) == verdict


def test_verdicts_are_kept_and_not_asked_for_again(tmp_path):
    with Server(politer) as server:
        assert endpoint(server.url, tmp_path, key="sk-very-secret-key-123").judge(TWO) == ["a", "b"]
        path, headers, body = server.asked[0]
        assert (
            path == "/v1/chat/completions"
            and headers["Authorization"] == "Bearer sk-very-secret-key-123"
        )
        assert body["model"] == "m" and body["temperature"] == 0
        assert body["messages"] == [{"role": "user", "content": fill(read_template("hh"), TWO[0])}]
    kept = (tmp_path / "verdicts.jsonl").read_text()
    assert kept.count("\n") == 2 and "secret" not in kept
    assert endpoint(server.url, tmp_path).judge(TWO) == ["a", "b"]  # the server is gone
    (tmp_path / "verdicts.jsonl").write_text(kept[:-20])  # as a crash leaves it
    with Server(politer) as server:
        assert endpoint(server.url, tmp_path).judge(TWO) == ["a", "b"] and len(server.asked) == 1
        assert replace(endpoint(server.url, tmp_path), template=read_template("tldr")).judge(
            TWO[:1]
        ) == ["a"]  # another question
        assert len(server.asked) == 2
    lines = (tmp_path / "verdicts.jsonl").read_text().splitlines()
    assert len(lines) == 4 and json.loads(lines[2])["verdict"] == "b"


def test_an_overloaded_server_is_asked_again(tmp_path):
    """429, 500, a broken connection, a reply that is no chat completion: then an answer."""
    bad = iter([(429, "slow down"), (500, "oops"), (200, "<html>"), (200, '{"choices": []}')])
    with Server(lambda prompt: next(bad, None) or politer(prompt)) as server:
        assert endpoint(server.url, tmp_path).judge(TWO) == ["a", "b"]
        assert len(server.asked) == 6


def test_a_slow_or_broken_reply_is_asked_for_again(tmp_path):
    wait, n = threading.Event(), iter(range(100))

    def say(prompt):
        turn = next(n)
        if turn == 1:
            wait.wait(5)
        if turn == 2:
            raise ConnectionError
        return politer(prompt)

    many = [Comparison("Why?", "please", str(i)) for i in range(6)]
    with Server(say) as server:
        assert endpoint(server.url, tmp_path, timeout=0.3, parallel=3).judge(many) == ["a"] * 6
        assert len(server.asked) == 8
        wait.set()


def test_a_reply_without_a_verdict_is_none_and_not_kept(tmp_path):
    with Server(lambda prompt: "I'd rather not say.") as server:
        assert endpoint(server.url, tmp_path).judge(TWO) == [None, None]
    assert (tmp_path / "verdicts.jsonl").read_text() == ""


@pytest.mark.parametrize(
    "say, n, said",
    [
        (lambda _: (401, "bad key sk-abc-def-ghi-jkl-mno"), 1, "HTTP 401: bad key <secret>"),
        (lambda _: (404, "no such model"), 1, "HTTP 404: no such model"),
        (lambda _: (200, "<html>hello"), 5, "not a chat completion: '<html>hello'"),
        (lambda _: (503, "busy"), 5, "HTTP 503: busy"),
    ],
)
def test_an_endpoint_that_will_not_do_is_one_line(tmp_path, say, n, said):
    with Server(say) as server:
        with pytest.raises(UserError, match=said) as error:
            endpoint(server.url, tmp_path, key="sk-abc-def-ghi-jkl-mno").judge(TWO)
        assert len(server.asked) == n and "\n" not in str(error.value)


def test_an_endpoint_that_dies_on_the_way_leaves_what_it_said(tmp_path):
    n = iter(range(100))
    many = [Comparison("Why?", "please", str(i)) for i in range(9)]
    dying = Server(lambda prompt: politer(prompt) if next(n) < 4 else (500, "gone"))
    with dying, pytest.raises(UserError, match=r"HTTP 500: gone.*verdicts.jsonl: 4"):
        endpoint(dying.url, tmp_path, parallel=1).judge(many)
    with Server(politer) as server:
        assert endpoint(server.url, tmp_path).judge(many) == ["a"] * 9 and len(server.asked) == 5


# ---- win rates, through the command ----


def samples(path, model, answers):
    lines = [
        {"prompt": f"\n\nHuman: Question {i}?\n\nAssistant:", "model": model, "answers": a}
        for i, a in enumerate(answers)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def files(tmp_path):
    """Against `sft`, `dpo` says please in 3 of 4 prompts, and the same in one; a fifth prompt is
    its own.
    """
    sft = samples(tmp_path / "sft.jsonl", "sft", [[" no"], [" no way"], [" never"], [" well"]])
    dpo = samples(
        tmp_path / "dpo.jsonl",
        "dpo",
        [[" please sit"], [" please do"], [" oh please"], [" well"], [" more"]],
    )
    return [str(sft), str(dpo)]


def winrate(files, *options):
    score.main(score.parser().parse_args(["winrate", *files, *map(str, options)]))


def test_win_rates_by_an_endpoint(files, tmp_path, capsys):
    with Server(politer) as server:
        how = [
            "--baseline",
            "sft",
            "--judge",
            server.url,
            "--judge-model",
            "m",
            "--verdicts",
            tmp_path / "v.jsonl",
        ]
        winrate(files, *how, "--out", tmp_path / "out.jsonl", "--json", tmp_path / "out.json")
        # three pairs in both orders; of equal answers nobody is asked
        assert len(server.asked) == 6
        assert "Query: Question 0?\n" in server.asked[0][2]["messages"][0]["content"]
    found = json.loads((tmp_path / "out.json").read_text())["win_rates"]["dpo"]
    assert (found["wins"], found["ties"], found["losses"], found["n_prompts"], found["swayed"]) == (
        3,
        1,
        0,
        4,
        0,
    )
    assert found["value"] == 0.875 and found["low"] < 0.875 < found["high"]
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["points"] for line in lines] == [1, 1, 1, 0.5] and lines[0][
        "verdict_swapped"
    ] == "b"
    assert "1 prompts are left out: only dpo or only sft" in capsys.readouterr().out


def test_a_judge_that_takes_what_stands_first_decides_nothing(files, tmp_path):
    with Server(lambda _: "Comparison: both.\nMore helpful: A") as server:
        winrate(
            files,
            "--baseline",
            files[0],
            "--judge",
            server.url,
            "--judge-model",
            "m",
            "--verdicts",
            tmp_path / "v.jsonl",
            "--json",
            tmp_path / "out.json",
        )
    found = json.loads((tmp_path / "out.json").read_text())["win_rates"]["dpo"]
    assert (found["wins"], found["ties"], found["losses"], found["swayed"]) == (0, 4, 0, 0.75)


@pytest.mark.parametrize(
    "rule, counts",
    [
        ("rule:contains=PLEASE", (3, 1, 0)),
        ("rule:longer", (3, 1, 0)),
        ("rule:shorter", (0, 1, 3)),
    ],
)
def test_win_rates_by_a_rule(files, tmp_path, rule, counts):
    winrate(files, "--baseline", "sft", "--judge", rule, "--json", tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())["win_rates"]["dpo"]
    assert (found["wins"], found["ties"], found["losses"]) == counts


BEHIND_A_URL = ["--baseline", "sft", "--judge", "http://localhost:1/v1", "--judge-model", "m"]


@pytest.mark.parametrize(
    "options, said",
    [
        (
            ["--baseline", "base", "--judge", "rule:longer"],
            r"--baseline=base: none of the models \(sft, dpo\) match",
        ),
        (["--baseline", "sft", "--judge", "rule:nicer"], "--judge=rule:nicer: no such rule"),
        (
            ["--baseline", "sft", "--judge", "rule:longer", "--beta", "1"],
            "--beta: --judge=rule:longer does not use it",
        ),
        (
            ["--baseline", "sft", "--judge", "some-model", "--parallel", "2"],
            "--parallel: --judge=some-model does not use it",
        ),
        (BEHIND_A_URL[:4], "give --judge-model NAME"),
        ([*BEHIND_A_URL, "--key-env", "NO_SUCH_KEY"], "--key-env=NO_SUCH"),
        ([*BEHIND_A_URL, "--judge-template", "x"], "template=x: cannot"),
        (BEHIND_A_URL, "no answer from m .ConnectError"),
        ([*BEHIND_A_URL, "--timeout", "0"], "--timeout: 0: give more"),
        (
            ["--baseline", "sft", "--judge", "http://[::1/v1", "--judge-model", "m"],
            "no answer from m",
        ),
        (["--baseline", "sft"], "--judge"),
    ],
)
def test_what_is_refused(files, tmp_path, options, said, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=said):
        winrate(files, *options)


def test_a_policy_pt_is_a_models_name(tmp_path, monkeypatch):
    """And what is around an answer gives it no points, nor, after messages, another score."""
    monkeypatch.chdir(tmp_path)
    Path("policy.pt").write_bytes(b"weights")
    prompt = [{"role": "user", "content": "q"}]
    both = [
        {"prompt": prompt, "model": "policy.pt", "response": "Yes"},
        {"prompt": prompt, "model": "b", "response": "  Yes\n"},
    ]
    Path("both.jsonl").write_text("".join(json.dumps(line) + "\n" for line in both))
    winrate(
        ["both.jsonl"], "--baseline", "policy.pt", "--judge", "rule:longer", "--json", "out.json"
    )
    assert json.loads(Path("out.json").read_text())["win_rates"]["b"]["ties"] == 1
    lines = winrates.read_policies([Path("both.jsonl")], "b")[0].values()
    some = winrates.duels(*lines)
    assert winrates.by_points(some, lambda asked: range(len(asked))).points.tolist() == [0.5]
    with pytest.raises(UserError, match="--out=both.jsonl: is also read"):
        winrate(["both.jsonl"], "--baseline", "b", "--judge", "rule:longer", "--out", "both.jsonl")


def test_no_verdict_at_all_is_json(files, tmp_path):
    with Server(lambda _: "Both.") as server:
        winrate(
            [files[0], str(samples(tmp_path / "x.jsonl", "x", [[" please"]]))],
            "--baseline",
            "sft",
            "--judge",
            server.url,
            "--judge-model",
            "m",
            "--verdicts",
            tmp_path / "v.jsonl",
            "--json",
            tmp_path / "out.json",
        )
    assert "NaN" not in (said := (tmp_path / "out.json").read_text())
    assert json.loads(said)["win_rates"]["x"]["value"] is None


def test_files_that_do_not_fit_together(files, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="have no other model's answers"):
        winrate(files[:1], "--baseline", "sft", "--judge", "rule:longer")
    other = samples(tmp_path / "other.jsonl", "sft", [[" a"]])
    with pytest.raises(UserError, match=r"none of the models|2 of the models"):
        winrate([*files, str(other)], "--baseline", "sft", "--judge", "rule:longer")
    Path(files[1]).write_text('{"prompt": "x", "answers": [1]}\n')
    with pytest.raises(UserError, match=r"dpo.jsonl, line 1: field 'answers\[0\]' is a number"):
        winrate(files, "--baseline", "sft", "--judge", "rule:longer")
    with pytest.raises(UserError, match="no prompt in common"):
        winrate([files[0], str(one_more(tmp_path))], "--baseline", "sft", "--judge", "rule:longer")


def one_more(tmp_path):
    path = tmp_path / "apart.jsonl"
    path.write_text('{"prompt": "another", "response": "x"}\n')
    return path
