"""Counts against closed formulas, against the reference's counts, and against what an optimizer really holds."""

from __future__ import annotations

import json
import time

import peft
import pytest
import torch
from cases import CASES, Case
from families import FAMILIES, TARGETS, build, inputs, labels
from torch import nn

import peftlab as pl
from peftlab.count import Count, Part
from peftlab.shapes import config_of, meta_model, shapes

each_family = pytest.mark.parametrize("family", FAMILIES)


def llama2_7b():
    """The published shape without its 27 GB of weights. Source: Touvron et al. 2023, arXiv:2307.09288, config.json."""
    import transformers as t

    config = t.LlamaConfig(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
                           num_attention_heads=32, tie_word_embeddings=False)  # fmt: skip
    with torch.device("meta"):
        return t.LlamaForCausalLM(config)


def test_llama2_7b_counts_as_the_reference_prints_it(capsys):
    reference = peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"])
    peft.get_peft_model(llama2_7b(), reference).print_trainable_parameters()
    printed = capsys.readouterr().out
    assert "trainable params: 4,194,304 || all params: 6,742,609,920 || trainable%: 0.0622" in printed

    model = pl.attach(llama2_7b(), pl.LoRA, targets="q_proj|v_proj", r=8)
    assert all(p.is_meta for p in model.parameters())
    c = pl.count(model)
    assert (c.trainable, c.total) == (4_194_304, 6_742_609_920)
    assert repr(c).splitlines()[0] == "trainable 4,194,304 of 6,742,609,920 parameters (0.06 %)"
    assert f"{c.percent:.4f}" == "0.0622"
    assert c.expected == {"default": 32 * 2 * 8 * (4096 + 4096)} == c.per_adapter
    assert c.bytes == 4 * c.trainable and c.optimizer_bytes == 8 * c.trainable


@each_family
def test_total_is_what_transformers_says_and_full_finetuning_trains_it(family):
    model = build(family)
    c = pl.count(pl.full_finetuning(model))
    assert c.total == c.base == c.trainable == model.num_parameters()
    assert c.percent == 100 and c.per_method == {"base": c.total} and c.per_adapter == {}
    assert pl.count(model.requires_grad_(False)).trainable == 0


# A copied head beside the adapter too, where the head is not tied to the embeddings.
@pytest.mark.parametrize(
    "family, head",
    [(f, []) for f in FAMILIES] + [("llama", ["lm_head"]), ("qwen2", ["lm_head"]), ("bert", ["classifier"])],
)
def test_same_numbers_as_the_reference(family, head):
    config = peft.LoraConfig(r=4, target_modules=TARGETS[family].split("|"), modules_to_save=head or None)
    reference = peft.get_peft_model(build(family), config).get_nb_trainable_parameters()
    c = pl.count(pl.attach(build(family), pl.LoRA, targets=TARGETS[family], r=4, modules_to_save=head))
    assert (c.trainable, c.total) == reference
    assert c.base == build(family).num_parameters()
    assert c.per_adapter == c.expected == {"default": c.trainable}


# Methods on other adapters (AdapterFusion) need those first; their case knows the Llama's layers.
PAIRS = [(m, f) for m in pl.METHODS for f in FAMILIES if f == "llama" or CASES.get(m, Case()).before is None]


@pytest.mark.parametrize("method, family", PAIRS)
def test_every_method_counts_as_its_closed_formula(method, family):
    case = CASES.get(method, Case(targets=None))
    model, targets = build(family), None if family != "llama" or case.targets is None else case.targets
    if case.before is not None:
        case.before(model)
    if method == "ModuleCopy":
        targets = TARGETS[family]
    try:
        pl.attach(model, method, targets=targets, name="a", **case.hyper)
    except ValueError:
        assert family != "llama", "each method works on a Llama"
        pytest.skip(f"refused on {family}")
    c = pl.count(model)
    assert c.expected["a"] == c.per_adapter["a"] > 0
    assert c.per_method["base"] == 0 and c.per_method[method] == c.per_adapter["a"]
    assert sum(part.trainable for part in c.per_layer.values()) == c.trainable


def test_rank_patterns_enter_the_formula():
    model = pl.attach(build("llama"), pl.LoRA, targets="q_proj", r=2, rank_pattern={r"layers\.1\..*": 5})
    assert pl.count(model).expected == {"default": (2 + 5) * (32 + 32)} == pl.count(model).per_adapter


def test_a_copied_module_without_formula_leaves_expected_empty():
    model = pl.attach(build("llama"), pl.LoRA, targets="q_proj", r=2, modules_to_save="model.norm")
    c = pl.count(model)
    assert c.expected == {} and c.per_method == {"base": 0, "LoRA": 2 * 2 * 64, "ModuleCopy": 32}


def test_tied_weights_count_once():
    tied, untied = pl.count(build("llama", tie_word_embeddings=True)), pl.count(build("llama"))
    assert untied.total - tied.total == 96 * 32
    assert "head" not in tied.per_layer and untied.per_layer["head"].total == 96 * 32


def test_state_of_the_adapters_does_not_change_what_is_there():
    model = pl.attach(build("llama"), pl.LoRA, targets="q_proj", name="a", r=2)
    pl.attach(model, pl.LoRA, targets="q_proj|v_proj", name="b", r=3)
    c = pl.count(model)
    assert c.per_adapter == c.expected == {"a": 2 * 2 * 64, "b": 2 * 3 * (64 + 48)}  # two blocks; v_proj is (16, 32)
    with pl.using(model):
        assert pl.count(model) == c
    assert pl.count(model.eval()) == c
    pl.merge(model, "b")
    assert pl.count(model) == c
    merged = next(host.layer for host in pl.hosts(model).values() if host.merged)
    merged.bias = nn.Parameter(torch.zeros(merged.out_features))  # as a method that trains a bias leaves it
    assert pl.count(model) == c
    pl.unmerge(model)
    pl.freeze(model, "a")
    frozen = pl.count(model)
    assert frozen.per_adapter == {"a": 0, "b": c.per_adapter["b"]} and frozen.total == c.total
    assert frozen.expected == c.expected  # parameters, trained or not
    pl.detach(model)
    assert pl.count(model).total == c.base


@each_family
def test_parts_add_up(family):
    c = pl.count(pl.attach(build(family), pl.LoRA, targets=TARGETS[family], r=4))
    for parts in (c.per_layer, c.per_module):
        assert sum(p.total for p in parts.values()) == c.total
        assert sum(p.trainable for p in parts.values()) == c.trainable
    assert sum(c.per_method.values()) == c.trainable
    frame = c.to_pandas()
    assert frame.parameters.sum() == c.total and frame[frame.trainable].bytes.sum() == c.bytes
    assert "other" not in c.per_layer


def test_parts_have_the_names_a_reader_expects():
    c = pl.count(pl.attach(build("llama"), pl.LoRA, targets="q_proj", r=4, modules_to_save="lm_head"))
    assert list(c.per_layer) == ["embeddings", "0", "1", "norm", "head"]
    assert c.per_layer["1"].trainable == 4 * 64
    assert c.per_layer["head"] == Part(total=2 * 96 * 32, trainable=96 * 32)  # the frozen head stays beside its copy
    assert c.per_module["q_proj"] == Part(total=2 * (32 * 32 + 4 * 64), trainable=2 * 4 * 64)
    assert {row.path for row in c.rows if row.adapter} == {
        "lm_head", "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"}  # fmt: skip
    two = pl.count(build("t5")).per_layer
    assert {"encoder.0", "encoder.1", "decoder.0", "decoder.1", "embeddings", "norm"} == set(two)
    assert list(pl.count(nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 1)))).per_module) == ["0", "1.0"]


@pytest.mark.parametrize("base, adapter", [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")])
def test_bytes_are_what_adamw_and_the_tensors_hold(base, adapter):
    model = pl.attach(build("llama").to(getattr(torch, base)), pl.LoRA, targets="q_proj|v_proj", r=4)
    for per_path in pl.adapters(model).values():
        for module in per_path.values():
            module.to(getattr(torch, adapter))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    batch = inputs("llama")
    model(**batch, labels=labels("llama", batch)).loss.backward()
    optimizer.step()
    states = [t for state in optimizer.state.values() for key, t in state.items() if key != "step"]
    c = pl.count(model)
    assert c.optimizer_bytes == sum(t.nbytes for t in states) > 0
    assert c.bytes == sum(p.nbytes for p in model.parameters() if p.requires_grad)


def test_four_bit_weights_of_bitsandbytes_count_as_the_weights_they_stand_for():
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(64, 32, bias=True, quant_type="nf4")
    plain = pl.count(layer).total
    layer = layer.to("cpu")
    if layer.weight.quant_state is None:
        layer.weight = layer.weight._quantize("cpu")
    assert layer.weight.numel() == 64 * 32 // 2  # packed: the trap
    assert pl.count(layer).total == plain == 64 * 32 + 32


def test_a_layer_that_packs_its_weights_says_how_many():
    class Packed(nn.Module):
        def __init__(self, out_features=8, in_features=6):
            super().__init__()
            self.in_features, self.out_features, self.n_weights = in_features, out_features, out_features * in_features
            self.register_buffer("codes", torch.zeros(self.n_weights // 2, dtype=torch.uint8))
            self.register_buffer("absmax", torch.zeros(1))
            self.bias = nn.Parameter(torch.zeros(out_features), requires_grad=False)

    model = pl.attach(nn.Sequential(Packed(), Packed()), pl.LoRA, targets=["0"], r=2)
    c = pl.count(model)
    assert c.base == 2 * (48 + 8) and c.trainable == c.expected["default"] == 2 * (8 + 6)
    assert c.per_module["0"].total == 48 + 8 + 28
    assert next(r.bytes for r in c.rows if r.path == "1" and r.name == "weight") == 24


def test_the_scales_of_packed_weights_are_bytes_but_no_parameters():
    model = pl.quantize(build("llama"))
    c = pl.count(model)
    assert c.total == pl.count(build("llama")).total
    tensors = [t for m in model.modules() if isinstance(m, pl.NF4Linear) for t in m.buffers()]
    dense = sum(p.nbytes for p in model.parameters())
    assert sum(row.bytes for row in c.rows) == dense + sum(t.nbytes for t in tensors)


def test_repr_is_aligned_and_the_same_each_time():
    model = build("llama")
    pl.attach(model, pl.LoRA, targets="q_proj", name="a", r=2)
    pl.attach(model, pl.LoRA, targets="q_proj", name="long_name", r=2)
    text = repr(pl.count(model))
    first, *table, last = text.splitlines()
    assert first == "trainable 512 of 25,248 parameters (2.03 %)"
    assert [line.split() for line in table] == [
        ["parameters", "trainable", "formula"], ["base", "24,736", "0", "–"], ["a", "(LoRA)", "256", "256", "256"],
        ["long_name", "(LoRA)", "256", "256", "256"]]  # fmt: skip
    assert len({len(line) for line in table}) == 1, "columns are right-aligned"
    assert last == "trainable weights 2.0 KiB, their two AdamW states 4.0 KiB"
    assert text == repr(pl.count(model))


def test_a_tiny_share_is_not_printed_as_nothing():
    model = pl.attach(llama2_7b(), pl.LoRA, targets=r"layers\.0\.self_attn\.q_proj", r=1)
    assert repr(pl.count(model)).splitlines()[0] == "trainable 8,192 of 6,738,423,808 parameters (0.0001 %)"
    assert "of 0 parameters (0.00 %)" in repr(pl.count(nn.Identity()))


def test_plot_shows_frozen_and_trainable_with_units():
    from matplotlib import pyplot as plt

    c = pl.count(pl.attach(build("llama"), pl.LoRA, targets="q_proj", r=4))
    axes = c.plot()
    frozen, trained = axes.containers[:2]
    kinds = [label.get_text() for label in axes.get_yticklabels()]
    assert axes.get_xlabel() == "parameters (thousands)" and axes.get_ylabel() == "kind of module"
    for kind, grey, orange in zip(kinds, frozen, trained, strict=True):
        part = c.per_module[kind]
        assert grey.get_width() * 1000 == pytest.approx(part.total - part.trainable)
        assert orange.get_width() * 1000 == pytest.approx(part.trainable)
        assert orange.get_x() + orange.get_width() <= axes.get_xlim()[1] and axes.get_xlim()[0] == 0
    assert "512" in [text.get_text() for text in axes.texts]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["frozen", "trainable"]
    mine = plt.figure().subplots()
    assert c.plot(mine) is mine
    plt.close("all")


def test_count_is_an_immutable_value():
    c = pl.count(nn.Linear(2, 3))
    assert isinstance(c, Count) and (c.total, c.base) == (9, 9)
    with pytest.raises(AttributeError):
        c.rows = ()


# ------------------------------------------------------------------------------------- by shape, without weights


@pytest.mark.parametrize("name", shapes())
def test_built_in_shape_has_the_published_number_of_parameters(name):
    """The published totals are those of the model card or of the file's header on the Hub (`hub` in shapes.json)."""
    entry, c = shapes()[name], pl.count(name)
    assert c.trainable == 0 and c.total == meta_model(name).num_parameters()
    assert all(row.bytes == 4 * row.parameters for row in c.rows), "nothing is counted that is not there"
    if entry["parameters"] is not None:
        untied = 0
        if name.startswith(("flan", "t0", "mt0")):  # published with a head of its own; transformers 5 ties T5's always
            untied = entry["config"]["vocab_size"] * entry["config"]["d_model"]
        assert c.total + untied == entry["parameters"]


def test_shapes_of_the_ledger_are_the_same_models():
    from peftlab.course.ledger import SHAPES

    twins = {"1B (Llama 3.2)": "llama-3.2-1b", "7B (Llama 2)": "llama-2-7b", "13B (Llama 2)": "llama-2-13b",
             "70B (Llama 2)": "llama-2-70b"}  # fmt: skip
    for ledger, name in twins.items():
        assert SHAPES[ledger].params == pl.count(name).total
        assert SHAPES[ledger].lora(8) == pl.count(name, pl.LoRA, r=8).trainable


def test_seventy_billion_in_under_five_seconds():
    start = time.process_time()  # this process's time alone: the machine may be busy
    c = pl.count("llama-3.1-70b", "LoRA", targets="all-linear", r=16)
    assert time.process_time() - start < 5
    assert c.total - c.trainable == 70_553_706_496
    block = 2 * (8192 + 8192) + 2 * (8192 + 1024) + 3 * (8192 + 28672)  # q, o; k, v; the feed-forward net
    assert c.trainable == c.expected["default"] == 80 * 16 * block


def test_a_shape_is_found_by_name_hub_id_config_dictionary_file_and_folder(tmp_path):
    known = pl.count("llama-3.2-1b", "LoRA", r=2)
    config = config_of("llama-3.2-1b")
    entries = shapes()["llama-3.2-1b"]["config"]
    (tmp_path / "config.json").write_text(json.dumps(entries))
    for source in ("Llama-3.2-1B", "meta-llama/Llama-3.2-1B", config, entries, tmp_path, str(tmp_path / "config.json")):
        assert pl.count(source, "LoRA", r=2) == known
    config_of(config, tie_word_embeddings=False)
    assert config.tie_word_embeddings, "the caller's config is never changed"


def test_full_and_bare():
    full, bare = pl.count("gpt2", "full"), pl.count("gpt2")
    assert full.trainable == full.total == bare.total == 124_439_808 and bare.trainable == 0
    assert bare.file_bytes("bfloat16") == 2 * bare.total


def test_a_config_without_architectures_gets_the_class_of_transformers_auto_classes():
    import transformers as t

    decoder = pl.count(t.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=10))
    assert decoder.total == meta_model(t.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=10)).num_parameters()
    assert pl.count(t.ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2)).total > 0


def test_unknown_names_are_refused_at_once_with_close_ones(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match=r"no built-in shape, .* 'lama-2-7b'; did you mean 'llama-2-7b'"):
        pl.count("lama-2-7b")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", "https://no.such.host.invalid")
    start = time.monotonic()
    with pytest.raises(ValueError, match="Built in are: llama-7b, .*The Hugging Face Hub was asked too"):
        pl.count("someone/their-model")
    assert time.monotonic() - start < 5
    with pytest.raises(ValueError, match="has no config.json"):
        pl.count(tmp_path)
    (tmp_path / "config.json").write_text("no json")
    with pytest.raises(ValueError, match="is no JSON file of a config"):
        pl.count(tmp_path)
    with pytest.raises(ValueError, match="no 'model_type'"):
        pl.count({"hidden_size": 8})


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ((3,), TypeError, "takes a model .*, not int"),
        (("gpt2", "lorra"), ValueError, "did you mean 'LoRA'"),
        (("gpt2", "LoRA", "q_proj"), ValueError, "no module path matches 'q_proj'"),
        (("gpt2", None, "c_attn"), ValueError, "targets given, but no method"),
        (("gpt2", "full", "c_attn"), ValueError, "takes no targets"),
        ((nn.Linear(2, 3), "LoRA"), ValueError, "attach\\(model, …\\) first"),
    ],
)
def test_what_cannot_be_counted_is_refused(arguments, error, words):
    with pytest.raises(error, match=words):
        pl.count(*arguments)


@pytest.mark.parametrize("method, hyper", [("LoRA", {"r": 4}), ("Pfeiffer", {"bottleneck": 8})])
def test_file_bytes_are_those_of_the_file(tmp_path, method, hyper):
    model = pl.attach(build("llama"), method, **hyper)
    file = pl.save_adapter(model, tmp_path, name="default") or tmp_path
    path = next(tmp_path.rglob("*.safetensors"))
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")  # safetensors: its length, then JSON
    assert pl.count(model).file_bytes() == path.stat().st_size - header, file
    pl.freeze(model, "default")
    assert pl.count(model).file_bytes("float16") == (path.stat().st_size - header) // 2
    with pytest.raises(ValueError, match="'float33' is no dtype"):
        pl.count(model).file_bytes("float33")


def test_parameters_that_adapters_share_count_once():
    """As in VeRA: one pair of frozen matrices for all layers, and vectors of each layer's own."""
    model = pl.attach(build("llama"), pl.LoRA, targets="q_proj", r=2)
    first, second = pl.adapters(model)["default"].values()
    second.lora_A = first.lora_A
    c = pl.count(model)
    assert c.trainable == 2 * 32 + 2 * 2 * 32 and c.total == c.base + c.trainable
    first.lora_A.requires_grad_(False)
    assert pl.count(model).trainable == 2 * 2 * 32 and pl.count(model).total == c.total


def test_hosts_in_hosts_keep_their_places():
    model = build("llama")
    pl.attach(model, pl.LoRA, targets="q_proj", name="a", r=2)
    pl.attach(model, pl.PrefixTuning, name="b", k=3)
    pl.attach(model, pl.LoRA, targets="v_proj", name="c", r=2)
    c = pl.count(model)
    assert c.per_adapter == c.expected == {"a": 2 * 2 * 64, "b": 2 * 2 * 3 * 16, "c": 2 * 2 * 48}
    assert {row.path for row in c.rows if row.adapter == "b"} == {f"model.layers.{i}.self_attn" for i in (0, 1)}
    assert c.per_layer["0"].trainable == c.trainable // 2 and not any("layer." in r.path for r in c.rows)
