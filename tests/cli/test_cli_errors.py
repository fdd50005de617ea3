"""Exit codes and messages: what was wrong, in words, and no traceback unless asked for."""

from __future__ import annotations

import subprocess
import sys

import pytest

from loadstone.cli import app
from loadstone.errors import GenerationError


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("run", "smollm2", "hi", "--max-memory", "20 bananas"), 2, "--max-memory: '20 bananas'"),
        (("run", "smollm2", "hi", "--temperature", "-1"), 2, "--temperature is -1.0"),
        (("run", "smollm2", "hi", "--tempurature", "1"), 2, "'--temperature'"),
        (("run", "smollm2", "hi", "--config", "nowhere.yaml"), 2, "nowhere.yaml"),
        (("run", "smollm2", "hi", "--device", "tpu"), 2, "'tpu'"),
        (("run",), 2, "MODEL"),
        (("walk",), 2, "walk"),
        (("run", "./nowhere", "hi"), 3, "nowhere does not exist"),
        (("run", "smollm2", "hi", "--max-memory", "100MB"), 4, "does not fit"),
        (("run", "smollm2", "word " * 300, "--context", "256"), 5, "Shorten the prompt"),
    ],
)
def test_each_kind_of_failure_has_its_code_and_says_what_was_wrong(cli, arguments, code, said):
    """Errors go to standard error as `error: …`; standard output stays empty."""
    ended = cli(*arguments)
    assert (ended.code, ended.out) == (code, "")
    assert "error: " in ended.err
    assert said in ended.err
    assert "Traceback" not in ended.err


def test_a_mistake_in_the_configuration_names_file_and_line(cli, here):
    """The file that is found is read first, and its mistake is the user's to mend."""
    (here / "loadstone.yaml").write_text("model_config:\n  quantisation: 4bit\n")
    ended = cli("run", "smollm2", "hi")
    assert ended.code == 2
    assert "loadstone.yaml:2" in ended.err
    assert "quantization" in ended.err


def test_verbose_shows_the_traceback(cli):
    """`--verbose` is for whoever wants to see where an error comes from."""
    ended = cli("run", "smollm2", "hi", "--temperature", "-1", "--verbose")
    assert ended.code == 2
    assert "Traceback" in ended.err
    assert "error: --temperature" in ended.err


def test_an_unforeseen_error_is_a_message_too(cli, monkeypatch):
    """Even a mistake of ours ends with a message and a code, not with a traceback."""

    def fail(*_: object) -> None:
        raise KeyError("lost")

    monkeypatch.setattr("loadstone.cli.run.configuration", fail)
    ended = cli("run", "smollm2", "hi")
    assert ended.code == 5
    assert "KeyError: 'lost'" in ended.err
    assert "Traceback" not in ended.err


def test_notes_on_an_error_are_told(cli, monkeypatch):
    """What was noted on an error's way (how often it was tried) reaches the user."""

    def fail(*_: object) -> None:
        error = GenerationError("it broke", hint="mend it")
        error.add_note("Tried 3 times.")
        raise error

    monkeypatch.setattr("loadstone.cli.run.configuration", fail)
    assert cli("run", "smollm2", "hi").err == "error: it broke\n  mend it\n  Tried 3 times.\n"


def test_no_command_is_wrong_use_with_the_help(cli):
    """`loadstone` alone explains itself, where it cannot be taken for a result."""
    ended = cli()
    assert (ended.code, ended.out) == (2, "")
    assert "Commands:" in ended.err


def test_help_names_every_command_and_option_and_exits_with_0(cli):
    """Help is a result: it goes to standard output."""
    ended = cli("--help")
    assert ended.code == 0
    assert all(name in ended.out for name in ("run", "chat", "info", "doctor"))
    options = cli("run", "--help").out
    for option in (
        "--max-new-tokens", "--temperature", "--top-p", "--top-k", "--seed", "--system", "--raw", "--quantization",
        "--device", "--max-memory", "--context", "--json", "--config", "--force", "--offline", "--verbose",
    ):  # fmt: skip
        assert option in options


def test_help_imports_nothing_heavy():
    """`loadstone --help` answers in a blink because torch, pydantic, rich and the rest are left alone."""
    program = (
        "import sys\nfrom loadstone.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = ended.stdout.splitlines()[-1]
    for name in ("torch", "transformers", "bitsandbytes", "numpy", "pydantic", "rich", "huggingface_hub"):
        assert repr(name) not in loaded


def test_the_version_is_the_packages(cli):
    """`loadstone --version` names the program and its version."""
    from loadstone import __version__

    assert cli("--version").out == f"loadstone {__version__}\n"


def test_an_unknown_log_is_wrong_use(cli, monkeypatch):
    """LOADSTONE_LOG is checked like any other setting."""
    monkeypatch.setenv("LOADSTONE_LOG", "loud")
    ended = cli("run", "smollm2", "hi")
    assert ended.code == 2
    assert "LOADSTONE_LOG is 'loud'" in ended.err


def test_every_exit_code_is_documented_in_the_help():
    """Whoever writes a script finds the codes in `loadstone --help`."""
    assert app.loadstone.epilog is not None
    for code in ("0", "2", "3", "4", "5", "130"):
        assert f"{code} " in app.loadstone.epilog
