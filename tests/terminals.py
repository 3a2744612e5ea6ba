"""A reader who goes through a page: saves its files, and types its commands into terminals that stay open."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from support import PATIENCE, eventually

#: A block's first line names where it goes.
_TERMINAL = re.compile(r"# terminal (?P<number>\d)(?P<repeated>, after a moment)?\n")
_FILE = re.compile(r"# (?P<name>[\w.]+\.\w+)\n")


class Terminal:
    """A shell. It and its commands say all into the file `log`."""

    def __init__(self, log: Path, folder: Path, environment: dict[str, str]) -> None:
        self._log, self._read, self._commands = log, 0, 0
        with log.open("wb") as output:
            self._shell = subprocess.Popen(
                ["bash"], stdin=subprocess.PIPE, stdout=output, stderr=output, cwd=folder, env=environment,
                start_new_session=True, bufsize=0,
            )  # fmt: skip

    @property
    def folder(self) -> Path:
        return Path(f"/proc/{self._shell.pid}/cwd").readlink()

    def said(self) -> str:
        """All that it has said since the last `command` or `type`."""
        return self._log.read_bytes()[self._read :].decode(errors="replace")

    def type(self, line: str) -> None:
        assert self._shell.stdin is not None
        self._read = self._log.stat().st_size
        self._shell.stdin.write(f"{line}\n".encode())

    def command(self, line: str, wanted: str, *, repeated: bool) -> None:
        """Run it until it has said `wanted`, or without one to its end. `repeated`: again, until it says so."""
        deadline = time.monotonic() + PATIENCE
        while True:
            self._commands += 1
            self.type(f'{line}; echo "[{self._commands} ended: $?]"')
            eventually(lambda: (wanted and wanted in self.said()) or self._ended(), what=f"{line} says {wanted}")
            if wanted in self.said() and (wanted or self._ended() == "0"):
                return
            assert repeated and time.monotonic() < deadline, f"{line}\n{self.said()}"

    def _ended(self) -> str:
        found = re.search(rf"\[{self._commands} ended: (\d+)\]", self.said())
        return found[1] if found else ""

    def close(self) -> None:
        """End the shell and all that it runs. Servers of `govredis.testing` end with the process that made them."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._shell.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._shell.wait(PATIENCE / 10)
        assert self._shell.stdin is not None
        self._shell.stdin.close()


class Reader:
    """Somebody with an empty folder, and as many terminals as the page names."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self._folder, self._environment = folder, environment
        self._terminals: dict[str, Terminal] = {}

    def take(self, language: str, block: str) -> int | None:
        """Save it or type it, as its first line says. Returns how often it said what the block shows; None where its
        first line says neither."""
        if found := _TERMINAL.match(block):
            return self._type(language, block[found.end() :], self._terminal(found["number"]), bool(found["repeated"]))
        if found := _FILE.match(block):
            with (self._terminal("1").folder / found["name"]).open("a") as file:
                file.write(block if file.tell() == 0 else "\n\n" + block[found.end() :])
            return 0
        return None

    def _terminal(self, number: str) -> Terminal:
        if number not in self._terminals:
            log = self._folder.with_name(f"terminal-{number}.log")
            self._terminals[number] = Terminal(log, self._folder, self._environment)
        return self._terminals[number]

    def _type(self, language: str, lines: str, terminal: Terminal, repeated: bool) -> int:
        shown = 0
        for line, wanted in _lines_of(lines):
            if language == "sh":
                terminal.command(line, wanted, repeated=repeated)
            else:  # at Python's prompt
                terminal.type(line)
                eventually(lambda wanted=wanted: wanted in terminal.said(), what=f"{line} gives {wanted}")
            shown += bool(wanted)
        return shown

    def close(self) -> None:
        for terminal in self._terminals.values():
            terminal.close()


def _lines_of(lines: str) -> Iterator[tuple[str, str]]:
    for line in lines.splitlines():
        typed, _, wanted = line.partition("# -> ")
        if typed.strip():
            yield typed.strip(), wanted.strip()
