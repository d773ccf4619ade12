"""The course's data sets: small, generated from seeds, read by the ordinary `datasets.load_dataset`.

    sets = peftlab.tasks.load("sql")       # a DatasetDict with train, valid and test
    sets["train"][0]                       # {"prompt": "Question: …\\nSQL:", "completion": " SELECT …\\n", …}

Every row has `prompt` and `completion`; the text to learn is their sum. `python -m peftlab.tasks --write` writes the
files of data/tasks anew, byte for byte.
"""

import importlib

NAMES = ("sql", "reviews", "voices")
SPLITS = ("train", "valid", "test")


def load(name: str):
    """A task's rows as a `datasets.DatasetDict` with train, valid and test, all columns strings.

    Read from the files in data/tasks, without network. The Arrow files that `load_dataset` makes on the way live in a
    temporary folder and the rows in memory, so nothing is left behind and parallel processes never meet.
    Raises ValueError for an unknown name, FileNotFoundError where the files are missing.
    """
    import tempfile

    from ..paths import DATA

    _known(name)
    files = {split: DATA / "tasks" / name / f"{split}.jsonl" for split in SPLITS}
    for file in files.values():
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing; write it with: python -m peftlab.tasks --write")

    import datasets

    strings = datasets.Features(dict.fromkeys(_columns(files["train"]), datasets.Value("string")))
    bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        with tempfile.TemporaryDirectory(prefix="peftlab-") as cache:
            return datasets.load_dataset(
                "json",
                data_files={split: str(file) for split, file in files.items()},
                features=strings,
                cache_dir=cache,
                keep_in_memory=True,
            )
    finally:
        if bars:
            datasets.enable_progress_bars()


def generate(name: str, seed: int = 0) -> dict[str, list[dict[str, str]]]:
    """A task's rows by split, made from a seed; seed 0 gives those in data/tasks."""
    _known(name)
    return importlib.import_module(f".{name}", __name__).generate(seed)


def _known(name: str) -> None:
    if name not in NAMES:
        import difflib

        near = difflib.get_close_matches(str(name), NAMES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(NAMES)}"
        raise ValueError(f"no task is called {name!r}; {hint}")


def _columns(file) -> list[str]:
    import json

    with file.open(encoding="utf-8") as f:
        return list(json.loads(f.readline()))


def __getattr__(name: str):
    if name in (*NAMES, "world"):  # imported when first asked for: `import peftlab` stays fast
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
