"""Language models: what all families share, a file for each family, and their files in and out."""

from models.bigram_lm_v2_lora import FAMILY as GPT2
from models.language_model import Caches, Family, LanguageModel
from models.llama import FAMILY as LLAMA

FAMILIES: dict[str, Family] = {family.name: family for family in (GPT2, LLAMA)}

__all__ = ["FAMILIES", "GPT2", "LLAMA", "Caches", "Family", "LanguageModel"]
