"""What a run found, for people: figures and a self-contained page."""

from .environment import environment
from .figures import confusion_figure, embedding_figure, history_figure, png
from .groups import ColumnReport, groups_of
from .page import Page
from .run_page import PAGE, Confusion, Leak, RunSummary, trainer_settings, write_run_page
from .tables import Table

__all__ = [
    "PAGE",
    "ColumnReport",
    "Confusion",
    "Leak",
    "Page",
    "RunSummary",
    "Table",
    "confusion_figure",
    "embedding_figure",
    "environment",
    "groups_of",
    "history_figure",
    "png",
    "trainer_settings",
    "write_run_page",
]
