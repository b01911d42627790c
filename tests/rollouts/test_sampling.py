"""Answers: transformers' own for the same settings, whatever the padding; two searches by their
definitions; sample.py.
"""

import io
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT
from omegaconf import OmegaConf
from runs import run_of
from tiny import CHAT, save_tiny_llama, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

import sample as command
from plumb.data import prompts
from plumb.errors import UserError
from plumb.models.find import ModelRef, Opened
from plumb.rollouts.chat import Chat, speaker
from plumb.rollouts.hf_engine import Decoding, answers

PROMPTS = [np.array(ids) for ids in ([40, 41, 42, 43, 44, 45, 46], [50, 51], [60, 61, 62, 60, 61])]
WAYS = {
    "greedy": ({}, {"do_sample": False}),
    "sample": (
        {"temperature": 0.7, "top_k": 30, "top_p": 0.9, "n": 3},
        {
            "do_sample": True,
            "temperature": 0.7,
            "top_k": 30,
            "top_p": 0.9,
            "num_return_sequences": 3,
        },
    ),
    "beam": (
        {"num_beams": 3, "n": 2},
        {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    ),
    "beam-sample": (
        {"num_beams": 3, "temperature": 2.0},
        {"do_sample": True, "num_beams": 3, "temperature": 2.0, "top_k": 0, "top_p": 1.0},
    ),
}


@pytest.fixture(scope="module")
def model():
    return sharp("llama")


def sharp(family):
    """A tiny model that is sure of itself, so that rounding decides nothing."""
    made = tiny_model(family).eval()
    for p in made.parameters():
        p.data *= 1 if p.dim() < 2 else 5
    made.generation_config.eos_token_id = 2
    return made


def answered(model, decoding, asked=PROMPTS, batch_size=3, seed=0, tokenizer=None):
    return [
        *answers(
            model,
            tokenizer or tiny_tokenizer(),
            asked,
            decoding.checked(),
            batch_size=batch_size,
            seed=seed,
        )
    ]


def texts(rows):
    return [[a.text for a in row] for row in rows]


@pytest.mark.parametrize("mode", WAYS)
def test_what_transformers_itself_generates(model, mode):
    ours, theirs = WAYS[mode]
    found = answered(model, Decoding(mode, max_new_tokens=12, **ours), seed=5)
    ids = torch.tensor([[0] * (7 - len(p)) + p.tolist() for p in PROMPTS])
    torch.manual_seed(5)
    expected = model.generate(
        ids, attention_mask=(ids != 0).long(), max_new_tokens=12, pad_token_id=0, **theirs
    )[:, 7:]
    assert sum(texts(found), []) == tiny_tokenizer().batch_decode(
        expected, skip_special_tokens=True
    )
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert answered(model, Decoding(mode, max_new_tokens=12, **ours), seed=5) == found
    assert torch.equal(torch.get_rng_state(), state)


SEARCHES = [
    Decoding("greedy"),
    Decoding("beam", n=2),
    Decoding("contrastive"),
    Decoding("diverse-beam", n=3),
]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_padding_changes_nothing(family):
    model = sharp(family)
    for decoding in SEARCHES:
        decoding = replace(decoding, max_new_tokens=8)
        together, alone = answered(model, decoding), answered(model, decoding, batch_size=1)
        assert together == alone and len({row[0].text for row in alone}) > 1


def test_contrastive_search_by_its_definition(model):
    """Without a cache, one prompt at a time."""
    for ids in PROMPTS:
        ids = ids.tolist()
        start = len(ids)
        for _ in range(6):
            p, candidates = model(torch.tensor([ids])).logits[0, -1].softmax(-1).topk(4)
            scores = []
            for prob, v in zip(p, candidates.tolist(), strict=True):
                h = model(torch.tensor([[*ids, v]]), output_hidden_states=True).hidden_states[-1][0]
                scores.append(0.4 * prob - 0.6 * torch.cosine_similarity(h[-1:], h[:-1]).max())
            ids.append(candidates[int(torch.stack(scores).argmax())].item())
        (((text, _, ended),),) = answered(
            model, Decoding("contrastive", max_new_tokens=6), [np.array(ids[:start])]
        )
        assert (
            text == tiny_tokenizer().decode(ids[start:], skip_special_tokens=True)
            and ended == "length"
        )
    every = [
        answered(model, Decoding("contrastive", max_new_tokens=3, top_k=k)) for k in (259, 999)
    ]
    assert every[0] == every[1]
    greedy = answered(model, Decoding("greedy", max_new_tokens=9))
    assert answered(model, Decoding("contrastive", max_new_tokens=9, penalty_alpha=0.0)) == greedy


def test_diverse_beams_by_their_definition(model):
    """One group is a beam search. Groups of one beam: the most probable token, less what earlier
    groups have there.
    """
    one = Decoding("diverse-beam", n=2, max_new_tokens=9, num_beams=4, num_beam_groups=1)
    assert answered(model, one) == answered(
        model, Decoding("beam", n=2, max_new_tokens=9, num_beams=4)
    )
    penalty, made = 0.5, []
    for _ in range(3):
        ids = PROMPTS[0].tolist()
        for place in range(7, 13):
            logits = model(torch.tensor([ids])).logits[0, -1].clone()
            for other in made:  # the last token is not penalised
                logits[other[place]] -= penalty * (place < 12)
            ids.append(int(logits.argmax()))
        made.append(ids)
    decoding = Decoding(
        "diverse-beam",
        n=3,
        max_new_tokens=6,
        num_beams=3,
        num_beam_groups=3,
        diversity_penalty=penalty,
    )
    found = answered(model, decoding, PROMPTS[:1])[0]
    assert [a.text for a in found] == [tiny_tokenizer().decode(ids[7:]) for ids in made]
    assert len({a.text for a in found}) > 1
    many = answered(model, replace(decoding, num_beams=6))
    assert all(len({a.text for a in row}) > 1 for row in many)


@pytest.mark.parametrize("pad", [0, 2])
def test_how_an_answer_ends(pad):
    """By EOS, at a stop string, which is cut off, or by its length; also where padding is EOS."""
    tokenizer, model = tiny_tokenizer(), sharp("llama")
    tokenizer.pad_token_id = pad
    ascii = torch.tensor(
        [
            len(tokenizer.convert_ids_to_tokens(i)) == 1 and tokenizer.decode(i).isalnum()
            for i in range(259)
        ]
    )
    model.lm_head.weight.data[~ascii] = 0
    greedy = [
        row[0] for row in answered(model, Decoding("greedy", max_new_tokens=9), tokenizer=tokenizer)
    ]
    assert {(a.n_tokens, a.ended) for a in greedy} == {(9, "length")}
    stop = greedy[0].text[2:4]
    first, *others = answered(
        model, Decoding("greedy", max_new_tokens=9, stop=(stop,)), tokenizer=tokenizer
    )
    assert (
        first[0].text == greedy[0].text.partition(stop)[0]
        and first[0].ended == "stop"
        and first[0].n_tokens < 9
    )
    assert [row[0] for row in others if stop not in row[0].text] == [
        a for a in greedy[1:] if stop not in a.text
    ]
    # beside the tokenizer's own
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(greedy[0].text[3])
    (first,), *_ = answered(model, Decoding("greedy", max_new_tokens=9), tokenizer=tokenizer)
    assert (
        first.text == greedy[0].text.partition(greedy[0].text[3])[0]
        and first.ended == "eos"
        and first.n_tokens <= 4
    )


def test_prompts_of_a_file(tmp_path):
    file = tmp_path / "p.jsonl"
    rows = ["Why?", "\n\nHuman: Why?\n\nAssistant:", [{"from": "human", "value": "Why?"}], "Why?"]
    file.write_text("".join(json.dumps({"prompt": row}) + "\n" for row in rows))
    turn = [{"role": "user", "content": "Why?"}]
    assert [p.text for p in prompts.of_file(file, "prompt", raw=False)] == [
        turn,
        rows[1],
        turn,
        turn,
    ]
    assert [p.text for p in prompts.of_file(file, "prompt", raw=True)] == [
        "Why?",
        rows[1],
        turn,
        "Why?",
    ]
    unique = prompts.some_of(prompts.of_file(file, "prompt", raw=True), None, 0)
    assert [p.source for p in unique] == [f"{file}:{i}" for i in (1, 2, 3)]
    drawn = prompts.some_of(prompts.built_in("japanese"), 3, seed=1)
    assert drawn == prompts.some_of(prompts.built_in("japanese"), 3, seed=1) and len(drawn) == 3
    theirs = [{"role": "assistant", "content": "x"}]
    for bad, said in (
        ("  ", "field 'prompt' is empty"),
        (theirs, "end with the user's"),
        (3, "a number"),
    ):
        file.write_text(json.dumps({"prompt": bad}))
        with pytest.raises(UserError, match=f"line 1: .*{said}"):
            [*prompts.of_file(file, "prompt", raw=False)]


def test_a_prompt_is_what_a_run_trains_on():
    tokenizer = tiny_tokenizer(
        bos=True, chat_template="<s>{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    text = prompts.rendered(prompts.built_in("english")[0], tokenizer, None)
    ids, cut = prompts.token_ids(text, tokenizer, add_bos=True, longest=100)
    assert ids[0] == 1 and 1 not in ids[1:] and not cut
    assert (
        prompts.token_ids("abcdef", tokenizer, True, 4)[0].tolist() == tokenizer("def")["input_ids"]
    )
    assert prompts.token_ids("abcdef", tokenizer, False, 4)[1]


def run(*options):
    command.main(command.parser().parse_args([*map(str, options)]))


def test_models_side_by_side(tmp_path, capsys):
    base = save_tiny_llama(tmp_path / "base")
    weights = AutoModelForCausalLM.from_pretrained(base).state_dict()
    trained = run_of(tmp_path, base, {k: v * 3 for k, v in weights.items()})
    out = tmp_path / "out.jsonl"
    same = (
        "--language",
        "chinese",
        "--n-prompts",
        2,
        "--max-new-tokens",
        6,
        "--device",
        "cpu",
        "--batch-size",
        2,
    )
    run(base, trained, *same, "--n", 2, "--top-p", 0.9, "--out", out)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [r["model"] for r in rows] == [str(base)] * 2 + [str(trained)] * 2
    assert rows[0]["prompt"] == rows[2]["prompt"] and rows[0]["weights"] != rows[2]["weights"]
    assert (
        rows[2]["archive"] == str(trained / "step-8/policy.pt")
        and len(rows[0]["answers"]) == len(rows[0]["ended"]) == 2
    )
    settings = rows[0]["settings"]
    assert (
        settings["top_p"] == 0.9
        and settings["temperature"] == 0.7
        and settings["seed"] == 0
        and settings["transformers"]
    )
    shown = capsys.readouterr().out
    places = [
        shown.index(part)
        for part in ("==== 1 of 2", f"---- {base} 1/2", f"---- {trained} 2/2", "==== 2 of 2")
    ]
    assert places == sorted(places)
    run(trained, *same, "--n", 2, "--top-p", 0.9, "--format", "pairs", "--out", out)
    pairs = [json.loads(line) for line in out.read_text().splitlines()]
    assert [[p["output_1"], p["output_2"]] for p in pairs] == [r["answers"] for r in rows[2:]]
    assert pairs[0]["instruction"] == rows[0]["prompt"][0]["content"]
    # which score.py goes by: a string was read as it stands
    assert pairs[0]["prompt"] == rows[0]["prompt"]
    with pytest.raises(UserError, match="given twice"):
        run(base, trained, base)


REFUSED = [
    (["--mode", "greedy", "--top-k", "3"], "--top-k 3: mode greedy would ignore it"),
    (["--mode", "greedy", "--n", "2"], "--n 2: this mode gives 1 at most"),
    (["--mode", "beam", "--n", "5"], "--n 5: 4 beams give 4 at most"),
    (
        ["--mode", "diverse-beam", "--num-beams", "5"],
        "--num-beam-groups 4: must divide --num-beams 5",
    ),
    (["--temperature", "0"], "--temperature 0: must be from 0.0001 .*; --mode greedy"),
    (["--temperature", "1e-45"], "--temperature 1e-45: must be"),
    (["--seed", "-1"], "--seed: -1 is below 0"),
    (["--seed", 30 * "9"], "is not below 2"),
    (["--show", "-1"], "--show: -1 is below 0"),
    (["--device", "meta"], "--device meta: not usable here"),
    (["--dataset", "demo", "--dataset-path", "x"], "--dataset-path x: is for named sets"),
    (["--dataset", "rm_static", "--dataset-path", "nosuch"], "nosuch: no such file or folder"),
    (["demo"], "demo: not a model's folder"),
    (["--stop", ""], "--stop '': an empty string"),
    (["--raw"], "--raw True: is for --prompts"),
    (["--format", "pairs", "--out", "x"], "--format pairs: needs --n 2"),
    (["--chat", "--out", "x"], "--out x: is for all but --chat"),
    (["--prompts", "nosuch.jsonl"], "no such file"),
    (["--max-new-tokens", "512"], "--max-new-tokens 512: .* has room for 512 tokens"),
    (["--n", "0"], "--n: 0 is below 1"),
    (["--chat-template", "nosuch"], "--chat-template nosuch: neither a file nor a template"),
    (["--out", "."], "--out=.: cannot be written .it is a folder."),
    (["--field", "question", "--prompts", "demo/test.jsonl"], "no field 'question' .* by --field"),
    (["--device", "cuda:99"], "--device cuda:99: not usable here"),
]


@pytest.mark.parametrize(("options", "said"), REFUSED, ids=[" ".join(o) for o, _ in REFUSED])
def test_what_is_refused(tiny_model, options, said, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=said):
        if options[0] != "--chat":
            run(tiny_model, "--n-prompts", "1", *options)
        else:
            run(tiny_model, *options)


def test_a_reward_model_does_not_answer(tmp_path):
    base = save_tiny_llama(tmp_path / "base")
    state = AutoModelForCausalLM.from_pretrained(base).state_dict()
    reward = run_of(tmp_path, base, state | {"lm_head.weight": state["lm_head.weight"][:1]})
    with pytest.raises(UserError, match="a reward model, which gives scores, not answers"):
        run(reward)


def test_a_chat(tiny_model, monkeypatch, capsys):
    """Each turn is answered; what no longer fits is dropped, the oldest turns first, and said;
    clear forgets.
    """
    asked = ["a" * 100, "b" * 100, "c" * 250, "clear", "d", "e" * 900, "quit", "never"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(asked) + "\n"))
    read = []
    real = prompts.rendered
    monkeypatch.setattr(
        prompts,
        "rendered",
        lambda prompt, *how: read.append(list(prompt.text)) or real(prompt, *how),
    )
    run(tiny_model, "--chat", "--max-new-tokens", "60", "--device", "cpu", "--mode", "greedy")
    out = capsys.readouterr().out
    assert "oldest turns are dropped" in out and "(too long" in out and out.count("> ") == 7
    assert "(begun again)" in out
    assert "never" not in str(read)
    # as they were answered
    lengths = {messages[-1]["content"][0]: len(messages) for messages in read}
    assert lengths["a"] == 1 and lengths["b"] == 3 and lengths["c"] < 5 and lengths["d"] == 1


def chats(models, *lines):
    """-> what is shown after each line"""
    made = [speaker(one, Decoding("greedy", max_new_tokens=4).checked(), None) for one in models]
    conversation = Chat(made, seed=0)
    return conversation, [conversation.reply(line) for line in lines]


def opened(name, model, tokenizer):
    config = OmegaConf.create({"add_bos": False})
    ref = ModelRef(name=name, config=config, archive=None, run_dir=None, scalar=False)
    return Opened(ref, model, tokenizer)


def test_a_chat_with_two_models(model, monkeypatch):
    """Each continues its own conversation; /model chooses, /system begins again with a prompt,
    and one that the template refuses is reported and changes nothing.
    """
    refuses = "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('none') }}"
    refuses += "{% endif %}" + CHAT.removeprefix("{% for m in messages %}")
    two = [
        opened(name, model, tiny_tokenizer(chat_template=template))
        for name, template in (("a", CHAT), ("b", refuses))
    ]
    lines = ["hi", "/model b", "ho", "/model 3", "/model all", "/system be kind", "hey", "/what"]
    conversation, shown = chats(two, *lines)
    a, b = conversation.speakers
    assert re.fullmatch(r"---- a\n(.*\n)*---- b(\n.*)*", shown[0])
    assert shown[1] == "(b will answer)" and "---- a" not in shown[2]
    assert shown[3] == "/model N, or /model all:\n  1  a\n  2  b"
    assert shown[5] == "(begun again, with the system prompt: be kind)"
    assert [m["content"] for m in a.messages[::2]] == ["hey"] and b.messages == []
    assert "---- b\n(" in shown[6] and "none" in shown[6]
    assert "/reset" in shown[7]
    assert conversation.reply("/quit") is None and conversation.reply("") == ""


@pytest.mark.parametrize("flags", [[], ["--plain-prompts", "verbatim"]])
def test_a_data_set_is_read_as_by_the_run(tmp_path, capsys, flags):
    """plain_prompts=chat makes a string a user's turn; two runs that differ are refused."""
    base = save_tiny_llama(tmp_path / "base")
    weights = AutoModelForCausalLM.from_pretrained(base).state_dict()
    plain = run_of(tmp_path, base, weights, "plain")
    chatty = run_of(tmp_path, base, weights, "chatty")
    with open(chatty / "config.yaml", "a") as file:
        file.write("plain_prompts: chat\nrole_map: {model: assistant}\n")
    rows = [{"prompt": f"Say {i}", "chosen": " a", "rejected": " b"} for i in range(2)]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    how = ["--dataset", data, "--eval-share", 1, "--max-new-tokens", 2, "--device", "cpu"]
    out = tmp_path / "out.jsonl"
    run(chatty, *how, *flags, "--out", out)
    read = [json.loads(line) for line in out.read_text().splitlines()]
    turn = read[0]["prompt"] == [{"role": "user", "content": "Say 0"}]
    assert turn == (not flags) and (turn or read[0]["prompt"] == "Say 0")
    with pytest.raises(UserError, match="chatty and .*plain read it in different ways"):
        run(chatty, plain, *how)


def test_the_tokenizers_own_template_comes_before_hh():
    prompt, tokenizer = prompts.built_in("english")[0], tiny_tokenizer(chat_template=CHAT)
    assert prompts.rendered(prompt, tokenizer, None).startswith("<user>")
    assert prompts.rendered(prompt, tiny_tokenizer(), None).startswith("\n\nHuman: ")
