"""The audit: what can still be told about a bias from features, and who gets the wrong answers."""

from lnl_ext.measuring.audit import TooFewSamplesError, audit
from lnl_ext.measuring.groups import GroupAccuracy
from lnl_ext.measuring.report import AuditReport, BiasAudit, Interval, ProbeAudit

__all__ = [
    "AuditReport",
    "BiasAudit",
    "GroupAccuracy",
    "Interval",
    "ProbeAudit",
    "TooFewSamplesError",
    "audit",
]
