"""The topologies of Redis that a run may use."""

from __future__ import annotations

from .cluster import Cluster
from .faults import World
from .one_server import OneServer
from .sentinel import Sentinel

TOPOLOGIES: dict[str, type[World]] = {"server": OneServer, "cluster": Cluster, "sentinel": Sentinel}


def faults_of(topology: str) -> set[str]:
    return {name for names in TOPOLOGIES[topology].parts.values() for name in names}
