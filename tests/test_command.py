"""`python -m peftlab <verb>`, run as a reader would."""

import json
import subprocess
import sys

import pytest

import peftlab as pl
from peftlab.__main__ import VERBS, main

LLAMA = ["count", "--model", "llama-3.2-1b"]


def test_runs_as_a_module_and_says_what_it_can():
    done = subprocess.run([sys.executable, "-m", "peftlab", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and all(verb in done.stdout for verb in VERBS)
    wrong = subprocess.run([sys.executable, "-m", "peftlab", "cuont"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "invalid choice: 'cuont'" in wrong.stderr


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
