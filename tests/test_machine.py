"""The machine's report: the advice for machines good and bad, and that healthy ones print alike once sanitised."""

from dataclasses import replace

import pytest

import notebooks
from peftlab.course.machine import GIB, LESSON_MEMORY, LIBRARIES, Machine, check_machine

GOOD = Machine(cores=2, threads=1, memory=8 * GIB, free_memory=4 * GIB, free_disk=30 * GIB,
               versions={"Python": "3.12.4", "torch": "2.13.0+cpu", "transformers": "5.23.0"},
               pinned={"torch": "2.13.0", "transformers": "5.23.0"})  # fmt: skip


def advice(machine: Machine) -> dict[str, str]:
    return {check.what: check.words for check in machine.checks if not check.fine}


def test_a_small_healthy_machine_needs_nothing():
    assert GOOD and not advice(GOOD)
    assert "✘" not in repr(GOOD)


@pytest.mark.parametrize(
    ("change", "what", "cure"),
    [
        ({"free_memory": LESSON_MEMORY - 1}, "memory", "shut down"),
        ({"free_disk": 0}, "disk", "make some room"),
        ({"threads": 8}, "threads", "OMP_NUM_THREADS=1"),
        ({"versions": {"torch": "2.6.0"}}, "versions", "torch 2.6.0 (not 2.13.0)"),
    ],
)
def test_each_lack_is_named_with_its_cure(change, what, cure):
    machine = replace(GOOD, **change)
    assert not machine and list(advice(machine)) == [what]
    assert cure in advice(machine)[what] and f"✘ {what}" in repr(machine)


def test_no_gpu_is_fine_and_a_gpu_says_what_fits():
    assert "none needed" in repr(GOOD)
    card = repr(replace(GOOD, gpus=(("Some Card", 48 * GIB),), threads=8))
    # 0.7 · 48 GiB / 2 bytes = 18.0e9; / (4.127/8) bytes = 69.9e9: the 65B on 48 GB of arXiv:2305.14314 fits
    assert "roughly 18 billion parameters in 16 bits, 70 in 4 bits" in card and "✘" not in card


def test_another_base_and_unknown_pins_are_said():
    assert "some/model (PEFTLAB_BASE)" in repr(replace(GOOD, base="some/model"))
    assert "versions: not compared" in repr(replace(GOOD, pinned={}))


def test_healthy_machines_print_alike_once_sanitised():
    other = replace(GOOD, cores=64, memory=503 * GIB, free_memory=77 * GIB, free_disk=1500 * GIB,
                    versions={"Python": "3.11.0rc1", "torch": "2.13.0", "transformers": "5.23.0"})  # fmt: skip
    texts = []
    for machine in (GOOD, other):
        text = repr(machine)
        for pattern, replacement in notebooks.read_rules():
            text = pattern.sub(replacement, text)
        texts.append(text)
    assert texts[0] == texts[1]
    assert "less than 2 GiB" in texts[0], "what the course needs is not a measurement and stays"


def test_this_machine():
    here = check_machine()
    assert here.cores >= 1 and here.threads >= 1 and here.free_disk > 0
    assert 0 < here.free_memory <= here.memory
    assert set(here.versions) <= {"Python", *LIBRARIES} and "torch" in here.versions
    assert here.pinned["torch"] == "2.13.0", "from requirements.txt"
    assert repr(here)
