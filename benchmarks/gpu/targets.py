"""What the times on a GPU are held against. Needs neither the package nor torch."""

from __future__ import annotations

from typing import Any

BANDWIDTH_TARGET = 0.85
"""Least bandwidth of ours over that of a copy in the same run, for the loss of logits."""
TARGETS = {"eager": 3.0, "compile": 1.2}
"""Least time of a peer over ours, likewise."""
LINEAR_TARGETS = {"eager": 0.97, "compile": 0.97}
"""Likewise for the linear head: no slower than either, within 3 %."""
MEMORY_TARGET = 8.0
"""Least extra memory of eager over ours, for heads of MANY_CLASSES."""
MANY_CLASSES = 1000
LARGE = 64 * 2**20
"""Bytes of logits from which the bandwidth target holds."""

Rows = list[dict[str, Any]]


def judge(loss_rows: Rows, linear_rows: Rows) -> list[dict[str, Any]]:
    """Hold rows against the targets: case, peer, the ratio wanted and got, whether it is met."""
    judged: list[dict[str, Any]] = []

    def hold(result: dict[str, Any], what: str, wanted: float, got: float) -> None:
        judged.append(
            {
                "case": result["case"],
                "target": what,
                "wanted": wanted,
                "got": round(got, 3),
                "met": got >= wanted,
            }
        )

    for result in loss_rows:
        if result["bytes"] >= LARGE:
            hold(result, "bandwidth over a copy's", BANDWIDTH_TARGET, result["bandwidth"])
    for rows, targets in ((loss_rows, TARGETS), (linear_rows, LINEAR_TARGETS)):
        for result in rows:
            for peer, wanted in targets.items():
                if peer in result["ratios"]:
                    got = result["ratios"][peer]["median"]
                    hold(result, f"time of {peer} over ours", wanted, got)
    for result in linear_rows:
        if result["classes"] >= MANY_CLASSES:
            memory = result["extra_bytes"]
            hold(
                result,
                "extra memory of eager over ours",
                MEMORY_TARGET,
                memory["eager"] / max(1, memory["fused"]),
            )
    return judged
