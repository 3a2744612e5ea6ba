"""The wheel and the sdist hold govredis, its scripts and migrations, and nothing else; an installed wheel runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib.metadata import Distribution, PathDistribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import govredis

pytestmark = pytest.mark.once

ROOT = Path(govredis.__file__).parents[1]
PACKAGE = {
    str(path.relative_to(ROOT))
    for path in (ROOT / "govredis").rglob("*")
    if path.suffix in {".py", ".lua", ".sql", ".html", ".css", ".js", ".typed"}
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the sdist, and the wheel that was made of it, as `make dist` makes them."""
    folder = tmp_path_factory.mktemp("package")
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, folder / "source", ignore=ignored)
    # Without isolation: setuptools is here, and no network is needed.
    command = [sys.executable, "-m", "build", "-q", "--no-isolation", "-o", folder / "dist", folder / "source"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "dist"


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (wheel,) = built.glob("*.whl")
    return wheel


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    tops = {name.split("/")[0] for name in names}
    assert tops == {"govredis", "_govredis_pytest.py", f"govredis-{govredis.__version__}.dist-info"}
    assert {name for name in names if name.startswith("govredis/")} == PACKAGE
    assert {"govredis/limits/lua/window.lua", "govredis/schema/0001_limits.sql", "govredis/py.typed"} <= PACKAGE


def test_the_sdist_holds_the_package_and_what_builds_it(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {member.name.split("/", 1)[1] for member in archive if member.isfile()}
    others = {name for name in names if not name.startswith(("govredis/", "govredis.egg-info/"))}
    assert names - others >= PACKAGE
    documents = {"CHANGELOG.md", "LICENSE", "README.md"}
    assert others == documents | {"MANIFEST.in", "PKG-INFO", "_govredis_pytest.py", "setup.cfg", "setup.py"}


def declared(package: Distribution, extras: set[str]) -> set[str]:
    """The names of the packages that pip would install with this one, of those that are installed here."""
    names: set[str] = set()
    wanted = [(package, extras)]
    while wanted:
        package, extras = wanted.pop()
        for required in map(Requirement, package.requires or ()):
            if required.marker is None or any(required.marker.evaluate({"extra": extra}) for extra in {"", *extras}):
                if required.name not in names or required.extras:
                    wanted.append((distribution(required.name), required.extras))
                names.add(required.name)
    return names


def installed(wheel: Path, folder: Path, *extras: str) -> Path:
    """The `bin` of a new venv with the wheel, and with those of this venv's packages that it declares, by links."""
    metadata = zipfile.Path(wheel, f"govredis-{govredis.__version__}.dist-info/")
    venv.create(folder, with_pip=False, symlinks=True)
    ours = next(folder.glob("lib/python*/site-packages"))
    for name in declared(PathDistribution(metadata), set(extras)):
        package = distribution(name)
        for top in {file.parts[0] for file in package.files or []} - {"..", "__pycache__"}:
            (ours / top).symlink_to(Path(str(package.locate_file(top))))
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "-q", "--no-deps", "--no-index", wheel], env=alone(), check=True)
    subprocess.run([*pip, "check"], env=alone(), check=True)
    return python.parent


def alone() -> dict[str, str]:
    """An environment that does not lead to a checkout."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command of that venv, outside of the checkout."""
    return subprocess.run(
        [folder / command[0], *command[1:]], cwd=folder, env=alone(), capture_output=True, text=True, timeout=180
    )


def test_the_wheel_alone_has_the_features_and_names_the_extra_of_the_command(wheel: Path, tmp_path: Path) -> None:
    folder = installed(wheel, tmp_path / "venv")
    # Making one reads the Lua scripts.
    code = "import govredis; govredis.GovRedis(); print(govredis.__version__, govredis.__file__)"
    imported = run(folder, "python", "-c", code)
    assert imported.stderr == ""
    version, path = imported.stdout.split()
    assert version == govredis.__version__
    assert Path(path).is_relative_to(tmp_path)
    for command in (["govredis"], ["python", "-m", "govredis"]):
        done = run(folder, *command, "--help")
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == "the govredis command needs its extra: pip install 'govredis[cli]'\n"


def test_the_wheel_with_its_extra_has_the_command(wheel: Path, tmp_path: Path) -> None:
    folder = installed(wheel, tmp_path / "venv", "cli")
    script, module = run(folder, "govredis", "--help"), run(folder, "python", "-m", "govredis", "--help")
    assert (script.returncode, script.stderr) == (0, "")
    assert script.stdout.startswith("Usage: govredis [OPTIONS] COMMAND [ARGS]...\n")
    assert "  migrate " in script.stdout
    assert (module.returncode, module.stderr) == (0, "")
    assert module.stdout == script.stdout.replace("Usage: govredis", "Usage: python -m govredis")
