"""The audit: how well a bias can still be predicted from features, and the accuracy by group."""

from lnl_ext.measuring.audit import TooFewSamplesError, audit
from lnl_ext.measuring.audit_report import AuditReport, BiasAudit, ProbeAudit
from lnl_ext.measuring.groups import GroupAccuracy, demographic_parity_difference
from lnl_ext.measuring.interval import Interval

__all__ = [
    "AuditReport",
    "BiasAudit",
    "GroupAccuracy",
    "Interval",
    "ProbeAudit",
    "TooFewSamplesError",
    "audit",
    "demographic_parity_difference",
]
