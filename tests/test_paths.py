"""Files are either as they were or whole, whatever happens in between."""

from __future__ import annotations

import errno
import os

import pytest

from peftlab.paths import atomic_files, atomic_folder, atomic_write


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_file_is_replaced_whole(tmp_path):
    file = tmp_path / "new" / "a.json"
    assert atomic_write(file, "one") == file and file.read_text() == "one"
    atomic_write(file, b"two")
    assert file.read_bytes() == b"two" and [p.name for p in file.parent.iterdir()] == ["a.json"]


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, broken):
    file = atomic_write(tmp_path / "a", "old")
    monkeypatch.setattr(f"peftlab.paths.os.{broken}", full_disk)
    with pytest.raises(OSError, match="could not write.*No space left.*untouched") as caught:
        atomic_write(file, "new")
    assert caught.value.errno == errno.ENOSPC
    assert file.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_files_that_belong_together_change_together(tmp_path, monkeypatch):
    a, b = tmp_path / "a", tmp_path / "b"
    atomic_files({a: "old a", b: "old b"})
    calls = []

    def second_fails(handle):
        calls.append(handle)
        if len(calls) == 2:
            full_disk()

    monkeypatch.setattr("peftlab.paths.os.fsync", second_fails)
    with pytest.raises(OSError):
        atomic_files({a: "new a", b: "new b"})
    assert (a.read_text(), b.read_text()) == ("old a", "old b") and len(list(tmp_path.iterdir())) == 2


def test_a_folder_is_swapped_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "model"
    for content in ("one", "two"):
        with atomic_folder(folder) as new:
            (new / content).write_text(content)
        assert [p.name for p in folder.iterdir()] == [content]
    with pytest.raises(KeyboardInterrupt), atomic_folder(folder) as new:
        (new / "three").write_text("half")
        raise KeyboardInterrupt
    assert [p.name for p in folder.iterdir()] == ["two"] and [p.name for p in tmp_path.iterdir()] == ["model"]
