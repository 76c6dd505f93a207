"""What a run found, for people: figures and a self-contained page."""

from .environment import environment
from .figures import confusion_figure, embedding_figure, history_figure, png
from .page import Page

__all__ = [
    "Page",
    "confusion_figure",
    "embedding_figure",
    "environment",
    "history_figure",
    "png",
]
