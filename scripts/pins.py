"""Write requirements.txt: exact versions of everything, for Python 3.10 to 3.13 on Linux, macOS and Windows.

    python scripts/pins.py [--upgrade]

Versions already in requirements.txt stay where they still fit (--upgrade: newest). uv, installed for this in a
temporary environment, resolves for all Pythons and platforms at once, which pip cannot.
"""

import os
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH = "torch==2.13.0"
# On Linux torch names its own CUDA packages exactly; its CPU build needs none, so they are not pinned here.
CUDA = re.compile(r"(nvidia-|cuda-)")
HEADER = """\
# Exact versions of everything the course runs on, made by `make pins` from pyproject.toml: edit that one, not this.
# Two lines where a package's newer versions need Python 3.11. What torch brings for CUDA, it pins.
"""


def main() -> None:
    target = ROOT / "requirements.txt"
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder, "Scripts/python.exe" if os.name == "nt" else "bin/python")
        subprocess.run([python, "-m", "pip", "install", "--quiet", "uv"], check=True)
        constraint, output = Path(folder, "constraint.txt"), Path(folder, "requirements.txt")
        constraint.write_text(TORCH + "\n")
        output.write_text(target.read_text() if target.exists() else "")
        subprocess.run(
            [python, "-m", "uv", "pip", "compile", "pyproject.toml", "--extra", "dev", "--universal"]
            + ["--python-version", "3.10", "--constraint", constraint, "--no-annotate", "--no-header", "--quiet"]
            + ["--output-file", output, *sys.argv[1:]],
            cwd=ROOT,
            check=True,
        )
        lines = [line for line in output.read_text().splitlines(keepends=True) if not CUDA.match(line)]
    temporary = target.with_name(".requirements.txt.tmp")
    temporary.write_text(HEADER + "".join(lines))
    os.replace(temporary, target)
    print(f"{target.name}: {len(lines)} pins")


if __name__ == "__main__":
    main()
