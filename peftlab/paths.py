"""Where the course's data lies, and how files are written so that a crash or a full disk loses nothing."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

DATA = Path(os.environ.get("PEFTLAB_DATA") or Path(__file__).resolve().parent.parent / "data")


def _sync(path: Path) -> None:
    """Force a file's bytes, or a folder's entries, to disk (folders cannot be opened on Windows: skipped there)."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def atomic_files(contents: Mapping[Path, bytes | str]) -> None:
    """Write files that belong together: all are complete on disk before the first one takes its name.

    Raises OSError (disk full, no permission, …) with the old files untouched and no temporary file left.
    """
    written: dict[str, Path] = {}
    try:
        for path, content in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
            written[temporary] = path
            with os.fdopen(handle, "wb") as f:
                f.write(content.encode() if isinstance(content, str) else content)
                f.flush()
                os.fsync(f.fileno())
            os.chmod(temporary, 0o644)  # mkstemp makes private files; adapters are meant to be shared
        for temporary, path in written.items():
            os.replace(temporary, path)
    except OSError as error:
        at = ", ".join(map(str, contents))
        why = f"could not write {at} ({error.strerror}); what was there before is untouched"
        raise OSError(error.errno, why) from error
    finally:
        for temporary in written:
            Path(temporary).unlink(missing_ok=True)


def atomic_write(path: str | os.PathLike, content: bytes | str) -> Path:
    """Write a file so that `path` holds either its old content or all of the new one, whatever happens in between."""
    path = Path(path)
    atomic_files({path: content})
    return path


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[Path]:
    """A new folder to fill; when the block ends without an error it takes the place of `path`, else it is removed.

    An existing folder at `path` is moved aside first and put back if the swap fails, so a complete one is always there.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    os.chmod(temporary, 0o755)
    old = temporary.with_name(temporary.name + ".old")
    try:
        yield temporary
        for file in [*temporary.rglob("*"), temporary]:
            os.chmod(file, 0o755 if file.is_dir() else 0o644)  # some libraries write private files
            _sync(file)
        if path.exists():
            path.rename(old)
        try:
            temporary.rename(path)
        except BaseException:
            if old.exists():
                old.rename(path)
            raise
        shutil.rmtree(old, ignore_errors=True)
        _sync(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
