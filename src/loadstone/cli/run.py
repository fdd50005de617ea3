"""`loadstone run`: one prompt, one answer."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from loadstone.units import format_size

from .loading import Ready, facts, loaded
from .options import configuration, constraint_options, generation_options, load_options, verbose_option
from .output import clean, rows, say_quietly, say_warning, write, write_json
from .progress import chunks_of

if TYPE_CHECKING:
    from loadstone.engine import GenerationResult


@click.command(short_help="Answer one prompt.")
@click.argument("model")
@click.argument("prompt", required=False)
@click.option("--system", metavar="TEXT", help="What the model is told before the prompt.")
@click.option("--raw", is_flag=True, help="Send the prompt as it is, without the model's chat template.")
@generation_options
@constraint_options
@load_options
@click.option("--json", "as_json", is_flag=True, help="Write one JSON object instead of the text and the table.")
@verbose_option
def run(model: str, prompt: str | None, system: str | None, raw: bool, as_json: bool, **said: Any) -> None:
    """Load MODEL and answer PROMPT; without one, read it from standard input.

    MODEL is a folder, a .safetensors or .gguf file, a Hub id (org/name or org/name@revision), a name of another source
    (modelscope:org/name, https://host/folder/, s3://bucket/folder), or smollm2. The answer goes to standard output as
    it is made, a short table of what it took to standard error.
    """
    if raw and system is not None:
        raise click.UsageError("--raw sends the prompt as it is, so --system has no place in it.")
    wish = configuration(model, said)
    text = read_prompt(prompt)
    with loaded(wish) as ready:
        _mention_template(ready, raw=raw, system=system)
        result = _answer(ready, text, raw=raw, system=clean(system) if system else None, is_shown=not as_json)
        if as_json:
            write_json(_as_json(ready, result))
        else:
            sys.stderr.write("\n")
            rows(sys.stderr, [*facts(ready), *_costs(ready, result)])


def read_prompt(given: str | None) -> str:
    """Return the prompt from the command line, or all of standard input without its last line break."""
    if given is not None:
        text = clean(given)
    elif sys.stdin is None:
        raise click.UsageError("There is no PROMPT, and no standard input to read it from.")
    else:
        if sys.stdin.isatty():
            say_quietly("Write the prompt, then press Ctrl-D on a line of its own.")
        text = sys.stdin.buffer.read().decode("utf-8", "replace").removesuffix("\n").removesuffix("\r")
    if not text.strip():
        raise click.UsageError("The prompt is empty.")
    return text


def _mention_template(ready: Ready, *, raw: bool, system: str | None) -> None:
    if raw or ready.model.engine.template is not None:
        return
    what = "the system text and the prompt are sent as they are" if system else "the prompt is sent as it is"
    say_warning(f"{ready.model.spec.name} has no chat template: {what}")


def _answer(ready: Ready, text: str, *, raw: bool, system: str | None, is_shown: bool) -> GenerationResult:
    """Return the answer, written to standard output piece by piece when `is_shown`."""
    last = "\n"
    try:
        with ready.model.stream(text, raw=raw, system=system) as stream:
            for chunk in chunks_of(stream):
                if is_shown and chunk.text:
                    write(chunk.text)
                    last = chunk.text
            result = stream.result
    finally:
        if is_shown and not last.endswith("\n"):
            write("\n")
    return result


def _costs(ready: Ready, result: GenerationResult) -> list[tuple[str, str]]:
    """Return what an answer took, for people."""
    from loadstone.hardware import peak_rss

    usage, timing = result.usage, result.timing
    ended = ""
    if result.finish_reason == "length":
        is_full = usage.total_tokens >= ready.model.plan.context
        ended = ", the context is full: --context" if is_full else ", cut there: --max-new-tokens"
        ended += " allows more"
    return [
        ("first token", f"{timing.first_token_s:.2f} s, after a prompt of {usage.prompt_tokens} tokens"),
        ("speed", f"{timing.tokens_per_s:.1f} tok/s, {usage.completion_tokens} tokens{ended}"),
        ("peak", f"{format_size(peak_rss())} resident"),
    ]


def _as_json(ready: Ready, result: GenerationResult) -> dict[str, Any]:
    """Return an answer and what it took; bytes and seconds."""
    from loadstone.hardware import peak_rss

    plan = ready.model.plan
    return {
        "text": result.text,
        "parsed": result.parsed,
        "model": ready.model.spec.name,
        "device": plan.device.torch_name,
        "strategy": plan.strategy,
        "finish_reason": result.finish_reason,
        "usage": {
            "prompt_tokens": result.usage.prompt_tokens,
            "completion_tokens": result.usage.completion_tokens,
            "cached_tokens": result.usage.cached_tokens,
            "drafted_tokens": result.usage.drafted_tokens,
            "accepted_tokens": result.usage.accepted_tokens,
        },
        "timing": {
            "load_s": round(ready.load_s, 4),
            "first_token_s": round(result.timing.first_token_s, 4),
            "tokens_per_s": round(result.timing.tokens_per_s, 2),
        },
        "memory": {
            "weights_bytes": ready.weights_bytes,
            "kv_bytes": ready.kv_bytes,
            "peak_rss_bytes": peak_rss(),
        },
    }
