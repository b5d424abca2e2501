"""Columns of text whose widths are fixed in advance or read off the rows."""

from __future__ import annotations

from collections.abc import Sequence


def widths(rows: Sequence[Sequence[str]]) -> list[int]:
    """The width of each column; the last one needs none."""
    columns = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [*columns[:-1], 0]


def line(cells: Sequence[str], columns: Sequence[int]) -> str:
    """One row, cells padded to their columns."""
    return "  ".join(f"{cell:<{width}}" for cell, width in zip(cells, columns, strict=True)).rstrip()


def lines(rows: Sequence[Sequence[str]], *, indent: str = "") -> str:
    """Rows that are all known, the first one the header."""
    columns = widths(rows)
    return "\n".join(indent + line(row, columns) for row in rows)
