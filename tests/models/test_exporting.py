"""Folders with which transformers computes the same; reward models where padding is EOS; policy.pt
-> folder -> policy.pt.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from families import save_family
from runs import run_of
from safetensors import safe_open
from tiny import CHAT, FAMILIES, SIZES, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import export as command
from plumb.errors import UserError
from plumb.models import export
from plumb.models.find import find_model, open_model
from plumb.models.model_card import public, stages
from plumb.models.scalar_head import put_scalar_head
from plumb.runs.policy_file import as_in_2023, load_policy_state

TIED = [
    ("llama", False),
    ("llama", True),
    ("qwen3", True),
    ("gpt_neox", False),
    ("gpt2", True),
    ("gpt2", False),
]
TEXTS = ["\n\nHuman: Why?\n\nAssistant: So.</s>", "Why not</s>", "a truncated answ"]


@pytest.fixture
def base_of(tmp_path):
    """`base_of(family, pad, **config)`: a tiny base model's folder."""

    def make(family, pad="<pad>", **config):
        made = tiny_model(family)
        made = type(made)(type(made.config)(**(SIZES | FAMILIES[family] | config)))
        folder = tmp_path / f"base-{family}"
        made.save_pretrained(folder)
        tokenizer = tiny_tokenizer(chat_template=CHAT)
        tokenizer.pad_token = pad
        tokenizer.save_pretrained(folder)
        return folder

    return make


def trained(base, scalar=False):
    """A state dict as a run of it writes it, its values changed."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if scalar:
        put_scalar_head(model, seed=1)
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model.eval()


def run(*options):
    command.main(command.parser().parse_args([*map(str, options)]))


@pytest.mark.parametrize(("family", "tied"), TIED)
def test_there_and_back(tmp_path, base_of, family, tied):
    """The folder loads and gives the same logits; the policy.pt that is made of it again holds the
    same numbers.
    """
    policy = trained(base := base_of(family, tie_word_embeddings=tied))
    run_dir, folder = run_of(tmp_path, base, policy.state_dict()), tmp_path / "out"
    run(run_dir, "--out", folder, "--max-shard-gb", 3e-5)  # several files; and it is compared, too
    loaded, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values())
    ids = torch.arange(3, 13)[None]
    assert torch.equal(loaded.eval()(ids).logits, policy(ids).logits)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    sizes = {file: (folder / file).stat().st_size for file in index["weight_map"].values()}
    assert len(sizes) > 1 and 0 < sum(sizes.values()) - index["metadata"][
        "total_size"
    ] < 1000 * len(sizes)
    base_names = {name for f in base.glob("*.safetensors") for name in safe_open(f, "pt").keys()}  # noqa: SIM118
    assert set(index["weight_map"]) == base_names, "the names that the base model's own files have"
    run(folder, "--policy", tmp_path / "policy.pt")
    again, before = load_policy_state(str(tmp_path / "policy.pt")), policy.state_dict()
    assert again.keys() == before.keys() and all(again[k].equal(before[k]) for k in before)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2"])
def test_a_policy_of_2023(tmp_path, base_of, family):
    policy = trained(base := base_of(family))
    run_dir = run_of(tmp_path, base, as_in_2023(policy, policy.state_dict()))
    run(run_dir, "--out", tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    ids = torch.arange(3, 13)[None]
    assert torch.equal(loaded(ids).logits, policy(ids).logits)


def with_distinct_head(base):
    """Its config says that the head is the embedding, its file has another head."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    return base


def test_a_distinct_head_beside_a_config_that_says_tied(tmp_path, base_of):
    """The values count: what is exported computes what was trained, and says that nothing is
    tied.
    """
    policy = trained(base := with_distinct_head(base_of("llama", tie_word_embeddings=False)))
    assert not policy.lm_head.weight.equal(policy.model.embed_tokens.weight)
    run(run_of(tmp_path, base, policy.state_dict()), "--out", folder := tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.arange(3, 13)[None]
    assert torch.equal(loaded(ids).logits, policy(ids).logits)
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
    run(base, "--policy", tmp_path / "base.pt")
    state = load_policy_state(str(tmp_path / "base.pt"))
    assert not state["lm_head.weight"].equal(state["model.embed_tokens.weight"])
    reward = trained(base, scalar=True)
    run(run_of(tmp_path, base, reward.state_dict(), "reward"), "--out", tmp_path / "reward_out")


def test_a_weight_that_is_stored_as_several_is_read_once(tmp_path, monkeypatch):
    """A mixture of experts: one tensor of all experts in memory, one of each in the files."""
    policy = trained(base := save_family(tmp_path / "base", "qwen3_moe"))
    read, names = export._read, []
    monkeypatch.setattr(
        export, "_read", lambda source, name, *how: names.append(name) or read(source, name, *how)
    )
    run(run_of(tmp_path, base, policy.state_dict()), "--out", tmp_path / "out", "--no-check")
    assert sorted(names) == sorted(policy.state_dict())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    ids = torch.arange(3, 13)[None]
    assert torch.equal(loaded(ids).logits, policy(ids).logits)


@pytest.mark.parametrize("pad", ["<pad>", "</s>"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox", "gpt2"])
def test_a_reward_model(tmp_path, base_of, family, pad):
    """Scores of a batch that is padded on either side are our head's at the last token, EOS or not;
    also where the base pads with EOS, as most do.
    """
    model = trained(
        base := base_of(family, pad, tie_word_embeddings=family == "qwen3"), scalar=True
    )
    tokenizer = AutoTokenizer.from_pretrained(base)
    if pad == "</s>":  # a vocabulary in which nothing is called pad
        for file in (base / "tokenizer.json", base / "tokenizer_config.json"):
            file.write_text(file.read_text().replace("<pad>", "<nul>"))
    expected = [
        model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0, -1, 0] for text in TEXTS
    ]
    run(run_of(tmp_path, base, model.state_dict()), "--out", folder := tmp_path / "out")
    loaded, report = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert (
        not any(report.values())
        and type(loaded).__name__
        in json.loads((folder / "config.json").read_text())["architectures"]
    )
    theirs = AutoTokenizer.from_pretrained(folder)
    assert theirs.pad_token_id == loaded.config.pad_token_id != theirs.eos_token_id
    assert theirs.padding_side == "right"
    for side in ("left", "right"):
        theirs.padding_side = side
        batch = theirs(TEXTS, padding=True, return_tensors="pt")
        # whose learned positions transformers counts from the row's beginning
        if family == "gpt2" and side == "left":
            batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            scores = loaded.eval()(**batch).logits[:, 0]
        assert torch.allclose(scores, torch.stack(expected), atol=1e-5), side
    rows = loaded.get_input_embeddings().weight
    assert len(rows) == (259 if pad == "<pad>" else 260) and (pad == "<pad>" or not rows[-1].any())
    # and Plumb itself reads it as a reward model
    opened = open_model(find_model(str(folder)), "cpu")
    assert opened.ref.scalar and opened.model.get_output_embeddings().weight.equal(
        model.get_output_embeddings().weight
    )


@pytest.mark.parametrize(
    ("pad", "unk", "expected"),
    [
        ("<pad>", None, "<pad>"),
        ("</s>", None, "<pad>"),
        (None, None, "<pad>"),
        ("<pad>", "<pad>", "<|padding|>"),
    ],
)
def test_a_pad_token_that_no_text_ends_with(pad, unk, expected):
    """The tokenizer's own, unless it is EOS or UNK; then one that the vocabulary has and calls
    so.
    """
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|padding|>"], special_tokens=True)
    tokenizer.pad_token = pad
    tokenizer.unk_token = unk
    assert export.use_pad_of_its_own(tokenizer) == tokenizer.convert_tokens_to_ids(expected)


def test_what_stands_beside_the_weights(tmp_path, base_of):
    """Names of this machine's folders don't; the run, what it started from, and how to load it,
    do.
    """
    base = base_of("llama")
    generation = json.loads((base / "generation_config.json").read_text())
    generation |= {"eos_token_id": [2, 7], "do_sample": True, "top_k": 17}
    (base / "generation_config.json").write_text(json.dumps(generation))
    sft = run_of(tmp_path, base, trained(base).state_dict(), "my_sft")
    dpo = run_of(tmp_path, base, trained(base).bfloat16().state_dict(), "my_dpo")
    text = (dpo / "config.yaml").read_text().replace("name: sft", "name: dpo")
    more = f"datasets: [{tmp_path}/my.jsonl]\nmodel: {{archive: {sft}/step-8/policy.pt, "
    (dpo / "config.yaml").write_text(text.replace("model: {", more))
    assert [s.loss for s in stages(dpo / "step-8/policy.pt")] == ["dpo", "sft"]
    run(dpo, "--out", folder := tmp_path / "out")
    content = json.loads((folder / "config.json").read_text())
    assert (
        content["architectures"] == ["LlamaForCausalLM"]
        and content["dtype"] == "bfloat16"
        and "_name_or_path" not in content
    )
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert (
            file.metadata() == {"format": "pt"}
            and file.get_tensor("model.norm.weight").dtype == torch.bfloat16
        )
    made = json.loads((folder / "generation_config.json").read_text())
    assert made["eos_token_id"] == [2, 7] and made["top_k"] == 17
    assert AutoTokenizer.from_pretrained(folder).chat_template == CHAT
    card = (folder / "README.md").read_text()
    for said in (
        "my_dpo",
        "my_sft/step-8/policy.pt`: sft",
        "base-llama",
        "Licence",
        "AutoModelForCausalLM",
        "exp_name: x",
    ):
        assert said in card, said
    assert not [f.name for f in folder.iterdir() if str(tmp_path) in f.read_text(errors="ignore")]
    assert public({"a": [f"{tmp_path}/x/y"], "local_dirs": ["/home"]}) == {"a": ["x/y"]}
    run(dpo, "--out", folder, "--overwrite", "--dtype", "float32", "--chat-template", "hh")
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"
    assert "Human" in AutoTokenizer.from_pretrained(folder).chat_template


def test_what_is_refused(tmp_path, base_of):
    base = base_of("llama")
    run_dir = run_of(tmp_path, base, trained(base).state_dict())
    out = tmp_path / "out"
    empty = tmp_path / "empty.jinja"
    bad = tmp_path / "bad.jinja"
    empty.write_text("")
    bad.write_text("{% for")
    # which --overwrite would remove
    inside = Path(shutil.copytree(base, tmp_path / "folder")) / "policy.pt"
    shutil.copy(run_dir / "step-8/policy.pt", inside)
    for options, said in (
        ([base, "--out", out], "already a model's folder or name"),
        ([run_dir, "--out", base], "already exists; give another name, or --overwrite"),
        ([run_dir, "--out", base, "--overwrite"], "--overwrite replaces an exported folder only"),
        (
            [run_dir, "--out", tmp_path, "--overwrite"],
            "--overwrite replaces an exported folder only",
        ),
        ([run_dir, "--policy", run_dir / "step-8/policy.pt"], "already exists"),
        ([run_dir, "--policy", tmp_path / "x"], "ends in .pt"),
        ([run_dir, "--out", out, "--max-shard-gb", 0], "must be above 0"),
        ([run_dir, "--out", out, "--max-shard-gb", "nan"], "must be above 0"),
        ([run_dir, "--policy", tmp_path / "x.pt", "--no-check"], "--no-check: is for --out"),
        ([run_dir, "--out", out, "--chat-template", empty], "empty.jinja: is empty"),
        ([run_dir, "--out", out, "--chat-template", bad], "not valid Jinja: line 1"),
        (
            [inside, "--base", base, "--out", inside.parent, "--overwrite"],
            "--overwrite replaces an exported folder only",
        ),
        (
            [run_dir, "--out", out, "--base", base_of("gpt2")],
            "not the weights of this GPT2LMHeadModel",
        ),
    ):
        with pytest.raises(UserError, match=said):
            run(*options)
    broken = trained(base).state_dict()
    broken["model.norm.weight"][0] = float("nan")
    with pytest.raises(UserError, match="model.norm.weight holds NaN"):
        run(run_of(tmp_path, base, broken, "broken"), "--out", out)
    assert not out.exists() and not list(tmp_path.glob(".*"))


def test_a_folder_that_computes_otherwise_is_not_kept(tmp_path, base_of, monkeypatch):
    base = base_of("llama")
    real = export._read
    monkeypatch.setattr(
        export,
        "_read",
        lambda source, name, *how: real(source, name, *how) * (1 + ("embed" in name)),
    )
    with pytest.raises(UserError, match="computes differently"):
        run(run_of(tmp_path, base, trained(base).state_dict()), "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    shutil.rmtree(base)


def test_at_the_end_of_training(train, tmp_path):
    """export=hf: the last checkpoint; written again when the run went on, or a kill came before it,
    and not otherwise.
    """
    same = [
        "n_examples=8",
        "n_epochs=null",
        "batch_size=4",
        "do_first_eval=false",
        "loss=sft",
        "lr=1e-3",
    ]
    run_dir = train("run", *same, "export=hf")
    folder = run_dir / "hf"

    def as_saved():
        state = load_policy_state(str(run_dir / "LATEST/policy.pt"))
        loaded = AutoModelForCausalLM.from_pretrained(folder).state_dict()
        return all(loaded[name].equal(tensor) for name, tensor in state.items())

    assert as_saved() and "loss/eval" in (folder / "README.md").read_text()
    before = (folder / "config.json").stat().st_mtime_ns
    train("run", *same, "export=hf", "resume=auto")
    assert (folder / "config.json").stat().st_mtime_ns == before
    shutil.rmtree(folder)
    train("run", *same, "export=hf", "resume=auto")
    assert as_saved()
    train("run", *same, "export=hf", "resume=auto", "n_examples=12", "resume_allow=[n_examples]")
    assert as_saved() and not [p.name for p in run_dir.iterdir() if p.name.startswith(".hf")]


def test_at_the_end_of_training_a_distinct_head_is_exported_and_compared(
    train, tmp_path, tiny_model, capsys, monkeypatch
):
    base = with_distinct_head(Path(shutil.copytree(tiny_model, tmp_path / "base")))
    short = [
        f"model.name_or_path={base}",
        "n_examples=4",
        "n_epochs=null",
        "batch_size=4",
        "do_first_eval=false",
        "loss=sft",
        "lr=1e-2",
        "export=hf",
    ]
    run_dir = train("run", *short)
    assert "checked: LlamaForCausalLM" in capsys.readouterr().out
    state = load_policy_state(str(run_dir))
    loaded = AutoModelForCausalLM.from_pretrained(run_dir / "hf", dtype=torch.float32)
    assert all(loaded.state_dict()[name].equal(tensor) for name, tensor in state.items())
    assert not loaded.lm_head.weight.equal(loaded.model.embed_tokens.weight)
    real = export._read
    monkeypatch.setattr(
        export,
        "_read",
        lambda source, name, *how: real(source, name, *how) * (1 + ("embed" in name)),
    )
    with pytest.raises(UserError, match="computes differently"):
        train("broken", *short)
    assert not (tmp_path / "broken/hf").exists() and (tmp_path / "broken/LATEST").exists()


def test_nothing_to_export(validate_only):
    with pytest.raises(UserError, match="debug=true: .* export=hf has none"):
        validate_only("debug=true", "export=hf")


@pytest.fixture
def validate_only(compose):
    from plumb.settings.validation import validate

    return lambda *overrides: validate(compose("exp_name=x", "model=pythia28", *overrides))


def test_named_templates_are_exported_again(tmp_path, base_of):
    """All of them; the one that the run was trained with, or that is asked for, is the default."""
    base = base_of("llama")
    named = {"default": CHAT, "tool_use": CHAT.replace("<assistant>", "<tools>")}
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = named
    tokenizer.save_pretrained(base)
    run_dir = run_of(tmp_path, base, trained(base).state_dict())
    run(run_dir, "--out", tmp_path / "own", "--no-check")
    assert AutoTokenizer.from_pretrained(tmp_path / "own").chat_template == named
    run(run_dir, "--out", tmp_path / "tools", "--no-check", "--chat-template", "tool_use")
    exported = AutoTokenizer.from_pretrained(tmp_path / "tools").chat_template
    assert exported == named | {"default": named["tool_use"]}
    with pytest.raises(
        UserError, match="--chat-template tols: neither a file .*: default, tool_use"
    ):
        run(run_dir, "--out", tmp_path / "none", "--no-check", "--chat-template", "tols")
    assert not (tmp_path / "none").exists()
