"""A method beside the reference: the reference reads our file, we read its file, and what both compute is the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import peft
import pytest
import torch
from families import TARGETS, build, inputs, labels, shake
from torch import nn

import peftlab as pl
from peftlab.layers import is_conv1d

CLOSE = dict(rtol=0, atol=1e-5)  # fp32 logits of order 1; the two libraries add in another order


@dataclass
class Pair:
    """A method with some hyper-parameters, here and there; how far its parameters are moved, so that it shows."""

    ours: str
    config: type
    hyper: dict = field(default_factory=dict)
    theirs: dict | None = None  # where the reference spells them otherwise
    moved: float = 0.2
    conv1d: bool = False  # whether the reference has it on GPT-2's transposed layers
    gradients: bool = True  # whether the reference's gradients are the derivatives
    merges: bool = True
    switched: str = ""  # what of the method is on, if that is what is compared: "lora_bias"


def beside(arguments, cases: Iterable, pairs: dict[str, Pair]) -> Callable:
    """`pytest.mark.parametrize` for tests that say what they compare: each case is marked with its pair's method."""

    def test(*what: str):
        marked = []
        for case in cases:
            values = case if isinstance(case, tuple) else (case,)
            (pair,) = [v if isinstance(v, Pair) else pairs[v] for v in values if isinstance(v, Pair) or v in pairs]
            claim = f"{pair.ours}, {pair.switched}" if pair.switched else pair.ours
            here = [word for word in what if word != "gradients" or pair.gradients]
            name = next(name for name in pairs if pairs[name] is pair)
            marked.append(pytest.param(*values, marks=pytest.mark.reference(claim, *here),
                                       id="-".join(name if v is pair else str(v) for v in values)))  # fmt: skip
        return pytest.mark.parametrize(arguments, marked)

    return test


def logits(model, family):
    with torch.no_grad():
        return model(**inputs(family)).logits


def adapted(family: str, pair: Pair, moved: bool = True) -> nn.Module:
    """The family's tiny model with the method as adapter "a" on the family's TARGETS."""
    model = pl.attach(build(family), pair.ours, TARGETS[family], name="a", **pair.hyper)
    for seed, host in enumerate(pl.hosts(model).values()):
        if moved:
            shake(host.adapters, pair.moved, seed=seed)
    return model


def skip_conv1d(family: str, pair: Pair) -> None:
    if family == "gpt2" and not pair.conv1d:
        pytest.skip("the reference has it on nn.Linear only")


def check_reads_ours(family: str, pair: Pair, folder: Path) -> None:
    """The reference reads our file: the same logits, and the same again with both merged."""
    skip_conv1d(family, pair)
    model = adapted(family, pair)
    ours = logits(model, family)
    assert (ours - logits(build(family), family)).abs().max() > 1e-2, "the adapter must show, or nothing is proved"
    pl.save_adapter(model, folder, name="a")
    theirs = peft.PeftModel.from_pretrained(build(family), folder).eval()
    torch.testing.assert_close(logits(theirs, family), ours, **CLOSE)
    if pair.merges:
        merged = pl.merge(model)
        torch.testing.assert_close(logits(merged, family), logits(theirs.merge_and_unload(), family), **CLOSE)


def check_reads_theirs(family: str, pair: Pair, folder: Path) -> None:
    """We read the reference's file: the same count, logits and gradients."""
    skip_conv1d(family, pair)
    blank = adapted(family, pair, moved=False)
    settings = pair.hyper if pair.theirs is None else pair.theirs
    config = pair.config(target_modules=TARGETS[family].split("|"), **settings)
    theirs = peft.get_peft_model(build(family), config).eval()
    trained = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == pl.count(blank).trainable
    for seed, parameter in enumerate(trained.values()):
        draw = torch.Generator().manual_seed(seed)
        parameter.data += pair.moved * torch.randn(parameter.shape, generator=draw)
    theirs.save_pretrained(folder)
    model = pl.load_adapter(build(family), folder, name="a")
    torch.testing.assert_close(logits(model, family), logits(theirs, family), **CLOSE)
    if pair.gradients:
        compare_gradients(family, model, theirs)


def compare_gradients(family: str, model: nn.Module, theirs: nn.Module) -> None:
    """Each trained parameter's gradient of one batch's loss, by name: none is left over here."""
    batch = inputs(family)
    for one in (theirs, model):
        one(**batch, labels=labels(family, batch)).loss.backward()
    ours = {f"{path}.{a.hf_params.get(n, n)}": p.grad for path, a in pl.adapters(model)["a"].items()
            for n, p in a.named_parameters()}  # fmt: skip
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            path = name.removeprefix("base_model.model.").replace(".a.", ".").replace(".default", "")
            path = path if path in ours else path.removesuffix(".weight")  # DoRA's m: a module there, a tensor in files
            torch.testing.assert_close(ours.pop(path), parameter.grad, rtol=1e-4, atol=1e-6)
    assert not ours, "a parameter here that the reference has not"


def dense(model: nn.Module) -> dict[str, torch.Tensor]:
    """path -> ΔW (out, in) of the adapter "a", by asking it; for methods that are an added term."""
    with torch.no_grad():
        return {path: adapter.change(torch.eye(adapter.layer.weight.shape[0 if is_conv1d(adapter.layer) else 1])).T
                for path, adapter in pl.adapters(model)["a"].items()}  # fmt: skip
