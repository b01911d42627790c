"""What a step costs, in operations and in bytes: for the MFU, and for the default token budget of a microbatch.

Symbols: N parameters of the body (neither embeddings nor head), V vocabulary, d hidden size, L layers, q = heads * head size.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any, NamedTuple

import psutil
import torch
from torch import nn

from tokenization import Example, trees_of

# Dense 16-bit operations per second of a card, by its whole name, from its data sheet.
PEAK = {
    "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA H200": 989e12, "NVIDIA L40S": 362e12,
    "NVIDIA A100-SXM4-40GB": 312e12, "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12, "NVIDIA A10": 125e12, "NVIDIA GeForce RTX 4090": 165e12,
}  # fmt: skip


class Cost(NamedTuple):
    """Operations of one forward pass, from a model's sizes; a backward pass takes twice as many."""

    body: int  # N
    head: int  # V * d
    attention: int  # q * L

    def forward(self, examples: Iterable[Example]) -> float:
        """2 N T + 2 V d H + 4 q L A: T tokens, each prompt's once; H response tokens; A pairs of a query and a key it sees."""
        tokens = responses = pairs = 0.0
        for prompt, answers in (tree for example in examples for tree in trees_of(example)):
            p = len(prompt)
            tokens, pairs = tokens + p, pairs + p * p / 2
            for c in map(len, answers):
                tokens, responses, pairs = tokens + c, responses + c, pairs + p * c + c * c / 2
        return 2 * self.body * tokens + 2 * self.head * responses + 4 * self.attention * pairs


def cost_of(model: Any) -> Cost:
    """From a causal language model of transformers that is not sharded yet."""
    spec = model.config.get_text_config()
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    n = sum(p.numel() for p in model.parameters()) - embedding.numel() - (head.numel() if head is not embedding else 0)
    heads = getattr(spec, "num_attention_heads", None) or 0  # none in a state-space model
    size = getattr(spec, "head_dim", None) or spec.hidden_size // max(heads, 1)
    return Cost(n, head.numel(), heads * size * spec.num_hidden_layers)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second that MFU is a share of: a known GPU's data sheet for 16-bit types, else the best of some matrix
    products on this device, in this type, with this process's threads: about 0.1 s."""
    if device.type == "cuda" and dtype.itemsize == 2 and torch.cuda.get_device_name(device) in PEAK:
        return PEAK[torch.cuda.get_device_name(device)]
    n = 4096 if device.type == "cuda" else 512
    x, best = torch.randn(n, n, device=device).to(dtype), float("inf")
    for _ in range(8):
        start = time.perf_counter()
        _ = x @ x
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def memory_at_hand(device: torch.device) -> int:
    """Bytes that are free now."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def weights_bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def trained_bytes(policy: nn.Module) -> int:
    """Gradients, and an optimizer state of two numbers per weight (Adam; RMSprop has one)."""
    return 3 * weights_bytes(policy)


def default_budget(config: Any, device: torch.device, dtype: torch.dtype, free: float, kept: float, plain_head: bool) -> int:
    """Tokens of a microbatch that use half of `free` bytes for activations, at most what makes a difference.

    Per token and layer: 48 d numbers (Llama 47.5, GPT-NeoX 32, counted with saved-tensor hooks), of which a share `kept` is kept
    where activations are recomputed; and for a head that is not computed in chunks, logits and their gradient in float32 for
    half of the tokens. Beyond 1,024 tokens a CPU gains a few percent only, and a GPU nothing beyond 16,384.
    """
    spec = config.get_text_config()
    per_token = (spec.num_hidden_layers * kept + 1) * 48 * spec.hidden_size * dtype.itemsize
    per_token += 0 if plain_head else 2 * 4 * spec.vocab_size
    return min(16384 if device.type == "cuda" else 1024, int(free / 2 / per_token) // 256 * 256)
