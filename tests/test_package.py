"""The wheel holds govredis, its scripts and migrations, and nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import govredis

pytestmark = pytest.mark.once

ROOT = Path(govredis.__file__).parents[1]


def test_the_wheel_holds_the_package_and_nothing_else(tmp_path: Path) -> None:
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, ignore=ignored)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, source],
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    tops = {name.split("/")[0] for name in names}
    assert tops == {"govredis", "_govredis_pytest.py", f"govredis-{govredis.__version__}.dist-info"}
    wanted = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "govredis").rglob("*")
        if path.suffix in {".py", ".lua", ".sql", ".html", ".typed"}
    }
    assert {name for name in names if name.startswith("govredis/")} == wanted
    assert "govredis/limits/lua/window.lua" in wanted
    assert "govredis/py.typed" in wanted
