"""A process of its own with a GovRedis, told on stdin what to do: one JSON list [how, code] a line, one answer a line.

["eval", expression] answers {"value": ...}; ["exec", statements] answers {"value": null}; either {"error": class name}.
"""

from __future__ import annotations

import json
import os
import sys
import warnings

from govredis import Config, GovRedis, HeldLock, LockError, LockLost


def hammer(locks: object, path: str, name: str, until: str) -> dict[str, int]:
    """Count up in a file under a lock, without any other locking, until the file `until` exists."""
    tally = dict.fromkeys(["done", "overlaps", "stale", "lost", "errors"], 0)
    while not os.path.exists(until):
        try:
            held: HeldLock = locks.acquire(name, timeout=10, ttl=30)  # type: ignore[attr-defined]
        except LockError:
            tally["errors"] += 1
            continue
        try:
            with held:
                try:
                    os.close(os.open(path + ".inside", os.O_CREAT | os.O_EXCL))
                except FileExistsError:
                    tally["overlaps"] += 1
                with open(path) as file:
                    count, token = map(int, file.read().split())
                tally["stale"] += held.token <= token
                with open(path + f".{os.getpid()}", "w") as file:
                    file.write(f"{count + 1} {held.token}")
                os.replace(path + f".{os.getpid()}", path)
                tally["done"] += 1
                try:
                    os.unlink(path + ".inside")
                except FileNotFoundError:
                    tally["overlaps"] += 1
        except LockLost:
            tally["lost"] += 1
    return tally


def files_in(folder: str) -> list[str]:
    """The files of a folder that this process has open."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
        except FileNotFoundError:  # what listed them
            pass
    return [path for path in found if path.startswith(folder)]


def in_child(check: object) -> str:
    """Run `check()` in a forked child: returns its result."""
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # 3.12+: there are other threads
        pid = os.fork()
    if not pid:
        try:
            answer = repr(check())  # type: ignore[operator]
        except BaseException as error:  # noqa: BLE001
            answer = f"raised {error!r}"
        os.write(write, answer.encode())
        os._exit(0)
    os.close(write)
    with open(read, "rb") as file:
        answer = file.read().decode()
    os.waitpid(pid, 0)
    return answer


def main() -> None:
    gov = GovRedis(Config(**json.loads(sys.argv[1])))
    names = {**globals(), "gov": gov, "locks": gov.locks}
    sys.stdout.write(json.dumps({"value": "ready"}) + "\n")
    sys.stdout.flush()
    for line in sys.stdin:
        how, code = json.loads(line)
        answer: dict[str, object] = {"value": None}
        try:
            if how == "eval":
                answer["value"] = eval(code, names)
            else:
                exec(code, names)
        except Exception as error:  # noqa: BLE001
            answer = {"error": type(error).__name__, "text": str(error)}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
