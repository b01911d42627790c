#!/usr/bin/env bash
# Step 1 of AmberSafe: supervised fine-tuning of AmberChat on the safe answers of PKU-SafeRLHF.
#
#   bash sft.sh                                     AmberSafe's settings: a 7B model, several GPUs
#   MODEL=my/folder TRAINER=BasicTrainer bash sft.sh n_examples=100 wandb.enabled=false
#
# Every variable below can be set in the environment; extra arguments are added to the command, and take precedence.
set -euo pipefail

PYTHON=${PYTHON:-python}
TRAIN_SCRIPT_PATH=${TRAIN_SCRIPT_PATH:-"$(dirname "${BASH_SOURCE[0]}")/train.py"}
MODEL=${MODEL:-LLM360/AmberChat}       # a hub name, a folder, or a .gguf file
DATASETS=${DATASETS:-saferlhf}         # one or more, separated by commas
EXP_NAME=${EXP_NAME:-ambersafe_sft}
RUNS=${RUNS:-.cache}                   # run directories are created in $RUNS/<user>/, where dpo.sh looks
BATCH_SIZE=${BATCH_SIZE:-64}           # examples per optimizer step, over all GPUs
GRADIENT_ACCUMULATION_STEPS=${GRADIENT_ACCUMULATION_STEPS:-2}
EVAL_BATCH_SIZE=${EVAL_BATCH_SIZE:-32}
LR=${LR:-2e-7}
N_EPOCHS=${N_EPOCHS:-3}
MAX_LENGTH=${MAX_LENGTH:-512}          # tokens of prompt + answer
MAX_PROMPT_LENGTH=${MAX_PROMPT_LENGTH:-256}
TRAINER=${TRAINER:-FSDPTrainer}        # one process per GPU; BasicTrainer: one process

# The inner quotes are Hydra's: they let a path hold spaces, commas and equals signs.
# The block class (LlamaDecoderLayer for AmberChat) is declared by the model, so it need not be given.
exec "$PYTHON" -u "$TRAIN_SCRIPT_PATH" \
    model=blank_model \
    model.name_or_path="'$MODEL'" \
    datasets="[$DATASETS]" \
    loss=sft \
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
