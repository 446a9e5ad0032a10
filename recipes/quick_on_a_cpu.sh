#!/usr/bin/env bash
# From nothing to two models on a CPU: a base on Python's sources, an adapter on Python's reference.
# Start it in the repository's folder. The README's first table says how long the trainings take.
set -euo pipefail

python training.py > output_full.txt
DATA=python-docs USE_LORA=True python training.py > output_lora.txt
python compare.py output_full.txt output_lora.txt

PROMPT="The " python generate.py
PROMPT="The " ADAPTERS=out/lora.pt python generate.py
