"""The Triton kernels without a GPU: in the interpreter (nf4_kernels.py), compiled for GPUs that are not there, and what
happens without Triton."""

import importlib.util
import os
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch

import peftlab
from peftlab import nf4, nf4_fast

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@needs_triton
def test_in_the_interpreter(tmp_path):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist",
               str(Path(__file__).with_name("nf4_kernels.py"))]  # fmt: skip
    variables = os.environ | {"TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0 and "skipped" not in run.stdout, run.stdout[-4000:] + run.stderr[-2000:]


def compiled(kernel, arch: int, sizes: list[str], constants: dict, options: dict) -> str:
    """PTX of a kernel for bfloat16 weights with double quantisation; pointers and sizes are multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {name: "*fp32" for name in kernel.arg_names}
    types |= dict.fromkeys(("out", "y", "x"), "*bf16") | dict.fromkeys(("codes", "absmax"), "*u8")
    types |= dict.fromkeys(sizes, "i32") | dict.fromkeys(constants, "constexpr")
    places = {name: place for place, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        kernel,
        {name: types[name] for name in places},
        {(places[name],): value for name, value in constants.items()},
        {(place,): [["tt.divisibility", 16]] for name, place in places.items() if name not in constants},
    )
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options).asm["ptx"]


@needs_triton
@pytest.mark.parametrize("arch", [80, 90])
def test_compiled_for_a_gpu(arch, tmp_path, monkeypatch):
    """What the interpreter cannot show: that a GPU's compiler takes them, that it rounds twice where torch does, and
    that memory is read and written 16 bytes at a time."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    from peftlab import nf4_triton as k

    constants = {"BLOCK": 64, "NESTED": 256}
    ptx = compiled(k._dequantize, arch, ["n", "n_bytes"], constants | {"BLOCKS": k.TILE // 64}, k.ROUND_TWICE)
    assert "fma." not in ptx and "mul.rn.f32" in ptx and "add.rn.f32" in ptx
    assert "cvt.rn.bf16" in ptx
    assert "ld.global.v4.b32" in ptx and "st.global.v4.b32" in ptx

    constants |= {"RUN": 64, "RUNS": k.WIDE // 64, "OUT": k.OUT, "ROWS": 4}
    ptx = compiled(k._matmul, arch, ["rows", "out_features", "in_features"], constants, {})
    assert "fma.rn.f32" in ptx
    assert "ld.global.v2.b32" in ptx


def test_a_cpu_never_asks_for_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    p = nf4.pack(torch.randn(4, 64))
    assert nf4_fast.kernels(p) is None
    nf4.unpack(p)


@pytest.fixture
def on_this_device(monkeypatch):
    """As if the CPU were a GPU that kernels may run on."""
    monkeypatch.setattr(nf4_fast, "TRITON", {"cpu"})
    nf4_fast._tried.cache_clear()
    yield nf4.pack(torch.randn(4, 64))
    nf4_fast._tried.cache_clear()


@pytest.mark.filterwarnings("error")
def test_without_triton_plain_code_unpacks(on_this_device, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "peftlab.nf4_triton", raising=False)
    monkeypatch.delattr(peftlab, "nf4_triton", raising=False)
    assert nf4_fast.kernels(on_this_device) is None
    assert nf4.unpack(on_this_device).shape == (4, 64)


def test_kernels_that_fail_are_named_once_and_left_out(on_this_device, monkeypatch):
    def fails(device):
        raise RuntimeError("Failed to find C compiler")

    broken = types.ModuleType("peftlab.nf4_triton")
    broken.try_out = fails
    monkeypatch.setitem(sys.modules, "peftlab.nf4_triton", broken)
    monkeypatch.setattr(peftlab, "nf4_triton", broken, raising=False)
    with pytest.warns(UserWarning, match=r"do not run on cpu \(Failed to find C compiler\)"):
        assert nf4.unpack(on_this_device).shape == (4, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert nf4.unpack(on_this_device).shape == (4, 64)
