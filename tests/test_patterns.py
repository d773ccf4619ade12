"""Hyper-parameters that differ between layers: in files they stand as HF PEFT's patterns, or are refused by name."""

import json

import peft
import pytest
import torch
from families import build, inputs, shake

import peftlab as pl
from peftlab.attach import defaults_of
from peftlab.files import patterns_of

Q, DOWN = "q_proj", "down_proj"  # 32×32 and 32×64
# name -> (the reference's config, what it is given, its patterns): of down_proj, or of one layer by its whole path
REFERENCE = {
    "C3A": (peft.C3AConfig, dict(block_size=16), dict(block_size_pattern={DOWN: 8})),
    "DeLoRA": (peft.DeloraConfig, dict(r=4), dict(rank_pattern={DOWN: 2}, lambda_pattern={r".*\.1\..*": 3})),
    "FourierFT": (peft.FourierFTConfig, dict(n_frequency=40), dict(n_frequency_pattern={DOWN: 25})),
    "WaveFT": (peft.WaveFTConfig, dict(n_frequency=40), dict(n_frequency_pattern={DOWN: 25})),
    "LoKr": (peft.LoKrConfig, dict(r=4),
             dict(rank_pattern={"model.layers.1.self_attn.q_proj": 2}, alpha_pattern={DOWN: 3})),
}


def logits(model):
    with torch.no_grad():
        return model.eval()(**inputs("llama")).logits


@pytest.mark.parametrize("name", REFERENCE)
def test_the_reference_s_patterns_are_read_and_written_again(name, tmp_path):
    config, given, patterns = REFERENCE[name]
    theirs = peft.get_peft_model(build("llama"), config(target_modules=[Q, DOWN], **given, **patterns))
    trained = [p for p in theirs.parameters() if p.requires_grad]
    for seed, parameter in enumerate(trained):
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = pl.load_adapter(build("llama"), tmp_path / "theirs", name="a")
    assert pl.count(ours).trainable == sum(p.numel() for p in trained)
    assert (logits(theirs) - logits(build("llama"))).abs().max() > 1e-2, "the adapter must show, or nothing is proved"
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-5)
    pl.save_adapter(ours, tmp_path / "ours", name="a")
    written = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert {key for key in written if key.endswith("_pattern")} == set(patterns)
    again = peft.PeftModel.from_pretrained(build("llama"), tmp_path / "ours")
    torch.testing.assert_close(logits(again), logits(theirs), rtol=0, atol=1e-5)


def test_the_reference_s_hira_takes_a_rank_pattern_and_makes_nothing_of_it(tmp_path):
    """Its first adapter has one rank, whatever its config says, which is no file to be read; a second one heeds it."""
    config = peft.HiraConfig(r=4, target_modules=[Q, DOWN], rank_pattern={DOWN: 2})
    theirs = peft.get_peft_model(build("llama"), config)
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"down_proj.hira_A is \(4, 64\), this model needs \(2, 64\)"):
        pl.load_adapter(build("llama"), tmp_path)
    theirs.add_adapter("second", config)
    for seed, (_, parameter) in enumerate(p for p in theirs.named_parameters() if "second" in p[0]):
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
    theirs.set_adapter("second")
    theirs.save_pretrained(tmp_path, selected_adapters=["second"])
    ours = pl.load_adapter(build("llama"), tmp_path / "second")
    assert (logits(theirs) - logits(build("llama"))).abs().max() > 1e-2, "the adapter must show, or nothing is proved"
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-5)


def one_that_differs(method, key):
    """A tiny Llama with the method, whose r or alpha is another one on some layers; None if it takes no such."""
    where = {"targets": f"{Q}|{DOWN}"} if method.targets == "all-linear" else {}
    pattern = {"rank_pattern": 2} if key == "r" else {"alpha_pattern": 3.0}
    hyper = {"r": 4, "target_r": 2} if "target_r" in defaults_of(method) else {"r": 4}
    hyper = {name: value for name, value in hyper.items() if name in defaults_of(method)}
    try:
        model = pl.attach(build("llama"), method, name="a", **where, **hyper,
                          **{kind: {r".*layers\.1.*": value} for kind, value in pattern.items()})  # fmt: skip
    except (ValueError, TypeError):
        return None
    for seed, host in enumerate(pl.hosts(model).values()):
        shake(host.adapters, 0.2, seed=seed)
    return model


def test_what_differs_between_layers_survives_the_file_or_is_refused(tmp_path):
    kept, refused = set(), {}
    for name, method in pl.METHODS.items():
        for key in ("r", "alpha"):
            model = one_that_differs(method, key) if key in defaults_of(method) else None
            if model is None:
                continue
            try:
                folder = pl.save_adapter(model, tmp_path / f"{name} {key}", name="a")
            except ValueError as error:
                refused[name, key] = str(error)
                continue
            again = pl.load_adapter(build("llama"), folder, name="a")
            torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-5, msg=f"{name}, {key}")
            kept.add((name, key))
    assert all("differs between layers" in why for why in refused.values()), refused
    assert {(name, key) for name in ("LoRA", "DoRA", "LoHa", "LoKr", "DEFT") for key in ("r", "alpha")} <= kept
    assert {("AdaLoRA", "alpha"), ("RandLoRA", "alpha"), ("Shadow", "alpha"), ("Shadow", "r")} <= set(refused)


def test_a_pattern_that_the_method_has_not_is_a_variant_that_is_refused(tmp_path):
    model = pl.attach(build("llama"), pl.C3A, Q, name="a")
    pl.save_adapter(model, tmp_path, name="a")
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rank_pattern": {Q: 3}}))
    assert set(patterns_of(pl.C3A)) == {"block_size"}
    with pytest.raises(ValueError, match="rank_pattern.*is a variant that C3A here has not"):
        pl.load_adapter(build("llama"), tmp_path)
