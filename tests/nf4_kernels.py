"""The Triton kernels in Triton's interpreter, on a CPU: run by test_nf4_triton.py in a process of its own, as the
interpreter is chosen (TRITON_INTERPRET=1) before Triton is imported, and for the whole process."""

import itertools

import numpy as np
import pytest
import torch
import triton.language as tl
from torch.nn import Linear
from triton.runtime import interpreter

from peftlab import NF4Linear, nf4, nf4_fast, nf4_triton

# A rectangle of whole tiles; rows that end within a block, or within a byte; one weight; less than one block.
SHAPES = [(64, 128), (7, 98), (5, 33), (1, 1), (3, 5), (2, 4100)]
BLOCKS = [32, 64, 1024, 4096]


@pytest.fixture(autouse=True)
def rounding(monkeypatch):
    """The interpreter cuts float32 off where it makes bfloat16 of it; here it rounds, as a GPU and torch do."""
    cast = interpreter.InterpreterBuilder.cast_impl

    def rounded(self, value, dtype):
        if (value.dtype.scalar, dtype.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, value, dtype)
        bits = torch.tensor(value.data).bfloat16().view(torch.int16).numpy().view(np.uint16)
        return interpreter.TensorHandle(bits, tl.bfloat16)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "cast_impl", rounded)


def packed(shape, block=64, kind="nf4", double=True) -> nf4.Packed:
    return nf4.pack(torch.randn(shape), block, kind, double)


def bits(W: torch.Tensor) -> torch.Tensor:
    return W.view(torch.int32 if W.dtype == torch.float32 else torch.int16)


@pytest.mark.parametrize("dtype", nf4.FLOATS, ids=str)
@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
def test_dequantize_gives_the_bits_of_unpack(dtype, double):
    for shape, block, kind in itertools.product(SHAPES, BLOCKS, ["nf4", "fp4"]):
        p = packed(shape, block, kind, double)
        W = nf4_triton.dequantize(p, dtype)
        assert W.dtype == dtype and W.shape == shape
        assert torch.equal(bits(W), bits(nf4.unpack(p, dtype))), (shape, block, kind)


@pytest.mark.parametrize("W", [torch.zeros(3, 70), torch.randn(4, 64) * 1e-42, torch.randn(4, 64) * 1e37,
                               torch.tensor([[1e-45, -3e38]])], ids=["zeros", "denormal", "huge", "both"])  # fmt: skip
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
def test_extreme_weights(W, double):
    p = nf4.pack(W, double=double)
    for dtype in nf4.FLOATS:
        assert torch.equal(bits(nf4_triton.dequantize(p, dtype)), bits(nf4.unpack(p, dtype)))


def test_int4_and_the_dtype_before_packing():
    p = nf4.pack(torch.randn(9, 40).half(), kind="int4")
    W = nf4_triton.dequantize(p)
    assert W.dtype == torch.float16 and torch.equal(W, nf4.unpack(p))


@pytest.mark.parametrize("dtype", nf4.FLOATS, ids=str)
@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
def test_matmul_is_the_product_with_the_unpacked_matrix(dtype, double):
    cases = [(10, 128, 32, 1), (10, 128, 64, 16), (7, 98, 64, 3), (7, 98, 4096, 1), (2, 1026, 64, 2), (1, 2, 32, 3),
             (3, 192, 512, 16), (2, 4096, 4096, 2), (5, 1024, 1024, 1)]  # fmt: skip
    for out_features, in_features, block, rows in cases:
        shape = out_features, in_features
        p, x = packed(shape, block, "nf4", double), torch.randn(rows, in_features).to(dtype)
        assert nf4_triton.multiplies(p, x)
        y = nf4_triton.matmul(x, p)
        assert y.dtype == dtype and y.shape == (rows, out_features)
        W = nf4.unpack(p, torch.float32).double()
        exact, size = x.double() @ W.T, x.double().abs() @ W.abs().T
        # a float32 sum of n terms is off by n roundings of their size at most, and the result is rounded once more
        bound = in_features * 2.0**-24 * size + torch.finfo(dtype).eps / 2 * exact.abs() + 1e-12
        assert ((y.double() - exact).abs() <= bound).all(), (shape, block, rows)


def test_matmul_takes_any_leading_dimensions_and_strides():
    p = packed((6, 64))
    x = torch.randn(64, 2, 3).permute(1, 2, 0)
    y = nf4_triton.matmul(x, p)
    assert y.shape == (2, 3, 6)
    torch.testing.assert_close(y, x @ nf4.unpack(p).T)


def test_what_matmul_leaves_to_a_dense_product():
    p = packed((4, 64))
    assert nf4_triton.multiplies(p, torch.ones(16, 64)) and not nf4_triton.multiplies(p, torch.ones(17, 64))
    assert not nf4_triton.multiplies(p, torch.ones(0, 64))
    assert not nf4_triton.multiplies(p, torch.ones(1, 128))  # not its width: torch refuses that by name
    assert not nf4_triton.multiplies(p, torch.ones(1, 64).double())
    assert not nf4_triton.multiplies(packed((4, 33)), torch.ones(1, 33))  # its second row begins within a byte


def test_the_first_try_sees_wrong_bits(monkeypatch):
    nf4_triton.try_out(torch.device("cpu"))
    right = nf4_triton.dequantize
    monkeypatch.setattr(nf4_triton, "dequantize", lambda p, dtype: right(p, dtype) * (1 + 2**-7))
    with pytest.raises(RuntimeError, match="other values"):
        nf4_triton.try_out(torch.device("cpu"))


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_layer_uses_them(monkeypatch, rows, kind):
    """As on a GPU: the fused product for few rows, unpacked weights for many and for gradients; the numbers stay."""
    layer = NF4Linear(Linear(96, 20).requires_grad_(False), kind=kind)
    x, used = torch.randn(rows, 96, requires_grad=True), []

    def run():
        y = layer(x)
        return y.detach(), *torch.autograd.grad(y.square().sum(), x)

    plain = run()
    for name in ("dequantize", "matmul"):
        kernel = getattr(nf4_triton, name)
        monkeypatch.setattr(nf4_triton, name, lambda *a, name=name, kernel=kernel: used.append(name) or kernel(*a))
    monkeypatch.setattr(nf4_fast, "TRITON", {"cpu"})
    monkeypatch.setattr(nf4_fast, "_tried", lambda device: nf4_triton)
    torch.testing.assert_close(run(), plain)
    assert used == ([] if kind == "int8" else ["matmul" if rows == 1 else "dequantize", "dequantize"])
