"""Servers that no wheel has: those of Debian's packages."""

from __future__ import annotations

import os
import shutil

import pytest


def find_system_binary(name: str, *, required: bool) -> str:
    """The path of a program that Debian's package `name` brings. Without it the test is skipped, or fails."""
    path = shutil.which(name, path=os.environ.get("PATH", os.defpath) + ":/usr/local/sbin:/usr/sbin")
    if path is None:
        missing = f"no {name} found: install Debian's package {name}"
        pytest.fail(missing) if required else pytest.skip(missing)
    return path
