"""Rows as the model reads them: what is rendered of each, what is left out and named, and what is
refused.
"""

import json

import pytest
from tiny import tiny_tokenizer

from plumb.data.chat_template import ChatTemplate, variables_of
from plumb.data.files import Message
from plumb.data.registry import Reading, get_dataset
from plumb.data.tokenization import TextRules, encode
from plumb.errors import UserError

RULES = TextRules(
    max_length=512,
    max_prompt_length=256,
    response_truncation="fixed",
    add_bos=True,
    eos_in_text="strip",
)
# Tools, reasoning and calls, as the templates of 2025 have them.
FULL = (
    "{% if tools %}[tools {{ tools | tojson }}]{% endif %}{% for m in messages %}<{{ m.role }}>"
    "{% if m.reasoning_content %}(think {{ m.reasoning_content }}){% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}(call {{ c.function | tojson }}){% endfor %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PLAIN = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# Renders three roles, and nothing of any other.
SILENT = (
    "{% for m in messages %}{% if m.role == 'user' %}<u>{{ m.content }}{% elif m.role =="
    " 'assistant' %}<a>{{ m.content }}</s>{% elif m.role == 'system' %}<s>{{ m.content }}{% endif"
    " %}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)
STRICT = SILENT.replace(
    "{% endif %}{% endfor %}",
    "{% else %}{{ raise_exception('no such role') }}{% endif %}{% endfor %}",
)
# Opens the reasoning of an answer, and drops what was reasoned.
OPENS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content.split('</think>')[-1] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant><think>{% endif %}"
)
# Keeps the reasoning of the last answer only.
LAST = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content if loop.last else"
    " m.content.split('</think>')[-1] }}</s>{% endfor %}{% if add_generation_prompt %}<assistant>{%"
    " endif %}"
)

Q, A = {"role": "user", "content": "Soup?"}, {"role": "assistant", "content": "Soup it is."}
CALL = {"type": "function", "function": {"name": "look", "arguments": {"q": "soup"}}}
OTHER = {"type": "function", "function": {"name": "guess", "arguments": {"q": "soup"}}}
TOOL = {"type": "function", "function": {"name": "look"}}


def encoded(path, template=FULL, **reading):
    """The file's texts as the model reads them, and the data set that was drawn. -> ([[prompt,
    responses...]], data)
    """
    tokenizer = tiny_tokenizer(chat_template=template)
    data = get_dataset(str(path), "train", eval_share=0, reading=Reading(**reading))
    rows = []
    for chunk in encode(data, tokenizer, RULES):
        ends = [sum(chunk.lengths[: i + 1]) for i in range(len(chunk.lengths))]
        texts = [
            tokenizer.decode(chunk.ids[end - n : end])
            for end, n in zip(ends, chunk.lengths, strict=True)
        ]
        starts = [text for text, _ in chunk.rows]
        rows += [texts[a:b] for a, b in zip(starts, [*starts[1:], len(texts)], strict=False)]
    return rows, data


def written(tmp_path, *rows):
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def call(**more):
    return {"role": "assistant", "content": "", "tool_calls": [CALL], **more}


CALLED = '(call {"name": "look", "arguments": {"q": "soup"}})</s>'
TEXTS = {  # a row -> the prompt, and each response with its EOS
    "messages": ({"messages": [Q, A]}, ["<user>Soup?</s><assistant>", "Soup it is.</s>"]),
    "a call": ({"messages": [Q, call()]}, ["<user>Soup?</s><assistant>", CALLED]),
    "a call without content": (
        {"messages": [Q, {"role": "assistant", "content": None, "tool_calls": [CALL]}]},
        ["<user>Soup?</s><assistant>", CALLED],
    ),
    "tools": (
        {"messages": [Q, call()], "tools": [TOOL]},
        [
            (
                '[tools [{"type": "function", "function": {"name":'
                ' "look"}}]]<user>Soup?</s><assistant>'
            ),
            CALLED,
        ],
    ),
    "tools as JSON": (
        {"messages": [Q, A], "tools": json.dumps([TOOL])},
        [
            (
                '[tools [{"type": "function", "function": {"name":'
                ' "look"}}]]<user>Soup?</s><assistant>'
            ),
            "Soup it is.</s>",
        ],
    ),
    "no tools": (
        {"messages": [Q, A], "tools": "[]"},
        ["<user>Soup?</s><assistant>", "Soup it is.</s>"],
    ),
    "reasoning": (
        {"messages": [Q, A | {"reasoning_content": "Hm."}]},
        ["<user>Soup?</s><assistant>", "(think Hm.)Soup it is.</s>"],
    ),
    "calls that differ": (
        {"prompt": [Q], "chosen": [call()], "rejected": [call(tool_calls=[OTHER])]},
        ["<user>Soup?</s><assistant>", CALLED, CALLED.replace("look", "guess")],
    ),
    "a call and its result before": (
        {
            "prompt": [Q, call(), {"role": "tool", "content": "hot"}],
            "chosen": [A],
            "rejected": "No.",
        },
        [
            f"<user>Soup?</s><assistant>{CALLED}<tool>hot</s><assistant>",
            "Soup it is.</s>",
            "No.</s>",
        ],
    ),
    "openai": (
        {
            "input": {"messages": [Q], "tools": [TOOL]},
            "preferred_output": [A],
            "non_preferred_output": [call()],
        },
        [
            (
                '[tools [{"type": "function", "function": {"name":'
                ' "look"}}]]<user>Soup?</s><assistant>'
            ),
            "Soup it is.</s>",
            CALLED,
        ],
    ),
    "parts": (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "Soup"}, {"type": "text", "text": "?"}],
                },
                A,
            ]
        },
        ["<user>Soup?</s><assistant>", "Soup it is.</s>"],
    ),
    "other roles": (
        {"messages": [{"role": "developer", "content": "Be brief."}, Q, A]},
        ["<developer>Be brief.</s><user>Soup?</s><assistant>", "Soup it is.</s>"],
    ),
    "sharegpt with tools": (
        {
            "conversations": [
                {"from": "human", "value": "Soup?"},
                {"from": "function_call", "value": "{}"},
                {"from": "observation", "value": "1"},
                {"from": "gpt", "value": "Yes."},
            ]
        },
        ["<user>Soup?</s><function_call>{}</s><observation>1</s><assistant>", "Yes.</s>"],
    ),
    "a call at the end": (
        {
            "conversations": [
                {"from": "human", "value": "Soup?"},
                {"from": "gpt", "value": "", "tool_calls": [CALL]},
            ]
        },
        ["<user>Soup?</s><assistant>", CALLED],
    ),
    "spaces": (
        {"prompt": [Q], "chosen": [A | {"content": "  in\n"}], "rejected": [A | {"content": "in"}]},
        ["<user>Soup?</s><assistant>", "  in\n</s>", "in</s>"],
    ),
    "an empty answer": (
        {"prompt": [Q], "chosen": [A], "rejected": [A | {"content": ""}]},
        ["<user>Soup?</s><assistant>", "Soup it is.</s>", "</s>"],
    ),
    "EOS in a call": (
        {
            "messages": [
                Q,
                call(tool_calls=[{"function": {"name": "l</s>ook", "arguments": {"q": "soup"}}}]),
            ]
        },
        ["<user>Soup?</s><assistant>", CALLED],
    ),
    "strings": (
        {"prompt": "Soup? ", "chosen": "Yes", "rejected": " No"},
        ["Soup? ", "Yes</s>", " No</s>"],
    ),
    "several rejected": (
        {"prompt": "Soup?", "chosen": " a", "rejected": [" b", " c"]},
        ["Soup?", " a</s>", " b</s>", " c</s>"],
    ),
    "text": ({"text": "Soup? Yes."}, ["", "Soup? Yes.</s>"]),
    "orca": (
        {"question": "Soup?", "chosen": "Yes.", "rejected": "No.", "system": "Be brief."},
        ["<system>Be brief.</s><user>Soup?</s><assistant>", "Yes.</s>", "No.</s>"],
    ),
}


@pytest.mark.parametrize("case", TEXTS)
def test_rows_as_the_model_reads_them(tmp_path, case):
    row, expected = TEXTS[case]
    rows, data = encoded(written(tmp_path, row))
    assert rows == [expected] and not data.skipped
    assert not data.unused and not data.altered


def test_thinking_goes_by_every_name(tmp_path):
    template = FULL.replace("reasoning_content", "thinking")
    rows, data = encoded(written(tmp_path, {"messages": [Q, A | {"thinking": "Hm."}]}), template)
    assert (
        rows == [["<user>Soup?</s><assistant>", "(think Hm.)Soup it is.</s>"]] and not data.unused
    )


def test_variables_of_the_row(tmp_path):
    """What the template reads and does not set: a field of the row's own, or one of
    chat_template_kwargs.
    """
    template = FULL + "{% if not brief is defined %}{% set brief = 0 %}{% endif %}"
    template = (
        "{{ date }}{{ brief }}{% for d in documents or [] %}[{{ d.text }}]{% endfor %}" + template
    )
    assert variables_of(template) >= {"date", "brief", "documents", "tools"}
    row = {
        "messages": [Q, A],
        "date": "May",
        "documents": [{"text": "hot"}],
        "id": 7,
        "eos_token": "x",
        "chat_template_kwargs": {"brief": 1, "odd": 2},
    }
    rows, data = encoded(written(tmp_path, row), template)
    assert rows == [["May1[hot]<user>Soup?</s><assistant>", "Soup it is.</s>"]]
    assert data.unused == {"id": 1, "eos_token": 1, "chat_template_kwargs.odd": 1}


def test_what_is_not_rendered_is_named(tmp_path):
    """Found by trying: `name` stands in the template, of the call's function; the message's own is
    not rendered.
    """
    template = FULL.replace("c.function | tojson", "c.function.name")
    said = A | {"name": "Bo", "weight": 0.5, "reasoning_content": "Hm.", "empty": []}
    path = written(tmp_path, {"messages": [Q, said], "id": 7}, {"messages": [Q, call()], "id": 8})
    assert encoded(path, template)[1].unused == {
        "name (of messages)": 1,
        "weight (of messages)": 1,
        "id": 2,
    }
    by_json = "{% for m in messages %}{{ m | tojson }};{% endfor %}"  # the message as a whole
    assert not encoded(written(tmp_path, {"messages": [Q, A | {"name": "Bo"}]}), by_json)[1].unused
    assert encoded(
        written(tmp_path, {"prompt": "a", "chosen": "b", "rejected": "c", "tools": [1]})
    )[1].unused == {"tools": 1}


REFUSED = {  # template, row -> what the line says
    "a call that is not rendered": (
        PLAIN,
        {"messages": [Q, call()]},
        (
            "line 1: the chat template renders nothing of field 'messages[1]': its content is"
            " empty, and tool_calls is not read"
        ),
    ),
    "a role that is left out": (
        SILENT,
        {"messages": [Q, A, {"role": "tool", "content": "hot"}, A]},
        (
            "line 1: field 'messages[2].role' is a string ('tool'), a role that the chat template"
            " renders nothing of; set role_map='{tool: user}'"
        ),
    ),
    "a role that is refused": (
        STRICT,
        {"messages": [{"role": "developer", "content": "Hm."}, Q, A]},
        (
            "field 'messages[0].role' is a string ('developer'), a role that the chat template"
            " refuses (no such role); set role_map='{developer: system}'"
        ),
    ),
    "roles with capitals": (
        PLAIN,
        {"messages": [{"role": "User", "content": "a"}, {"role": "Assistant", "content": "b"}]},
        "set role_map='{Assistant: assistant, User: user}'",
    ),
    "model": (
        PLAIN,
        {"messages": [Q, {"role": "model", "content": "b"}]},
        "set role_map='{model: assistant}'",
    ),
    "bot": (
        STRICT,
        {"messages": [Q, {"role": "bot", "content": "b"}]},
        "set role_map='{bot: assistant}'",
    ),
    "observation": (
        STRICT,
        {"messages": [Q, A, {"role": "observation", "content": "b"}, A]},
        "set role_map='{observation: user}'",
    ),
    "a system turn that is left out": (
        SILENT.replace("'system'", "'none'"),
        {"messages": [{"role": "system", "content": "Hm."}, Q, A]},
        "line 1: the chat template renders nothing of field 'messages[0]' (role 'system')",
    ),
    "an opened thought": (
        OPENS,
        {"messages": [Q, A]},
        (
            "the chat template ends the prompt with '<think>' where, with the answer after it,"
            " stands 'Soup it is.</s>'"
        ),
    ),
    "any other": (
        "{{ raise_exception('not today') }}",
        {"messages": [Q, A]},
        "line 1: the chat template refuses this conversation: not today",
    ),
    "tools that are no JSON": (
        FULL,
        {"messages": [Q, A], "tools": "hammer"},
        "field 'tools' is a string ('hammer'), which",
    ),
    "tools that are no list": (
        FULL,
        {"messages": [Q, A], "tools": {"a": 1}},
        "field 'tools' is an object ({'a': 1}); write",
    ),
    "a tool that is none": (
        FULL,
        {"messages": [Q, A], "tools": [7]},
        "field 'tools[0]' is a number (7); write an object",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_rendered_is_refused(tmp_path, case):
    """In one line with file, row and field; or dropped and counted."""
    template, row, message = REFUSED[case]
    path = written(tmp_path, row)
    with pytest.raises(UserError) as error:
        encoded(path, template)
    said = str(error.value)
    assert said.startswith(f"{path}, line 1: ") and message in said and "\n" not in said
    rows, data = encoded(path, template, bad_row="drop")
    assert rows == [] and data.skipped == {"bad rows": 1} and data.first_bad == said


@pytest.mark.parametrize(
    "case",
    ["a role that is left out", "a role that is refused", "roles with capitals", "model", "bot"],
)
def test_the_proposed_role_map_works(tmp_path, case):
    template, row, _ = REFUSED[case]
    path = written(tmp_path, row)
    with pytest.raises(UserError) as error:
        encoded(path, template)
    proposed = str(error.value).partition("role_map='{")[2].partition("}'")[0]
    role_map = dict(pair.split(": ") for pair in proposed.split(", "))
    rows, _ = encoded(path, template, role_map=role_map)
    assert rows[0][1] in ("b</s>", "Soup it is.</s>")


def test_text_that_the_template_shortens_is_counted(tmp_path):
    thought = A | {"content": "<think>Hm.</think>Soup it is."}
    again = A | {"content": "<think>So.</think>Yes."}
    rows, data = encoded(written(tmp_path, {"messages": [Q, thought, Q, again]}), LAST)
    assert rows == [
        [
            "<user>Soup?</s><assistant>Soup it is.</s><user>Soup?</s><assistant>",
            "<think>So.</think>Yes.</s>",
        ]
    ]
    assert data.altered == {"earlier turns shortened by the chat template": 1}
    never = LAST.replace("m.content if loop.last else ", "")
    assert encoded(written(tmp_path, {"messages": [Q, thought]}), never)[1].altered == {
        "answers shortened by the chat template": 1
    }


def test_content_beside_a_call_that_is_left_out_is_counted(tmp_path):
    template = FULL.replace(
        "{{ m.content }}", "{% if not m.tool_calls %}{{ m.content }}{% endif %}"
    )
    rows, data = encoded(
        written(tmp_path, {"messages": [Q, call(content="Let me look.")]}), template
    )
    assert rows == [["<user>Soup?</s><assistant>", CALLED]]
    assert data.altered == {"contents left out by the chat template beside tool_calls": 1}


def test_messages_of_a_loader_are_called_by_their_row():
    chat = ChatTemplate(tiny_tokenizer(), STRICT)
    with pytest.raises(
        UserError, match=r"^own:7: field 'messages\[0\].role' is a string \('odd'\)"
    ):
        chat.render([{"role": "odd", "content": "a"}], [[A]], "own:7")


def test_a_message_knows_where_it_stands():
    message = Message({"role": "user", "content": "a"}, "f, line 1", "x[0]")
    assert (
        message == {"role": "user", "content": "a"}
        and json.dumps(message) == '{"role": "user", "content": "a"}'
    )
    assert message.replaced({"content": "b"})._field == message.without("role")._field == "x[0]"


OF_CASES = {  # file -> the first row's texts
    "toolcall_answer_sft.jsonl": [
        (
            '[tools [{"type": "function", "function": {"name": "lookup"}}]]<user>Tell me about'
            " soup.</s><assistant>"
        ),
        '(call {"name": "lookup", "arguments": {"q": "soup"}})</s>',
    ],
    "reasoning_field_sft.jsonl": [
        "<user>Tell me about soup.</s><assistant>",
        "(think The user wants soup.)Here is a fact about soup.</s>",
    ],
    "dict_of_lists.parquet": ["<user>What about soup?</s><assistant>", "soup it is.</s>"],
    "dict_encoded.parquet": ["What about soup?", " soup it is.</s>", " No soup.</s>"],
    "null_struct_fields.parquet": ["<user>soup</s><assistant>", "soup</s>"],
    "pandas.csv": ["What about soup?\n", ' "soup", it is.</s>', " No, soup.</s>"],
    "semicolon.csv": ["What about soup?", " soup it is.</s>", " No soup.</s>"],
    "openai_pref.jsonl": [
        "<user>Tell me about soup.</s><assistant>",
        "Here is a fact about soup.</s>",
        "Here is a fact about soup no.</s>",
    ],
}


@pytest.mark.parametrize("name", OF_CASES)
def test_files_as_people_have_them(shared, name):
    path = shared(f"cases/data/{name}")
    reading = {"group": "pair"} if len(OF_CASES[name]) == 3 else {}
    assert encoded(path, **reading)[0][0] == OF_CASES[name]
