"""Make runs with synthetic curves, as the report reads them."""

import math

from conftest import ROOT

from plumb.runs.history import Run, Sample

BATCH, N = 16, 60  # examples of a step, steps
SAMPLE = "To {prompt}, take it slowly and look at it twice."
PROMPTS = [
    "plant a bulb",
    "grow basil",
    "hang a picture",
    "sit at a desk",
    "remember names",
    "repot a plant",
]


def wave(i):
    """Return the noise of single batches, the same every time: within 1, with mean 0."""
    return math.sin(12.9898 * i) * math.cos(4.1 * i)


HEALTHY = {  # functions of the share t of the run that is done
    "loss/{}": lambda t: 0.6931 - 0.4 * t,
    "rewards_{}/chosen": lambda t: 0.2 * t,
    "rewards_{}/rejected": lambda t: -0.9 * t,
    "rewards_{}/margins": lambda t: 1.1 * t,
    "rewards_{}/accuracies": lambda t: 0 if t == 0 else 0.9,
    "logps_{}/chosen": lambda t: -70 + 2 * t,
    "grad_norm": lambda t: 4 - t,
    "lr": lambda t: min(1e-5, 1e-4 * t),
}


def samples(text, step, prompts=PROMPTS):
    return [
        Sample("policy_samples", step, prompt, text.format(i=i, prompt=prompt))
        for i, prompt in enumerate(prompts)
    ]


def run(n=N, status=None, texts=(SAMPLE, SAMPLE), config=None, silent_secs=5.0, **changed):
    """Return a healthy run of n steps and 6 evaluations, with changes: train={metric: f(t)},
    held_out={metric: f(t)}; f is None for a metric that is absent.
    """
    curves = {split: HEALTHY | changed.get(split, {}) for split in ("train", "held_out")}
    record = lambda split, name, t: {
        key.format(name): f(t) for key, f in curves[split].items() if f is not None
    }
    steps = [
        {"step": BATCH * (i + 1), **record("train", "train", i / max(1, n - 1))} for i in range(n)
    ]
    for i, step in enumerate(steps):
        step |= {"loss/train": step["loss/train"] * (1 + 0.03 * wave(i)), "counters/updates": i + 1}
    at = sorted({round(k * n / 5) for k in range(6)})
    evaluations = [
        {"step": BATCH * i, **record("held_out", "eval", i / max(1, n))}
        for i in at
        if changed.get("held_out") != {}
    ]
    evaluations = [
        {k: v for k, v in r.items() if k not in ("grad_norm", "lr")} for r in evaluations
    ]
    settings = {
        "loss": {"name": "dpo", "beta": 0.1},
        "lr": 1e-5,
        "warmup_steps": 10,
        "max_grad_norm": 10.0,
    }
    rows = [
        s for text, step in zip(texts, (0, BATCH * n), strict=True) for s in samples(text, step)
    ]
    status = {"state": "finished", "code": 0} | (status or {})
    return Run(
        path=ROOT,
        name="mine",
        config=settings | (config or {}),
        status=status,
        environment={},
        starts=1,
        steps=steps,
        evaluations=evaluations,
        samples=rows,
        wall_secs=90.0,
        silent_secs=silent_secs,
        notes=[],
    )


def falling(start, end):
    return lambda t: start + (end - start) * t


def bent(top, bottom, end):
    """Return a line from top to bottom in the middle, and on to the end."""
    return lambda t: (
        top + (bottom - top) * 2 * t if t < 0.5 else bottom + (end - bottom) * (2 * t - 1)
    )


ALWAYS = lambda value: lambda t: value
