"""The notebooks' comparison can fail: each stored output that is wrong makes its cell fail, each right one passes."""

import base64
import inspect
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell, new_notebook
from nbformat.v4 import new_output as output
from PIL import Image, ImageDraw

import notebooks as comparison

ROOT = Path(__file__).resolve().parent.parent
RULES = comparison.read_rules()


def line(end: int, size=(320, 240)) -> bytes:
    """A thin line in an otherwise empty figure, as PNG."""
    picture = Image.new("RGB", size, "white")
    ImageDraw.Draw(picture).line((20, 220, 300, end), fill="blue", width=2)
    buffer = io.BytesIO()
    picture.save(buffer, format="png")
    return buffer.getvalue()


DRAW = f"""
import io, IPython.display
from PIL import Image, ImageDraw
{inspect.getsource(line)}
def figure(end):
    return IPython.display.Image(data=line(end))
"""


def stdout(text):
    return output("stream", name="stdout", text=text)


def stderr(text):
    return output("stream", name="stderr", text=text)


def result(text, **data):
    return output("execute_result", data={"text/plain": text, **data}, execution_count=1)


def picture(png):
    return result("<IPython.core.display.Image object>", **{"image/png": base64.b64encode(png).decode()})


BAR = """
import sys
for i in (0, 125, 250):
    sys.stderr.write(f"\\rtrain: {i * 100 // 250:3d}%|{'#' * i}| {i}/250 [00:0{i % 9}<00:00, 71.9it/s, loss=0.4312]")
"""
WIDGET = """
import ipywidgets
class Explorer(ipywidgets.VBox):
    def __repr__(self):
        return f"Explorer(rank r={self.children[0].value}) -> loss 0.4312"
Explorer([ipywidgets.IntSlider(8, description="rank r")])
"""

# source, what a right notebook has stored
RIGHT = {
    "set-up": (DRAW, []),
    "text": ("print('frozen')", [stdout("frozen\n")]),
    "integer": ("print(393216, 'trained')", [stdout("393216 trained\n")]),
    "float": ("print('loss 0.43125')", [stdout("loss 0.43125\n")]),
    "float, last digit on another CPU": ("print('loss 0.4312')", [stdout("loss 0.4313\n")]),
    "float, rounding residue": ("print('largest difference 2.3e-07')", [stdout("largest difference 4.1e-07\n")]),
    "sign of a zero": ("print('[ 0.0000, 1.5000]')", [stdout("[-0.0000, 1.5000]\n")]),
    "result": ("1 + 1", [result("2")]),
    "silenced result": ("1 + 1;", []),
    "figure": ("figure(40)", [picture(line(40))]),
    "progress bar": (BAR, [stderr("train: 100%|####| 250/250 [01:07<00:00, 3.7it/s, loss=0.4312]")]),
    "time and rate": ("print('350 ms, 7,012 tokens/s')", [stdout("0.2 s, 6,380.5 tokens/s\n")]),
    "address": ("print(object())", [stdout("<object object at 0x7f0000000000>\n")]),
    "version": ("import sys; print('Python', sys.version.split()[0])", [stdout("Python 3.10.2\n")]),
    "computed memory": ("print('weights 26.0 GiB')", [stdout("weights 26.0 GiB\n")]),
    "widget": (
        WIDGET,
        [
            output(
                "display_data",
                data={
                    "text/plain": "Explorer(rank r=8) -> loss 0.4312",
                    "application/vnd.jupyter.widget-view+json": {"model_id": "1", "version_major": 2},
                },
            )
        ],
    ),
}

# what was stored wrongly
WRONG = {
    "text": ("print('frozen')", [stdout("trained\n")]),
    "integer": ("print(393216, 'trained')", [stdout("393217 trained\n")]),
    "float": ("print('loss 0.43125')", [stdout("loss 0.43200\n")]),
    "float, second of two": ("print(0.43125, 0.5)", [stdout("0.43125 0.6\n")]),
    "small float": ("print('rate 0.0001')", [stdout("rate 0.0002\n")]),
    "percentage": ("print('97.0 %')", [stdout("96.0 %\n")]),
    "result": ("1 + 1", [result("3")]),
    "figure": ("figure(40)", [picture(line(120))]),
    "figure's size": ("figure(40)", [picture(line(40, (320, 200)))]),
    "extra output in this run": ("print('a'); 1 + 1", [stdout("a\n")]),
    "extra stored output": ("print('a')", [stdout("a\n"), result("2")]),
    "extra stored figure": ("figure(40)", [picture(line(40)), picture(line(40))]),
    "missing stored figure": ("figure(40)", []),
    "output where a semicolon silences": ("1 + 1;", [result("2")]),
    "loss in a progress bar": (BAR, [stderr("train: 100%|####| 250/250 [01:07<00:00, 3.7it/s, loss=0.5]")]),
    "computed memory": ("print('weights 26.0 GiB')", [stdout("weights 28.0 GiB\n")]),
    "widget's first state": (
        WIDGET.replace("8", "16"),
        RIGHT["widget"][1],
    ),
    "error": ("1 / 0", []),
    "never run": ("x = 1", None),
    "never run, prints": ("print('a')", None),
}


def write(path, cells):
    notebook = new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})
    for i, (source, outputs) in enumerate(cells, 1):
        notebook.cells.append(
            new_code_cell(source.strip(), outputs=outputs or [], execution_count=None if outputs is None else i)
        )
    nbformat.write(notebook, path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Notebooks of right and of wrong cells beside the course's own conftest and rules."""
    folder = tmp_path_factory.mktemp("strict")
    for name in ("conftest.py", "sanitize.cfg"):
        shutil.copy(ROOT / "notebooks" / name, folder / name)
    write(folder / "right.ipynb", RIGHT.values())
    write(folder / "wrong.ipynb", [(DRAW, []), *WRONG.values()])
    return folder


def outcomes(folder, *options) -> dict[tuple[str, int], str]:
    """Run nbval on the folder in a process of its own: (notebook, cell) -> PASSED or FAILED."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    report = folder / "report.xml"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), f"--rootdir={folder}", str(folder)]
        + ["--nbval", "--nbval-current-env", "-p", "no:cacheprovider", "-o", "addopts=", f"--junitxml={report}"]
        + list(options),
        env={**environment, "PYTHONPATH": str(ROOT / "scripts")},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    cells = ElementTree.parse(report).iter("testcase")
    found = {}
    for cell in cells:
        notebook, number = cell.get("classname").split(".")[-2], int(cell.get("name").split()[-1])
        found[notebook, number] = "FAILED" if len(cell) else "PASSED"
    assert found, f"nbval ran nothing:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return found


@pytest.mark.parametrize("options", [(), ("-n2", "--dist=loadfile")], ids=["plain", "xdist"])
def test_wrong_outputs_fail_and_right_ones_pass(folder, options):
    seen = outcomes(folder, *options)
    expected = {("right", i): "PASSED" for i in range(len(RIGHT))}
    expected |= {("wrong", 0): "PASSED"} | {("wrong", i): "FAILED" for i in range(1, len(WRONG) + 1)}
    names = {("right", i): name for i, name in enumerate(RIGHT)} | {("wrong", 0): "set-up"}
    names |= {("wrong", i): name for i, name in enumerate(WRONG, 1)}
    surprises = {names[key]: (key[0], seen.get(key)) for key in expected if seen.get(key) != expected[key]}
    assert not surprises


def test_streams_may_come_in_pieces():
    whole, pieces = [stdout("a\nb\n"), stderr("w\n")], [stdout("a\n"), stderr("w\n"), stdout("b\n")]
    assert comparison.differences(whole, pieces, RULES) == []


@pytest.mark.parametrize(
    "stored, fresh, same",
    [
        ("0.50000", "0.50004", True),
        ("0.5000", "0.5002", False),
        ("0.4312", "0.4313", True),  # 0.43125 on two CPUs
        ("0.4312", "0.4314", False),
        ("0.0001", "0.0002", False),
        ("100.0 %", "99.9 %", False),
        ("0.12", "0.13", False),
        ("12", "13", False),
        ("1.2.3", "1.2.4", False),
        ("3.4M", "3.5M", False),
        ("1e-3", "2e-3", False),
        ("nan", "0.5", False),
        ("-0.50000", "0.50000", False),
    ],
)
def test_tolerance(stored, fresh, same):
    assert comparison.same_text(stored, fresh) is same


def test_progress_bar_that_is_cleared_leaves_nothing():
    cleared = stderr("\r 50%|##  | 1/2 [00:01<00:01, 1.0it/s]\r" + " " * 40 + "\r")
    assert comparison.comparable([cleared], RULES) == {}


def test_run_keeps_equal_outputs_and_leaves_a_failing_notebook_alone(tmp_path):
    path = tmp_path / "lesson.ipynb"
    timed = ("import time; print(f'{time.time():.0f} s')", [stdout("7 s\n")])
    write(path, [timed, ("print('new')", [stdout("old\n")])])
    assert comparison.run(path) == 1
    cells = nbformat.read(path, as_version=4).cells
    assert [cell.outputs[0].text for cell in cells] == ["7 s\n", "new\n"]

    before = path.read_bytes()
    write(path, [("print('changed')", None), ("1 / 0", None)])
    broken = path.read_bytes()
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        comparison.run(path)
    assert path.read_bytes() == broken != before


def test_count_leaves_out_what_is_marked_or_sanitised_away():
    cells = [
        new_code_cell("print(1)", outputs=[stdout("1\n")]),
        new_code_cell("# NBVAL_IGNORE_OUTPUT\nprint(1)", outputs=[stdout("1\n")]),
        new_code_cell("print(1)", outputs=[stdout("1\n")], metadata={"tags": ["nbval-ignore-output"]}),
        new_code_cell("clear()", outputs=[stderr("\r   \r")]),
        new_code_cell("x = 1"),
    ]
    count = comparison.count_cells(new_notebook(cells=cells), RULES)
    assert (count.cells, count.with_output, count.compared, count.share) == (5, 4, 1, 0.25)
