"""Many adapters on disk: a folder with an index, that any number of processes may read and write at once.

A store is a folder with one subfolder per adapter and version, and an index:

    index.json                        name -> version, method, hyper-parameters, sizes, sha256, base, date
    sql/1/  sql/2/                    adapter_config.json and adapter_model.safetensors, in HF PEFT's format
    reviews/1/

A version's folder is complete before it takes its name and never changes after that, and the index is replaced as a
whole: whoever reads sees the old state or the new one. Writers take turns by a lock on a file, which a process that
dies gives back. `Cache` (cache.py) keeps some of a store's adapters attached to a model.
"""

from __future__ import annotations

import contextlib
import datetime
import difflib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from torch import nn

from .archives import CHUNK, LIMIT, pack, unpack
from .cache import Cache
from .files import CONFIG, WEIGHTS, hyper_names, method_of, patterns_of, read_folder, save_adapter
from .paths import atomic_folder, atomic_write

INDEX, LOCK, REMOVED, FORMAT = "index.json", ".lock", ".removed", 1
# Names that are devices on Windows, with any ending.
RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(10))}
BASE = "base"  # what the model without an adapter is called where a name is needed


@dataclass(frozen=True)
class Entry:
    """What the index knows of one adapter, without its weights."""

    name: str
    version: int
    method: str  # name in METHODS
    hyper: dict[str, Any]
    targets: Any  # HF PEFT's target_modules
    parameters: int  # numbers in the file
    bytes: int  # of the weights' file
    sha256: str  # of the weights' file
    layout: str  # equal for two adapters that can replace each other in place: method, hyper-parameters, shapes
    base: str | None  # Hub id of the base, if the file names one
    fingerprint: str | None  # of the base's first weights: equal for adapters on the same layers of one base
    date: str  # when the weights' file was written here


# --- one folder -----------------------------------------------------------------------------------------------------


def check_name(name: str) -> None:
    """ValueError for a name that is no safe folder name on some system, or that no adapter can be attached under."""
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]{0,63}", name):
        raise ValueError(f"adapter name {name!r} cannot be used; take up to 64 of the letters A to Z, digits, '_' and "
                         "'-', such as 'sql_v2'")  # fmt: skip
    if name.lower() in RESERVED or name.lower() == BASE or hasattr(nn.ModuleDict(), name):
        why = "the name of the model without an adapter" if name.lower() == BASE else "a reserved word"
        raise ValueError(f"adapter name {name!r} cannot be used, it is {why}; call it '{name}_1', for example")


def describe(name: str, folder: Path, version: int = 1) -> Entry:
    """What an adapter's folder holds; FileNotFoundError or ValueError says what is missing, damaged or unknown."""
    config, tensors, metadata = read_folder(folder)
    method = method_of(config, folder)
    hyper = {ours: config[theirs] for ours, theirs in hyper_names(method).items() if theirs in config}
    shapes = sorted((key, list(tensor.shape)) for key, tensor in tensors.items())
    by_layer = {key: config.get(key) for key in patterns_of(method).values()}
    weights = folder / WEIGHTS
    with open(weights, "rb") as f:
        digest = _sha256(f)
    written = datetime.datetime.fromtimestamp(weights.stat().st_mtime, datetime.timezone.utc)
    numbers = metadata.get("peftlab_base")
    return Entry(
        name=name, version=version, method=method.__name__, hyper=hyper, targets=config.get("target_modules"),
        parameters=sum(tensor.numel() for tensor in tensors.values()), bytes=weights.stat().st_size, sha256=digest,
        layout=_short(json.dumps([method.__name__, hyper, by_layer, shapes], sort_keys=True)),
        base=config.get("base_model_name_or_path"), fingerprint=_short(numbers) if numbers else None,
        date=written.isoformat(timespec="seconds"),
    )  # fmt: skip


def _sha256(file: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while block := file.read(CHUNK):
        digest.update(block)
    return digest.hexdigest()


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


# --- the store ------------------------------------------------------------------------------------------------------


class Store:
    """A folder of adapters. Opening it reads nothing; the index is read when needed, weights when an adapter is used.

    Any number of processes may read and write it at once. Raises ValueError for an index that is lost or damaged:
    `rebuild()` makes it again from the folders.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{self.folder} is a file; a store is a folder")
        self._seen: tuple[int, int, int] | None = None
        self._entries: dict[str, Entry] = {}

    # reading

    def entries(self) -> dict[str, Entry]:
        """name -> what the index knows of it, in alphabetical order, as of now."""
        path = self.folder / INDEX
        try:
            with open(path, encoding="utf-8") as f:
                info = os.fstat(f.fileno())
                seen = (info.st_mtime_ns, info.st_size, info.st_ino)
                if seen != self._seen:
                    self._entries, self._seen = _parsed(f.read()), seen
        except FileNotFoundError:
            if self._folders():  # the index comes before the first folder, so if it is there now it was made just now
                if path.exists():
                    return self.entries()
                raise ValueError(f"{path} is lost. The adapters are still there: Store({str(self.folder)!r}).rebuild() "
                                 "makes the index again") from None  # fmt: skip
            self._entries, self._seen = {}, None
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}). The adapters are still there: "
                             f"Store({str(self.folder)!r}).rebuild() makes the index again") from None  # fmt: skip
        return dict(self._entries)

    def names(self) -> list[str]:
        return list(self.entries())

    def __len__(self) -> int:
        return len(self.entries())

    def __contains__(self, name: object) -> bool:
        return name in self.entries()

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __repr__(self) -> str:
        entries = self.entries().values()
        return f"Store({str(self.folder)!r}): {len(entries)} adapters, {sum(e.bytes for e in entries):,} bytes"

    def info(self, name: str) -> Entry:
        """What the index knows of one adapter. LookupError for a name that is not in the store."""
        entries = self.entries()
        if name not in entries:
            close = difflib.get_close_matches(str(name), entries, n=1, cutoff=0.5)
            meant = f"; did you mean {close[0]!r}?" if close else "."
            some = ", ".join(list(entries)[:8]) + (", …" if len(entries) > 8 else "")
            raise LookupError(f"no adapter named {name!r} is in the store {self.folder}{meant} There: {some or 'none'}")
        return entries[name]

    def path(self, name: str) -> Path:
        """The folder of the adapter's present version, for `load_adapter`. It stays as it is until `clean()`."""
        folder = self._folder(self.info(name))
        for file in (CONFIG, WEIGHTS):
            if not (folder / file).is_file():
                raise FileNotFoundError(f"the index names {folder}, which has no {file}: add {name!r} again, or go "
                                        "back to what is there with rebuild()")  # fmt: skip
        return folder

    def verify(self, *names: str) -> None:
        """Read the weights (default: of all) and compare them with the index. ValueError names those that differ."""
        wrong = []
        for name in names or self.names():
            with open(self.path(name) / WEIGHTS, "rb") as f:
                wrong += [name] if _sha256(f) != self.info(name).sha256 else []
        if wrong:
            raise ValueError(f"the weights of {', '.join(wrong)} are not those that were added: a damaged disk, or a "
                             "file changed by hand; add them again")  # fmt: skip

    def cache(self, model: nn.Module, capacity: int = 16, max_bytes: int | None = None) -> Cache:
        return Cache(model, self, capacity, max_bytes)

    # writing

    def add(self, name: str, source: str | os.PathLike | nn.Module, *, limit: int = LIMIT) -> Entry:
        """Take in a copy of an adapter, as a new version if the name is there already; returns what the index says.

        source: a folder with adapter_config.json and adapter_model.safetensors (no other file is taken), a .zip, .tar
        or .tar.gz of one (at most `limit` bytes unpacked), or a model to which an adapter of this name is attached.
        Raises ValueError, FileNotFoundError or OSError with the store as it was.
        """
        check_name(name)
        if not isinstance(source, nn.Module) and not Path(source).exists():
            raise FileNotFoundError(f"there is no folder or archive {str(source)!r}")
        with self._writing():
            entries = self.entries()
            spelled = {other.lower(): other for other in [*entries, *self._folders()]}
            if spelled.get(name.lower(), name) != name:
                raise ValueError(f"{name!r} and {spelled[name.lower()]!r} in this store would be one folder on systems "
                                 "that do not tell A from a; use that name, or another one")  # fmt: skip
            if not (self.folder / INDEX).exists():
                self._write(entries)  # a folder without an index is one whose index was lost
            version = max(self._versions(name), default=0) + 1
            try:
                with atomic_folder(self.folder / name / str(version)) as new:
                    self._bring(name, source, new, limit)
                    entry = self._described(name, source, new, version)
            finally:
                with contextlib.suppress(OSError):
                    (self.folder / name).rmdir()  # if it is empty: a first version that was refused
            self._write({**entries, name: entry})
        return entry

    def _bring(self, name: str, source: str | os.PathLike | nn.Module, new: Path, limit: int) -> None:
        if isinstance(source, nn.Module):
            save_adapter(source, new, name)
        elif Path(source).is_dir():
            if not all((Path(source) / file).is_file() for file in (CONFIG, WEIGHTS)):
                read_folder(Path(source))  # says what is missing, and of files that hold pickle what to do
            for file in (CONFIG, WEIGHTS):
                shutil.copyfile(Path(source) / file, new / file)
        else:
            unpack(Path(source), new, limit)

    def _described(self, name: str, source: Any, new: Path, version: int) -> Entry:
        try:
            return describe(name, new, version)
        except (ValueError, FileNotFoundError) as error:
            kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
            raise kind(f"{str(error).replace(str(new), str(source))}; nothing was added") from None

    def remove(self, *names: str) -> None:
        """Take adapters out of the index. Their files stay until `clean()`: somebody may be reading them."""
        with self._writing():
            entries = self.entries()
            gone = [self.info(name) for name in dict.fromkeys(names)]
            self._write({name: entry for name, entry in entries.items() if name not in names})
            for entry in gone:
                (self._folder(entry) / REMOVED).touch()  # so that `rebuild` does not bring it back

    def clean(self) -> int:
        """Delete old versions, removed adapters and what a crash left; returns the bytes freed.

        For times when nobody has just asked for a path of a version that is old now: see `path`.
        """
        freed = 0
        with self._writing():
            keep = {self._folder(entry) for entry in self.entries().values()}
            for name in self._folders():
                for folder in (self.folder / name).iterdir():
                    if folder not in keep and folder.is_dir():
                        freed += sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
                        shutil.rmtree(folder)
                with contextlib.suppress(OSError):
                    (self.folder / name).rmdir()
        return freed

    def rebuild(self) -> dict[str, str]:
        """Make the index again: of each adapter the newest version that is complete. Returns {folder: why left out}."""
        found: dict[str, Entry] = {}
        left: dict[str, str] = {}
        with self._writing():
            for name in self._folders():
                for version in sorted(self._versions(name), reverse=True):
                    folder = self.folder / name / str(version)
                    if (folder / REMOVED).exists():
                        break
                    try:
                        check_name(name)
                        found[name] = describe(name, folder, version)
                        break
                    except (ValueError, OSError) as error:
                        left[f"{name}/{version}"] = str(error)
            self._write(found)
        return left

    def export(self, name: str, archive: str | os.PathLike) -> Path:
        """Pack one adapter into a .zip, .tar or .tar.gz that `add` and HF PEFT (unpacked) read; returns its path."""
        return pack(self.path(name), Path(archive), name)

    # files

    def _folder(self, entry: Entry) -> Path:
        return self.folder / entry.name / str(entry.version)

    def _folders(self) -> list[str]:
        """Names that have a folder, whether or not the index knows them."""
        if not self.folder.is_dir():
            return []
        return sorted(p.name for p in self.folder.iterdir() if p.is_dir() and not p.name.startswith("."))

    def _versions(self, name: str) -> list[int]:
        folder = self.folder / name
        there = [p.name for p in folder.iterdir() if p.is_dir()] if folder.is_dir() else []
        return [int(version) for version in there if re.fullmatch(r"[1-9]\d{0,8}", version)]

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """One writer at a time, over all processes and threads."""
        from filelock import FileLock  # torch needs it, so it is there

        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / LOCK, poll_interval=0.005):
            yield

    def _write(self, entries: dict[str, Entry]) -> None:
        lines = [f"{json.dumps(name)}: {json.dumps(vars(entries[name]))}" for name in sorted(entries)]
        between = ",\n"
        atomic_write(self.folder / INDEX, f'{{"format": {FORMAT}, "adapters": {{\n{between.join(lines)}\n}}}}\n')


def _parsed(text: str) -> dict[str, Entry]:
    """The entries of an index; ValueError or TypeError if it is none."""
    content = json.loads(text)
    if not isinstance(content, dict) or not isinstance(content.get("adapters"), dict):
        raise ValueError("no object with 'adapters'")
    if content.get("format") != FORMAT:
        raise ValueError(f"format {content.get('format')!r} instead of {FORMAT}: written by another version of peftlab")
    entries = {name: Entry(**value) for name, value in content["adapters"].items()}
    for name, entry in entries.items():
        check_name(name)  # name and version become paths
        if entry.name != name or type(entry.version) is not int or entry.version < 1:
            raise ValueError(f"{name!r} has name {entry.name!r} and version {entry.version!r}")
    return entries
