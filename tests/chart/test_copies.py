"""What the chart brings along is what the repository has, and its README tells the values that there are."""

import pytest

from helm import chart_files, values_table
from tests.chart.release import Release, ci_values

NEWER = "make chart-files"


def test_the_chart_brings_dashboards_and_rules_as_they_are() -> None:
    assert chart_files.copies() == chart_files.originals(), NEWER
    assert chart_files.originals()


def test_the_table_of_values_is_current() -> None:
    readme = values_table.README.read_text()
    assert values_table.with_table(readme, values_table.VALUES.read_text()) == readme, NEWER


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


def test_every_dashboard_is_in_a_config_map_for_grafana() -> None:
    maps = Release(ci_values("full")).all("ConfigMap")
    assert all(each["metadata"]["labels"]["grafana_dashboard"] == "1" for each in maps)
    found = {f"dashboards/{name}": text.rstrip() for each in maps for name, text in each["data"].items()}
    originals = {name: data.decode().rstrip() for name, data in chart_files.originals().items()}
    assert found == {name: text for name, text in originals.items() if name.startswith("dashboards/")}
