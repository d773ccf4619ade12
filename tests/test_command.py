"""`python -m peftlab <verb>`, run as a reader would."""

import json
import subprocess
import sys

import pytest
import torch

import peftlab as pl
from peftlab.__main__ import VERBS, main

LLAMA = ["count", "--model", "llama-3.2-1b"]


def test_runs_as_a_module_and_says_what_it_can():
    done = subprocess.run([sys.executable, "-m", "peftlab", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and all(verb in done.stdout for verb in VERBS)
    wrong = subprocess.run([sys.executable, "-m", "peftlab", "cuont"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "invalid choice: 'cuont'" in wrong.stderr


def test_a_reader_that_stops_early_is_no_error():
    listing = subprocess.Popen([sys.executable, "-m", "peftlab", "methods"], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)  # fmt: skip
    listing.stdout.close()  # what `| head` does
    assert listing.stderr.read() == "" and listing.wait() == 0
    listing.stderr.close()


@pytest.mark.parametrize("verb", VERBS)
def test_help_is_complete(verb, capsys):
    with pytest.raises(SystemExit) as end:
        main([verb, "--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and f"python -m peftlab {verb} --" in text, "an example to copy"


def test_count_prints_what_count_returns(capsys):
    assert main([*LLAMA, "--method", "LoRA", "--rank", "4", "--targets", "q_proj|v_proj", "--set", "alpha=3"]) == 0
    c = pl.count("llama-3.2-1b", pl.LoRA, targets="q_proj|v_proj", r=4, alpha=3)
    assert capsys.readouterr().out == f"{c}\nstored as float32: {4 * c.trainable:,} bytes\n"


def test_count_as_json(capsys):
    assert main([*LLAMA, "--method", "LoRA", "--rank", "4", "--dtype", "bfloat16", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    c = pl.count("llama-3.2-1b", "LoRA", r=4)
    assert (found["trainable"], found["total"], found["formula"]) == (c.trainable, c.total, c.trainable)
    assert found["file_bytes"] == 2 * c.trainable and found["optimizer_bytes"] == 8 * c.trainable
    assert found["per_layer"]["3"] == c.per_layer["3"]._asdict() and set(found["per_module"]) == set(c.per_module)


def test_count_by_layer(capsys):
    assert main([*LLAMA, "--by", "layer"]) == 0
    table = capsys.readouterr().out.split("\n\n")[1].splitlines()
    assert table[0].split() == ["layer", "parameters", "trainable"] and len(table) == 1 + 1 + 16 + 1
    assert len({len(line) for line in table}) == 1


def test_list(capsys):
    assert main(["count", "--list"]) == 0
    text = capsys.readouterr().out
    assert "meta-llama/Llama-2-7b-hf" in text and "LoRA" in text
    assert main(["count", "--list", "--json"]) == 0
    assert "gpt2" in json.loads(capsys.readouterr().out)["shapes"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--model", "lama-2-7b"], "did you mean 'llama-2-7b'"),
        (["--model", "gpt2", "--method", "lorra"], "did you mean 'LoRA'"),
        (["--model", "gpt2", "--method", "LoRA", "--targets", "c_atn"], "did you mean 'c_attn'"),
        (["--model", "gpt2", "--method", "LoRA", "--set", "aplha=3"], "did you mean 'alpha'"),
        (["--model", "gpt2", "--set", "r"], "is not KEY=VALUE"),
        (["--model", "gpt2", "--dtype", "float33"], "no dtype"),
    ],
)
def test_wrong_input_ends_with_one_line(arguments, words, capsys):
    assert main(["count", *arguments]) == 2
    said = capsys.readouterr()
    assert words in said.err and said.err.startswith("peftlab count: ") and said.err.count("\n") == 1 and not said.out


# --- merge ---


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The embedded base with the LoRAs "sql" and "reviews", which are also in folders of these names."""
    folder = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    model, _ = pl.load_base()
    for name in ("sql", "reviews"):
        pl.attach(model, pl.LoRA, "q_proj|v_proj", name=name, r=4)
        for adapter in pl.adapters(model)[name].values():
            torch.nn.init.normal_(adapter.lora_B, std=0.1)
        pl.save_adapter(model, folder / name, name=name)
    return model, folder


def logits(model):
    with torch.no_grad():
        return model(torch.arange(5, 25)[None]).logits


def test_merge_writes_what_combine_makes(two, tmp_path, capsys):
    model, runs = two
    more = ["--how", "dare_ties", "--density", "0.5", "--seed", "3"]
    out = tmp_path / "both"
    assert main(["merge", "--adapter", f"{runs}/sql:0.7", "--adapter", f"{runs}/reviews:-0.4", *more,
                 "--out", str(out)]) == 0  # fmt: skip
    said = capsys.readouterr().out
    assert f"0.7 × {runs}/sql and -0.4 × {runs}/reviews by dare_ties: LoRA on " in said and f"written to {out}" in said
    pl.combine(model, {"sql": 0.7, "reviews": -0.4}, "dare_ties", "want", density=0.5, seed=3)
    again = pl.load_adapter(pl.load_base()[0], out)
    assert torch.equal(logits(again), logits(model))
    pl.detach(model, "want")


def test_merge_into_the_weights_is_a_model_for_transformers(two, tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, runs = two
    for given, weights in ([f"{runs}/sql"], {"sql": 1}), ([f"{runs}/sql:0.5", f"{runs}/reviews"], None):
        out = tmp_path / str(len(given))
        adapters = [word for folder in given for word in ("--adapter", folder)]
        assert main(["merge", *adapters, "--into-weights", "--out", str(out)]) == 0
        pl.combine(model, weights or {"sql": 0.5, "reviews": 1}, name="want")
        plain = AutoModelForCausalLM.from_pretrained(out).eval()
        torch.testing.assert_close(logits(plain), logits(model), rtol=1e-4, atol=1e-4)
        assert len(AutoTokenizer.from_pretrained(out)) == 4096 and not pl.hosts(plain)
        pl.detach(model, "want")
    assert "in the weights of the whole model" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["{}/sql:x"], "'x' is no weight"),
        (["{}/sql"], "one adapter of weight 1 is what it is already"),
        (["{}/sql", "--rank", "2", "--into-weights"], "need --how"),
        (["{}/nowhere:0.5"], "is no adapter folder"),
        (["{}/sql:1", "--how", "tiess"], "did you mean 'ties'"),
        (["{}/sql:2", "--adapter", "{}/reviews", "--how", "ties"], "needs a density"),
        (["{}/sql:nan"], "no finite number"),
        (["{}/sql:2", "--out", "{}"], "exists and is not an empty folder"),
        (["{}/sql:2", "--base", "./no/such/base"], "there is no folder './no/such/base'"),
    ],
)
def test_merge_refuses_in_one_line_and_writes_nothing(arguments, words, two, tmp_path, capsys):
    out = ["--out", str(tmp_path / "out")]
    assert main(["merge", *out, "--adapter", *[word.format(two[1]) for word in arguments]]) == 2
    said = capsys.readouterr()
    assert words in said.err and said.err.startswith("peftlab merge: ") and said.err.count("\n") == 1 and not said.out
    assert not list(tmp_path.iterdir()) and sorted(p.name for p in two[1].iterdir()) == ["reviews", "sql"]


def test_merge_gives_folders_of_one_name_names_of_their_own(two, tmp_path):
    model, runs = two
    twice = ["--adapter", f"{runs}/sql:0.5", "--adapter", f"{runs}/sql/:0.25"]
    assert main(["merge", *twice, "--out", str(tmp_path / "x")]) == 0
    pl.combine(model, {"sql": 0.75}, name="want")
    again = pl.load_adapter(pl.load_base()[0], tmp_path / "x")
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-4)
    pl.detach(model, "want")


def export(*words):
    return main(["export", *map(str, words)])


@pytest.fixture
def small(tmp_path):
    """A folder with an adapter on the embedded base."""
    model, _ = pl.load_base(device="cpu")
    pl.attach(model, pl.LoRA, targets="q_proj", name="sql", r=17)
    torch.nn.init.normal_(pl.adapters(model)["sql"]["model.layers.0.self_attn.q_proj"].lora_B)
    return pl.save_adapter(model, tmp_path / "sql", "sql")


def test_export_writes_what_it_lists(small, tmp_path, capsys):
    files = {"transformers": ["README.md", "config.json", "export.json", "generation_config.json", "model.safetensors",
                              "tokenizer.json", "tokenizer_config.json"],
             "peft": ["README.md", "adapter_config.json", "adapter_model.safetensors"],
             "ollama": ["Modelfile", "README.md", "export.json", "model.gguf"]}  # fmt: skip
    for tool, names in files.items():
        out = tmp_path / tool
        assert export("--adapter", small, "--to", tool, "--out", out) == 0
        assert sorted(path.name for path in out.iterdir()) == names
        listed = [line.rsplit("  ", 1) for line in capsys.readouterr().out.splitlines()]
        assert listed == [[str(out / name), f"{(out / name).stat().st_size:,} bytes"] for name in names]
    assert export("--adapter", small, "--to", "gguf", "--out", tmp_path / "a.gguf", "--adapter-only") == 0
    assert export("--to", "gguf", "--out", tmp_path / "b.gguf", "--quantize", "q8_0") == 0
    assert (tmp_path / "a.gguf").stat().st_size < 2**20 < (tmp_path / "b.gguf").stat().st_size
    assert export("--adapter", small, "--to", "ollama", "--out", tmp_path / "ollama", "--adapter-only") == 0
    assert (tmp_path / "ollama" / "adapter.gguf").exists()


def test_export_folds_the_adapter_in(small, tmp_path):
    assert export("--adapter", small, "--to", "transformers", "--out", tmp_path / "new") == 0
    model, tokenizer = pl.load_base(device="cpu")
    pl.load_adapter(model, small, "sql")
    merged, _ = pl.load_base(tmp_path / "new", device="cpu")
    ids = tokenizer("SELECT 1", return_tensors="pt")["input_ids"]
    want = model(ids).logits
    torch.testing.assert_close(merged(ids).logits, want, rtol=0, atol=1e-3)
    with pl.using(model):
        assert (model(ids).logits - want).abs().max() > 0.1


def test_export_checks(small, capsys):
    with pytest.raises(SystemExit) as end:
        export("--adapter", small, "--check", "vllm")
    said = capsys.readouterr().out
    assert end.value.code == 1 and said.startswith("- ") and "--max-lora-rank 32" in said and said.count("\n") == 1
    assert export("--adapter", small, "--check", "peft") == 0
    assert "nothing is known" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--to", "peft", "--out", "x"], "needs an adapter: --adapter FOLDER"),
        (["--check", "vllm"], "--check needs the adapter's folder"),
        (["--to", "gguf"], "say where to: --out PATH"),
        (["--to", "peft", "--adapter", "x", "--out", "y", "--merged"], "--to peft writes an adapter"),
        (["--to", "transformers", "--adapter", "x", "--out", "y", "--adapter-only"], "writes a merged model"),
        (["--to", "transformers", "--out", "y", "--quantize", "q8_0"], "--dtype sets"),
        (["--to", "gguf", "--out", "y.gguf", "--dtype", "float16"], "it is --quantize"),
        (["--to", "gguf", "--out", "y.bin"], "does not end in .gguf"),
        (["--to", "peft", "--adapter", "nowhere", "--out", "y"], "no adapter folder"),
        (["--to", "gguf", "--base", "no/such/folder", "--out", "y.gguf"], "there is no folder"),
    ],
)
def test_export_refuses_in_one_line(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert export(*arguments) == 2
    said = capsys.readouterr()
    assert words in said.err and said.err.startswith("peftlab export: ") and said.err.count("\n") == 1 and not said.out
    assert not list(tmp_path.iterdir())
