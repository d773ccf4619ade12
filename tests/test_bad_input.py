"""Bad input, over the whole field: each refusal is a ValueError or TypeError that names what is wrong, and changes
nothing. The tests walk over the registries, so what is added later is covered."""

from __future__ import annotations

import inspect
import json
import math
import traceback

import pytest
import torch
from cases import case_of
from families import build, inputs, shake
from safetensors.torch import load_file, save, save_file
from torch import nn

import peftlab as pl
from peftlab import hyper
from peftlab.__main__ import main
from peftlab.files import hyper_names
from peftlab.formats import LAYOUTS
from peftlab.train import Settings

each_method = pytest.mark.parametrize("name", sorted(pl.METHODS))
# what no hyper-parameter can be, whatever it is; and what none of a type can be
NEVER = (object(), {"a": object()}, b"x", [[2]])
NOT = {
    int: (2.5, math.nan, math.inf, "4", True, 2**40, [2]),
    float: (math.nan, math.inf, -math.inf, "4", True, [2], 10**400),
    bool: (0, 1, "True", 2.5, [True]),
    str: (0, 2.5, True, ["zzz"], "no such word"),
}


@pytest.fixture(scope="module")
def llama():
    return build("llama")


@pytest.fixture
def model(llama):
    """The shared model; a test that could not undo what it attached would be seen here."""
    yield llama
    if pl.hosts(llama):
        pl.detach(llama)
    llama.requires_grad_(True)


def fingerprint(model: nn.Module):
    """The tree, what is trained, and every tensor's place and number of changes: equal only if nothing was touched."""
    tensors = [(n, t.requires_grad, t._version, t.is_meta or t.data_ptr())
               for n, t in [*model.named_parameters(), *model.named_buffers()]]  # fmt: skip
    switches = {id(host.switch): (host.switch.active, host.switch.rows) for host in pl.hosts(model).values()}
    return [(n, id(m), m.training) for n, m in model.named_modules()], tensors, switches


def refused(model: nn.Module, call) -> str:
    """What the refusal says; the test fails if there is none, if it is of another kind, or if the model has changed."""
    before = fingerprint(model)
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    assert fingerprint(model) == before, "the model is not as it was"
    last = traceback.extract_tb(caught.value.__traceback__)[-1].filename
    assert "peftlab" in last, f"it came from deep inside, {last}: {caught.value}"
    return str(caught.value)


def hypers(method) -> dict:
    return {n: p for n, p in inspect.signature(method.__init__).parameters.items() if n not in ("self", "layer")}


# --- hyper-parameters ---


@each_method
def test_every_hyper_parameter_says_what_it_is(name):
    """The annotations are the check: one that is missing would let anything through."""
    for key, (hint, default) in hyper.hints(pl.METHODS[name]).items():
        assert hyper.said(hint).startswith(("a ", "True")), f"{key}: {hint} is no type that is checked"
        assert default is inspect.Parameter.empty or hyper.fits(default, hint), f"{key}={default!r} is no {hint}"
        hyper.checked(pl.METHODS[name], {} if default is inspect.Parameter.empty else {key: default})


@each_method
def test_a_value_that_cannot_be_is_refused_by_name(name, model):
    method, case = pl.METHODS[name], case_of(pl.METHODS[name])
    if case.before:
        case.before(model)
    wrong = [(key, value) for key, (hint, _) in hyper.hints(method).items() for kind, values in NOT.items()
             if hint is kind or getattr(hint, "__args__", (0,))[0] is kind and len(hint.__args__) == 2
             for value in values]  # fmt: skip
    wrong += [(key, value) for key in hypers(method) for value in NEVER]
    for key, value in wrong:
        said = refused(model, lambda k=key, v=value: pl.attach(model, method, case.targets, **{**case.hyper, k: v}))
        assert name in said, said
        assert key in said or repr(value) in said, f"{key}={value!r}: {said}"


@each_method
def test_numbers_out_of_range_are_refused_or_work(name, model):
    """−1, 0, 3 and 7 fit some hyper-parameters: they are refused by name, or what is attached runs and is finite."""
    method, case, batch = pl.METHODS[name], case_of(pl.METHODS[name]), inputs("llama", rows=2, length=5)
    if case.before:
        case.before(model)
    for key, (hint, _) in hyper.hints(method).items():
        if not {int, float} & {hint, *getattr(hint, "__args__", ())}:
            continue
        for value in (-1, 0, 3, 7):
            before = fingerprint(model)
            try:
                pl.attach(model, method, case.targets, "bad", **{**case.hyper, key: value})
            except ValueError as error:
                assert name in str(error)
                assert fingerprint(model) == before
                continue
            with torch.no_grad():
                try:
                    assert torch.isfinite(model(**batch).logits).all(), f"{key}={value}"
                except ValueError as error:  # of several tasks, one has to be chosen
                    assert key == "tasks" and "task" in str(error)
            pl.detach(model, "bad")
        if "dropout" in key or key.endswith("seed") or key in hyper.NOT_NEGATIVE:
            said = refused(model, lambda k=key: pl.attach(model, method, case.targets, **{**case.hyper, k: -1}))
            assert f"{key}=-1" in said


@each_method
def test_a_misspelt_hyper_parameter_is_answered_with_the_nearest(name, model):
    method = pl.METHODS[name]
    said = refused(model, lambda: pl.attach(model, method, case_of(method).targets, zzz=1))
    assert f"{name} has no hyper-parameter 'zzz'" in said
    for key in hypers(method):
        if len(key) > 3:
            said = refused(model, lambda k=key: pl.attach(model, method, **{k[:-1] + "_" + k[-1]: 1}))
            assert f"did you mean {key!r}" in said


def test_numbers_of_numpy_are_numbers_and_are_kept_as_pythons_own(model, tmp_path):
    numpy = pytest.importorskip("numpy")
    pl.attach(model, "LoRA", "q_proj", r=numpy.int64(4), alpha=numpy.float32(8))
    adapter = next(iter(pl.adapters(model)["default"].values()))
    assert type(adapter.hyper["r"]) is int and type(adapter.hyper["alpha"]) is float
    pl.save_adapter(model, tmp_path)  # JSON knows no other


def test_names_for_one_name_are_a_list(model):
    assert "write of=('a',)" in refused(model, lambda: pl.attach(model, "XLoRA", of="a"))


# --- sites and models ---

PLACES = ("embed_tokens", "input_layernorm", "lm_head", "model", r"layers\.0", "layers", "self_attn", "mlp", "act_fn",
          "rotary_emb")  # fmt: skip


def attached_runs_or_is_refused(model: nn.Module, method, targets, batch, hyper: dict) -> None:
    before = fingerprint(model)
    try:
        pl.attach(model, method, targets, "bad", **hyper)
    except (ValueError, TypeError) as error:
        assert fingerprint(model) == before
        assert any(what in str(error) for what in (method.__name__, type(model).__name__, "ModuleList"))
        return
    y = model(**batch) if isinstance(batch, dict) else model(batch)
    assert torch.isfinite(getattr(y, "logits", y)).all()
    pl.detach(model, "bad")


@each_method
def test_on_any_place_a_method_works_or_is_refused(name, model):
    """Never an adapter that breaks at its first pass."""
    method, case = pl.METHODS[name], case_of(pl.METHODS[name])
    if case.before:
        case.before(model)
    with torch.no_grad():
        for place in PLACES:
            attached_runs_or_is_refused(model, method, place, inputs("llama", rows=2, length=5), case.hyper)


@pytest.fixture(scope="module")
def others():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.LayerNorm(32), nn.Linear(32, 8))
    mine = {"plain": (plain, torch.randn(2, 3, 32), (None, "0", "1", "2")),
            "gpt2": (build("gpt2"), inputs("gpt2"), ("c_attn", "wpe", "attn", None)),
            "bert": (build("bert"), inputs("bert"), (None, "pooler", "classifier", "embeddings")),
            "t5": (build("t5"), inputs("t5"), (None, "relative_attention_bias"))}  # fmt: skip
    return mine


@pytest.mark.parametrize("family", ["plain", "gpt2", "bert", "t5"])
@each_method
def test_on_any_model_a_method_works_or_is_refused(name, family, others):
    method, (model, batch, places) = pl.METHODS[name], others[family]
    with torch.no_grad():
        for place in places:
            attached_runs_or_is_refused(model, method, place, batch, case_of(method).hyper)


ARGUMENTS = {
    "no model": (lambda m: pl.attach(None, "LoRA"), "needs a model"),
    "no method": (lambda m: pl.attach(m, None), "needs a method"),
    "a layer for a method": (lambda m: pl.attach(m, nn.Linear), "needs a method"),
    "a number for targets": (lambda m: pl.attach(m, "LoRA", 5), "targets=5"),
    "numbers in targets": (lambda m: pl.attach(m, "LoRA", [5]), "targets="),
    "no name": (lambda m: pl.attach(m, "LoRA", "q_proj", None), "adapter name None"),
    "an empty name": (lambda m: pl.attach(m, "LoRA", "q_proj", ""), "adapter name ''"),
    "a dotted name": (lambda m: pl.attach(m, "LoRA", "q_proj", "a.b"), "adapter name 'a.b'"),
    "a list of modules": (lambda m: pl.attach(m, "LoRA", modules_to_save="layers"), "ModuleList, which no model calls"),
    "no pattern": (lambda m: pl.attach(m, "LoRA", rank_pattern=5), "r pattern 5"),
    "no expression": (lambda m: pl.attach(m, "LoRA", rank_pattern={"[": 2}), "r pattern '\\['.*not a regular"),
    "half a rank": (lambda m: pl.attach(m, "LoRA", "q_proj", rank_pattern={"q_proj": 2.5}), "q_proj.*r=2.5"),
    "no rank": (lambda m: pl.attach(m, "LoRA", "q_proj", alpha_pattern={"q_proj": math.nan}), "q_proj.*alpha=nan"),
}


@pytest.mark.parametrize("what", ARGUMENTS)
def test_arguments_of_attach(what, model):
    call, said = ARGUMENTS[what]
    with pytest.raises((ValueError, TypeError), match=f"(?s){said}"):
        refused_again = fingerprint(model)
        try:
            call(model)
        finally:
            assert fingerprint(model) == refused_again


def test_rows_are_a_list_of_names(model):
    """rows="ab" is not a batch of the adapters a and b."""
    for name in "ab":
        pl.attach(model, "LoRA", "q_proj", name)
    for rows in ("ab", [5], [["a"]]):
        with pytest.raises(TypeError, match="rows="), pl.using(model, rows=rows):
            pass


# --- starts, optimizers, settings ---

CALLS = {**pl.inits.INITS, **pl.optim.OPTIMIZERS}
GIVEN = {"relora": dict(every=2, r=2)}


@pytest.mark.parametrize("name", CALLS)
def test_arguments_of_starts_and_optimizers(name, model):
    function = CALLS[name]
    pl.attach(model, "LoRA", "q_proj", r=4)
    ids = inputs("llama")["input_ids"]
    arguments = {"data": [{"input_ids": ids, "labels": ids}], "lr": 1e-3, **GIVEN.get(name, {})}
    known = hyper.hints(function)
    needed = {key: value for key, value in arguments.items() if key in known}
    for key, (hint, _) in list(known.items())[1:]:
        kind = next((k for k in NOT if k in (hint, *getattr(hint, "__args__", ())[:1])), None)
        wrong = () if kind is None or key in ("skip", "also") else NOT[kind][:4]
        for value in (5,) if key == "data" else wrong:
            said = refused(model, lambda k=key, v=value: function(model, **{**needed, k: v}))
            assert name.replace("_", "") in said.lower().replace("-", "").replace("_", "") and repr(value) in said
        if key == "data":
            assert "calibration data" in refused(model, lambda: function(model, **{**needed, "data": None}))
    assert "model" in refused(model, lambda: function(None, **needed)) and known


def test_settings_of_training_are_what_they_say():
    for key, (hint, default) in hyper.hints(Settings).items():
        assert hyper.fits(default, hint), key
        wrong = next((NOT[k] for k in NOT if k in (hint, *getattr(hint, "__args__", ()))), ())
        other = key in ("optimizer", "schedule", "checkpoint", "precision")
        for value in (5, []) if other else [v for v in wrong if v != 2**40]:
            with pytest.raises(ValueError, match=key):
                Settings(**{key: value})


@pytest.mark.parametrize("more", [dict(density="x"), dict(density=True), dict(density=0.5, seed=2.5)])
def test_arguments_of_combine(more, model):
    for name in "ab":
        pl.attach(model, "LoRA", "q_proj", name)
    how = "dare_linear" if "seed" in more else "ties"
    assert next(reversed(more)) in refused(model, lambda: pl.combine(model, {"a": 1, "b": 1}, how, **more))


# --- files ---


def write(folder, tensors, config, metadata=None):
    folder.mkdir(exist_ok=True)
    (folder / "adapter_model.safetensors").write_bytes(tensors if isinstance(tensors, bytes) else save(tensors))
    (folder / "adapter_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return folder


def damaged(method, tensors: dict, config: dict):
    """what is wrong -> (tensors, config)"""
    first, *_ = tensors
    t, raw, rest = tensors[first], save(tensors), {k: v for k, v in tensors.items() if k != first}
    yield "no tensors", {}, config
    if method.hf_type not in LAYOUTS:  # some of the layouts read what they know and leave the rest
        yield "a strange tensor", {**tensors, "zzz": torch.zeros(2)}, config
    yield "another shape", {**tensors, first: torch.cat([t.reshape(-1)] * 3)}, config
    yield "no shape", {**tensors, first: t.reshape(-1)[0].reshape(1, 1, 1, 1, 1).clone()}, config
    if t.is_floating_point():
        yield "nan", {**tensors, first: torch.full_like(t, math.nan)}, config
    yield "another name", {**rest, first + "x": t}, config
    yield "truncated", raw[: len(raw) // 2], config
    yield "empty", b"", config
    yield "pickle", b"\x80\x04}q\x00.", config
    yield "half a config", tensors, json.dumps(config)[:20]
    yield "a list", tensors, "[1]"
    for kind in (None, 5, [], "ZZZ"):
        yield f"peft_type {kind!r}", tensors, {**config, "peft_type": kind}
    if "modules_to_save" in config:
        yield "modules", tensors, {**config, "modules_to_save": 5}
    for key in {"r", "init_r", "lora_alpha", "alpha", "num_virtual_tokens", "effective_rank", "bottleneck"} & {
        *hyper_names(method).values()} & {*config}:  # fmt: skip
        yield f"{key} of another kind", tensors, {**config, key: {"a": [None]}}


@each_method
def test_a_damaged_file_is_refused_and_named(name, model, tmp_path):
    method, case = pl.METHODS[name], case_of(pl.METHODS[name])
    if case.before:
        case.before(model)
    pl.attach(model, method, case.targets, "good", **case.hyper)
    pl.save_adapter(model, tmp_path / "good", "good")
    pl.detach(model, "good")
    tensors = load_file(tmp_path / "good" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "good" / "adapter_config.json").read_text())
    for what, bad, other in damaged(method, tensors, config):
        folder, before = write(tmp_path / "bad", bad, other), fingerprint(model)
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            pl.load_adapter(model, folder, "bad")
            pytest.fail(f"{what} was read")
        assert str(folder) in str(caught.value), f"{what}: {caught.value}"
        assert fingerprint(model) == before, what


@pytest.mark.parametrize("missing", [0, -1])
def test_a_file_without_one_of_its_tensors_is_refused(missing, model, tmp_path):
    """Of a whole site that is missing nothing can be known; of half a site, it is."""
    pl.attach(model, "LoRA", "q_proj", "good")
    pl.save_adapter(model, tmp_path, "good")
    pl.detach(model)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors[sorted(tensors)[missing]]
    save_file(tensors, file)
    assert "disagree" in refused(model, lambda: pl.load_adapter(model, tmp_path))


def test_whole_numbers_do_not_pass_for_fractions(model, tmp_path):
    pl.attach(model, "LoRA", "q_proj", "good")
    shake(model.model.layers[0].self_attn.q_proj.adapters["good"])
    pl.save_adapter(model, tmp_path, "good")
    pl.detach(model)
    file = tmp_path / "adapter_model.safetensors"
    save_file({k: t.long() for k, t in load_file(file).items()}, file)
    assert "where fractions are needed" in refused(model, lambda: pl.load_adapter(model, tmp_path))


def test_an_adapter_of_another_model_is_refused_by_every_method(model, others, tmp_path):
    for name in ("PromptTuning", "PrefixTuning", "LoRA"):
        pl.attach(model, name, name="good")
        pl.save_adapter(model, tmp_path / name, "good")
        pl.detach(model)
        other = others["gpt2"][0]
        assert str(tmp_path / name) in refused(other, lambda n=name, o=other: pl.load_adapter(o, tmp_path / n))


# --- the command line ---

LINES = [
    "methods LoRAA", "methods --family zzz", "count --model zzz", "count --model gpt2 --method zzz",
    "count --model gpt2 --method LoRA --rank 0", "count --model gpt2 --method LoRA --set alpha=nan",
    "count --model gpt2 --method LoRA --set r=2.5", "count --model gpt2 --method LoRA --set alpha",
    "count --model gpt2 --method LoRA --set zzz=1", "count --model gpt2 --method OFT --set oft_block_size=7",
    "count --model gpt2 --method LoRA --targets zzz", "count --model gpt2 --method CPT", "count --model gpt2 --dtype z",
    "vram --model gpt2 --card 4090 --method zzz", "vram --model gpt2 --card zzz", "vram --model gpt2 --card 4090 "
    "--method LoRA --set alpha=zzz", "merge --adapter nowhere --how svd --rank 2 --out out", "export --adapter nowhere "
    "--check vllm", "merge --adapter nowhere:x --out out", "serve --store nowhere", "serve --adapter x",
    "serve --cache -1",
]  # fmt: skip


@pytest.mark.parametrize("line", LINES)
def test_a_wrong_command_ends_with_one_line_and_status_2(line, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(line.split()) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith(f"peftlab {line.split()[0]}: ") and err.count("\n") == 1
    assert not list(tmp_path.iterdir()), "nothing is written"


def test_a_method_of_ones_own_may_have_any_annotation(model):
    """What cannot be looked up is not checked; a tuple is checked one by one; a list of lists is said in words."""

    class Local:
        pass

    class Own(pl.Adapter):
        adds = False

        def __init__(self, layer, mode: Local | None = None, r: int = 1):
            super().__init__(layer)
            self.w = torch.nn.Parameter(torch.ones(()))

        def forward(self, f, x):
            return f(x) * self.w

    class Pairs(Own):
        def __init__(self, layer, pair: tuple[int, str] = (1, "a"), table: list[list[int]] | None = None):
            super().__init__(layer)

    pl.METHODS.pop("Own"), pl.METHODS.pop("Pairs")
    pl.attach(model, Own, "q_proj", name="own", mode=Local())
    pl.attach(model, Pairs, "q_proj", name="pairs", pair=(1, "a"), table=[[1]])
    for wrong, said in ((dict(pair=("a", 1)), "a whole number, a word"), (dict(table=3), "a list of list of whole")):
        with pytest.raises(ValueError, match=said):
            pl.attach(model, Pairs, "q_proj", name="more", **wrong)
