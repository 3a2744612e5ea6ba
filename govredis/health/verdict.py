"""The verdict: what makes a health report fail is decided here and nowhere else.

| found | verdict |
| --- | --- |
| Redis is away, a fallback covers every feature | warn |
| Redis is away, and the settings leave a feature without a fallback | fail |
| PostgreSQL is away, or only reads | warn |
| both are away, or Redis is and no PostgreSQL is configured | fail: limits are per process, metadata has no source |
| a server answers with an error, or rejects our credentials | fail |
| our tables are missing or not up to date | fail |
| all connections of this process are in use | warn |
| anything else that does not pass | warn |
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .._pool import PoolExhausted
from ..config import Config
from ..errors import BackendError, BackendUnavailable, ConfigurationError
from .report import Check, Status

OLD_TABLES: Status = "fail"
_SEVERITY: dict[Status, int] = {"pass": 0, "warn": 1, "fail": 2}


def uncovered_features(config: Config) -> list[str]:
    """The features that the settings leave without a fallback while Redis is away."""
    features = ["locks"] if config.lock_fallback == "fail" else []
    if config.limit_fallback == "deny" and config.database_url is None:
        features.append("limits")
    return features


def of_error(error: BackendError | ConfigurationError, uncovered: Sequence[str] = ()) -> Status:
    """The status of a server that raised `error`; `uncovered` are the features that have no fallback for it."""
    if isinstance(error, PoolExhausted):
        return "warn"
    if isinstance(error, BackendUnavailable):
        return "fail" if uncovered else "warn"
    return "fail"


def of_all(checks: Iterable[Check], redis: Check, postgres: Check) -> Status:
    """The status of a report with these checks, those of the two servers among them."""
    if uncovered_by_postgres(redis, postgres):
        return "fail"
    return max((check.status for check in checks), key=_SEVERITY.__getitem__)


def uncovered_by_postgres(redis: Check, postgres: Check) -> str:
    """The words for the output of a Redis that is away, where no PostgreSQL covers it; "" in all other cases."""
    if not is_away(redis):
        return ""
    if not postgres.data["configured"]:
        return ", and no PostgreSQL covers it"
    return ", and PostgreSQL is away too" if is_away(postgres) else ""


def is_away(server: Check) -> bool:
    return "away_for" in server.data
