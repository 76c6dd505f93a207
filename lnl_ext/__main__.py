"""``python -m lnl_ext``: the ``lnl`` command."""

from __future__ import annotations

import sys

from lnl_ext.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
