"""Runs an example: `make shop`, `make mailer`, or `python examples/run.py shop`.

It starts the servers whose URLs the environment does not name (REDIS_URL, CELERY_BROKER_URL, GOVREDIS_DATABASE_URL),
then the example's processes, and ends them all on Ctrl+C. A Redis that it has started can be taken away by Enter.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from govredis.testing.servers import PostgresServer, RedisServer


class Example(NamedTuple):
    once: list[str]  # commands that prepare it, one after the other
    processes: list[str]  # which run side by side, until Ctrl+C
    then: list[str]  # commands beside them
    greeting: str


WORKER = "celery --quiet -A mailer worker --loglevel WARNING --concurrency 2"
EXAMPLES = {
    "shop": Example(
        ["govredis migrate", "flask --app shop create-tables"],
        ["flask --app shop run"],
        [],
        "The shop is at http://localhost:{FLASK_RUN_PORT}: log in as ada or bob, password sesame.",
    ),
    "mailer": Example(
        ["govredis migrate"],
        ["mail_server.py", f"{WORKER} -n one --beat --schedule {{MAIL_FOLDER}}/beat", f"{WORKER} -n two"],
        ["send.py {MAIL_COUNT}"],
        "Two workers send {MAIL_COUNT} mails to {MAIL_FOLDER}, {MAIL_RATE} at most.",
    ),
}


def main(name: str) -> None:
    example, folder = EXAMPLES[name], Path(__file__).with_name(name)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the servers, too
    with contextlib.ExitStack() as ends, contextlib.suppress(KeyboardInterrupt):
        print("Starting the servers ...", flush=True)
        redis = start_servers(ends, broker=name == "mailer")
        defaults = {
            "SHOP_SECRET_KEY": secrets.token_hex(),
            "SHOP_OVER_HTTP": "1",
            "FLASK_RUN_PORT": "5000",
            "MAIL_FOLDER": ends.enter_context(tempfile.TemporaryDirectory()),
            "MAIL_PORT": str(free_port()),
            "MAIL_RATE": "20/10 seconds",
            "MAIL_COUNT": "100",
        }
        for variable, value in defaults.items():
            os.environ.setdefault(variable, value)
        for command in example.once:
            subprocess.run(words(command), cwd=folder, check=True, stdout=subprocess.DEVNULL)
        processes: list[subprocess.Popen[bytes]] = []
        ends.callback(end, processes)
        on_interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the processes inherit it: this one ends them
        for command in example.processes:
            processes.append(subprocess.Popen(words(command), cwd=folder, stdin=subprocess.DEVNULL))
        signal.signal(signal.SIGINT, on_interrupt)
        print(example.greeting.format(**os.environ), flush=True)
        for command in example.then:
            subprocess.run(words(command), cwd=folder, check=True)
        serve(processes, redis)


def start_servers(ends: contextlib.ExitStack, *, broker: bool) -> RedisServer | None:
    """Returns the Redis of govredis, if it was started here."""
    redis = None
    if "REDIS_URL" not in os.environ:
        redis = ends.enter_context(RedisServer())
        os.environ["REDIS_URL"] = redis.url
    if broker:
        if "CELERY_BROKER_URL" not in os.environ:  # not the Redis above: a queue may not lose its data
            os.environ["CELERY_BROKER_URL"] = ends.enter_context(RedisServer(persistent=True)).url
        os.environ.setdefault("GOVREDIS_PARKING_URL", os.environ["CELERY_BROKER_URL"])
    if "GOVREDIS_DATABASE_URL" not in os.environ:
        os.environ["GOVREDIS_DATABASE_URL"] = ends.enter_context(PostgresServer()).url
    return redis


def words(command: str) -> list[str]:
    first, *rest = shlex.split(command.format(**os.environ))
    return [sys.executable, first, *rest] if first.endswith(".py") else [sys.executable, "-m", first, *rest]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def serve(processes: list[subprocess.Popen[bytes]], redis: RedisServer | None) -> None:
    """Until a process ends. Each line of the input takes Redis away, or brings it back without its data."""
    print("For the command govredis and the like, in another terminal:")
    for variable in "REDIS_URL", "CELERY_BROKER_URL", "GOVREDIS_PARKING_URL", "GOVREDIS_DATABASE_URL":
        if variable in os.environ:
            print(f"  export {variable}={shlex.quote(os.environ[variable])}")
    print("Enter takes Redis away, and brings it back. " if redis else "", "Ctrl+C ends all.", sep="", flush=True)
    inputs = [0] if redis else []
    while all(process.poll() is None for process in processes):
        if select.select(inputs, [], [], 0.5)[0]:
            if not os.read(0, 1024):
                inputs = []  # nobody types: there is no terminal
            elif redis and redis.running:
                redis.kill()
                print("Redis is away.", flush=True)
            elif redis:
                redis.restart(data="empty")
                print("Redis is back, without its data.", flush=True)
    sys.exit("a process of the example has ended: see above")


def end(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


if __name__ == "__main__":
    if sys.argv[1:] not in [[name] for name in EXAMPLES]:
        sys.exit(f"usage: python examples/run.py {'|'.join(EXAMPLES)}")
    main(sys.argv[1])
