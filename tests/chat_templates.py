"""Chat templates that write what those of published models write, and the tokens that they need.

Each is written anew, without what no record asks for, such as Llama 3.1's built-in tools.
"""

from dataclasses import dataclass

# Llama 3.1 and 3.2, which differ in the day that they show where none is given.
LLAMA = r"""
{%- macro turn(role, text) -%}
    {{ '<|start_header_id|>' ~ role ~ '<|end_header_id|>\n\n' ~ text ~ '<|eot_id|>' }}
{%- endmacro -%}
{%- set told, rest = '', messages -%}
{%- if messages[0].role == 'system' -%}
    {%- set told, rest = messages[0].content | trim, messages[1:] -%}
{%- endif -%}
{%- set day = date_string if date_string is defined else TODAY -%}
{{ bos_token -}}
{{ turn('system', ('Environment: ipython\n' if tools else '')
        ~ 'Cutting Knowledge Date: December 2023\nToday Date: ' ~ day ~ '\n\n' ~ told) }}
{%- if tools -%}
    {%- if not rest -%}
        {{ raise_exception('tools need a question to stand in') }}
    {%- endif -%}
    {%- set functions -%}
        {%- for tool in tools %}{{ (tool | tojson(indent=4)) ~ '\n\n' }}{% endfor -%}
    {%- endset -%}
    {{ turn('user', 'Given the following functions, please respond with a JSON for a function call '
            ~ 'with its proper arguments that best answers the given prompt.\n\n'
            ~ 'Respond in the format {"name": function name, "parameters": dictionary of argument '
            ~ 'name and its value}.Do not use variables.\n\n'
            ~ functions ~ rest[0].content | trim) }}
    {%- set rest = rest[1:] -%}
{%- endif -%}
{%- for message in rest -%}
    {%- if message.tool_calls is defined -%}
        {%- if message.tool_calls | length > 1 -%}
            {{ raise_exception('This model only supports single tool-calls at once!') }}
        {%- endif -%}
        {%- set call = message.tool_calls[0].function -%}
        {{ turn('assistant', '{"name": "' ~ call.name ~ '", "parameters": '
                ~ (call.arguments | tojson) ~ '}') }}
    {%- elif message.role in ('tool', 'ipython') -%}
        {{ turn('ipython', message.content | tojson) }}
    {%- else -%}
        {{ turn(message.role, message.content | trim) }}
    {%- endif -%}
{%- endfor -%}
{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' if add_generation_prompt }}"""

# What Qwen2.5, Qwen3 and Qwen3-2507 say of tools; and their tools' answers, several in one turn.
QWEN_TOOLS = r"""
{%- macro offer(tools) -%}
    {{ '# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are '
       ~ 'provided with function signatures within <tools></tools> XML tags:\n<tools>' }}
    {%- for tool in tools %}{{ '\n' ~ (tool | tojson) }}{% endfor -%}
    {{ '\n</tools>\n\nFor each function call, return a json object with function name and arguments'
       ~ ' within <tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, '
       ~ '"arguments": <args-json-object>}\n</tool_call>' }}
{%- endmacro -%}
{%- macro answered(i) -%}
    {{ '<|im_start|>user' if i == 0 or messages[i - 1].role != 'tool' }}
    {{- '\n<tool_response>\n' ~ messages[i].content ~ '\n</tool_response>' }}
    {{- '<|im_end|>\n' if i + 1 == messages | length or messages[i + 1].role != 'tool' }}
{%- endmacro -%}
{%- macro turn(role, text) -%}
    {{ '<|im_start|>' ~ role ~ '\n' ~ text ~ '<|im_end|>\n' }}
{%- endmacro -%}
"""

QWEN2 = (
    QWEN_TOOLS
    + r"""
{%- set told = messages[0].content if messages[0].role == 'system' else
               'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.' -%}
{{ turn('system', told ~ ('\n\n' ~ offer(tools) if tools else '')) }}
{%- for message in messages -%}
    {%- if message.tool_calls and message.role == 'assistant' -%}
        {%- set calls -%}
            {%- for call in message.tool_calls -%}
                {%- set call = call.function if call.function is defined else call -%}
                {{ '\n<tool_call>\n{"name": "' ~ call.name ~ '", "arguments": '
                   ~ (call.arguments | tojson) ~ '}\n</tool_call>' }}
            {%- endfor -%}
        {%- endset -%}
        {{ '<|im_start|>assistant' ~ ('\n' ~ message.content if message.content else '')
           ~ calls ~ '<|im_end|>\n' }}
    {%- elif message.role == 'tool' -%}
        {{ answered(loop.index0) }}
    {%- elif message.role != 'system' or not loop.first -%}
        {{ turn(message.role, message.content) }}
    {%- endif -%}
{%- endfor -%}
{{ '<|im_start|>assistant\n' if add_generation_prompt }}"""
)

# Qwen3: REASONS says whether it writes what a model thinks, after the last question alone.
QWEN3 = (
    QWEN_TOOLS
    + r"""
{%- set told = messages[0].content if messages[0].role == 'system' else '' -%}
{%- if tools -%}
    {{ turn('system', (told ~ '\n\n' if messages[0].role == 'system' else '') ~ offer(tools)) }}
{%- elif messages[0].role == 'system' -%}
    {{ turn('system', told) }}
{%- endif -%}
{%- set last = namespace(question=messages | length - 1) -%}
{%- for message in messages -%}
    {%- if message.role == 'user' and not (message.content.startswith('<tool_response>')
                                           and message.content.endswith('</tool_response>')) -%}
        {%- set last.question = loop.index0 -%}
    {%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
    {%- if message.role == 'assistant' -%}
        {%- set said, thought = message.content or '', '' -%}
        {%- if REASONS and message.reasoning_content is string -%}
            {%- set thought = message.reasoning_content -%}
        {%- elif REASONS and '</think>' in said -%}
            {%- set parts = said.split('</think>') -%}
            {%- set thought = parts[0].rstrip('\n').split('<think>')[-1].lstrip('\n') -%}
            {%- set said = parts[-1].lstrip('\n') -%}
        {%- endif -%}
        {{ '<|im_start|>assistant\n' -}}
        {%- if REASONS and loop.index0 > last.question and (loop.last or thought) -%}
            {{ '<think>\n' ~ thought.strip('\n') ~ '\n</think>\n\n' ~ said.lstrip('\n') }}
        {%- else -%}
            {{ said }}
        {%- endif -%}
        {%- for call in message.tool_calls or [] -%}
            {%- set shown = call.function or call -%}
            {{ ('\n' if said or not loop.first else '') ~ '<tool_call>\n{"name": "' ~ shown.name
               ~ '", "arguments": ' -}}
            {{ shown.arguments if shown.arguments is string else shown.arguments | tojson -}}
            {{ '}\n</tool_call>' }}
        {%- endfor -%}
        {{ '<|im_end|>\n' }}
    {%- elif message.role == 'tool' -%}
        {{ answered(loop.index0) }}
    {%- elif message.role == 'user' or not loop.first -%}
        {{ turn(message.role, message.content) }}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<|im_start|>assistant\n' }}
    {{- '<think>\n\n</think>\n\n' if REASONS and enable_thinking is false }}
{%- endif -%}"""
)

# Mistral's first one, without tools and system.
MISTRAL_1 = r"""{{ bos_token }}
{%- for message in messages -%}
    {%- if message.role != ('assistant' if loop.index0 % 2 else 'user') -%}
        {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif -%}
    {{ '[INST] ' + message.content + ' [/INST]' if message.role == 'user'
       else message.content + eos_token }}
{%- endfor -%}"""

# Mistral 7B v0.3 and Nemo: SPACE stands behind a mark, and before an answer. The system's words
# stand in the last question while it has no answer, and tools before the last question.
MISTRAL_3 = r"""
{%- set told, rest = none, messages -%}
{%- if messages[0].role == 'system' -%}
    {%- set told, rest = messages[0].content, messages[1:] -%}
{%- endif -%}
{%- set questions = rest | selectattr('role', 'equalto', 'user') | list -%}
{%- macro check_id(id) -%}
    {%- if id is not defined or id | length != 9 -%}
        {{ raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}
    {%- endif -%}
{%- endmacro -%}
{%- set spoken = namespace(n=0) -%}
{%- for message in rest if message.role not in ('tool', 'tool_results') -%}
    {%- if message.tool_calls is not defined or message.tool_calls is none -%}
        {%- if (message.role == 'user') != (spoken.n % 2 == 0) -%}
            {{ raise_exception('After the optional system message, conversation roles must '
                               ~ 'alternate user/assistant/user/assistant/...') }}
        {%- endif -%}
        {%- set spoken.n = spoken.n + 1 -%}
    {%- endif -%}
{%- endfor -%}
{{ bos_token -}}
{%- for message in rest -%}
    {%- if message.role == 'user' -%}
        {%- if tools and message == questions[-1] -%}
            {%- set offered -%}
                {%- for tool in tools -%}
                    {%- set parts -%}
                        {%- for key, value in tool.function.items() if key != 'return' -%}
                            {{ '"' ~ key ~ '": ' -}}
                            {{ '"' ~ value ~ '"' if value is string else value | tojson -}}
                            {{ ', ' if not loop.last }}
                        {%- endfor -%}
                    {%- endset -%}
                    {{ '{"type": "function", "function": {' ~ parts ~ '}}' -}}
                    {{ ', ' if not loop.last }}
                {%- endfor -%}
            {%- endset -%}
            {{ '[AVAILABLE_TOOLS]' ~ SPACE ~ '[' ~ offered ~ '][/AVAILABLE_TOOLS]' }}
        {%- endif -%}
        {{ '[INST]' ~ SPACE ~ (told ~ '\n\n' if loop.last and told is not none else '')
           ~ message.content ~ '[/INST]' }}
    {%- elif message.tool_calls -%}
        {{ '[TOOL_CALLS]' ~ SPACE ~ '[' -}}
        {%- for call in message.tool_calls -%}
            {{ check_id(call.id) ~ (call.function | tojson)[:-1] ~ ', "id": "' ~ call.id ~ '"}'
               ~ (']' ~ eos_token if loop.last else ', ') }}
        {%- endfor -%}
    {%- elif message.role == 'assistant' -%}
        {{ SPACE ~ (message.content | trim if SPACE else message.content) ~ eos_token }}
    {%- elif message.role in ('tool', 'tool_results') -%}
        {{ '[TOOL_RESULTS]' ~ SPACE ~ '{"content": ' ~ message.content ~ ', ' -}}
        {{ check_id(message.tool_call_id) ~ '"call_id": "' ~ message.tool_call_id
           ~ '"}[/TOOL_RESULTS]' }}
    {%- endif -%}
{%- endfor -%}"""

SMOLLM = r"""
{%- macro turn(role, text) -%}{{ '<|im_start|>' + role + '\n' + text + '<|im_end|>\n' }}{%- endmacro -%}
{%- if messages and messages[0].role != 'system' -%}
    {{ turn('system', 'You are a helpful AI assistant named SmolLM, trained by Hugging Face') }}
{%- endif -%}
{%- for message in messages %}{{ turn(message.role, message.content) }}{% endfor -%}
{{ '<|im_start|>assistant\n' if add_generation_prompt }}"""  # noqa: E501

GEMMA = r"""{{ bos_token }}
{%- if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif -%}
{%- for message in messages -%}
    {%- if (message.role == 'user') == (loop.index0 % 2 == 1) -%}
        {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif -%}
    {%- set role = 'model' if message.role == 'assistant' else message.role -%}
    {{ '<start_of_turn>' + role + '\n' + message.content | trim + '<end_of_turn>\n' }}
{%- endfor -%}
{{ '<start_of_turn>model\n' if add_generation_prompt }}"""

# Phi-3.5; Phi-3 writes an empty system turn too.
PHI = r"""
{%- for message in messages if message.role in ('system', 'user', 'assistant') -%}
    {%- if message.role != 'system' or message.content -%}
        {{ '<|' + message.role + '|>\n' + message.content + '<|end|>\n' }}
    {%- endif -%}
{%- endfor -%}
{{ '<|assistant|>\n' if add_generation_prompt else eos_token }}"""


@dataclass(frozen=True)
class Published:
    """A published model's template, and what its tokenizer has for it.

    Attributes:
        template: Jinja's source.
        bos, eos: as tokenizer_config.json has them.
        special: further special tokens.
        added: added tokens that are not special.
        ends: the ends of texts and turns, the first of them ends texts.
        opening: what stands before an answer's content and is the assistant's.
        system, tools: whether it can have them.
        per_turn: whether each of the assistant's turns is an example of its own.
    """

    template: str
    bos: str | None
    eos: str
    special: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()
    opening: str = ""
    system: bool = True
    tools: bool = False
    per_turn: bool = False

    @property
    def mark(self) -> str:
        """What ends a turn."""
        return self.ends[-1]


HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>")
IM = ("<|im_start|>", "<|endoftext|>")
CALLS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
THINK = ("<think>", "</think>")
INST = (
    "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]",
    "[TOOL_RESULTS]", "[/TOOL_RESULTS]",
)  # fmt: skip
PHI_MARKS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")


def _llama(today: str) -> Published:
    template = LLAMA.replace("TODAY", today)
    return Published(
        template, "<|begin_of_text|>", "<|eot_id|>", HEADERS, ends=("<|eot_id|>",), tools=True
    )


def _qwen(template: str, **options: object) -> Published:
    options = {"added": CALLS, "ends": ("<|im_end|>",), "tools": True} | options
    return Published(template, None, "<|im_end|>", IM, **options)


def _mistral(template: str, **options: object) -> Published:
    return Published(template, "<s>", "</s>", INST, ends=("</s>",), **options)


PUBLISHED = {
    "llama-3.1": _llama("'26 Jul 2024'"),
    "llama-3.2": _llama("strftime_now('%d %b %Y')"),
    "qwen2.5": _qwen(QWEN2),
    "qwen3": _qwen(
        QWEN3.replace("REASONS", "true"),
        added=CALLS + THINK,
        opening="<think>\n\n</think>\n\n",
        per_turn=True,
    ),
    "qwen3-2507": _qwen(QWEN3.replace("REASONS", "false"), added=CALLS + THINK),
    "mistral-7b": _mistral(MISTRAL_1, system=False),
    "mistral-7b-v0.3": _mistral(MISTRAL_3.replace("SPACE", "' '"), system=False, tools=True),
    "mistral-nemo": _mistral(MISTRAL_3.replace("SPACE", "''"), system=False, tools=True),
    "smollm2": Published(SMOLLM, "<|im_start|>", "<|im_end|>", IM, ends=("<|im_end|>",)),
    "gemma-2": Published(
        GEMMA,
        "<bos>",
        "<eos>",
        ("<start_of_turn>", "<end_of_turn>"),
        ends=("<eos>", "<end_of_turn>"),
        system=False,
    ),
    "phi-3.5": Published(
        PHI, "<s>", "<|endoftext|>", PHI_MARKS, ends=("<|endoftext|>", "<|end|>"), per_turn=True
    ),
}
