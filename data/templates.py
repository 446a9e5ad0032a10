"""Chat templates: where a base has one, what it may do while it is rendered, and what no content
may make of it."""

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from data.tokenizer import json_file

TEMPLATE_FILE = "chat_template.jinja"  # in a folder of Hugging Face's

# Some templates print the day. A fixed one, Llama 3's own default, makes every run's data the same.
TODAY = datetime(2024, 7, 26)

# Put into a special token's text that a content has, so that the tokenizer leaves it a text. It is
# no character: Unicode sets it aside for use within a program.
BREAK = "\ufdd0"

# How often a template's loops and macros may turn for one chat, before it is taken for endless.
MOST_STEPS = 200_000


def template_in(files: Mapping[str, bytes]) -> str | None:
    """The chat template among the files beside a base's weights, if there is one.

    chat_template.jinja decides where tokenizer_config.json has one too. Of several the one named
    default is taken.
    """
    if TEMPLATE_FILE in files:
        return files[TEMPLATE_FILE].decode("utf-8", "replace")
    found = json_file(files, "tokenizer_config.json").get("chat_template")
    if isinstance(found, list):
        named = [t for t in found if isinstance(t, dict)]
        found = next((t.get("template") for t in named if t.get("name") == "default"), None)
    return found if isinstance(found, str) else None


@functools.lru_cache(maxsize=4)
def compile_template(source: str) -> Callable[..., str]:
    """The function that renders a chat template's source with the variables that it is given.

    It runs in Jinja's sandbox, with what chat templates use. It raises whatever the template does,
    and ValueError where its loops and macros take more than MOST_STEPS. Raises ValueError for a
    source that is no template.
    """
    import jinja2
    import jinja2.ext
    import jinja2.sandbox
    from jinja2 import nodes

    steps = 0

    class Generation(jinja2.ext.Extension):
        """{% generation %}, which marks what the assistant says, and writes what is in it."""

        tags = frozenset({"generation"})

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

        def step(self) -> bool:
            nonlocal steps
            steps += 1
            if steps > MOST_STEPS:
                raise ValueError(f"it does not end within {MOST_STEPS:,} steps")
            return True

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(
        value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any
    ) -> str:
        text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)
        return text.replace(json.dumps(BREAK)[1:-1], BREAK)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols],
        optimized=False,  # or what could be constants is computed, and written out, beforehand
    )  # fmt: skip
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = TODAY.strftime
    step = environment.extensions[Generation.identifier].call_method("step")
    try:
        parsed = environment.parse(source)
        for node in parsed.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
            node.body.insert(0, nodes.ExprStmt(step))
            if getattr(node, "test", None) is not None:
                node.test = nodes.And(step, node.test)
        compiled = environment.compile(parsed)
        template = jinja2.Template.from_code(environment, compiled, environment.globals)
    # Python refuses what is nested too deeply.
    except (jinja2.TemplateError, SyntaxError, RecursionError) as error:
        raise ValueError(f"it is no template: {error}") from error

    def render(**names: Any) -> str:
        nonlocal steps
        steps = 0
        return template.render(**names)

    return render


def guard(value: Any, pattern: re.Pattern | None) -> Any:
    """`value` with a BREAK after the first character of each text that `pattern` finds in it."""
    if isinstance(value, str):
        if BREAK in value:
            raise ValueError("it has U+FDD0, which stands for no character")
        if pattern is None:
            return value
        return pattern.sub(lambda found: found[0][0] + BREAK + found[0][1:], value)
    if isinstance(value, Mapping):
        return {guard(key, pattern): guard(item, pattern) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [guard(item, pattern) for item in value]
    return value


def any_of(texts: Sequence[str]) -> re.Pattern | None:
    """What finds each of the texts, the longest first; None for none. One character is no mark."""
    texts = sorted((text for text in texts if len(text) > 1), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, texts))) if texts else None


def with_reasoning(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message, with its reasoning under the two names that templates read."""
    names = ("reasoning_content", "reasoning", "thinking")
    reasoning = next((message[n] for n in names if message.get(n) is not None), None)
    if reasoning is None:
        return dict(message)
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}
