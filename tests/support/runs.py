"""Share what tests of complete runs need: 20 small pairs, options that make a run fast, and
functions that read what it wrote.
"""

import json

import torch
from safetensors import safe_open

import eval as eval_command
from plumb.runs import checkpoints

ROWS = [
    {
        "prompt": f"\n\nHuman: What is {a} and {b}?\n\nAssistant:",
        "chosen": f" It makes {a + b}, happy to help.",
        "rejected": f" No idea {a}.",
    }
    for a in range(4)
    for b in range(5)
]
FAST = [
    "max_length=96",
    "max_prompt_length=48",
    "eval_batch_size=5",
    "sample_during_eval=false",
    "minimum_log_interval_secs=-1",
]


DPO = ["loss=dpo", "loss.beta=0.1", "lr=1e-3", "warmup_steps=2", "batch_size=4"]
# For runs whose weights are compared, or that differ in rounding and continue. RMSprop and Adam
# divide a gradient by its own size plus eps, and so amplify rounding where a gradient is nothing
# else: with their eps of 1e-8 and lr=1e-3, an error of 1e-17 (float64, beside gradients of 0.1)
# moves a weight by 1e-3 * 1e-17 / 1e-8 = 1e-12, and one of 1e-8 (float32) by 1e-3. With an eps of
# 1e-3 an update is off by at most lr / eps = 1 times the error of its gradient, so that weights
# compare as gradients do.
STEADY = "optimizer_args={eps: 1e-3}"
# Metrics that depend on the machine (padding is one rank's).
OF_THE_MACHINE = {
    "examples_per_second",
    "tokens_per_second",
    "padding",
    "mfu",
    "peak_memory_gb",
    "data_wait_secs",
    "seconds_left",
    "rollout_train/secs",
    "rollout_train/sampling_secs",
    "rollout_train/sampled_tokens_per_second",
}


def records(run_dir, split=None):
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [r for r in rows if split is None or f"loss/{split}" in r]


def one_line(returned, stderr, runs, code=2):
    """Make the checks that hold for every case. Return the message without "error: "."""
    assert "Traceback" not in stderr
    assert returned == code, stderr
    assert stderr.count("\n") == 1 and stderr.endswith("\n"), stderr
    assert stderr.startswith("error: ")
    assert not list(runs.glob("*/[!t]*")), "a run directory was made for a run that never began"
    assert not list(runs.glob("*/token_cache/tmp-*")), "half a token store was left behind"
    return stderr.removeprefix("error: ").strip()


def run_of(tmp_path, base, state, name="run"):
    """Write what a run leaves: config.yaml and step-8/policy.pt. Return its directory."""
    step = tmp_path / name / "step-8"
    step.mkdir(parents=True)
    (step.parent / "config.yaml").write_text(
        f"exp_name: x\nseed: 3\nloss: {{name: sft}}\nmodel: {{name_or_path: {base}}}\n"
    )
    torch.save({"step_idx": 8, "state": state, "metrics": {}}, step / "policy.pt")
    return step.parent


def outcome(run_dir):
    """Return what must be the same however often a run was interrupted: weights and optimizer,
    order, metrics that do not depend on the machine, samples.
    """
    manifest = checkpoints.latest_valid(run_dir).manifest
    rows = [{k: v for k, v in row.items() if k not in OF_THE_MACHINE} for row in records(run_dir)]
    samples = (
        (run_dir / "samples.jsonl").read_text() if (run_dir / "samples.jsonl").exists() else ""
    )
    policy = torch.load(run_dir / "LATEST/policy.pt", weights_only=True)["state"]
    return (
        state_of(run_dir),
        policy,
        manifest.order,
        (manifest.step, manifest.examples, manifest.finished),
        rows,
        samples,
    )


def same(a, b, tolerance=0.0):
    """Compare two outcomes, to the bit; or, with a tolerance, weights within it."""
    for one, other in ((a[0], b[0]), (a[1], b[1])):
        assert one.keys() == other.keys()
        for name in one:
            if tolerance:
                torch.testing.assert_close(one[name], other[name], atol=tolerance, rtol=0)
            else:
                assert torch.equal(one[name], other[name]), name
    assert a[2:4] == b[2:4]
    if not tolerance:
        assert a[4:] == b[4:]
    return True


def trace_only(monkeypatch):
    """Let compiled blocks be traced as ever, and not translated, which takes a minute."""
    traced = lambda block: setattr(
        block, "_compiled_call_impl", torch.compile(block._call_impl, backend="eager")
    )
    monkeypatch.setattr(torch.nn.Module, "compile", traced)


def evaluate(*words):
    eval_command.main(eval_command.parser().parse_args(list(map(str, words))))


def state_of(run_dir):
    """Return all tensors of the newest checkpoint in full, by name."""
    tensors = {}
    newest = checkpoints.latest_valid(run_dir)
    for path in newest.state_files():
        with safe_open(path, "pt") as file:
            for name, place in file.metadata().items():
                shape, offset = json.loads(place)
                part = file.get_tensor(name)
                missing = float("nan") if part.is_floating_point() else -1
                tensor = tensors.setdefault(name, torch.full(shape, missing, dtype=part.dtype))
                tensor[tuple(slice(o, o + n) for o, n in zip(offset, part.shape, strict=True))] = (
                    part
                )
    return tensors
