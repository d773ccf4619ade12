"""The measured ledger: what a training step holds, against what is known by counting."""

import pytest
import torch
import transformers
from torch import nn

import peftlab as pl
from peftlab.course.ledger import Ledger, Measured, ledger, measured_ledger

B, T, D, V = 3, 5, 8, 11
IDS = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(0))


class Tiny(nn.Module):
    """Embedding → linear → ReLU → linear, called as a transformers model is."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.first, self.second = nn.Embedding(V, D), nn.Linear(D, D), nn.Linear(D, V)

    def forward(self, input_ids, labels, use_cache):
        x = self.second(torch.relu(self.first(self.embedding(input_ids))))
        return transformers.modeling_outputs.CausalLMOutput(loss=x.sum())  # a sum saves nothing


def llama(**changes):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**shape, vocab_size=64, tie_word_embeddings=True, **changes)
    return transformers.LlamaForCausalLM(config)


def ids(rows, tokens):
    return torch.randint(64, (rows, tokens), generator=torch.Generator().manual_seed(1))


def test_weights_gradients_and_states_are_those_of_the_formula():
    model = llama()  # tied: the shared matrix is counted once
    n = sum(p.numel() for p in model.parameters())
    held = measured_ledger(pl.full_finetuning(model), ids(2, 8))
    assert held.ledger == ledger(n, weight_bytes=4, grad_bytes=4, optimizer_bytes=8)
    pl.attach(model, pl.LoRA, r=2)
    own = pl.count(model).trainable
    adapter = ledger(own, weight_bytes=4, grad_bytes=4, optimizer_bytes=8)
    assert measured_ledger(model, ids(2, 8)).ledger == ledger(n, 0, weight_bytes=4) + adapter


@pytest.mark.parametrize(("optimizer", "states"), [(torch.optim.SGD, 0), (torch.optim.AdamW, 2), (torch.optim.Adam, 2)])
def test_optimizer_states(optimizer, states):
    model = Tiny()
    n = sum(p.numel() for p in model.parameters())
    assert measured_ledger(model, IDS, optimizer).ledger.optimizer == states * 4 * n


def test_activations_of_a_net_that_one_can_count_by_hand():
    one = 4 * B * T * D  # a float32 tensor (B, T, D)
    model = Tiny()
    # The embedding keeps the token ids (8 bytes each), `first` its input, ReLU its output, which is `second`'s input.
    assert measured_ledger(model, IDS).activations == 8 * B * T + one + one
    model.embedding.requires_grad_(False)
    assert measured_ledger(model, IDS).activations == 2 * one
    model.first.requires_grad_(False)  # the gradient ends at `second`
    assert measured_ledger(model, IDS).activations == one


def test_adapters_save_gradients_and_states_but_hardly_the_activations():
    model = llama()
    full = measured_ledger(pl.full_finetuning(model), ids(4, 16))
    last = measured_ledger(pl.last_layers(model, 1), ids(4, 16))
    lora = measured_ledger(pl.attach(model, pl.LoRA, r=1), ids(4, 16))
    assert lora.ledger.gradients < 0.1 * full.ledger.gradients
    assert lora.ledger.optimizer < 0.1 * full.ledger.optimizer
    assert 0.6 * full.activations < lora.activations < full.activations
    assert last.activations < 0.6 * lora.activations  # a third of the blocks, and the head


def test_activations_grow_with_the_batch_and_nothing_else_does():
    model = pl.full_finetuning(llama())
    small, large = measured_ledger(model, ids(2, 16)), measured_ledger(model, ids(8, 16))
    assert large.ledger == small.ledger
    assert large.activations == pytest.approx(4 * small.activations, rel=0.02)  # masks and positions do not grow


def test_the_model_is_left_as_it_was():
    model = llama(attention_dropout=0.5).eval()
    pl.attach(model, pl.LoRA, r=2, dropout=0.5)
    model.model.layers[1].train()
    adapter = next(p for p in model.parameters() if p.requires_grad)
    adapter.grad = torch.ones_like(adapter)
    gradient = adapter.grad

    def state():
        flags = [p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]
        return flags, [p.detach().clone() for p in model.parameters()], torch.get_rng_state()

    before = state()
    measured_ledger(model, ids(2, 8))
    after = state()
    assert before[0] == after[0]
    assert all(map(torch.equal, before[1], after[1]))
    assert torch.equal(before[2], after[2])
    assert adapter.grad is gradient and torch.equal(gradient, torch.ones_like(adapter))
    assert all(p.grad is None for p in model.parameters() if p is not adapter)


def test_the_model_is_left_as_it_was_after_an_error():
    model = pl.full_finetuning(llama()).eval()
    with pytest.raises(IndexError):
        measured_ledger(model, torch.full((1, 4), 64))  # no such token
    assert not model.training
    assert all(p.grad is None for p in model.parameters())


def test_refusals():
    model = llama().requires_grad_(False)
    with pytest.raises(ValueError, match=r"nothing is trained: attach an adapter"):
        measured_ledger(model, ids(1, 4))
    pl.full_finetuning(model).model.gradient_checkpointing = True  # as every name of the switch sets it
    with pytest.raises(ValueError, match="gradient checkpointing keeps its tensors .* switch it off"):
        measured_ledger(model, ids(1, 4))


def test_a_measured_ledger_says_what_it_holds():
    held = Measured(Ledger(4e6, 2e6, 1e6), 13e6)
    assert held.total == 20e6
    assert str(held) == "weights 4.00 MB + gradients 2.00 MB + optimizer 1.00 MB + activations 13.0 MB = 20.0 MB"
