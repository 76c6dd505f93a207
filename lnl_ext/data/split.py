"""A held-out part of a data set in which every label and every bias group is found again."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence

from lnl_ext.errors import UserError

__all__ = ["balanced_split", "stratified_split"]


def stratified_split(
    labels: Sequence[object], bias: Sequence[Sequence[object]], fraction: float, seed: int
) -> tuple[list[int], list[int]]:
    """Split samples into two parts, stratified by label and bias.

    The samples are put in order of label, first bias, second bias ..., by chance within a group,
    and taken at equal distances from there. So each label has its share in the second part, to
    within a sample, and so has each group of label and first bias, and so on, however small the
    groups get. Then every label that has two samples or more gets one in each part, and so does
    every group of a label and the value of a bias, as far as groups of several biases allow.

    Parameters
    ----------
    labels
        Of each sample.
    bias
        For each bias, its value of each sample; None is a value like any other.
    fraction
        Size of the second part, between 0 and 1.
    seed
        The same seed gives the same split, whatever the version of Python.

    Returns
    -------
    tuple of two lists of int
        Sample numbers of the first and the second part, in rising order.

    Raises
    ------
    UserError
        ``fraction`` is not between 0 and 1, or there is no sample for one of the parts.
    """
    _check(fraction)
    chance = random.Random(seed)
    draws = [chance.random() for _ in labels]
    kinds = _kinds(labels, bias)
    order = sorted(range(len(labels)), key=lambda row: (kinds[row], draws[row]))
    held: set[int] = set()
    due = chance.random()
    for row in order:
        due += fraction
        if due >= 1:
            due -= 1
            held.add(row)
    groups: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for row in order:
        for number, value in enumerate(kinds[row][1:]):
            groups[(kinds[row][0], number, value)].append(row)
    for row in order:  # after the groups: a label has the last word
        groups[(kinds[row][0],)].append(row)
    for group in groups.values():
        inside = [row for row in group if row in held]
        first = min(group, key=lambda row: draws[row])
        if len(inside) == len(group):
            # Also a single sample, which cannot be in both: to learn from it is of more use.
            held.discard(first)
        elif len(group) > 1 and not inside:
            held.add(first)
    if not held or len(held) == len(labels):
        raise UserError(
            f"{len(labels)} samples cannot be split with a validation fraction of {fraction:g}"
        )
    return [row for row in range(len(labels)) if row not in held], sorted(held)


def balanced_split(
    labels: Sequence[object], bias: Sequence[Sequence[object]], fraction: float, seed: int
) -> tuple[list[int], list[int]]:
    """Split samples so that the second part has as many of every group of label and bias.

    Of a group that has too few it gets half, at most: the first part is to learn from the rest.

    Parameters
    ----------
    labels, bias, fraction, seed
        As in `stratified_split`; all biases together make the groups. The second part is smaller
        than the fraction where there are small groups.

    Returns
    -------
    tuple of two lists of int
        Sample numbers of the first and the second part, in rising order.

    Raises
    ------
    UserError
        As `stratified_split`.
    """
    _check(fraction)
    chance = random.Random(seed)
    groups: dict[tuple[tuple[str, str], ...], list[int]] = defaultdict(list)
    for row, kind in enumerate(_kinds(labels, bias)):
        groups[kind].append(row)
    wanted = max(1, round(fraction * len(labels) / max(1, len(groups))))
    held: set[int] = set()
    for kind in sorted(groups):
        held.update(chance.sample(groups[kind], min(wanted, len(groups[kind]) // 2)))
    if not held:
        raise UserError(
            f"{len(labels)} samples cannot be split: no group of label and bias has two"
        )
    return [row for row in range(len(labels)) if row not in held], sorted(held)


def _check(fraction: float) -> None:
    if not 0 < fraction < 1:
        raise UserError(f"validation is {fraction:g}, expected a fraction between 0 and 1")


def _kinds(
    labels: Sequence[object], bias: Sequence[Sequence[object]]
) -> list[tuple[tuple[str, str], ...]]:
    """Return the group of every sample; with the types, as None is not "None"."""
    return [
        tuple((type(value).__name__, str(value)) for value in values)
        for values in zip(labels, *bias, strict=True)
    ]
