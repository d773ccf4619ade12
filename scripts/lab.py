"""Start JupyterLab at the first notebook: loopback only, with a token, in this environment.

    python scripts/lab.py [options of jupyter lab]
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FIRST = "notebooks/00_start_here.ipynb"


def has_display() -> bool:
    """Whether a browser window can open. Without one Jupyter would start a text browser in this very terminal."""
    if os.environ.get("SSH_CONNECTION") and not os.environ.get("DISPLAY"):
        return False
    return sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def command(options: list[str]) -> list[str]:
    line = [sys.executable, "-m", "jupyterlab", "--ip=127.0.0.1", f"--ServerApp.root_dir={ROOT}"]
    line += [f"--LabApp.default_url=/lab/tree/{FIRST}"]
    if not has_display():
        line += ["--no-browser"]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        line += ["--allow-root"]  # containers; the address is the loopback and needs the token
    return line + options


def main() -> None:
    # The lessons' networks are so small that more threads make a step slower on a busy machine; kernels inherit this.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not has_display():
        print("No display here: open the address with the token, below, in a browser.")
        print("From another machine, first: ssh -L 8888:127.0.0.1:8888 THIS_MACHINE", flush=True)
    line = command(sys.argv[1:])
    if os.name == "nt":  # execv does not wait there: the prompt would come back while the server runs
        import subprocess

        sys.exit(subprocess.call(line))
    os.execv(line[0], line)


if __name__ == "__main__":
    main()
