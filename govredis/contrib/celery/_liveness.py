"""The liveness file: a worker and beat touch it with each heartbeat, for Kubernetes to look at."""

from __future__ import annotations

import logging
import os
from weakref import WeakSet

from celery import Celery

from ._gov import gov_of, liveness_file_of

log = logging.getLogger("govredis")

_warned: WeakSet[Celery] = WeakSet()


def touch(app: Celery) -> None:
    """Touch the file that the app's settings name, if any. Where that fails it is counted, and said once."""
    path = liveness_file_of(app)
    if path is None:
        return
    try:
        with open(path, "ab"):
            os.utime(path)
    except OSError as error:
        gov_of(app).counters.add("celery.untouched")
        if app not in _warned:
            _warned.add(app)
            log.warning("govredis_liveness_file %s cannot be touched: %s", path, error.strerror or error)
