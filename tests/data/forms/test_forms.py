"""Every form of a row, and one line for every mistake: fields -> (prompt, responses, pairs,
sft_target).
"""

from pathlib import Path

import pytest
from own_files import (
    BAD,
    CHAT_PAIR,
    GOOD,
    PAIR,
    SYSTEM,
    Q,
    assistant,
    check_message,
    jsonl,
    load,
    shown,
    user,
)

from plumb.data import files
from plumb.data.forms import comparisons, recognise
from plumb.data.registry import Reading
from plumb.errors import UserError

FIXTURES = Path(__file__).parents[2] / "fixtures"

CHAT = ([Q], [[GOOD], [BAD]], [(0, 1)], [GOOD])
HH = ("\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:", [" d", " e"], [(0, 1)], " d")
FORMS = {
    "strings": (PAIR, ("Name a sea:", [" the Baltic", " the Alps"], [(0, 1)], " the Baltic")),
    "strings with a target": (
        PAIR | {"sft_target": " x"},
        ("Name a sea:", [" the Baltic", " the Alps"], [(0, 1)], " x"),
    ),
    "empty strings": (dict.fromkeys(PAIR, ""), ("", ["", ""], [(0, 1)], "")),
    "strings with a system": (
        {
            "prompt": Q["content"],
            "chosen": "The Baltic.",
            "rejected": "The Alps.",
            "system": "Be brief.",
        },
        ([SYSTEM, Q], *CHAT[1:]),
    ),
    "strings, empty system": (
        {"prompt": Q["content"], "chosen": "The Baltic.", "rejected": "The Alps.", "system": ""},
        CHAT,
    ),
    "message lists": ({"prompt": [Q], "chosen": [GOOD], "rejected": [BAD]}, CHAT),
    "single messages": ({"prompt": [Q], "chosen": GOOD, "rejected": BAD}, CHAT),
    "lists that start with the prompt": (
        {"prompt": Q["content"], "chosen": [Q, GOOD], "rejected": [Q, BAD]},
        CHAT,
    ),
    "lists with a system before the prompt": (
        {"prompt": Q["content"], "chosen": [SYSTEM, Q, GOOD], "rejected": [SYSTEM, Q, BAD]},
        ([SYSTEM, Q], *CHAT[1:]),
    ),
    "whole dialogues": (
        {"chosen": [Q, GOOD, Q, GOOD], "rejected": [Q, GOOD, Q, BAD]},
        ([Q, GOOD, Q], *CHAT[1:]),
    ),
    "transcripts": ({"chosen": HH[0] + " d", "rejected": HH[0] + " e"}, HH),
    "sharegpt": (
        {
            "conversations": [shown(Q)],
            "chosen": shown(GOOD),
            "rejected": shown(BAD),
            "system": None,
        },
        CHAT,
    ),
    "instruction pair": (
        {
            "instruction": "Name",
            "input": "a sea",
            "chosen": "yes",
            "rejected": "no",
            "output": "out",
        },
        (
            [user("Name\n\na sea")],
            [[assistant("yes")], [assistant("no")]],
            [(0, 1)],
            [assistant("out")],
        ),
    ),
    "scores": (
        {"prompt": "p", "responses": ["a", "b", "c"], "scores": [1, 2.5, 1]},
        ("p", ["a", "b", "c"], [(1, 0), (1, 2)], "b"),
    ),
    "scores, chat": (
        {"prompt": [Q], "responses": ["The Alps.", "The Baltic."], "scores": [0, 1]},
        ([Q], [[BAD], [GOOD]], [(1, 0)], [GOOD]),
    ),
    "stack-exchange-paired": (
        {"question": "q", "response_j": "good", "response_k": "bad", "qid": 1},
        ("\n\nHuman: q\n\nAssistant:", [" good", " bad"], [(0, 1)], " good"),
    ),
    "orca": (
        {
            "question": "Name a sea.",
            "chosen": "The Baltic.",
            "rejected": "The Alps.",
            "system": "Be brief.",
        },
        ([SYSTEM, Q], *CHAT[1:]),
    ),
    "distilabel's orca": (
        {"input": "Name a sea.", "chosen": "The Baltic.", "rejected": "The Alps.", "system": ""},
        CHAT,
    ),
    "openai": (
        {
            "input": {"messages": [Q], "tools": []},
            "preferred_output": [GOOD],
            "non_preferred_output": [BAD],
        },
        CHAT,
    ),
    "openai, strings": (
        {
            "input": "Name a sea.",
            "preferred_output": "The Baltic.",
            "non_preferred_output": "The Alps.",
        },
        CHAT,
    ),
    "answers as objects beside a text": (
        {"prompt": "Name a sea.", "chosen": GOOD, "rejected": "The Alps."},
        CHAT,
    ),
    "scored answers as objects": (
        {"prompt": "Name a sea.", "responses": [[GOOD], BAD], "scores": [1, 0]},
        CHAT,
    ),
    "several rejected": (
        {"prompt": "p", "chosen": " a", "rejected": [" b", " c"]},
        ("p", [" a", " b", " c"], [(0, 1), (0, 2)], " a"),
    ),
    "several rejected, chat": (
        {"prompt": [Q], "chosen": [GOOD], "rejected": [[BAD], [assistant("")]]},
        ([Q], [[GOOD], [BAD], [assistant("")]], [(0, 1), (0, 2)], [GOOD]),
    ),
    "text": ({"text": "a b"}, ("", ["a b"], [], "a b")),
    "a list of parts": (
        {
            "prompt": [
                user([{"type": "text", "text": "Name "}, {"type": "text", "text": "a sea."}])
            ],
            "chosen": [GOOD],
            "rejected": [BAD],
        },
        CHAT,
    ),
    "lists of roles and contents": (
        {"messages": {"role": ["user", "assistant"], "content": ["Name a sea.", "The Baltic."]}},
        ([Q], [[GOOD]], [], [GOOD]),
    ),
    "null beside a message": (
        {"messages": [Q | {"name": None}, GOOD | {"tool_calls": None}]},
        ([Q], [[GOOD]], [], [GOOD]),
    ),
    "a call without content": (
        {"messages": [Q, {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}]},
        (
            [Q],
            [[assistant("") | {"tool_calls": [{"id": 1}]}]],
            [],
            [assistant("") | {"tool_calls": [{"id": 1}]}],
        ),
    ),
    "roles of tools": (
        {
            "conversations": [
                shown(Q),
                {"from": "function_call", "value": "{}"},
                {"from": "observation", "value": "1"},
                shown(GOOD),
            ]
        },
        (
            [
                Q,
                {"role": "function_call", "content": "{}"},
                {"role": "observation", "content": "1"},
            ],
            [[GOOD]],
            [],
            [GOOD],
        ),
    ),
    "a weight of 0": (
        {
            "conversations": [
                shown(Q),
                shown(GOOD) | {"weight": 1},
                shown(Q),
                shown(BAD) | {"weight": 0},
            ]
        },
        ([Q], [[GOOD]], [], [GOOD]),
    ),
    "train: false": (
        {"messages": [Q, GOOD, Q, BAD | {"train": False}]},
        ([Q], [[GOOD]], [], [GOOD]),
    ),
    "completion": ({"prompt": "p", "completion": " c"}, ("p", [" c"], [], " c")),
    "completion, empty prompt": ({"prompt": "", "completion": "c"}, ("", ["c"], [], "c")),
    "response": ({"prompt": "p", "response": " c"}, ("p", [" c"], [], " c")),
    "completion, chat": ({"prompt": [Q], "completion": [GOOD]}, ([Q], [[GOOD]], [], [GOOD])),
    "messages": (
        {"messages": [SYSTEM, Q, BAD, Q, GOOD, Q]},
        ([SYSTEM, Q, BAD, Q], [[GOOD]], [], [GOOD]),
    ),
    "conversations": (
        {"conversations": [shown(Q), shown(GOOD)], "system": "Be brief."},
        ([SYSTEM, Q], [[GOOD]], [], [GOOD]),
    ),
    "instruction": (
        {"instruction": "Name", "input": "", "output": "x"},
        ([user("Name")], [[assistant("x")]], [], [assistant("x")]),
    ),
    "ranks": (
        {"prompt": "p", "responses": ["a", "b", "c"], "ranks": [2, 1, 3]},
        ("p", ["a", "b", "c"], [(1, 0), (0, 2), (1, 2)], "b"),
    ),
    "UltraFeedback": (
        {
            "instruction": "p",
            "models": ["m", "n"],
            "completions": [
                {"model": "m", "response": "a", "overall_score": 6.5},
                {"model": "n", "response": "b", "overall_score": 8},
            ],
        },
        ([user("p")], [[assistant("a")], [assistant("b")]], [(1, 0)], [assistant("b")]),
    ),
    "label": ({"prompt": "p", "completion": " c", "label": True}, ("p", [" c"], [], None)),
    "label, response": ({"prompt": "p", "response": " c", "label": False}, ("p", [" c"], [], None)),
    "label, messages": ({"messages": [Q, GOOD], "label": "true"}, ([Q], [[GOOD]], [], None)),
    "label, conversations": (
        {"conversations": [shown(Q), shown(GOOD)], "label": True},
        ([Q], [[GOOD]], [], None),
    ),
    "a label that is none": (
        {"prompt": "p", "completion": " c", "label": 3},
        ("p", [" c"], [], " c"),
    ),
}


# Comparisons: the fields of all of them follow one pattern.
for compared in comparisons.FORMS:
    own = dict(zip(compared.needs[-3:], ("The Alps.", "The Baltic.", "2"), strict=True))
    own[compared.needs[-1]] = compared.needs[-2]  # the second is better
    if compared.needs[0] == "prompt":
        FORMS[compared.name] = (
            {"prompt": "Name a sea.", **own},
            ("Name a sea.", ["The Baltic.", "The Alps."], [(0, 1)], "The Baltic."),
        )
    elif len(compared.needs) == 4:
        FORMS[compared.name] = ({compared.needs[0]: "Name a sea.", **own}, CHAT)
    else:
        own = {"conversation_a": [Q, BAD], "conversation_b": [Q, GOOD], "winner": "model_b"}
        FORMS[compared.name] = (own, CHAT)


@pytest.mark.parametrize("case", FORMS)
def test_forms(tmp_path, case):
    fields, expected = FORMS[case]
    loaded = load(jsonl(tmp_path, fields, fields))
    assert [tuple(row)[:4] for row in loaded.rows] == [expected] * 2  # equal prompts are not merged
    assert loaded.form.startswith(f"{tmp_path}/own.jsonl: 2 rows, ")
    chat = isinstance(expected[0], list)
    assert ("(as chat messages)" if chat else "(as raw text)") in loaded.form
    assert loaded.truncation == ("keep_end" if chat or case == "transcripts" else "keep_start")


def test_every_form_is_tested(tmp_path):
    used = {
        recognise.recognise(files.RawRow(fields, "x", 1, "row")).name
        for fields, _ in FORMS.values()
    }
    assert used == {form.name for form in recognise.FORMS}


def test_pairs_whose_prompts_differ_and_equal_scores_are_counted(tmp_path):
    rows = [
        {"chosen": [Q, GOOD], "rejected": [Q, BAD]},
        {"chosen": [Q, GOOD], "rejected": [user("?"), BAD]},
    ]
    loaded = load(jsonl(tmp_path, *rows))
    assert len(loaded.rows) == 1 and loaded.skipped == {"prompts of the pair differ": 1}
    loaded = load(jsonl(tmp_path, {"prompt": "p", "responses": ["a", "b"], "scores": [1, 1]}))
    assert loaded.rows[0].pairs == [] and loaded.skipped == {"equal scores": 1}


COMPARED = {  # labels of the rows -> the index of the better response (None: a tie), the form line
    "from 0": ([1, 0, 1], [1, 0, 1], "label, 0-based (0: response_a, 1: response_b)"),
    "from 1": ([1, 2, 1.5, 1], [0, 1, None, 0], "label, 1-based (1: response_a, 2: response_b)"),
    "texts of a CSV": (["1", "0"], [1, 0], "label, 0-based"),
    "words": (["tie", "model_b", "A", "tie (bothbad)"], [None, 1, 0, None], "/ label (as raw"),
    "a tie in a word": ([1, "tie", 2], [0, None, 1], "1-based"),
}


@pytest.mark.parametrize("case", COMPARED)
def test_labels_of_comparisons(tmp_path, case):
    labels, better, line = COMPARED[case]
    fields = {"prompt": "p", "response_a": " a", "response_b": " b"}
    loaded = load(jsonl(tmp_path, *({**fields, "label": label} for label in labels)))
    chosen = [[" a", " b"][i] for i in better if i is not None]
    assert [row.responses[0] for row in loaded.rows] == chosen
    assert [row.sft_target for row in loaded.rows] == chosen
    assert loaded.skipped == ({"ties": better.count(None)} if None in better else {})
    assert line in loaded.form


def test_numbered_responses_say_what_a_label_of_1_means(tmp_path):
    row = {"prompt": "p", "output_1": " a", "output_2": " b", "label": 1}
    loaded = load(jsonl(tmp_path, row, row))
    assert loaded.rows[0].responses == [" a", " b"]
    assert "label, 1-based (1: output_1, 2: output_2)" in loaded.form


def test_prompts_alone_are_for_losses_on_own_responses(tmp_path):
    """As text, and as messages behind a system turn; every other loss refuses them."""
    text = {"prompt": "Why?"}
    chat = {"prompt": [Q], "system": "Be brief."}
    for fields, prompt in ((text, "Why?"), (chat, [SYSTEM, Q])):
        loaded = load(jsonl(tmp_path, fields), reading=Reading(group="rollout"))
        (row,) = loaded.rows
        assert (row.prompt, row.sft_target) == (prompt, "") and "prompt alone" in loaded.form
        with pytest.raises(UserError, match=r"line 1: no field 'completion'"):
            load(jsonl(tmp_path, fields), reading=Reading(group="single"))


def test_field_map(tmp_path):
    path = jsonl(tmp_path, {"question": "q", "good": " a", "bad": " b", "prompt": 7})
    loaded = load(path, field_map={"prompt": "question", "chosen": "good", "rejected": "bad"})
    assert tuple(loaded.rows[0])[:3] == ("q", [" a", " b"], [(0, 1)])


def test_field_map_leads_into_fields(tmp_path):
    row = {"q": {"text": "p"}, "chosen": {"answer": " a"}, "others": [{"text": " b"}]}
    where = {"prompt": "q.text", "chosen": "chosen.answer", "rejected": "others.0.text"}
    loaded = load(jsonl(tmp_path, row), field_map=where)
    assert tuple(loaded.rows[0])[:3] == ("p", [" a", " b"], [(0, 1)])
    assert not loaded.rows[0].more


def test_ultrafeedback_binarized():
    loaded = load(FIXTURES / "ultrafeedback_binarized.jsonl")
    assert loaded.rows[0].prompt == [user("Name a river.")]
    assert loaded.rows[0].responses == [[assistant("The Rhine.")], [assistant("The lake.")]]


# ---- mistakes: rows, what the message says ----

LABELLED = {"prompt": "p", "completion": "c", "label": False}
COMPARISON = {"prompt": "p", "response_a": "a", "response_b": "b", "winner": 1}
BAD_ROWS = {  # rows, message; row n stands on line n
    "no rejected at all": (
        [{"prompt": "p", "chosen": "c"}],
        "line 1: no field 'rejected' for prompt / chosen / rejected (the row has: prompt, chosen)",
    ),
    "no rejected in one": (
        [PAIR, {"prompt": "p", "chosen": "c"}],
        (
            "line 2: no field 'rejected' (the row has: prompt, chosen), but the file began as"
            " prompt / chosen / rejected"
        ),
    ),
    "unknown fields": ([{"a": 1, "b": 2}], "line 1: no known fields (the row has: a, b)"),
    "no fields": ([{}], "line 1: no known fields"),
    "another form": (
        [PAIR, {"messages": [Q, GOOD]}],
        "line 2: no field 'prompt' (the row has: messages)",
    ),
    "text, then chat": ([PAIR, CHAT_PAIR], "line 2: mixed forms: the file began with text"),
    "chat, then text": ([CHAT_PAIR, PAIR], "line 2: mixed forms: the file began with messages"),
    "null": ([PAIR, PAIR | {"chosen": None}], "line 2: field 'chosen' is null, not a string"),
    "number": ([PAIR | {"prompt": 17}], "line 1: field 'prompt' is a number (17), not a string"),
    "boolean": ([PAIR | {"prompt": True}], "field 'prompt' is a boolean (True)"),
    "list of strings": (
        [PAIR | {"chosen": ["a"]}],
        "field 'chosen[0]' is a string ('a'), not a message",
    ),
    "empty list": (
        [CHAT_PAIR | {"chosen": []}],
        "field 'chosen' is a list ([]), not a list of messages",
    ),
    "several": (
        [PAIR | {"chosen": None}] * 4,
        (
            "line 1: field 'chosen' is null, not a string; fix or remove it (and 3 more rows with"
            " problems)"
        ),
    ),
    "long value": (
        [PAIR | {"prompt": {"x": "y" * 999}}],
        "field 'prompt[0]' is an object ({'x': 'yyyyyyyy",
    ),
    "kto messages": (
        [{"messages": [Q, GOOD], "kto_tag": True}],
        (
            "line 1: labelled data (field 'kto_tag' is a boolean) in another form; write prompt,"
            " completion and label, or use field_map"
        ),
    ),
    "kto completion": (
        [LABELLED, LABELLED | {"label": 3}],
        "line 2: field 'label' is a number (3), not true or false; set label_threshold to read",
    ),
    "label in words": (
        [LABELLED, LABELLED | {"label": "maybe"}],
        "line 2: field 'label' is a string ('maybe'), not true or false; fix or remove the line",
    ),
    "negative weight": (
        [PAIR, PAIR | {"weight": -2}],
        "line 2: field 'weight' is -2, which is negative; write how many rows it counts as",
    ),
    "weight that is none": (
        [PAIR, PAIR | {"weight": float("nan")}],
        "line 2: field 'weight' is a number (nan), not a finite number; fix or remove the line",
    ),
    "weight in words": (
        [PAIR | {"weight": "heavy"}],
        "line 1: field 'weight' is a string ('heavy'), not a finite number",
    ),
    "soft label": (
        [PAIR, PAIR | {"p_chosen": 1.5}],
        "line 2: field 'p_chosen' is 1.5, not a probability; write a number from 0 to 1",
    ),
    "soft label of several pairs": (
        [PAIR | {"rejected": ["a", "b"], "p_chosen": 0.5}],
        "line 1: field 'p_chosen' is of one pair, and this row has 2 pairs; write a row for each",
    ),
    "a comparison's label from 0 and from 1": (
        [COMPARISON | {"winner": 0}, COMPARISON, COMPARISON | {"winner": 2}],
        (
            "line 3: field 'winner' is a number (2), not which response is better; write 0, 1,"
            " response_a, response_b or tie"
        ),
    ),
    "a comparison's label that may be either": (
        [COMPARISON, COMPARISON],
        (
            "line 1: field 'winner' is 1 in all rows, which may be the first response or the"
            " second; write response_a or response_b"
        ),
    ),
    "a comparison's label in words": (
        [COMPARISON | {"winner": "model_a"}, COMPARISON | {"winner": "c"}],
        "line 2: field 'winner' is a string ('c'), not which response is better; write response_a",
    ),
    "a comparison without a label": (
        [{"prompt": "p", "response_a": "a", "response_b": "b"}],
        "line 1: no field 'winner' for prompt / response_a / response_b / winner (the row has",
    ),
    "NaN among scores": (
        [{"prompt": "p", "responses": ["a", "b"], "scores": [1, float("nan")]}],
        "line 1: field 'scores[1]' is a number (nan), not a finite number",
    ),
    "a completion without a score": (
        [{"instruction": "p", "completions": [{"response": "a"}]}],
        "line 1: field 'completions[0]' is an object ({'response': 'a'}); write {response, overall",
    ),
    "no label": (
        [LABELLED, {"prompt": "p", "completion": "c"}],
        "line 2: no field 'label' (the row has: prompt, completion), but the file began",
    ),
    "ranks": (
        [{"prompt": "p", "responses": ["a", "b"], "ranks": [1]}],
        "line 1: field 'ranks' is a list ([1]), not a list of 2 numbers",
    ),
    "role": (
        [CHAT_PAIR | {"chosen": [{"role": 7, "content": "x"}]}],
        "field 'chosen[0].role' is a number (7), not a role",
    ),
    "a tool's answer": (
        [CHAT_PAIR | {"chosen": [{"role": "tool", "content": "x"}]}],
        "field 'chosen' has no assistant's turn at its end",
    ),
    "an image": (
        [{"messages": [user([{"type": "image_url", "image_url": {"url": "x"}}]), GOOD]}],
        "field 'messages[0].content[0]' is a part of type 'image_url', and only text is read",
    ),
    "audio": (
        [
            {
                "messages": [
                    Q,
                    assistant(
                        [{"type": "text", "text": "a"}, {"type": "input_audio", "data": "x"}]
                    ),
                ]
            }
        ],
        "field 'messages[1].content[1]' is a part of type 'input_audio'",
    ),
    "a part without text": (
        [{"messages": [user([{"type": "text"}]), GOOD]}],
        "field 'messages[0].content[0].text' is null",
    ),
    "content": (
        [CHAT_PAIR | {"chosen": [{"role": "assistant", "content": None}]}],
        "field 'chosen[0].content' is null",
    ),
    "no content": (
        [CHAT_PAIR | {"chosen": [{"role": "assistant"}]}],
        "field 'chosen[0]' is an object",
    ),
    "ends with user": (
        [CHAT_PAIR | {"rejected": [BAD, Q]}],
        "field 'rejected' has no assistant's turn at its end",
    ),
    "other prompt": (
        [CHAT_PAIR | {"rejected": [user("?"), BAD]}],
        "field 'rejected' begins with a different prompt",
    ),
    "no user": ([{"messages": [GOOD]}], "field 'messages' has no user's turn"),
    "no assistant": ([{"messages": [Q]}], "field 'messages' has no assistant's turn"),
    "messages is text": (
        [{"messages": "hello"}],
        "field 'messages' is a string ('hello'), not a list of messages",
    ),
    "no marker": ([{"chosen": "a", "rejected": "b"}], "field 'chosen' holds no '\\n\\nAssistant:'"),
    "scores, too few": (
        [{"prompt": "p", "responses": ["a", "b"], "scores": [1]}],
        "field 'scores' is a list ([1]), not a list of 2 numbers",
    ),
    "scores, nan": (
        [{"prompt": "p", "responses": ["a"], "scores": [float("nan")]}],
        "field 'scores[0]' is a number (nan), not a finite number",
    ),
    "responses": (
        [{"prompt": "p", "responses": "a", "scores": [1]}],
        "field 'responses' is a string ('a')",
    ),
    "input": ([{"instruction": "i", "input": 3, "output": "o"}], "field 'input' is a number (3)"),
    "history": (
        [{"instruction": "i", "output": "o", "history": [["a", "b"]]}],
        "field 'history' isn't read",
    ),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows(tmp_path, case):
    rows, message = BAD_ROWS[case]
    path = jsonl(tmp_path, *rows)
    with pytest.raises(UserError) as caught:
        load(path)
    check_message(caught, message)
    assert str(caught.value).startswith(f"{path}, line ") and len(str(caught.value)) < 300 + len(
        str(path)
    )


@pytest.mark.parametrize(
    "field_map, message",
    [
        (
            {"prompt": "quest"},
            "line 1: no field 'quest', which field_map.prompt names (the row has: prompt, chosen,",
        ),
        ({"promt": "prompt"}, "field_map.promt: no form has such a field"),
        (
            {"prompt": "prompt.text"},
            "line 1: no field 'prompt.text', which field_map.prompt names (prompt has: a string",
        ),
    ],
)
def test_bad_field_map(tmp_path, field_map, message):
    with pytest.raises(UserError) as caught:
        load(jsonl(tmp_path, PAIR), field_map=field_map)
    check_message(caught, message)


def test_role_map(tmp_path):
    path = jsonl(tmp_path, {"messages": [Q | {"role": "asks"}, GOOD | {"role": "bot"}]})
    loaded = load(path, reading=Reading(role_map={"asks": "user", "bot": "assistant"}))
    assert tuple(loaded.rows[0])[:2] == ([Q], [[GOOD]])


def test_turns_that_are_not_trained_are_counted(tmp_path):
    rows = [{"messages": [Q, GOOD, Q, Q]}, {"messages": [Q, GOOD | {"weight": 0}]}]
    loaded = load(jsonl(tmp_path, *rows))
    assert len(loaded.rows) == 1
    assert loaded.skipped == {
        "turns after the last answer": 2,
        "no answer with a weight above 0": 1,
    }


def test_fields_that_no_form_reads_go_with_the_row(tmp_path):
    more = {"tools": "[1]", "id": 7, "empty": [], "score_chosen": 2, "score_rejected": 1}
    (row,) = load(jsonl(tmp_path, CHAT_PAIR | more)).rows
    assert row.more == {"tools": "[1]", "id": 7} and row.scores == [2, 1]
    given = {
        "input": {"messages": [Q], "tools": [{"name": "f"}], "n": 1},
        "preferred_output": GOOD,
        "non_preferred_output": BAD,
    }
    assert load(jsonl(tmp_path, given)).rows[0].more == {"tools": [{"name": "f"}], "n": 1}
