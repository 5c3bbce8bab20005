"""How the Triton backend's losses cut what must never be whole."""

from hypothesis import given
from hypothesis import strategies as st
from triton_backend import needs_triton

from fastattn.backends.triton import stretches

pytestmark = needs_triton
LENGTHS = st.one_of(st.integers(1, 3000), st.integers(1, 10**6))


@given(rows=LENGTHS, columns=LENGTHS, cut=st.sampled_from((stretches.by_rows, stretches.by_columns)))
def test_every_element_is_in_one_stretch(rows: int, columns: int, cut) -> None:
    both = cut(rows, columns)
    for parts, length in zip(both, (rows, columns), strict=True):
        assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]
        assert parts[-1].stop == length
        assert all(part.stop > part.start for part in parts)
    most = max(stretches.FEWEST, min(stretches.MOST, rows * columns / stretches.PARTS))
    of_rows, of_columns = both
    assert of_rows[0].stop * of_columns[0].stop <= 1.5 * most
    if rows * columns <= stretches.FEWEST:
        assert len(of_rows) == len(of_columns) == 1


def test_by_rows_and_by_columns_keep_the_other_dimension_whole() -> None:
    assert [len(parts) for parts in stretches.by_rows(8192, 131072)] == [8, 1]
    assert [len(parts) for parts in stretches.by_columns(8192, 131072)] == [1, 8]
