"""Health: HealthMonitor and its report."""

from .monitor import Check, HealthMonitor, HealthReport

__all__ = ["Check", "HealthMonitor", "HealthReport"]
