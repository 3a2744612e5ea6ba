"""The files for Docker Compose and Kubernetes in docs/howto/: what they name is there. No test starts a container."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from flask import Flask

from govredis import Config, GovRedis
from govredis.contrib.flask import FlaskGovRedis

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
SETTINGS = {field.metadata["variable"] for field in Config.__dataclass_fields__.values()} | {"CELERY_BROKER_URL"}


def blocks_of(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)


def modules() -> dict[str, set[str]]:
    """The modules of the tutorial, each with the names that it binds."""
    names: dict[str, set[str]] = {}
    for block in blocks_of("tutorial.md", "python"):
        if found := re.match(r"# (\w+)\.py\n", block):
            bound = {target.id for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Assign)
                     for target in node.targets if isinstance(target, ast.Name)}  # fmt: skip
            names.setdefault(found[1], set()).update(bound)
    return names


(COMPOSE,) = map(yaml.safe_load, blocks_of("howto/compose.md", "yaml"))
MANIFESTS, LIVENESS = (list(yaml.safe_load_all(block)) for block in blocks_of("howto/kubernetes.md", "yaml"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = [name for name, service in SERVICES.items() if "build" in service]


def pods() -> Iterator[dict[str, Any]]:
    for manifest in MANIFESTS:
        yield manifest["spec"]["template"]["spec"]


def commands() -> Iterator[list[str]]:
    for name in OURS:
        yield shlex.split(SERVICES[name]["command"])
    for pod in pods():
        yield from (container["command"] for container in pod["containers"])
    for cell in re.findall(r"`\[(celery, [^]]+)\]`", (DOCS / "howto/kubernetes.md").read_text()):
        yield cell.split(", ")


@pytest.mark.parametrize("command", [*commands()], ids=" ".join)
def test_a_command_names_an_application_of_the_tutorial(command: list[str]) -> None:
    program, *words = command
    if program == "gunicorn":
        module, name = words[-1].split(":")
        assert name in modules()[module]
    elif program == "celery":
        assert words[0] == "-A"
        assert "app" in modules()[words[1]]
    else:
        assert command == ["govredis", "migrate"]


def test_the_probe_of_a_liveness_file_fails_where_it_is_old_or_missing(tmp_path: Path) -> None:
    probe = LIVENESS[0]["livenessProbe"]
    program, option, line = probe["exec"]["command"]
    file = tmp_path / "alive"
    assert str(line).count("/tmp/alive") == 1

    def passes() -> bool:
        done = subprocess.run([program, option, line.replace("/tmp/alive", str(file))], capture_output=True, timeout=60)
        return done.returncode == 0

    assert not passes()
    file.touch()
    assert passes()
    os.utime(file, (file.stat().st_mtime - 300,) * 2)
    assert not passes()


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_waits_for_services_that_can_be_waited_for(name: str) -> None:
    for other, waits in SERVICES[name].get("depends_on", {}).items():
        if waits["condition"] == "service_healthy":
            assert "healthcheck" in SERVICES[other]
        else:
            assert waits["condition"] == "service_completed_successfully"
            assert SERVICES[other]["restart"] == "no"  # or else it never completes


@pytest.mark.parametrize("name", SERVICES)
def test_the_volumes_of_a_service_are_declared(name: str) -> None:
    assert {volume.split(":")[0] for volume in SERVICES[name].get("volumes", ())} <= set(COMPOSE["volumes"])


@pytest.mark.parametrize("name", OURS)
def test_a_service_has_settings_of_ours_that_lead_to_services(name: str) -> None:
    environment = SERVICES[name]["environment"]
    assert set(environment) <= SETTINGS
    hosts = {urlsplit(value).hostname for value in environment.values() if "://" in value}
    assert len(hosts) == 3
    assert hosts <= set(SERVICES)


def test_the_containers_share_a_lock_folder() -> None:
    folders = {SERVICES[name]["environment"]["GOVREDIS_LOCK_FOLDER"] for name in OURS}
    assert len(folders) == 1
    (path,) = {volume.split(":")[1] for name in OURS for volume in SERVICES[name]["volumes"]}
    assert folders.pop().startswith(f"{path}/")


def test_the_image_has_the_applications_and_the_folder() -> None:
    (dockerfile,) = blocks_of("howto/compose.md", "dockerfile")
    assert {f"{module}.py" for module in ("shop", "jobs")} <= set(dockerfile.split())
    assert "install -d -o shop -g shop /data" in dockerfile


def test_the_probes_ask_for_endpoints() -> None:
    site = Flask("probed")
    with GovRedis.in_memory() as gov:
        FlaskGovRedis(site, gov)
        (healthcheck,) = (SERVICES[name]["healthcheck"]["test"] for name in OURS if "healthcheck" in SERVICES[name])
        asked = {urlsplit(url).path for url in re.findall(r"http://[^']+", healthcheck)}
        for pod in pods():
            for container in pod["containers"]:
                probes = (container[name] for name in ("livenessProbe", "readinessProbe") if name in container)
                asked |= {probe["httpGet"]["path"] for probe in probes}
        # /govredis/ready would be 503 while Redis is away, under GOVREDIS_LOCK_FALLBACK=fail.
        assert asked == {"/govredis/live"}
        assert site.test_client().get("/govredis/live").status_code == 200


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda manifest: manifest["kind"])
def test_a_manifest_agrees_with_itself(manifest: dict[str, Any]) -> None:
    spec, template = manifest["spec"], manifest["spec"]["template"]
    assert spec.get("selector", {}).get("matchLabels") == template.get("metadata", {}).get("labels")
    volumes = {volume["name"] for volume in template["spec"].get("volumes", ())}
    for container in template["spec"]["containers"]:
        assert {mount["name"] for mount in container.get("volumeMounts", ())} == volumes
        assert {variable["name"] for variable in container.get("env", ())} <= SETTINGS
        assert container["envFrom"] == [{"secretRef": {"name": "shop"}}]
