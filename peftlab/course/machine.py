"""`check_machine()`: what this computer offers the course, and what to do where that is too little."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch

GIB = 2**30
LESSON_MEMORY = 2 * GIB  # of a lesson's kernel; those of the course stay below 1.5 GiB
LESSON_DISK = GIB // 4  # what all lessons write is a few MiB
LIBRARIES = ("torch", "transformers", "accelerate", "datasets", "safetensors", "ipywidgets", "matplotlib")
PINS = Path(__file__).resolve().parents[2] / "requirements.txt"

# Bytes of a frozen parameter, in 16 bits and in NF4 (4.127 bits with double quantisation; Dettmers et al. 2023,
# arXiv:2305.14314), and the part of a card's memory that they may take: the rest is for activations and the adapter.
# With these, 48 GiB hold a 65B model in NF4, as that paper says.
BYTES_16, BYTES_NF4, WEIGHTS_SHARE = 2.0, 4.127 / 8, 0.7


class Check(NamedTuple):
    """One thing that was looked at: whether it is fine, and what it means or what to do."""

    what: str
    fine: bool
    words: str


@dataclass(frozen=True)
class Machine:
    """A computer as the course sees it; prints as a short report with advice. Sizes are in bytes."""

    cores: int
    threads: int  # that torch uses
    memory: int
    free_memory: int
    free_disk: int
    gpus: tuple[tuple[str, int], ...] = ()  # (name, memory) of each CUDA device
    versions: dict[str, str] = field(default_factory=dict)
    pinned: dict[str, str] = field(default_factory=dict)  # the versions that the stored outputs were made with
    base: str = ""  # what PEFTLAB_BASE names; "": the embedded model

    @property
    def checks(self) -> list[Check]:
        """What the course needs, one by one."""
        return [self._memory(), self._disk(), self._threads(), self._versions(), self._gpu(), self._base()]

    def _memory(self) -> Check:
        fine = self.free_memory >= LESSON_MEMORY
        rest = "" if fine else "; shut down other notebooks (menu Kernel) and large programs first"
        return Check("memory", fine, f"a lesson needs less than {LESSON_MEMORY / GIB:.0f} GiB{rest}")

    def _disk(self) -> Check:
        fine = self.free_disk >= LESSON_DISK
        return Check("disk", fine, "the lessons write a few MiB, all below notebooks/output"
                     + ("" if fine else "; make some room, or saving an adapter will fail"))  # fmt: skip

    def _threads(self) -> Check:
        if self.threads == 1 or self.gpus:
            return Check("threads", True, "as many as the stored outputs were made with")
        return Check("threads", False, f"torch uses {self.threads} threads: slower for models this small, and sums "
                     "round differently; set OMP_NUM_THREADS=1 before Jupyter starts (make lab does)")  # fmt: skip

    def _versions(self) -> Check:
        other = [f"{name} {self.versions[name]} (not {pin})" for name, pin in self.pinned.items()
                 if self.versions.get(name, pin).partition("+")[0] != pin]  # fmt: skip
        if other:
            return Check("versions", False, f"other than the stored outputs were made with: {', '.join(other)}; "
                         "last digits and figures may differ")  # fmt: skip
        same = "those that the stored outputs were made with"
        return Check("versions", True, same if self.pinned else "not compared")

    def _gpu(self) -> Check:
        if not self.gpus:
            return Check("GPU", True, "none needed: every lesson is made for the CPU")
        most = max(size for _, size in self.gpus) * WEIGHTS_SHARE / 1e9
        return Check("GPU", True, f"room for LoRA on a base of roughly {most / BYTES_16:.0f} billion parameters "
                     f"in 16 bits, {most / BYTES_NF4:.0f} in 4 bits; set PEFTLAB_BASE to try one")  # fmt: skip

    def _base(self) -> Check:
        if self.base:
            return Check("base", True, f"{self.base} (PEFTLAB_BASE); answers will differ from the stored ones")
        return Check("base", True, "the embedded model; nothing has to be downloaded")

    def __bool__(self) -> bool:
        """Whether all is fine."""
        return all(check.fine for check in self.checks)

    def __repr__(self) -> str:
        gpus = ", ".join(f"{name} with {size / GIB:.0f} GiB" for name, size in self.gpus) or "none that torch can use"
        facts = {
            "processor": f"{_many(self.cores, 'core')}, torch uses {_many(self.threads, 'thread')}",
            "memory": f"free {self.free_memory / GIB:.1f} GiB of RAM {self.memory / GIB:.1f} GiB",
            "disk": f"free {self.free_disk / GIB:.1f} GiB",
            "GPU": gpus,
        }
        lines = [f"{name:<11}{said}" for name, said in facts.items()]
        versions = [f"{name} {version}" for name, version in self.versions.items()]
        for i in range(0, len(versions), 4):  # not by width: versions of any length must break lines alike
            lines.append(f"{'' if i else 'versions':<11}{', '.join(versions[i : i + 4])}")
        return "\n".join([*lines, "", *(f"{'✔' if c.fine else '✘'} {c.what}: {c.words}" for c in self.checks)])


def check_machine(folder: str | os.PathLike = ".") -> Machine:
    """Look at this computer: cores, memory, disk at `folder`, GPUs, versions, the base model that is set."""
    memory, free = _memory()
    versions = {"Python": platform.python_version()} | {name: v for name in LIBRARIES if (v := _version(name))}
    cards = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    gpus = tuple((torch.cuda.get_device_name(i), torch.cuda.get_device_properties(i).total_memory) for i in cards)
    affinity = getattr(os, "sched_getaffinity", None)  # fewer than the machine has, in a container
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return Machine(cores, torch.get_num_threads(), memory, free, shutil.disk_usage(folder).free, gpus, versions,
                   _pins(), os.environ.get("PEFTLAB_BASE", ""))  # fmt: skip


def _many(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _pins() -> dict[str, str]:
    """The exact versions of `LIBRARIES` in requirements.txt that hold for this Python; {} outside a source tree."""
    from packaging.requirements import Requirement

    try:
        lines = PINS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    wanted = (Requirement(line) for line in lines if line and not line.startswith(("#", "-")))
    return {r.name: str(r.specifier).removeprefix("==") for r in wanted
            if r.name in LIBRARIES and (r.marker is None or r.marker.evaluate())}  # fmt: skip


def _memory() -> tuple[int, int]:
    """(all, free) bytes of memory; in a container those that it is granted, not the whole machine's."""
    import psutil

    found = psutil.virtual_memory()
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used -= int(stat.get("inactive_file", 0))  # cached files, given up when memory is asked for
    except (OSError, ValueError):  # no Linux container, or one without a limit ("max")
        return found.total, found.available
    return min(found.total, limit), max(0, min(found.available, limit - used))
