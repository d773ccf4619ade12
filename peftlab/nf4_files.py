"""Packed weights in files: the four-bit serialisation of bitsandbytes and transformers, read and written.

    weight                                     (⌈n/2⌉, 1) uint8   two codes a byte
    weight.absmax                              (b,)               float32, or uint8 with double quantisation
    weight.quant_map                           (16,) float32      the levels
    weight.nested_absmax, .nested_quant_map    (⌈b/256⌉,), (256,) float32, with double quantisation
    weight.quant_state.bitsandbytes__nf4       uint8              JSON: block size, shape, dtype, the mean, …

Only safetensors and JSON are read and written. Whole models are read in nf4_loading.py.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .attach import hosts
from .layers import is_linear
from .nf4 import BLOCKS, FLOATS, LEVELS, NESTED, Packed, levels
from .nf4_layer import NF4Linear
from .sites import bare, sites

STATE = ".quant_state.bitsandbytes__"
KINDS = tuple(kind for kind in LEVELS if kind != "dynamic8")  # of weights
OURS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")  # files of weights, as all tools name them
AGAIN = "copy or download the file again"


# --- one weight -----------------------------------------------------------------------------------------------------


def to_state(p: Packed) -> dict[str, Tensor]:
    """Suffix after "weight" -> tensor, in bitsandbytes' names, order and layout."""
    facts: dict[str, Any] = {"quant_type": p.kind, "blocksize": p.block, "dtype": str(p.dtype).removeprefix("torch."),
                             "shape": list(p.shape)}  # fmt: skip
    tensors = {"": p.codes, ".absmax": p.absmax, ".quant_map": levels(p.kind).to(p.codes.device)}
    if p.nested_absmax is not None and p.nested_levels is not None and p.offset is not None:
        offset = 0.0 if p.offset.is_meta else p.offset.item()
        facts |= {"nested_blocksize": NESTED, "nested_dtype": "float32", "nested_offset": offset}
        tensors |= {".nested_absmax": p.nested_absmax, ".nested_quant_map": p.nested_levels}
    return tensors | {STATE + p.kind: torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)}


def from_state(tensors: Mapping[str, Tensor], name: str = "weight") -> Packed:
    """What `to_state` gave, read back. ValueError, naming the weight, for parts that are missing or do not fit."""
    try:
        return _from_state(tensors)
    except ValueError as error:
        raise ValueError(f"{name} {error}") from None


def _from_state(tensors: Mapping[str, Tensor]) -> Packed:
    found = [key for key in tensors if key.startswith(STATE)]
    if len(found) != 1:
        raise ValueError(f"has {len(found)} tensors named {STATE}…, one is needed: it is not packed in four bits, or "
                         f"parts of it are missing; {AGAIN}")  # fmt: skip
    facts = _facts(tensors[found[0]])
    kind, block, shape = facts["quant_type"], facts["blocksize"], tuple(facts["shape"])
    double = "nested_offset" in facts
    if kind not in KINDS or found[0] != STATE + kind:
        raise ValueError(f"is packed as {kind!r} by {found[0]!r}; there are {', '.join(KINDS)}")
    if block not in BLOCKS:
        raise ValueError(f"has blocks of {block} weights; {', '.join(map(str, BLOCKS))} are possible")
    n, scale = math.prod(shape), torch.uint8 if double else torch.float32
    blocks = math.ceil(n / block)
    expected = {"": (torch.uint8, n if kind == "int8" else math.ceil(n / 2)), ".absmax": (scale, blocks),
                ".quant_map": (torch.float32, len(levels(kind)))}  # fmt: skip
    if double:
        nested = math.ceil(blocks / NESTED)
        expected |= {".nested_absmax": (torch.float32, nested), ".nested_quant_map": (torch.float32, 256)}
    part = {}
    for suffix, (dtype, count) in expected.items():
        said = f"'weight{suffix}'"
        if suffix not in tensors:
            raise ValueError(f"has no part {said}; {AGAIN}")
        tensor = tensors[suffix].contiguous().view(-1)
        if not suffix:  # codes can be stored as other dtypes, for tools that shard only floats: the bytes are the same
            tensor = tensor.view(torch.uint8)
        if (tensor.dtype, len(tensor)) != (dtype, count):
            raise ValueError(f"holds {len(tensor):,} {tensor.dtype} in {said}; a {shape} matrix in blocks of {block} "
                             f"needs {count:,} {dtype}: truncated or damaged; {AGAIN}")  # fmt: skip
        if tensor.is_floating_point() and not tensor.is_meta and not tensor.isfinite().all():
            raise ValueError(f"holds NaN or inf in {said}: damaged; {AGAIN}")
        part[suffix] = tensor
    _check_levels(part[".quant_map"], kind, "weight.quant_map")
    if double:
        _check_levels(part[".nested_quant_map"], "dynamic8", "weight.nested_quant_map")
        part["mean"] = torch.tensor(facts["nested_offset"], dtype=torch.float32, device=part[""].device)
    return Packed(part[""].view(-1, 1), part[".absmax"], part.get(".nested_absmax"), part.get(".nested_quant_map"),
                  part.get("mean"), shape, getattr(torch, facts["dtype"]), kind, block)  # fmt: skip


def _check_levels(table: Tensor, kind: str, part: str) -> None:
    same = table.is_meta or torch.allclose(table.cpu(), levels(kind), rtol=0, atol=1e-6)  # another machine's last bits
    if not same:
        raise ValueError(f"has other levels than {kind} in {part!r}; quantise the original weights again")


def _facts(packed: Tensor) -> dict[str, Any]:
    """The JSON of a weight, its types checked."""
    try:
        facts = json.loads(bytes(packed.tolist()))
        double = "nested_offset" in facts
        whole = [facts["blocksize"], *facts["shape"]] + ([facts["nested_blocksize"]] if double else [])
        if not all(type(number) is int and number > 0 for number in whole) or not facts["shape"]:
            raise ValueError(f"block size and shape are {whole}")
        if facts["dtype"] not in [str(dtype).removeprefix("torch.") for dtype in (*FLOATS, torch.float64)]:
            raise ValueError(f"dtype is {facts['dtype']!r}")
        if not isinstance(facts["quant_type"], str):
            raise ValueError(f"quant_type is {facts['quant_type']!r}")
        if double and not math.isfinite(facts["nested_offset"]):
            raise ValueError(f"nested_offset is {facts['nested_offset']}")
    except (ValueError, TypeError, KeyError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"has damaged JSON in 'weight{STATE}…' ({reason}); {AGAIN}") from None
    if double and (facts["nested_blocksize"], facts.get("nested_dtype")) != (NESTED, "float32"):
        raise ValueError(f"packs its scales in blocks of {facts['nested_blocksize']} {facts.get('nested_dtype')}; only "
                         f"{NESTED} float32 can be read: quantise the original weights again")  # fmt: skip
    return facts


# --- a model, written -----------------------------------------------------------------------------------------------


def save_quantized(model: nn.Module, folder: str | os.PathLike, max_shard_size: str | int = "5GB") -> Path:
    """Write a quantised transformers model as transformers itself would, so that `AutoModelForCausalLM.from_pretrained`
    (with bitsandbytes) and `load_quantized` read it; returns the folder.

    config.json, generation_config.json if the model has one, and model.safetensors, in shards if it is larger than
    max_shard_size. Adapters are not in it: `save_adapter` writes those. All files are complete on disk before the first
    takes its name; others in the folder are left alone, weights of an earlier save are replaced.
    Raises ValueError for a model that transformers could not read back, OSError when the folder cannot be written.
    """
    from huggingface_hub import save_torch_state_dict

    settings = _settings(model)
    config = copy.deepcopy(model.config)
    config.quantization_config, config.architectures = settings, [type(model).__name__]
    config.dtype = _dtype(model)
    with _filled(Path(folder)) as new:
        config.save_pretrained(new)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(new)
        save_torch_state_dict(_state(model), new, max_shard_size=max_shard_size)
    return Path(folder)


def _settings(model: nn.Module) -> dict[str, Any]:
    """quantization_config, as transformers writes it for bitsandbytes; ValueError for what it cannot express."""
    if not hasattr(getattr(model, "config", None), "save_pretrained"):
        raise ValueError(f"{type(model).__name__} is no transformers model; save its state_dict() with safetensors")
    if any(host.merged for host in hosts(model).values()):
        raise ValueError("adapters are merged into the weights; unmerge(model) first, and save them with save_adapter")
    linear = {path: bare(site) for path, site in sites(model).items() if is_linear(bare(site))}
    packed = {path: layer for path, layer in linear.items() if isinstance(layer, NF4Linear)}
    if not packed:
        raise ValueError(f"no layer of this {type(model).__name__} is quantised; call quantize(model) first, or "
                         "model.save_pretrained(folder) for a dense one")  # fmt: skip
    for path, layer in packed.items():
        if layer.kind not in ("nf4", "fp4"):
            raise ValueError(f"{path!r} is packed as {layer.kind}, which bitsandbytes' files cannot hold; quantise the "
                             "original model with kind='nf4' or 'fp4'")  # fmt: skip
    ways = {(layer.kind, layer.block, layer.packed.offset is not None, layer.compute or _dtype(model))
            for layer in packed.values()}  # fmt: skip
    if len(ways) > 1:
        listed = "; ".join(f"kind={k!r}, block={b}, double={d}, compute={c}" for k, b, d, c in sorted(ways, key=str))
        raise ValueError(f"its layers are packed in {len(ways)} ways ({listed}), and config.json holds one: quantise "
                         "the original model in one way")  # fmt: skip
    ((kind, _, double, compute),) = ways
    dense = [path for path in linear if path not in packed]
    _check_choice(model, packed, dense)
    return {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False,
            "_load_in_4bit": True, "_load_in_8bit": False, "bnb_4bit_quant_type": kind,
            "bnb_4bit_use_double_quant": double, "bnb_4bit_compute_dtype": str(compute).removeprefix("torch."),
            "bnb_4bit_quant_storage": "uint8", "llm_int8_skip_modules": dense, "llm_int8_threshold": 6.0,
            "llm_int8_enable_fp32_cpu_offload": False, "llm_int8_has_fp16_weight": False}  # fmt: skip


def _dtype(model: nn.Module) -> torch.dtype:
    """That of the weights which are not packed."""
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def _check_choice(model: nn.Module, packed: Mapping[str, nn.Module], dense: list[str]) -> None:
    """ValueError if transformers, told to skip the dense layers, would not take the packed ones for packed."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    skipped = dense + list(getattr(model, "_keep_in_fp32_modules", None) or ())
    for path in packed:
        if not should_convert_module(path, skipped):
            raise ValueError(f"{path!r} is packed, but transformers would take it for dense: it goes by the names of "
                             "the dense layers and of those it keeps in float32. Quantise the original model with "
                             f"skip={path!r}")  # fmt: skip


def _state(model: nn.Module) -> dict[str, Tensor]:
    """name -> tensor, as the model without its adapters would name it; tied weights once, by their first name."""
    found: dict[str, Tensor] = {}
    for path, site in {"": model, **sites(model)}.items():
        bare(site)._save_to_state_dict(found, f"{path}." if path else "", keep_vars=True)
    first = {id(tensor): name for name, tensor in reversed(found.items())}
    return {name: tensor.detach() for name, tensor in found.items() if first[id(tensor)] == name}


@contextlib.contextmanager
def _filled(folder: Path) -> Iterator[Path]:
    """A new folder to fill; after the block, its files move into `folder`, in place of the weights there were."""
    temporary = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder, prefix=".new."))
        yield temporary
        new = sorted(temporary.iterdir(), key=lambda file: file.name == "config.json")  # last: it makes a model of them
        for file in new:
            os.chmod(file, 0o644)  # some libraries write private files
            with file.open("rb+") as f:
                os.fsync(f.fileno())
        old = {file for file in folder.iterdir() if OURS.fullmatch(file.name)}
        for file in new:
            os.replace(file, folder / file.name)
        for file in old - {folder / file.name for file in new}:
            file.unlink()
    except OSError as error:
        raise OSError(error.errno, f"could not write {folder} ({error.strerror or error})") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
