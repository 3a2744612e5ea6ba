"""The diagnoses of the doctor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Fact(NamedTuple):
    """A thing that was seen, with which nothing is wrong."""

    about: str
    seen: str


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """A fault, or a note: a choice that may be on purpose, or a thing that could not be looked at.

    Attributes:
        about: the part of the deployment.
        what: is wrong, or was noted.
        why: it matters; "" where that is said already.
        change: the remedy; "" where that is said already.
    """

    about: str
    what: str
    why: str = ""
    change: str = ""
    is_fault: bool = True
