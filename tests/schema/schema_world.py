"""Types and constants that the tests of the schema share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

#: Runs a statement; returns its rows.
Sql = Callable[..., list[Any]]
#: Connects as a role, or without one as the superuser.
Connect = Callable[..., Sql]
Migrate = Callable[..., list[str]]

PASSWORD = "hunter2"
#: How many migrations there were before functions had their rights, and rows their separator.
OLD = 7
