"""Define what benchmarks/throughput.py measures: models, contenders and their settings, for a CPU,
a GPU, and --smoke (tiny shapes).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from settings import Setting

SMALL_LLAMA = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 50304,
    "max_position_embeddings": 1024,
}
PYTHIA = {
    "model_type": "gpt_neox",
    "vocab_size": 50304,
    "max_position_embeddings": 2048,
    "rotary_pct": 0.25,
}
PYTHIA_1B = PYTHIA | {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 8,
}
PYTHIA_3B = PYTHIA | {
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 512,
}


@dataclass
class Scenario:
    """Hold contenders to compare: the first is Plumb, and ratios are Plumb over the other."""

    name: str
    title: str
    settings: list[Setting]
    share: float = 1.0  # of the time limit, where contenders alternate
    # one process after the other (they would not fit in memory together), each measured in one go
    in_turn: bool = False


def cpu(tokens: str, whole: bool, model: dict[str, Any] = SMALL_LLAMA) -> list[Scenario]:
    """Return the comparisons on a CPU in float32. `whole`: every step runs all 64 pairs; otherwise
    the slow contenders run a part of them.

    A part is an even choice of the microbatches of the same batch of 64 pairs, cut as in the whole
    step, so that padding is that of the whole batch; each round takes another part. Plumb always
    runs all 64.
    """

    def some(n: int) -> int:
        return 0 if whole else n

    def setting(label: str, contender: str, **fields: Any) -> Setting:
        return Setting(label, contender, model, tokens, **fields)

    # From the scenario "probe": 1 and 2 pairs are equally fast for both, 1 needs the least memory,
    # and more pairs are slower.
    best: dict[str, Any] = {"microbatch": 1, "by_length": True}
    plumb = setting("plumb", "plumb")
    padded = setting("2023 manner", "padded", microbatch=1, n_timed=some(8))
    sft: dict[str, Any] = {"objective": "sft"}
    reward: dict[str, Any] = {"objective": "reward"}
    probe = [
        setting(f"TRL, {m} pairs", "trl", microbatch=m, by_length=True, n_timed=some(32))
        for m in (1, 2, 4, 8)
    ]
    probe += [setting("TRL, 2 pairs, data order", "trl", microbatch=2, n_timed=some(32))]
    probe += [
        setting(f"2023 manner, {m} pairs", "padded", microbatch=m, n_timed=some(8))
        for m in (1, 2, 4)
    ]
    return [
        Scenario(
            "dpo",
            "DPO, reference in the same step",
            [plumb, padded, setting("TRL, best", "trl", n_timed=some(16), **best)],
            share=0.6,
        ),
        Scenario("sft", "SFT", [replace(plumb, **sft), replace(padded, **sft)], share=0.18),
        Scenario(
            "reward",
            "Reward model",
            [replace(plumb, **reward), replace(padded, n_timed=some(16), **reward)],
            share=0.18,
        ),
        Scenario(
            "defaults",
            "DPO, TRL's defaults",
            [
                plumb,
                setting("TRL, defaults", "trl", microbatch=8, checkpointing=True, n_timed=some(16)),
            ],
        ),
        Scenario(
            "cached",
            "DPO, reference computed beforehand",
            [
                replace(plumb, label="plumb, cached", then=[{"reference": "cached"}]),
                setting("TRL, precomputed", "trl", n_timed=some(16), reference="cached", **best),
            ],
        ),
        Scenario(
            "patched",
            "DPO, TRL's head on response rows only (our patch)",
            [plumb, setting("TRL, patched", "trl", n_timed=some(16), responses_only=True, **best)],
        ),
        Scenario("probe", "DPO, microbatch sizes", [plumb, *probe]),
        Scenario(
            "budget",
            "DPO, Plumb's tokens per microbatch",
            [replace(plumb, label=f"{n} tokens", budget=n) for n in (2048, 512, 1024, 4096, 8192)],
        ),
    ]


def gpu(
    tokens: str,
    one: dict[str, Any],
    two: dict[str, Any],
    device: str,
    dtype: str,
    sizes: tuple[int, ...],
) -> list[Scenario]:
    """Return the comparisons on one GPU with bf16 weights, in order of importance, as are the
    contenders of each, since the time limit cuts the last ones.

    `one` and `two` are the models (Pythia 1B and 2.8B), `sizes` are TRL's microbatches to try, in
    pairs, on the second the first two. The manner of 2023 makes few steps: they are long.
    """

    def setting(label: str, contender: str, model: dict[str, Any] = one, **fields: Any) -> Setting:
        base: dict[str, Any] = {
            "device": device,
            "dtype": dtype,
            "n_warm": 2,
            "n_measured": 6,
            "n_steps": 8,
            "n_check": 8,
            "microbatch": 8,
            "timeout": 100.0,
        }
        return Setting(label, contender, model, tokens, **(base | fields))

    cached = [{"reference": "cached", "label": "cached reference"}]
    sweep = [{"budget": b, "label": f"{b} tokens"} for b in (4096, 8192, 32768)]
    few: dict[str, Any] = {"n_warm": 1, "n_measured": 2}
    best: dict[str, Any] = {"microbatch": 0, "by_length": True, "reference": "cached"}

    def trl(m: int, model: dict[str, Any]) -> Setting:
        label = f"TRL, {m} pairs"
        return setting(label, "trl", model, microbatch=m, by_length=True, n_warm=1, n_measured=4)

    return [
        Scenario(
            "2.8b",
            "DPO, Pythia 2.8B",
            [
                setting("plumb", "plumb", two, then=cached, trace=True),
                *(trl(m, two) for m in sizes[:2]),
                setting("TRL, precomputed", "trl", two, **best),
                setting("2023 manner", "padded", two, microbatch=4, **few),
            ],
            in_turn=True,
        ),
        Scenario(
            "1b",
            "DPO, Pythia 1B",
            [
                setting("plumb", "plumb", then=cached, trace=True),
                trl(sizes[0], one),
                setting("2023 manner", "padded", **few),
                setting("plumb, compiled", "plumb", compile=True, budget=8192, then=cached),
                *(trl(m, one) for m in sizes[1:]),
                setting("TRL, defaults", "trl", checkpointing=True),
            ],
            in_turn=True,
        ),
        Scenario(
            "compiled",
            "Plumb compiled, DPO, Pythia 2.8B",
            [
                setting("plumb", "plumb", two, compile=True, budget=8192, then=cached, trace=True),
            ],
            in_turn=True,
        ),
        Scenario(
            "sweep",
            "Plumb's tokens per microbatch, Pythia 1B, DPO",
            [setting("16384 tokens", "plumb", budget=16384, n_measured=4, then=sweep)],
            in_turn=True,
        ),
    ]


def smoke() -> list[Scenario]:
    """Return every code path of the CPU and GPU comparisons at tiny shapes on a CPU; the numbers
    mean nothing.
    """
    llama, neox = SMALL_LLAMA | TINY | {"num_key_value_heads": 2}, PYTHIA | TINY
    scenarios = cpu("synthetic:0.1", whole=True, model=llama)
    scenarios += gpu("synthetic:0.1", neox, neox, "cpu", "bfloat16", (2, 4))
    quick: dict[str, Any] = {"n_warm": 1, "n_measured": 2, "n_steps": 3, "n_pairs": 16}
    for scenario in scenarios:
        scenario.settings = [replace(s, **quick) for s in scenario.settings]
        scenario.settings = [replace(s, n_timed=min(s.n_timed, 8)) for s in scenario.settings]
    return scenarios
