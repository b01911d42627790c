#!/usr/bin/env bash
# Step 2 of AmberSafe: DPO on PKU-SafeRLHF (safe answer over unsafe answer), from the policy that sft.sh trained.
#
#   bash dpo.sh                                     AmberSafe's setting, from the newest run of sft.sh
#   SFT_CKPT_PATH=/runs/my_sft BETA=0.3 bash dpo.sh
#
# Every variable below can be set in the environment; extra arguments are added to the command, and take precedence.
set -euo pipefail

PYTHON=${PYTHON:-python}
TRAIN_SCRIPT_PATH=${TRAIN_SCRIPT_PATH:-"$(dirname "${BASH_SOURCE[0]}")/train.py"}
MODEL=${MODEL:-LLM360/AmberChat}       # the model that sft.sh started from: its architecture and tokenizer
DATASETS=${DATASETS:-saferlhf}         # one or more, separated by commas
EXP_NAME=${EXP_NAME:-ambersafe_dpo}
RUNS=${RUNS:-.cache}                   # run directories are made in $RUNS/<user>/; as in sft.sh
# The SFT policy: a policy.pt, a run directory, or a pattern, whose newest match with a policy.pt in it is used.
# Set it if sft.sh ran with another EXP_NAME.
SFT_CKPT_PATH=${SFT_CKPT_PATH:-"$RUNS/*/ambersafe_sft_*"}
BETA=${BETA:-0.1}                      # strength of the KL constraint
BATCH_SIZE=${BATCH_SIZE:-32}           # pairs per optimizer step, over all GPUs
GRADIENT_ACCUMULATION_STEPS=${GRADIENT_ACCUMULATION_STEPS:-4}
EVAL_BATCH_SIZE=${EVAL_BATCH_SIZE:-32}
LR=${LR:-5e-7}
N_EPOCHS=${N_EPOCHS:-3}
MAX_LENGTH=${MAX_LENGTH:-512}          # tokens of prompt + answer
MAX_PROMPT_LENGTH=${MAX_PROMPT_LENGTH:-256}
TRAINER=${TRAINER:-FSDPTrainer}        # one process per GPU; BasicTrainer: one process

# The inner quotes are Hydra's: they let a path hold spaces, commas and equals signs. The pattern is resolved by train.py.
exec "$PYTHON" -u "$TRAIN_SCRIPT_PATH" \
    model=blank_model \
    model.name_or_path="'$MODEL'" \
    model.archive="'$SFT_CKPT_PATH'" \
    datasets="[$DATASETS]" \
    loss=dpo \
    loss.beta="$BETA" \
    exp_name="$EXP_NAME" \
    local_dirs="['$RUNS']" \
    max_length="$MAX_LENGTH" \
    max_prompt_length="$MAX_PROMPT_LENGTH" \
    batch_size="$BATCH_SIZE" \
    gradient_accumulation_steps="$GRADIENT_ACCUMULATION_STEPS" \
    eval_batch_size="$EVAL_BATCH_SIZE" \
    n_epochs="$N_EPOCHS" \
    lr="$LR" \
    trainer="$TRAINER" \
    sample_during_eval=false \
    "$@"
