"""`loadstone pull`: fetch a model and quantise it once, so that loading it takes no time after that."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

import click

from loadstone.units import format_size

from .entries import short_key
from .interrupts import HeldInterrupts
from .listening import heard
from .options import configuration, load_options, verbose_option
from .output import Row, rows, write_json
from .progress import shown_progress

if TYPE_CHECKING:
    from loadstone.loaded import PreparedModel


@click.command(short_help="Fetch a model and quantise it, so that it loads at once.")
@click.argument("model")
@load_options
@click.option("--quantize-only", is_flag=True, help="Keep the quantised weights only: remove the original ones.")
@click.option("--json", "as_json", is_flag=True, help="Write one JSON object instead of text.")
@verbose_option
def pull(model: str, quantize_only: bool, as_json: bool, **said: Any) -> None:
    """Fetch the files of MODEL and put its quantised weights into the store, unless they are there.

    Nothing is loaded: `run`, `chat` and other programs do so at once after that, with the same options. Fails where
    the weights cannot be kept.

    With --quantize-only a model that was fetched gives back the disk of its original weights. It is loaded under the
    same name, revision and --quantization; for another --quantization the weights are fetched again.
    """
    wish = configuration(model, said)
    with shown_progress("Starting"), HeldInterrupts():
        from loadstone.manager import ModelManager

    started = time.perf_counter()
    with heard("source.download") as downloads, shown_progress("Looking at the model"):
        prepared = ModelManager(wish).prepare_model(keep_original=not quantize_only)
    seconds = time.perf_counter() - started
    fetched = sum(event.fields["bytes"] for event in downloads)
    if as_json:
        write_json(_as_json(prepared, fetched, seconds))
    else:
        rows(sys.stdout, _rows(prepared, fetched, seconds))


def _rows(prepared: PreparedModel, fetched: int, seconds: float) -> list[Row]:
    spec, entry = prepared.spec, prepared.entry
    revision = f", revision {spec.revision}" if spec.revision else ""
    files = f"{format_size(prepared.file_bytes)} in {spec.folder}"
    came = f"{format_size(fetched)} fetched" if fetched else "there already"
    kept = f"nothing is quantised and kept: {prepared.not_kept}"
    if entry is not None:
        how = "quantised now" if prepared.was_made else "there already"
        kept = f"{format_size(entry.nbytes)} ({short_key(entry)}) in {entry.folder}; {how}"
    return [
        ("model", f"{spec.name} ({spec.origin}{revision})"),
        ("files", f"{files}; {came}"),
        ("strategy", prepared.plan.strategy),
        ("store", kept),
        *([("removed", f"{format_size(prepared.freed_bytes)} of original weights")] if prepared.freed_bytes else []),
        ("took", f"{seconds:.2f} s"),
    ]


def _as_json(prepared: PreparedModel, fetched: int, seconds: float) -> dict[str, Any]:
    """Return what was done; bytes and seconds."""
    spec, entry = prepared.spec, prepared.entry
    return {
        "model": spec.name,
        "origin": spec.origin,
        "revision": spec.revision,
        "folder": str(spec.folder),
        "file_bytes": prepared.file_bytes,
        "fetched_bytes": fetched,
        "device": prepared.plan.device.torch_name,
        "strategy": prepared.plan.strategy,
        "entry": entry and {"key": entry.manifest.key, "bytes": entry.nbytes, "folder": str(entry.folder)},
        "made": prepared.was_made,
        "not_kept": prepared.not_kept,
        "freed_bytes": prepared.freed_bytes,
        "seconds": round(seconds, 4),
    }
