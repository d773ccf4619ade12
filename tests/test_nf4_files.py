"""Packed weights in files: bitsandbytes' bytes, folders that transformers reads and writes, one tensor at a time."""

import json
import logging
import os
import shutil
import weakref
from pathlib import Path

import families
import pytest
import torch
from torch import nn

import peftlab as pl
from peftlab import nf4_files, nf4_loading
from peftlab.nf4 import pack
from peftlab.nf4_files import from_state, save_quantized, to_state
from peftlab.nf4_layer import NF4Linear
from peftlab.nf4_loading import load_quantized

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
KINDS = ("nf4", "fp4", "int4", "int8")


@pytest.fixture(autouse=True)
def silent():
    """transformers' bars are no part of what is tested."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def equal(left, right) -> bool:
    """Whether two packed weights are the same, bit for bit."""
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(left, right, strict=True))


def packed_layers(model: nn.Module) -> dict[str, NF4Linear]:
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, NF4Linear)}


def same_state(left: nn.Module, right: nn.Module) -> bool:
    a, b = left.state_dict(), right.state_dict()
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


# --- one weight -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_state_dict_is_that_of_bitsandbytes_byte_for_byte(kind, double):
    import bitsandbytes as bnb

    for (out, into), block, dtype in [((48, 64), 64, torch.float32), ((7, 33), 32, torch.bfloat16),
                                      ((300, 256), 128, torch.float16), ((1, 1), 4096, torch.float32)]:  # fmt: skip
        dense = nn.Linear(into, out).to(dtype)
        theirs = bnb.nn.Linear4bit(into, out, quant_type=kind, compress_statistics=double)
        theirs.weight = bnb.nn.Params4bit(dense.weight.data, requires_grad=False, quant_type=kind, blocksize=block,
                                          compress_statistics=double, module=theirs).to("cpu")  # fmt: skip
        theirs.bias = dense.bias
        expected, ours = theirs.state_dict(), NF4Linear(dense, block, kind, double).state_dict()
        assert list(ours) == list(expected)
        for name, tensor in expected.items():
            assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape), name
            assert torch.equal(ours[name], tensor), name
        assert ours[f"weight.quant_state.bitsandbytes__{kind}"].numpy().tobytes().startswith(b'{"quant_type": ')


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_what_was_written_is_read_back(kind, double):
    for shape, block, dtype in [((48, 64), 64, torch.float32), ((7, 33), 32, torch.bfloat16),
                                ((1, 1), 4096, torch.float16)]:  # fmt: skip
        p = pack(torch.randn(shape).to(dtype), block, kind, double)
        assert equal(from_state(to_state(p)), p)


def test_a_model_moved_to_float64_is_read_back():
    layer, again = [NF4Linear(nn.Linear(64, 8)).double() for _ in range(2)]
    again.load_state_dict(layer.state_dict())
    assert again.dtype == torch.float64 and torch.equal(again.dequantize(), layer.dequantize())


def test_codes_stored_as_another_dtype_are_the_same_bytes():
    from bitsandbytes.functional import quantize_4bit

    W = torch.randn(64, 64)
    codes, state = quantize_4bit(W, quant_type="nf4", compress_statistics=True, quant_storage=torch.bfloat16)
    theirs = {f".{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    assert codes.dtype == torch.bfloat16
    assert equal(from_state({"": codes, **theirs}), pack(W))


def test_a_model_without_numbers_has_a_state_dict_too():
    with torch.device("meta"):
        layer = NF4Linear(nn.Linear(64, 32))
    assert set(layer.state_dict()) == set(NF4Linear(nn.Linear(64, 32)).state_dict())


def rewritten(state: dict, **changes) -> dict:
    """The state with other entries in its JSON; None takes one out."""
    key = next(name for name in state if nf4_files.STATE in name)
    facts = json.loads(bytes(state[key].tolist())) | changes
    text = json.dumps({name: value for name, value in facts.items() if value is not None})
    return state | {key: torch.tensor(list(text.encode()), dtype=torch.uint8)}


def without(state: dict, suffix: str) -> dict:
    return {name: tensor for name, tensor in state.items() if name != suffix}


JSON = ".quant_state.bitsandbytes__nf4"
DAMAGED = {
    "no JSON": (lambda s: without(s, JSON), "has 0 tensors named .quant_state.*not packed in four bits.*download"),
    "two of them": (lambda s: s | {JSON[:-3] + "fp4": s[JSON]}, "has 2 tensors named"),
    "cut JSON": (lambda s: s | {JSON: s[JSON][:20]}, "damaged JSON.*download the file again"),
    "no text": (lambda s: s | {JSON: s[JSON] + 128}, "damaged JSON"),
    "JSON of a list": (lambda s: s | {JSON: torch.tensor(list(b"[1]"), dtype=torch.uint8)}, "damaged JSON"),
    "no shape": (lambda s: rewritten(s, shape=None), "damaged JSON.*shape"),
    "shape of words": (lambda s: rewritten(s, shape=["a"]), "damaged JSON"),
    "negative shape": (lambda s: rewritten(s, shape=[-32, 64]), "damaged JSON"),
    "empty shape": (lambda s: rewritten(s, shape=[]), "damaged JSON"),
    "unknown dtype": (lambda s: rewritten(s, dtype="load"), "damaged JSON.*dtype is 'load'"),
    "infinite mean": (lambda s: rewritten(s, nested_offset=float("inf")), "damaged JSON.*nested_offset is inf"),
    "kind that is no word": (lambda s: rewritten(s, quant_type=4), "damaged JSON"),
    "unknown kind": (lambda s: rewritten(s, quant_type="nf5"), "packed as 'nf5'.*there are nf4, fp4, int4, int8$"),
    "kind of scales": (lambda s: rewritten(s, quant_type="dynamic8"), "packed as 'dynamic8'"),
    "kind unlike its name": (lambda s: rewritten(s, quant_type="fp4"), "as 'fp4' by '.quant_state.bitsandbytes__nf4'"),
    "odd block": (lambda s: rewritten(s, blocksize=63), "blocks of 63 weights; 32, 64"),
    "other nested block": (lambda s: rewritten(s, nested_blocksize=128), "blocks of 128 float32; only 256"),
    "other nested dtype": (lambda s: rewritten(s, nested_dtype="float16"), "blocks of 256 float16; only 256"),
    "no absmax": (lambda s: without(s, ".absmax"), "has no part 'weight.absmax'.*download"),
    "no codes": (lambda s: without(s, ""), "has no part 'weight'"),
    "no nested absmax": (lambda s: without(s, ".nested_absmax"), "has no part 'weight.nested_absmax'"),
    "cut codes": (lambda s: s | {"": s[""][:-1]}, r"holds 1,023 torch.uint8 in 'weight'; a \(32, 64\).*needs 1,024"),
    "cut absmax": (lambda s: s | {".absmax": s[".absmax"][:-1]}, "holds 31 torch.uint8 in 'weight.absmax'.*needs 32"),
    "other block": (lambda s: rewritten(s, blocksize=128), "32 torch.uint8 in 'weight.absmax'.*of 128 needs 16"),
    "other shape": (lambda s: rewritten(s, shape=[64, 64]), "holds 1,024.*needs 2,048"),
    "absmax of floats": (lambda s: s | {".absmax": s[".absmax"].float()}, "torch.float32 in 'weight.absmax'"),
    "absmax is NaN": (lambda s: s | {".nested_absmax": s[".nested_absmax"] * torch.nan}, "NaN or inf in 'weight.nes"),
    "other levels": (lambda s: s | {".quant_map": s[".quant_map"] * 0.99}, "levels than nf4 in 'weight.quant_map'"),
    "other nested levels": (lambda s: s | {".nested_quant_map": s[".nested_quant_map"].flip(0)}, "than dynamic8"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_named(case):
    damage, said = DAMAGED[case]
    with pytest.raises(ValueError, match=f"^model.q_proj.weight .*{said}"):
        from_state(damage(to_state(pack(torch.randn(32, 64)))), "model.q_proj.weight")


def test_damage_in_a_state_dict_leaves_the_layer_as_it_was():
    layer = NF4Linear(nn.Linear(64, 32))
    before, state = layer.packed, NF4Linear(nn.Linear(64, 32)).state_dict()
    state["weight.absmax"] = state["weight.absmax"][:-1]
    with pytest.raises(RuntimeError, match="weight holds 31"):
        layer.load_state_dict(state)
    assert equal(layer.packed, before)


# --- models and transformers ----------------------------------------------------------------------------------------


def wide(family: str, dtype: torch.dtype = torch.float32, **more):
    """A small model of rows of 64 and more: in shorter ones bitsandbytes' CPU kernel takes a wrong absmax."""
    import transformers as t

    torch.manual_seed(0)
    if family == "gpt2":
        config = t.GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2,
                              attn_pdrop=0, embd_pdrop=0, resid_pdrop=0, pad_token_id=0, **more)  # fmt: skip
        return t.GPT2LMHeadModel(config).to(dtype).eval()
    config = t.LlamaConfig(vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                           num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
                           initializer_range=0.2, pad_token_id=0, **more)  # fmt: skip
    model = t.LlamaForCausalLM(config)
    for parameter in model.parameters():  # not model.to(dtype), which would round the rotary frequencies too
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model.eval()


def their_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {path: layer for path, layer in model.named_modules() if type(layer).__name__ == "Linear4bit"}


def same_weights_as_theirs(ours: nn.Module, theirs: nn.Module) -> bool:
    """All dense weights, the packed ones dequantised by each library, bit for bit."""
    from bitsandbytes.functional import dequantize_4bit

    mine, other = packed_layers(ours), their_layers(theirs)
    rest = {name: p for name, p in theirs.named_parameters() if name.removesuffix(".weight") not in other}
    return (mine.keys() == other.keys() and len(mine) > 0
            and all(torch.equal(mine[path].dequantize(), dequantize_4bit(layer.weight.data, layer.weight.quant_state))
                    for path, layer in other.items())
            and all(torch.equal(p, ours.get_parameter(name)) for name, p in rest.items()))  # fmt: skip


def logits(model: nn.Module) -> torch.Tensor:
    """In train mode, as bitsandbytes computes in bfloat16 on some CPUs else; no dropout in the models here."""
    return model.train()(**families.inputs("llama")).logits.detach()


@pytest.mark.parametrize("kind, double, block", [("nf4", True, 64), ("fp4", False, 64), ("nf4", False, 32)])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_transformers_reads_what_we_wrote(family, kind, double, block, tmp_path):
    from transformers import AutoModelForCausalLM

    ours = pl.quantize(wide(family), kind=kind, double=double, block=block)
    save_quantized(ours, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert same_weights_as_theirs(ours, theirs)
    assert theirs.dtype == torch.float32
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=1e-4, atol=1e-4)  # sums in another order


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_transformers_and_we_pack_a_checkpoint_alike(family, tmp_path):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    wide(family, torch.bfloat16).save_pretrained(tmp_path / "dense")
    way = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=way)
    ours = load_quantized(tmp_path / "dense")
    assert same_weights_as_theirs(ours, theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    save_quantized(load_quantized(tmp_path / "theirs"), tmp_path / "ours")
    read = load_quantized(tmp_path / "theirs")
    assert same_state(read, ours)
    assert {layer.compute for layer in packed_layers(read).values()} == {torch.float32}  # what `way` says by default
    files = [tmp_path / by / "model.safetensors" for by in ("theirs", "ours")]
    assert files[0].stat().st_size == files[1].stat().st_size
    written = [json.loads((tmp_path / by / "config.json").read_text()) for by in ("theirs", "ours")]
    theirs_said, ours_said = (config.pop("quantization_config") for config in written)
    assert written[0] == written[1]
    assert theirs_said.pop("llm_int8_skip_modules") is None and ours_said.pop("llm_int8_skip_modules") == ["lm_head"]
    assert ours_said == theirs_said


def test_what_is_to_stay_dense_stays_so_for_transformers(tmp_path):
    from transformers import AutoModelForCausalLM

    ours = pl.quantize(wide("llama"), skip=[r"model.layers.0.mlp", "v_proj"], also="lm_head")
    save_quantized(ours, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert same_weights_as_theirs(ours, theirs)
    assert "lm_head" in their_layers(theirs) and "model.layers.0.mlp.up_proj" not in their_layers(theirs)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_loading_packs_as_quantize_does(family, tmp_path):
    model = families.build(family)
    if family == "t5":
        model.config.tie_word_embeddings = True
    model.save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    assert len(list((tmp_path / "dense").glob("*.safetensors"))) > 2
    loaded, expected = load_quantized(tmp_path / "dense"), pl.quantize(type(model).from_pretrained(tmp_path / "dense"))
    batch = families.inputs(family)
    assert type(loaded) is type(expected) and same_state(loaded, expected)
    assert torch.equal(loaded(**batch).logits, expected(**batch).logits)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert not any(t.is_meta for t in [*loaded.parameters(), *loaded.buffers()])
    save_quantized(loaded, tmp_path / "packed", max_shard_size="20KB")
    assert len(list((tmp_path / "packed").glob("*.safetensors"))) > 1
    again = load_quantized(tmp_path / "packed")
    assert same_state(again, expected) and torch.equal(again(**batch).logits, expected(**batch).logits)
    assert {**again.config.to_dict(), "_name_or_path": 0} == {**loaded.config.to_dict(), "_name_or_path": 0}
    assert str(tmp_path) not in (tmp_path / "packed/config.json").read_text()


def test_the_embedded_base_loads_by_default():
    model, tokenizer = pl.load_base()
    packed = load_quantized(device="cpu")
    assert same_state(packed, pl.quantize(model.cpu()))
    also_packed, also_tokenizer = pl.load_base(quantize="nf4")
    assert same_state(also_packed, packed) and also_tokenizer.get_vocab() == tokenizer.get_vocab()
    assert packed.config.name_or_path == model.config.name_or_path
    assert packed.generation_config.to_dict() == model.generation_config.to_dict()
    assert packed.lm_head.weight is packed.get_input_embeddings().weight  # tied, as they were


@pytest.mark.parametrize("options", [dict(kind="int8", block=128), dict(skip="q_proj|mlp", double=False),
                                     dict(also="lm_head"), dict(kind="fp4", compute=torch.bfloat16)])  # fmt: skip
def test_loading_takes_the_options_of_quantize(options, tmp_path):
    wide("llama").save_pretrained(tmp_path)
    loaded, expected = load_quantized(tmp_path, **options), pl.quantize(wide("llama"), **options)
    assert same_state(loaded, expected)
    assert [layer.compute for layer in packed_layers(loaded).values()] == [
        layer.compute for layer in packed_layers(expected).values()
    ]


@pytest.mark.parametrize("packed", [False, True])
def test_another_dtype_is_that_of_all_but_codes_and_frequencies(packed, tmp_path):
    model = wide("llama")
    if packed:
        save_quantized(pl.quantize(model), tmp_path)
    else:
        model.save_pretrained(tmp_path)
    loaded = load_quantized(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert {layer.dequantize().dtype for layer in packed_layers(loaded).values()} == {torch.bfloat16}
    assert {layer.nested_absmax.dtype for layer in packed_layers(loaded).values()} == {torch.float32}
    assert loaded.model.rotary_emb.inv_freq.dtype == torch.float32
    expected = load_quantized(tmp_path)
    if not packed:  # rounded before it is packed, as transformers does
        expected = pl.quantize(wide("llama", torch.bfloat16))
    for path, layer in packed_layers(expected).items():
        assert torch.equal(layer.weight, packed_layers(loaded)[path].weight)


def test_no_more_than_the_packed_model_and_one_dense_tensor_is_held(tmp_path, monkeypatch):
    """By counting: each tensor that is read is followed until it is freed."""
    wide("llama").save_pretrained(tmp_path)
    alive: dict[int, int] = {}
    held: list[int] = []
    reads = nf4_loading.Stored.__getitem__

    def followed(self, index):
        tensor = reads(self, index)
        held.append(sum(alive.values()) + tensor.nbytes)
        alive[id(tensor)] = tensor.nbytes
        weakref.finalize(tensor.untyped_storage(), alive.pop, id(tensor), None)
        return tensor

    monkeypatch.setattr(nf4_loading.Stored, "__getitem__", followed)
    model = load_quantized(tmp_path)
    stays = sum(p.nbytes for p in model.parameters())
    largest = max(4 * layer.n_weights for layer in packed_layers(model).values())
    assert len(held) == len(wide("llama").state_dict())
    assert stays < max(held) <= stays + largest
    assert sum(4 * layer.n_weights for layer in packed_layers(model).values()) > 5 * largest  # it says something


def test_an_adapter_stands_beside_the_file_and_not_in_it(tmp_path):
    model = pl.attach(pl.quantize(wide("llama")), pl.LoRA, targets="q_proj|v_proj", name="sql", modules_to_save="norm")
    for adapter in pl.adapters(model)["sql"].values():
        families.shake(adapter)
    save_quantized(model, tmp_path / "base")
    pl.save_adapter(model, tmp_path / "adapter", name="sql")
    loaded = load_quantized(tmp_path / "base")
    assert same_state(loaded, pl.quantize(wide("llama")))
    pl.load_adapter(loaded, tmp_path / "adapter", name="sql")
    batch = families.inputs("llama")
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    pl.merge(model)
    with pytest.raises(ValueError, match="merged into the weights; unmerge"):
        save_quantized(model, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_an_adapter_does_the_same_on_the_layers_of_bitsandbytes(tmp_path):
    from transformers import AutoModelForCausalLM

    save_quantized(pl.quantize(wide("llama")), tmp_path)
    theirs, ours = AutoModelForCausalLM.from_pretrained(tmp_path), load_quantized(tmp_path)
    for model in (ours, theirs):
        torch.manual_seed(1)
        pl.attach(model, pl.LoRA, targets="q_proj")
        for adapter in pl.adapters(model)["default"].values():
            families.shake(adapter)
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=1e-4, atol=1e-4)


# --- folders --------------------------------------------------------------------------------------------------------


def test_saving_again_replaces_the_weights_and_nothing_else(tmp_path):
    model = pl.quantize(wide("llama"))
    save_quantized(model, tmp_path, max_shard_size="20KB")
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "model.safetensors.md").write_text("mine")
    again = load_quantized(tmp_path)
    save_quantized(again, tmp_path)  # into the very files it may still be mapped from
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "model.safetensors.md",
                     "tokenizer.json"}  # fmt: skip
    assert same_state(again, model) and same_state(load_quantized(tmp_path), model)
    assert all(file.stat().st_mode & 0o777 == 0o644 for file in tmp_path.glob("*.safetensors"))


def test_a_failed_save_leaves_what_was_there(tmp_path, monkeypatch):
    import huggingface_hub

    save_quantized(pl.quantize(wide("llama")), tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full(state, folder, **more):
        Path(folder, "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "save_torch_state_dict", full)
    with pytest.raises(OSError, match="could not write .*No space left"):
        save_quantized(pl.quantize(wide("llama"), kind="fp4"), tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_model_that_transformers_could_not_read_is_not_written(tmp_path):
    refused = {
        "no layer of this LlamaForCausalLM is quantised; call quantize": wide("llama"),
        "packed as int8.*kind='nf4' or 'fp4'": pl.quantize(wide("llama"), kind="int8"),
        "packed in 2 ways .*block=32.*in one way": mixed(),
        "Sequential is no transformers model": nn.Sequential(NF4Linear(nn.Linear(64, 64))),
    }  # fmt: skip
    for said, model in refused.items():
        with pytest.raises(ValueError, match=said):
            save_quantized(model, tmp_path / "folder")
        assert not (tmp_path / "folder").exists()


def mixed() -> nn.Module:
    model = pl.quantize(wide("llama"), skip="mlp")
    mlp = model.model.layers[0].mlp
    mlp.up_proj = NF4Linear(mlp.up_proj, block=32)
    return model


def test_names_that_transformers_would_take_for_dense_are_refused(tmp_path):
    model = pl.quantize(families.build("t5"))
    feed_forward = model.encoder.block[0].layer[1].DenseReluDense
    feed_forward.wo = NF4Linear(feed_forward.wo)  # one of the layers that T5 keeps in float32
    with pytest.raises(ValueError, match="wo' is packed, but transformers would take it for dense.*skip="):
        save_quantized(model, tmp_path)


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """dense, sharded and packed: three folders of one model, to be copied before they are harmed."""
    root = tmp_path_factory.mktemp("good")
    wide("llama").save_pretrained(root / "dense")
    wide("llama").save_pretrained(root / "sharded", max_shard_size="100KB")
    save_quantized(pl.quantize(wide("llama")), root / "packed")
    return root


def edit(folder: Path, change) -> None:
    """Rewrite the weights of a folder with `change` made to the dictionary of tensors."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors)
    os.remove(folder / "model.safetensors")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def reconfigure(folder: Path, **entries) -> None:
    config = json.loads((folder / "config.json").read_text()) | entries
    (folder / "config.json").write_text(json.dumps(config))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


def poison(tensors: dict) -> None:
    tensors[UP][0, 0] = torch.nan


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


UP = "model.layers.1.mlp.up_proj.weight"
SHARD = "model-00002-of-00004.safetensors"
HARMED = {
    "no weights": ("dense", lambda f: os.remove(f / "model.safetensors"), FileNotFoundError,
                   "has no model.safetensors$"),
    "pickle": ("dense", pickled, FileNotFoundError, "pytorch_model.bin is pickle.*save_pretrained writes safetensors"),
    "no config": ("dense", lambda f: os.remove(f / "config.json"), ValueError, "no model that transformers can read"),
    "cut file": ("dense", lambda f: cut(f / "model.safetensors"), ValueError, "truncated or damaged.*download"),
    "cut shard": ("sharded", lambda f: cut(f / SHARD), ValueError, f"{SHARD} is truncated or damaged"),
    "lost shard": ("sharded", lambda f: os.remove(f / SHARD), FileNotFoundError, f"lacks the shard '{SHARD}'"),
    "cut index": ("sharded", lambda f: cut(f / nf4_loading.INDEX), ValueError, "index.json is damaged.*download"),
    "index beyond the folder": ("sharded", lambda f: (f / nf4_loading.INDEX).write_text('{"weight_map": {"": "../x"}}'),
                                FileNotFoundError, "lacks the shard '../x'"),
    "lost tensor": ("dense", lambda f: edit(f, lambda t: t.pop(UP)), ValueError, f"lacks {UP}; it is damaged"),
    "lost tensors": ("dense", lambda f: edit(f, lambda t: (t.pop(UP), t.pop("model.norm.weight"))), ValueError,
                     f"lacks {UP} and 1 more"),
    "strange tensor": ("dense", lambda f: edit(f, lambda t: t.update(extra=torch.ones(2))), ValueError, "place: extra"),
    "other shape": ("dense", lambda f: edit(f, lambda t: t.update({UP: t[UP][1:].clone()})), ValueError,
                    rf"{UP}: \(127, 64\) in the file, \(128, 64\) in the model"),
    "other norm": ("dense", lambda f: edit(f, lambda t: t.update({"model.norm.weight": torch.ones(32)})), ValueError,
                   "another shape than its config.json says: .*model.norm.weight"),
    "NaN": ("dense", lambda f: edit(f, poison), ValueError, f"^{UP}: 1 of 8,192 weights are NaN"),
    "cut codes": ("packed", lambda f: edit(f, lambda t: t.update({UP: t[UP][:-8].clone()})), ValueError,
                  f"^{UP}: holds 4,088 torch.uint8 in 'weight'.*truncated or damaged"),
    "lost absmax": ("packed", lambda f: edit(f, lambda t: t.pop(f"{UP}.absmax")), ValueError,
                    f"^{UP}: has no part 'weight.absmax'"),
    "lost JSON": ("packed", lambda f: edit(f, lambda t: t.pop(f"{UP}.quant_state.bitsandbytes__nf4")), ValueError,
                  rf"{UP}: \(4096, 1\) in the file, \(128, 64\) in the model of"),
    "lost layer": ("packed", lambda f: edit(f, lambda t: [t.pop(n) for n in list(t) if n.startswith(UP)]), ValueError,
                   f"lacks {UP};"),
    "packed in another shape": ("packed", lambda f: reconfigure(f, intermediate_size=64), ValueError,
                                r"down_proj.weight: \(64, 128\) in the file, \(64, 64\) in the model of its config"),
    "quantised otherwise": ("packed", lambda f: reconfigure(f, quantization_config={"quant_method": "gptq", "bits": 4}),
                            ValueError, "quantised by 'gptq'.*load the original weights"),
    "in eight bits": ("packed", lambda f: reconfigure(f, quantization_config={"quant_method": "bitsandbytes",
                                                                               "load_in_8bit": True}),
                      ValueError, "quantised by 'bitsandbytes' in another way than.*four bits"),
}  # fmt: skip


@pytest.mark.parametrize("case", HARMED)
def test_a_damaged_folder_is_refused(case, good, tmp_path):
    which, harm, error, said = HARMED[case]
    folder = shutil.copytree(good / which, tmp_path / which)
    harm(folder)
    with pytest.raises(error, match=said):
        load_quantized(folder)


def test_wrong_options_are_refused_before_a_weight_is_read(good, monkeypatch):
    monkeypatch.setattr(nf4_loading.Stored, "__getitem__", None)
    wrong = [
        (dict(block=63), "'model.layers.0.mlp.down_proj' cannot be quantised: block size 63 is none of 32, 64"),
        (dict(kind="nf5"), "no data type 'nf5'"),
        (dict(skip="q_prj"), "no module path matches 'q_prj'; did you mean 'q_proj'"),
        (dict(compute=torch.int8), "cannot compute in torch.int8"),
    ]
    for options, said in wrong:
        with pytest.raises(ValueError, match=said):
            load_quantized(good / "dense", **options)
    for options in (dict(skip="q_proj"), dict(kind="fp4"), dict(block=32), dict(double=False)):
        with pytest.raises(ValueError, match="packed already and is read as it is: leave out skip"):
            load_quantized(good / "packed", **options)


def test_a_config_without_a_dtype_leaves_the_weights_as_stored(good, tmp_path):
    folder = shutil.copytree(good / "dense", tmp_path / "dense")
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config))
    assert same_state(load_quantized(folder), load_quantized(good / "dense"))


def test_a_tied_head_cannot_be_packed(tmp_path):
    wide("llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'lm_head' cannot be quantised: it shares its weight"):
        load_quantized(tmp_path, also="lm_head")


def test_a_name_that_is_nowhere_is_refused():
    with pytest.raises(FileNotFoundError, match="there is no folder './nowhere'"):
        load_quantized("./nowhere")
    with pytest.raises(OSError, match="'nobody/nothing' is neither a folder nor"):
        load_quantized("nobody/nothing")


def test_a_hub_id_is_what_the_hub_puts_into_its_cache(good, monkeypatch):
    import huggingface_hub

    asked = {}

    def download(name, **options):
        asked[name] = options
        return good / "packed"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    loaded = load_quantized("someone/tiny-4bit")
    assert asked == {"someone/tiny-4bit": {"allow_patterns": ["*.json", "model*.safetensors"]}}, "and nothing pickled"
    assert loaded.config.name_or_path == "someone/tiny-4bit" and same_state(loaded, pl.quantize(wide("llama")))


def test_what_goes_wrong_while_packing_is_what_is_raised(good, monkeypatch):
    def full(*anything):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(nf4_loading, "pack", full)
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        load_quantized(good / "dense")


def test_transformers_is_left_as_it_was(good):
    from transformers.utils import logging as transformers_logging

    before = transformers_logging.get_verbosity()
    model = load_quantized(good / "dense")
    assert transformers_logging.get_verbosity() == before
    assert not getattr(model, "is_quantized", False) and not hasattr(model, "hf_quantizer")
    assert "quantization_config" not in model.config.to_dict()
    assert model.config.to_dict() == type(model).from_pretrained(good / "dense").config.to_dict()
