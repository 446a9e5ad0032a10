"""The shape of the code: which package may import which, and that the README describes it."""

import ast
import functools
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = ("training", "generate", "compare", "export")
# What each package may import of the project, beside itself. Arrows point downwards only.
MAY_IMPORT = {
    "ops": set(),
    "files": set(),
    "hardware": set(),
    "lora": {"ops", "files"},
    "data": {"files"},
    "models": {"lora", "ops", "files"},
    "trainer": {"models", "data", "hardware", "lora", "files"},
    **{name: {"trainer", "models", "data", "hardware", "lora", "files"} for name in COMMANDS},
}
MODULES = sorted(
    path.relative_to(ROOT)
    for name in MAY_IMPORT
    for path in ([ROOT / f"{name}.py"] if name in COMMANDS else (ROOT / name).glob("*.py"))
)


def test_each_package_says_what_its_files_are_for():
    for path in MODULES:
        if len(path.parts) == 2 and not path.name.startswith("__"):
            package = ast.get_docstring(tree_of(path.parent / "__init__.py"))
            assert re.search(rf"\b{path.name}\b", package), f"{path} is not in its package's list"


def package_of(path: Path) -> str:
    return path.parts[0].removesuffix(".py")


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


@functools.cache
def imported(path: Path) -> set[str]:
    """The modules that a file imports, those inside functions included."""
    found = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports name their package"
            # `from models import llama` imports models.llama as well.
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@functools.cache
def names_in(path: Path) -> set[str]:
    """Every name and attribute that the code of a file uses or imports."""
    found = {name.rpartition(".")[2] for name in imported(path)}
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
    return found


def test_imports_point_downwards():
    wrong = {
        (str(path), package)
        for path in MODULES
        for package in {name.partition(".")[0] for name in imported(path)} & MAY_IMPORT.keys()
        if package not in {package_of(path)} | MAY_IMPORT[package_of(path)]
    }
    assert not wrong


def test_every_module_says_what_it_is_for():
    first_lines = {p: (ast.get_docstring(tree_of(p)) or "").partition("\n")[0] for p in MODULES}
    assert not {path: line for path, line in first_lines.items() if len(line) <= 20}


def test_only_commands_and_hardware_read_the_environment():
    allowed = (*COMMANDS, "hardware")
    readers = [path for path in MODULES if names_in(path) & {"environ", "getenv"}]
    assert not [path for path in readers if package_of(path) not in allowed]


def test_no_code_outside_data_asks_which_corpus_it_has():
    corpora = {"TextCorpus", "RecordCorpus"}
    assert not [p for p in MODULES if package_of(p) != "data" and names_in(p) & corpora]


def test_a_family_is_known_to_its_file_and_the_registry_alone():
    registry = Path("models/__init__.py")
    others = [path for path in MODULES if path != registry]
    families = {f"models.{path.stem}" for path in others if "FAMILY" in names_in(path)}
    assert len(families) > 1
    assert not [path for path in others if imported(path) & families]
    name, own_file = "BigramLanguageModelLoRA", Path("models/bigram_lm_v2_lora.py")
    assert [path for path in MODULES if name in names_in(path)] == [own_file]


def test_the_log_is_read_without_torch():
    seen, new = set(), {"compare"}
    while new:
        seen |= new
        paths = [p for p in MODULES if ".".join(p.with_suffix("").parts) in new]
        new = set().union(*map(imported, paths)) - seen
        assert not {name for name in new if name.partition(".")[0] in ("torch", "numpy")}
    assert "trainer.log_reader" in seen


def test_the_readme_names_every_folder_of_code_and_only_files_that_there_are():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = text.partition("## The code\n")[2].partition("```text\n")[2].partition("```")[0]
    folders = set(re.findall(r"^(\w+)/", block, re.MULTILINE))
    assert folders == {*MAY_IMPORT.keys() - {*COMMANDS}, "benchmarks", "recipes"}
    commands = block.splitlines()[0].partition("     ")[0].split()
    assert commands == [f"{name}.py" for name in COMMANDS]
    for name in re.findall(r"`([\w/]+\.py)`", text.partition("## The code\n")[2]):
        assert any(str(path).endswith(name) for path in MODULES), name


# What a test that needs POSIX has in its code, or in that of a helper or fixture beside it.
POSIX = re.compile(
    r"os\.(mkfifo|fork|geteuid)|SIGKILL|SIGTERM|send_signal\(|resource\.|fcntl|/dev/|/proc|bash|2>&-"
)
# What works without it all the same: on Windows a signal ends a process.
WITHOUT_POSIX = {"test_compare.py": {"outputs"}}


def test_tests_that_need_posix_are_marked():
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
        functions = {f.name: f for f in ast.walk(tree) if isinstance(f, ast.FunctionDef)}
        assert not re.search(r"^import (resource|fcntl|pty|termios)", source, re.M), path.name
        sources = {n: ast.get_source_segment(source, f) for n, f in functions.items()}
        need = {n for n, text in sources.items() if POSIX.search(text) and "hasattr(os" not in text}
        need -= WITHOUT_POSIX.get(path.name, set())
        while more := {
            name
            for name, function in functions.items()
            if name not in need
            and any(isinstance(node, ast.Name) and node.id in need for node in ast.walk(function))
        }:
            need |= more
        for name in need:
            marks = " ".join(ast.unparse(mark) for mark in functions[name].decorator_list)
            marked = not name.startswith("test_") or "needs_" in marks or "skipif" in marks
            assert marked or path.name == "test_architecture.py", f"{path.name}: {name}"
