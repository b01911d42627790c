"""Models by the names that users have for them, and reward models among them."""

import pytest
import torch
from conftest import ROOT
from runs import run_of
from tiny import save_tiny_llama, tiny_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from plumb.errors import UserError
from plumb.models import load, scalar_head
from plumb.models.find import find_model, open_model


def test_a_policy_by_each_of_its_names(tmp_path):
    base = save_tiny_llama(tmp_path / "base")
    state = {k: v + 1 for k, v in AutoModelForCausalLM.from_pretrained(base).state_dict().items()}
    run_dir = run_of(tmp_path, base, state)
    for name in (run_dir, run_dir / "step-8", run_dir / "step-8/policy.pt", tmp_path / "r*n"):
        opened = open_model(find_model(str(name)), "cpu")
        # its config, like 2023's, does not say
        assert opened.ref.run_dir == run_dir and opened.ref.config.add_bos is False
        assert not opened.ref.scalar and opened.model.state_dict()["lm_head.weight"].equal(
            state["lm_head.weight"]
        )
    assert open_model(find_model(str(base)), "cpu").ref.archive is None
    loose = tmp_path / "loose.pt"
    loose.write_bytes((run_dir / "step-8/policy.pt").read_bytes())
    assert open_model(find_model(str(loose), base=str(base)), "cpu").model.config.hidden_size == 32
    with pytest.raises(UserError, match=r"loose.pt: no config.yaml .* --base"):
        find_model(str(loose))
    (tmp_path / "config.yaml").write_text("lives: here by chance")
    assert find_model(str(loose), base=str(base)).run_dir is None
    with pytest.raises(UserError, match="config.yaml: cannot be read .* --base"):
        find_model(str(loose))
    with pytest.raises(UserError, match="not a model.s folder, run, checkpoint"):
        find_model(str(tmp_path))
    with pytest.raises(UserError, match="cannot be loaded"):
        find_model("no-such-model-anywhere")


def test_a_relative_path_of_a_run_starts_at_the_repository(tmp_path, monkeypatch):
    """Where train.py is started; the model may be looked at from anywhere."""
    run_dir = run_of(
        tmp_path, save_tiny_llama(tmp_path / "base"), {"lm_head.weight": torch.zeros(2, 2)}
    )
    text = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text(
        text.replace("model: {", "model: {tokenizer_name_or_path: demo/tokenizer, ")
    )
    monkeypatch.chdir(tmp_path)
    assert find_model(str(run_dir)).config.model.tokenizer_name_or_path == str(
        ROOT / "demo/tokenizer"
    )


def test_a_reward_model_from_each_of_its_sources(tmp_path, compose):
    """A new head on a causal LM and on its policy.pt; the head that a reward model's policy.pt or a
    classifier's folder has.
    """
    base = save_tiny_llama(tmp_path / "base")
    body = AutoModelForCausalLM.from_pretrained(base).model.state_dict()
    new = load.load_policy(compose(f"model.name_or_path={base}"), scalar=True)
    assert scalar_head.scores(new) and new.get_output_embeddings().weight.equal(
        scalar_head.initial_weight(32, seed=0)
    )
    assert all(new.model.state_dict()[k].equal(v) for k, v in body.items())

    reward_run = run_of(tmp_path, base, {k: v * 2 for k, v in new.state_dict().items()}, "reward")
    ref = find_model(str(reward_run))
    assert ref.scalar
    opened = open_model(ref, "cpu").model
    assert all(opened.state_dict()[k].equal(v * 2) for k, v in new.state_dict().items())
    with pytest.raises(UserError, match="a reward model, which has no LM head"):
        load.load_policy(compose(f"model.name_or_path={base}", f"model.archive={reward_run}"))
    going_on = load.load_policy(
        compose(f"model.name_or_path={base}", f"model.archive={reward_run}"), scalar=True
    )
    assert going_on.get_output_embeddings().weight.equal(opened.get_output_embeddings().weight)

    classifier = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    classifier.save_pretrained(tmp_path / "classifier")
    (tmp_path / "classifier/tokenizer.json").write_bytes((base / "tokenizer.json").read_bytes())
    (tmp_path / "classifier/tokenizer_config.json").write_bytes(
        (base / "tokenizer_config.json").read_bytes()
    )
    with pytest.raises(
        UserError, match="hold no lm_head.weight .* not a complete LlamaForCausalLM"
    ):
        load.load_policy(compose(f"model.name_or_path={tmp_path}/classifier"))
    opened = open_model(find_model(str(tmp_path / "classifier")), "cpu").model
    assert opened.get_output_embeddings().weight.equal(classifier.score.weight)
    AutoModelForSequenceClassification.from_pretrained(base, num_labels=2).save_pretrained(
        tmp_path / "two"
    )
    with pytest.raises(UserError, match="without exactly one score"):
        load.load_policy(compose(f"model.name_or_path={tmp_path}/two"), scalar=True)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2", "qwen3", "gemma2"])
def test_a_scalar_head_scores_in_float32(family):
    model = tiny_model(family).bfloat16().eval()
    name = scalar_head.put_scalar_head(model, seed=1)
    assert (
        model.state_dict()[name].shape == (1, 32)
        and model.state_dict()[name].dtype == torch.float32
    )
    ids = torch.arange(3, 9)[None]
    out = model(ids).logits
    assert out.shape == (1, 6, 1) and out.dtype == torch.float32
    hidden = model.base_model(ids).last_hidden_state
    assert torch.allclose(out, hidden.float() @ scalar_head.initial_weight(32, 1).T, atol=1e-5)
