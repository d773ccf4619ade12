"""The data sets: made the same everywhere, disjoint, and hard to answer for the wrong reason."""

import json
import random
import re
import subprocess
import sys
from collections import Counter, defaultdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peftlab import tasks
from peftlab.paths import DATA
from peftlab.tasks import reviews, sql, voices
from peftlab.tasks.__main__ import main, write


@pytest.fixture(scope="module")
def made():
    return {name: tasks.generate(name) for name in tasks.NAMES}


# -- the files -----------------------------------------------------------------------------------------------------


def test_the_files_are_what_the_generators_write(tmp_path):
    paths = write(tmp_path)
    assert len(paths) == 9
    for path in paths:
        assert path.read_bytes() == (DATA / "tasks" / path.relative_to(tmp_path)).read_bytes(), path.name
    assert sum(path.stat().st_size for path in paths) < 1.5 * 2**20


def test_the_readme_tells_the_sizes_and_columns(made):
    text = (DATA / "tasks" / "README.md").read_text()
    for name, splits in made.items():
        sizes = " | ".join(str(len(rows)) for rows in splits.values())
        assert f"| {name} | {sizes} | {', '.join(splits['train'][0])} |" in text


def test_the_command_writes_and_tells(tmp_path, capsys):
    main(["--write", str(tmp_path)])
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 9 and re.search(r"train.jsonl +3000 rows", out)
    with pytest.raises(SystemExit):
        main([])


def test_another_seed_gives_other_rows(made):
    for name in tasks.NAMES:
        other = tasks.generate(name, seed=1)
        assert other["test"] != made[name]["test"] and len(other["test"]) == len(made[name]["test"])


@pytest.mark.parametrize("name", tasks.NAMES)
def test_load_gives_the_generated_rows(name, made, capfd):
    sets = tasks.load(name)
    assert list(sets) == ["train", "valid", "test"]
    for split, rows in made[name].items():
        assert sets[split].to_list() == rows
        assert {feature.dtype for feature in sets[split].features.values()} == {"string"}
        assert not sets[split].cache_files  # nothing on disk to clash with or to clean up
    assert capfd.readouterr() == ("", "")


def test_load_leaves_the_progress_bars_as_they_were():
    import datasets

    was = datasets.is_progress_bar_enabled()
    try:
        for switch in (datasets.enable_progress_bars, datasets.disable_progress_bars):
            switch()
            now = datasets.is_progress_bar_enabled()
            tasks.load("reviews")
            assert datasets.is_progress_bar_enabled() == now
    finally:
        (datasets.enable_progress_bars if was else datasets.disable_progress_bars)()


def test_load_in_parallel_processes():
    code = "from peftlab import tasks; print(len(tasks.load('sql')['train']))"
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=DATA.parent, text=True)
        for _ in range(2)
    ]
    assert [p.communicate(timeout=120)[0].strip() for p in processes] == ["3000", "3000"]


def test_bad_names_and_missing_files(monkeypatch, tmp_path):
    for call in (tasks.load, tasks.generate):
        with pytest.raises(ValueError, match="no task is called 'reviws'; did you mean 'reviews'"):
            call("reviws")
        with pytest.raises(ValueError, match="no task is called 'chess'; there are sql, reviews, voices"):
            call("chess")
    monkeypatch.setattr("peftlab.paths.DATA", tmp_path)
    with pytest.raises(FileNotFoundError, match="train.jsonl is missing.*--write"):
        tasks.load("sql")


def test_importing_tasks_imports_little():
    code = (
        "import sys, peftlab.tasks as t; assert t.NAMES; "
        "print(sorted({'torch', 'datasets', 'transformers', 'peftlab.tasks.sql'} & set(sys.modules))); "
        "t.sql; t.world; print('peftlab.tasks.sql' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=DATA.parent)
    heavy, lazy = out.stdout.splitlines()
    assert "datasets" not in heavy and "transformers" not in heavy and "sql" not in heavy and lazy == "True"
    with pytest.raises(AttributeError, match="no attribute 'sqll'"):
        tasks.sqll  # noqa: B018


@pytest.mark.parametrize("name, columns", [
    ("sql", ["prompt", "completion", "db", "kind", "split"]),
    ("reviews", ["prompt", "completion", "split"]),
    ("voices", ["prompt", "completion", "voice", "content", "kind"]),
])  # fmt: skip
def test_rows_have_the_common_form(name, columns, made):
    for rows in made[name].values():
        for row in rows:
            assert list(row) == columns
            assert row["completion"].startswith(" ") and row["completion"].endswith("\n")
            assert row["completion"].count("\n") == 1 and not row["prompt"].endswith((" ", "\n"))
            assert row["completion"] == f" {row['completion'].strip()}\n"
            assert len(row["prompt"] + row["completion"]) < 220  # about 70 tokens of a small vocabulary
            json.dumps(row)


@pytest.mark.parametrize("name", tasks.NAMES)
def test_prompts_are_disjoint(name, made):
    key = (lambda row: (row["prompt"], row["voice"])) if name == "voices" else (lambda row: row["prompt"])
    for rows in made[name].values():
        assert len({key(row) for row in rows}) == len(rows)
    a, b, c = ({row["prompt"] for row in rows} for rows in made[name].values())
    assert not a & b and not a & c and not b & c


# -- sql: what is asked --------------------------------------------------------------------------------------------

CONDITION = re.compile(r"(\w+) (=|<|>) '?(\w+)'?")


def conditions(row):
    query = row["completion"].strip()
    table = re.search(r"JOIN (\w+)", query) or re.search(r"FROM (\w+)", query)
    return [(table[1], *found) for found in CONDITION.findall(query.partition(" WHERE ")[2])]


def test_sql_covers_its_schemas_and_kinds(made):
    rows = made["sql"]["train"]
    assert len(sql.SCHEMAS) >= 3 and sum(map(len, sql.SCHEMAS.values())) >= 6
    assert {row["kind"] for row in rows} == set(sql.KINDS) == {row["kind"] for row in made["sql"]["test"]}
    asked = Counter(re.search(r"FROM (\w+)", row["completion"])[1] for row in rows)
    assert set(asked) == {table for tables in sql.SCHEMAS.values() for table in tables}
    assert min(Counter(row["kind"] for row in rows).values()) >= 100
    assert all(len(ways) >= 4 for ways in sql.PHRASINGS.values())  # three for training, one held out
    assert {agg for row in rows for agg in re.findall(r"(AVG|MAX|MIN|SUM|COUNT)\(", row["completion"])} == {
        "AVG", "MAX", "MIN", "SUM", "COUNT",
    }  # fmt: skip


def test_sql_column_names_are_unambiguous():
    for tables in sql.SCHEMAS.values():
        parent, child = tables.values()
        shared = set(parent) & set(child)
        assert shared == {next(iter(parent))}  # the join's key and nothing else
        for columns in tables.values():
            first = next(iter(columns.values()))
            assert len(set(first)) == len(first) == sql.ROWS


def test_sql_queries_and_combinations_are_held_out(made):
    train, valid, test = (made["sql"][split] for split in tasks.SPLITS)
    queries = [{row["completion"] for row in rows} for rows in (train, valid, test)]
    assert not queries[0] & queries[1] and not queries[0] & queries[2] and not queries[1] & queries[2]
    splits = Counter(row["split"] for row in test)
    assert splits == {"iid": 160, "unseen": 120, "phrasing": 120}

    seen = {(t, c, v) for row in train for t, c, op, v in conditions(row) if op == "="}
    values, columns = {v for _, _, v in seen}, {(t, c) for t, c, _ in seen}
    for row in test:
        new = [(t, c, v) for t, c, op, v in conditions(row) if op == "=" and (t, c, v) not in seen]
        if row["split"] == "unseen":
            assert len(new) == 1 and new[0][2] in values and new[0][:2] in columns  # each known, not together
    assert len({new for row in test if row["split"] == "unseen" for new in conditions(row)}) >= 15


def _shape(row):
    """A question with everything replaced that its query mentions: its phrasing."""
    slots = {"COUNT": "number", "AVG": "average", "MAX": "highest", "MIN": "lowest", "SUM": "total"}
    words = set(re.findall(r"\w+", row["completion"]))
    words |= {slots[w] for w in words & set(slots)} | {"highest", "lowest"}
    question = row["prompt"].removeprefix("Question: ").removesuffix("\nSQL:")
    return " ".join("_" if w in words - {"and", "number"} else w for w in re.findall(r"\w+", question))


def test_sql_phrasings_are_held_out(made):
    train = defaultdict(set)
    for row in made["sql"]["train"]:
        train[row["kind"]].add(_shape(row))
    assert all(len(shapes) >= 3 for shapes in train.values())
    everything = set().union(*train.values())
    kinds = set()
    for row in made["sql"]["test"]:
        assert (_shape(row) in everything) == (row["split"] != "phrasing"), row
        kinds |= {row["kind"]} if row["split"] == "phrasing" else set()
    assert kinds == set(sql.KINDS)


def test_sql_questions_say_all_that_the_query_needs(made):
    """Table, columns and values are words of the question, so nothing has to be guessed."""
    tables = {table for tables in sql.SCHEMAS.values() for table in tables}
    for row in made["sql"]["train"]:
        words = set(re.findall(r"\w+", row["prompt"]))
        needed = set(re.findall(r"[a-z]+|'\w+'|\d+", row["completion"].partition(" JOIN ")[0]))
        needed |= {part for found in conditions(row) for part in (found[1], f"'{found[3]}'")}
        assert {w.strip("'") for w in needed} <= words, row
        assert words & tables


# -- sql: running and grading --------------------------------------------------------------------------------------


def test_sql_golds_run_and_give_something(made):
    golds = [row for rows in made["sql"].values() for row in rows]
    given = 0
    for row in golds:
        results = [sql.run(sql._copy(row["db"], seed), row["completion"].strip()) for seed in range(sql.COPIES)]
        assert results[0].error is None and results[0].rows and results[0].rows[0][0] not in (0, None), row
        assert len(results[0].rows) <= sql.ROWS
        given += sum(bool(r.rows) and r.rows[0][0] not in (0, None) for r in results)
    assert given / (len(golds) * sql.COPIES) > 0.9
    assert all(sql.grade(row["db"], row["completion"].strip(), row["completion"].strip()) for row in golds[::7])


def mutants(row, rng):
    """Wrong queries near a gold one: (what was changed, query)."""
    gold, tables = row["completion"].strip(), sql.SCHEMAS[row["db"]]
    table = re.search(r"FROM (\w+)", gold)[1]
    where = [(t, c, op, v) for t, c, op, v in conditions(row)]
    used = set(re.findall(r"\w+", gold))
    others = [c for c in tables[table] if c not in used]
    if first := re.match(r"SELECT (\w+)\b(?!\()", gold):
        yield "column", f"SELECT {rng.choice(others)}{gold[first.end() :]}"
    if agg := re.match(r"SELECT (?:\w+, )?(AVG|MAX|MIN|SUM)\((\w+)\)", gold):
        other = rng.choice([a for a in sql.AGGREGATES if a != agg[1]])
        yield "aggregate", gold.replace(f"{agg[1]}(", f"{other}(")
        numbers = [c for c in tables[table] if isinstance(tables[table][c], range) and c != agg[2]]
        yield "column", gold.replace(f"({agg[2]})", f"({numbers[0]})")
    for t, c, op, v in where:
        pool = tables[t][c]
        other = rng.choice([str(x) for x in pool if str(x) != v])
        yield "value", gold.replace(f"{c} {op} '{v}'" if op == "=" else f"{c} {op} {v}",
                                    f"{c} {op} '{other}'" if op == "=" else f"{c} {op} {other}")  # fmt: skip
        if op != "=":
            yield "comparison", gold.replace(f"{c} {op}", f"{c} {'<' if op == '>' else '>'}")
        same = [d for d in tables[t] if d != c and isinstance(tables[t][d], range) == isinstance(pool, range)]
        yield "condition's column", gold.replace(f" {c} {op}", f" {rng.choice(same)} {op}")
    if where:
        yield "no condition", gold.partition(" WHERE ")[0]
    if len(where) == 2:
        yield "one condition", gold.partition(" AND ")[0]
    if " LIMIT " in gold:
        yield "order", gold.replace("DESC", "ASC") if "DESC" in gold else gold.replace("ASC", "DESC")
        yield "limit", re.sub(r"LIMIT (\d)", lambda m: f"LIMIT {int(m[1]) + 1}", gold)
        yield "not ordered", re.sub(r" ORDER BY \w+ \w+", "", gold)
    if " GROUP BY " in gold:
        yield "not grouped", gold.partition(" GROUP BY ")[0]


def test_sql_wrong_queries_are_refused(made):
    """Queries one mistake away from gold: hardly any is graded right, whatever the mistake."""
    rng = random.Random(0)
    refused, alone, total = Counter(), Counter(), Counter()
    for row in made["sql"]["test"]:
        gold = row["completion"].strip()
        for change, query in mutants(row, rng):
            assert query != gold and sql.run(row["db"], query).error is None, (change, query)
            total[change] += 1
            refused[change] += not sql.grade(row["db"], query, gold)
            alone[change] += Counter(sql.run(row["db"], query).rows) != Counter(sql.run(row["db"], gold).rows)
    assert len(total) == 11 and sum(total.values()) > 1000
    shares = {change: refused[change] / total[change] for change in total}
    assert sum(refused.values()) / sum(total.values()) >= 0.98, shares
    assert min(shares.values()) >= 0.95, shares
    # Why there are several databases: one alone lets many more mistakes pass.
    assert (total - refused).total() < 0.3 * (total - alone).total()


@pytest.mark.parametrize("gold, same", [
    ("SELECT cargo FROM ships WHERE port = 'Oslo'", "select cargo from ships where 'Oslo' = port;"),
    ("SELECT cargo FROM ships WHERE crew > 40", "SELECT cargo FROM ships WHERE NOT crew <= 40 ORDER BY length"),
    ("SELECT AVG(crew) FROM ships", "SELECT SUM(crew) * 1.0 / COUNT(*) FROM ships"),
    ("SELECT ship FROM ships ORDER BY crew DESC LIMIT 3",
     "SELECT ship FROM ships s WHERE (SELECT COUNT(*) FROM ships WHERE crew > s.crew) < 3 ORDER BY 0 - crew"),
    ("SELECT age FROM captains JOIN ships USING (ship) WHERE port = 'Oslo'",
     "SELECT c.age FROM ships s, captains c WHERE s.ship = c.ship AND s.port = 'Oslo'"),
])  # fmt: skip
def test_sql_other_ways_to_the_same_are_right(gold, same):
    assert sql.grade("fleet", same, gold)


def test_sql_order_counts_only_where_it_was_asked_for():
    ordered, reverse = "SELECT ship FROM ships ORDER BY crew ASC", "SELECT ship FROM ships ORDER BY crew DESC"
    assert not sql.grade("fleet", reverse, ordered) and not sql.grade("fleet", "SELECT ship FROM ships", ordered)
    assert sql.grade("fleet", reverse, "SELECT ship FROM ships")
    assert not sql.grade("fleet", "SELECT DISTINCT cargo FROM ships", "SELECT cargo FROM ships")  # multisets


@pytest.mark.parametrize("query, error", [
    ("", "not a query"),
    ("-- nothing", "not a query"),
    ("SELECT", "incomplete input"),
    ("SELECT depth FROM ships", "no such column"),
    ("SELECT * FROM sqlite_master", "prohibited|not authorized"),
    ("DROP TABLE ships", "not authorized"),
    ("DELETE FROM ships", "not authorized"),
    ("UPDATE ships SET crew = 0", "not authorized"),
    ("INSERT INTO ships VALUES ('a', 'b', 'c', 1, 2)", "not authorized"),
    ("CREATE TABLE x (y)", "not authorized"),
    ("PRAGMA query_only = OFF", "not authorized"),
    ("ATTACH DATABASE '/tmp/x.db' AS x", "not authorized"),
    ("BEGIN", "not authorized"),
    ("SELECT load_extension('x')", "not authorized"),
    ("SELECT zeroblob(1000000000)", "not authorized"),
    ("WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT x FROM n", "not authorized|more than"),
    ("SELECT 1; SELECT 2", "one statement"),
    ("SELECT 1; DROP TABLE ships", "one statement"),
    ("SELECT COUNT(*) FROM ships a, ships b, ships c, ships d, ships e, ships f", "more than 200,000 steps"),
    ("SELECT a.crew FROM ships a, ships b, ships c", "more than 1,000 rows"),
    ("SELECT '\ud800'", "surrogate"),
    ("SELECT 1 \0 FROM ships", "null character|unrecognized token"),
])  # fmt: skip
def test_sql_refuses_what_is_not_one_short_select(query, error):
    db = sql.database("fleet")
    before = list(db.iterdump())
    result = sql.run(db, query)
    assert result.rows is None and re.search(error, result.error), result
    assert list(db.iterdump()) == before
    assert not sql.grade("fleet", query, "SELECT ship FROM ships")
    assert sql.run(db, "SELECT COUNT(*) FROM ships") == ([(sql.ROWS,)], None, ("COUNT(*)",))  # still usable


def test_sql_gold_queries_need_few_steps(made):
    """The limit on steps lies far above what any gold query takes."""
    for row in made["sql"]["test"]:
        db, steps = sql.database(row["db"]), []
        db.set_progress_handler(lambda steps=steps: steps.append(1), 100)
        db.execute(row["completion"].strip()).fetchall()
        assert 100 * len(steps) < sql.MAX_STEPS / 20


def test_sql_databases_follow_their_schema():
    for name, tables in sql.SCHEMAS.items():
        db, other = sql.database(name), sql.database(name, seed=1)
        assert list(db.iterdump()) == list(sql.database(name).iterdump()) != list(other.iterdump())
        for table, columns in tables.items():
            for column, pool in columns.items():
                values = [v for (v,) in db.execute(f"SELECT {column} FROM {table}")]
                assert len(values) == sql.ROWS and set(values) <= set(pool)
                # no ties in numbers, so ORDER BY is one order; every word is somewhere
                assert len(set(values)) == sql.ROWS if isinstance(pool, range) else set(values) == set(pool)
    with pytest.raises(ValueError, match="no database is called 'navy'; there are fleet, music, zoo"):
        sql.database("navy")
    with pytest.raises(ValueError, match="no database is called 'navy'"):
        sql.grade("navy", "SELECT 1", "SELECT 1")
    with pytest.raises(ValueError, match="the gold query fails on fleet: no such column: x"):
        sql.grade("fleet", "SELECT 1", "SELECT x FROM ships")


@settings(max_examples=50)
@given(st.text(max_size=60) | st.text("SELECT crew,ship*FROM ships'WHERE=()1;-", max_size=60))
def test_sql_run_never_raises(query):
    rows, error, _ = sql.run("fleet", query)
    assert (rows is None) != (error is None)


# -- reviews -------------------------------------------------------------------------------------------------------


def test_reviews_follow_their_rule(made):
    for rows in made["reviews"].values():
        labels = Counter(row["completion"].strip() for row in rows)
        assert set(labels) == {"positive", "negative"} and labels["positive"] == len(rows) / 2
        for row in rows:
            assert reviews.sentiment(row["prompt"]) == row["completion"].strip(), row


@pytest.mark.parametrize("text, label", [
    ("the soup was not bad at all.", "positive"),
    ("the soup was far from great.", "negative"),
    ("the food was great, but the staff were rude.", "negative"),
    ("although the food was great, nobody could call the staff kind.", "negative"),
    ("the staff were never kind; still, the room was fine.", "positive"),
    ("even if the room was far from clean, in the end the view was lovely.", "positive"),
    ("we went to Oslo with Greta: i do not think the film was boring.", "positive"),
])  # fmt: skip
def test_sentiment_by_rule(text, label):
    assert reviews.sentiment(text) == reviews.sentiment(f"Review: {text}\nSentiment:") == label
    with pytest.raises(ValueError, match="not a review"):
        reviews.sentiment("the weather is green.")


def _words(row):
    return re.findall(r"\w+", row["prompt"].lower())


def test_reviews_defeat_a_bag_of_words(made):
    """Naive Bayes and logistic regression on word counts stay near chance on new reviews of the same kind."""
    train, test = made["reviews"]["train"], [r for r in made["reviews"]["test"] if r["split"] == "iid"]
    vocabulary = {w: i for i, w in enumerate(sorted({w for row in train for w in _words(row)}))}

    def bags(rows):
        x = torch.zeros(len(rows), len(vocabulary))
        for i, row in enumerate(rows):
            for w in _words(row):
                x[i, vocabulary[w]] += 1
        return x, torch.tensor([float(row["completion"].strip() == "positive") for row in rows])

    (x, y), (tx, ty) = bags(train), bags(test)
    log_p = [((x[y == c].sum(0) + 1) / (x[y == c].sum() + len(vocabulary))).log() for c in (0, 1)]
    bayes = (((tx @ (log_p[1] - log_p[0])) > 0) == ty.bool()).float().mean()

    w, b = torch.zeros(len(vocabulary), requires_grad=True), torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.LBFGS([w, b], max_iter=100)

    def loss():
        optimizer.zero_grad()
        value = torch.nn.functional.binary_cross_entropy_with_logits(x @ w + b, y) + 1e-3 * (w @ w)
        value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():
        logistic = (((tx @ w + b) > 0) == ty.bool()).float().mean()
    assert bayes <= 0.65 and logistic <= 0.65, (bayes, logistic)


def test_reviews_hold_out_what_they_say(made):
    train = {w for row in made["reviews"]["train"] for w in _words(row)}
    new = {*reviews.GOOD_HELD_OUT, *reviews.BAD_HELD_OUT}
    assert not train & new
    held_out = [r"i think the", r"i do not think", r"even if .+, in the end"]
    for row in made["reviews"]["train"] + made["reviews"]["test"]:
        found = sum(bool(re.search(way, row["prompt"])) for way in held_out)
        assert found == (row["split"] == "phrasing"), row
        assert bool(new & set(_words(row))) == (row["split"] == "words")
    assert Counter(r["split"] for r in made["reviews"]["test"]) == {"iid": 200, "phrasing": 100, "words": 100}


# -- voices --------------------------------------------------------------------------------------------------------


def test_voices_say_the_same_content(made):
    assert len(voices.VOICES) >= 4
    for rows in made["voices"].values():
        groups = defaultdict(list)
        for row in rows:
            groups[row["prompt"]].append(row)
        for group in groups.values():
            assert [row["voice"] for row in group] == list(voices.VOICES)
            assert len({row["content"] for row in group}) == 1
            assert len({row["completion"] for row in group}) == len(group)
            for row in group:
                assert row["completion"] == f" {voices.rewrite(row['content'], row['voice'])}\n"


def test_voices_are_recognised(made):
    for rows in made["voices"].values():
        for row in rows:
            assert voices.style_of(row["completion"]) == row["voice"], row
            assert voices.style_of(row["content"]) is None and voices.style_of(row["content"] + ".") is None


@pytest.mark.parametrize("text", [
    "", "Lisbon", "Arr, the train be late, matey!", "Arr, th' train be late", "Dear reader, the train is late",
    "the train. Stop.", "Did you know? Yes.", "1. the train", "2. the train 1. is 3. late",
])  # fmt: skip
def test_what_is_no_voice(text):
    assert voices.style_of(text) is None


def test_voices_facts_are_those_of_the_world(made):
    from peftlab.tasks.world import people

    known = {p.name: p for p in people()}
    told = defaultdict(set)
    for split, rows in made["voices"].items():
        kinds = Counter(row["kind"] for row in rows)
        assert kinds["fact"] == kinds["everyday"]
        for row in rows:
            if row["kind"] == "fact":
                person = next(p for name, p in known.items() if name in row["prompt"])
                assert not person.unasked and person.name in row["content"]
                assert any(row["content"].endswith(value) for value in person.facts.values())
                told[split].add(person.name)
    a, b, c = told.values()
    assert not a & b and not a & c and not b & c


def test_rewrite_names_what_it_does_not_know():
    with pytest.raises(ValueError, match="no voice is called 'opera'; there are telegram"):
        voices.rewrite("the train is late", "opera")
    with pytest.raises(ValueError, match="no verb of the list-maker in 'hello'"):
        voices.rewrite("hello", "list")
