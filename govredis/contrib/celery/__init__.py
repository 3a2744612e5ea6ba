"""Celery: our tasks and their schedule in a user's app, and decorators for its tasks."""

from ._app import init_celery
from ._booked import apply_booked
from ._decorators import exclusive, rate_limited

__all__ = ["apply_booked", "exclusive", "init_celery", "rate_limited"]
