"""The images in a folder, without what systems and programs hide there."""

from __future__ import annotations

import os
from pathlib import Path

from lnl_ext.data.images import IMAGE_SUFFIXES

__all__ = ["find_images", "is_hidden"]

# Folders and files of macOS, Windows, Synology's and other file servers, in small letters.
_OF_SYSTEMS = frozenset(
    {"__macosx", "$recycle.bin", "system volume information", "thumbs.db", "ehthumbs.db"}
    | {"desktop.ini", "@eadir", "#recycle", "lost+found"}
)
_SHOWN = 5  # names in a note


def is_hidden(path: Path) -> bool:
    """Tell whether a relative path leads to a hidden file, or through a hidden folder."""
    return _hidden_part(path) is not None


def _hidden_part(path: Path) -> str | None:
    hidden = (p for p in path.parts if p.startswith(".") or p.lower() in _OF_SYSTEMS)
    return next(hidden, None)


def find_images(root: Path, *, classes: bool = False) -> tuple[list[Path], list[str]]:
    """Return the image files below a folder, in order, and notes that count what is left out.

    Parameters
    ----------
    root
        An absolute path.
    classes
        Look in its subfolders only.
    """
    files = sorted(
        Path(folder, name) for folder, _, names in os.walk(root, followlinks=True) for name in names
    )
    images, others, hidden = [], 0, []
    for file in files:
        inside = file.relative_to(root)
        part = _hidden_part(inside)
        if part is not None:
            hidden.append(part)
        elif classes and len(inside.parts) == 1:
            continue
        elif file.suffix.lower() in IMAGE_SUFFIXES:
            images.append(file)
        else:
            others += 1
    notes = []
    if hidden:
        names = sorted(set(hidden))
        shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
        notes.append(f"Left out: {len(hidden)} hidden file{'s' * (len(hidden) > 1)} ({shown})")
    if others:
        counted = f"{others} file{'s' * (others > 1)}"
        notes.append(
            f"Left out: {counted} without an image extension (list images among them in a CSV file)"
        )
    return images, notes
