"""The keeper: a small process that owns one server and lets nothing of it outlive the process that asked for it.

Started by `_base_server.py` in a session of its own, as `python -I -S -B _keeper_process.py PARENT [TEMPORARY-FOLDER]`.
Standard library only. Single-threaded on purpose: Linux ties a parent-death signal to the *thread* that forked, and
here that thread is the process.

Orders are JSON lines on stdin, each answered by one line on stdout with the order's id. When stdin ends, or the parent
is not the process it was, the keeper ends the server, paused or not, removes the temporary folder and leaves. (A forked
child of the parent may hold the pipe open.) Should the keeper itself be killed, the kernel kills the server.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
ENDED: dict[int, int] = {}  # the exit status of every child so far; -N for signal N


def prctl(option: int, value: int) -> None:
    if LIBC is not None:
        LIBC.prctl(option, value, 0, 0, 0)


def processes() -> Iterator[tuple[int, int, str]]:
    """Every process of the machine: pid, parent's pid, state letter."""
    if sys.platform != "linux":
        table = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,stat="], stdout=subprocess.PIPE, text=True).stdout
        yield from ((int(pid), int(parent), state[0]) for pid, parent, state in map(str.split, table.splitlines()))
        return
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat") as stat:
                state, parent = stat.read().rpartition(")")[2].split()[:2]
        except OSError:  # gone since the listing
            continue
        yield int(name), int(parent), state


def below() -> dict[int, str]:
    """Every living process below this one, parents first, with its state letter. (A process group would not do: each
    of PostgreSQL's processes makes itself a session.)"""
    table = list(processes())
    found = {os.getpid(): ""}
    while new := {pid: state for pid, parent, state in table if parent in found and pid not in found}:
        found.update(new)
    return {pid: state for pid, state in found.items() if state and state not in "ZX"}


def send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def freeze() -> None:
    """SIGSTOP everything below; returns once all of it stands still, newly forked processes included (at most 10 s)."""
    deadline = time.monotonic() + 10
    while (moving := [pid for pid, state in below().items() if state not in "Tt"]) and time.monotonic() < deadline:
        for pid in moving:
            send(pid, signal.SIGSTOP)


def thaw() -> None:
    for pid in below():
        send(pid, signal.SIGCONT)


def kill() -> None:
    """SIGKILL everything below, frozen first so that nothing reacts or forks meanwhile; returns once all is reaped."""
    freeze()
    for pid in below():
        send(pid, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while reap() and time.monotonic() < deadline:
        time.sleep(0.001)


def reap() -> bool:
    """Collect children that ended, orphans of the server included; whether any child is left."""
    try:
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            ENDED[ended[0]] = os.waitstatus_to_exitcode(ended[1])
    except ChildProcessError:
        return False
    return True


def start(argv: list[str], cwd: str, user: list[int] | None) -> int:
    """Run `argv` as `user` (uid, gid); its output goes to this process's stderr, the log. Returns its pid."""
    keeper = os.getpid()
    ENDED.clear()
    if pid := os.fork():
        return pid
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(2, 1)
        for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them, and what is ignored stays so over exec
            signal.signal(number, signal.SIG_DFL)
        os.chdir(cwd)
        if user:
            os.setgroups([])
            os.setgid(user[1])
            os.setuid(user[0])
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # after setuid, which clears it
        if os.getppid() == keeper:
            os.execve(argv[0], argv, {**os.environ, "LC_ALL": "C"})
    except OSError as error:
        os.write(2, f"cannot run {argv[0]}: {error}\n".encode())
    finally:
        os._exit(127)


def orders(parent: int) -> Iterator[dict[str, Any]]:
    """The parent's orders, until it is gone."""
    waiting = b""
    while os.getppid() == parent:
        if select.select([0], [], [], 0.2)[0]:
            if not (chunk := os.read(0, 1 << 16)):
                return
            *lines, waiting = (waiting + chunk).split(b"\n")
            yield from map(json.loads, lines)
        reap()


def main() -> None:
    parent, temporary = int(sys.argv[1]), sys.argv[2:]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit())
    prctl(PR_SET_CHILD_SUBREAPER, 1)  # what the server leaves behind becomes a child of the keeper, hence findable
    server, farewell = 0, signal.SIGKILL
    try:
        for order in orders(parent):
            do = order["do"]
            if do == "start":
                farewell = order["farewell"]
                server = start(order["argv"], order["cwd"], order["user"])
            elif do == "signal" and server and server not in ENDED:
                send(server, order["signal"])
            elif do in ("freeze", "thaw", "kill"):
                {"freeze": freeze, "thaw": thaw, "kill": kill}[do]()
            reap()
            os.write(1, json.dumps({"id": order["id"], "pid": server, "status": ENDED.get(server)}).encode() + b"\n")
    except BrokenPipeError:
        pass
    finally:
        if (
            reap() and server not in ENDED and farewell != signal.SIGKILL
        ):  # PostgreSQL leaves shared memory behind when it is just killed
            thaw()
            send(server, farewell)
            deadline = time.monotonic() + 10
            while reap() and time.monotonic() < deadline:
                time.sleep(0.005)
        kill()
        for folder in temporary:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
