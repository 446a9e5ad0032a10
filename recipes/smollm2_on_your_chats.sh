#!/usr/bin/env bash
# An adapter for SmolLM2 on your own chats, which goes on to PEFT and transformers.
# Start it in the repository's folder, with your chats in chats.jsonl (LORA_USAGE.md, "Your data"), after
#   pip install -r requirements.txt huggingface_hub safetensors tokenizers
#   hf download HuggingFaceTB/SmolLM2-135M-Instruct --local-dir SmolLM2-135M-Instruct
set -euo pipefail
export BASE_CHECKPOINT=SmolLM2-135M-Instruct OUT_DIR=out-chats
export BLOCK_SIZE=512 BATCH_SIZE=4

# See what the model will learn from, and what the run needs, before it starts.
PREVIEW=3 DATA=chats.jsonl USE_LORA=True python training.py
ESTIMATE=True DATA=chats.jsonl USE_LORA=True python training.py

# It takes three passes at most, and ends when two evaluations in a row are no better.
DATA=chats.jsonl USE_LORA=True python training.py

# Without PROMPT, on a terminal, this chats with you.
ADAPTERS=out-chats/lora-best.pt PROMPT="Who are you?" python generate.py
python export.py out-chats/lora-best.pt chats-peft
