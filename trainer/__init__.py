"""What a run is made of.

settings.py       every environment variable, and what it may be
recipe.py         defaults that follow from the model and the data
setup.py          a plan of a run, then the run: its device, base, adapters, data and files
resolving.py      what the variables mean for this base and these adapters
loading.py        the model on its base, with its adapters
own_head.py       a base or adapters of PEFT's with a head of their own
estimate.py       the memory that a run needs, before a weight is read
description.py    what the log says of a run before its first step, and of what came of it
optimization.py   learning rate, gradients and the optimizer; muon.py is one of its own
evaluation.py     losses on the validation data
watch.py          losses and gradients that leap
saving.py         checkpoints, adapters and merged models
progress.py       how far a run is, and whether PATIENCE has ended it
resuming.py       the state of an interrupted run: saved, and gone on from
stopping.py       what Ctrl-C and other signals do
log.py            the lines of the log that programs read; log_reader.py reads them
metrics.py        the same figures in metrics.jsonl
start.py          --help, before torch is imported
console.py        the log, errors and exit codes
"""
