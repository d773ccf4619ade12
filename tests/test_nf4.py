"""NF4 down to the bits: the levels are derived again, and the packed tensors are those of bitsandbytes, bit for bit."""

from __future__ import annotations

import inspect
import logging
import math
import statistics
import struct
import subprocess
import sys
from itertools import pairwise

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from peftlab import nf4, nf4_fast

bnb = pytest.importorskip("bitsandbytes.functional")
plain = pytest.importorskip("bitsandbytes.backends.default.ops")
plain_unpack = inspect.unwrap(plain._dequantize_4bit_compute)  # without torch.compile: seconds for each new shape
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of compiled kernels that are not there

quantile = statistics.NormalDist().inv_cdf

# Dettmers et al. 2023, arXiv:2305.14314, appendix E, "NormalFloat 4-bit data type"
PUBLISHED = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip

SHAPES = [(1, 1), (1,), (3, 5), (7, 33), (4, 64), (128, 300), (17, 4097), (5, 7, 11), (2, 2, 3, 5)]
FOUR_BITS = ["nf4", "fp4"]
dtypes = pytest.mark.parametrize("dtype", nf4.FLOATS, ids=lambda d: str(d).removeprefix("torch."))
blocks = pytest.mark.parametrize("block", nf4.BLOCKS)
four_bits = pytest.mark.parametrize("kind", FOUR_BITS)


def same(a, b) -> bool:
    return torch.equal(a, b) and a.dtype == b.dtype and a.shape == b.shape


def assert_same_bits(W, block: int, kind: str, double: bool) -> nf4.Packed:
    """All that we pack from W, and what it unpacks to, is what bitsandbytes makes of it.

    Unpacked by its plain operator, and by its compiled one (AVX-512) where that is right: it takes a row to begin with
    a block, so in bitsandbytes 0.50.2 the rows after the first get wrong scales where the block does not divide them.
    """
    ours = nf4.pack(W, block, kind, double)
    codes, state = bnb.quantize_4bit(W, blocksize=block, quant_type=kind, compress_statistics=double)
    assert same(ours.codes, codes)
    assert same(ours.absmax, state.absmax)
    if double:
        assert same(ours.nested_absmax, state.state2.absmax)
        assert same(ours.nested_levels, state.state2.code)
        assert same(ours.offset, state.offset)
    assert (ours.dtype, ours.shape) == (state.dtype, tuple(state.shape))
    unpacked, absmax = nf4.unpack(ours), nf4.scales(ours)
    assert same(unpacked.view(-1), plain_unpack(codes.view(-1), absmax, state.code, block, (W.numel(),), W.dtype))
    if W.shape[-1] % block == 0:
        with torch.compiler.set_stance("force_eager"):
            compiled = bnb.dequantize_4bit(codes, state).view(W.shape)
        normal = unpacked.abs() >= torch.finfo(W.dtype).tiny  # its bfloat16 instruction makes denormals zero
        assert same(unpacked[normal], compiled[normal]) and (compiled[~normal].abs() <= unpacked[~normal].abs()).all()
    if double:
        theirs = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
        assert same(absmax, theirs)
    return ours


# --- the levels -----------------------------------------------------------------------------------------------------


def single(value: float) -> float:
    """Rounded to float32, as a Python float."""
    return struct.unpack("f", struct.pack("f", value))[0]


def probabilities(number: int, single=float) -> list[float]:
    """Even steps from the offset towards ½, which is left out; counted from the nearer end, as torch.linspace does."""
    start, stop = single(nf4.OFFSET), 0.5
    step = single((stop - start) / number)
    there = [start + i * step if i < (number + 1) // 2 else stop - (number - i) * step for i in range(number)]
    return [single(p) for p in there]


@pytest.mark.parametrize("rounding, within", [(single, 1e-7), (float, 2e-7)])  # as the authors' program; all in float64
def test_the_nf4_levels_are_quantiles_of_the_normal_distribution_and_the_published_ones(rounding, within):
    above = [quantile(p) for p in probabilities(8, rounding)]
    below = [-quantile(p) for p in probabilities(7, rounding)]
    derived = [value / max(above) for value in sorted([*above, 0.0, *below])]
    assert len(derived) == len(nf4.levels()) == 16
    for ours, own, published in zip(nf4.levels().tolist(), derived, PUBLISHED, strict=True):
        assert ours == published  # sixteen digits tell float32 values exactly
        assert abs(own - published) < within
    assert nf4.levels().tolist() == sorted(nf4.levels().tolist())
    assert 0.0 in nf4.levels(), "zeros stay zeros"


def test_the_offset_is_the_mean_of_two_tails():
    exact = 1 - (1 / 32 + 1 / 30) / 2  # half a step of 1/16 and of 1/15 of the probability is left outside
    assert float(f"{math.floor(exact * 1e7) / 1e7:.7f}") == nf4.OFFSET and abs(exact - nf4.OFFSET) < 1e-7


def test_equation_4_of_the_paper_gives_another_table():
    steps = 2**4 + 1
    inner = range(1, steps - 1)  # Q(0) and Q(1) are infinite
    middle = [(quantile(i / steps) + quantile((i + 1) / steps)) / 2 for i in inner]
    table = [value / max(middle) for value in middle]
    assert len(table) == 15 and abs(table[7]) < 1e-15  # symmetric: one level fewer than four bits have
    gaps = [min(abs(value - level) for level in PUBLISHED) for value in table]
    assert max(gaps) > 0.02  # two hundred thousand times the agreement of the derivation above


@pytest.mark.parametrize("kind", FOUR_BITS)
def test_the_tables_are_those_of_bitsandbytes(kind):
    assert same(nf4.levels(kind), bnb.get_4bit_type(kind, device="cpu"))


def test_the_table_of_the_second_quantisation_is_that_of_bitsandbytes():
    levels = nf4.levels("dynamic8")
    assert same(levels, bnb.create_dynamic_map())
    assert len(set(levels.tolist())) == 256 and levels.abs().max() == 1


def test_integer_levels_have_even_steps():
    for kind, largest in (("int4", 7), ("int8", 127)):
        wanted = torch.tensor([i / largest for i in range(-largest, largest + 1)])
        torch.testing.assert_close(nf4.levels(kind), wanted, rtol=0, atol=1e-7)


def test_a_table_can_be_changed_without_harm():
    nf4.levels().zero_()
    assert nf4.levels()[-1] == 1


# --- the bits of bitsandbytes ---------------------------------------------------------------------------------------


@dtypes
@blocks
@four_bits
def test_packed_tensors_are_those_of_bitsandbytes(kind, block, dtype):
    draw = torch.Generator().manual_seed(block)
    for number, shape in enumerate(SHAPES):
        W = (torch.randn(shape, generator=draw) * (1, 0.02, 1e3)[number % 3]).to(dtype)
        for double in (True, False):
            assert_same_bits(W, block, kind, double)


@dtypes
@pytest.mark.parametrize("numbers", [nf4.CACHED - 1, nf4.CACHED, nf4.CACHED + 1, 2 * nf4.CACHED + 97, 3 * 2**16])
def test_large_tensors_are_packed_in_parts_without_a_seam(numbers, dtype):
    W = torch.randn(numbers).to(dtype)
    assert_same_bits(W, 64, "nf4", double=True)
    assert_same_bits(W, 4096, "fp4", double=False)


@pytest.mark.parametrize("count", [1, 2, 255, 256, 257, 511, 513])
def test_a_partial_block_of_scales(count):
    packed = assert_same_bits(torch.randn(count, 32), 32, "nf4", double=True)
    assert len(packed.absmax) == count and len(packed.nested_absmax) == -(-count // 256)


SPECIAL = {
    "zeros": torch.zeros(40, 64),
    "zeros, odd": torch.zeros(3, 5),
    "minus zeros": torch.full((3, 64), -0.0),
    "zeros in whole blocks": torch.cat([torch.zeros(20, 64), torch.ones(20, 64)]),
    "constant": torch.full((300, 64), 0.3),
    "denormal": torch.linspace(-1e-39, 1e-39, 40 * 64).view(40, 64),
    "smallest": torch.full((3, 65), 1e-45),
    "denormal, odd": torch.linspace(-1e-42, 1e-42, 33),
    "tiny and large": torch.logspace(-44, 30, 70 * 64).view(70, 64),
    "huge": torch.linspace(-3e36, 3e36, 40 * 64).view(40, 64),
    "one outlier": torch.ones(4, 64).index_fill(0, torch.tensor(2), 1e20),
    "on the bounds": torch.stack([nf4.levels()[:-1], nf4.levels()[1:]]).mean(0).repeat(8).view(4, 30),
    "on the levels": nf4.levels().repeat(16).view(4, 64),
}


@pytest.mark.parametrize("name", SPECIAL)
@four_bits
def test_special_values_are_packed_as_by_bitsandbytes(kind, name):
    for dtype in nf4.FLOATS:
        W = SPECIAL[name].to(dtype)
        if W.isfinite().all():
            for block in (32, 64, 256):
                for double in (True, False):
                    assert_same_bits(W, block, kind, double)


def test_zeros_and_every_value_that_is_a_level_come_back_as_they_were():
    for kind in FOUR_BITS:
        W = nf4.levels(kind).repeat(4).view(2, 32) * 4.0
        assert torch.equal(nf4.unpack(nf4.pack(W, 32, kind, double=False)), W)
    assert torch.equal(nf4.unpack(nf4.pack(torch.zeros(9, 33))), torch.zeros(9, 33))


wild = st.lists(st.floats(-(2.0**125), 2.0**125, width=32), min_size=1, max_size=160)  # the sum of five is finite
tame = st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=160)


@settings(max_examples=150)
@given(wild | tame, st.sampled_from(nf4.FLOATS), st.sampled_from([32, 64, 128]), st.sampled_from(FOUR_BITS),
       st.booleans())  # fmt: skip
def test_whatever_the_values_the_bits_are_those_of_bitsandbytes(values, dtype, block, kind, double):
    limit = torch.finfo(dtype).max
    assert_same_bits(torch.tensor(values).clamp(-limit, limit).to(dtype), block, kind, double)


@settings(max_examples=40)
@given(st.integers(0, 2**31), st.integers(1, 40), st.integers(1, 700), st.floats(-40, 30), st.floats(0, 20))
def test_whatever_the_shape_and_scale_the_bits_are_those_of_bitsandbytes(seed, rows, columns, power, spread):
    draw = torch.Generator().manual_seed(seed)
    magnitude = 10 ** (power + spread * (torch.rand(rows, 1, generator=draw) - 1))  # from row to row
    assert_same_bits(torch.randn(rows, columns, generator=draw) * magnitude, 64, "nf4", double=True)


def test_where_the_mean_of_the_scales_overflows_bitsandbytes_stores_nan_and_we_do_not():
    W = torch.randn(8, 64).sign() * 2e38  # eight scales of 2e38: their sum is beyond float32, their mean is not
    state = bnb.quantize_4bit(W, blocksize=64, quant_type="nf4", compress_statistics=True)[1]
    assert state.offset.isinf()
    ours = nf4.pack(W)
    assert ours.offset == 2e38
    torch.testing.assert_close(nf4.unpack(ours), W, rtol=1e-6, atol=0)
    assert_same_bits(W, 64, "nf4", double=False)


@pytest.mark.parametrize("shape, block", [((4, 96), 64), ((8, 64), 128), ((40, 64), 256), ((5, 70), 64)])
def test_rows_that_end_inside_a_block_keep_their_scales(shape, block):
    W = torch.randn(shape) * torch.logspace(0, 4, shape[0]).unsqueeze(1)
    packed = nf4.pack(W, block, double=False)
    for i in range(W.numel()):  # weight by weight: its code, its block
        byte = packed.codes[i // 2, 0].item()
        level = nf4.levels()[byte >> 4 if i % 2 == 0 else byte & 15]
        assert nf4.unpack(packed).view(-1)[i] == level * packed.absmax[i // block]


def test_strides_and_gradients_do_not_matter():
    W = torch.randn(96, 130)
    packed = nf4.pack(W)
    for other in (W.T.contiguous().T, torch.randn(96, 260)[:, ::2].copy_(W), torch.nn.Parameter(W)):
        again = nf4.pack(other)
        assert all(same(a, b) for a, b in zip(packed[:5], again[:5], strict=True))
        assert not again.absmax.requires_grad and not nf4.unpack(again).requires_grad


def test_packing_leaves_the_weights_as_they_are():
    for dtype in nf4.FLOATS:
        W = torch.randn(50, 33).to(dtype)
        before = W.clone()
        nf4.pack(W)
        assert same(W, before)


# --- bits and errors ------------------------------------------------------------------------------------------------


def test_bits_a_weight_are_the_closed_formulas():
    W = torch.randn(1024, 1024)
    assert nf4.pack(W, double=False).bits == 4 + 32 / 64 == 4.5
    assert nf4.pack(W, double=True).bits == 4 + 8 / 64 + 32 / (64 * 256) == 4.126953125
    assert nf4.pack(W, double=False).bits - nf4.pack(W).bits == pytest.approx(0.373, abs=5e-4)  # section 3 of the paper
    for block in nf4.BLOCKS:
        assert nf4.pack(W, block, double=False).bits == 4 + 32 / block
        assert nf4.pack(W, block).bits == 4 + 8 / block + 32 / (block * 256)
    assert nf4.pack(W, kind="int8", double=False).bits == 8.5


def test_bits_are_those_of_the_tensors():
    for shape in SHAPES:
        for kind in ("nf4", "int8"):
            packed = nf4.pack(torch.randn(shape), 32, kind)
            stored = sum(t.numel() * t.element_size() for t in (packed.codes, packed.absmax, packed.nested_absmax))
            assert packed.bits == 8 * stored / math.prod(shape)


@pytest.mark.parametrize("kind, largest", [("int4", 7), ("int8", 127)])
@blocks
def test_integers_are_the_rounded_quotients(kind, largest, block):
    W = torch.randn(33, 128) * torch.logspace(-3, 3, 33).unsqueeze(1)
    packed = nf4.pack(W, block, kind, double=False)
    padded = torch.nn.functional.pad(W.flatten(), (0, -W.numel() % block)).view(-1, block).double()
    exact = (padded / padded.abs().amax(1, keepdim=True) * largest).flatten()[: W.numel()]
    codes = packed.codes[:, 0] if kind == "int8" else torch.stack([packed.codes >> 4, packed.codes & 15], 1).flatten()
    clear = (exact - exact.floor() - 0.5).abs() > 1e-4  # float32 may round the other way within a hair of a tie
    assert clear.float().mean() > 0.99
    assert torch.equal((codes.double() - largest)[clear], exact.round()[clear])
    absmax = padded.abs().amax(1).repeat_interleave(block)[: W.numel()]
    want = (codes.double() - largest) / largest * absmax
    torch.testing.assert_close(nf4.unpack(packed).flatten().double(), want, rtol=1e-6, atol=0)


def test_int8_on_one_small_matrix_by_hand():
    packed = nf4.pack(torch.tensor([[1.01, -2.0, 0.6, 0.0]]), 32, "int8", double=False)
    assert packed.absmax.tolist() == [2.0]
    assert packed.codes[:, 0].tolist() == [127 + 64, 0, 127 + 38, 127]  # 64.1 and 38.1


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int4", "int8"])
@pytest.mark.parametrize("block", [32, 64, 4096])
def test_no_weight_is_further_off_than_half_the_widest_gap(kind, block):
    W = torch.randn(40, 300) * torch.logspace(-4, 4, 40).unsqueeze(1)
    packed = nf4.pack(W, block, kind, double=False)
    gap = max(b - a for a, b in pairwise(sorted(nf4.levels(kind).tolist())))
    absmax = packed.absmax.repeat_interleave(block)[: W.numel()].view_as(W)
    error = (W - nf4.unpack(packed)).abs()
    assert (error <= absmax * gap / 2 * (1 + 1e-5)).all()  # 1e-5: products rounded to float32
    assert (error > absmax * gap / 2 * 0.9).any() or kind == "int8"  # and the bound is no loose one


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int4", "int8"])
def test_what_was_unpacked_packs_to_the_same_again(kind):
    for shape in SHAPES:
        packed = nf4.pack(torch.randn(shape), 64, kind, double=False)
        again = nf4.pack(nf4.unpack(packed), 64, kind, double=False)
        assert same(again.absmax, packed.absmax) and torch.equal(nf4.unpack(again), nf4.unpack(packed))


def test_finer_types_and_smaller_blocks_err_less():
    W = torch.randn(256, 1024)

    def error(**how):
        return (W - nf4.unpack(nf4.pack(W, **how))).square().mean().sqrt().item()

    assert error(kind="int8") < error(kind="nf4") < error(kind="int4")
    assert error(kind="nf4") < error(kind="fp4")  # on normal weights; the paper's table 2
    assert [error(block=b) for b in nf4.BLOCKS] == sorted(error(block=b) for b in nf4.BLOCKS)
    assert error() == pytest.approx(error(double=False), rel=0.01)  # the scales' own eight bits cost next to nothing


def test_scales_come_back_as_stored_or_nearly_so():
    W = torch.randn(300, 64) * torch.rand(300, 1)
    plain, double = nf4.pack(W, double=False), nf4.pack(W)
    assert nf4.scales(plain) is plain.absmax
    widest = max(b - a for a, b in pairwise(nf4.levels("dynamic8").tolist()))
    bound = double.nested_absmax.repeat_interleave(256)[:300] * (widest / 2 + 1 / 65535)  # half a gap, half a step
    assert ((nf4.scales(double) - plain.absmax).abs() <= bound).all()


# --- unpacking ------------------------------------------------------------------------------------------------------


@dtypes
def test_weights_unpack_to_the_dtype_asked_for(dtype):
    W = torch.randn(30, 65)
    packed = nf4.pack(W.to(dtype))
    assert nf4.unpack(packed).dtype == dtype
    for other in (*nf4.FLOATS, torch.float64):
        assert same(nf4.unpack(packed, other), nf4.unpack(packed, torch.float32).to(other))


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int4", "int8"])
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (130, 33), (64, 100), (257, 96), (33, 4097), (5, 640)])
def test_rows_put_together_are_the_whole_matrix(shape, kind, double, monkeypatch):
    for dense in (1, 500, 3000, 2**21):
        monkeypatch.setattr(nf4_fast, "DENSE", dense)
        for block in (32, 64, 512):
            packed = nf4.pack(torch.randn(shape), block, kind, double)
            parts = [(which, part.clone()) for which, part in nf4_fast.unpack_rows(packed, torch.float32)]
            rows = torch.arange(shape[0])
            assert torch.equal(torch.cat([rows[which] for which, _ in parts]), rows)
            assert all(len(rows[which]) == len(part) for which, part in parts)
            assert torch.equal(torch.cat([part for _, part in parts]), nf4.unpack(packed, torch.float32))


def test_rows_are_small_parts_where_the_matrix_is_large(monkeypatch):
    monkeypatch.setattr(nf4_fast, "DENSE", 4096)
    parts = list(nf4_fast.unpack_rows(nf4.pack(torch.randn(300, 128)), torch.bfloat16))
    assert len(parts) == 10 and all(part.numel() <= 4096 and part.dtype == torch.bfloat16 for _, part in parts)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_tensor_without_data_gives_the_shapes(kind):
    for shape in SHAPES:
        for double in (True, False):
            real = nf4.pack(torch.randn(shape), 32, kind, double)
            meta = nf4.pack(torch.randn(shape, device="meta"), 32, kind, double)
            for ours, its in zip(real[:5], meta[:5], strict=True):
                assert (ours is None) == (its is None)
                assert ours is None or (its.is_meta, its.shape, its.dtype) == (True, ours.shape, ours.dtype)
            assert meta[5:] == real[5:] and meta.bits == real.bits
            assert nf4.unpack(meta).is_meta and nf4.unpack(meta).shape == shape


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 700, 8 * 2**16 + 3 * 64, -1])
@dtypes
def test_weights_that_are_not_finite_are_refused_wherever_they_are(bad, place, dtype):
    W = torch.zeros(9 * 2**16 + 5, dtype=dtype)  # in the first part, a middle one, the last block, which is not full
    W[place] = bad
    with pytest.raises(ValueError, match=r"1 of 589,829 weights are NaN or infinite.*file may be damaged"):
        nf4.pack(W)


@pytest.mark.parametrize("kind", ["fp4", "int4", "int8"])
@pytest.mark.parametrize("double", [True, False])
def test_weights_that_are_not_finite_are_refused_for_every_kind(kind, double):
    with pytest.raises(ValueError, match="2 of 64 weights are NaN or infinite"):
        nf4.pack(torch.zeros(64).index_fill(0, torch.tensor([3, 40]), math.nan), 64, kind, double)


@pytest.mark.parametrize("block", [0, -64, 1, 16, 63, 96, 8192, 64.0, None])
def test_other_block_sizes_are_refused(block):
    with pytest.raises(ValueError, match=rf"block size {block} is none of 32, 64, .*, 4096"):
        nf4.pack(torch.zeros(64), block)


def test_kinds_that_there_are_not_are_refused():
    for ask in (nf4.levels, lambda kind: nf4.pack(torch.zeros(64), kind=kind)):
        with pytest.raises(ValueError, match="no data type 'nf3'; there are nf4, fp4, int4, int8"):
            ask("nf3")


def test_the_table_of_scales_is_none_for_weights():
    with pytest.raises(ValueError, match="'dynamic8' is for scales.*take nf4, fp4, int4, int8"):
        nf4.pack(torch.zeros(64), kind="dynamic8")


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.int64, torch.bool, torch.complex64])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(ValueError, match=rf"weights of {dtype} cannot be packed; float32, bfloat16 and float16 can"):
        nf4.pack(torch.zeros(64, dtype=dtype))


@pytest.mark.parametrize("shape", [(0,), (0, 64), (64, 0)])
def test_nothing_is_refused(shape):
    with pytest.raises(ValueError, match=rf"nothing to pack, its shape is \({shape[0]},"):
        nf4.pack(torch.zeros(shape))


@pytest.mark.parametrize("default", ["float64", "bfloat16"])
def test_the_default_dtype_does_not_matter(default):
    """Whether it was changed before the tables are made, when the module is imported, or before packing."""
    code = f"""
import torch
torch.set_default_dtype(torch.{default})
from peftlab import nf4, nf4_fast
from peftlab.nf4_files import from_state, to_state
p = nf4.pack(torch.arange(5000, dtype=torch.float32).sin())
p = from_state(to_state(p))
print([(t.dtype, t.double().sum().item()) for t in (*p[:5], *nf4.LEVELS.values(), nf4.unpack(p))])
"""
    p = nf4.pack(torch.arange(5000, dtype=torch.float32).sin())
    want = [(t.dtype, t.double().sum().item()) for t in (*p[:5], *nf4.LEVELS.values(), nf4.unpack(p))]
    got = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert got.strip() == str(want)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int4", "int8"])
@pytest.mark.parametrize("shape", [(3, 5), (64, 96), (257, 130), (300, 513)])
def test_the_plain_formula_gives_the_bits_of_the_fast_way(monkeypatch, shape, kind):
    """`unpack` as it reads, which a GPU without Triton and torch.compile run, beside what a CPU runs."""
    for dtype, double in ((torch.float32, True), (torch.bfloat16, False)):
        packed = nf4.pack(torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype), 64, kind, double)
        with monkeypatch.context() as patch:
            patch.setattr(nf4_fast, "unpack", lambda p, dtype: None)
            plain = nf4.unpack(packed)
        assert torch.equal(plain, nf4.unpack(packed)) and plain.dtype == dtype
