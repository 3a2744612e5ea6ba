"""Names, limits and helpers that the processes of a run have in common."""

from __future__ import annotations

import ctypes
import signal

#: The agents that have metadata, and that sessions belong to.
AGENTS = [f"agent-{n}" for n in range(40)]
#: Identities and their limits, as (count, seconds). Nobody comes near those of "calm".
RATES: dict[str, list[tuple[int, int]]] = {
    "hot": [(6, 1), (15, 4)],
    "patient": [(4, 1)],
    "slow": [(20, 6)],
    "calm": [(100_000, 5)],
}
#: How many sessions the processes can tell each other of, 64 bytes each.
SLOTS = 64


def die_with_parent(**_: object) -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG
