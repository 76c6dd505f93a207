"""A column of bias labels: categories or bins."""

from __future__ import annotations

import dataclasses
import itertools

from lnl_ext.data.values import is_missing
from lnl_ext.errors import UserError

__all__ = ["BiasColumn"]


@dataclasses.dataclass(frozen=True)
class BiasColumn:
    """A column of bias labels: categories, or numbers sorted into bins.

    Attributes
    ----------
    name : str
        Of the column.
    edges : tuple of float
        For numbers: edges e0 < e1 < ... of bins [e0, e1), [e1, e2) ..., the last one closed. None
        for categories.
    """

    name: str
    edges: tuple[float, ...] = ()

    @classmethod
    def parse(cls, text: str) -> BiasColumn:
        """Read ``"hospital"`` or ``"age:bins=0,20,40,60"``.

        Raises
        ------
        UserError
            If the edges are not two or more rising numbers.
        """
        name, separator, edges = text.partition(":bins=")
        if not separator:
            return cls(name)
        try:
            numbers = tuple(float(edge) for edge in edges.split(","))
        except ValueError:
            numbers = ()
        rising = all(low < high for low, high in itertools.pairwise(numbers))
        if len(numbers) < 2 or not rising:
            raise UserError(
                f"bias column {text!r}: the bins are {edges!r}, expected two or more rising edges, "
                "as in age:bins=0,20,40,60 (three bins; inf is allowed)"
            )
        return cls(name, numbers)

    @property
    def bins(self) -> list[str]:
        """Names of the bins in order; none for categories."""
        pairs = list(itertools.pairwise(self.edges))
        closed = [")"] * (len(pairs) - 1) + ["]"]
        return [
            f"[{_exact(a)}, {_exact(b)}{end}"
            for (a, b), end in zip(pairs, closed, strict=bool(pairs))
        ]

    def value(self, cell: str) -> str | None:
        """Return the class of a cell, None where it is missing.

        Raises
        ------
        ValueError
            Of numbers: it is none, or lies in no bin; the message says what is wanted.
        """
        if is_missing(cell):
            return None
        if not self.edges:
            return cell
        try:
            number = float(cell)
        except ValueError:
            raise ValueError("expected a number") from None
        if not self.edges[0] <= number <= self.edges[-1]:
            raise ValueError(
                f"expected a number from {_exact(self.edges[0])} to {_exact(self.edges[-1])}: "
                "widen the bins or leave the cell empty"
            )
        for name, edge in zip(self.bins, self.edges[1:], strict=True):
            if number < edge:
                return name
        return self.bins[-1]


def _exact(number: float) -> str:
    """Return the shortest text that is this number and no other."""
    return repr(number).removesuffix(".0")
