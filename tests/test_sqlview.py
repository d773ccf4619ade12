"""The table of SQL answers: rows or errors beside each query, and a sign that is the grade."""

import pytest

from peftlab.course.sqlview import result_of, side_by_side

GOLD = "SELECT COUNT(*) FROM ships WHERE port = 'Oslo'"


def prediction(got: str, right: bool) -> dict:
    return {"prompt": "Question: how many ships have port Oslo\nSQL:", "expected": GOLD, "got": got, "right": right,
            "db": "fleet"}  # fmt: skip


def test_result_of_shows_rows_cuts_long_results_and_keeps_errors():
    assert result_of("fleet", "SELECT 1, 'a'") == "1, a"
    assert result_of("fleet", "SELECT 2.0 / 3") == "0.67"
    assert result_of("fleet", "SELECT ship FROM ships WHERE crew < 0") == "no rows"
    assert result_of("fleet", "SELECT ship FROM ships").endswith("; … and 27 more")
    assert result_of("fleet", "SELECT ship FROM ships", shown=30).count(";") == 29
    assert result_of("fleet", "SELECT sail FROM ships") == "error: no such column: sail"
    assert result_of("fleet", "DROP TABLE ships").startswith("error: ")


def test_table_has_a_line_for_each_prediction():
    table = side_by_side([prediction(GOLD, True), prediction("SELECT <b>", False)])
    assert list(table.data["right"]) == ["✔", "✘"]
    assert list(table.data["question"]) == ["how many ships have port Oslo"] * 2
    assert table.data["its rows"][0] == table.data["gold rows"][0] == result_of("fleet", GOLD)
    assert table.data["its rows"][1].startswith("error: ")
    html = table.to_html()
    assert "&lt;b&gt;" in html and "<b>" not in html, "what a model writes is text, not markup"


def test_what_is_no_graded_sql_is_refused():
    with pytest.raises(ValueError, match="empty"):
        side_by_side([])
    with pytest.raises(ValueError, match="'db' is missing.*execution_accuracy"):
        side_by_side([{k: v for k, v in prediction(GOLD, True).items() if k != "db"}])
