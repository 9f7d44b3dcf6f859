"""The README of the chart tells the values that there are."""

import pytest

from helm import values_table


def test_the_table_of_values_is_current() -> None:
    readme = values_table.README.read_text()
    assert values_table.with_table(readme, values_table.VALUES.read_text()) == readme, "make chart-table"


def test_the_table_has_a_row_for_each_value_and_group() -> None:
    text = "# All.\na:\n  # One,\n  # or | two.\n  b: 1\n  # A map.\n  c: {d: x}\n"
    assert values_table.table(text).splitlines()[2:] == [
        "| `a` |  | All. |",
        "| `a.b` | `1` | One, or \\| two. |",
        '| `a.c` | `{"d": "x"}` | A map. |',
    ]


@pytest.mark.parametrize("text", ["a: 1\n", "# A.\n\na: 1\n", "a:\n  # B.\n  b: 1\n  c: 2\n"])
def test_a_value_without_a_comment_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="no comment above"):
        values_table.table(text)
