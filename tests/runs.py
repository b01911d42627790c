"""What tests of whole runs share: 20 small pairs, options that make a run fast, and how to read
what it wrote.
"""

import json

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
# For runs whose weights are compared, or that differ in rounding and train on. RMSprop and Adam
# divide a gradient by its own size plus eps, and so blow up rounding where a gradient is nothing
# else: with their eps of 1e-8 and lr=1e-3, an error of 1e-17 (float64, beside gradients of 0.1)
# moves a weight by 1e-3 * 1e-17 / 1e-8 = 1e-12, and one of 1e-8 (float32) by 1e-3. With an eps of
# 1e-3 an update is off by at most lr / eps = 1 times the error of its gradient, so that weights
# compare as gradients do.
STEADY = "optimizer_args={eps: 1e-3}"
# Not of the computation, but of the machine (padding is one rank's).
OF_THE_MACHINE = {
    "examples_per_second",
    "tokens_per_second",
    "padding",
    "mfu",
    "peak_memory_gb",
    "data_wait_secs",
    "seconds_left",
}


def records(run_dir, split=None):
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [r for r in rows if split is None or f"loss/{split}" in r]
