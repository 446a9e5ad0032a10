#!/usr/bin/env bash
# A base of a billion parameters in 4 bits: its adapter, and the two merged for transformers.
# Start it in the repository's folder, with your chats in chats.jsonl (LORA_USAGE.md, "Your data"), after
#   pip install -r requirements.txt huggingface_hub safetensors tokenizers
#   hf download meta-llama/Llama-3.2-1B-Instruct --local-dir Llama-3.2-1B-Instruct
# Meta asks for its licence to be accepted on that model's page, and for hf auth login.
set -euo pipefail
export BASE_CHECKPOINT=Llama-3.2-1B-Instruct OUT_DIR=out-1b
export BLOCK_SIZE=512 BATCH_SIZE=1 GRAD_ACCUM_STEPS=8 EVAL_BATCHES=100

# Where this is more than the machine has, GRAD_CHECKPOINT=True makes it less.
ESTIMATE=True BASE_DTYPE=nf4 DATA=chats.jsonl USE_LORA=True python training.py
BASE_DTYPE=nf4 DATA=chats.jsonl USE_LORA=True python training.py

# The merged model is the one that was trained: the adapter is added onto the values in 4 bits.
MERGE=True ADAPTERS=out-1b/lora-best.pt python training.py
python export.py out-1b/merged.pt llama-1b-merged
