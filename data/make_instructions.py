"""Make data/python-instructions: questions about Python, answered from its own documentation.

    python data/make_instructions.py

Questions are put in several ways to what the docstrings of built-in and standard modules answer.
The files in the repository were made with Python 3.11.
"""

import builtins
import importlib
import inspect
import json
import random
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "python-instructions"
MODULES = (
    "bisect", "collections", "copy", "csv", "datetime", "decimal", "fractions", "functools", "glob",
    "hashlib", "heapq", "itertools", "json", "math", "operator", "os", "os.path", "pathlib",
    "random", "re", "shutil", "statistics", "string", "struct", "tempfile", "textwrap", "time",
    "urllib.parse", "uuid", "zlib",
)  # fmt: skip
TYPES = (str, bytes, list, dict, set, tuple, int, float)
QUESTIONS = ("What does {} do?", "Explain {} in Python.", "What is {} for?", "Describe {}.")
LONGEST = 90  # characters of an answer, so that most fit into the default context


def main() -> None:
    """Write train.jsonl and valid.jsonl, every tenth record."""
    answers = documented()
    shuffled = sorted(answers)
    choose = random.Random(1337)
    choose.shuffle(shuffled)
    lines = []
    for name in shuffled:
        question = choose.choice(QUESTIONS).format(name)
        lines.append(json.dumps({"prompt": question, "completion": answers[name]}) + "\n")
    FOLDER.mkdir(exist_ok=True)
    valid = lines[9::10]
    (FOLDER / "valid.jsonl").write_text("".join(valid))
    (FOLDER / "train.jsonl").write_text("".join(line for line in lines if line not in valid))


def documented() -> dict[str, str]:
    """The first paragraph of each docstring, by the name of what it documents."""
    found = {}
    for name, thing in vars(builtins).items():
        if not name.startswith("_"):
            found[name] = thing
    for kind in TYPES:
        found |= {f"{kind.__name__}.{n}": v for n, v in vars(kind).items() if not n.startswith("_")}
    for name in MODULES:
        module = importlib.import_module(name)
        public = getattr(module, "__all__", None) or [n for n in vars(module) if n[0] != "_"]
        found |= {
            f"{name}.{n}": getattr(module, n)
            for n in public
            if inspect.isroutine(getattr(module, n)) or inspect.isclass(getattr(module, n))
        }
    answers: dict[str, str] = {}
    for name, thing in sorted(found.items()):
        answer = first_paragraph(inspect.getdoc(thing) or "")
        if answer and answer not in answers.values():
            answers[name] = answer
    return answers


def first_paragraph(text: str) -> str:
    """The first paragraph that is a sentence; nothing when it is long, or not ASCII."""
    for paragraph in text.split("\n\n"):
        sentence = " ".join(paragraph.split())
        if sentence and sentence[0].isupper() and sentence.endswith("."):
            return sentence if len(sentence) <= LONGEST and sentence.isascii() else ""
    return ""


if __name__ == "__main__":
    main()
