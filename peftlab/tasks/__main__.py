"""`python -m peftlab.tasks --write [DIR]`: write the files of every task anew, from seed 0."""

import argparse
import json
from pathlib import Path

from ..paths import DATA, atomic_write
from . import NAMES, generate


def write(folder: Path) -> list[Path]:
    """Write <task>/<split>.jsonl for every task below `folder`; the same bytes on every machine."""
    paths = []
    for name in NAMES:
        for split, rows in generate(name).items():
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            paths.append(atomic_write(folder / name / f"{split}.jsonl", lines))
    return paths


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m peftlab.tasks", description="The course's generated data sets.")
    parser.add_argument(
        "--write", nargs="?", const=DATA / "tasks", type=Path, metavar="DIR", required=True,
        help="write every task's train, valid and test files below DIR (default: %(const)s)",
    )  # fmt: skip
    for path in write(parser.parse_args(argv).write):
        with path.open(encoding="utf-8") as f:
            print(f"{path}  {sum(1 for _ in f):5d} rows  {path.stat().st_size / 1024:6.1f} KiB")


if __name__ == "__main__":
    main()
