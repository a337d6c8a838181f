"""The tables of the pages are those of the files of results."""

import pytest

from benchmarks.experiments import tables


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.name)
def test_pages_show_what_the_files_hold(page):
    text = page.read_text(encoding="utf-8")
    assert tables.filled(text) == text, "the page is not of these results: run python -m benchmarks.experiments.tables"


def test_every_table_stands_on_one_page():
    found = [name for page in tables.PAGES for name in tables.names(page.read_text(encoding="utf-8"))]
    assert sorted(found) == sorted(tables.TABLES)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0.09987, "0.0999"),
        (5.8, "5.8"),
        (36.04, "36"),
        (999.4, "999"),
        (999.6, "1,000"),
        (20434.2, "20,434"),
    ],
)
def test_numbers(value, text):
    assert tables.number(value) == text


def test_a_table_is_replaced_and_what_is_around_it_stays(monkeypatch):
    monkeypatch.setitem(tables.TABLES, "one", lambda: tables.markdown(["", "b"], [["x", "1"]]))
    around = "before\n\n<!-- table one -->\n\n{}\nafter | no table\n"
    text = around.format("| old |\n|---|\n| 2 |\n")
    assert tables.filled(text) == around.format("|  | b |\n| --- | ---: |\n| x | 1 |\n")
    with pytest.raises(KeyError, match="two"):
        tables.filled("<!-- table two -->\n\n")
