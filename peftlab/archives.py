"""Archives of adapters, unpacked without trusting a name or a size in them."""

from __future__ import annotations

import contextlib
import gzip
import io
import lzma
import re
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from .files import CONFIG, WEIGHTS
from .paths import atomic_write

LIMIT = 4 * 2**30  # bytes that an archive may unpack to; r = 64 on all linear layers of a 70B Llama: 3.3 GB, float32
MEMBERS = 10_000  # of an archive; an adapter has two files
CHUNK = 2**20
PACKED = {".zip": "zip", ".tar": "w:", ".tar.gz": "w:gz", ".tgz": "w:gz"}  # ending -> how it is written
UNREADABLE = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError, OSError)



def _too_large(limit: int) -> ValueError:
    return ValueError(f"it unpacks to more than {limit:,} bytes; raise limit=… if it is meant to")


class _Limited(io.RawIOBase):
    """A stream that gives no more than so many bytes: headers and members that unpack to more are never held.

    Headers and padding are not content: 1024 bytes for each of the most members there may be are let through too.
    """

    def __init__(self, inner: IO[bytes], limit: int):
        self.inner, self.left, self.limit = inner, limit + 1024 * MEMBERS, limit

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        block = self.inner.read(min(size if size >= 0 else CHUNK, CHUNK))
        self.left -= len(block)
        if self.left < 0:
            raise _too_large(self.limit)
        return block


def _safe(name: str) -> PurePosixPath:
    """The path of a member, or a ValueError for one that leaves the folder it is unpacked into."""
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or re.match(r"[A-Za-z]:", name) or "\0" in name:
        raise ValueError(f"its member {name!r} points out of the archive")
    return path


def _tar_members(archive: Path, limit: int) -> Iterator[tuple[str, IO[bytes]]]:
    """(path, content) of each file, read from start to end, so that nothing has to be believed before it is counted."""
    with contextlib.ExitStack() as opened:
        file: Any = opened.enter_context(open(archive, "rb"))
        zipped = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        file = opened.enter_context(gzip.GzipFile(fileobj=file)) if zipped else file
        stream = _Limited(file, limit)
        tar = opened.enter_context(tarfile.open(fileobj=cast(Any, stream), mode="r|"))
        for number, member in enumerate(tar):
            if number >= MEMBERS:
                raise ValueError(f"it has more than {MEMBERS:,} members")
            if not (member.isfile() or member.isdir()) or member.issparse():
                raise ValueError(f"its member {member.name!r} is a link, a device or a sparse file")
            content = tar.extractfile(member)
            if content is not None:
                yield member.name, content
        while stream.read():  # to the end, behind which gzip's checksum stands: tarfile stops before it
            pass


def _zip_members(archive: Path, limit: int) -> Iterator[tuple[str, IO[bytes]]]:
    with zipfile.ZipFile(archive) as packed:
        members = packed.infolist()
        if len(members) > MEMBERS:
            raise ValueError(f"it has more than {MEMBERS:,} members")
        for member in members:
            kind = stat.S_IFMT(member.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise ValueError(f"its member {member.filename!r} is a link or a device")
            _safe(member.filename)
        if sum(member.file_size for member in members) > limit:
            raise _too_large(limit)
        for member in members:
            if not member.is_dir():
                with packed.open(member) as content:
                    yield member.filename, content


def unpack(archive: Path, folder: Path, limit: int = LIMIT) -> None:
    """Write the adapter's two files of a .zip, .tar or .tar.gz into `folder`; ValueError for what is not safe in it.

    No member's name is used as a path: all that can appear are the two files that an adapter has.
    """
    found: set[PurePosixPath] = set()
    try:
        members = _zip_members(archive, limit) if zipfile.is_zipfile(archive) else _tar_members(archive, limit)
        left = limit
        for name, content in members:
            path = _safe(name)
            if path.name not in (CONFIG, WEIGHTS):
                continue
            if path in found or len({p.parent for p in found | {path}}) > 1:
                listed = ", ".join(str(p) for p in sorted({*found, path}))
                raise ValueError(f"it holds more than one adapter ({listed}); pack one of them alone")
            found.add(path)
            with open(folder / path.name, "wb") as out:
                while block := content.read(CHUNK):
                    left -= len(block)
                    if left < 0:
                        raise _too_large(limit)
                    out.write(block)
    except UNREADABLE as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # disk full, no permission: not the archive's fault
        raise ValueError(f"{archive} is no .zip, .tar or .tar.gz that can be read ({error})") from None
    except ValueError as error:
        raise ValueError(f"{archive} is refused: {error}") from None


def pack(folder: Path, archive: Path, inside: str) -> Path:
    """Write the adapter's two files into a .zip, .tar or .tar.gz, under the folder name `inside`; returns its path."""
    mode = next((mode for end, mode in PACKED.items() if archive.name.lower().endswith(end)), None)
    if mode is None:
        raise ValueError(f"{archive.name!r}: the name of an archive ends with {', '.join(PACKED)}")
    packed = io.BytesIO()
    if mode == "zip":
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as out:
            for file in (CONFIG, WEIGHTS):
                out.write(folder / file, f"{inside}/{file}")
    else:
        with tarfile.open(fileobj=packed, mode=cast(Any, mode)) as tar:
            for file in (CONFIG, WEIGHTS):
                tar.add(folder / file, f"{inside}/{file}", filter=_nobodys)
    return atomic_write(archive, packed.getvalue())


def _nobodys(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Without the names of this machine's users."""
    return member.replace(uid=0, gid=0, uname="", gname="", deep=False)
