"""Many adapters on disk and a few in memory: nothing lost, nothing half done, nothing that an archive can do."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

import pytest
import torch
from families import build, inputs
from hypothesis import given, settings
from hypothesis import strategies as st

import peftlab as pl
from peftlab.cache import Cache
from peftlab.store import CONFIG, INDEX, WEIGHTS, Store

ROOT = Path(__file__).resolve().parent.parent


def adapter(folder, seed=0, method=pl.LoRA, targets="q_proj", model=None, **hyper):
    """A folder with an adapter of random values on the tiny Llama."""
    model = model or build("llama")
    pl.attach(model, method, targets, name="made", **hyper)
    torch.manual_seed(seed)
    for one in pl.adapters(model)["made"].values():
        for parameter in one.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    pl.save_adapter(model, folder, "made")
    pl.detach(model, "made")
    return Path(folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folders with adapters: six of one layout, one of another rank, one of another method."""
    top = tmp_path_factory.mktemp("made")
    model = build("llama")
    for seed, name in enumerate("abcdef"):
        adapter(top / name, seed, model=model, r=4)
    adapter(top / "wide", 10, model=model, r=8)
    adapter(top / "scaled", 11, pl.IA3, None, model=model)
    return top


@pytest.fixture
def store(made, tmp_path):
    store = Store(tmp_path / "store")
    for name in ("a", "b", "c"):
        store.add(name, made / name)
    return store


@torch.no_grad()
def logits(model, *names):
    with pl.using(model, *names):
        return model(**inputs("llama")).logits


def alone(folder):
    """What the tiny Llama answers with this adapter."""
    return logits(pl.load_adapter(build("llama"), folder, "x"), "x")


# --- what is in it ---


def test_what_goes_in_comes_out(store, made):
    assert store.names() == list(store) == ["a", "b", "c"] and len(store) == 3 and "b" in store and "x" not in store
    for name in store:
        assert (store.path(name) / WEIGHTS).read_bytes() == (made / name / WEIGHTS).read_bytes()
        assert torch.equal(alone(store.path(name)), alone(made / name))
    store.verify()


def test_the_index_says_what_the_file_holds(store, made):
    import hashlib

    entry, content = store.info("a"), (made / "a" / WEIGHTS).read_bytes()
    model = pl.load_adapter(build("llama"), made / "a", "a")
    assert (entry.name, entry.version, entry.method, entry.targets) == ("a", 1, "LoRA", ["q_proj"])
    assert entry.hyper == pl.adapters(model)["a"]["model.layers.0.self_attn.q_proj"].hyper
    assert entry.parameters == pl.count(model).trainable and entry.bytes == len(content)
    assert entry.sha256 == hashlib.sha256(content).hexdigest()
    assert entry.fingerprint == store.info("b").fingerprint and entry.layout == store.info("b").layout
    store.add("wide", made / "wide")
    assert store.info("wide").layout != entry.layout and store.info("wide").fingerprint == entry.fingerprint


def test_an_attached_adapter_is_saved_into_it(tmp_path):
    model = pl.attach(build("llama"), pl.LoRA, "q_proj", name="sql", r=4)
    store = Store(tmp_path / "store")
    assert store.add("sql", model) == store.info("sql")
    with pytest.raises(ValueError, match="no adapter named 'poems' is attached. Attached: sql"):
        store.add("poems", model)
    assert store.names() == ["sql"] and not (tmp_path / "store" / "poems").exists()


def test_a_new_version_replaces_the_old_one_which_stays_readable(store, made):
    old = store.path("a")
    want = alone(old)
    entry = store.add("a", made / "b")
    assert entry.version == 2 and store.path("a") != old
    assert torch.equal(alone(store.path("a")), alone(made / "b")) and torch.equal(alone(old), want)
    assert store.clean() == sum(file.stat().st_size for file in (made / "a").iterdir()) and not old.exists()
    assert store.add("a", made / "c").version == 3 and len(store) == 3


def test_removed_adapters_are_gone_and_their_files_stay_until_cleaned(store):
    path = store.path("a")
    store.remove("a", "b")
    assert store.names() == ["c"] and path.is_dir()
    assert store.rebuild() == {} and store.names() == ["c"], "the index made anew brings none of them back"
    assert store.clean() > 0 and not path.parent.exists()
    with pytest.raises(LookupError, match="no adapter named 'd' is in the store"):
        store.remove("c", "d")
    assert store.names() == ["c"]
    assert store.clean() == 0


def test_an_unknown_name_is_answered_with_the_nearest(store):
    for ask in (store.info, store.path):
        with pytest.raises(LookupError, match=r"no adapter named 'aa' .* did you mean 'a'\? There: a, b, c"):
            ask("aa")


def test_opening_reads_nothing_and_listing_reads_the_index_alone(store, monkeypatch):
    from peftlab import store as module

    opened = []
    real = open

    def watched(file, *args, **kwargs):
        opened.append(Path(file).name)
        return real(file, *args, **kwargs)

    monkeypatch.setattr(module, "open", watched, raising=False)
    monkeypatch.setattr(module, "read_folder", None)
    again = Store(store.folder)
    assert opened == []
    assert again.names() == ["a", "b", "c"] and again.info("a").parameters and again.path("b")
    assert set(opened) == {INDEX}


def test_one_reader_sees_what_another_wrote(store, made):
    other = Store(store.folder)
    assert len(other) == 3
    store.add("d", made / "d")
    assert "d" in other
    other.remove("a")
    assert store.names() == ["b", "c", "d"]


# --- names ---


BAD = ("", "..", "../up", "a/b", "a\\b", ".hidden", "a.b", "a b", "1a", "é", "a" * 65, "con", "NUL", "lpt1", "base",
       "keys")  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_names_that_are_no_safe_folder_or_no_adapter_name_are_refused(name, store, made):
    with pytest.raises(ValueError, match="cannot be used"):
        store.add(name, made / "a")
    assert len(store) == 3 and sorted(p.name for p in store.folder.iterdir()) == [".lock", "a", "b", "c", INDEX]


def test_names_that_differ_in_case_alone_are_refused(store, made):
    with pytest.raises(ValueError, match="'A' and 'a' in this store would be one folder"):
        store.add("A", made / "a")
    store.remove("a")
    with pytest.raises(ValueError, match="would be one folder"):  # it is there until it is cleaned away
        store.add("A", made / "a")
    store.clean()
    store.add("A", made / "a")


# --- half-written and damaged ---


@pytest.mark.parametrize("missing, words", [(CONFIG, f"has no {CONFIG}"), (WEIGHTS, f"has no {WEIGHTS}")])
def test_half_written_folders_are_refused_with_what_is_missing(missing, words, store, made, tmp_path):
    half = shutil.copytree(made / "d", tmp_path / "half")
    (half / missing).unlink()
    with pytest.raises(FileNotFoundError, match=words):
        store.add("d", half)
    with pytest.raises(FileNotFoundError, match=words):
        store.add("a", half)
    assert store.names() == ["a", "b", "c"] and store.info("a").version == 1
    assert not (store.folder / "d").exists() and [p.name for p in (store.folder / "a").iterdir()] == ["1"]


def test_damaged_and_unknown_files_are_refused_under_the_name_of_their_folder(store, made, tmp_path):
    bad = shutil.copytree(made / "d", tmp_path / "bad")
    (bad / WEIGHTS).write_bytes((bad / WEIGHTS).read_bytes()[:-10])
    with pytest.raises(ValueError, match="bad.adapter_model.safetensors is truncated .*; nothing was added"):
        store.add("d", bad)
    (bad / CONFIG).write_text(json.dumps({"peft_type": "MAGIC"}))
    shutil.copyfile(made / "d" / WEIGHTS, bad / WEIGHTS)
    with pytest.raises(ValueError, match="'MAGIC' is not implemented"):
        store.add("d", bad)
    (bad / WEIGHTS).unlink()
    (bad / "adapter_model.bin").touch()
    with pytest.raises(FileNotFoundError, match="is pickle"):
        store.add("d", bad)
    with pytest.raises(FileNotFoundError, match="there is no folder or archive"):
        store.add("d", tmp_path / "nowhere")
    assert store.names() == ["a", "b", "c"]


@pytest.mark.parametrize(
    "content",
    [None, "", "{", "[]", '{"format": 1}', '{"format": 2, "adapters": {}}', '{"format": 1, "adapters": {"a": {}}}'],
)
def test_a_lost_or_damaged_index_is_said_and_made_again(content, store, made):
    before = store.entries()
    (store.folder / INDEX).unlink()
    if content is not None:
        (store.folder / INDEX).write_text(content)
    for use in (len, Store.names, lambda s: s.add("d", made / "d"), lambda s: s.path("a")):
        with pytest.raises(ValueError, match=r"index.json is (lost|damaged).* rebuild|\.rebuild\(\)"):
            use(store)
    assert store.rebuild() == {} and store.entries() == before


@pytest.mark.parametrize("change", [{"version": "../../x"}, {"version": 0}, {"name": "b"}])
def test_an_index_cannot_lead_out_of_the_folder(change, store):
    content = json.loads((store.folder / INDEX).read_text())
    content["adapters"]["a"] |= change
    (store.folder / INDEX).write_text(json.dumps(content))
    with pytest.raises(ValueError, match="damaged"):
        store.path("a")
    content["adapters"] = {"../a": content["adapters"]["a"]}
    (store.folder / INDEX).write_text(json.dumps(content))
    with pytest.raises(ValueError, match="cannot be used"):
        store.names()


def test_rebuilding_takes_the_newest_complete_version(store, made):
    store.add("a", made / "d")
    whole = (store.path("a") / WEIGHTS).read_bytes()
    (store.path("a") / WEIGHTS).write_bytes(whole[:100])
    with pytest.raises(ValueError, match="weights of a are not those that were added"):
        store.verify()
    left = store.rebuild()
    assert list(left) == ["a/2"] and "truncated" in left["a/2"]
    assert store.info("a").version == 1 and store.names() == ["a", "b", "c"]
    store.verify()


def test_a_missing_folder_is_said(store):
    shutil.rmtree(store.path("a"))
    with pytest.raises(FileNotFoundError, match="add 'a' again"):
        store.path("a")
    store.rebuild()
    assert store.names() == ["b", "c"]


def test_a_file_is_no_store_and_a_new_folder_is_an_empty_one(tmp_path):
    assert len(Store(tmp_path / "new")) == 0 and not (tmp_path / "new").exists()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file"):
        Store(tmp_path / "file")


# --- crashes and company ---

CRASH = """
import os, signal, sys
from peftlab import store as module
folder, source, at = sys.argv[1:]
def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
if at == "copied":
    module.describe = die
elif at == "named":
    module.Store._write = die
elif at == "half":
    copy = module.shutil.copyfile
    def half(a, b):
        copy(a, b)
        die()
    module.shutil.copyfile = half
module.Store(folder).add("a", source)
"""


@pytest.mark.skipif(os.name == "nt", reason="kills by a POSIX signal")
@pytest.mark.parametrize("at", ["half", "copied", "named"])
def test_killed_in_the_middle_the_old_version_stays(at, store, made):
    done = subprocess.run([sys.executable, "-c", CRASH, store.folder, made / "d", at], cwd=ROOT, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert store.names() == ["a", "b", "c"] and store.info("a").version == 1
    store.verify()
    assert len(list((store.folder / "a").iterdir())) == 2, "what the crash left"
    entry = store.add("a", made / "e")  # the lock of the dead is free
    assert entry.version == (3 if at == "named" else 2) and torch.equal(alone(store.path("a")), alone(made / "e"))
    assert store.clean() > 0 and len(list((store.folder / "a").iterdir())) == 1
    store.verify()


def test_killed_in_the_first_add_it_is_an_empty_store(made, tmp_path):
    if os.name == "nt":
        pytest.skip("kills by a POSIX signal")
    subprocess.run([sys.executable, "-c", CRASH, tmp_path / "s", made / "d", "half"], cwd=ROOT, timeout=120)
    store = Store(tmp_path / "s")
    assert store.names() == []
    store.add("a", made / "a")
    assert store.names() == ["a"]


ADDER = """
import sys
from peftlab.store import Store
folder, source, who = sys.argv[1:]
for i in range(5):
    Store(folder).add(f"{who}{i}", source)
    Store(folder).add("shared", source)
"""


def test_adders_of_several_processes_and_threads_lose_nothing(made, tmp_path):
    store = Store(tmp_path / "store")
    command = [sys.executable, "-c", ADDER, store.folder, made / "a"]
    others = [subprocess.Popen([*command, who], cwd=ROOT) for who in ("x", "y")]
    wrong = []

    def add(who):
        for i in range(5):
            store_of_thread = Store(store.folder)
            store_of_thread.add(f"{who}{i}", made / "b")
            if f"{who}{i}" not in store_of_thread:
                wrong.append(who)

    threads = [threading.Thread(target=add, args=(who,)) for who in ("t", "u")]
    for thread in threads:
        thread.start()
    seen = 0
    while any(other.poll() is None for other in others) or any(thread.is_alive() for thread in threads):
        now = len(store)  # a reader in between: always a whole index, and never fewer than before
        assert now >= seen
        seen = now
        threads[0].join(0.002)
    assert all(other.wait() == 0 for other in others) and not wrong
    assert set(store) == {f"{who}{i}" for who in "xytu" for i in range(5)} | {"shared"}
    assert store.info("shared").version == 10
    store.verify()


# --- archives ---


def tar_of(members, path, mode="w:gz"):
    """members: {name: bytes}, or TarInfo objects."""
    with tarfile.open(path, mode) as tar:
        for name, content in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def zip_of(members, path):
    with zipfile.ZipFile(path, "w") as pack:
        for name, content in members:
            pack.writestr(name, content)
    return path


@pytest.fixture
def files(made):
    return [(file, (made / "d" / file).read_bytes()) for file in (CONFIG, WEIGHTS)]


@pytest.mark.parametrize("ending", [".zip", ".tar", ".tar.gz", ".tgz"])
def test_packed_and_unpacked_it_is_the_same(ending, store, tmp_path):
    packed = store.export("b", tmp_path / f"b{ending}")
    other = Store(tmp_path / "other")
    entry = other.add("mine", packed)
    assert entry.sha256 == store.info("b").sha256 and entry.layout == store.info("b").layout
    shutil.unpack_archive(packed, tmp_path / "unpacked", {".tgz": "gztar"}.get(ending))
    assert torch.equal(alone(tmp_path / "unpacked" / "b"), alone(store.path("b")))
    with pytest.raises(ValueError, match="ends with .zip, .tar"):
        store.export("b", tmp_path / "b.rar")


def test_an_archive_without_a_folder_or_with_other_files_is_taken(store, files, tmp_path):
    other = [("README.md", b"hello"), ("__MACOSX/._" + CONFIG, b"\0")]
    store.add("d", tar_of([*other, *files], tmp_path / "d.tgz"))
    store.add("e", zip_of([*other, *((f"x/y/{name}", content) for name, content in files)], tmp_path / "e.zip"))
    assert store.info("d").sha256 == store.info("e").sha256
    assert sorted(p.name for p in store.path("d").iterdir()) == [CONFIG, WEIGHTS]


@pytest.mark.parametrize("name", ["../evil", "x/../../evil", "/etc/evil", "C:\\evil", "..\\evil", "\\\\host\\evil"])
@pytest.mark.parametrize("end", ["", "/" + CONFIG])
@pytest.mark.parametrize("pack", [tar_of, zip_of])
def test_members_that_point_out_of_it_are_refused(pack, end, name, store, files, tmp_path):
    members = [*files, (name + end, b"x")]
    with pytest.raises(ValueError, match="is refused: .*points out of the archive"):
        store.add("d", pack(members, tmp_path / "bad"))
    assert store.names() == ["a", "b", "c"] and not (store.folder / "d").exists()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(kind, store, files, tmp_path):
    info = tarfile.TarInfo(WEIGHTS)
    info.type, info.linkname = kind, "/etc/hostname"
    with pytest.raises(ValueError, match="is a link, a device"):
        store.add("d", tar_of([files[0], (info, b"")], tmp_path / "bad.tar", "w"))
    link = zipfile.ZipInfo(WEIGHTS)
    link.external_attr = 0o120777 << 16
    with pytest.raises(ValueError, match="is a link or a device"):
        store.add("d", zip_of([files[0], (link, b"/etc/hostname")], tmp_path / "bad.zip"))
    assert "d" not in store


def test_bombs_are_refused_before_they_are_held(store, files, tmp_path):
    zeros = bytes(2**20)
    limit = 2**18
    for path in (
        tar_of([(f"x/{name}", content) for name, content in files] + [("zeros", bytes(2**25))], tmp_path / "side.tgz"),
        tar_of([files[0], (WEIGHTS, zeros)], tmp_path / "weights.tgz"),
        zip_of([files[0], (WEIGHTS, zeros)], tmp_path / "weights.zip"),
        zip_of([*files, ("zeros", zeros)], tmp_path / "side.zip"),
    ):
        with pytest.raises(ValueError, match="unpacks to more than 262,144 bytes"):
            store.add("d", path, limit=limit)
    header = tarfile.TarInfo("pax")
    header.type, header.size = tarfile.XHDTYPE, 2**25  # an extended header is read whole by whoever trusts its size
    with tarfile.open(tmp_path / "header.tgz", "w:gz") as tar:
        tar.addfile(header, io.BytesIO(bytes(2**25)))
    with pytest.raises(ValueError, match="unpacks to more than"):
        store.add("d", tmp_path / "header.tgz", limit=limit)
    many = tar_of([(f"f{i}", b"") for i in range(10_001)], tmp_path / "many.tgz")
    with pytest.raises(ValueError, match="more than 10,000 members"):
        store.add("d", many)
    assert "d" not in store and store.add("d", tar_of(files, tmp_path / "good.tgz"), limit=limit)


def test_one_changed_byte_in_a_packed_weight_is_noticed(store, files, tmp_path):
    """The numbers would still be numbers: only the checksum behind them tells. Stored, so that a byte is a byte."""
    path = tmp_path / "d.tgz"
    with tarfile.open(path, "w:gz", compresslevel=0) as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    content = bytearray(path.read_bytes())
    weights = dict(files)[WEIGHTS]
    content[content.index(weights[-16:])] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match="CRC"):
        store.add("d", path)
    assert "d" not in store


def test_two_adapters_in_one_archive_are_refused(store, files, tmp_path):
    two = [(f"{folder}/{name}", content) for folder in "xy" for name, content in files]
    for pack in (tar_of, zip_of):
        with pytest.raises(ValueError, match="more than one adapter"):
            store.add("d", pack(two, tmp_path / "two"))


@pytest.mark.parametrize("damage", ["text", "cut", "changed", "empty"])
@pytest.mark.parametrize("pack, end", [(tar_of, ".tgz"), (zip_of, ".zip")])
def test_damaged_archives_are_refused(pack, end, damage, store, files, tmp_path):
    path = pack(files, tmp_path / f"d{end}")
    content = path.read_bytes()
    middle = len(content) // 2
    other = bytes(255 - b for b in content[middle : middle + 100])
    path.write_bytes({"text": b"hello" * 1000, "cut": content[: -len(content) // 3], "empty": b"",
                      "changed": content[:middle] + other + content[middle + 100 :]}[damage])  # fmt: skip
    with pytest.raises((ValueError, FileNotFoundError), match=rf"d{end}"):
        store.add("d", path)
    assert store.names() == ["a", "b", "c"] and not (store.folder / "d").exists()


# --- the cache ---


def test_what_is_needed_is_attached_and_the_one_used_longest_ago_leaves(store, made):
    for name in ("d", "wide", "scaled"):
        store.add(name, made / name)
    model = build("llama")
    bare = model(**inputs("llama")).logits
    cache = store.cache(model, capacity=2)
    for needed, held in ((["a"], "a"), (["b"], "ab"), (["a"], "ba"), (["c"], "ac"), (["d", "a"], "da")):
        cache.need(*needed)
        assert cache.names == list(held) and set(pl.adapters(model)) == set(held)
        for name in held:
            assert torch.equal(logits(model, name), alone(made / name)), name
        assert torch.equal(logits(model), bare)
    s = cache.statistics
    assert (s.hits, s.misses, s.evictions, s.in_place) == (2, 4, 2, 2)
    cache.need("wide", "scaled")
    assert torch.equal(logits(model, "scaled"), alone(made / "scaled"))
    assert torch.equal(logits(model, "wide"), alone(made / "wide"))
    assert cache.statistics.in_place == 2, "another layout is attached anew"
    cache.clear()
    assert not pl.hosts(model) and len(cache) == 0


def test_rows_with_adapters_of_the_store(store, made):
    model = build("llama")
    cache = store.cache(model, capacity=3)
    batch = inputs("llama")
    rows = ["b", None, "a"]
    with torch.no_grad(), cache.using(rows=rows):
        mixed = model(**batch).logits
    for row, want in enumerate((alone(made / "b"), build("llama")(**batch).logits, alone(made / "a"))):
        torch.testing.assert_close(mixed[row], want[row], rtol=1e-5, atol=1e-5)
    with cache.using("a"), torch.no_grad():
        assert torch.equal(model(**batch).logits, alone(made / "a"))


def test_what_is_pinned_or_active_stays(store, made):
    store.add("d", made / "d")
    model = build("llama")
    cache = store.cache(model, capacity=2)
    cache.pin("a")
    for name in "bcd":
        cache.need(name)
        assert set(cache.names) == {"a", name}
    with pytest.raises(ValueError, match="3 adapters of .* are needed or in use at once, and the cache holds 2"):
        cache.need("b", "c")
    assert set(cache.names) == {"a", "d"} and torch.equal(logits(model, "d"), alone(made / "d"))
    with pytest.raises(ValueError, match="at once"):
        cache.pin("b", "c")
    assert cache.pinned == {"a"}
    cache.unpin("a")
    cache.need("b", "c")
    assert set(cache.names) == {"b", "c"}
    with pl.using(model, "b"):
        cache.need("d")
        assert set(cache.names) == {"b", "d"}
        with torch.no_grad():
            assert torch.equal(model(**inputs("llama")).logits, alone(made / "b")), "still the active one"
        with pytest.raises(ValueError, match="at once"):
            cache.need("a", "c")
    with pl.using(model, rows=["d", "b"]):
        with pytest.raises(ValueError, match="at once"):
            cache.need("a")


def test_bytes_are_a_limit_too(store, made):
    store.add("wide", made / "wide")
    one = 4 * store.info("a").parameters
    cache = store.cache(build("llama"), capacity=10, max_bytes=3 * one)
    cache.need("a", "b", "c")
    assert cache.bytes == 3 * one
    cache.need("wide")  # twice as large
    assert cache.names == ["c", "wide"] and cache.bytes == 3 * one
    total = sum(p.nbytes for found in pl.adapters(cache.model).values() for a in found.values() for p in a.parameters())
    assert total == cache.bytes
    with pytest.raises(ValueError, match="bytes are needed"):
        cache.need("wide", "a", "b")
    with pytest.raises(ValueError, match="at least one"):
        store.cache(build("llama"), capacity=0)


def test_a_new_version_is_taken_and_a_removed_one_refused(store, made):
    model = build("llama")
    cache = store.cache(model, capacity=2)
    cache.need("a", "b")
    store.add("a", made / "d")
    cache.need("a")
    assert torch.equal(logits(model, "a"), alone(made / "d")) and cache.statistics.in_place == 1
    store.add("a", made / "wide")  # another layout
    cache.need("a", "b")
    assert torch.equal(logits(model, "a"), alone(made / "wide")) and set(cache.names) == {"a", "b"}
    store.remove("a")
    with pytest.raises(LookupError, match="no adapter named 'a'"):
        cache.need("a")


def test_a_file_that_cannot_be_loaded_leaves_no_trace(store, made):
    model = build("llama")
    cache = store.cache(model, capacity=2)
    cache.need("a", "b")
    (store.path("c") / WEIGHTS).write_bytes(b"broken")
    with pytest.raises(ValueError, match="truncated or damaged"):
        cache.need("c")
    assert cache.names == ["b"] and list(pl.adapters(model)) == ["b"]
    assert torch.equal(logits(model, "b"), alone(made / "b"))
    cache.need("a")
    assert torch.equal(logits(model, "a"), alone(made / "a"))


def test_adapters_of_the_model_itself_are_used_and_kept(store, made):
    model = pl.load_adapter(build("llama"), made / "wide", "own")
    cache = store.cache(model, capacity=1)
    for name in ("a", "own", "b", "own"):
        cache.need(name)
    assert set(pl.adapters(model)) == {"own", "b"} and cache.names == ["b"]
    assert torch.equal(logits(model, "own"), alone(made / "wide"))
    cache.clear()
    assert set(pl.adapters(model)) == {"own"}


def test_cleaned_away_while_it_is_being_loaded(store, made, monkeypatch):
    """Another process adds a version and cleans between the moment the path is asked for and the file is opened."""
    from peftlab import cache as module

    real, calls = module.load_adapter, []

    def slow(model, folder, name):
        calls.append(folder)
        if len(calls) == 1:
            other = Store(store.folder)
            other.add("a", made / "d")
            other.clean()
        return real(model, folder, name)

    monkeypatch.setattr(module, "load_adapter", slow)
    model = build("llama")
    store.cache(model).need("a")
    assert len(calls) == 2 and torch.equal(logits(model, "a"), alone(made / "d"))


def test_hot_swap_from_the_store_compiles_nothing_again(store, made):
    """One name, its values replaced: any number of adapters of one layout through one compiled model."""
    from torch._dynamo.testing import CompileCounter

    model = pl.load_adapter(build("llama"), store.path("a"), "live")
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    with torch.no_grad():
        compiled(**inputs("llama"))
        frames = counter.frame_count
        assert frames > 0
        for name in ("b", "c", "a"):
            pl.load_adapter(model, store.path(name), "live")
            torch.testing.assert_close(compiled(**inputs("llama")).logits, alone(made / name), rtol=1e-5, atol=1e-5)
    assert counter.frame_count == frames


class Fake:
    """A store without files, and a model without layers: the order of eviction alone."""

    def __init__(self, sizes):
        from types import SimpleNamespace

        self.there = {n: SimpleNamespace(name=n, version=1, sha256=n, layout=n, parameters=s) for n, s in sizes.items()}

    def info(self, name):
        return self.there[name]

    def path(self, name):
        return name


@settings(max_examples=200)
@given(
    sizes=st.lists(st.integers(1, 4), min_size=6, max_size=6),
    needs=st.lists(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=3), max_size=12),
    capacity=st.integers(1, 4),
    room=st.integers(4, 12),
)
def test_the_order_is_that_of_a_plain_list(sizes, needs, capacity, room):
    """Against a list that is searched from the front: move to the end when used, drop the first that is not needed."""
    from peftlab import cache as module

    size = dict(zip("abcdef", sizes, strict=True))
    attached, held, hits = set(), [], 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_adapter", lambda model, folder, name: attached.add(name))
        patch.setattr(module, "detach", lambda model, name: attached.remove(name))
        patch.setattr(module, "adapters", lambda model: dict.fromkeys(attached))
        cache = Cache(torch.nn.Module(), Fake(size), capacity, 4 * room)
        for names in needs:
            wanted = list(dict.fromkeys(names))
            if len(wanted) > capacity or sum(size[n] for n in wanted) > room:
                with pytest.raises(ValueError, match="at once"):
                    cache.need(*names)
            else:
                cache.need(*names)
                for name in wanted:
                    hits += name in held
                    held = [n for n in held if n != name]
                    while len(held) + 1 > capacity or sum(size[n] for n in [*held, name]) > room:
                        held.remove(next(n for n in held if n not in wanted))
                    held.append(name)
            assert cache.names == held and attached == set(held) and cache.statistics.hits == hits
            assert len(cache) <= capacity and cache.bytes <= 4 * room
