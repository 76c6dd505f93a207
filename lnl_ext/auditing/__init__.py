"""The audit: what can still be told about a bias from features, and who gets the wrong answers."""

from .audit import audit
from .report import AuditReport, BiasAudit, GroupAudit, Interval, ProbeAudit

__all__ = ["AuditReport", "BiasAudit", "GroupAudit", "Interval", "ProbeAudit", "audit"]
