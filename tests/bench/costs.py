"""The cost of a call: microseconds, CPU of the client, CPU of Redis; all contestants of all operations in turns."""

from __future__ import annotations

import re
import time
from typing import Any

from .operations import OPERATIONS, contestants
from .samples import figure
from .sites import Call, Raw, Site

#: The measures of a call, in microseconds. `commands_us`: as commandstats has it, of the commands that were sent.
MEASURES = ("wall_us", "client_us", "server_us", "commands_us")

Samples = dict[str, dict[str, dict[str, list[float]]]]


class ServerCost:
    """The use of CPU by Redis's process, by its own account, asked over a connection of its own."""

    def __init__(self, url: str) -> None:
        self._raw = Raw(url)

    def cpu(self) -> float:
        """Microseconds of CPU since its start."""
        said = self._raw.ask("INFO", "cpu")
        return sum(float(used) for used in re.findall(r"used_cpu_(?:user|sys):([\d.]+)", said)) * 1e6

    def of_commands(self) -> dict[str, int]:
        """Microseconds by command since its start."""
        said = self._raw.ask("INFO", "commandstats")
        return {name: int(spent) for name, spent in re.findall(r"cmdstat_([^:]+):calls=\d+,usec=(\d+)", said)}

    def close(self) -> None:
        self._raw.close()


def sent_commands(site: Site, call: Call) -> set[str]:
    """The names of the commands that `call` sends: not of those that its scripts run, which count in the script."""
    seen = set()
    with site.plain.monitor() as monitor:
        call()
        site.raw.ask("ECHO", "that was all")
        while (said := monitor.next_command())["command"] != "ECHO that was all":
            if said["client_type"] != "lua":
                seen.add(said["command"].split()[0].lower())
    return seen


def samples(site: Site, rounds: int, turn: int) -> Samples:
    """By operation, contestant and measure, one sample a round: the mean of a turn."""
    server = ServerCost(site.url)
    calls = {(operation, who): make(site) for operation in OPERATIONS for who, make in contestants(operation).items()}
    found: Samples = {}
    names = {}
    for (operation, who), call in calls.items():
        for _ in range(3):
            call()
        names[operation, who] = sent_commands(site, call)
        found.setdefault(operation, {})[who] = {measure: [] for measure in MEASURES}
    for _ in range(rounds):
        for (operation, who), call in calls.items():
            mine = found[operation][who]
            commands, cpu = server.of_commands(), server.cpu()
            began, client = time.perf_counter_ns(), time.process_time_ns()
            for _ in range(turn):
                call()
            mine["client_us"].append((time.process_time_ns() - client) / 1000 / turn)
            mine["wall_us"].append((time.perf_counter_ns() - began) / 1000 / turn)
            mine["server_us"].append((server.cpu() - cpu) / turn)
            after = server.of_commands()
            spent = sum(after.get(name, 0) - commands.get(name, 0) for name in names[operation, who])
            mine["commands_us"].append(spent / turn)
    return found


def measure(found: Samples) -> dict[str, Any]:
    return {
        operation: {who: {name: figure(of) for name, of in measured.items()} for who, measured in by.items()}
        for operation, by in found.items()
    }
