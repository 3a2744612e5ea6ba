"""Health: HealthMonitor, its report, and the history of its reports."""

from .history import HistoryPoint
from .monitor import HealthMonitor
from .report import Check, HealthReport

__all__ = ["Check", "HealthMonitor", "HealthReport", "HistoryPoint"]
