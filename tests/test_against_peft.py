"""The reference reads our adapters and we read the reference's, with the same logits, on every family."""

from __future__ import annotations

import copy
import json

import peft
import pytest
import torch
from families import FAMILIES, TARGETS, build, inputs, labels, shake

import peftlab as pl

CLOSE = dict(rtol=0, atol=1e-5)  # fp32 logits of order 1; the two libraries add and scale in another order
SETTINGS = {
    "plain": dict(r=4, alpha=8),
    "rslora": dict(r=4, alpha=8, rslora=True),
    "dropout": dict(r=4, alpha=8, dropout=0.3),
    "patterns": dict(r=4, alpha=8, rank_pattern={r".*\.1\..*": 2}, alpha_pattern={r".*\.0\..*": 3}),
}
VARIANTS = {"rslora": "rslora", "patterns": "rank_pattern"}
HEADS = {"bert": "classifier", "llama": "lm_head", "qwen3": "lm_head", "mistral": "lm_head", "qwen2": "lm_head"}


def settings(*what: str):
    """Each setting as a case that says what it compares: LoRA, and the variant that is switched on in it."""
    names = {s: f"LoRA, {VARIANTS[s]}" if s in VARIANTS else "LoRA" for s in SETTINGS}
    cases = [pytest.param(setting, marks=pytest.mark.reference(name, *what)) for setting, name in names.items()]
    return pytest.mark.parametrize("setting", cases)


def logits(model, family):
    with torch.no_grad():
        return model(**inputs(family)).logits


def names(setting: dict) -> dict:
    """Our hyper-parameters as the reference spells them."""
    theirs = {"r": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "rslora": "use_rslora"}
    return {theirs.get(k, k): v for k, v in setting.items()}


def targets(family: str) -> list[str]:
    return TARGETS[family].split("|")


@settings("writes")
@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_reads_ours(family, setting, tmp_path):
    base = build(family)
    model = pl.attach(copy.deepcopy(base), pl.LoRA, targets(family), name="a", **SETTINGS[setting])
    shake(model.get_submodule(next(iter(pl.hosts(model)))).adapters)
    for host in pl.hosts(model).values():
        shake(host.adapters)
    ours = logits(model, family)
    assert (ours - logits(base, family)).abs().max() > 1e-2, "the adapter must show, or the test proves nothing"
    pl.save_adapter(model, tmp_path, name="a")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    torch.testing.assert_close(logits(theirs, family), ours, **CLOSE)


@settings("reads")
@pytest.mark.parametrize("family", FAMILIES)
def test_ours_reads_the_reference(family, setting, tmp_path):
    base = build(family)
    heads = [HEADS[family]] if family in HEADS else None
    task = "SEQ_CLS" if family == "bert" else None
    hyper = names(SETTINGS[setting])
    config = peft.LoraConfig(target_modules=targets(family), modules_to_save=heads, task_type=task, **hyper)
    reference = peft.get_peft_model(copy.deepcopy(base), config).eval()
    for name, module in reference.named_modules():
        if name.rsplit(".", 2)[-2:-1] in (["lora_A"], ["lora_B"], ["modules_to_save"]):
            shake(module)
    wanted = logits(reference, family)
    reference.save_pretrained(tmp_path)
    model = pl.load_adapter(copy.deepcopy(base), tmp_path, name="x")
    torch.testing.assert_close(logits(model, family), wanted, **CLOSE)
    with pl.using(model):
        assert torch.equal(logits(model, family), logits(base, family))


@pytest.mark.parametrize("family", HEADS)
def test_heads_trained_here_are_read_there(family, tmp_path):
    base = build(family)
    model = pl.attach(copy.deepcopy(base), pl.LoRA, targets(family), modules_to_save=[HEADS[family]])
    for host in pl.hosts(model).values():
        shake(host.adapters)
    pl.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    torch.testing.assert_close(logits(theirs, family), logits(model, family), **CLOSE)


@pytest.mark.reference("LoRA", "gradients")
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_agree(family, tmp_path):
    base = build(family)
    reference = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(target_modules=targets(family), r=4)).eval()
    for name, module in reference.named_modules():
        if name.rsplit(".", 2)[-2:-1] in (["lora_A"], ["lora_B"]):
            shake(module)
    reference.save_pretrained(tmp_path)
    model = pl.load_adapter(copy.deepcopy(base), tmp_path)
    batch = inputs(family)
    for m in (reference, model):
        m(**batch, labels=labels(family, batch)).loss.backward()
    theirs = {n.replace("base_model.model.", "").replace(".default.weight", ""): p.grad
              for n, p in reference.named_parameters() if p.grad is not None}  # fmt: skip
    ours = {n.replace(".adapters.default", ""): p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert theirs.keys() == ours.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-4, atol=1e-6)


def test_dropout_in_training_mode_falls_where_the_reference_drops():
    """Same seed, same masks: the dropout sits on the adapter's input only, in both libraries."""
    base = build("llama")
    ours = pl.attach(copy.deepcopy(base), pl.LoRA, ["q_proj"], r=4, alpha=8, dropout=0.5).train()
    config = peft.LoraConfig(target_modules=["q_proj"], r=4, lora_alpha=8, lora_dropout=0.5)
    reference = peft.get_peft_model(copy.deepcopy(base), config).train()
    theirs = {n: p for n, p in reference.named_parameters() if "lora_" in n}
    for path, adapter in pl.adapters(ours)["default"].items():
        shake(adapter)
        with torch.no_grad():
            for part in ("lora_A", "lora_B"):
                theirs[f"base_model.model.{path}.{part}.default.weight"].copy_(getattr(adapter, part))
    got = []
    for model in (ours, reference):
        torch.manual_seed(5)
        got.append(logits(model, "llama"))
    torch.testing.assert_close(*got, **CLOSE)


def test_the_written_config_is_one_the_reference_would_write(tmp_path):
    model = pl.attach(build("gpt2"), pl.LoRA, ["c_attn"], r=4, alpha=8)
    pl.save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert set(config) <= set(peft.LoraConfig().to_dict()), "no key that the reference does not know"
    assert config["fan_in_fan_out"] is True and config["target_modules"] == ["c_attn"]
