"""Check that attention over trees is right on this device, and measure its matrix products, before
any GPU speed means anything.

    python benchmarks/checks.py --device cuda

Compares attention over a packed row, forward and backward, for head sizes 64, 80 and 128, with
fewer key heads than query heads and with a padded end, with a dense masked softmax in float32,
written from the rule itself: same tree, not later, in the prompt or in the query's own response.
Prints a JSON line for each: the largest error of outputs and gradients, relative to the largest
value (at most 2e-2 in bfloat16, 1e-4 in float32), then the speed of one large matrix product in
TFLOP/s.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import make_tokens
import torch
from torch import Tensor

from plumb.batching.layout import pack
from plumb.data.tokenization import Example
from plumb.models import tree_attention

ROW = 1536  # tokens, of which the last are padding
LIMIT = {torch.bfloat16: 2e-2, torch.float32: 1e-4}


def visible(examples: list[Example], n: int) -> Tensor:
    """Return which keys each query sees, [n, n]; tokens after the last tree see themselves and
    those before them, back to where padding begins.
    """
    # response 0: the prompt
    tree = torch.full((n,), -1)
    response = torch.zeros(n, dtype=torch.int64)
    at = 0
    for i, example in enumerate(examples):
        for j, part in enumerate((example.prompt, *example.responses)):
            tree[at : at + len(part)], response[at : at + len(part)] = i, j
            at += len(part)
    same = tree[:, None] == tree[None]
    return same.tril() & ((response[None] == 0) | (response[:, None] == response[None]))


def dense(query: Tensor, key: Tensor, value: Tensor, visible_keys: Tensor) -> Tensor:
    """Return attention by its definition.  [1, H, T, D] and [1, Hkv, T, D] -> [1, T, H, D]"""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = (query @ key.transpose(2, 3)) * query.shape[-1] ** -0.5
    return (scores.masked_fill(~visible_keys, float("-inf")).softmax(-1) @ value).transpose(1, 2)


def check_attention(
    device: torch.device, dtype: torch.dtype, head_size: int, n_key_heads: int
) -> dict[str, Any]:
    """Return the largest relative error over the output and the three gradients."""
    pairs = make_tokens.synthetic(6, 512).pairs
    examples = [Example(pair.prompt, pair[1:], "") for pair in pairs]
    batch = pack(examples, pad_token_id=0, longest=512, row_length=ROW).to(device)
    n = batch.input_ids.shape[1]
    torch.manual_seed(0)
    inputs = [
        torch.randn(1, heads, n, head_size).to(dtype) for heads in (4, n_key_heads, n_key_heads)
    ]
    weights = torch.randn(1, n, 4, head_size)
    weights[:, batch.n_tokens :] = 0  # the outputs of padding are never used
    results: list[list[Tensor]] = []
    for where, kind in ((device, dtype), (torch.device("cpu"), torch.float32)):
        q, k, v = (x.to(where, kind).requires_grad_() for x in inputs)
        if kind is torch.float32 and where.type == "cpu" and results:
            out = dense(q, k, v, visible(examples, n))
        else:
            out = tree_attention.tree_attention(None, q, k, v, None, segments=batch.segments)[0]
        (out.float() * weights.to(where)).sum().backward()
        gradients = [x.grad for x in (q, k, v) if x.grad is not None]
        results.append([x.detach().float().cpu() for x in (out[:, : batch.n_tokens], *gradients)])
    errors = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(*results, strict=True)]
    worst = max(errors) if all(e == e for e in errors) else float("nan")
    return {
        "what": f"attention, head size {head_size}, {n_key_heads} of 4 key heads, {str(dtype)[6:]}",
        "error": worst,
        "ok": worst <= LIMIT[dtype],
    }


def matmul_speed(device: torch.device, dtype: torch.dtype, n: int) -> dict[str, Any]:
    """Return the TFLOP/s of n x n times n x n, the best of ten."""
    x = torch.randn(n, n, device=device).to(dtype)
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        x @ x
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return {
        "what": f"matrix product of {n}, {str(dtype)[6:]}",
        "tflops": 2 * n**3 / best / 1e12,
        "ok": True,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    device = torch.device(parser.parse_args().device)
    gpu = device.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    records = [
        check_attention(device, dtype, size, heads) for size in (64, 80, 128) for heads in (4, 2)
    ]
    records.append(matmul_speed(device, dtype, 8192 if gpu else 512))
    for record in records:
        print(json.dumps(record), flush=True)
    sys.exit(0 if all(record["ok"] for record in records) else 1)


if __name__ == "__main__":
    main()
