"""Exports: the merged folder computes the same, the model in memory is untouched, nothing is lost, cards and checks."""

import json
import os
import shutil

import pytest
import torch
import transformers
from families import FAMILIES, TARGETS, build, inputs, shake
from huggingface_hub import ModelCard
from safetensors import safe_open

import peftlab as pl
from peftlab import export
from peftlab.gguf import interleave

AUTO = {"bert": transformers.AutoModelForSequenceClassification, "t5": transformers.AutoModelForSeq2SeqLM}


def adapted(family="llama", method=pl.LoRA, name="a", model=None, **more):
    model = build(family) if model is None else model
    pl.attach(model, method, name=name, **{"targets": TARGETS[family], **more})
    for adapter in pl.adapters(model)[name].values():
        shake(adapter)
    return model


@torch.no_grad()
def logits(model, family="llama"):
    return model(**inputs(family)).logits


def snapshot(model):
    """All that could have changed: tensors and their identities, modes, hosts, what is active or merged."""
    tensors = {k: (id(t), t.clone(), t.requires_grad) for k, t in [*model.named_parameters(), *model.named_buffers()]}
    modules = {k: (id(m), m.training) for k, m in model.named_modules()}
    switches = [(h.merged, h.original is None, h.switch.active) for h in pl.hosts(model).values()]
    return tensors, modules, switches, model.config.to_dict()


def assert_same(before, model):
    (tensors, *rest), (now, *others) = before, snapshot(model)
    assert rest == others and set(tensors) == set(now)
    for key, (where, tensor, trained) in tensors.items():
        assert (where, trained) == (now[key][0], now[key][2]) and torch.equal(tensor, now[key][1]), key


def load(folder, family="llama", **more):
    model, told = AUTO.get(family, transformers.AutoModelForCausalLM).from_pretrained(
        folder, output_loading_info=True, **more)  # fmt: skip
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


# --- to transformers ---


@pytest.mark.parametrize("family", FAMILIES)
def test_the_folder_computes_the_same(family, tmp_path):
    """float32 folded in float64: 1e-4 is far above rounding, and far below what the adapter does."""
    model = build(family)
    plain = logits(model, family)
    adapted(family, model=model)
    want, before = logits(model, family), snapshot(model)
    export.to_transformers(model, tmp_path / "new")
    assert_same(before, model)
    torch.testing.assert_close(logits(load(tmp_path / "new", family), family), want, rtol=0, atol=1e-4)
    assert (plain - want).abs().max() > 0.05
    with safe_open(tmp_path / "new" / "model.safetensors", "pt") as f:
        assert not {key for key in f.keys() if "adapters" in key or ".layer.weight" in key}  # noqa: SIM118
        assert set(f.keys()) <= set(build(family).state_dict())


@pytest.mark.parametrize("method, more", [("IA3", {}), ("BitFit", {"targets": "all-linear"}), ("LNTuning", {})])
def test_any_method_that_merges(method, more, tmp_path):
    model = build("llama")
    pl.attach(model, method, name="a", **more)
    for adapter in pl.adapters(model)["a"].values():
        shake(adapter)
    if method == "BitFit":  # without these options a Llama of transformers would leave the biases out in silence
        before = snapshot(model)
        with pytest.raises(ValueError, match="no place for 'model.layers.0.mlp.down_proj.bias' \\(14 such.*mlp_bias"):
            export.to_transformers(model, tmp_path / "new")
        assert_same(before, model)
        assert not list(tmp_path.iterdir())
        model.config.attention_bias = model.config.mlp_bias = True
    want = logits(model)
    export.to_transformers(model, tmp_path / "new")
    torch.testing.assert_close(logits(load(tmp_path / "new")), want, rtol=0, atol=1e-4)


def test_which_adapters(tmp_path):
    """The active ones, those named, or none; two are folded in the order of their names."""
    model = adapted()
    adapted(model=model, method="IA3", name="b", targets="q_proj|down_proj")
    for names in ((), ("a",), ("b",), ("a", "b")):
        with pl.using(model, *names):
            want = logits(model)
        copy = export.merged_copy(model, names)
        torch.testing.assert_close(logits(copy), want, rtol=0, atol=1e-4)
        with pl.using(model, *names):
            assert torch.equal(logits(export.merged_copy(model)), logits(copy)), "default: what is active"
    assert not pl.hosts(copy) and type(copy) is type(model)


def test_a_merged_model_gives_the_same_file(tmp_path):
    """Folding starts from the layers that merge has kept, so nothing is folded twice or rounded twice."""
    model = adapted()
    want = export.merged_copy(model).state_dict()
    pl.merge(model, "a")
    before = snapshot(model)
    got = export.merged_copy(model).state_dict()
    assert_same(before, model)
    assert set(want) == set(got) and all(torch.equal(want[key], got[key]) for key in want)
    base = export.merged_copy(model, ()).state_dict()
    assert all(torch.equal(base[key], value) for key, value in build("llama").state_dict().items())


def test_the_copy_shares_what_no_adapter_touches():
    model = adapted(targets="q_proj")
    copy = export.merged_copy(model)
    ours, theirs = dict(model.named_parameters()), dict(copy.named_parameters())
    shared = [key for key in theirs if key in ours and theirs[key] is ours[key]]
    assert len(shared) == len(theirs) - 2, "all but the two q_proj"
    low = export.merged_copy(model, dtype=torch.bfloat16)
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}, "not cast in place"


def test_a_trained_head_is_in_the_folder(tmp_path):
    model = adapted("bert", modules_to_save="classifier")
    want = logits(model, "bert")
    export.to_transformers(model, tmp_path / "new")
    torch.testing.assert_close(logits(load(tmp_path / "new", "bert"), "bert"), want, rtol=0, atol=1e-5)
    with safe_open(tmp_path / "new" / "model.safetensors", "pt") as f:
        saved = f.get_tensor("classifier.weight")
    assert torch.equal(saved, pl.adapters(model)["a"]["classifier"].module.weight)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_tied_stays_tied(dtype, tmp_path):
    model = adapted(model=build("llama", tie_word_embeddings=True))
    export.to_transformers(model, tmp_path / "new", dtype=dtype)
    with safe_open(tmp_path / "new" / "model.safetensors", "pt") as f:
        assert "lm_head.weight" not in f.keys()  # noqa: SIM118
        assert f.get_tensor("model.embed_tokens.weight").dtype == (dtype or torch.float32)
    loaded = load(tmp_path / "new")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert json.loads((tmp_path / "new" / "config.json").read_text())["dtype"] == str(dtype or torch.float32)[6:]


def test_four_bits_become_dense_and_the_card_says_so(tmp_path):
    model = adapted(model=pl.quantize(build("llama")), targets="q_proj")
    want, before = logits(model), snapshot(model)
    export.to_transformers(model, tmp_path / "new", dtype=torch.float32)
    assert_same(before, model)
    torch.testing.assert_close(logits(load(tmp_path / "new")), want, rtol=0, atol=1e-3)
    assert "12 layers of the base were packed in four bits" in (tmp_path / "new" / "README.md").read_text()


def test_the_tokenizer_goes_along(tmp_path):
    model, tokenizer = pl.load_base(device="cpu")
    adapted(model=model, targets="v_proj")
    folder = export.to_transformers(model, tmp_path / "new", tokenizer)
    text = "SELECT 12 FROM parks"
    assert transformers.AutoTokenizer.from_pretrained(folder)(text)["input_ids"] == tokenizer(text)["input_ids"]
    again, _ = pl.load_base(folder, device="cpu")
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("method, more, words", [
    ("PromptTuning", {}, "whole LlamaModel computes"),
    ("PrefixTuning", {}, "whole LlamaAttention computes"),
    ("Houlsby", {}, "not an affine map.*No other tool has Houlsby: .*save_adapter"),
    ("TrainableTokens", {"tokens": [3, 4]}, "shares its weight.*would untie"),
])  # fmt: skip
def test_what_cannot_be_folded_is_refused(method, more, words, tmp_path):
    model = build("llama", tie_word_embeddings=True)
    pl.attach(model, method, name="a", **more)
    for adapter in pl.adapters(model)["a"].values():
        shake(adapter)
    before = snapshot(model)
    cure = "" if "save_adapter" in words else ".*to_peft"  # HF PEFT has no Houlsby
    with pytest.raises(ValueError, match=f"'a' cannot be folded into '.*{words}{cure}"):
        export.to_transformers(model, tmp_path / "new")
    assert_same(before, model)
    assert not list(tmp_path.iterdir())


def test_other_models_are_refused(tmp_path):
    net = torch.nn.Sequential(torch.nn.Linear(4, 4))
    pl.attach(net, pl.LoRA, targets="0", r=2)
    with pytest.raises(ValueError, match="Sequential is no model of transformers.*to_peft"):
        export.to_transformers(net, tmp_path / "new")
    with pytest.raises(ValueError, match="no adapter named 'b' is attached; did you mean|Attached: a"):
        export.to_transformers(adapted(), tmp_path / "new", name="b")


# --- folders ---


def test_only_exports_are_replaced(tmp_path, monkeypatch):
    model, folder = adapted(), tmp_path / "new"
    export.to_transformers(model, folder)
    (folder / "old.txt").write_text("of the old export")
    export.to_transformers(model, folder, name=())
    assert not (folder / "old.txt").exists(), "replaced as a whole"
    assert json.loads((folder / "export.json").read_text())["adapters"] == []

    mine = tmp_path / "mine"
    mine.mkdir()
    export.to_transformers(model, mine)
    shutil.rmtree(mine)
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(folder)
    work = tmp_path / "work" / "here"
    work.mkdir(parents=True)
    monkeypatch.chdir(work)
    wrong = {mine: "no export of peftlab", tmp_path / "file": "is a file", tmp_path / "link": "is a link",
             ".": "you work in", "..": "you work in, or holds it"}  # fmt: skip
    for path, words in wrong.items():
        with pytest.raises(ValueError, match=words):
            export.to_transformers(model, path)
    assert (mine / "notes.txt").read_text() == "mine" and (tmp_path / "file").read_text() == "mine" and work.is_dir()
    with pytest.raises(ValueError, match="an export to transformers"):
        export.to_ollama(model, None, folder)


def test_a_failed_export_leaves_the_old_one(tmp_path, monkeypatch):
    model, folder = adapted(), tmp_path / "new"
    export.to_transformers(model, folder)
    before, whole = {p.name: p.read_bytes() for p in folder.iterdir()}, snapshot(model)
    monkeypatch.setattr(export, "_describe", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        export.to_transformers(model, folder, name=())
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before and os.listdir(tmp_path) == ["new"]
    assert_same(whole, model)


# --- to peft, cards ---


def test_to_peft_is_an_adapter_with_a_card(tmp_path):
    import peft

    model, folder = adapted(), tmp_path / "a"
    export.to_peft(model, folder)
    theirs = peft.PeftModel.from_pretrained(build("llama"), folder).eval()
    torch.testing.assert_close(logits(theirs), logits(model), rtol=0, atol=1e-5)
    assert sorted(os.listdir(folder)) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    export.to_peft(model, folder, about=export.About(text="again"))
    assert "again" in (folder / "README.md").read_text()
    (folder / "README.md").write_text("# my own words")
    weights = (folder / "adapter_model.safetensors").read_bytes()
    shake(pl.adapters(model)["a"]["model.layers.0.self_attn.q_proj"])
    with pytest.raises(ValueError, match="README.md is not a card of ours"):
        export.to_peft(model, folder)
    assert (folder / "README.md").read_text() == "# my own words"
    assert (folder / "adapter_model.safetensors").read_bytes() == weights


def test_the_card_says_what_was_done(tmp_path):
    model = adapted(r=4, alpha=8, alpha_pattern={"down_proj": 3})
    model.config.name_or_path = model.config._name_or_path = "someone/tiny-llama"
    about = export.About(title="SQL: an adapter", license="apache-2.0", datasets=["sql"], text="It writes SQL.",
                         results={"exact match": 0.93211})  # fmt: skip
    export.to_peft(model, tmp_path / "a", about=about)
    text = (tmp_path / "a" / "README.md").read_text()
    data = ModelCard(text).data
    assert (data.base_model, data.library_name, data.license) == ("someone/tiny-llama", "peft", "apache-2.0")
    assert data.pipeline_tag == "text-generation" and data.datasets == ["sql"] and data.tags == ["peftlab", "lora"]
    trained = sum(p.numel() for a in pl.adapters(model)["a"].values() for p in a.parameters())
    frozen = sum(p.numel() for p in build("llama").parameters())
    for words in ("# SQL: an adapter", "It writes SQL.", "h = W₀x + (α/r)·B·A·x", "| r | 4 |",
                  "| exact match | 0.9321 |", "| alpha | 8 (2 layers), 3 (2 layers) |", "q_proj (2), down_proj (2)",
                  f"Trained: {trained:,} parameters beside {frozen:,} frozen ones ({trained / (trained + frozen):.3%})",
                  'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("someone/tiny-llama"), "a")',
                  'pl.load_base("someone/tiny-llama")', f"- torch: {torch.__version__}"):  # fmt: skip
        assert words in text, words
    assert str(tmp_path) not in text


@pytest.mark.parametrize("kind", ["transformers", "ollama", "gguf", "gguf-lora", "peft"])
def test_every_card_can_be_read_and_names_no_machine_path(kind, tmp_path):
    model, tokenizer = pl.load_base(device="cpu")
    adapted(model=model, targets="q_proj|v_proj", r=2)
    place = tmp_path / ("x.gguf" if "gguf" in kind else "x")
    write = {"transformers": lambda: export.to_transformers(model, place), "peft": lambda: export.to_peft(model, place),
             "ollama": lambda: export.to_ollama(model, tokenizer, place), "gguf": lambda: export.to_gguf(
                 model, tokenizer, place, "q8_0"), "gguf-lora": lambda: export.lora_to_gguf(model, place)}  # fmt: skip
    assert write[kind]() == place
    text = (tmp_path / "x.md" if "gguf" in kind else place / "README.md").read_text()
    data = ModelCard(text).data
    assert data.pipeline_tag == "text-generation" and "lora" in data.tags
    assert ("gguf" in data.tags) == (kind in ("ollama", "gguf", "gguf-lora")) and data.base_model is None
    assert "the embedded base model of peftlab" in text and str(tmp_path) not in text and os.getcwd() not in text
    files = place.iterdir() if place.is_dir() else [place]
    assert not any(str(tmp_path).encode() in file.read_bytes() for file in files)


def test_the_card_of_a_method_that_peft_has_not(tmp_path):
    model = adapted(method="Houlsby", targets=None)
    export.to_peft(model, tmp_path / "a")
    assert ModelCard((tmp_path / "a" / "README.md").read_text()).data.library_name == "peftlab"


# --- Ollama ---


@pytest.mark.parametrize("merged", [True, False])
def test_the_folder_for_ollama(merged, tmp_path):
    from gguf import GGUFReader

    model, tokenizer = pl.load_base(device="cpu")
    adapted(model=model, targets="q_proj")
    folder = export.to_ollama(model, tokenizer, tmp_path / "o", "f32", merged=merged)
    apart = [] if merged else ["adapter.gguf"]
    assert sorted(os.listdir(folder)) == sorted(["Modelfile", "README.md", *apart, "export.json", "model.gguf"])
    lines = (folder / "Modelfile").read_text().splitlines()
    assert lines == ["FROM ./model.gguf", *([] if merged else ["ADAPTER ./adapter.gguf"]), 'PARAMETER stop "<eos>"',
                     'TEMPLATE """{{ .Prompt }}"""']  # fmt: skip
    stored = {t.name: t.data for t in GGUFReader(folder / "model.gguf").tensors}
    assert (stored["blk.0.attn_v.weight"] == model.model.layers[0].self_attn.v_proj.weight.detach().numpy()).all()
    base = model.model.layers[0].self_attn.q_proj.layer.weight.detach()
    assert (stored["blk.0.attn_q.weight"] == interleave(base, 6).numpy()).all() == (not merged)


def test_the_modelfile(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no model.gguf"):
        export.modelfile(tmp_path)
    with pytest.raises(ValueError, match="not a plain file name"):
        export.modelfile(tmp_path, "../model.gguf")
    assert not list(tmp_path.iterdir())
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    path = export.modelfile(tmp_path, "llama3.2", "a.gguf", stop=['say "x"', "\n"], context=4096)
    assert path.read_text() == ('FROM llama3.2\nADAPTER ./a.gguf\nPARAMETER stop "say \\"x\\""\nPARAMETER stop "\\n"\n'
                                "PARAMETER num_ctx 4096\n")  # fmt: skip
    _, tokenizer = pl.load_base(device="cpu")
    tokenizer.chat_template = "{{ messages }}"
    assert "TEMPLATE" not in export.modelfile(tmp_path, "a.gguf", tokenizer=tokenizer).read_text()


# --- checks ---


def saved(tmp_path, family="llama", **more):
    return pl.save_adapter(adapted(family, **more), tmp_path / "a", "a")


def test_nothing_against_plain_lora(tmp_path):
    folder = saved(tmp_path, r=8)
    assert {target: export.check(target, folder) for target in export.TARGETS} == dict.fromkeys(export.TARGETS, [])
    assert export.check("vllm", saved(tmp_path, rslora=True)) == []


@pytest.mark.parametrize("more, words", [
    ({"r": 17}, ["--max-lora-rank 32, or to_lora(model, name, r=16, into=…)"]),
    ({"rank_pattern": {"down_proj": 12}}, ["ignores rank_pattern", "to_lora(model, name, r=12"]),
    ({"alpha_pattern": {"down_proj": 3}}, ["ignores alpha_pattern", "to_lora(model, name, r=8"]),
    ({"modules_to_save": "norm"}, ["no modules_to_save (norm)"]),
    ({"targets": "lm_head"}, ["embedding_modules"]),
    ({"method": "IA3", "targets": "q_proj"}, ["takes LoRA only, and this is IA3", "to_lora(model, name, r=16"]),
])  # fmt: skip
def test_what_vllm_refuses(more, words, tmp_path):
    (problem,) = export.check("vllm", saved(tmp_path, **more))
    assert all(word in problem for word in words), problem


def test_the_cure_for_patterns_cures(tmp_path):
    """to_lora at the largest rank: one rank, one alpha, the same outputs."""
    model = adapted(rank_pattern={"down_proj": 12}, alpha_pattern={"q_proj": 3})
    want = logits(model)
    folder = pl.save_adapter(model, tmp_path / "a", "a")
    assert len(export.check("vllm", folder)) == 2
    pl.to_lora(model, "a", r=12, into="b")
    torch.testing.assert_close(logits(model), want, rtol=0, atol=1e-4)
    assert export.check("vllm", pl.save_adapter(model, tmp_path / "b", "b")) == []


def rewritten(folder, **more):
    config = json.loads((folder / "adapter_config.json").read_text()) | more
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_settings_of_other_libraries_are_seen(tmp_path):
    folder = saved(tmp_path)
    for change, word in (({"use_dora": True}, "DoRA"), ({"bias": "all"}, "biases"),
                         ({"trainable_token_indices": [1]}, "trained tokens")):  # fmt: skip
        clean = {"use_dora": False, "bias": "none", "trainable_token_indices": None}
        for target in ("vllm", "llama.cpp", "ollama"):
            problems = export.check(target, rewritten(folder, **{**clean, **change}))
            assert len(problems) == 1 and word in problems[0] and "merge it" in problems[0]
    assert export.check("peft", folder) == export.check("transformers", folder) == []


def test_gpt2_and_ranks_beyond_all(tmp_path):
    (problem,) = export.check("vllm", saved(tmp_path, "gpt2"))
    assert "GPT-2 takes no adapters" in problem
    assert export.check("llama.cpp", tmp_path / "a") == []
    wide = torch.nn.Sequential()
    wide.add_module("q_proj", torch.nn.Linear(600, 600))
    pl.attach(wide, pl.LoRA, targets="q_proj", r=513)
    (problem,) = export.check("vllm", pl.save_adapter(wide, tmp_path / "w"))
    assert "up to 512, this one has 513" in problem


def test_other_targets(tmp_path):
    assert "tied" in export.check("llama.cpp", saved(tmp_path, targets="lm_head"))[0]
    own = pl.save_adapter(adapted(method="Houlsby", targets=None), tmp_path / "h", "a")
    for target in ("peft", "transformers"):
        assert "HF PEFT has no Houlsby" in export.check(target, own)[0]
    prompts = pl.save_adapter(adapted(method="PromptTuning", targets=None), tmp_path / "p", "a")
    assert export.check("peft", prompts) == [] and "takes no prompts" in export.check("transformers", prompts)[0]


def test_wrong_questions(tmp_path):
    with pytest.raises(ValueError, match="unknown target 'vlm'; did you mean 'vllm'"):
        export.check("vlm", tmp_path)
    with pytest.raises(FileNotFoundError, match="no adapter folder"):
        export.check("vllm", tmp_path)
    folder = saved(tmp_path)
    weights = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ValueError, match="truncated or damaged"):
        export.check("vllm", folder)
