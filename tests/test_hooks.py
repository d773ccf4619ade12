"""What a method may ask of the training loop: a term of the loss, a word after each step, memory in checkpoints."""

from __future__ import annotations

import pytest
import torch
from families import build
from torch import nn

import peftlab as pl
from peftlab.core import Adapter

ROWS = [{"input_ids": [5 + i, 9, 7, 20 + i], "labels": [5 + i, 9, 7, 20 + i]} for i in range(12)]


class Counting(Adapter):
    """Scales outputs; is drawn to its last gradients' sign, which it remembers; counts."""

    memory = ("seen",)

    def __init__(self, layer, pull: float = 0.5):
        super().__init__(layer)
        self.gain = nn.Parameter(torch.ones(1))
        self.register_buffer("seen", torch.zeros(2), persistent=False)
        self.pull, self.last = pull, None

    def forward(self, f, x):
        self.last = f(x) * self.gain
        return self.last

    def penalty(self):
        return self.pull * ((self.gain - self.seen[1]) ** 2).sum() + 0 * self.last.sum()  # of the pass before it

    @classmethod
    def stepped(cls, made, step, steps):
        for adapter in made.values():
            assert adapter.gain.grad is not None and 1 <= step <= steps
            adapter.seen += torch.tensor([1.0, 0.1 * adapter.gain.grad.sign().item()])


del pl.METHODS["Counting"]  # for this file only


def adapted(pull: float = 0.5):
    model = build("llama")
    return pl.attach(model, Counting, "q_proj|down_proj", name="a", pull=pull)


def settings(**more):
    return dict(steps=6, batch_size=4, lr=0.05, progress=False, accumulation=2) | more


def state(model):
    return [(a.gain.item(), a.seen.tolist()) for a in pl.adapters(model)["a"].values()]


def test_the_term_is_in_the_gradient_once_and_not_in_the_logged_loss():
    """With a pull so strong that the loss does not matter, the gain goes where the memory says, for any number of
    micro-batches; the loss that is logged is the model's own."""
    one, two = adapted(), adapted()
    logs = [pl.train(one, ROWS, **settings(accumulation=1)), pl.train(two, ROWS, **settings(accumulation=4))]
    torch.testing.assert_close(torch.tensor(logs[0].losses), torch.tensor(logs[1].losses), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.tensor([g for g, _ in state(one)]), torch.tensor([g for g, _ in state(two)]))
    free = pl.train(adapted(0.0), ROWS, **settings())
    assert free.losses[0] == pytest.approx(logs[0].losses[0], abs=1e-5)
    assert free.losses[-1] != logs[0].losses[-1]


def test_only_the_active_adapters_that_learn_are_told():
    model = adapted()
    pl.attach(model, Counting, "q_proj", name="b")
    pl.freeze(model, "a")
    pl.train(model, ROWS, **settings())
    assert {a.seen[0].item() for a in pl.adapters(model)["b"].values()} == {6.0}
    assert {a.seen[0].item() for a in pl.adapters(model)["a"].values()} == {0.0}


def test_a_killed_run_goes_on_with_its_memory(tmp_path):
    whole = adapted()
    want = pl.train(whole, ROWS, **settings())
    first = adapted()
    for log in pl.train_steps(first, ROWS, **{k: v for k, v in settings(checkpoint=tmp_path).items()
                                              if k != "progress"}):  # fmt: skip
        if len(log) == 3:
            break
    again = adapted()
    got = pl.train(again, ROWS, **settings(checkpoint=tmp_path))
    assert got.losses == want.losses and state(again) == state(whole)


def test_a_run_that_diverges_leaves_the_memory_as_it_was():
    model = adapted()
    before = state(model)
    with pytest.raises(FloatingPointError):
        pl.train(model, ROWS, **settings(lr=1e30, clip=None, warmup=0.0))
    assert state(model) == before
