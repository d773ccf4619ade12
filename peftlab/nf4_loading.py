"""Whole models whose weights are packed while they are read: one dense tensor at a time.

transformers walks through a checkpoint and owns all that is not packing: names that changed between versions, tied
weights, buffers that no file holds, the dtype of the rest. It calls a quantiser with each weight, and this is ours. The
tensors it is given are read when it asks for them, so that neither memory nor mapped files grow with the checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from .attach import Sharing, Targets
from .base import base_name, no_such_base, quiet
from .layers import is_conv1d, is_linear, shape_of
from .nf4 import Packed, pack
from .nf4_files import AGAIN, STATE, from_state
from .nf4_layer import NF4Linear, check_compute, check_packable, paths_to_quantize
from .shapes import meta_model
from .sites import at, put

METHOD = "peftlab"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")


class Options(NamedTuple):
    """The arguments of `load_quantized`, and whether the checkpoint is packed already."""

    skip: Targets
    also: Targets
    block: int
    kind: str
    double: bool
    compute: torch.dtype | None
    dtype: torch.dtype | None
    packed: bool = False


def load_quantized(
    source: str | os.PathLike | None = None,
    skip: Targets = (),
    also: Targets = (),
    *,
    block: int = 64,
    kind: str = "nf4",
    double: bool = True,
    compute: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> nn.Module:
    """A frozen model, in eval mode, whose linear layers were packed while it was read: what `quantize` would make of
    it, without ever holding more than the packed model and one dense tensor.

    source: a folder or a Hub id; default as `load_base`. skip, also, block, kind, double, compute: see `quantize`.
    dtype: of the rest, and of the weights before they are packed; default as stored. device: default the GPU, if any.
    A checkpoint that is packed already, by `save_quantized` or by transformers with bitsandbytes, is read as it is,
    each weight by its own block size and kind; compute=None is then what its config.json says.
    Raises FileNotFoundError, OSError or ValueError for what is missing, damaged, or does not fit its config.json.
    """
    name = base_name(source)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    check_compute(compute, device)
    options = Options(skip, also, block, kind, double, compute, dtype)
    try:
        folder = _folder(name)
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise no_such_base(name, RuntimeError(str(error).strip().split("\n")[0])) from None
    stored = getattr(config, "quantization_config", None)
    if stored is not None:
        if not stored.get("load_in_4bit"):
            raise ValueError(f"{name!r} is quantised by {stored.get('quant_method')!r} in another way than "
                             "bitsandbytes' four bits; load the original weights")  # fmt: skip
        del config.quantization_config
    tensors = _tensors(_files(folder))
    rest = dtype or config.dtype or _stored_dtype(tensors)
    if any(isinstance(tensor, StoredPacked) for tensor in tensors.values()):
        if options != Options((), (), 64, "nf4", True, compute, dtype):
            raise ValueError(f"{name!r} is packed already and is read as it is: leave out skip, also, block, kind and "
                             "double, or load the original weights")  # fmt: skip
        if compute is None and stored is not None:
            asked = stored.get("bnb_4bit_compute_dtype") or "float32"
            compute = getattr(torch, asked, asked)  # what is no dtype is refused next
            check_compute(compute, device)
        options = options._replace(packed=True, compute=None if compute == rest else compute)
    model = _load(name, config, tensors, options, rest, device)
    if (folder / "generation_config.json").is_file() and model.can_generate():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.config.name_or_path = name
    return model.requires_grad_(False).eval()


# --- files ----------------------------------------------------------------------------------------------------------


def _folder(name: str) -> Path:
    """The folder itself, or that of the Hub's files in the local cache: what is safetensors or JSON."""
    from huggingface_hub import snapshot_download

    if Path(name).is_dir():
        return Path(name)
    return Path(snapshot_download(name, allow_patterns=["*.json", "model*.safetensors"]))


def _files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint; FileNotFoundError or ValueError that says what is missing."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        pickled = any((folder / name).exists() for name in PICKLED)
        raise FileNotFoundError(f"{folder} has no {WEIGHTS}" + (
            "; pytorch_model.bin is pickle, which can run any code and is not read: load it with transformers where "
            "you trust it, and save_pretrained writes safetensors" if pickled else ""))  # fmt: skip
    try:
        names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / INDEX} is damaged ({error!r}); {AGAIN}") from None
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} lacks the shard {name!r} that {INDEX} names; copy or download it")
    return [folder / name for name in names]


class Stored:
    """A tensor in a safetensors file, read by `stored[...]` and not kept."""

    def __init__(self, file: Path, name: str):
        self.file, self.name = file, name

    def __getitem__(self, everything: Any) -> Tensor:
        from safetensors import safe_open

        with safe_open(self.file, "pt") as f:
            return f.get_tensor(self.name)


class StoredPacked:
    """The parts of a packed weight. transformers, which knows tensors only, takes it for one."""

    def __init__(self, name: str, parts: Mapping[str, Stored]):
        self.name, self.parts = name, parts

    def __getitem__(self, everything: Any) -> StoredPacked:
        return self

    def to(self, *, device: Any = None, dtype: Any = None) -> StoredPacked:
        return self

    def read(self) -> Packed:
        """Raises ValueError for parts that do not fit together."""
        return from_state({suffix: stored[...] for suffix, stored in self.parts.items()}, self.name)


def _tensors(files: list[Path]) -> dict[str, Stored | StoredPacked]:
    """name -> what is in the files by that name, of which only the headers are read here."""
    from safetensors import SafetensorError, safe_open

    dense: dict[str, Stored] = {}
    for file in files:
        try:
            with safe_open(file, "pt") as f:
                dense |= {name: Stored(file, name) for name in f.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is truncated or damaged ({error}); {AGAIN}") from None
    weights = {name.partition(STATE)[0] for name in dense if STATE in name}
    parts: dict[str, dict[str, Stored]] = {weight: {} for weight in weights}
    for name in list(dense):
        head, dot, tail = name.rpartition(".weight")
        if (weight := head + dot) in weights and tail[:1] in ("", "."):
            parts[weight][tail] = dense.pop(name)
    return dense | {weight: StoredPacked(weight, found) for weight, found in parts.items()}


def _stored_dtype(tensors: Mapping[str, Stored | StoredPacked]) -> torch.dtype:
    """What a config.json without a dtype leaves open: the first dense tensor's of floats."""
    read = (stored[...].dtype for stored in tensors.values() if isinstance(stored, Stored))
    return next((dtype for dtype in read if dtype.is_floating_point), torch.float32)


# --- what transformers calls ----------------------------------------------------------------------------------------


class Settings(QuantizationConfigMixin):
    """What a `Quantiser` is to do, in the form in which transformers hands it over, and the first problem it met."""

    def __init__(self, options: Options):
        super().__init__(quant_method=METHOD)
        self.options = options
        self.problem: Exception | None = None


class Pack(ConversionOps):
    """What becomes of a weight that was read: nothing for transformers to place, but codes that its layer will hold."""

    def __init__(self, quantiser: Quantiser):
        self.quantiser = quantiser

    def convert(self, input_dict, source_patterns=None, target_patterns=None, model=None, missing_keys=None, **more):
        left = {}
        for name, value in input_dict.items():
            try:
                taken = self.quantiser.take(model, name, value[0] if isinstance(value, list) else value)
            except Exception as error:  # transformers would read on and, at the end, write of a traceback in its log
                if isinstance(error, ValueError):
                    error = ValueError(f"{name}: {str(error).removeprefix(name).strip()}")
                settings = self.quantiser.quantization_config
                settings.problem = settings.problem or error
                raise
            if taken:
                model.get_parameter(name)._is_hf_initialized = True  # or transformers would draw it at random
                missing_keys.discard(name)
            else:
                left[name] = value
        return left


@register_quantizer(METHOD)
class Quantiser(HfQuantizer):
    """Says which weights are to be packed, keeps their codes while transformers reads on, and puts the layers in."""

    requires_calibration = False
    quantized_element_size = 0.5  # bytes a weight, for the room that transformers reserves on a GPU

    def __init__(self, quantization_config: Settings, **more):
        super().__init__(quantization_config, **more)
        self.options = quantization_config.options
        self.paths: set[str] = set()
        self.packed: dict[str, Packed] = {}

    def _process_model_before_weight_loading(self, model: nn.Module, **more) -> nn.Module:
        """Refuse what cannot be packed before a weight is read. The model is on the meta device, its layers dense."""
        o = self.options
        if o.packed:  # the file says which
            self.paths = {path for path, module in model.named_modules() if is_linear(module)}
            return model
        self.paths = set(paths_to_quantize(model, o.skip, o.also))
        tied, sharing = getattr(model, "all_tied_weights_keys", {}), Sharing(model)
        for path in sorted(self.paths):
            try:
                check_packable(model, path, o.block, o.kind, o.compute, sharing)
                if f"{path}.weight" in {*tied, *tied.values()}:
                    raise ValueError("it shares its weight with another module, which would keep the dense one")
            except ValueError as error:
                raise ValueError(f"{path!r} cannot be quantised: {error}") from None
        return model

    def param_needs_quantization(self, model: nn.Module, param_name: str, **more) -> bool:
        path, _, name = param_name.rpartition(".")
        return name == "weight" and path in self.paths

    def get_quantize_ops(self) -> Pack:
        return Pack(self)

    def take(self, model: nn.Module, name: str, weight: Tensor | StoredPacked) -> bool:
        """Pack what was read for a layer and keep it; False if it is to stay dense. ValueError if it does not fit."""
        path, o = name.removesuffix(".weight"), self.options
        layer = at(model, path)
        if isinstance(weight, StoredPacked):
            self.packed[path], fits = weight.read(), shape_of(layer)
            if self.packed[path].shape != fits:
                raise ValueError(f"{self.packed[path].shape} in the file, {fits} in the model of its config.json")
            return True
        if weight.shape != layer.weight.shape:
            raise ValueError(f"{tuple(weight.shape)} in the file, {tuple(layer.weight.shape)} in the model of its "
                             "config.json")  # fmt: skip
        if not o.packed:
            self.packed[path] = pack(weight.T if is_conv1d(layer) else weight, o.block, o.kind, o.double)
        return not o.packed

    def postprocess_model(self, model: nn.Module, **more) -> None:
        """All has been read: the packed layers take their places, and transformers forgets that it had a quantiser."""
        for path in list(self.packed):
            packed, layer = self.packed.pop(path), at(model, path)
            if self.options.packed and self.options.dtype:
                packed = packed._replace(dtype=self.options.dtype)
            put(model, path, NF4Linear.of(packed, layer.bias, self.options.compute).train(layer.training))
        self.remove_quantization_config(model)

    def is_serializable(self) -> bool:
        return False  # not by transformers: save_quantized writes it

    @property
    def is_trainable(self) -> bool:
        return True


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """No bar and no report of transformers' loader: what is wrong becomes an error of ours."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with quiet():
            yield
    finally:
        logging.set_verbosity(before)


def _load(name: str, config: PreTrainedConfig, tensors: Mapping[str, Stored | StoredPacked], options: Options,
          dtype: torch.dtype, device: torch.device) -> nn.Module:  # fmt: skip
    """The model of a config with these tensors, all of them and no others."""
    kind, settings = type(meta_model(config)), Settings(options)
    try:
        with _silent():
            model, told = kind.from_pretrained(
                None, config=config, state_dict=dict(tensors), quantization_config=settings, dtype=dtype,
                device_map={"": device}, ignore_mismatched_sizes=True, output_loading_info=True)  # fmt: skip
    except RuntimeError as error:
        raise settings.problem or error from None
    wrong = {"missing_keys": "lacks", "unexpected_keys": "holds weights for which its model has no place:",
             "mismatched_keys": "holds weights of another shape than its config.json says:"}  # fmt: skip
    for which, said in wrong.items():
        if keys := sorted(told[which], key=str):
            more = f" and {len(keys) - 1:,} more" if len(keys) > 1 else ""
            raise ValueError(f"{name!r} {said} {keys[0]}{more}; it is damaged, or the checkpoint of another model than "
                             f"{kind.__name__}")  # fmt: skip
    return model.to(device)
