"""LoRA on parameters that no layer owns, on tiny mixtures of experts: the laws, HF PEFT's target_parameters, errors."""

from __future__ import annotations

import copy
import json
import pickle
import sys
import threading
import warnings

import peft
import pytest
import torch
from families import build, build_other, inputs, labels, shake
from safetensors.torch import load_file
from torch import nn

import peftlab as pl
from peftlab.methods._parameters import ParameterLoRA
from peftlab.sites import group, loose

EXPERTS = "experts.gate_up_proj|experts.down_proj"
CLOSE = dict(rtol=0, atol=1e-5)  # fp32 logits of order 1; the two libraries add in another order
# family -> shapes (E, out, in) of the experts' two parameters, as the change B·A has them
SHAPES = {
    "mixtral": ((4, 128, 32), (4, 32, 64)),
    "qwen3_moe": ((4, 32, 32), (4, 32, 16)),
    "gpt_oss": ((4, 128, 32), (4, 32, 64)),  # stored as (E, in, out), and says so
    "llama4": ((4, 32, 128), (4, 64, 32)),  # the same, but does not say so: B·A lies as the weight does
}
FAMILIES = tuple(SHAPES)


def moe(family: str = "mixtral", seed: int = 0) -> nn.Module:
    """A tiny model of two blocks with four experts, of which two (Llama 4: one) see each token."""
    import transformers as t

    if family == "mixtral":
        return build_other(family, seed)
    sizes = dict(vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=8, max_position_embeddings=64, initializer_range=0.2, pad_token_id=0,
                 bos_token_id=1, eos_token_id=1)  # fmt: skip
    config = {
        "qwen3_moe": lambda: t.Qwen3MoeConfig(moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2, **sizes),
        "gpt_oss": lambda: t.GptOssConfig(num_local_experts=4, num_experts_per_tok=2, **sizes),
        "llama4": lambda: t.Llama4TextConfig(num_local_experts=4, intermediate_size_mlp=64, **sizes),
    }[family]()
    torch.manual_seed(seed)
    model = t.AutoModelForCausalLM.from_config(config).eval()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in loose(model).values():  # not all of them are drawn by these models themselves
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=draw))
    return model


def adapted(family: str = "mixtral", targets=EXPERTS, name: str = "a", moved: bool = True, **hyper) -> nn.Module:
    torch.manual_seed(1)
    model = pl.attach(moe(family), "LoRA", targets, name=name, **{"r": 4, "alpha": 8, **hyper})
    if moved:
        move(model, name)
    return model


def move(model, name: str = "a", seed: int = 0) -> None:
    for more, adapter in enumerate(pl.adapters(model)[name].values()):
        shake(adapter, 0.1, seed=seed + more)


def logits(model, **batch):
    with torch.no_grad():
        return model(**(batch or inputs("llama"))).logits


def state(model) -> dict[str, torch.Tensor]:
    return {k.replace(".layer.", "."): v.clone() for k, v in model.state_dict().items() if ".adapters." not in k}


def gradients(model) -> dict[str, torch.Tensor]:
    batch = inputs("llama")
    model.zero_grad()
    model(**batch, labels=labels("llama", batch)).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


# -------------------------------------------------------------------------------------------------------------- laws


@pytest.mark.parametrize("family", FAMILIES)
def test_attached_it_is_the_base_and_moved_it_is_the_base_with_other_weights(family):
    """W′ₑ = Wₑ + (α/r)·Bₑ·Aₑ, written into the weights of a plain model by hand."""
    model, plain = adapted(family, moved=False), moe(family)
    assert torch.equal(logits(model), logits(plain))
    move(model)
    there = loose(plain)
    for path, adapter in pl.adapters(model)["a"].items():
        for (name, one), (E, out_features, in_features) in zip(adapter.each.items(), SHAPES[family], strict=True):
            assert one.lora_A.shape == (E, 4, in_features) and one.lora_B.shape == (E, out_features, 4)
            W = there[f"{path}.{name}"]
            for e in range(E):
                change = 8 / 4 * one.lora_B[e] @ one.lora_A[e]
                W.data[e] += change.T.detach() if family == "gpt_oss" else change.detach()
    assert (logits(model) - logits(moe(family))).abs().max() > 0.1
    torch.testing.assert_close(logits(model), logits(plain), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_of_it_learns_and_the_base_keeps_its_bytes(dtype):
    model = pl.attach(moe().to(dtype), "LoRA", f"q_proj|gate.weight|{EXPERTS}", name="a", r=4)
    before = state(model)
    move(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.1)
    found = gradients(model.train())
    optimizer.step()
    assert set(found) == {n for n, _ in model.named_parameters() if ".adapters.a." in n}
    assert len(found) == 2 * 2 * 4 and all(g.abs().sum() > 0 for g in found.values())
    assert all(torch.equal(state(model)[k], v) for k, v in before.items())


def test_merged_it_is_the_float64_sum_rounded_once_and_unmerging_is_exact():
    for dtype in (torch.float32, torch.bfloat16):
        model = pl.attach(moe().to(dtype), "LoRA", EXPERTS, name="a", r=4)
        move(model)
        before, want = state(model), logits(model)
        there = pl.adapters(model)["a"]
        weights = {f"{p}.{n}": (getattr(a.layer, n).double() + one.scaling * one.lora_B.double() @ one.lora_A.double())
                   for p, a in there.items() for n, one in a.each.items()}  # fmt: skip
        pl.merge(model)
        assert all(torch.equal(loose(model)[p], W.to(dtype)) for p, W in weights.items())
        torch.testing.assert_close(logits(model), want, **(CLOSE if dtype == torch.float32 else
                                                           dict(rtol=0.05, atol=0.15)))  # fmt: skip
        pl.unmerge(model)
        assert torch.equal(logits(model), want) and all(torch.equal(state(model)[k], v) for k, v in before.items())


def test_two_adapters_add_up_in_either_order_and_one_of_them_can_be_merged():
    model = adapted()
    pl.attach(model, "LoRA", "experts.down_proj|q_proj", name="b", r=2)
    move(model, "b", seed=9)
    with pl.using(model, "a", "b"):
        both = logits(model)
    with pl.using(model, "b", "a"):
        torch.testing.assert_close(logits(model), both, **CLOSE)
    for names in ("a",), ("b",):
        with pl.using(model, *names):
            assert (logits(model) - both).abs().max() > 0.05
    with pl.using(model):
        assert torch.equal(logits(model), logits(moe()))
    pl.activate(model, "a", "b")
    pl.merge(model, "a")
    torch.testing.assert_close(logits(model), both, **CLOSE)
    pl.unmerge(model)
    pl.detach(model, "a")
    assert set(pl.adapters(model)) == {"b"}
    pl.detach(model)
    assert torch.equal(logits(model), logits(moe())) and model.state_dict().keys() == moe().state_dict().keys()


def test_copied_pickled_and_compiled_it_is_the_same():
    model = adapted(targets=f"q_proj|{EXPERTS}")
    want, learned = logits(model), gradients(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), want)
        for host in pl.hosts(twin).values():
            adapter = host.adapters["a"]
            assert adapter.layer is host.layer
            assert all(one.layer is host.layer for one in getattr(adapter, "each", {}).values())
    torch._dynamo.reset()
    batch = inputs("llama")
    model.zero_grad()
    out = torch.compile(model, fullgraph=True, backend="aot_eager")(**batch, labels=labels("llama", batch))
    torch.testing.assert_close(out.logits, want, **CLOSE)
    out.loss.backward()
    for name, parameter in model.named_parameters():
        if name in learned:
            torch.testing.assert_close(parameter.grad, learned[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    model = adapted().train()
    plain = gradients(model)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    found = gradients(model)
    assert found.keys() == plain.keys() and found
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, plain[name], rtol=1e-5, atol=1e-6)
    assert all(type(p) is nn.Parameter for p in loose(model).values()), "nothing is left in the parameters' place"


@pytest.mark.parametrize("how", ["eager", "batched_mm", "grouped_mm"])
def test_every_way_to_run_experts_uses_the_adapted_weights(how):
    """All of transformers' ways that there are on a CPU; each is seen to run."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS as ways

    model = adapted()
    want = logits(model)
    model.set_experts_implementation(how)
    calls, plain = [], ways.get_interface
    ways.get_interface = lambda name, default: calls.append(name) or plain(name, default)
    try:
        torch.testing.assert_close(logits(model), want, **CLOSE)
    finally:
        del ways.get_interface
    assert calls == [how] * 2


def test_an_error_in_the_pass_leaves_the_weights_as_they_were():
    model, ids = adapted(), inputs("llama")
    before = loose(model)

    def fail(*_):
        raise KeyboardInterrupt

    act = model.model.layers[1].mlp.experts.act_fn
    handle = act.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        model(**ids)
    handle.remove()
    after = loose(model)
    assert after.keys() == before.keys() and all(after[p] is W for p, W in before.items())


def test_on_a_base_in_four_bits_the_experts_stay_as_they_are_and_learn():
    model = pl.attach(pl.quantize(moe()), "LoRA", f"q_proj|{EXPERTS}", name="a", r=4)
    bare = logits(pl.quantize(moe()))
    assert torch.equal(logits(model), bare)
    move(model)
    want = logits(model)
    assert (want - bare).abs().max() > 0.1 and len(gradients(model)) == 12
    torch.testing.assert_close(logits(pl.merge(model)), want, rtol=1e-5, atol=2e-5)


def test_it_is_trained_by_the_house_trainer():
    model = adapted(targets="all-linear|all-experts", moved=False)
    batch = inputs("llama")
    rows = [{"input_ids": ids.tolist(), "labels": ids.tolist()} for ids in batch["input_ids"]]
    log = pl.train(model, rows, steps=8, batch_size=3, progress=False, optimizer=pl.optim.lora_plus(model, 5e-3))
    assert log.losses[-1] < 0.8 * log.losses[0]


# ------------------------------------------------------------------------------------------------------------- counts


@pytest.mark.parametrize("family", FAMILIES)
def test_the_count_is_the_closed_formula(family):
    """E·r·(in + out) for each of the two parameters of each of the two blocks, there and on the meta device."""
    want = 2 * sum(E * 4 * (a + b) for E, a, b in SHAPES[family])
    counted = pl.count(adapted(family))
    assert counted.trainable == counted.expected["a"] == counted.per_method["LoRA"] == want
    assert pl.count(moe(family).config, "LoRA", EXPERTS, r=4).trainable == want, "of a shape without numbers"


def test_each_parameter_can_have_a_rank_and_alpha_of_its_own():
    model = adapted(rank_pattern={"gate_up_proj": 6, r"layers\.1\..*down_proj": 2}, alpha_pattern={"down_proj": 3})
    found = {f"{p[13:14]}.{n}": one for p, a in pl.adapters(model)["a"].items() for n, one in a.each.items()}
    assert {p: one.lora_A.shape[1] for p, one in found.items()} == {
        "0.gate_up_proj": 6, "0.down_proj": 4, "1.gate_up_proj": 6, "1.down_proj": 2}  # fmt: skip
    assert [found[f"1.{n}"].scaling for n in ("gate_up_proj", "down_proj")] == [8 / 6, 3 / 2]
    assert pl.count(model).expected["a"] == pl.count(model).trainable


# ------------------------------------------------------------------------------------------------------ files, HF PEFT

SETTINGS = {  # targets and hyper-parameters of ours, and of the reference
    "experts": (EXPERTS, {}, dict(target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"])),
    "one": ("experts.down_proj", {}, dict(target_modules=[], target_parameters=["mlp.experts.down_proj"])),
    "both kinds": (
        f"q_proj|o_proj|{EXPERTS}",
        dict(rslora=True),
        dict(target_modules=["q_proj", "o_proj"], target_parameters=["gate_up_proj", "down_proj"], use_rslora=True),
    ),
    "router": (
        f"v_proj|gate.weight|{EXPERTS}",
        {},
        dict(target_modules=["v_proj"], target_parameters=["gate.weight", "experts.gate_up_proj", "experts.down_proj"]),
    ),
    "patterns": (
        f"q_proj|{EXPERTS}",
        dict(rank_pattern={"gate_up_proj": 6, "q_proj": 3}, alpha_pattern={r"layers\.1\..*down_proj": 3}),
        dict(
            target_modules=["q_proj"],
            target_parameters=["experts.gate_up_proj", "experts.down_proj"],
            rank_pattern={"gate_up_proj": 6, "q_proj": 3},
            alpha_pattern={r"model\.layers\.1\..*down_proj": 3},
        ),
    ),
}  # fmt: skip
CASES = [*(("mixtral", what) for what in SETTINGS), ("qwen3_moe", "router"), ("gpt_oss", "both kinds"),
         ("gpt_oss", "patterns"), ("llama4", "experts")]  # fmt: skip


def compared(*what: str):
    """The cases; those with layers too are marked as LoRA's, the others make nothing but its part for parameters."""
    mark = pytest.mark.reference("LoRA, target_parameters", *what)
    cases = [pytest.param(*case, marks=mark if SETTINGS[case[1]][2]["target_modules"] else []) for case in CASES]
    return pytest.mark.parametrize(("family", "what"), cases)


def places(family: str, what: str):
    """The setting with Llama 4's names."""
    targets, hyper, theirs = SETTINGS[what]
    return (targets.replace("experts.", "feed_forward.experts.") if family == "llama4" else targets), hyper, theirs


@compared("writes")
def test_the_reference_reads_ours(family, what, tmp_path):
    targets, hyper, _ = places(family, what)
    model = adapted(family, targets, **hyper)
    want = logits(model)
    assert (want - logits(moe(family))).abs().max() > 1e-2
    pl.save_adapter(model, tmp_path, name="a")
    theirs = peft.PeftModel.from_pretrained(moe(family), tmp_path).eval()
    torch.testing.assert_close(logits(theirs), want, **CLOSE)
    torch.testing.assert_close(logits(theirs.merge_and_unload()), logits(pl.merge(model)), **CLOSE)
    again = pl.load_adapter(moe(family), tmp_path, name="b")
    assert torch.equal(logits(again), want)
    hyper = {path: adapter.hyper for path, adapter in pl.adapters(model)["a"].items()}
    assert {path: adapter.hyper for path, adapter in pl.adapters(again)["b"].items()} == hyper


@compared("reads", "gradients")
def test_we_read_the_reference(family, what, tmp_path):
    targets, hyper, settings = places(family, what)
    theirs = peft.get_peft_model(moe(family), peft.LoraConfig(r=4, lora_alpha=8, **settings)).eval()
    trained = [p for p in theirs.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == pl.count(adapted(family, targets, **hyper)).trainable
    for seed, parameter in enumerate(trained):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
    theirs.save_pretrained(tmp_path)
    model = pl.load_adapter(moe(family), tmp_path, name="a")
    want = logits(theirs)
    assert (want - logits(moe(family))).abs().max() > 1e-2
    torch.testing.assert_close(logits(model), want, **CLOSE)
    # the gradients, as our file would lay them out
    gradients(model)
    found = gradients(theirs)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.grad
    pl.save_adapter(model, tmp_path / "gradients", name="a")
    ours = load_file(tmp_path / "gradients" / "adapter_model.safetensors")
    assert len(found) == len(ours) == len(trained)
    for name, gradient in found.items():
        torch.testing.assert_close(ours[name.replace(".default", "")], gradient, rtol=1e-5, atol=1e-6)


def test_a_file_says_which_parameters_as_shortly_as_it_can(tmp_path):
    pl.save_adapter(adapted(), tmp_path / "all", name="a")
    pl.save_adapter(adapted(targets=[f"layers.1.mlp.{p}" for p in EXPERTS.split("|")]), tmp_path / "last", name="a")
    found = [json.loads((tmp_path / f / "adapter_config.json").read_text()) for f in ("all", "last")]
    assert found[0]["target_parameters"] == ["experts.down_proj", "experts.gate_up_proj"]
    assert found[1]["target_parameters"] == [f"model.layers.1.mlp.experts.{n}_proj" for n in ("down", "gate_up")]
    assert all(config["target_modules"] == [] for config in found)


def test_read_into_an_attached_adapter_values_are_replaced_and_other_ranks_refused(tmp_path):
    pl.save_adapter(adapted(), tmp_path, name="a")
    model = adapted(moved=False)
    there = pl.adapters(model)["a"]
    pl.load_adapter(model, tmp_path, name="a")
    assert pl.adapters(model)["a"] == there and torch.equal(logits(model), logits(adapted()))
    with pytest.raises(ValueError, match="detach it first"):
        pl.load_adapter(adapted(rank_pattern={"down_proj": 2}), tmp_path, name="a")
    with pytest.raises(ValueError, match="detach it first"):
        pl.load_adapter(adapted(targets="experts.down_proj"), tmp_path, name="a")


def test_files_of_other_models_or_with_parts_missing_are_refused(tmp_path):
    pl.save_adapter(adapted(), tmp_path, name="a")
    with pytest.raises(ValueError, match="another base"):
        pl.load_adapter(moe(seed=3), tmp_path)
    dense = build("llama")
    with pytest.raises(ValueError, match="no module"):
        pl.load_adapter(dense, tmp_path)
    assert not pl.hosts(dense)
    from safetensors.torch import save_file

    weights = load_file(tmp_path / "adapter_model.safetensors")
    key = next(key for key in weights if "base_layer.lora_B" in key)
    save_file({k: v for k, v in weights.items() if k != key}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=f"gate_up_proj.*no '{key}'"):
        pl.load_adapter(moe(), tmp_path)
    save_file(weights | {key: weights[key][:, :-1].contiguous()}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"\(16, 32\).*\(128, 15\).*4 experts"):
        pl.load_adapter(moe(), tmp_path)
    save_file({k: v for k, v in weights.items() if "layers.0" in k}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="layers.1"):
        pl.load_adapter(moe(), tmp_path)


def test_what_the_reference_refuses_and_what_it_refuses_alone():
    """Dropout has no input to act on, here as there. Adapters on different parameters only we can have."""
    config = dict(r=4, target_modules=[])
    with pytest.raises(ValueError, match="does not work with lora_dropout"):
        peft.get_peft_model(moe(), peft.LoraConfig(target_parameters=["down_proj"], lora_dropout=0.1, **config))
    for more in (dict(dropout=0.1), dict(lora_bias=True)):
        model = moe()
        with pytest.raises(ValueError, match=r"ParameterLoRA on 'model.layers.0.mlp.experts'.*no layer"):
            adapted_to = pl.attach(model, "LoRA", f"q_proj|{EXPERTS}", **more)
            assert not adapted_to
        assert not pl.hosts(model)
    theirs = peft.get_peft_model(moe(), peft.LoraConfig(target_parameters=["down_proj"], **config))
    with pytest.raises(ValueError, match="same set of parameters"):
        theirs.add_adapter("b", peft.LoraConfig(target_parameters=["gate_up_proj"], **config))
    model = adapted(targets="experts.down_proj")
    pl.attach(model, "LoRA", "gate_up_proj", name="b")
    assert {n: list(a.each) for n, f in pl.adapters(model).items() for a in f.values()} == {
        "a": ["down_proj"], "b": ["gate_up_proj"]}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- targets


def test_a_name_means_layers_and_parameters_alike():
    """Qwen2-MoE's shared expert is made of layers, its other experts of parameters; all have a down_proj."""
    model = pl.attach(build_other("qwen2_moe"), "LoRA", "down_proj", r=4)
    kinds = {path.split(".mlp.")[1]: type(a).__name__ for path, a in pl.adapters(model)["default"].items()}
    assert kinds == {"shared_expert.down_proj": "LoRA", "experts": "ParameterLoRA"}
    other = pl.attach(build_other("qwen2_moe"), "DoRA", "down_proj", r=4)  # it has no form for parameters
    assert {path.split(".mlp.")[1] for path in pl.adapters(other)["default"]} == {"shared_expert.down_proj"}


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek"])
def test_the_group_of_all_experts_goes_with_other_groups(family):
    model = build_other(family)
    found = group(model, "all-experts")
    assert found == [p for p in loose(model) if p.endswith(("experts.gate_up_proj", "experts.down_proj"))] and found
    thin = {"rank_pattern": {"shared_expert_gate": 1}} if family == "qwen2_moe" else {}
    pl.attach(model, "LoRA", "all-linear|all-experts", r=2, **thin)
    kinds = [type(a).__name__ for a in pl.adapters(model)["default"].values()]
    assert kinds.count("ParameterLoRA") == len(found) / 2 and kinds.count("LoRA") == len(group(model, "all-linear"))
    assert pl.find_targets(model, ["all-attention", "o_proj"]) == sorted(
        group(model, "all-attention") + pl.find_targets(model, "o_proj"))  # fmt: skip


def test_all_linear_says_that_it_leaves_the_experts_out():
    with pytest.warns(UserWarning, match=r"experts of MixtralForCausalLM, 79 % .*'all-linear\|all-experts'"):
        pl.attach(moe(), "LoRA", r=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for targets in ("q_proj", "all-linear|all-experts"):
            pl.attach(moe(), "LoRA", targets, r=4)
        pl.attach(build("llama"), "LoRA", "all-linear", r=4)


@pytest.mark.parametrize(("method", "targets", "hyper", "says"), [
    ("LoRA", "gate_upp_proj", {}, "did you mean 'gate_up_proj'"),
    ("LoRA", "input_layernorm.weight", {}, r"input_layernorm.weight' is no module but a parameter \(32\).*LNTuning"),
    ("LoRA", "q_proj.weight", {}, r"parameter \(32×32\) of Linear; adapt its layer, targets='self_attn.q_proj'"),
    ("LoRA", "embed_tokens.weight", {}, "no method can adapt it there"),
    ("LoRA", "mlp.experts", {}, r"name them: targets='gate_up_proj\|down_proj'"),
    ("LoRA", EXPERTS, {"r": 33}, r"rank r=33 is not in 1…32, matrices in 'gate_up_proj' are 128×32.*rank_pattern"),
    ("LoRA", EXPERTS, {"rank_pattern": {"down_proj": 2.5}}, "r=2.5 must be a whole number"),
    ("LoRA", EXPERTS, {"rank_pattern": {"up_proj": 2}}, "matches none of the 4 target layers"),
    ("DoRA", "gate_up_proj", {}, r"parameter \(4×128×32\) of MixtralExperts; LoRA can be put on it"),
    ("DoRA", "all-experts", {}, "LoRA can be put on it"),
    ("LoRA", "q_proj|nothing", {}, "match 2 modules; nothing was attached"),
])  # fmt: skip
def test_bad_targets_say_what_to_do(method, targets, hyper, says):
    model = moe()
    with pytest.raises(ValueError, match=says):
        pl.attach(model, method, targets, **hyper)
    assert not pl.hosts(model)
    with pytest.raises(ValueError, match="no experts whose weights"):
        pl.attach(build("llama"), "LoRA", "all-experts")


def test_weights_in_codes_and_attentions_that_are_not_called_are_refused():
    model = moe()
    experts = model.model.layers[0].mlp.experts
    for dtype in (torch.float8_e4m3fn, torch.uint8):
        experts.down_proj = nn.Parameter(experts.down_proj.data.to(dtype), requires_grad=False)
        with pytest.raises(ValueError, match=f"stored as {dtype}"):
            pl.attach(model, "LoRA", "experts.down_proj", r=4)
    torch_own = nn.Sequential(nn.TransformerEncoderLayer(16, 2))  # in eval mode it reads its attention's weights
    with pytest.raises(ValueError, match="in_proj_weight.*no method"):
        pl.attach(torch_own, "LoRA", "in_proj_weight", r=2)


def test_in_mixed_batches_it_is_refused_and_others_run_beside_it():
    model = adapted()
    pl.attach(model, "LoRA", "q_proj", name="b", r=4)
    move(model, "b")
    ids = inputs("llama")
    with pytest.raises(ValueError, match="'a' is ParameterLoRA.*mixed batch"), pl.using(model, rows=["a", "b", None]):
        pass
    with pl.using(model, rows=["b", None, "b"]):
        found = logits(model, **ids)
    with pl.using(model):
        torch.testing.assert_close(found[1:2], logits(model, input_ids=ids["input_ids"][1:2]), **CLOSE)


def test_what_is_for_layers_alone_refuses_it_by_name(tmp_path):
    model = adapted(moved=False)
    with pytest.raises(ValueError, match="ParameterLoRA"):
        pl.inits.pissa(model, "a")
    with pytest.raises(ValueError, match="no linear layer"):
        pl.to_lora(model, "a", r=2, into="low")
    with pytest.raises(ValueError, match="many; freeze"):
        pl.optim.lora_fa(model, 1e-3)
    with pytest.raises(ValueError, match="parameters of MixtralExperts"):
        pl.combine(model, {"a": 1.0}, how="cat")
    assert set(pl.adapters(model)) == {"a"}
    pl.save_adapter(model, tmp_path, name="a")
    assert [why for why in pl.export.check("vllm", tmp_path) if "target_parameters" in why]


# -------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("checkpointing", [False, True])
def test_its_memory_is_predicted(checkpointing):
    """W′ is the peak, and it is seen; to a few bytes on the CPU, where nothing is rounded."""
    from peftlab.vram.step import OPTIMIZERS, TrainingStep, batch_of

    model = moe("qwen3_moe").bfloat16()
    config = model.config
    pl.attach(model, "LoRA", EXPERTS, r=4)
    model.train()
    if checkpointing:
        model.activation_checkpointing_enable()
    optimizer = OPTIMIZERS["adamw"]([p for p in model.parameters() if p.requires_grad])
    measured = pl.vram.measure(TrainingStep(model, batch_of(model, 2, 16, device="cpu"), optimizer))
    predicted = pl.vram.predict(config, "LoRA", EXPERTS, r=4, batch=2, tokens=16, device="cpu",
                                checkpointing=checkpointing)  # fmt: skip
    assert abs(predicted.allocated / measured.allocated - 1) < 1e-3
    with pytest.raises(ValueError, match="bfloat16"):
        pl.vram.predict(config, "LoRA", EXPERTS, r=4, batch=2, tokens=16, device="cpu", dtype="float32")


def test_the_parts_of_lora_are_no_methods_of_their_own():
    assert ParameterLoRA.part_of == "LoRA" and "ParameterLoRA" not in pl.METHODS and "Factors" not in pl.METHODS


def test_two_threads_at_once_leave_each_other_and_the_base_alone():
    """A pass puts W′ in W's place: the one that ends first must not leave its W′ to the other."""
    model = adapted("qwen3_moe")
    x = inputs("llama")["input_ids"]
    with torch.no_grad():
        want, wrong = model(input_ids=x).logits, []

        def run():
            with torch.no_grad():  # which is a thread's own
                for _ in range(15):
                    wrong.append(float((model(input_ids=x).logits - want).abs().max()))

        before = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        threads = [threading.Thread(target=run) for _ in range(2)]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            sys.setswitchinterval(before)
    assert len(wrong) == 30 and max(wrong) == 0
    with pl.using(model), torch.no_grad():
        assert torch.equal(model(input_ids=x).logits, moe("qwen3_moe")(input_ids=x).logits)
