"""KeepLoRA: what it keeps from training, where it begins, and that this is the paper's training."""

from __future__ import annotations

import pytest
import torch
from families import TARGETS, build, inputs, labels

import peftlab as pl
from peftlab.inits import keeplora
from peftlab.inits._common import begin
from peftlab.inits._data import gradients, second_moments
from peftlab.layers import weight_of


def data(family="llama", seed=11, number=2):
    found = [inputs(family, seed=seed + i) for i in range(number)]
    return [{**batch, "labels": labels(family, batch)} for batch in found]


def attached(family="llama", **hyper):
    return pl.attach(build(family), pl.LoRA, TARGETS[family], name="a", **({"r": 4, "alpha": 8} | hyper))


def there(model):
    return pl.adapters(model)["a"]


def main(matrix, share):
    """(n, p): the fewest left singular vectors that hold `share` of ‖matrix‖²."""
    U, S, _ = torch.linalg.svd(matrix, full_matrices=False)
    held = (S**2).cumsum(0) / (S**2).sum()
    return U[:, : int((held < share).sum()) + 1]


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_a_is_the_papers(family):
    """As the paper writes it: projections taken off G, then a singular value decomposition."""
    model = keeplora(attached(family), data(family), name="a")
    layers = {path: a.layer for path, a in there(model).items()}
    G = gradients(model, layers, data(family))
    for path, adapter in there(model).items():
        V = main(weight_of(adapter.layer).double().T, 0.9)
        assert 1 <= V.shape[1] <= len(V) - 4
        left = G[path].double() - G[path].double() @ V @ V.T
        _, S, Vt = torch.linalg.svd(left)
        assert S[3] - S[4] > 1e-9, "the four are told from the fifth, or the comparison means nothing"
        want = Vt[:4].T @ Vt[:4]
        A = adapter.lora_A.double()
        torch.testing.assert_close(A.T @ A, want, rtol=0, atol=1e-5)
        torch.testing.assert_close(A @ A.T, torch.eye(4).double(), rtol=0, atol=1e-6)
        assert (A @ V).abs().max() < 1e-6 and not adapter.lora_B.any()


def test_past_inputs_are_kept_too():
    model = attached()
    layers = {path: a.layer for path, a in there(model).items()}
    C = second_moments(model, layers, data(seed=50, number=1))
    keeplora(model, data(), name="a", past=data(seed=50, number=1), energy=0.3, past_energy=0.8)
    for path, adapter in there(model).items():
        V, A = main(weight_of(adapter.layer).double().T, 0.3), adapter.lora_A.double()
        assert (A @ V).abs().max() < 1e-6
        P = torch.eye(len(V)).double() - V @ V.T
        values, vectors = torch.linalg.eigh(P @ C[path].double() @ P)
        covered = 1 - values.sum() / C[path].trace()
        m = 0
        while covered < 0.8:
            m, covered = m + 1, covered + values[-1 - m] / C[path].trace()
        assert m >= 1 and (A @ vectors[:, len(V) - m :]).abs().max() < 1e-5
        assert (A @ vectors[:, len(V) - m - 4 : len(V) - m]).norm() > 1e-3, "no more than these"


def test_no_training_changes_what_is_kept():
    model = keeplora(attached(), data(), name="a")
    kept = {path: a.lora_A.clone() for path, a in there(model).items()}
    rows = [{"input_ids": [5, 6, 7, 8, 9], "labels": [5, 6, 7, 8, 9]}] * 4
    pl.train(model, rows, steps=5, lr=0.05, batch_size=2)
    for path, adapter in there(model).items():
        assert torch.equal(adapter.lora_A, kept[path]) and adapter.lora_B.abs().max() > 0.01
        W = weight_of(adapter.layer)
        V = main(W.T, 0.9)
        assert adapter.change(V.T).abs().max() < 1e-4 * adapter.change(torch.eye(W.shape[1])).abs().max()


def test_it_is_the_papers_training_from_b_zero():
    """B₀ = U·diag(σ), s·B₀A₀ taken off: with A frozen the same steps, for only B − B₀ counts."""
    ours, papers = keeplora(attached(), data(), name="a"), attached()
    G = gradients(ours, {path: a.layer for path, a in there(ours).items()}, data())
    for path, adapter in there(papers).items():
        A = there(ours)[path].lora_A
        begin(adapter, A, G[path] @ A.T)  # = U·diag(σ), up to a rotation that A has too
        adapter.lora_A.requires_grad_(False)
    rows = [{"input_ids": [5, 6, 7, 8, 9], "labels": [5, 6, 7, 8, 9]}] * 4
    for model in (ours, papers):
        pl.train(model, rows, steps=4, lr=0.01, batch_size=2, weight_decay=0.0)
    with torch.no_grad():
        found = [model(**inputs("llama")).logits for model in (ours, papers, build("llama"))]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-4)
    assert (found[0] - found[2]).abs().max() > 0.1


def test_its_first_step_is_along_the_gradient_that_is_left():
    model = attached(alpha=4)
    layers = {path: a.layer for path, a in there(model).items()}
    G = gradients(model, layers, data(number=1))
    keeplora(model, data(number=1), name="a")
    model(**data(number=1)[0]).loss.backward()
    for path, adapter in there(model).items():
        A = adapter.lora_A
        torch.testing.assert_close(adapter.lora_B.grad @ A, G[path] @ A.T @ A, rtol=1e-3, atol=1e-6)
        assert A.grad is None


def test_files_are_plain_and_energies_are_checked(tmp_path):
    model = keeplora(attached(), data(), name="a", energy=0.0)
    assert pl.count(model).trainable == sum(a.lora_B.numel() for a in there(model).values())
    pl.save_adapter(model, tmp_path, name="a")
    again = pl.load_adapter(build("llama"), tmp_path, name="a")
    assert {len(a.lora_A) for a in there(again).values()} == {4}, "no start to be kept, so not of rank 2r"
    for wrong in (dict(energy=1.0), dict(energy=-0.1), dict(past_energy=1.5)):
        with pytest.raises(ValueError, match="must be in"):
            keeplora(attached(), data(), name="a", **wrong)
    full = attached(r=30)
    with pytest.raises(ValueError, match=r"input directions left to learn in, and r=30"):
        keeplora(full, data(), name="a")
    assert all(a.lora_A.requires_grad for a in there(full).values())
