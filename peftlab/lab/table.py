"""The table of an experiment: one row per run, read and written whole; and what a row says of its origin."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..paths import DATA, atomic_write
from ..provenance import provenance
from .plan import ORIGIN, Experiment, Row

RESULTS = DATA / "results"


def read(name: str | Path):
    """The recorded runs of an experiment as a pandas table: a name (of data/results) or a CSV file.

    Raises FileNotFoundError with the names that there are.
    """
    import pandas

    path = RESULTS / f"{name}.csv" if isinstance(name, str) and not name.endswith(".csv") else Path(name)
    if not path.is_file():
        there = ", ".join(sorted(file.stem for file in RESULTS.glob("*.csv"))) or "none"
        raise FileNotFoundError(f"there is no recorded experiment {str(name)!r}; in {RESULTS} there are: {there}")
    return pandas.read_csv(path)


def costs(name: str):
    """What each method of an experiment costs, from data/results/<name>_cost.json: a pandas table, method by method.

    parameters: trained. bytes: of the stored file. context: positions taken from the text. mergeable. step, prefill,
    decode: median time ratios, with _low and _high as quartiles; `attrs` says to what, and where it was measured.
    """
    import pandas

    found = json.loads((RESULTS / f"{name}_cost.json").read_text(encoding="utf-8"))
    table = pandas.DataFrame(found.pop("methods")).set_index("method")
    table.attrs = found
    return table


def rows_of(path: Path, columns: Sequence[str]) -> list[Row]:
    """The rows of a file; none if it does not exist. ValueError if it is another kind of file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as f:
        reader = csv.DictReader(f, strict=True)
        rows = list(reader)
    if tuple(reader.fieldnames or ()) != tuple(columns) or any(None in row or None in row.values() for row in rows):
        raise ValueError(f"{path} is not a table of this experiment, or it is damaged: its columns should be "
                         f"{', '.join(columns)}. Move it away, or name another file with --out")  # fmt: skip
    return rows


def made(path: Path, experiment: Experiment):
    """The rows of a file that were made with the experiment's settings, as a pandas table in the order of its cases."""
    import pandas

    rows = rows_of(path, experiment.columns)
    want = [{column: str(value) for column, value in (case.key | case.settings).items()} for case in experiment.cases]
    mine = [row for one in want for row in rows if one.items() <= row.items()]
    return pandas.read_csv(io.StringIO(_csv(mine, experiment.columns)))


def write(path: Path, rows: Iterable[Row], columns: Sequence[str]) -> None:
    """Write all rows; a crash leaves the old file or the new one, never half of one."""
    atomic_write(path, _csv(rows, columns))


def _csv(rows: Iterable[Row], columns: Sequence[str]) -> str:
    text = io.StringIO()
    table = csv.DictWriter(text, columns, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return text.getvalue()


def put(rows: Sequence[Row], new: Row, identity: Sequence[str]) -> list[Row]:
    """The rows with `new` in the place of one of the same identity, in the order of the file."""
    kept = [row for row in rows if any(row[column] != new[column] for column in identity)]
    return sorted([*kept, new], key=lambda row: [_sortable(row[column]) for column in identity])


def _sortable(text: str) -> tuple[float, str]:
    try:
        return float(text), ""
    except ValueError:
        return math.inf, text


def measured_row(experiment_columns: Sequence[str], values: Mapping[str, Any]) -> Row:
    """The columns that `execute` gives: measured values as text, and where they come from."""
    if set(values) != set(experiment_columns):
        raise ValueError(f"measured were {sorted(values)}, but the table has {sorted(experiment_columns)}")
    shown = {column: f"{values[column]:.6g}" if isinstance(values[column], float) else str(values[column])
             for column in experiment_columns}  # fmt: skip
    origin = provenance()
    return shown | {column: str(origin.get(column, "")) for column in ORIGIN}


def config_hash(values: Mapping[str, Any]) -> str:
    """The first twelve hex digits of the SHA-256 of settings, whatever their order: one name for all that a run was."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:12]


def fingerprint(*files: Path) -> str:
    """The first twelve hex digits of the files' SHA-256."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def fingerprints(task: str) -> tuple[str, str]:
    """Those of the embedded base model and of a task, as they lie on this machine."""
    rows = [DATA / "tasks" / task / f"{split}.jsonl" for split in ("train", "valid", "test")]
    return fingerprint(DATA / "base" / "model.safetensors"), fingerprint(*rows)


def budget(task: str, steps: int, batch_size: int) -> dict[str, Any]:
    """Settings that a run on a task is made with: the same for all that are compared, on this base and these rows."""
    base, data = fingerprints(task)
    return {"steps": steps, "batch_size": batch_size, "base": base, "data": data}


def markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table as text that is aligned and also Markdown."""
    widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    rule = ["-" * width for width in widths]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in [head, rule, *body]
    )
