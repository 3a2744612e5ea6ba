"""The settings of ours in an application's own configuration."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any

from ..api import GovRedis
from ..config import Config
from ..errors import ConfigurationError


def gov_of_settings(settings: Mapping[str, Any], prefix: str, also: Collection[str]) -> GovRedis | None:
    """A GovRedis of the application's own if it has settings for one, put over the environment's; else None.

    Args:
        settings: the application's configuration.
        prefix: of ours; followed by the name of a field of Config, in the prefix's case.
        also: the names after the prefix that are not Config's.

    Raises ConfigurationError for a bad value, and for a name with our prefix that is none of ours.
    """
    known = {f.name for f in fields(Config)}
    given = {name[len(prefix) :].lower() for name in settings if name.startswith(prefix)}
    unknown = sorted(given - known - set(also))
    if unknown:

        def shown(name: str) -> str:
            return prefix + (name.upper() if prefix.isupper() else name)

        wanted = ", ".join(sorted(map(shown, {*known, *also})))
        raise ConfigurationError(f"{shown(unknown[0])} is no setting; these are: {wanted}")
    return GovRedis(Config.from_app(settings, prefix)) if given & known else None
