#!/usr/bin/env bash
# Training in two processes, each with a GPU of its own, or on a CPU with half of the cores.
# Start it in the repository's folder. BATCH_SIZE is that of both together.
set -euo pipefail
export OUT_DIR=out-two BATCH_SIZE=64

torchrun --standalone --nproc_per_node=2 training.py

# A base that is too large for one GPU lies in shares on both; the adapter is the same.
FSDP=True DATA=python-docs USE_LORA=True torchrun --standalone --nproc_per_node=2 training.py

# After Ctrl-C, a crash or a power cut the same command goes on with RESUME=True.
RESUME=True FSDP=True DATA=python-docs USE_LORA=True torchrun --standalone --nproc_per_node=2 training.py
