"""How the documentation is built: `make docs`, with every warning an error."""

from importlib.metadata import version as version_of

project = "Loadstone"
author = "the Loadstone developers"
version = release = version_of("loadstone")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.intersphinx", "sphinx_click"]
intersphinx_mapping: dict[str, tuple[str, str | None]] = {}  # nothing is asked of the network
source_suffix = {".md": "markdown"}
exclude_patterns = ["log.md"]
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "Loadstone"
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_class_signature = "mixed"
suppress_warnings = ["myst.xref_missing"]  # links to files of the repository that are no pages; a test follows them
