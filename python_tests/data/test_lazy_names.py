"""The readers of the paper's data are in lnl_ext.data, and cost nothing until they are used."""

from __future__ import annotations

import subprocess
import sys

import pytest

import lnl_ext.data
from lnl_ext.paper.colored_mnist import ColoredMNIST


def test_the_papers_parts_are_imported_at_their_first_use() -> None:
    program = (
        "import sys, lnl_ext.data, lnl_ext.data.images, lnl_ext.data.table\n"
        "assert not [name for name in sys.modules if name.startswith('lnl_ext.paper')]\n"
        "lnl_ext.data.ColoredMNIST\n"
        "assert 'lnl_ext.paper.colored_mnist' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_every_name_is_there_and_listed() -> None:
    assert lnl_ext.data.ColoredMNIST is ColoredMNIST
    assert set(lnl_ext.data.__all__) <= set(dir(lnl_ext.data))
    assert all(getattr(lnl_ext.data, name).__name__ == name for name in lnl_ext.data.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        lnl_ext.data.nothing  # noqa: B018
