"""The audit: what can still be told about a bias from features, and who gets the wrong answers."""

from lnl_ext.measuring.audit import audit
from lnl_ext.measuring.report import AuditReport, BiasAudit, GroupAudit, Interval, ProbeAudit

__all__ = ["AuditReport", "BiasAudit", "GroupAudit", "Interval", "ProbeAudit", "audit"]
