"""The command as one of torchrun's two processes; process 1 has trouble (`forked_runs`).

``torchrun ... trouble_in_rank.py NAME NUMBER FLAGS...``
"""

from __future__ import annotations

import os
import sys

from forked_runs import TROUBLES

from lnl_ext.cli.main import main

if __name__ == "__main__":
    name, number, *flags = sys.argv[1:]
    if os.environ["RANK"] == "1":
        TROUBLES[name](int(number))
    sys.exit(main(flags))
