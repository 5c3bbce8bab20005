"""How much of a matrix that must never be whole (logits, scores) exists at a time: for the losses.

A part of all, within limits: below the lower one a GPU would be idle, above the upper one its products get no faster.
"""

PARTS = 8
FEWEST, MOST = 1 << 25, 1 << 29  # elements
SHORTEST = 1024  # rows, or columns, of which a product is made at full rate
MULTIPLE = 128  # of rows, or columns


def elements(rows: int, columns: int) -> int:
    """About how many elements exist at a time."""
    return min(max(rows * columns // PARTS, FEWEST), MOST)


def cut(length: int, most: int) -> list[slice]:
    """A dimension in equal stretches of about `most`, or of SHORTEST if that is more."""
    most = max(most, SHORTEST)
    size = -(-length // -(-length // most))
    size = -(-size // MULTIPLE) * MULTIPLE
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def by_rows(rows: int, columns: int) -> tuple[list[slice], list[slice]]:
    """Stretches of some rows and, unless there are very many, all columns."""
    most = elements(rows, columns)
    of_columns = cut(columns, most // min(rows, SHORTEST))
    return cut(rows, most // of_columns[0].stop), of_columns


def by_columns(rows: int, columns: int) -> tuple[list[slice], list[slice]]:
    """Stretches of some columns and, unless there are very many, all rows. As `by_rows`: rows first."""
    of_columns, of_rows = by_rows(columns, rows)
    return of_rows, of_columns
