"""The history: each operation, its process, its instants and its result. It is read back as a list of Op."""

from __future__ import annotations

import itertools
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

now = time.monotonic


@dataclass(slots=True)
class Op:
    """An operation. `outcome` is "ok", "failed" (an exception, named by `value`), or "unknown": the process was killed,
    or an exception of a signal handler struck, and it may have been carried out or not; `ended` is infinite then."""

    what: str
    who: str
    began: float
    ended: float = math.inf
    outcome: str = "unknown"
    value: Any = None
    flags: list[str] = field(default_factory=list)
    args: dict[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return self.outcome == "ok"

    def flagged(self, *names: str) -> bool:
        return any(name in self.flags for name in names)


class Recorder:
    """Appends to a file of its own. A line is one write, so a process killed in the midst leaves whole lines only.

    Args:
        folder: of the history.
        who: names the process, and the file.
    """

    def __init__(self, folder: str | Path, who: str) -> None:
        self.who = who
        self._fd = os.open(Path(folder) / f"{who}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._numbers = itertools.count()

    def number(self) -> int:
        return next(self._numbers)

    def write(self, n: int, what: str, **line: Any) -> None:
        """Writes a line. Where several lines have the same number, the last line counts."""
        os.write(self._fd, json.dumps({"n": n, "what": what, **line}).encode() + b"\n")


def read(folder: str | Path, files: str = "*.jsonl") -> list[Op]:
    """All operations of a folder, in the order in which they began."""
    ops = [op for path in sorted(Path(folder).glob(files)) for op in _read_one(path)]
    ops.sort(key=lambda op: op.began)
    return ops


def _read_one(path: Path) -> Iterator[Op]:
    lines: dict[int, dict[str, Any]] = {}
    for text in path.read_bytes().split(b"\n")[:-1]:
        line = json.loads(text)
        lines[line.pop("n")] = line
    for line in lines.values():
        yield Op(who=path.stem, **line)
