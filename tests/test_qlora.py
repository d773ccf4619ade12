"""QLoRA: adapters train on a packed base as the reference's do; the three merges; what training needs beside them."""

from __future__ import annotations

import copy
import logging
import sys
import types
import warnings
import weakref

import bitsandbytes as bnb
import peft
import pytest
import torch
import transformers
from families import shake
from test_resume import numbers, parameters, run, same, steps_in, tiny, token_rows
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import peftlab as pl
from peftlab import kbit
from peftlab.layers import weight_of
from peftlab.nf4 import pack
from peftlab.sites import at, group, put
from peftlab.train import _bitsandbytes, train_steps

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

V, T = 96, 11
TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "mlp.c_proj"], "opt": ["q_proj", "fc2"]}


def build(family: str, dtype=torch.float32, seed: int = 0, **more) -> nn.Module:
    """Without dropout; rows of weights are whole blocks of 64, as bitsandbytes unpacks no others rightly on a CPU."""
    torch.manual_seed(seed)
    llama = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0,
                 max_position_embeddings=64, initializer_range=0.1, vocab_size=V)  # fmt: skip
    if family == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**llama | more))
    elif family == "opt":
        model = transformers.OPTForCausalLM(transformers.OPTConfig(
            vocab_size=V, hidden_size=64, word_embed_proj_dim=64, ffn_dim=128, num_hidden_layers=2, dropout=0.0,
            num_attention_heads=4, max_position_embeddings=64, init_std=0.1, pad_token_id=0))  # fmt: skip
    else:
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
            vocab_size=V, n_embd=64, n_layer=2, n_head=4, n_positions=64, initializer_range=0.1, pad_token_id=0,
            bos_token_id=1, eos_token_id=1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))  # fmt: skip
    return model.to(dtype).eval()


def batch(rows: int = 3, seed: int = 7) -> torch.Tensor:
    return torch.randint(2, V, (rows, T), generator=torch.Generator().manual_seed(seed))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=batch()).logits.double()


def backward(model) -> torch.Tensor:
    out = model(input_ids=batch(), labels=batch(), use_cache=False)
    out.loss.backward()
    return out.logits.detach()


def gradients(model) -> dict[str, torch.Tensor]:
    short = ("base_model.model.", ".adapters.default", ".default.weight")
    found = {}
    for name, p in model.named_parameters():
        for word in short:
            name = name.replace(word, "")
        if p.grad is not None:
            found[name] = p.grad
    return found


def qlora(family: str = "llama", dtype=torch.float32, moved: float = 0.05, **hyper) -> nn.Module:
    model = pl.attach(pl.quantize(build(family, dtype)), pl.LoRA, TARGETS[family], **({"r": 4, "alpha": 8} | hyper))
    for found in pl.adapters(model).values():
        for adapter in found.values():
            shake(adapter, moved)
    return model


def checkpointed(model: nn.Module, reentrant: bool) -> nn.Module:
    with warnings.catch_warnings():  # a new name for it is on its way in transformers
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    return model.train()


# --- the reference's QLoRA ---


def bnb_quantised(model: nn.Module) -> nn.Module:
    """As transformers loads it with load_in_4bit: Linear4bit in the place of all linear layers but the head."""
    for path in group(model, "all-linear"):
        layer = at(model, path)
        W = weight_of(layer).detach().contiguous()
        new = bnb.nn.Linear4bit(W.shape[1], W.shape[0], bias=layer.bias is not None, quant_type="nf4")
        new.weight = bnb.nn.Params4bit(W, requires_grad=False, quant_type="nf4", compress_statistics=True)
        new.bias = layer.bias
        put(model, path, new.to("cpu"))
    model.is_loaded_in_4bit = True
    return model.requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", TARGETS)
def test_logits_and_gradients_are_those_of_the_reference(family, dtype, tmp_path):
    """In train mode: in eval mode without gradients bitsandbytes has CPU kernels of its own, in bfloat16."""
    ours = qlora(family, dtype).train()
    pl.save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(bnb_quantised(build(family, dtype)), tmp_path, is_trainable=True).train()
    assert sum(type(m).__module__ == "peft.tuners.lora.bnb" for m in theirs.modules()) == 2 * len(TARGETS[family])
    relative = 1e-5 if dtype == torch.float32 else 0.02  # bfloat16 has 8 bits, and sums in another order
    wanted, got = backward(theirs), backward(ours)
    assert (got - wanted).abs().max() <= relative * wanted.abs().max()
    their, our = gradients(theirs), gradients(ours)
    assert their.keys() == our.keys() and len(our) == 4 * len(TARGETS[family])
    for name, gradient in our.items():
        assert gradient.abs().max() > 0 and gradient.dtype == torch.float32
        assert (gradient - their[name]).norm() <= relative * their[name].norm(), name


# --- training ---


def frozen(model) -> dict[str, torch.Tensor]:
    tensors = {**dict(model.named_buffers()), **dict(model.named_parameters())}
    return {name: t.detach().clone() for name, t in tensors.items() if not t.requires_grad}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", TARGETS)
def test_gradient_checkpointing_needs_no_preparation(family, reentrant):
    """Frozen embeddings, packed layers, nothing cast, no hook of ours: the same gradients, for all adapters."""
    plain, kept = qlora(family).train(), checkpointed(qlora(family), reentrant)
    assert torch.equal(backward(plain), backward(kept))
    wanted, got = gradients(plain), gradients(kept)
    assert wanted.keys() == got.keys() and len(got) == 4 * len(TARGETS[family])
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-5, atol=1e-8)  # summed in another order


@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base, precision", [("float32", None), ("float32", "bf16"), ("bfloat16", None),
                                             ("bfloat16", "bf16")])  # fmt: skip
def test_training_moves_the_adapter_alone(base, precision, adapters):
    model = checkpointed(qlora(dtype=getattr(torch, base), moved=0.0), reentrant=False)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(adapters)
    before = frozen(model)
    rows = [{"input_ids": row.tolist()} for row in batch(8)]
    log = pl.train(model, rows, steps=12, batch_size=8, lr=2e-2, precision=precision, progress=False)
    assert log.losses[-1] < 0.8 * log.losses[0]
    after = frozen(model)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {adapters}
    assert all(p.any() for p in model.parameters() if p.requires_grad)


def test_a_killed_run_on_packed_weights_goes_on(tmp_path):
    rows = [{"input_ids": row.tolist()} for row in batch(8)]
    settings = {"steps": 6, "batch_size": 4, "lr": 1e-2}
    expected, end = qlora(), {}
    whole = pl.train(expected, rows, progress=False, **settings)
    steps = train_steps(qlora(), rows, checkpoint=tmp_path, **settings)
    for _ in range(3):
        next(steps)
    steps.close()
    model = qlora()
    assert pl.train(model, rows, checkpoint=tmp_path, progress=False, **settings).losses == whole.losses
    end = dict(expected.named_parameters())
    assert all(torch.equal(p, end[name]) for name, p in model.named_parameters())
    other = pl.attach(pl.quantize(build("llama", seed=1)), pl.LoRA, TARGETS["llama"], r=4, alpha=8)
    with pytest.raises(ValueError, match="another run.*frozen weights"):
        pl.train(other, rows, checkpoint=tmp_path, progress=False, **settings)


# --- the three merges ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", TARGETS)
def test_three_merges(family, dtype, tmp_path):
    """Into the dequantised weights: exact to rounding. Packed again, or into the weights before packing: not so."""
    model = qlora(family, dtype)
    unmerged = logits(model)
    pl.save_adapter(model, tmp_path)

    dense = pl.merge(copy.deepcopy(model))
    again = pl.quantize(pl.merge(copy.deepcopy(model)))
    original = pl.merge(pl.load_adapter(build(family, dtype), tmp_path))
    assert all(isinstance(at(again, path), pl.Adapted) and isinstance(at(again, path).layer, pl.NF4Linear)
               for path in pl.adapters(model)["default"])  # fmt: skip

    errors = [(logits(m) - unmerged).abs().max().item() for m in (dense, again, original)]
    size = unmerged.abs().max().item()
    print(family, dtype, [f"{error:.4f}" for error in errors], f"of {size:.1f}")
    rounding = 1e-5 if dtype == torch.float32 else 0.05
    assert errors[0] <= rounding * size
    assert min(errors[1:]) >= (1000 if dtype == torch.float32 else 5) * errors[0]
    for merged in (dense, again):
        assert torch.equal(logits(pl.unmerge(merged)), unmerged), "bit for bit"


# --- optimizers by name ---


def test_adamw_by_name_is_the_default():
    assert numbers(run(tiny(), optimizer="adamw")) == numbers(run(tiny()))


@pytest.mark.parametrize("name", ["adamw8bit", "paged_adamw", "paged_adamw8bit"])
def test_without_a_gpu_plain_adamw_runs_and_says_so(name, tmp_path):
    plain, end = tiny(), tiny()
    wanted = run(plain)
    with pytest.warns(UserWarning, match=f"'{name}'.*on cpu plain AdamW"):
        log = run(end, tmp_path, optimizer=name)
    assert numbers(log) == numbers(wanted) and same(parameters(end), parameters(plain))


@pytest.mark.parametrize("kind", ["AdamW8bit", "PagedAdamW", "PagedAdamW8bit"])
def test_runs_with_bitsandbytes_optimizers_go_on(kind, tmp_path):
    """bitsandbytes 0.50 has them for the CPU too, so that what a GPU would do with their state is tested here."""

    def optimizer(trained):
        small = {"min_8bit_size": 64} if "8" in kind else {}
        return _bitsandbytes(kind, kind)(trained, lr=1e-2, **small)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Paged optimizers are not supported on CPU")
        wanted = run(tiny(), optimizer=optimizer)
        assert wanted.losses[-1] < wanted.losses[0]
        steps = train_steps(tiny(), token_rows(), valid=token_rows(3, 2), checkpoint=tmp_path, optimizer=optimizer,
                            steps=12, batch_size=4, lr=1e-2, checkpoint_every=3, valid_every=2, patience=50,
                            seed=3)  # fmt: skip
        for _ in range(5):
            next(steps)
        steps.close()
        assert steps_in(tmp_path) == 5
        assert numbers(run(tiny(), tmp_path, optimizer=optimizer)) == numbers(wanted), "bit for bit"
        with pytest.raises(ValueError, match=f"optimizer: {kind} there, AdamW here"):
            run(tiny(), tmp_path, optimizer="adamw")


@pytest.mark.parametrize("name, theirs", [("adamw8bit", "AdamW8bit"), ("paged_adamw", "PagedAdamW"),
                                          ("paged_adamw8bit", "PagedAdamW8bit")])  # fmt: skip
def test_on_a_gpu_bitsandbytes_is_asked(name, theirs, monkeypatch):
    loop = sys.modules["peftlab.train"]
    monkeypatch.setattr(_bitsandbytes(theirs, name), "__init__", lambda self, *args, **more: vars(self).update(more))
    on_gpu = [types.SimpleNamespace(device=torch.device("cuda"))]
    optimizer = loop._optimizer(on_gpu, loop.Settings(optimizer=name, lr=0.5, weight_decay=0.25))
    assert type(optimizer).__name__ == theirs and vars(optimizer) == {"lr": 0.5, "weight_decay": 0.25}


def test_optimizers_that_are_not_there(monkeypatch):
    with pytest.raises(ValueError, match="optimizer='adam8bit'.*'adamw8bit'"):
        run(tiny(), optimizer="adam8bit")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match="'adamw8bit'.*pip install bitsandbytes"):
        _bitsandbytes("AdamW8bit", "adamw8bit")


# --- the preparation that is not needed, and what it costs ---


class Peak(TorchDispatchMode):
    """The most bytes of tensors that were alive at once, the model's own included."""

    def __init__(self, model):
        super().__init__()
        self.alive, self.now, self.most = set(), 0, 0
        tree_map_only(torch.Tensor, self.add, [*model.parameters(), *model.buffers()])

    def add(self, tensor):
        memory = tensor.untyped_storage()
        if memory._cdata not in self.alive:
            self.alive.add(memory._cdata)
            self.now += memory.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(memory, self.remove, memory._cdata, memory.nbytes())

    def remove(self, key, size):
        self.alive.remove(key)
        self.now -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self.add, out)
        return out


@pytest.mark.parametrize("tokens", [64, 512])
def test_the_cost_of_the_preparation_is_what_a_step_measures(tokens):
    """peft's own function on our packed model: the same loop, with and without it, all tensors counted."""

    def peak(prepare: bool) -> int:
        model = build("llama", torch.bfloat16, vocab_size=4096, num_hidden_layers=6, max_position_embeddings=512)
        pl.quantize(model)
        if prepare:
            model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        checkpointed(pl.attach(model, pl.LoRA, ["q_proj", "v_proj"], r=4), reentrant=False)
        ids = torch.ones(1, tokens, dtype=torch.long)
        with Peak(model) as found, torch.autocast("cpu", torch.bfloat16):
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return found.most

    packed = pl.quantize(build("llama", torch.bfloat16, vocab_size=4096, num_hidden_layers=6))
    said = kbit.cost(packed, tokens)
    assert said.weights == 2 * (2 * 4096 * 64 + 13 * 64) and said.head == 2 * 4096 * 64
    assert said.stream == 2 * tokens * 64 * 6
    assert peak(True) - peak(False) == pytest.approx(said.total, rel=0.03)


def test_the_cost_on_well_known_models():
    """Llama 2 7B: 0.49 GiB for two tables of 32,000 × 4,096, and 0.24 for autocast's copy of one; Llama 3 8B, with
    128,256 words and 2,048 tokens: 1.96, 0.98, and 0.50 for the 32 hidden states of 2,048 × 4,096."""
    assert round(kbit.cost("llama-2-7b", tokens=0).total / 2**30, 1) == 0.7
    assert round(kbit.cost("llama-3-8b", tokens=2048).total / 2**30, 1) == 3.4
    assert repr(kbit.cost("llama-3-8b", 2048)) == "+3.44 GiB (weights 1.96, head 0.98, stream 0.50)"
    assert kbit.cost("gpt2", 0).weights < 3 * kbit.cost("gpt2", 0).head / 2, "a tied table is cast once"


def test_the_cost_of_a_model_in_float32_is_nil_and_adapters_are_not_the_base():
    assert kbit.cost(pl.quantize(build("llama"))).total == 0
    model = qlora(dtype=torch.bfloat16)
    for found in pl.adapters(model).values():
        for adapter in found.values():
            adapter.bfloat16()
    assert kbit.cost(model) == kbit.cost(pl.quantize(build("llama", torch.bfloat16)))


def test_a_dense_model_has_no_k_bit_preparation():
    with pytest.raises(ValueError, match="no packed layer.*quantize"):
        kbit.cost(build("llama"))
    with pytest.raises(ValueError, match="llama-3-8b"):
        kbit.cost("lama-3-8b")


def test_packing_twice_gives_the_same_codes():
    """Requantising as such loses nothing: it is the merged adapter that falls between the levels."""
    W = build("llama").model.layers[0].mlp.up_proj.weight.detach()
    once = pack(W, double=False)
    layer = nn.Linear(64, 128, bias=False)
    layer.weight.data = pl.nf4.unpack(once)
    assert torch.equal(pack(layer.weight, double=False).codes, once.codes)
