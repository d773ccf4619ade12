"""`python -m peftlab <verb>`: what makes sense without a notebook. A verb is a module in peftlab/verbs/."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from . import __version__

VERBS = ("count", "export", "merge", "methods", "serve", "vram")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m peftlab", description="Parameter-efficient fine-tuning, exact and measured.",
        epilog="python -m peftlab <verb> --help says more about each of them.",
    )  # fmt: skip
    top.add_argument("--version", action="version", version=f"peftlab {__version__}")
    verbs = top.add_subparsers(dest="verb", metavar="<verb>", required=True, title="verbs")
    for name in VERBS:
        module = importlib.import_module(f".verbs.{name}", __package__)
        one = verbs.add_parser(name, help=module.HELP, description=module.__doc__, allow_abbrev=False,
                               formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
        module.arguments(one)
        one.set_defaults(run=module.run)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. Wrong input ends with one line that says what is wrong, and status 2."""
    args = parser().parse_args(argv)
    try:
        args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough: `| head`; Python's own flush at the end must not complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, TypeError) as error:
        print(f"peftlab {args.verb}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
