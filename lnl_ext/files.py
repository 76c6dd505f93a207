"""Files that are whole or as they were, whenever the process ends, and numbers as JSON has them."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from lnl_ext.errors import UserError

__all__ = ["check_names", "finite_or_none", "replacing", "write_state", "write_whole"]


@contextlib.contextmanager
def replacing(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Give a temporary path, whose file takes the place of ``path`` if nothing is raised.

    The file is flushed to the disk before it takes the place, so that a power cut leaves the old
    contents or the new ones as well. The folder is made if missing. What is no regular file, such
    as ``/dev/stdout``, is given itself.

    Parameters
    ----------
    path
        The file to replace.
    shared
        Whether several processes may write this file at once. Each then has a temporary file of its
        own; otherwise its name is fixed, so that a killed process leaves no more than one.

    Raises
    ------
    OSError
        It cannot be written; the message names ``path``.
    """
    if path.exists() and not path.is_file():
        yield path
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp" if shared else f".{path.name}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        # A full disk names no file, and the temporary one means nothing to a user.
        error.filename, error.filename2 = str(path), None
        raise
    finally:
        with contextlib.suppress(OSError):  # which would hide why it could not be written
            temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make the new directory entry survive a power cut, where folders can be opened (POSIX)."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, text: str) -> None:
    """Write a text file, UTF-8, so that ``path`` holds all of it or what it held before.

    Raises
    ------
    OSError
        It cannot be written (a full disk, no permission).
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Write with ``torch.save`` so that ``path`` holds all of it or what it held before.

    Raises
    ------
    OSError
        It cannot be written (a full disk, no permission).
    """
    import torch  # here: the command's help, which needs this module, does without it

    with replacing(path) as temporary, temporary.open("wb") as file:
        watched = _Watched(file)
        try:
            torch.save(state, watched)  # type: ignore[arg-type]
        except RuntimeError as error:  # torch's hides the file's own ("unexpected pos")
            raise (watched.error or error) from None


class _Watched:
    """A file for writing that remembers the first error."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, content: bytes) -> int:
        try:
            return self._file.write(content)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self._file.flush()


def finite_or_none(value: Any) -> Any:
    """Return dictionaries and lists with None for NaN and infinity, which JSON lacks."""
    if isinstance(value, dict):
        return {name: finite_or_none(item) for name, item in value.items()}
    if isinstance(value, list):
        return [finite_or_none(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_names(paths: Iterable[str]) -> None:
    """Refuse names that a table, which is UTF-8, cannot hold.

    Raises
    ------
    UserError
        A path has bytes that are not UTF-8, as those of an archive from elsewhere may.
    """
    for path in paths:
        try:
            path.encode()
        except UnicodeEncodeError:
            shown = os.fsencode(path).decode(errors="backslashreplace")
            raise UserError(
                f"the name of {shown} is not UTF-8 and could not be written into a table: rename it"
            ) from None
