"""Language models: families of them, and their files in and out.

language_model.py       what all families share
bigram_lm_v2_lora.py    GPT-2's kind
llama.py                Llama, Mistral, Qwen, SmolLM
checkpoint.py           our checkpoint files
huggingface.py          Hugging Face's folders
byte_tokenizer.py       the tokenizer of a model of bytes, for other programs
"""

from models.bigram_lm_v2_lora import FAMILY as GPT2
from models.language_model import Caches, Family, LanguageModel
from models.llama import FAMILY as LLAMA

FAMILIES: dict[str, Family] = {family.name: family for family in (GPT2, LLAMA)}

__all__ = ["FAMILIES", "GPT2", "LLAMA", "Caches", "Family", "LanguageModel"]
