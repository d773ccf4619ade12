"""The notebooks as documents and as tests: run them again, compare their outputs, count what is compared.

    python scripts/notebooks.py run [NOTEBOOK ...]   execute in place; outputs that compare equal stay as stored
    python scripts/notebooks.py count                how many cells have an output, and how many of those are compared

The comparison rules live here and in notebooks/sanitize.cfg; notebooks/conftest.py hands them to nbval.
"""

from __future__ import annotations

import argparse
import base64
import difflib
import io
import json
import os
import re
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import nbformat

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"

# A lesson's numbers are those of one thread on the CPU, with the embedded base model and no network, so that every
# machine gets the same verdict. None: the variable is removed.
ENVIRONMENT: dict[str, str | None] = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "PEFTLAB_BASE": None,
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONHASHSEED": "0",  # sets of strings print in the same order
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",  # the debugger's warning about frozen modules
    "COLUMNS": "80",  # pandas, rich and argparse wrap by it
}

# Training in fp32 moves losses by about 1e-6 from one CPU to the next (another order of additions); what follows from a
# loss moves by a little more, a real change by far more than 1e-4.
RELATIVE = 1e-4
# Differences that should be zero print as anything around fp32's rounding.
ABSOLUTE = 1e-6
# A value close to a rounding boundary flips its last printed digit. One unit of it is let pass where that is a small
# step: from the fourth decimal on, and at most 1e-3 of the value (so not for a learning rate of 0.0001).
LAST_DIGIT = 1e-4
LAST_DIGIT_SHARE = 1e-3
# Mean absolute difference of two figures in grey levels of 0..255. The same drawing on another CPU differs by less
# than 0.05; a thin line that goes elsewhere in an otherwise empty figure makes about 1.5.
PIXELS = 0.5

# Floats only: integers, version-like 1.2.3 and 3.4M stay text and have to be equal. Blanks before a number belong to
# it, since tables and tensors pad to the width of the sign.
FLOAT = re.compile(r" *(?<![\w.])[-+]?(?:\d+\.\d*(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+)(?![\w.])")

SKIP = {"nbval-skip", "nbval-ignore-output", "NBVAL_SKIP", "NBVAL_IGNORE_OUTPUT"}


def fix_environment() -> None:
    """Give this process, and every kernel started from it, the environment that stored outputs are made in."""
    for name, value in ENVIRONMENT.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def read_rules(path: Path = NOTEBOOKS / "sanitize.cfg") -> list[tuple[re.Pattern, str]]:
    """The sanitising rules, in nbval's own file format: pairs of lines `regex: …` and `replace: …`."""
    pairs = re.findall(r"^regex: (.*)\nreplace: ?(.*)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return [(re.compile(pattern), replacement) for pattern, replacement in pairs]


def settle(text: str) -> str:
    """What a terminal shows in the end: carriage returns overwrite (progress bars), trailing blanks are gone."""
    lines = []
    for line in text.split("\n"):
        parts = line.split("\r")
        lines.append((parts[-1] or parts[-2 if len(parts) > 1 else -1]).rstrip())
    return "\n".join(lines)


def comparable(outputs, rules) -> dict[str, list[str]]:
    """What of a cell's outputs is compared: kind (stdout, text/html, image/png, …) -> values, in order, sanitised.

    A stream is one text however many pieces it came in; a stream or text that the rules empty is not there at all.
    """
    found = defaultdict(list)
    streams = defaultdict(str)
    for output in outputs:
        if output.output_type == "stream":
            streams[output.name] += output.text
        elif output.output_type == "error":
            found["error"].append(f"{output.ename}: {output.evalue}")
        else:
            for kind, value in output.data.items():
                if kind == "application/vnd.jupyter.widget-view+json":
                    value = "widget"  # its ids are random; what it shows is in the text/plain beside it
                found[kind].append(value if isinstance(value, str) else json.dumps(value, sort_keys=True))
    for name, text in streams.items():
        found[name] = [settle(text)]

    clean = {}
    for kind, values in found.items():
        if not kind.startswith("image/") or kind == "image/svg+xml":
            for pattern, replacement in rules:
                values = [pattern.sub(replacement, value) for value in values]
            values = [value.strip() for value in values]
        if any(values):
            clean[kind] = values
    return clean


def same_text(stored: str, fresh: str) -> bool:
    """Equal but for floats within tolerance."""
    if stored == fresh:
        return True
    if FLOAT.split(stored) != FLOAT.split(fresh):
        return False
    pairs = zip(FLOAT.findall(stored), FLOAT.findall(fresh), strict=True)
    return all(same_float(a.strip(), b.strip()) for a, b in pairs)


def same_float(stored: str, fresh: str) -> bool:
    a, b = float(stored), float(fresh)
    mantissa, _, exponent = stored.lower().partition("e")
    unit = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
    size = max(abs(a), abs(b))
    flip = unit <= 1.001 * LAST_DIGIT and unit <= LAST_DIGIT_SHARE * size
    step = 1.001 * unit if flip else 0.0
    return abs(a - b) <= max(ABSOLUTE, RELATIVE * size, step)


def figure_difference(stored: str, fresh: str) -> str:
    """Why two figures (base64) are not the same, or ''."""
    if stored.strip() == fresh.strip():
        return ""
    import numpy as np
    from PIL import Image

    a, b = (
        np.asarray(Image.open(io.BytesIO(base64.b64decode(value))).convert("RGBA"), dtype=float)
        for value in (stored, fresh)
    )
    if a.shape != b.shape:
        return f"stored {a.shape[1]}×{a.shape[0]} pixels, drawn {b.shape[1]}×{b.shape[0]}"
    gap = abs(a - b)[..., :3].mean() + abs(a - b)[..., 3].mean()
    return f"mean pixel difference {gap:.2f}, allowed {PIXELS}" if gap > PIXELS else ""


def differences(stored_outputs, fresh_outputs, rules) -> list[str]:
    """What differs between a cell's stored outputs and those of a new run, in words; empty when nothing does."""
    stored, fresh = comparable(stored_outputs, rules), comparable(fresh_outputs, rules)
    found = []
    for kind in sorted(stored.keys() | fresh.keys()):
        old, new = stored.get(kind, []), fresh.get(kind, [])
        if len(old) != len(new):
            found.append(f"{kind}: {len(old)} stored, {len(new)} in this run")
            found += [f"  {sign} {shorten(value)}" for sign, values in (("-", old), ("+", new)) for value in values]
            continue
        for a, b in zip(old, new, strict=True):
            if kind in ("image/png", "image/jpeg"):
                if why := figure_difference(a, b):
                    found.append(f"{kind}: {why}")
            elif not same_text(a, b):
                found.append(f"{kind}: (- stored, + this run)")
                lines = difflib.unified_diff(a.splitlines(), b.splitlines(), n=1, lineterm="")
                found += [f"  {shorten(line)}" for line in list(lines)[2:] if not line.startswith("@@")]
    return found


def shorten(value: str, width: int = 400) -> str:
    return value if len(value) <= width else f"{value[:width]}… ({len(value)} characters)"


def marks(cell) -> set[str]:
    """A code cell's tags and the NBVAL_… comments that mean the same."""
    comments = {line.strip().lstrip("#").strip() for line in cell.source.splitlines() if line.strip().startswith("#")}
    return set(cell.metadata.get("tags", [])) | {comment for comment in comments if comment.startswith("NBVAL_")}


@dataclass
class Count:
    """Code cells of one or more notebooks: all, those with an output, those whose output is compared."""

    cells: int = 0
    with_output: int = 0
    compared: int = 0

    def __add__(self, other: Count) -> Count:
        return Count(
            self.cells + other.cells, self.with_output + other.with_output, self.compared + other.compared
        )

    @property
    def share(self) -> float:
        return self.compared / self.with_output if self.with_output else 1.0

    def __str__(self) -> str:
        return (
            f"{self.cells} code cells, {self.with_output} with output, {self.compared} compared"
            f" ({self.share:.0%}), {self.with_output - self.compared} not compared"
        )


def count_cells(notebook, rules) -> Count:
    """Count as the tests see it: a cell that is marked, or of whose output the rules leave nothing, is not compared."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    with_output = [cell for cell in cells if cell.outputs]
    compared = [cell for cell in with_output if not marks(cell) & SKIP and comparable(cell.outputs, rules)]
    return Count(len(cells), len(with_output), len(compared))


def course() -> list[Path]:
    """The lessons, in order."""
    return sorted(NOTEBOOKS.glob("*.ipynb"))


def count_course() -> dict[str, Count]:
    rules = read_rules()
    return {path.name: count_cells(nbformat.read(path, as_version=4), rules) for path in course()}


def run(path: Path, timeout: float = 1200) -> int:
    """Execute a notebook in place and return how many cells' outputs changed.

    An output that compares equal keeps its stored bytes, so that git shows only what really changed. The file is
    replaced at the end, in one step: a cell that fails leaves it as it was (nbclient.exceptions.CellExecutionError).
    """
    from nbclient import NotebookClient

    rules = read_rules()
    old = nbformat.read(path, as_version=4)
    new = nbformat.from_dict(json.loads(json.dumps(old)))
    client = NotebookClient(
        new,
        timeout=timeout,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
        record_timing=False,
        store_widget_state=False,  # random ids and old pictures; a widget's repr says what it shows
        coalesce_streams=True,
    )
    client.execute()

    changed = 0
    for before, after in zip(old.cells, new.cells, strict=True):
        if after.cell_type != "code":
            continue
        for output in after.outputs:
            if output.output_type == "stream":
                output.text = settle(output.text)
            elif output.output_type == "error":  # a planned one; where this copy of the project lies stays out of it
                output.traceback = [line.replace(f"{NOTEBOOKS.parent}{os.sep}", "") for line in output.traceback]
        if before.execution_count is not None and not differences(before.outputs, after.outputs, rules):
            after.outputs = before.outputs
            for output in after.outputs:
                if output.output_type == "execute_result":
                    output.execution_count = after.execution_count
        else:
            changed += 1
    new.metadata = {
        "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
        "language_info": {"name": "python", "file_extension": ".py", "mimetype": "text/x-python"},
    }
    temporary = path.with_name(f".{path.name}.tmp")
    nbformat.write(new, temporary)
    os.replace(temporary, path)
    return changed


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("run", help="execute notebooks in place").add_argument("notebooks", nargs="*", type=Path)
    verbs.add_parser("count", help="count compared cells")
    options = parser.parse_args(arguments)

    if options.verb == "count":
        counts = count_course()
        for name, count in counts.items():
            print(f"{name:30} {count}")
        print(f"{'all':30} {sum(counts.values(), Count())}")
        return 0

    from nbclient.exceptions import CellExecutionError

    fix_environment()
    failed = 0
    for path in options.notebooks or course():
        if not path.is_file():
            raise SystemExit(f"no notebook at {path}; there are: {', '.join(p.name for p in course()) or 'none'}")
        start = time.perf_counter()
        print(f"{path.name}: ", end="", flush=True)
        try:
            changed = run(path)
            print(f"{time.perf_counter() - start:.0f} s, {changed} cells changed")
        except CellExecutionError as error:
            failed += 1
            print(f"failed, left as it was\n{error}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
