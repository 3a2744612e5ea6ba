"""Sphinx: `make docs`. Warnings are errors there."""

from __future__ import annotations

import re
from typing import Any

from govredis import __version__

project = "govredis"
author = "the govredis developers"
copyright = "2026, the govredis developers"
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"govredis {release}"

myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
# Types stand in the signature, and the docstrings speak of units.
autodoc_typehints = "signature"


def as_rst(text: str) -> str:
    """A docstring of ours as reStructuredText: its code has single backticks, and names may end in an underscore."""
    text = re.sub(r"\*\*(.+?)\*\*", lambda bold: bold[1] if "`" in bold[1] else bold[0], text)  # no code in bold
    prose_and_code = re.split(r"`([^`]+)`", text)
    prose_and_code[::2] = [re.sub(r"(\w)_(?!\w)", r"\1\\_", prose) for prose in prose_and_code[::2]]
    prose_and_code[1::2] = [rf"\ ``{code}``\ " for code in prose_and_code[1::2]]
    return "".join(prose_and_code)


def read_docstring(app: Any, kind: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    lines[:] = as_rst("\n".join(lines)).split("\n")


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", read_docstring)
