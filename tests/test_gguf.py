"""GGUF files, read back by the gguf package: names, shapes, values, header; and what is refused. The proof that
llama.cpp computes the same from them is tests/export."""

import json
import os

import numpy as np
import pytest
import torch
from families import build, shake
from gguf import GGUFReader, quants

import peftlab as pl
from peftlab import export, gguf

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gpt2")


@pytest.fixture(scope="module")
def tokenizer():
    return pl.load_base(device="cpu")[1]


def fitting(family, tokenizer, **more):
    model = build(family, **more)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return model


def read(path):
    """(name -> array as torch has it, header) of a file."""
    found = GGUFReader(path)
    tensors = {t.name: quants.dequantize(t.data, t.tensor_type).reshape(t.shape[::-1].tolist()) for t in found.tensors}
    return tensors, {key: field.contents() for key, field in found.fields.items()}


def lora(model, **more):
    pl.attach(model, pl.LoRA, targets="all-linear", name="a", **{"r": 4, **more})
    for adapter in pl.adapters(model)["a"].values():
        shake(adapter)
    return model


# --- models ---


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_is_all_there(family, tokenizer, tmp_path):
    model = fitting(family, tokenizer)
    tensors, header = read(export.to_gguf(model, tokenizer, tmp_path / "m.gguf", "f32"))
    arch = gguf.ARCHITECTURES[type(model).__name__].name
    assert header["general.architecture"] == arch and header["general.type"] == "model"
    assert header[f"{arch}.block_count"] == 2 and header[f"{arch}.context_length"] == 64
    assert header[f"{arch}.embedding_length"] == 32 and header[f"{arch}.attention.head_count"] == 4
    assert header["general.file_type"] == 0
    assert sum(t.size for t in tensors.values()) == sum(p.numel() for p in model.parameters()), "tied ones once"
    table = model.get_input_embeddings().weight.detach().numpy()
    np.testing.assert_array_equal(tensors["token_embd.weight"], table)
    down = {"gpt2": "transformer.h.1.mlp.c_proj"}.get(family, "model.layers.1.mlp.down_proj")
    W = model.get_submodule(down).weight.detach()
    np.testing.assert_array_equal(tensors["blk.1.ffn_down.weight"], (W.T if family == "gpt2" else W).numpy())


def test_names_of_a_llama(tokenizer, tmp_path):
    tensors, header = read(export.to_gguf(fitting("llama", tokenizer), tokenizer, tmp_path / "m.gguf", "f32"))
    inside = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")
    blocks = {f"blk.{i}.{name}.weight" for i in range(2) for name in inside}
    assert set(tensors) == blocks | {"token_embd.weight", "output_norm.weight", "output.weight"}
    assert tensors["blk.0.attn_k.weight"].shape == (16, 32) and header["llama.attention.head_count_kv"] == 2
    assert header["llama.rope.dimension_count"] == header["llama.attention.key_length"] == 8
    assert header["llama.rope.freq_base"] == 10000


def test_names_of_gpt2_and_qwen(tokenizer, tmp_path):
    tensors, _ = read(export.to_gguf(fitting("gpt2", tokenizer), tokenizer, tmp_path / "g.gguf", "f32"))
    assert tensors["blk.0.attn_qkv.weight"].shape == (96, 32) and tensors["blk.0.attn_qkv.bias"].shape == (96,)
    assert tensors["position_embd.weight"].shape == (64, 32) and "output.weight" not in tensors
    tensors, _ = read(export.to_gguf(fitting("qwen2", tokenizer), tokenizer, tmp_path / "2.gguf", "f32"))
    assert tensors["blk.0.attn_q.bias"].shape == (32,) and "blk.0.attn_output.bias" not in tensors
    model = fitting("qwen3", tokenizer)
    tensors, _ = read(export.to_gguf(model, tokenizer, tmp_path / "3.gguf", "f32"))
    assert tensors["blk.0.attn_q_norm.weight"].shape == (8,)
    q = model.model.layers[0].self_attn.q_proj.weight.detach().numpy()
    np.testing.assert_array_equal(tensors["blk.0.attn_q.weight"], q, "Qwen's rows stay in their order")


def rotate_halves(x, angle):
    """transformers: the pairs (i, i + d/2)."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def rotate_neighbours(x, angle):
    """llama.cpp's Llama: the pairs (2i, 2i + 1)."""
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1).flatten(-2)


def test_interleaved_rows_give_the_same_attention():
    """q·k is the same for all positions; with rows in another order it is not. Two heads, d = 6, float64."""
    heads, d = 2, 6
    W_q, W_k = torch.randn(2, heads * d, 10, dtype=torch.double)
    x, angle = torch.randn(5, 10, dtype=torch.double), torch.rand(5, 1, d // 2, dtype=torch.double) * 6

    def scores(rotate, W_q, W_k):
        q, k = (rotate((x @ W.T).unflatten(-1, (heads, d)), angle) for W in (W_q, W_k))
        return torch.einsum("ihd,jhd->hij", q, k)

    want = scores(rotate_halves, W_q, W_k)
    got = scores(rotate_neighbours, gguf.interleave(W_q, heads), gguf.interleave(W_k, heads))
    torch.testing.assert_close(got, want)
    assert not torch.allclose(scores(rotate_neighbours, W_q, W_k), want)
    assert not torch.allclose(scores(rotate_neighbours, gguf.interleave(W_q, 1), gguf.interleave(W_k, 1)), want)


def test_queries_keys_and_their_biases_are_interleaved(tokenizer, tmp_path):
    model = fitting("llama", tokenizer, attention_bias=True)
    attention = model.model.layers[1].self_attn
    torch.nn.init.normal_(attention.k_proj.bias)
    tensors, _ = read(export.to_gguf(model, tokenizer, tmp_path / "m.gguf", "f32"))
    for kind, heads, projection in (("q", 4, attention.q_proj), ("k", 2, attention.k_proj)):
        for part in ("weight", "bias"):
            want = gguf.interleave(getattr(projection, part).detach(), heads).numpy()
            np.testing.assert_array_equal(tensors[f"blk.1.attn_{kind}.{part}"], want)
    np.testing.assert_array_equal(tensors["blk.1.attn_v.weight"], attention.v_proj.weight.detach().numpy())


def test_llama3_scaling_is_a_tensor_of_factors(tokenizer, tmp_path):
    rope = {"rope_type": "llama3", "factor": 8.0, "rope_theta": 500.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32}  # fmt: skip
    model = fitting("llama", tokenizer, rope_parameters=rope)
    tensors, header = read(export.to_gguf(model, tokenizer, tmp_path / "m.gguf", "f32"))
    plain = 500.0 ** (-torch.arange(0, 8, 2) / 8)
    torch.testing.assert_close(plain / torch.from_numpy(tensors["rope_freqs.weight"].copy()),
                               model.model.rotary_emb.inv_freq)  # fmt: skip
    assert header["llama.rope.freq_base"] == 500 and "llama.rope.scaling.type" not in header


def test_linear_scaling_and_windows_are_in_the_header(tokenizer, tmp_path):
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}
    model = fitting("qwen2", tokenizer, rope_parameters=rope)
    _, header = read(export.to_gguf(model, tokenizer, tmp_path / "m.gguf", "f32"))
    assert (header["qwen2.rope.scaling.type"], header["qwen2.rope.scaling.factor"]) == ("linear", 4)
    model = fitting("mistral", tokenizer, sliding_window=24)
    _, header = read(export.to_gguf(model, tokenizer, tmp_path / "w.gguf", "f32"))
    assert header["llama.context_length"] == 24, "within one window attention is full"


@pytest.mark.parametrize("quantize", gguf.KINDS)
def test_types(quantize, tokenizer, tmp_path):
    """Each type is as near as its step allows; vectors stay exact, and odd rows stay in sixteen bits."""
    model = fitting("llama", tokenizer)
    path = export.to_gguf(model, tokenizer, tmp_path / "m.gguf", quantize)
    tensors, header = read(path)
    W = model.model.layers[0].mlp.down_proj.weight.detach().numpy()
    step = {"f32": 0, "f16": 2**-11, "bf16": 2**-8, "q8_0": 1 / 127, "q5_1": 1 / 15, "q5_0": 1 / 15, "q4_1": 1 / 7,
            "q4_0": 1 / 7}[quantize]  # fmt: skip
    assert abs(tensors["blk.0.ffn_down.weight"] - W).max() <= step * abs(W).max()
    stored = {t.name: t.tensor_type.name.lower() for t in GGUFReader(path).tensors}
    assert stored["blk.0.ffn_down.weight"] == quantize and stored["output_norm.weight"] == "f32"
    assert stored["token_embd.weight"] == ("q8_0" if quantize[:2] in ("q4", "q5") else quantize)
    assert header["general.quantization_version"] == 2


def test_rows_that_no_block_divides_stay_in_sixteen_bits():
    assert gguf.kind_of("blk.0.ffn_down.weight", (32, 48), "q8_0") == "f16"
    assert gguf.kind_of("blk.0.ffn_down.weight", (48, 32), "q8_0") == "q8_0"
    assert gguf.kind_of("position_embd.weight", (64, 32), "q8_0") == "f32"


def test_numbers_that_do_not_fit_are_refused(tokenizer, tmp_path):
    model = fitting("llama", tokenizer)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = 1e6
    with pytest.raises(ValueError, match="blk.0.ffn_up.weight holds 1e\\+06, more than float16.*bf16"):
        export.to_gguf(model, tokenizer, tmp_path / "m.gguf", "f16")
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="holds NaN"):
        export.to_gguf(model, tokenizer, tmp_path / "m.gguf", "f32")
    assert not list(tmp_path.iterdir()), "no half of a file"


def test_four_bit_layers_are_written_dense(tokenizer, tmp_path):
    model = pl.quantize(fitting("llama", tokenizer))
    tensors, _ = read(export.to_gguf(model, tokenizer, tmp_path / "m.gguf", "f32"))
    layer = model.model.layers[0].mlp.up_proj
    np.testing.assert_array_equal(tensors["blk.0.ffn_up.weight"], layer.dequantize().numpy())


# --- what llama.cpp would compute otherwise ---


@pytest.mark.parametrize("change, words", [
    ({"hidden_act": "gelu"}, "another activation for llama than 'gelu'"),
    ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "rope scaling 'dynamic'"),
])  # fmt: skip
def test_configs_are_refused(change, words, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=words + ".*convert_hf_to_gguf"):
        export.to_gguf(fitting("llama", tokenizer, **change), tokenizer, tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


def test_families_are_refused_by_name(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="LlamaForCausalLM, .*not for OPTForCausalLM"):
        export.to_gguf(build("opt"), tokenizer, tmp_path / "m.gguf")
    with pytest.raises(ValueError, match="qwen3 has no bias for 'model.layers.0.self_attn.o_proj'"):
        export.to_gguf(fitting("qwen3", tokenizer, attention_bias=True), tokenizer, tmp_path / "m.gguf")
    with pytest.raises(ValueError, match="scale_attn_by_inverse_layer_idx"):
        export.to_gguf(fitting("gpt2", tokenizer, scale_attn_by_inverse_layer_idx=True), tokenizer, tmp_path / "m.gguf")
    with pytest.raises(ValueError, match="heads·head_dim = width, here 4·16 and 32"):
        model = fitting("qwen2", tokenizer)
        model.config.head_dim = 16
        export.to_gguf(model, tokenizer, tmp_path / "m.gguf")
    with pytest.raises(ValueError, match="token 4095 and the model 96 rows"):
        export.to_gguf(build("llama"), tokenizer, tmp_path / "m.gguf")
    with pytest.raises(ValueError, match="'q4_k_m' is not written here.*llama-quantize"):
        export.to_gguf(fitting("llama", tokenizer), tokenizer, tmp_path / "m.gguf", "q4_k_m")
    assert not list(tmp_path.iterdir())


def test_biases_that_an_adapter_adds_are_refused_where_llama_cpp_has_none(tokenizer, tmp_path):
    model = fitting("qwen2", tokenizer)
    pl.attach(model, pl.BitFit, targets="down_proj", name="b")
    for adapter in pl.adapters(model)["b"].values():
        shake(adapter)
    with pytest.raises(ValueError, match="qwen2 has no bias for 'model.layers.0.mlp.down_proj'"):
        export.to_gguf(model, tokenizer, tmp_path / "m.gguf")


# --- the tokenizer ---


def test_vocabulary(tokenizer, tmp_path):
    model = fitting("llama", tokenizer)
    model.resize_token_embeddings(len(tokenizer) + 3, mean_resizing=False)
    _, header = read(export.to_gguf(model, tokenizer, tmp_path / "m.gguf"))
    described = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    words = header["tokenizer.ggml.tokens"]
    assert header["tokenizer.ggml.model"] == "gpt2" and header["tokenizer.ggml.pre"] == "smollm"
    assert words[: len(tokenizer)] == sorted(described["vocab"], key=described["vocab"].get)
    assert words[len(tokenizer) :] == ["[PAD4096]", "[PAD4097]", "[PAD4098]"]
    control, normal, unused = 3, 1, 5
    assert header["tokenizer.ggml.token_type"] == [control] * 2 + [normal] * (len(tokenizer) - 2) + [unused] * 3
    assert header["tokenizer.ggml.merges"] == [" ".join(merge) for merge in described["merges"]]
    assert header["tokenizer.ggml.eos_token_id"] == 1 and header["tokenizer.ggml.padding_token_id"] == 0
    assert not header["tokenizer.ggml.add_bos_token"] and not header["tokenizer.ggml.add_eos_token"]
    assert "tokenizer.chat_template" not in header


def byte_level(pre=None, bos=False, **model):
    """A tokenizer of single bytes, cut as `pre` says."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    t = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(["<s>", "</s>", *letters])}, merges=[], **model))
    t.pre_tokenizer = pre or pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = decoders.ByteLevel()
    t.add_special_tokens([AddedToken(w, special=True, normalized=False) for w in ("<s>", "</s>")])
    if bos:
        t.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=t, bos_token="<s>", eos_token="</s>")


def split(pattern):
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"),
                                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])  # fmt: skip


@pytest.mark.parametrize("pre, ignore, name", [
    (None, False, "gpt-2"), (gguf.LLAMA3, True, "llama-bpe"), (gguf.LLAMA3, False, "dbrx"),
    (gguf.QWEN2, False, "qwen2"),
])  # fmt: skip
def test_ways_of_cutting_are_known_by_name(pre, ignore, name, tmp_path):
    tokenizer = byte_level(pre and split(pre), ignore_merges=ignore)
    model = fitting("llama", tokenizer)
    _, header = read(export.to_gguf(model, tokenizer, tmp_path / "m.gguf"))
    assert header["tokenizer.ggml.pre"] == name


def test_bos_and_chat_template(tmp_path):
    tokenizer = byte_level(bos=True)
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.add_tokens(["<tool>"])
    _, header = read(export.to_gguf(fitting("llama", tokenizer), tokenizer, tmp_path / "m.gguf"))
    assert header["tokenizer.ggml.add_bos_token"] and header["tokenizer.ggml.bos_token_id"] == 0
    assert header["tokenizer.chat_template"] == "{{ messages }}"
    assert header["tokenizer.ggml.token_type"][-1] == 4 and header["tokenizer.ggml.tokens"][-1] == "<tool>", "of a user"


def test_tokenizers_are_refused(tmp_path):
    from tokenizers import normalizers, pre_tokenizers

    def refuse(tokenizer, words):
        with pytest.raises(ValueError, match=words + ".*convert_hf_to_gguf"):
            export.to_gguf(fitting("llama", tokenizer), tokenizer, tmp_path / "m.gguf")
        assert not list(tmp_path.iterdir())

    refuse(byte_level(split(r"\w+|\W+")), "cutting text into words by name")
    refuse(byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)), "cutting text into words by name")
    refuse(byte_level(split(gguf.QWEN2), ignore_merges=True), "cutting text into words by name")
    refuse(byte_level(dropout=0.1), "dropout=0.1")
    refuse(byte_level(byte_fallback=True), "byte fallback")
    lower = byte_level()
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    refuse(lower, "normalises text \\(Lowercase\\)")
    stripping = byte_level()
    from tokenizers import AddedToken

    stripping.add_tokens([AddedToken("<mask>", lstrip=True)])
    refuse(stripping, "'<mask>' has lstrip")


# --- adapters ---


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_is_all_there(family, tokenizer, tmp_path):
    """Read as llama.cpp does, (α/r)·B·A with interleaved rows is ΔW of each layer."""
    model = lora(fitting(family, tokenizer), alpha=6)
    tensors, header = read(export.lora_to_gguf(model, tmp_path / "a.gguf"))
    found = gguf.ARCHITECTURES[type(model).__name__]
    assert (header["general.type"], header["adapter.type"]) == ("adapter", "lora")
    assert header["general.architecture"] == found.name and header["adapter.lora.alpha"] == 6
    assert len(tensors) == 2 * len(pl.adapters(model)["a"])
    for path, adapter in pl.adapters(model)["a"].items():
        name = gguf.tensor_name(path)
        A, B = (torch.from_numpy(tensors[f"{name}.weight.lora_{x}"].copy()) for x in "ab")
        want = gguf.ordered(found, model.config, name, adapter.scaling * adapter.lora_B @ adapter.lora_A)
        torch.testing.assert_close(6 / B.shape[1] * B @ A, want)


@pytest.mark.parametrize("more", [{"rslora": True}, {"rank_pattern": {"v_proj": 2}}, {"alpha_pattern": {"q_proj": 1}},
                                  {"alpha": 0}, {"alpha": -3, "rslora": True}])  # fmt: skip
def test_one_alpha_for_all_layers(more, tokenizer, tmp_path):
    """llama.cpp: scale = α/r, and 1 if α is 0."""
    model = lora(fitting("qwen2", tokenizer), **{"alpha": 6, **more})
    tensors, header = read(export.lora_to_gguf(model, tmp_path / "a.gguf"))
    alpha = header["adapter.lora.alpha"]
    assert alpha != 0
    for path, adapter in pl.adapters(model)["a"].items():
        A, B = (torch.from_numpy(tensors[f"{gguf.tensor_name(path)}.weight.lora_{x}"].copy()) for x in "ab")
        torch.testing.assert_close(alpha / B.shape[1] * B @ A, adapter.scaling * adapter.lora_B @ adapter.lora_A)
    if "alpha_pattern" in more:  # plain layers keep their numbers bit for bit
        v = pl.adapters(model)["a"]["model.layers.0.self_attn.v_proj"]
        np.testing.assert_array_equal(tensors["blk.0.attn_v.weight.lora_b"], v.lora_B.detach().numpy())


def test_dropout_while_training_does_not_matter(tokenizer, tmp_path):
    model = lora(fitting("llama", tokenizer), dropout=0.5).train()
    export.lora_to_gguf(model, tmp_path / "a.gguf")
    assert all(adapter.training for adapter in pl.adapters(model)["a"].values())


def test_adapters_are_refused(tokenizer, tmp_path):
    model = lora(fitting("llama", tokenizer, tie_word_embeddings=True))
    pl.attach(model, pl.IA3, name="i")
    pl.attach(model, pl.LoRA, targets="q_proj", modules_to_save="norm", name="saved", r=2)
    pl.attach(model, pl.LoRA, targets="lm_head", name="head", r=2)

    def refuse(words, **more):
        with pytest.raises(ValueError, match=words):
            export.lora_to_gguf(model, tmp_path / "a.gguf", **more)
        assert not list(tmp_path.iterdir())

    refuse("'i' is IA3 at .*to_lora\\(model, 'i', r=16, into='i_lora'\\)", name="i")
    refuse("'saved' is ModuleCopy at 'model.norm'", name="saved")
    refuse("'lm_head' shares its weight", name="head")
    refuse("no adapter named 'b'", name="b")
    pl.activate(model, "a", "i")
    refuse("one adapter, not 2 \\(a, i\\)")
    pl.activate(model)
    refuse("one adapter, not 0")
    other = lora(build("opt"))
    with pytest.raises(ValueError, match="not for OPTForCausalLM"):
        export.lora_to_gguf(other, tmp_path / "a.gguf")


# --- files ---


def test_paths_are_checked(tokenizer, tmp_path):
    model = fitting("llama", tokenizer)
    (tmp_path / "folder.gguf").mkdir()
    (tmp_path / "text.gguf").write_text("my notes")
    (tmp_path / "link.gguf").symlink_to(tmp_path / "text.gguf")
    (tmp_path / "card.md").write_text("my card")
    wrong = {"model.bin": "does not end in .gguf", "folder.gguf": "is a folder", "link.gguf": "is a link",
             "text.gguf": "is there and no GGUF file", "card.gguf": "is not a card of ours"}  # fmt: skip
    for name, words in wrong.items():
        with pytest.raises(ValueError, match=words):
            export.to_gguf(model, tokenizer, tmp_path / name)
    assert (tmp_path / "text.gguf").read_text() == "my notes" and (tmp_path / "card.md").read_text() == "my card"
    assert sorted(os.listdir(tmp_path)) == ["card.md", "folder.gguf", "link.gguf", "text.gguf"]


def test_a_failed_write_loses_nothing(tokenizer, tmp_path, monkeypatch):
    model = fitting("llama", tokenizer)
    path = export.to_gguf(model, tokenizer, tmp_path / "new" / "m.gguf", "f32")
    before = {file.name: file.read_bytes() for file in path.parent.iterdir()}
    assert set(before) == {"m.gguf", "m.md"}
    calls, whole = [], quants.quantize

    def full(numbers, kind):
        calls.append(kind)
        if len(calls) == 5:
            raise OSError(28, "No space left on device")
        return whole(numbers, kind)

    monkeypatch.setattr(quants, "quantize", full)
    with pytest.raises(OSError, match="could not write .*m.gguf.*No space left.*untouched"):
        export.to_gguf(model, tokenizer, path, "f16")
    assert len(calls) == 5 and {file.name: file.read_bytes() for file in path.parent.iterdir()} == before
    monkeypatch.setattr(quants, "quantize", whole)

    def denied(source, target):
        assert os.path.getsize(source) > 2**20 and source.parent == target.parent, "whole, and on the same disk"
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", denied)
    with pytest.raises(OSError, match="could not write .*Permission denied"):
        export.to_gguf(model, tokenizer, path, "f32")
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == before


def test_one_tensor_at_a_time(tokenizer, tmp_path, monkeypatch):
    """A matrix is read when its turn has come, and not before: `weight_of` and `_packed` alternate."""
    model, order = pl.quantize(fitting("llama", tokenizer)), []
    read_dense, store = gguf.weight_of, gguf._packed
    monkeypatch.setattr(gguf, "weight_of", lambda layer: order.append("read") or read_dense(layer))
    monkeypatch.setattr(gguf, "_packed", lambda entry: order.append("store") or store(entry))
    export.to_gguf(model, tokenizer, tmp_path / "m.gguf")
    assert "read" in order and not any(a == b == "read" for a, b in zip(order, order[1:], strict=False))


def test_without_the_package_the_cure_is_named(tokenizer, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModuleNotFoundError, match="pip install gguf"):
        export.to_gguf(fitting("llama", tokenizer), tokenizer, tmp_path / "m.gguf")
