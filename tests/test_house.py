"""The rules of the house, checked on the files themselves: notebooks, imports, papers, sizes, speed of import."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

import notebooks as course

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = sorted((ROOT / "peftlab").rglob("*.py"))
METHODS = [path for path in sorted((ROOT / "peftlab" / "methods").glob("*.py")) if path.name != "__init__.py"]
LESSONS = course.course()
RULES = course.read_rules()

each_lesson = pytest.mark.parametrize("lesson", LESSONS, ids=lambda path: path.name)
each_module = pytest.mark.parametrize("module", PACKAGE, ids=lambda path: str(path.relative_to(ROOT)))
each_method = pytest.mark.parametrize("method", METHODS, ids=lambda path: path.stem)

MACHINE_PATH = re.compile(r"(?<![\w.:/~])/(?:home|root|Users|work|opt|mnt|srv|private)/[\w.-]+|\b[A-Z]:\\\\?Users\b")


def code_cells(lesson: Path) -> list:
    cells = nbformat.read(lesson, as_version=4).cells
    return [cell for cell in cells if cell.cell_type == "code" and cell.source.strip()]


def tracked_files() -> list[Path]:
    """What git would commit: all files but the ignored ones."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


# --- notebooks ---


def test_there_are_notebooks():
    assert LESSONS, "notebooks/ is empty"


@each_lesson
def test_notebook_was_run_top_to_bottom(lesson):
    counts = [cell.execution_count for cell in code_cells(lesson)]
    assert counts == list(range(1, len(counts) + 1)), f"run it again: make notebooks NB={lesson.relative_to(ROOT)}"


@each_lesson
def test_notebook_has_no_error_but_a_planned_one(lesson):
    planned = {"raises-exception", "NBVAL_RAISES_EXCEPTION"}
    failed = [
        cell.source.splitlines()[0]
        for cell in code_cells(lesson)
        if any(output.output_type == "error" for output in cell.outputs) and not course.marks(cell) & planned
    ]
    assert not failed


@each_lesson
def test_notebook_runs_in_the_kernel_of_its_environment(lesson):
    metadata = nbformat.read(lesson, as_version=4).metadata
    assert metadata.get("kernelspec", {}).get("name") == "python3", "the name that every environment's own kernel has"
    assert "widgets" not in metadata, "widget state holds random ids and old pictures; make notebooks leaves it out"


@each_lesson
def test_notebook_prints_something_of_its_own(lesson):
    assert any(cell.outputs for cell in code_cells(lesson)), "no output is stored: make notebooks"


@each_lesson
def test_notebook_names_no_machine_path(lesson):
    for cell in nbformat.read(lesson, as_version=4).cells:
        outputs = [
            json.dumps({kind: value for kind, value in output.get("data", {}).items() if not kind.startswith("image/")})
            + str(output.get("text", ""))
            + str(output.get("evalue", ""))
            + re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(output.get("traceback", ())))
            for output in cell.get("outputs", [])
        ]
        for text in (cell.source, *outputs):
            found = MACHINE_PATH.search(text)
            assert not found, f"{found.group()} in {text[:200]!r}"


@each_lesson
def test_notebook_compares_its_outputs(lesson):
    """Nine cells in ten would be nice; fewer than seven in ten means that a rule in sanitize.cfg is missing."""
    count = course.count_cells(nbformat.read(lesson, as_version=4), RULES)
    print(lesson.name, count)
    assert count.share >= 0.7, str(count)


@each_lesson
def test_notebook_does_not_retype_a_class_of_the_package(lesson):
    nodes = [node for path in PACKAGE for node in ast.parse(path.read_text()).body]
    ours = {node.name for node in nodes if isinstance(node, ast.ClassDef)}
    source = "\n".join(cell.source for cell in code_cells(lesson))
    again = set(re.findall(r"^class (\w+)", source, re.MULTILINE)) & ours
    assert not again, f"show(…) prints the class that the tests run: {again}"


# --- the package ---


def imported(module: Path) -> set[str]:
    """The top-level names of everything that a file imports, at any depth of nesting."""
    names = set()
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.partition(".")[0])
    return names


@each_module
def test_module_reads_no_pickle_and_does_not_lean_on_peft(module):
    names = imported(module)
    assert "peft" not in names, "every method is written from scratch; tests and benchmarks may import peft"
    assert not names & {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("torch.load", "torch.jit.load", "pd.read_pickle", "pandas.read_pickle")
            assert not any(word.arg == "allow_pickle" and ast.unparse(word.value) != "False" for word in node.keywords)


@each_method
def test_method_is_one_paper_in_one_short_file(method):
    text = method.read_text()
    paper = re.search(r"arXiv:\s?\d{4}\.\d{4,5}|doi[:.]|OpenReview", text)
    assert paper, "name the paper: Source: Authors year, arXiv:…"
    lines = len(text.splitlines())
    assert lines <= 80, f"{lines} lines: when a method grows past 80, the idea is not yet understood"


def test_methods_are_there():
    assert METHODS, "peftlab/methods/ has no method"


HEAVY = ("transformers", "datasets", "accelerate", "matplotlib", "pandas", "ipywidgets", "IPython")


def test_import_is_lazy():
    code = f"import sys, peftlab; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]", "import these inside the functions that need them"


def test_import_is_fast():
    """Below 1.5 times torch's own: each the fastest of several fresh processes, in turns, since the machine is busy."""

    def seconds(name):
        code = f"import time; start = time.perf_counter(); import {name}; print(time.perf_counter() - start)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
        return float(done.stdout)

    torch, ours = float("inf"), float("inf")
    for attempt in range(8):
        torch, ours = min(torch, seconds("torch")), min(ours, seconds("peftlab"))
        if attempt >= 2 and ours < 1.5 * torch:
            break
    print(f"import torch {torch:.2f} s, import peftlab {ours:.2f} s: {ours / torch:.2f} times")
    assert ours < 1.5 * torch


# --- files ---


def test_every_data_file_is_small_enough_for_git():
    large = {str(p.relative_to(ROOT)): p.stat().st_size for p in tracked_files() if p.stat().st_size > 16 * 2**20}
    assert not large, f"at most 16 MiB each: {large}"


def test_data_says_where_it_comes_from():
    """Each folder of data/ has a README.md, or lies in one that has."""
    data = ROOT / "data"
    orphans = []
    for file in tracked_files():
        if data in file.parents and file.suffix != ".md":
            above = [folder for folder in file.parents if folder == data or data in folder.parents]
            if not any((folder / "README.md").is_file() for folder in above):
                orphans.append(str(file.relative_to(ROOT)))
    assert not orphans, f"no README.md beside or above: {orphans}"


def test_text_is_finished_and_names_no_machine():
    unfinished = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME|XX" + r"X)\b")
    for file in tracked_files():
        if file.suffix in {".py", ".md", ".toml", ".yml", ".yaml", ".cfg", ".txt"} or file.name in ("Makefile", "run"):
            text = file.read_text(encoding="utf-8")
            for pattern in (unfinished, MACHINE_PATH):
                found = pattern.search(text)
                assert not found, f"{found.group()} in {file.relative_to(ROOT)}"


def test_pins_are_exact_and_complete():
    """Each direct dependency is pinned; torch by the very version that the course's outputs were made with."""
    pins = {}
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, _, version = re.split(r"\s*;", line)[0].partition("==")
            assert version and "+" not in version, f"not an exact pin: {line}"
            pins.setdefault(name.lower(), []).append(version)
    assert pins["torch"] == ["2.13.0"]
    text = (ROOT / "pyproject.toml").read_text()
    direct = re.findall(r'"([A-Za-z][\w.-]*)>=[\d.]+"', text[text.index("dependencies") :])
    missing = {name for name in direct if name.lower().replace("_", "-") not in pins}
    assert len(direct) > 20 and not missing


def test_makefile_help_lists_every_command():
    text = (ROOT / "Makefile").read_text()
    phony = set(re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE).group(1).split())
    assert phony == set(re.findall(r"^([a-z-]+):.*## ", text, re.MULTILINE))
