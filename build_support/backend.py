"""PEP 517 backend: setuptools, building against the torch of the environment to be installed into.

An extension fits only the torch it was compiled with. pip compiles in an isolated environment that
holds the build requirements and nothing else; a torch listed among them would be the newest one,
not the user's. The isolated interpreter is that of the target environment, though, so that its
site-packages are known: torch is taken from there when it is installed, and is a build requirement
only when it is not.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import site
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import TypeAlias

import setuptools
from setuptools import build_meta
from setuptools.build_meta import get_requires_for_build_sdist

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

Settings: TypeAlias = "Mapping[str, str | list[str] | None] | None"

MINIMUM_TORCH = (2, 11)
MINIMUM_SETUPTOOLS = (64, 0)  # the first that builds editable wheels
SETUPTOOLS_WITH_WHEEL = (70, 1)  # older ones need the package wheel for it
TORCH_REQUIREMENT = "torch>={}.{}".format(*MINIMUM_TORCH)


def release(text: str) -> tuple[int, int]:
    """Return the first two numbers of a version, (2, 11) for "2.11.1+cu130"."""
    major, minor = re.findall(r"\d+", text)[:2]
    return int(major), int(minor)


def target_site_packages() -> list[str]:
    """Return the package folders of the environment that the interpreter belongs to.

    A virtual environment that shows the system's packages has theirs as well, and outside of a
    virtual environment the user's own folder comes first, as in the interpreter's own search.
    """
    folders = site.getsitepackages()
    if sys.prefix == sys.base_prefix:
        folders.insert(0, site.getusersitepackages())
    return folders


def find_torch() -> bool:
    """Make the installed torch importable, from the target environment if need be.

    Returns
    -------
    bool
        Whether a torch is installed that lnl_ext supports. An older one does not count: pip is
        about to replace it, since lnl_ext requires a newer one.
    """
    if importlib.util.find_spec("torch") is None:
        for folder in target_site_packages():
            site.addsitedir(folder)
    try:
        return release(version("torch")) >= MINIMUM_TORCH
    except PackageNotFoundError:
        return False


def check_setuptools() -> None:
    """Refuse a setuptools that cannot build wheels; only unisolated builds can have one."""
    found = release(setuptools.__version__)
    if found < MINIMUM_SETUPTOOLS or (
        found < SETUPTOOLS_WITH_WHEEL and importlib.util.find_spec("wheel") is None
    ):
        wanted = ".".join(map(str, SETUPTOOLS_WITH_WHEEL))
        raise SystemExit(
            f"error: building lnl_ext needs setuptools >= {wanted}, and this environment has "
            f"{setuptools.__version__}: run `pip install --upgrade setuptools`, or leave out "
            "--no-build-isolation"
        )


@contextmanager
def writable_source() -> Iterator[None]:
    """Stand in a copy of the source tree where it cannot be written to, as setuptools does."""
    source = os.getcwd()
    if os.access(source, os.W_OK):
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = os.path.join(folder, "source")
        shutil.copytree(source, copy, ignore=shutil.ignore_patterns(".git", ".venv*", "build"))
        for path, _, _ in os.walk(copy):
            os.chmod(path, 0o755)
        os.chdir(copy)
        try:
            yield
        finally:
            os.chdir(source)


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    """Return torch where the target environment has none to build against."""
    return [] if find_torch() else [TORCH_REQUIREMENT]


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    """Return torch where the target environment has none to build against."""
    return get_requires_for_build_wheel(config_settings)


def prepare_metadata_for_build_wheel(
    metadata_directory: str, config_settings: Settings = None
) -> str:
    """Write the metadata; nothing is compiled."""
    check_setuptools()
    with writable_source():
        return build_meta.prepare_metadata_for_build_wheel(metadata_directory, config_settings)


def build_sdist(sdist_directory: str, config_settings: Settings = None) -> str:
    """Pack the source distribution."""
    with writable_source():
        return build_meta.build_sdist(sdist_directory, config_settings)


def prepare_metadata_for_build_editable(
    metadata_directory: str, config_settings: Settings = None
) -> str:
    """Write the metadata; nothing is compiled."""
    check_setuptools()
    return build_meta.prepare_metadata_for_build_editable(metadata_directory, config_settings)


def build_wheel(
    wheel_directory: str,
    config_settings: Settings = None,
    metadata_directory: str | None = None,
) -> str:
    """Compile against the torch that find_torch found and pack the wheel."""
    check_setuptools()
    find_torch()
    with writable_source():
        return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(
    wheel_directory: str,
    config_settings: Settings = None,
    metadata_directory: str | None = None,
) -> str:
    """Compile in place against the torch that find_torch found."""
    check_setuptools()
    find_torch()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
