"""Real English and code for pretraining: what every learner's machine already holds, nothing downloaded.

English: the topics of Python's `help()`, docstrings of the standard library and of a few pinned libraries.
Code: the standard library's source. A twentieth of the standard library's modules (by a hash of their path, so the
split is the same on every machine) is held out, docstrings and source alike, and so is a twentieth of the topics.
The text itself differs a little between Python versions; the model card names the version that was read.
"""

from __future__ import annotations

import ast
import importlib.util
import sysconfig
import warnings
from pathlib import Path
from zlib import crc32

LIBRARIES = ("numpy", "pandas", "matplotlib", "torch")  # docstrings only, training only
SKIPPED = {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "pydoc_data", "encodings",
           "turtledemo", "__phello__", "ensurepip"}  # fmt: skip


def is_held_out(name: str) -> bool:
    """Whether a module path or topic name belongs to the held-out twentieth."""
    return crc32(name.encode()) % 20 == 0


def _sources(root: Path) -> list[tuple[str, str, ast.Module]]:
    """(relative path, source, syntax tree) of each readable module under `root`, in a fixed order."""
    found = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED & set(relative.parts):
            continue
        try:
            source = path.read_text(encoding="utf-8")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # old modules hold invalid escapes; not ours to report
                found.append((relative.as_posix(), source, ast.parse(source)))
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue
    return found


def _docstrings(tree: ast.Module) -> list[str]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    said = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return [d + "\n" for d in said if d and len(d) > 80]


def standard_library(held_out: bool = False) -> dict[str, list[str]]:
    """{"docs": topics and docstrings, "code": module sources} of the running Python, one side of the split."""
    from pydoc_data.topics import topics

    docs = [said.strip() + "\n" for name, said in sorted(topics.items()) if is_held_out(name) == held_out]
    code = []
    for name, source, tree in _sources(Path(sysconfig.get_paths()["stdlib"])):
        if is_held_out(name) == held_out and len(source) > 200:
            docs += _docstrings(tree)
            code.append(source)
    return {"docs": docs, "code": code}


def library_docstrings(libraries: tuple[str, ...] = LIBRARIES) -> list[str]:
    """Docstrings of installed libraries; a library that is missing is skipped."""
    said: dict[str, None] = {}  # ordered and without repetitions: libraries repeat whole docstrings
    for library in libraries:
        spec = importlib.util.find_spec(library)
        if spec and spec.origin:
            for _, _, tree in _sources(Path(spec.origin).parent):
                said.update(dict.fromkeys(_docstrings(tree)))
    return list(said)
