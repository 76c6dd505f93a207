"""Files that are whole or as they were, whenever the process ends."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lnl_ext.errors import UserError

__all__ = ["check_names", "replacing", "write_whole"]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path, whose file takes the place of ``path`` if nothing is raised.

    What is no file, as ``/dev/stdout``, is given itself.

    Raises
    ------
    OSError
        It cannot be written; the message names ``path``.
    """
    if path.exists() and not path.is_file():
        yield path
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        # A full disk names no file, and the temporary one means nothing to a user.
        error.filename, error.filename2 = str(path), None
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a text file, UTF-8, so that ``path`` holds all of it or what it held before.

    Raises
    ------
    OSError
        It cannot be written (a full disk, no permission).
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


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
