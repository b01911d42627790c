"""Log-probabilities, dropout, loading: on real tiny models of every family that has a config."""

import numpy as np
import pytest
import torch
from golden import GOLDEN, needs_golden
from tiny import FAMILIES, tiny_model, tiny_tokenizer

import models
from batching import IGNORE, Batch, collate
from tokenization import Example
from utils import UserError


def batch(n=3, k=2, seed=0) -> Batch:
    rng = np.random.default_rng(seed)
    some = lambda low, high: rng.integers(3, 259, rng.integers(low, high)).astype(np.int32)
    examples = [Example(some(2, 20), tuple(some(1, 15) for _ in range(k)), "") for _ in range(n)]
    return collate(examples, pad_token_id=0)


def plain_logps(model, batch):
    """The straightforward computation, one unpadded row at a time, logits at every position: the oracle."""
    sums = []
    for ids, mask, labels in zip(batch.input_ids, batch.attention_mask, batch.labels, strict=True):
        ids, labels = ids[mask.bool()], labels[mask.bool()]
        logps = model(ids[None]).logits[0].float().log_softmax(-1)
        sums.append(sum(logps[t - 1, ids[t]] for t in range(1, len(ids)) if labels[t] != IGNORE))
    return torch.stack(sums)


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_and_gradients_equal_the_plain_computation(family):
    model = tiny_model(family).eval()
    b = batch()
    weights = torch.linspace(-1, 1, len(b.labels))
    ours = models.response_logps(model, b)
    (ours.sum * weights).sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    plain = plain_logps(model, b)
    (plain * weights).sum().backward()
    torch.testing.assert_close(ours.sum, plain, atol=1e-4, rtol=1e-5)
    scale = max(p.grad.norm() for p in model.parameters() if p.grad is not None)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert (gradients[name] - parameter.grad).norm() <= 1e-5 * scale, name
    assert ours.tokens.tolist() == (b.labels[:, 1:] != IGNORE).sum(1).tolist()


@needs_golden
def test_token_log_probabilities_equal_the_2023_code():
    """_get_batch_logps at three logit scales: sums, averages, and the gradient of the sum; a fully masked row sums to 0."""
    golden = np.load(GOLDEN / "get_batch_logps.npz")
    for i in range(3):
        logits = torch.from_numpy(golden[f"{i}_logits"]).requires_grad_()
        labels = torch.from_numpy(golden[f"{i}_labels"])
        scored = labels[:, 1:] != IGNORE
        logps = models.token_logps(logits[:, :-1][scored], labels[:, 1:][scored])
        sums = torch.zeros(len(labels)).index_add(0, scored.nonzero()[:, 0], logps)
        sums.sum().backward()
        np.testing.assert_allclose(sums.detach(), golden[f"{i}_sum"], rtol=1e-5)
        np.testing.assert_allclose((sums / scored.sum(1)).detach(), golden[f"{i}_avg"], rtol=1e-5)
        np.testing.assert_allclose(logits.grad, golden[f"{i}_sum_grad"], rtol=1e-4, atol=1e-6)


def test_the_head_runs_on_scored_positions_only():
    model, b, seen = tiny_model().eval(), batch(), []
    model.lm_head.register_forward_hook(lambda m, i, o: seen.append(o.shape))
    models.response_logps(model, b)
    assert seen == [(1, int((b.labels[:, 1:] != IGNORE).sum()), 259)]
    assert model(b.input_ids).logits.shape == (*b.input_ids.shape, 259)  # and whole again afterwards


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2"])
def test_dropout_is_off_even_where_it_is_functional(family, tmp_path, compose):
    """The 2023 code left Llama's attention dropout on: two train-mode forwards differed by 0.96."""
    tiny_model(family).save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    policy = models.load_policy(compose(f"model.name_or_path={tmp_path}/m")).train()
    ids = torch.arange(3, 40)[None]
    assert torch.equal(policy(ids).logits, policy(ids).logits)
    noisy = tiny_model(family).train()  # the check can fail: as configured, dropout is 0.5
    assert not torch.equal(noisy(ids).logits, noisy(ids).logits)


def test_reference_is_the_policy_before_training():
    policy = tiny_model()
    reference = models.load_reference(policy, None)
    ids = torch.arange(3, 40)[None]
    assert torch.equal(policy.eval()(ids).logits, reference(ids).logits)
    with torch.no_grad():
        policy.lm_head.weight.add_(1)
    assert not torch.equal(policy(ids).logits, reference(ids).logits)
    assert not any(p.requires_grad for p in reference.parameters()) and not reference.training
    assert next(models.load_reference(policy, torch.bfloat16).parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize("family, block", [("llama", "LlamaDecoderLayer"), ("gpt_neox", "GPTNeoXLayer"), ("gpt2", "GPT2Block")])
def test_the_block_is_found_from_the_model(family, block):
    model = tiny_model(family)
    assert models.block_class(model, None).__name__ == models.block_class(model, block).__name__ == block
    with pytest.raises(UserError, match=f"model.block_name=Nope: .* it has: .*{block}"):
        models.block_class(model, "Nope")


def test_a_gguf_file_is_a_model(tmp_path, compose):
    """A small Llama written as GGUF in float32, with its tokenizer, comes back with the same weights."""
    from gguf_writer import write_gguf

    source = tiny_model().eval()
    write_gguf(source, tmp_path / "tiny.gguf")
    for name in (tmp_path / "tiny.gguf", tmp_path):  # the file, or a folder with just that
        policy = models.load_policy(compose(f"model.name_or_path={name}"))
        ids = torch.arange(3, 40)[None]
        torch.testing.assert_close(policy.eval()(ids).logits, source(ids).logits, atol=1e-4, rtol=1e-4)
        policy.save_pretrained(tmp_path / "plain")  # no trace of quantisation is left
