"""Chat templates: where they are found, what they make, and what they may not do."""

from __future__ import annotations

import json
import re
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from text_models import bundled_model, make_spec, sentence_piece_keys, write_gguf

from loadstone.checkpoint import load_chat_template
from loadstone.checkpoint.template import ChatTemplate
from loadstone.errors import CheckpointError, ConfigurationError, GenerationError

# Written for these tests in the manner of Qwen2.5's: blocks, blanks, tools, namespaces, break.
_QWEN_LIKE = """
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson }}
        {{- "\\n" }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- elif messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}
{%- endif %}
{%- set seen = namespace(user=0) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{% set seen.user = seen.user + 1 %}{% endif %}
    {% if message.tool_calls %}
        {%- for call in message.tool_calls %}
            {{- '<tool_call>' + call.function | tojson(indent=2) + '</tool_call>' }}
        {%- endfor %}
    {% else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content | trim + '<|im_end|>\\n' }}
    {% endif %}
    {%- if loop.index > 5 %}{% break %}{% endif %}
{%- endfor %}
users {{ seen.user }} {{ eos_token }}
{% if add_generation_prompt %}
{% generation %}<|im_start|>assistant
{% endgeneration %}
{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think></think>' }}{% endif %}
{% endif %}"""

_MESSAGES = [
    {"role": "user", "content": " 你好，<b>'世界'</b> & \"引号\"\n"},
    {"role": "assistant", "content": "您好 👋"},
    {"role": "user", "content": "分析一下"},
]
_CALLS = [
    *_MESSAGES,
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "查询", "arguments": {"代码": "600519"}}}],
    },
]
_TOOLS = [{"type": "function", "function": {"name": "查询", "parameters": {"x": "<1>"}}}]


def _one(source: str, **special: str) -> ChatTemplate:
    return ChatTemplate(source, special)


def _say(source: str, **variables: Any) -> str:
    return _one(source).render([{"role": "user", "content": "你好"}], **variables)


@pytest.mark.parametrize("messages", [_MESSAGES, _CALLS, [{"role": "system", "content": "简短"}, *_MESSAGES * 4]])
@pytest.mark.parametrize("variables", [{}, {"tools": _TOOLS}, {"enable_thinking": False}])
@pytest.mark.parametrize("opens", [True, False])
def test_rendering_is_that_of_transformers(
    messages: list[dict[str, Any]], variables: dict[str, Any], opens: bool
) -> None:
    """The same template and conversation make the same text as `apply_chat_template`."""
    transformers = pytest.importorskip("transformers")
    from text_models import train_byte_level

    peer = transformers.PreTrainedTokenizerFast(tokenizer_object=train_byte_level(), eos_token="<|im_end|>")
    expected = peer.apply_chat_template(
        messages, chat_template=_QWEN_LIKE, tokenize=False, add_generation_prompt=opens, **variables
    )
    template = _one(_QWEN_LIKE, eos_token="<|im_end|>")
    assert template.render(messages, add_generation_prompt=opens, **variables) == expected


def test_chinese_is_not_escaped() -> None:
    """tojson writes characters as they are, for models and not for HTML."""
    assert _say("{{ {'a': '<你>'} | tojson }}") == '{"a": "<你>"}'


def test_template_knows_the_date() -> None:
    """strftime_now is there for templates that state today's date."""
    assert _say("{{ strftime_now('%Y') }}") in {str(datetime.now().year), str(datetime.now().year - 1)}


def test_messages_are_not_changed_by_rendering() -> None:
    """A template cannot edit the caller's conversation."""
    with pytest.raises(GenerationError):
        _say("{{ messages.append(1) }}")


# where templates come from


def test_sources_are_asked_in_order(tmp_path: Path) -> None:
    """chat_template.jinja comes before tokenizer_config.json, and that before chat_template.json."""
    spec = make_spec(tmp_path)
    assert load_chat_template(spec) is None
    places = [
        ("chat_template.json", json.dumps({"chat_template": "third"})),
        ("tokenizer_config.json", json.dumps({"chat_template": "second", "eos_token": "</s>"})),
        ("chat_template.jinja", "first 你好"),
    ]
    for (name, content), expected in zip(places, ["third", "second", "first 你好"], strict=True):
        (tmp_path / name).write_text(content, encoding="utf-8")
        template = load_chat_template(spec)
        assert template is not None
        assert (template.source, template.origin) == (expected, name)
    assert template.special_tokens == {"eos_token": "</s>"}


def test_named_templates_give_the_default_one(tmp_path: Path) -> None:
    """A list of named templates holds the one for conversations as "default"."""
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    template = load_chat_template(make_spec(tmp_path))
    assert template is not None
    assert template.source == "D"


def test_special_tokens_reach_the_template(tmp_path: Path) -> None:
    """bos_token and eos_token are those of tokenizer_config.json, however it writes them."""
    said = {
        "chat_template": "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}{{ unk_token }}",
        "bos_token": {"content": "<s>"},
        "eos_token": "</s>",
        "unk_token": None,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
    template = load_chat_template(make_spec(tmp_path))
    assert template is not None
    assert template.render([{"role": "user", "content": "hi"}]) == "<s>hi</s>"


def test_gguf_template_and_special_tokens_come_from_metadata(tmp_path: Path) -> None:
    """tokenizer.chat_template with the tokens that the ids name."""
    keys = sentence_piece_keys() | {"chat_template": "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"}
    template = load_chat_template(make_spec(write_gguf(tmp_path / "a.gguf", keys)))
    assert template is not None
    assert template.render([{"role": "user", "content": "你好"}]) == "<s>你好</s>"
    assert load_chat_template(make_spec(write_gguf(tmp_path / "b.gguf", sentence_piece_keys()))) is None


def test_bundled_template_makes_turns() -> None:
    """The bundled model's own template frames a question and opens the answer."""
    file = bundled_model()
    if file is None:
        pytest.skip("the bundled model is not installed")
    template = load_chat_template(make_spec(file, gguf_name="llama"))
    assert template is not None
    text = template.render([{"role": "user", "content": "Hi"}])
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json", "chat_template.json"])
def test_unreadable_source_is_a_checkpoint_error(tmp_path: Path, name: str) -> None:
    """A file that is not UTF-8 is named."""
    (tmp_path / name).write_bytes(b"\xff\xfe{")
    with pytest.raises(CheckpointError, match=re.escape(name)):
        load_chat_template(make_spec(tmp_path))


# what goes wrong


def test_refusal_shows_the_templates_own_words() -> None:
    """raise_exception's message reaches the user."""
    with pytest.raises(GenerationError, match=r"refuses.*roles must alternate 你") as caught:
        _say("{{ raise_exception('roles must alternate 你') }}")
    assert caught.value.__cause__ is not None


def test_syntax_error_says_its_line() -> None:
    """A broken template is a GenerationError that says where."""
    with pytest.raises(GenerationError, match="line 2"):
        _say("x\n{% if %}")


@pytest.mark.parametrize("source", ["{{ 1 + 'a' }}", "{{ 1 / 0 }}", "{{ none.a.b }}", "{{ nothing() }}"])
def test_failures_inside_a_template_are_generation_errors(source: str) -> None:
    """Whatever Python error a template causes, it comes out as GenerationError with its cause."""
    with pytest.raises(GenerationError) as caught:
        _say(source)
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''['__class__'] }}",
        "{{ '' | attr('__class__') }}",
        "{{ messages | map(attribute='__class__') | list }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__globals__['json'] }}",
        "{{ range.__closure__ }}",
        "{{ dict.__init__ }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{% set f = '{0.__class__.__mro__}'.format %}{{ f(1) }}",
        "{{ self.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ lipsum.__globals__ }}",
        "{% set n = namespace() %}{% set n.__class__ = 1 %}",
        "{% set n = namespace(__class__=1) %}",
        "{% include '/etc/hostname' %}",
        "{% import 'os' as os %}",
    ],
)
def test_sandbox_lets_nothing_out(source: str) -> None:
    """Python's machinery cannot be reached from a template."""
    with pytest.raises(GenerationError):
        _say(source)


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(10**9) %}{% endfor %}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(10**30) %}{% endfor %}",
        "{{ 'a' * 10**9 }}",
        "{{ 10**9 * ['a'] }}",
        "{{ 10 ** 1000000000 }}",
        "{% for a in range(99999) %}{{ 'a' * 10000 }}{% endfor %}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    ],
)
def test_excess_is_stopped(source: str) -> None:
    """Counting, repeating, writing and recursing without end are refused before they hurt."""
    with pytest.raises(GenerationError):
        _say(source)


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ("你好", "list"),
        ([], "one or more"),
        (["你好"], "Message 0 is a str"),
        ([{"content": "x"}], "no role"),
        ([{"role": "user"}], "no content"),
        ([{"role": "user", "content": "x"}, {"role": "user", "content": 3}], "Message 1.*int"),
        ([{"role": "user", "content": ["x"]}], "list"),
    ],
)
def test_messages_of_another_shape_are_refused(messages: Any, said: str) -> None:
    """The error says which message is wrong and how."""
    with pytest.raises(ConfigurationError, match=said):
        _one("{{ messages }}").render(messages)
