"""`python -m tests.bench.instructions`: how many instructions redis-server runs for an operation, ours and the peers'.

valgrind counts them, and has to be installed. A busy machine changes no figure, so they show what a change of a script
saves. The kernel's are not among them: they are those of the socket, the same for each round trip. Takes minutes.
"""

from __future__ import annotations

import re
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Iterable

from govredis.testing.servers import RedisServer

from .operations import JSON, OPERATIONS, RAW, contestants
from .sites import IDENTITIES, Site

#: Turns of each contestant. The first makes keys, and is not counted. Between two turns lie seconds, as in the bench.
ROUNDS = 6


class CountingServer(RedisServer):
    """A redis-server under callgrind."""

    def _argv(self) -> list[str]:
        valgrind = [shutil.which("valgrind") or "valgrind", "--tool=callgrind", f"--vgdb-prefix={self.folder}/vgdb"]
        return [*valgrind, f"--callgrind-out-file={self.folder}/count", *super()._argv()]

    def instructions(self) -> int:
        """How many it ran since this was asked last."""
        ask = ["vgdb", f"--vgdb-prefix={self.folder}/vgdb", f"--pid={self.pid}", "dump"]
        subprocess.run(ask, check=True, capture_output=True)
        newest = max(self.folder.glob("count.*"), key=lambda dump: int(dump.suffix[1:]))
        summary = re.search(r"^summary: (\d+)$", newest.read_text(), re.MULTILINE)
        assert summary, newest
        return int(summary[1])


def measure(operations: Iterable[str] = OPERATIONS, rounds: int = ROUNDS) -> dict[tuple[str, str], int]:
    """By operation and contestant: the median over the turns, of a call."""
    # A timer of 1 Hz: its instructions are not the calls'.
    slow = CountingServer(config=["hz 1", "dynamic-hz no"])
    with tempfile.TemporaryDirectory() as folder, slow as server:
        site = Site(server.url, folder)
        calls = {
            (operation, who): make(site)
            for operation in operations
            for who, make in contestants(operation).items()
            if who not in (RAW, JSON)
        }
        found: dict[tuple[str, str], list[float]] = {of: [] for of in calls}
        for _ in range(rounds):
            for of, call in calls.items():
                server.instructions()
                for _ in range(IDENTITIES):
                    call()
                found[of].append(server.instructions() / IDENTITIES)
        site.close()
    return {of: round(statistics.median(counts[1:])) for of, counts in found.items()}


def main() -> None:
    found = measure()
    print("| operation | by | instructions of Redis | to GET |\n| --- | --- | --- | --- |")
    for (operation, who), count in found.items():
        print(f"| {operation} | {who} | {count:,} | {count / found['GET', 'govredis']:.1f} |")


if __name__ == "__main__":
    main()
