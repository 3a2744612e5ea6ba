"""The examples as somebody runs them who has cloned the repository: `make`, in a terminal, as their READMEs say."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from terminals import Reader

ROOT = Path(__file__).parents[2]

#: As in all tests, a machine that stalls for a while makes no outage.
PATIENT = {f"GOVREDIS_{what}_TIMEOUT": "10" for what in ("SOCKET", "CONNECT", "POSTGRES")}
#: The developer's servers, and the arguments that the `make test` above us hands on.
NOT_OURS = {
    *("REDIS_URL", "GOVREDIS_DATABASE_URL", "CELERY_BROKER_URL", "GOVREDIS_PARKING_URL"),
    *("MAKEFLAGS", "MFLAGS", "MAKELEVEL"),
}


class Checkout:
    """A clone of the repository whose `.venv` is that of the tests, and somebody with terminals there."""

    def __init__(self, folder: Path, settings: Mapping[str, str]) -> None:
        self.folder, programs = folder / "checkout", folder / "bin"
        shutil.copytree(ROOT / "examples", self.folder / "examples", ignore=shutil.ignore_patterns("__pycache__"))
        for name in "Makefile", "setup.cfg", "setup.py":
            shutil.copy(ROOT / name, self.folder)
        programs.mkdir()
        made = f"VENV={sys.prefix} -o {sys.prefix}/.ready"  # which the checkout's own make would make
        (programs / "make").write_text(f'#!/bin/sh\nexec {shutil.which("make")} {made} "$@"\n')
        (programs / "make").chmod(0o755)
        self.environment = {
            **{name: value for name, value in os.environ.items() if name not in NOT_OURS},
            **PATIENT,
            "PATH": f"{programs}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "GOVREDIS_LOCK_FOLDER": str(folder / "locks"),
            "no_proxy": "localhost",
            **settings,
        }
        self._reader = Reader(self.folder, self.environment)
        self.close = self._reader.close

    def change(self, name: str, before: str, after: str) -> None:
        """Write `after` for each `before` in a file of the examples."""
        file = self.folder / "examples" / name
        text = file.read_text()
        assert before in text
        file.write_text(text.replace(before, after))

    def follow(self, readme: str) -> None:
        """Type what the README types."""
        text = (self.folder / "examples" / readme).read_text()
        shown = [self._reader.take("sh", block) for block in re.findall(r"^```sh\n(.*?)^```$", text, re.M | re.S)]
        assert sum(filter(None, shown)) == text.count("# -> ")

    def type(self, line: str, wanted: str) -> None:
        """Type a line into the terminal that the example runs in, until that says `wanted`."""
        self._reader.take("text", f"# terminal 1\n{line}  # -> {wanted}")

    def printed(self, variable: str) -> str:
        """The value of a variable, from the lines that the example prints for other terminals."""
        found = re.search(rf"export {variable}='?([^'\n]+)", self.folder.with_name("terminal-1.log").read_text())
        assert found, f"no line for {variable}"
        return found[1]
