"""What a run found, for people: figures and a self-contained page."""

from lnl_ext.measuring.audit_figure import audit_figure
from lnl_ext.reporting.environment import environment
from lnl_ext.reporting.figures import (
    confusion_figure,
    embedding_figure,
    history_figure,
    png,
)
from lnl_ext.reporting.named_groups import NamedGroups, groups_of, with_interval
from lnl_ext.reporting.page import Page
from lnl_ext.reporting.run_page import (
    PAGE,
    Confusion,
    Leak,
    RunSummary,
    trainer_settings,
    write_run_page,
)
from lnl_ext.reporting.tables import Table

__all__ = [
    "PAGE",
    "Confusion",
    "Leak",
    "NamedGroups",
    "Page",
    "RunSummary",
    "Table",
    "audit_figure",
    "confusion_figure",
    "embedding_figure",
    "environment",
    "groups_of",
    "history_figure",
    "png",
    "trainer_settings",
    "with_interval",
    "write_run_page",
]
