"""Shared by the lock-set test and its processes, which all run `go_round`.

There is a board that says which process is inside, a file that nothing but the lock protects, and a register that
checks fencing tokens.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import socket
import socketserver
import struct
import threading
import time
from pathlib import Path
from typing import Any

from govredis import BackendError, LockError, LockLost

SLOTS = 8
_FIELDS = (
    "inside",  # set by the process when it has the lock, cleared before it lets go
    "excused",  # by the test: it was stopped or is being killed; by the process at its next start: no more
    "park",  # by the test: stay inside, at the worst place, until this is cleared
    "parked",
    "end",  # by the test
    "ended",
    "done",  # how often it was inside.
    "wrote",  # how often it wrote the file.
    "overlaps",  # how often it saw another inside.
    "degraded",  # how often it was inside without Redis.
    "lost",  # how often raise_if_lost() raised.
    "unreleased",  # how often release() said that it was not held.
)
_COUNTS = struct.Struct(f"<{SLOTS}Q")


class Board:
    """Numbers in shared memory: board[slot, field]. Each has one writer at a time. A stopped process blocks nobody."""

    def __init__(self, folder: Path) -> None:
        fd = os.open(folder / "board", os.O_RDWR | os.O_CREAT, 0o600)
        os.ftruncate(fd, SLOTS * len(_FIELDS) * 8)
        self._numbers = memoryview(mmap.mmap(fd, 0)).cast("Q")
        os.close(fd)

    def __getitem__(self, place: tuple[int, str]) -> int:
        return self._numbers[place[0] * len(_FIELDS) + _FIELDS.index(place[1])]

    def __setitem__(self, place: tuple[int, str], value: int) -> None:
        self._numbers[place[0] * len(_FIELDS) + _FIELDS.index(place[1])] = value

    def total(self, field: str) -> int:
        return sum(self[slot, field] for slot in range(SLOTS))

    def others_inside(self, me: int) -> list[int]:
        """Those that may not be. Excuses are read around the look: an excused one may just be leaving."""
        excused = [self[slot, "excused"] for slot in range(SLOTS)]
        found = [slot for slot in range(SLOTS) if slot != me and self[slot, "inside"] and not excused[slot]]
        return [] if self[me, "excused"] else found


class CountsFile:
    """How often each has written, in one file: a lost update takes back somebody's."""

    def __init__(self, folder: Path) -> None:
        self._fd = os.open(folder / "counts", os.O_RDWR | os.O_CREAT, 0o600)

    def read(self) -> list[int]:
        return list(_COUNTS.unpack(os.pread(self._fd, _COUNTS.size, 0) or bytes(_COUNTS.size)))

    def write(self, counts: list[int]) -> None:
        os.pwrite(self._fd, _COUNTS.pack(*counts), 0)

    def close(self) -> None:
        os.close(self._fd)


class Register:
    """A value. Only a writer whose token is not below the highest that has read or written it may write.

    A server in a thread, since a process that is stopped in the midst of a write must block nobody.

    Attributes:
        accepted: (token, value) of each write, in order.
        refused: how many writes were not accepted.
    """

    def __init__(self) -> None:
        self.accepted: list[tuple[int, int]] = []
        self.refused = 0
        self._highest = 0
        self._mutex = threading.Lock()
        register = self

        class Handler(socketserver.StreamRequestHandler):
            disable_nagle_algorithm = True

            def handle(self) -> None:
                with contextlib.suppress(ConnectionError):  # killed
                    for line in self.rfile:
                        self.wfile.write(b"%d\n" % register._answer(*map(int, line.split())))

        class Server(socketserver.ThreadingTCPServer):
            daemon_threads = True

        self._server = Server(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def _answer(self, token: int, *write: int) -> int:
        with self._mutex:
            if token < self._highest:
                self.refused += bool(write)
                return 0
            self._highest = token
            if not write:
                return self.accepted[-1][1] if self.accepted else 0
            self.accepted.append((token, write[0]))
            return 1

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class RegisterClient:
    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._file = self._socket.makefile("rwb")

    def read(self, token: int) -> int:
        """The value; 0, too, where the token is too low to write it."""
        return self._ask(b"%d\n" % token)

    def write(self, token: int, value: int) -> bool:
        return bool(self._ask(b"%d %d\n" % (token, value)))

    def _ask(self, line: bytes) -> int:
        self._file.write(line)
        self._file.flush()
        return int(self._file.readline())

    def close(self) -> None:
        self._file.close()
        self._socket.close()


def go_round(locks: Any, folder: str, port: int, me: int, ttl: float) -> list[str]:
    """Into the lock and out again until told to end. Returns what went wrong, in words."""
    board, counts, register = Board(Path(folder)), CountsFile(Path(folder)), RegisterClient(port)
    wrong: list[str] = []

    def look(where: str) -> None:
        if others := board.others_inside(me):
            board[me, "overlaps"] += 1
            wrong.append(f"{others} were inside {where}, {time.monotonic() - entered:.3f} s after {me} came in")

    try:
        while not board[me, "end"]:
            board[me, "excused"] = 0
            if random.random() < 0.3:
                time.sleep(random.random() * 0.003)  # that it is found free at times
            try:
                # Far longer than the test takes: nobody is to give up.
                held = locks.acquire("x", timeout=120, ttl=ttl)
            except (LockError, BackendError) as error:
                wrong.append(repr(error))
                continue
            entered = time.monotonic()
            board[me, "inside"] = 1
            look("at the beginning")
            value, before = register.read(held.token), counts.read()
            if random.random() < 0.2:
                time.sleep(random.random() * 0.004)
            if board[me, "park"]:
                board[me, "parked"] = 1
                while board[me, "park"]:
                    time.sleep(0.001)
                board[me, "parked"] = 0
            if random.random() < 0.3:
                with contextlib.suppress(LockLost, BackendError):
                    held.extend(ttl)
            register.write(held.token, value + 1)
            before[me] += 1
            counts.write(before)
            board[me, "wrote"] += 1
            look("at the end")
            try:
                held.raise_if_lost()
            except LockLost:
                board[me, "lost"] += 1
            board[me, "degraded"] += held.degraded
            board[me, "inside"] = 0
            board[me, "unreleased"] += not held.release()
            board[me, "done"] += 1
    finally:
        register.close()
        counts.close()
        board[me, "ended"] = 1
    return wrong
