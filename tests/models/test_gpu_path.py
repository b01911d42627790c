"""What runs on a GPU only, as far as a machine without one can tell: the call of flash attention
with a plain stand-in for its kernel, and the head on tensors without data.
"""

from functools import wraps

import pytest
import torch
from test_models import assert_equal, batch, with_gradients
from tiny import LLAMA, SIZES
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AutoConfig, AutoModelForCausalLM

from plumb.models import chunked_head, logps, tree_attention
from plumb.models.forward_path import ForwardPath, use_tree_attention


def kernel(q, k, v, ends_q, ends_k, max_q, max_k, *, scale, window_size, enable_gqa=False):
    """What torch.nn.attention.varlen computes, and the arguments that it takes: heads of one size,
    a multiple of 8 up to 256; bottom-right causal over cu_seqlens.
    """
    assert q.dim() == 3 and ends_q.dtype == ends_k.dtype == torch.int32
    assert {x.shape[-1] % 8 for x in (q, k, v)} == {0} and {x.stride(-1) for x in (q, k, v)} == {1}
    assert q.shape[-1] == k.shape[-1] == v.shape[-1] <= 256
    assert enable_gqa or q.shape[1] == k.shape[1]
    out = torch.full_like(q, float("nan"))
    for a, b, c, d in zip(ends_q[:-1], ends_q[1:], ends_k[:-1], ends_k[1:], strict=True):
        assert 0 < b - a <= max_q and d - c <= max_k
        keys, values = (x[c:d].repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        behind = torch.arange(b - a)[:, None] + (d - c) - (b - a) - torch.arange(d - c)[None]
        back, ahead = (w if w >= 0 else torch.inf for w in window_size)  # -1: without a limit
        seen = (behind <= back) & (behind >= -ahead)
        scores = torch.einsum("qhd,khd->hqk", q[a:b], keys) * scale
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        out[a:b] = torch.einsum("hqk,khd->qhd", weights, values)
    return out


def of_2_11(q, k, v, ends_q, ends_k, max_q, max_k, *, scale, window_size):
    """It takes fewer key heads without being told."""
    return kernel(
        q, k, v, ends_q, ends_k, max_q, max_k, scale=scale, window_size=window_size, enable_gqa=True
    )


@pytest.mark.parametrize("varlen_attn", [kernel, of_2_11])
@pytest.mark.parametrize(
    ("query_size", "value_size"),
    [(8, 8), (12, 12), (36, 36), (24, 16)],  # the last as in DeepSeek's latent attention
)
@pytest.mark.parametrize("window", [None, 8])
def test_varlen_attention_gets_what_the_loop_computes(
    varlen_attn, query_size, value_size, window, monkeypatch
):
    b = batch(row_length=300)
    n_keys = len(b.segments.gather)
    q, k = torch.randn(4, 300, query_size), torch.randn(2, n_keys, query_size)
    v = torch.randn(2, n_keys, value_size)
    expected = tree_attention._loop(q, k, v, b.segments, 0.3, window)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    got = tree_attention._varlen(q, k, v, b.segments, 0.3, window)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_what_flash_attention_refuses_is_said_once(capsys):
    """A CPU has no such kernel: the trial finds out. A line for each size, and no second one."""
    tree_attention._tried.cache_clear()
    heads = [torch.empty(2, 8, size, dtype=torch.bfloat16) for size in (64, 320, 64)]
    assert all(tree_attention.refused(x, x) for x in heads)
    by_trial, by_size = capsys.readouterr().out.splitlines()
    start = "attention over trees runs segment by segment, without flash attention: "
    assert by_trial.startswith(start) and "CPU" in by_trial
    assert by_size == start + "it takes heads of up to 256 numbers, not of 320"
    tree_attention._tried.cache_clear()


def test_the_trial_is_alone(monkeypatch):
    """It asks for a gradient within no_grad, and hooks around it, as checkpointing sets them, see
    none of its tensors.
    """
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    seen = []
    hooks = torch.autograd.graph.saved_tensors_hooks(seen.append, lambda x: x)
    with torch.no_grad(), hooks:
        error = tree_attention._error_of_trial(torch.device("cpu"), torch.float32, 16)
    assert (error, seen) == ("", [])


FAMILIES = {  # and the sizes of heads that flash attention is given
    "llama": ({}, {8}),
    "qwen2": ({"hidden_size": 40}, {16}),  # heads of 10
    "mistral": ({"sliding_window": 8}, {8}),
    "gemma3_text": ({"head_dim": 256, "sliding_window": 8}, {256}),
    "gpt_neox": ({}, {8}),
    "qwen3": ({"head_dim": 264}, set()),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_through_flash_attention(family, monkeypatch):
    """Every layer's attention is one call where it takes the heads; values and gradients are those
    of padded rows.
    """
    changes, expected = FAMILIES[family]
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(SIZES | LLAMA | changes))
    model, b = AutoModelForCausalLM.from_config(config), batch()
    use_tree_attention(model)

    def compute(packed):
        path = ForwardPath(packed, plain_head=True)
        return with_gradients(model, lambda: logps.response_logps(model, b, path).sum)

    truth = compute(packed=False)
    heads = []

    @wraps(kernel)  # its signature says which torch it is of
    def noting(q, *arguments, **options):
        heads.append(q.shape[-1])
        return kernel(q, *arguments, **options)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", noting)
    monkeypatch.setattr(tree_attention, "has_flash", lambda query: True)
    tree_attention._tried.cache_clear()
    by_flash = compute(packed=True)
    tree_attention._tried.cache_clear()
    assert_equal(by_flash, truth)
    trial = len(expected)
    assert set(heads) == expected and len(heads) == trial * (config.num_hidden_layers + 1)


def test_the_heads_matrix_product_on_a_gpu():
    """In 16 bits, on tensors of a GPU without data: logits come out in float32, never rounded."""
    with FakeTensorMode(), torch.no_grad():
        hidden, weight = (
            torch.empty(n, 16, dtype=torch.bfloat16, device="cuda") for n in (4, 1000)
        )
        logits = chunked_head._log_softmax(hidden, weight, None)
    assert (logits.dtype, logits.shape, logits.device.type) == (torch.float32, (4, 1000), "cuda")


class Largest(TorchDispatchMode):
    """Note the size of the largest tensor that an operation makes."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [x.numel() for x in tree_iter(out) if isinstance(x, torch.Tensor)]
        self.size = max(self.size, *made, 0)
        return out


READS = {
    "logps": logps.response_logps,
    "squares": logps.response_logps_and_squares,
    "tokens": logps.response_token_logps,
}


@pytest.mark.parametrize("read", [*READS, "kl"])
def test_no_tensor_of_all_logits(read):
    """A vocabulary of 262,144, forward and backward, on tensors without data: no tensor has more
    numbers than a chunk of logits, or the embeddings.
    """
    config = AutoConfig.for_model("llama", **(SIZES | LLAMA | {"vocab_size": 262_144}))
    b = batch(n=20)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    use_tree_attention(model)
    path = ForwardPath(packed=True, plain_head=True)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        model.to_empty(device="cpu")
    with mode, Largest() as largest:
        if read == "kl":
            values = logps.response_logps_and_kl(model, model, b, path)
            (values.sum + values.kl).sum().backward()
        else:
            READS[read](model, b, path)[0].sum().backward()
    chunk = chunked_head.standard_chunk(torch.device("cpu")) // 4
    embeddings = config.vocab_size * config.hidden_size
    assert largest.size <= max(chunk, embeddings) < b.n_scored * config.vocab_size / 4


def test_autocast_keeps_the_gradient_behind_a_reference(tiny_model):
    """The reference of an adapter is the policy itself without a gradient, in the same context:
    what autocast has cast there must not serve the policy. Two microbatches.
    """
    config = AutoConfig.from_pretrained(tiny_model)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    path, b = ForwardPath(packed=False, plain_head=True), batch()

    def gradient(reference_apart):
        model.zero_grad()
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                if reference_apart:
                    values = logps.response_logps(model, b, path)
                else:
                    values = logps.response_logps_and_kl(model, model, b, path)
            values.sum.sum().backward()
        return {n: p.grad for n, p in model.named_parameters()}

    apart, within = gradient(True), gradient(False)
    assert all(x is not None and x.abs().sum() > 0 for x in within.values())
    for name, x in apart.items():
        torch.testing.assert_close(within[name], x, msg=name)


def test_log_probabilities_in_16_bits_sum_in_float32():
    """Over 262,144 equal logits, a sum in bfloat16 would stop at 256; log V is 12.477."""
    hidden = torch.ones(3, 8, dtype=torch.bfloat16)
    weight = torch.ones(262_144, 8, dtype=torch.bfloat16)
    got = chunked_head.linear_logps(hidden, weight, None, torch.arange(3))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, torch.full((3,), -12.476649250079), atol=1e-5, rtol=0)
