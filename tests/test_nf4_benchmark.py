"""The NF4 benchmark measures what it says: same results, every row, memory of torch and of numpy."""

import json

import numpy as np
import pytest
import torch
from families import script

from peftlab import lab

nf4 = script("nf4")


def test_memory_is_counted_whoever_gave_it():
    def work():
        scratch = torch.empty(2 * nf4.MIB, dtype=torch.uint8)
        room = torch.from_numpy(np.empty(3 * nf4.MIB, np.uint8))
        return room[: len(scratch)]

    assert nf4.peak(work) / nf4.MIB == pytest.approx(5, abs=0.1)  # and a few objects of Python's


def test_a_small_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)  # that of the tests stays
    rows = nf4.main(["--rounds", "2", "--size", "256", "--rows", "1", "8", "--json", str(tmp_path / "out.json")])
    by_name = {row["work"]: row for row in rows}
    assert {"quantise", "dequantise", "linear, 1 row", "linear, 8 rows", "forward + backward, 8 rows"} <= set(by_name)
    assert by_name["quantise"]["error"] == by_name["dequantise"]["error"] == 0
    dense = 256 * 256 * 4 / nf4.MIB
    assert by_name["dequantise"]["theirs_peak_mib"] >= dense and by_name["dequantise"]["ours_peak_mib"] >= dense
    assert all(0 < row["ratio"][0] <= row["ratio"][1] <= row["ratio"][2] for row in rows)
    out = capsys.readouterr().out
    assert all(name in out for name in by_name) and "bitsandbytes 0." in out
    assert json.loads((tmp_path / "out.json").read_text())["rows"][0]["work"] == "quantise"


def test_other_results_are_no_comparison():
    work = nf4.Work("product", lambda: torch.ones(3), lambda: torch.ones(3) * 1.01, 1e-3)
    with pytest.raises(SystemExit, match="product: results differ by"):
        nf4.measure(work, 2, lab.CLOCKS["wall"])
