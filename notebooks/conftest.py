"""Makes nbval strict: a lesson passes only if it prints and draws again what is stored in it.

    pytest notebooks --nbval            every output compared (scripts/notebooks.py and sanitize.cfg say how)
    pytest notebooks --nbval-lax        only run: for a GPU, another base model or other package versions

Plain nbval lets a cell pass that was never run, compares no figures, knows no tolerance for numbers and ignores a
trailing semicolon; these are the four things changed here. Planned errors need the tag raises-exception; a cell whose
output cannot be the same twice takes the tag nbval-ignore-output, and tests/test_house.py limits how many may.
"""

import sys
from functools import partial
from pathlib import Path

import nbval.plugin
import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent / "scripts"))
import notebooks as rules_of_comparison  # noqa: E402

RULES = rules_of_comparison.read_rules(Path(__file__).with_name("sanitize.cfg"))


def compare_outputs(cell, fresh, stored, skip_compare=None):
    cell.comparison_traceback = rules_of_comparison.differences(stored, fresh, RULES)
    return not cell.comparison_traceback


def pytest_configure(config):
    nbval.plugin.IPyNbCell.compare_outputs = compare_outputs
    if config.option.nbval and not config.option.nbval_lax:
        rules_of_comparison.fix_environment()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item):
    if isinstance(item, nbval.plugin.IPyNbCell) and not item.options["skip"]:
        if item.cell.execution_count is None and item.cell.source.strip():
            item.raise_cell_error("never run: no output is stored, so nothing would be compared (make notebooks)", "")
        # With history a trailing semicolon silences a cell, as it does in Jupyter.
        kernel = item.parent.kernel
        kernel.execute_cell_input = partial(kernel.kc.execute, store_history=True, stop_on_error=False)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, config):
    if config.option.nbval or config.option.nbval_lax:
        counts = rules_of_comparison.count_course()
        terminalreporter.section("outputs compared")
        for name, count in counts.items():
            terminalreporter.line(f"{name:30} {count}")
        terminalreporter.line(f"{'all':30} {sum(counts.values(), rules_of_comparison.Count())}")
