"""Celery: our tasks and their schedule in a user's app, and decorators for its tasks."""

from ._app import init_celery
from ._decorators import exclusive, rate_limited
from ._events import on_event
from ._reserved import apply_reserved

__all__ = ["apply_reserved", "exclusive", "init_celery", "on_event", "rate_limited"]
