"""Adapter folders: damaged, foreign or unknown ones are refused by name, and nothing is lost."""

from __future__ import annotations

import copy
import errno
import json
import os

import peft
import pytest
import torch
from families import build, inputs, shake
from safetensors.torch import load_file, save_file

import peftlab as pl

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def saved(tmp_path):
    """A folder with an adapter, and the logits it gives."""
    model = pl.attach(build("llama"), pl.LoRA, "q_proj|down_proj", name="a", r=4)
    for host in pl.hosts(model).values():
        shake(host.adapters)
    pl.save_adapter(model, tmp_path / "a", name="a")
    return tmp_path / "a", logits(model)


def logits(model):
    with torch.no_grad():
        return model(**inputs("llama")).logits


def refused(folder, match, model=None, error=ValueError, **more):
    """Loading fails with these words, and the model is as it was: bare, trainable, same outputs."""
    model = model or build("llama")
    modules, trainable = [n for n, _ in model.named_modules()], [p.requires_grad for p in model.parameters()]
    before = logits(model)
    with pytest.raises(error, match=match):
        pl.load_adapter(model, folder, name="new", **more)
    assert [n for n, _ in model.named_modules()] == modules
    assert [p.requires_grad for p in model.parameters()] == trainable
    assert torch.equal(logits(model), before)


def edit(folder, **changes):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))


def test_missing_folder_and_missing_files(saved, tmp_path):
    folder, _ = saved
    refused(tmp_path / "nowhere", "no adapter folder", error=FileNotFoundError)
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    refused(folder, "pickle", error=FileNotFoundError)


@pytest.mark.parametrize("keep", [0, 7, 300, -1])
def test_truncated_weights(saved, keep):
    folder, _ = saved
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:keep])
    refused(folder, "truncated or damaged")


def test_truncated_config(saved):
    folder, _ = saved
    (folder / CONFIG).write_text((folder / CONFIG).read_text()[:50])
    refused(folder, "adapter_config.json is damaged")


def tamper(folder, change):
    tensors = load_file(folder / WEIGHTS)
    save_file(change(tensors), folder / WEIGHTS, metadata={"format": "pt"})


def test_tampered_weights(saved):
    folder, _ = saved
    first = next(iter(load_file(folder / WEIGHTS)))
    tamper(folder, lambda t: {**t, first: torch.full_like(t[first], torch.nan)})
    refused(folder, "NaN or inf")
    tamper(folder, lambda t: {**t, first: torch.zeros(3, 5)})
    refused(folder, r"\(3, 5\), this model needs")
    tamper(folder, lambda t: {k: v for k, v in t.items() if k != first})
    refused(folder, "only one has")
    foreign = "base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"
    tamper(folder, lambda t: {**t, foreign: torch.zeros(4, 32)})
    refused(folder, "no module: this is an adapter of another model")


def test_an_adapter_of_another_model(saved):
    folder, want = saved
    refused(folder, "adapter of another model", build("gpt2"))
    other = build("llama", seed=1)  # same shapes, other weights: nothing but the weights can tell
    refused(folder, "another base: the weights of 'model.layers.0", other)
    pl.load_adapter(other, folder, check_base=False)
    half = build("llama").bfloat16()  # the same base in half precision is the same base
    pl.load_adapter(half, folder)
    assert (logits(half).float() - want).abs().max() < 0.5


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(peft_type="WOBBLE"), "'WOBBLE' is not implemented"),
        (dict(use_dora=True), "only one has 'm'"),
        (dict(lora_bias=True), "only one has 'c'"),
        (dict(use_dora=True, use_bdlora={"nblocks": 2}), "is a variant that"),
        (dict(bias="all"), "bias='all'"),
        (dict(layer_replication=[[0, 1]]), "no module: this is an adapter of another model"),
        (dict(trainable_token_indices=[1]), "trainable_token_indices"),
        (dict(init_lora_weights="pissa"), "changed the base weights"),
        (dict(r=5), "this model needs"),
    ],
)
def test_variants_that_would_compute_something_else_are_refused(saved, change, said):
    folder, _ = saved
    edit(folder, **change)
    refused(folder, said)


def test_a_refused_load_keeps_the_adapters_that_were_there(saved):
    folder, want = saved
    model = pl.load_adapter(build("llama"), folder, name="good")
    edit(folder, r=5)
    with pytest.raises(ValueError, match="this model needs"):
        pl.load_adapter(model, folder, name="bad")
    assert list(pl.adapters(model)) == ["good"] and torch.equal(logits(model), want)


def test_hot_swap_in_place_compiles_nothing_again(saved, tmp_path):
    from torch._dynamo.testing import CompileCounter

    folder, want = saved
    model = pl.attach(build("llama"), pl.LoRA, "q_proj|down_proj", name="a", r=4)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    logits(compiled)
    frames, parameters = counter.frame_count, [p.data_ptr() for p in model.parameters()]
    pl.load_adapter(model, folder, name="a")
    torch.testing.assert_close(logits(compiled), want, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == frames and [p.data_ptr() for p in model.parameters()] == parameters
    pl.attach(model, pl.LoRA, "q_proj", name="b", r=4)
    with pytest.raises(ValueError, match="attached to other layers"):
        pl.load_adapter(model, folder, name="b")


def test_disk_full_while_saving_loses_nothing(saved, monkeypatch):
    folder, want = saved
    old = {n: (folder / n).read_bytes() for n in (WEIGHTS, CONFIG)}
    model = pl.load_adapter(build("llama"), folder, name="a")
    shake(model, 0.5, seed=3)

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("peftlab.paths.os.fsync", full)
    with pytest.raises(OSError, match="could not write.*adapter_model.safetensors.*No space left.*untouched"):
        pl.save_adapter(model, folder, name="a")
    assert {n: (folder / n).read_bytes() for n in old} == old
    assert sorted(p.name for p in folder.iterdir()) == sorted(old), "no temporary file is left behind"


def test_what_cannot_be_saved_is_refused(tmp_path):
    model = pl.attach(build("llama"), pl.LoRA, "q_proj", name="a")
    with pytest.raises(ValueError, match="no adapter named 'b' is attached. Attached: a"):
        pl.save_adapter(model, tmp_path / "b", name="b")
    with torch.no_grad():
        next(iter(pl.adapters(model)["a"].values())).lora_B.fill_(torch.inf)
    with pytest.raises(ValueError, match="holds NaN or inf; nothing was written"):
        pl.save_adapter(model, tmp_path / "a", name="a")
    assert not (tmp_path / "a").exists()


def test_a_hub_id_is_written_and_a_path_of_this_machine_is_not(saved, tmp_path):
    folder, _ = saved
    model = pl.load_adapter(build("llama"), folder, name="a")
    for name, written in {"someone/some-model": "someone/some-model", str(tmp_path): None, "": None}.items():
        model.config.name_or_path = name
        pl.save_adapter(model, folder, name="a")
        assert json.loads((folder / CONFIG).read_text())["base_model_name_or_path"] == written


def test_other_files_in_the_folder_stay(saved):
    folder, _ = saved
    (folder / "README.md").write_text("mine")
    model = pl.load_adapter(build("llama"), folder, name="a")
    pl.save_adapter(model, folder, name="a")
    assert (folder / "README.md").read_text() == "mine"


def test_head_without_lora_and_lora_of_one_name_round_trip(tmp_path):
    model = pl.attach(build("bert"), "ModuleCopy", "classifier", name="head")
    for host in pl.hosts(model).values():
        shake(host.adapters)
    pl.save_adapter(model, tmp_path, name="head")
    again = pl.load_adapter(build("bert"), tmp_path, name="head")
    batch = inputs("bert")
    assert torch.equal(model(**batch).logits, again(**batch).logits)


def test_the_file_is_as_small_as_the_formula_says(saved):
    """Nothing but the adapter is in the file: r·(in+out) numbers a layer, in float32, and a small header."""
    folder, _ = saved
    numbers = 2 * (pl.LoRA.size(32, 32, r=4) + pl.LoRA.size(32, 64, r=4))
    assert 0 <= (folder / WEIGHTS).stat().st_size - 4 * numbers < 2500


def test_a_saved_pattern_is_one_that_the_reference_understands(tmp_path):
    model = pl.attach(build("llama"), pl.LoRA, "q_proj|v_proj", r=4, rank_pattern={r"layers\.1.*": 2})
    pl.save_adapter(model, tmp_path)
    config = peft.PeftConfig.from_pretrained(tmp_path)
    assert set(config.rank_pattern.values()) == {2} and len(config.rank_pattern) == 2 and config.r == 4


@pytest.mark.parametrize("there, method, hyper, words", [
    ("LoRA", "LoRA", dict(alpha=32), "alpha=16 on .*q_proj.*, and 32 in"),
    ("LoRA", "LoRA", dict(rslora=True), "rslora=False"),
    ("Houlsby", "Pfeiffer", {}, "is Houlsby on .*q_proj.* and Pfeiffer in"),
    ("Houlsby", "Houlsby", dict(activation="tanh"), "activation='gelu'"),
])  # fmt: skip
def test_a_swap_in_place_that_would_be_another_adapter_is_refused(there, method, hyper, words, tmp_path):
    """The values alone fit, but with another alpha, activation or method they would compute something else."""
    size = dict(r=4) if there == "LoRA" else dict(bottleneck=4)
    pl.save_adapter(pl.attach(build("llama"), method, "q_proj", name="a", **size, **hyper), tmp_path, "a")
    model = pl.attach(build("llama"), there, "q_proj", name="a", **size)
    for host in pl.hosts(model).values():
        shake(host.adapters)
    before = logits(model)
    with pytest.raises(ValueError, match=f"{words}.*detach it first"):
        pl.load_adapter(model, tmp_path, name="a")
    assert torch.equal(logits(model), before)


def test_a_swap_in_place_minds_the_tokens_and_does_not_mind_dropout(tmp_path):
    pl.save_adapter(pl.attach(build("llama"), pl.TrainableTokens, name="a", tokens=[5, 6]), tmp_path / "t", "a")
    model = pl.attach(build("llama"), pl.TrainableTokens, name="a", tokens=[7, 8])
    with pytest.raises(ValueError, match=r"tokens=\(7, 8\).*\(5, 6\)"):
        pl.load_adapter(model, tmp_path / "t", name="a")
    pl.save_adapter(pl.attach(build("llama"), pl.LoRA, "q_proj", name="a", dropout=0.1), tmp_path / "d", "a")
    pl.load_adapter(pl.attach(build("llama"), pl.LoRA, "q_proj", name="a"), tmp_path / "d", name="a")


@pytest.mark.parametrize("family, method, targets", [
    ("llama", "LoRA", "q_proj|v_proj"),
    ("gpt2", "LoRA", "c_attn|c_fc"),  # a Conv1D lies transposed in memory, a packed one does not
    ("qwen2", "PrefixTuning", None),  # attention modules whose only dense tensors, once packed, are biases
    ("llama", "PromptTuning", None),  # the whole model inside of its head
])  # fmt: skip
def test_an_adapter_knows_its_base_in_four_bits_and_no_other(family, method, targets, tmp_path):
    """Trained on the dense base it goes onto the packed one, and back; another base is refused in either form."""
    dense, packed = build(family), pl.quantize(build(family))
    for number, model in enumerate((dense, packed)):
        pl.attach(model, method, targets=targets)
        pl.save_adapter(model, tmp_path / str(number))
        for other in (build(family), pl.quantize(build(family))):
            pl.load_adapter(other, tmp_path / str(number))
        torch.manual_seed(1)
        stranger = build(family)
        for p in stranger.parameters():
            p.data.normal_()
        for other in (stranger, pl.quantize(copy.deepcopy(stranger))):
            with pytest.raises(ValueError, match="another base"):
                pl.load_adapter(other, tmp_path / str(number))


def test_an_adapter_on_conv1d_of_an_older_file_knows_its_base(tmp_path):
    """Such a file holds the first numbers as they lie in memory, along Wᵀ."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    model = pl.attach(build("gpt2"), pl.LoRA, targets="c_attn", r=2)
    file = pl.save_adapter(model, tmp_path) / "adapter_model.safetensors"
    with safe_open(file, "pt") as f:
        metadata = f.metadata()
    there = json.loads(metadata["peftlab_base"])
    for path in there:
        there[path] = model.get_submodule(path).layer.weight.flatten()[:8].tolist()
    save_file(load_file(file), file, {**metadata, "peftlab_base": json.dumps(there)})
    for other in (build("gpt2"), pl.quantize(build("gpt2"))):
        pl.load_adapter(other, tmp_path)
    with pytest.raises(ValueError, match="another base"):
        pl.load_adapter(build("gpt2", seed=1), tmp_path)


def test_a_whole_model_can_be_a_module_to_save(tmp_path):
    """transformers' models have a `dequantize` whether they are packed or not."""
    model = pl.attach(build("llama"), pl.LoRA, targets="lm_head", modules_to_save="model")
    pl.save_adapter(model, tmp_path)
    pl.load_adapter(build("llama"), tmp_path)
