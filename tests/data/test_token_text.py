"""Token ids decode to exactly their text, whatever the tokenizer; and the 2023 rule stays wherever
it does so too.
"""

import json
import unicodedata

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers_at_hand import HERE, lower_case, prefixed, sentencepiece, tokenizer, unigram

from plumb.data.prepare import load_examples, show_example
from plumb.data.prompts import token_ids
from plumb.data.token_text import continuations, continued, decode, encode_rows, ids_of
from plumb.data.tokenization import Example, automatic_bos
from plumb.rollouts.hf_engine import _answer

PARTS = [
    "\n",
    " ",
    "  ",
    "\n\n",
    "Hello",
    " Hello",
    "Lily",
    " it",
    "é中🙂",
    "</s>",
    "<|assistant|>",
    "Human:",
    "x",
    "\t",
    "",
]
texts = st.lists(st.one_of(st.sampled_from(PARTS), st.text(max_size=4)), max_size=5).map("".join)


def known(text, tok):
    """Can the tokenizer say it? SmolLM has no token for some bytes, GPT-NeoX composes characters
    (NFC).
    """
    characters = [f"x{c}" for c in {*text}]
    return (
        unicodedata.is_normalized("NFC", text)
        and decode(ids_of(characters, tok), tok) == characters
    )


def written(prompt, tok, bos):
    """The prompt less a BOS that a template wrote, which is put in front of the ids later."""
    return (
        prompt.removeprefix(tok.bos_token)
        if bos is not None and ids_of([prompt], tok)[0][:1] == [bos]
        else prompt
    )


@pytest.mark.parametrize("name", HERE)
@settings(deadline=None, max_examples=40)
@given(prompt=texts, responses=st.lists(texts, min_size=1, max_size=2), add_bos=st.booleans())
def test_prompt_and_response_decode_to_their_texts(name, prompt, responses, add_bos):
    tok = tokenizer(name)
    assume(known("".join([prompt, *responses]), tok))
    bos = automatic_bos(tok) if add_bos else None
    (row,) = encode_rows([(prompt, responses)], tok, bos)
    apart = ids_of([prompt, *responses], tok)
    for i, (response, ids) in enumerate(zip(responses, row.responses, strict=True), 1):
        text = written(prompt, tok, bos) + response
        if row.exact[0]:
            assert row.exact[i] and decode([row.prompt + ids], tok) == [text]
        else:
            # the tokenizer's own ids of the prompt say something else; a response continues it
            # exactly all the same
            assert row.exact[i] and decode([row.prompt + ids], tok)[0].endswith(response)
        if decode([row.prompt + apart[i]], tok) == [text]:
            assert ids == apart[i]  # the rule of 2023
    if decode([row.prompt], tok) != [written(prompt, tok, bos)]:
        # a space behind a special token
        assert any(token in prompt for token in tok.get_added_vocab())
    assert row.exact[0] or name in ("always", "legacy", "unigram")


@pytest.mark.parametrize("name", HERE)
def test_what_stands_in_chats(name):
    """Alpaca's, Zephyr's and ChatML's ends of a prompt, and HH's, which SentencePiece encoded right
    apart.
    """
    tok = tokenizer(name)
    prompts = [
        "### Response:\n",
        "<|assistant|>\n",
        "<|im_start|>assistant\n",
        "\n\nAssistant:",
        "What about soup? ",
    ]
    answers = ["Lily ran.", "\nLily", " Lily", "  Lily\n", ""]
    for prompt, row in zip(
        prompts, encode_rows([(p, answers) for p in prompts], tok, automatic_bos(tok)), strict=True
    ):
        assert all(row.exact[1:])
        for answer, ids in zip(answers, row.responses, strict=True):
            assert decode([row.prompt + ids], tok)[0].endswith(
                prompt.lstrip("<|asitn>")[-3:] + answer
            )


def test_the_space_that_nobody_wrote():
    """By hand: "Lily" alone is ▁Lily, which behind a newline reads " Lily"."""
    tok = sentencepiece("first")
    (row,) = encode_rows([("it\n", ["Lily", " Lily"])], tok, automatic_bos(tok))
    assert [tok.convert_ids_to_tokens(ids) for ids in row.responses] == [["Lily"], ["▁Lily"]]
    assert tok.convert_ids_to_tokens(row.prompt) == ["▁it", "<0x0A>"]
    # which puts a second space before a response that begins with one
    legacy = sentencepiece("legacy")
    (row,) = encode_rows([("it:", [" Lily"])], legacy, automatic_bos(legacy))
    assert legacy.convert_ids_to_tokens(row.responses[0]) == ["▁Lily"]


def test_the_log_probability_of_an_answer_on_a_llama_vocabulary(shared):
    """In nats, of "Lily was happy." after a newline: 5 better than behind a space that isn't
    there.
    """
    import torch
    from transformers import AutoModelForCausalLM

    folder = shared("models/stories260K")
    tok = tokenizer("stories260K")
    model = AutoModelForCausalLM.from_pretrained(folder)
    prompt, answer = "Once upon a time there was a girl.\n", "Lily was happy."
    (row,) = encode_rows([(prompt, [answer])], tok, tok.bos_token_id)
    apart = ids_of([answer], tok)[0]

    @torch.no_grad()
    def logp(ids):
        head = [tok.bos_token_id, *row.prompt]
        logps = model(torch.tensor([head + ids])).logits[0].log_softmax(-1)
        return sum(float(logps[len(head) + i - 1, token]) for i, token in enumerate(ids))

    assert (
        decode([row.prompt + row.responses[0]], tok)
        == [prompt + answer]
        != decode([row.prompt + apart], tok)
    )
    together = ids_of([prompt + answer], tok)[0]
    assert row.prompt + row.responses[0] == together
    assert logp(row.responses[0]) > logp(apart) + 1


@pytest.mark.parametrize("make", [lower_case, prefixed, lambda: unigram(collapse=True)])
def test_what_no_ids_can_say_is_marked(make):
    """The result is then what the tokenizer makes of the joined text, as far as the prompt's ids
    allow.
    """
    tok = make()
    rows = [("Hello it:", ["Hello\n  it", "it"]), ("it \n", ["it"])]
    for (prompt, responses), row in zip(
        rows, encode_rows(rows, tok, automatic_bos(tok)), strict=True
    ):
        assert not all(row.exact) or decode([row.prompt + row.responses[0]], tok) == [
            prompt + responses[0]
        ]
        for response, ids in zip(responses, row.responses, strict=True):
            assert decode([row.prompt + ids], tok) == decode(ids_of([prompt + response], tok), tok)


def test_changed_texts_are_counted_and_may_be_dropped(tmp_path, compose, capsys):
    path = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": f"it {i}:", "chosen": " it", "rejected": " no HELLO" if i % 2 else " no"}
        for i in range(4)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for rule, n in (("keep", 4), ("drop", 2)):
        config = compose(
            "exp_name=x",
            "loss=dpo",
            "loss.beta=0.1",
            f"datasets=[{path}]",
            "eval_share=0",
            f"data_rules.text_changed={rule}",
            f"local_dirs=[{tmp_path}]",
        )
        assert len(load_examples(config, lower_case(), "pair")[0]) == n
        assert "text changed" in capsys.readouterr().out


def test_the_printed_example_is_the_ids_own_text():
    tok = sentencepiece("first")
    (row,) = encode_rows([("it\n", ["Lily"])], tok, automatic_bos(tok))
    ids = np.array
    prompt, eos = [tok.bos_token_id, *row.prompt], [tok.eos_token_id]
    fixed = show_example(Example(ids(prompt), (ids(row.responses[0] + eos),), "d:1"), tok)
    assert "  <s> it\n" in fixed and "[[Lily</s>]]" in fixed
    apart = show_example(Example(ids(prompt), (ids(ids_of(["Lily"], tok)[0] + eos),), "d:1"), tok)
    assert "[[ Lily</s>]]" in apart  # what was hidden before


def test_a_sampled_answer_keeps_its_space():
    """Else it could not be trained on as it was sampled: behind "Assistant:" the model said "
    Lily".
    """
    tok = sentencepiece("first")
    said = [*tok.convert_tokens_to_ids(["▁Lily", "▁it"]), tok.eos_token_id]
    prompt, _ = token_ids("it:", tok, True, 100)
    assert _answer(said, prompt.tolist(), tok, [tok.eos_token_id], []).text == " Lily it"
    # a text of its own
    assert _answer(said, [tok.bos_token_id], tok, [tok.eos_token_id], []).text == "Lily it"
    assert continued(prompt.tolist(), [said], tok) == continuations([said], tok) == [" Lily it</s>"]


def test_a_sampled_prompt_is_the_trained_one():
    for name in HERE:
        tok = tokenizer(name)
        for text in ("it\n", " it", "it </s> it:"):
            (row,) = encode_rows([(text, ["x"])], tok, automatic_bos(tok))
            bos = [b for b in [automatic_bos(tok)] if b is not None]
            assert token_ids(text, tok, True, 100)[0].tolist() == [*bos, *row.prompt]
