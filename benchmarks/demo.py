"""Train `baseline` and `lnl` on coloured digits, compare them in one table, and draw it.

    python benchmarks/demo.py

Under 10 minutes on two cores; ``--quick`` takes about one, on less data, and shows less.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from recording.options import command


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, print one table, write the figure."""
    parser = command(__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="about a minute, on less data")
    parser.add_argument(
        "--output", type=Path, default=Path("demo_output"), help="folder for demo.png, runs.jsonl"
    )
    options = parser.parse_args(arguments)
    from digits.demo import show

    show(options.seed, options.quick, options.output)


if __name__ == "__main__":
    main()
