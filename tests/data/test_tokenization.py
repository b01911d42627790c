"""Text to tokens: the 2023 code's ids token for token, and properties that hold for any text and
any lengths.
"""

import functools
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from golden import GOLDEN, load, needs_golden
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CHAT, tiny_tokenizer

from plumb.data.examples import cases, lengths_of, view
from plumb.data.registry import DataSet
from plumb.data.rows import Row
from plumb.data.token_store import StoreSpec, TokenStore, find_or_make
from plumb.data.tokenization import HH_TEMPLATE, TextRules, automatic_bos, render, template_text
from plumb.errors import UserError

RULES = TextRules(
    max_length=64,
    max_prompt_length=32,
    response_truncation="fixed",
    add_bos=True,
    eos_in_text="strip",
)


def data(prompt, *responses, truncation="keep_start") -> DataSet:
    pairs = [(0, 1)] if len(responses) == 2 else []
    return dataset(
        [
            Row(
                prompt=prompt,
                responses=list(responses),
                pairs=pairs,
                sft_target=responses[0],
                source="d:1",
            )
        ],
        truncation,
    )


def dataset(rows, truncation="keep_start") -> DataSet:
    return DataSet("d", 0.0, iter(rows), truncation=truncation)


def tokenize(data, tokenizer, group, rules, template=None):
    """The whole way: into a store on disk, and a view of it."""
    with tempfile.TemporaryDirectory() as folder:
        path, _ = find_or_make(
            StoreSpec(
                data=data,
                split="train",
                tokenizer=tokenizer,
                identity="",
                rules=rules,
                template=template,
                inputs=None,
                options={},
            ),
            Path(folder),
        )
        bos = automatic_bos(tokenizer) if rules.add_bos else None
        return view(TokenStore(path), group, rules, data.truncation, bos)


def flags(examples):
    """The names of each example's cases."""
    found = cases(examples)
    return [{case for case, is_case in found.items() if is_case[i]} for i in range(len(examples))]


@needs_golden
def test_tokens_equal_the_2023_code():
    """64 pairs x 9 settings: ids, labels and prompts. Setting 64/0/keep_end is left out: v[-0:]
    kept the whole prompt there.
    """
    from transformers import AutoTokenizer

    golden = load("tokenization.json.gz")
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "tiny-llama")
    rows = [
        Row(
            prompt=t["prompt"],
            responses=[t["chosen"], t["rejected"]],
            pairs=[(0, 1)],
            sft_target=t["chosen"],
            source="d:1",
        )
        for t in golden["texts"]
    ]
    for setting in golden["settings"]:
        lengths = setting["max_length"], setting["max_prompt_length"]
        if lengths == (64, 0) and setting["truncation_mode"] == "keep_end":
            continue
        rules = TextRules(*lengths, "fixed", add_bos=False, eos_in_text="keep")
        examples = tokenize(dataset(rows, setting["truncation_mode"]), tokenizer, "pair", rules)
        for ours, found, theirs in zip(examples, flags(examples), setting["rows"], strict=True):
            assert ours.prompt.tolist() == theirs["prompt_input_ids"]
            for side, response in zip(("chosen", "rejected"), ours.responses, strict=True):
                assert [*ours.prompt, *response] == theirs[f"{side}_input_ids"]
                assert [-100] * len(ours.prompt) + response.tolist() == theirs[f"{side}_labels"]
            assert ("prompt_truncated" in found) == ("prompt_over_limit_cut" in theirs["branch"])
            assert ("response_truncated" in found) == ("responses_cut" in theirs["branch"])


def test_a_prompt_of_which_only_bos_fits():
    """Room for 0 tokens of it: v[-0:] would keep them all, the 2023 defect at
    max_prompt_length=0.
    """
    rules, tok = replace(RULES, max_length=4, max_prompt_length=1), tiny_tokenizer(bos=True)
    (example,) = tokenize(data("abcd", "e", truncation="keep_end"), tok, "single", rules)
    assert example.prompt.tolist() == [tok.bos_token_id]


def truncated_in_2023(prompt, responses, keep, rules, bos):
    """The 2023 rule in plain Python, with BOS, and with "fill". -> prompt, responses"""
    head = [] if bos is None else [bos]
    longest = max(map(len, responses))
    if (
        len(head + prompt) + longest > rules.max_length
        and len(head + prompt) > rules.max_prompt_length
    ):
        room = rules.max_prompt_length - len(head)
        prompt = prompt[:room] if keep == "keep_start" else prompt[len(prompt) - room :]
    prompt = head + prompt
    if len(prompt) + longest > rules.max_length:
        taken = rules.max_prompt_length if rules.response_truncation == "fixed" else len(prompt)
        responses = [r[: rules.max_length - taken] for r in responses]
    return prompt, responses


letters = st.text("abcdefgh", max_size=60)  # one token each: the lengths decide


@settings(deadline=None, max_examples=100)
@given(
    texts=st.lists(st.tuples(letters, letters, letters), min_size=1, max_size=4),
    keep=st.sampled_from(["keep_start", "keep_end"]),
    lengths=st.tuples(st.integers(2, 50), st.integers(1, 49)).filter(lambda t: t[1] < t[0]),
    policy=st.sampled_from(["fixed", "fill"]),
    bos=st.booleans(),
    pairs=st.booleans(),
)
def test_truncation(texts, keep, lengths, policy, bos, pairs):
    """The columns agree with a restatement per example; and what must hold for any lengths does."""
    tok = tokenizer(bos)
    rules = TextRules(*lengths, policy, add_bos=True, eos_in_text="strip")
    rows = [
        Row(
            prompt=p,
            responses=[c, r],
            pairs=[(0, 1)],
            sft_target=c,
            source=f"d:{i}",
        )
        for i, (p, c, r) in enumerate(texts)
    ]
    examples = tokenize(dataset(rows, keep), tok, "pair" if pairs else "single", rules)
    ids = lambda text: tok(text, add_special_tokens=False)["input_ids"]
    for example, found, n, row in zip(
        examples, flags(examples), examples.lengths, texts, strict=True
    ):
        prompt = ids(row[0])
        responses = [[*ids(text), tok.eos_token_id] for text in row[1 : 2 + pairs]]
        expected = truncated_in_2023(
            prompt, responses, keep, rules, tok.bos_token_id if bos else None
        )
        ours = example.prompt.tolist(), [r.tolist() for r in example.responses]
        assert ours == expected
        assert n.tolist() == [len(ours[0]), *map(len, ours[1])]
        longest = max(map(len, ours[1]))
        # never too long; always something to train
        assert len(ours[0]) + longest <= rules.max_length and all(ours[1])
        assert ("response_truncated" in found) == (ours[1] != responses)
        assert ("prompt_truncated" in found) == (ours[0][bos:] != prompt)
        assert not bos or ours[0][0] == tok.bos_token_id  # BOS survives any cut
        if policy == "fill" and "response_truncated" in found:
            assert len(ours[0]) + longest == rules.max_length  # nothing is wasted


@functools.cache
def tokenizer(bos=False):
    return tiny_tokenizer(bos)


# Whole and broken EOS strings among any text: removing one may join the next.
texts = st.lists(
    st.one_of(st.text(max_size=10), st.sampled_from(["</s>", "</", "s>", "<", "/s"])), max_size=8
).map("".join)


@settings(deadline=None, max_examples=100)
@given(prompt=texts, chosen=texts, rejected=texts)
def test_tokenization_properties(prompt, chosen, rejected):
    """Any text: apart and joined, one EOS at the end and none within, and the ids decode to the
    text.
    """
    tok = tokenizer()
    rules = replace(RULES, max_length=2000, max_prompt_length=1000)
    (example,) = tokenize(data(prompt, chosen, rejected), tok, "pair", rules)
    for text, response in zip((chosen, rejected), example.responses, strict=True):
        assert response[-1] == tok.eos_token_id and tok.eos_token_id not in response[:-1]
        while tok.eos_token in text:
            text = text.replace(tok.eos_token, "")
        assert tok.decode(response[:-1]) == text
    assert lengths_of([example]).n_scored() == sum(map(len, example.responses)) - (
        2 if len(example.prompt) == 0 else 0
    )


def test_bos_stands_once_where_the_tokenizer_adds_one():
    tok = tiny_tokenizer(bos=True)
    prompt = lambda rules, text: tokenize(data(text, " b", " c"), tok, "pair", rules)[
        0
    ].prompt.tolist()
    assert (
        prompt(RULES, "a").count(tok.bos_token_id) == 1
        and prompt(RULES, "a")[0] == tok.bos_token_id
    )
    # a template that writes it does not double it
    assert prompt(RULES, tok.bos_token + "a") == prompt(RULES, "a")
    assert tok.bos_token_id not in prompt(replace(RULES, add_bos=False), "a")  # 2023: none
    long = prompt(replace(RULES, max_length=8, max_prompt_length=4), "a b c d e f g h i j k")
    assert long[0] == tok.bos_token_id and len(long) == 4
    assert (
        tokenizer().bos_token_id
        not in tokenize(data("a", " b"), tokenizer(), "single", RULES)[0].prompt
    )


def test_eos_within_a_text():
    eos = tokenizer().eos_token
    ids_of = lambda rule: tokenize(
        data(f"a{eos}b", f" c{eos}"), tokenizer(), "single", replace(RULES, eos_in_text=rule)
    )
    strip, keep = ids_of("strip"), ids_of("keep")
    assert flags(strip) == flags(keep) == [{"eos_in_text"}]
    (strip,), (keep,) = strip, keep
    count = lambda ids: list(ids).count(tokenizer().eos_token_id)
    assert count(strip.responses[0]) == 1 and count(keep.responses[0]) == 2
    # it may be a rendered chat, and is not trained
    assert count(strip.prompt) == count(keep.prompt) == 1


def test_eos_within_a_message():
    chat = tiny_tokenizer(chat_template=CHAT)
    prompt = [{"role": "user", "content": "H</s>i."}]
    answer = [{"role": "assistant", "content": "Hel</s>lo."}]
    examples = tokenize(data(prompt, answer), chat, "single", RULES)
    (example,) = examples
    assert (
        flags(examples) == [{"eos_in_text"}] and chat.decode(example.responses[0]) == "Hello.</s>"
    )
    assert chat.decode(example.prompt) == "<user>Hi.</s><assistant>"  # the template's own stays


def test_messages_go_through_the_chat_template():
    prompt = [{"role": "user", "content": "Hi."}]
    answer = [{"role": "assistant", "content": "Hello."}]
    hh = render(prompt, [answer], tokenizer(), None, "f:1")
    # the tokenizer has no template: HH form
    assert hh == (
        "\n\nHuman: Hi.\n\nAssistant:",
        [" Hello."],
    )
    chat = tiny_tokenizer(chat_template=CHAT)
    eos = chat.eos_token
    rendered = render(prompt, [answer], chat, None, "f:1")
    assert rendered == (f"<user>Hi.{eos}<assistant>", ["Hello."])  # EOS is added once, later
    assert render(prompt, [answer], chat, HH_TEMPLATE, "f:1")[1] == [" Hello."]
    examples = tokenize(data(prompt, answer), chat, "single", RULES)
    (example,) = examples
    assert flags(examples) == [set()] and list(example.responses[0]).count(chat.eos_token_id) == 1
    with pytest.raises(UserError, match="f:1: the chat template refuses"):
        render(prompt, [answer], chat, "{{ raise_exception('system first') }}", "f:1")


def test_rows_without_pairs_make_no_example_of_pairs():
    assert len(tokenize(data("a", " b"), tokenizer(), "pair", RULES)) == 0


def test_arrays_are_small():
    (example,) = tokenize(data("a", " b", " c"), tokenizer(), "pair", RULES)
    assert example.prompt.dtype == np.int32


NAMED = {"default": CHAT, "tool_use": CHAT.replace("<assistant>", "<tools>")}


def test_one_of_several_templates():
    """A dict of templates was handed on as one: "unhashable type: 'dict'", for which the data row
    was blamed.
    """
    chat = tiny_tokenizer()
    chat.chat_template = NAMED
    messages = [{"role": "user", "content": "Hi."}], [[{"role": "assistant", "content": "Hello."}]]
    assert render(*messages, chat, None, "f:1") == ("<user>Hi.</s><assistant>", ["Hello."])
    assert template_text(None, "chat_template=None", chat) is None
    assert template_text("tool_use", "chat_template=tool_use", chat) == NAMED["tool_use"]
    # before the tokenizer is there
    assert template_text("tool_use", "chat_template=tool_use") is None
    with pytest.raises(
        UserError,
        match="^chat_template=nosuch: neither a file nor a template .*: default, tool_use$",
    ):
        template_text("nosuch", "chat_template=nosuch", chat)
    with pytest.raises(UserError, match="templates: none$"):
        template_text("nosuch", "chat_template=nosuch", tiny_tokenizer())
    chat.chat_template = {"a": "x", "b": "y"}
    with pytest.raises(
        UserError, match=r"several templates \(a, b\) and no default; give chat_template="
    ):
        render(*messages, chat, None, "f:1")
    chat.chat_template = {"a": CHAT}
    assert render(*messages, chat, None, "f:1")[1] == ["Hello."]  # there is no other
