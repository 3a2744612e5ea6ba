"""Health: HealthMonitor and its report."""

from .monitor import HealthMonitor
from .report import Check, HealthReport

__all__ = ["Check", "HealthMonitor", "HealthReport"]
