"""Options and what they make of the configuration."""

from __future__ import annotations

import pytest

from loadstone.cli.options import configuration
from loadstone.errors import ConfigurationError

FILE = """\
model_config:
  base_model: "org/name"
  revision: "v1"
  context: 1024
  quantization: "8bit"
generation:
  temperature: 0.5
"""


@pytest.fixture(autouse=True)
def configured(here):
    (here / "loadstone.yaml").write_text(FILE)


def test_options_that_are_not_given_say_nothing():
    """What the file says stays in force, with the file as its origin."""
    made = configuration("smollm2", {"context": None, "temperature": None, "force": False})
    assert made.config.model.context == 1024
    assert made.origin("model_config.context") == "loadstone.yaml:4"
    assert made.config.generation.temperature == 0.5
    assert made.origin("model_config.force") == "default"


def test_options_that_are_given_win():
    """An option goes over the file; zero is a value like any other."""
    made = configuration("smollm2", {"context": "2k", "temperature": 0.0, "max_memory": "2GiB", "force": True})
    assert made.config.model.context == 2048
    assert made.config.model.max_memory == 2 * 2**30
    assert made.config.model.force
    assert made.config.generation.temperature == 0
    assert made.origin("generation.temperature") == "argument"


@pytest.mark.parametrize(("model", "revision"), [("org/name", "v1"), ("org/other", None)])
def test_the_configured_revision_belongs_to_the_configured_model(model, revision):
    """Another model named on the command line is not asked for the configured one's revision."""
    assert configuration(model, {}).config.model.revision == revision


def test_an_error_names_the_option_and_not_the_setting():
    """Who wrote `--top-p` is told about `--top-p`."""
    with pytest.raises(ConfigurationError, match=r"^--top-p is 3\.0"):
        configuration("smollm2", {"top_p": 3.0})
    with pytest.raises(ConfigurationError, match=r"^MODEL"):
        configuration(" ", {})
