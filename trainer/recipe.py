"""What a run trains with where its variables do not say: learning rate, steps, dropout.

The rules are fits to many short runs on built-in corpora, with models of 0.8, 3.3 and 11 million
parameters. `python benchmarks/recipe.py` asks what they answer again.
"""

import dataclasses
import math

from data import Corpus
from trainer.settings import Config

STEPS = 400
PASSES = 3  # over the data, of fine-tuning at most; more of them learn the data by heart
EVALUATIONS = 10
# Evaluations in a row without a better loss after which fine-tuning ends, where it has EVALUATIONS.
PATIENCE = 2

# Passes over a million tokens, or more of them, beyond which a model that begins with random
# weights has dropout. Of less data more passes go by before it is learned by heart.
DROPOUT_PASSES = 5.5
MANY_TOKENS = 1e6


def learning_rate(config: Config, width: int, has_base: bool) -> float:
    """The peak learning rate for a model of this width.

    Fine-tuning needs smaller steps the wider the model is, and the fewer tokens a step has, whose
    gradient is then noisier. A change of a larger rank is larger at the same rate: alpha / rank
    times the product of matrices that have more to add up.
    """
    if not (has_base or config.use_lora):
        return 1e-2 if config.optimizer == "muon" else 3e-3
    rate = (256 / width) ** 0.8 * math.sqrt(min(1.0, config.tokens_per_step / 4096))
    rate *= 2e-3 * math.sqrt(16 / config.lora_rank) if config.use_lora else 1e-3
    return float(f"{rate:.2g}")


def for_data(config: Config, corpus: Corpus, has_base: bool) -> Config:
    """The settings of a run on this corpus: with MAX_STEPS, EVAL_INTERVAL, PATIENCE and DROPOUT."""
    tunes = has_base or config.use_lora
    steps, interval, patience = config.max_steps, config.eval_interval, config.patience
    if steps is None:
        a_step = corpus.passes(config.tokens_per_step)
        steps = min(STEPS, math.ceil(PASSES / a_step)) if tunes else STEPS
    if patience is None:
        patience = PATIENCE if tunes and interval is None else 0
    if interval is None:
        interval = max(1, steps // EVALUATIONS)
    dropout = config.dropout
    if dropout is None:
        dropout = dropout_for(corpus.passes(steps * config.tokens_per_step), 1 / corpus.passes(1))
    return dataclasses.replace(
        config, max_steps=steps, eval_interval=interval, patience=patience, dropout=dropout
    )


def dropout_for(passes: float, tokens: float) -> float:
    """The dropout of a new model for so many passes over so many tokens: 0.1 beyond a number of
    passes, and 0.2 beyond 1.5 times as many."""
    beyond = passes / (DROPOUT_PASSES * max(1.0, MANY_TOKENS / tokens) ** 0.4)
    return 0.2 if beyond > 1.5 else 0.1 if beyond > 1 else 0.0
