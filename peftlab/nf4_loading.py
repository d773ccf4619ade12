"""Checkpoints of transformers, packed while they are read: one dense tensor at a time.

transformers walks through the checkpoint and owns all that is not packing: names that changed between versions, tied
weights, buffers that no file holds, the dtype of the rest. It calls a quantiser with each weight, and this is ours. The
tensors it is given are read when it asks for them, so that neither memory nor mapped files grow with the checkpoint.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from .layers import is_conv1d, is_linear, shape_of
from .nf4 import Packed, pack
from .nf4_files import AGAIN, STATE, from_state
from .nf4_layer import NF4Linear, _check, _quantizable
from .shapes import meta_model
from .sites import at, put

METHOD = "peftlab"


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

    def __init__(self, name: str):
        self.name = name
        self.parts: dict[str, Stored] = {}

    def __getitem__(self, everything: Any) -> StoredPacked:
        return self

    def to(self, *, device: Any = None, dtype: Any = None) -> StoredPacked:
        return self

    def read(self) -> Packed:
        """Raises ValueError for parts that do not fit together."""
        return from_state({suffix: stored[...] for suffix, stored in self.parts.items()}, self.name)


def read(files: list[Path]) -> tuple[dict[str, Stored | StoredPacked], bool]:
    """(name -> its tensor, whether some are packed) of safetensors files, of which only the headers are read here."""
    from safetensors import SafetensorError, safe_open

    found: dict[str, Stored | StoredPacked] = {}
    for file in files:
        try:
            with safe_open(file, "pt") as f:
                found |= {name: Stored(file, name) for name in f.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is truncated or damaged ({error}); {AGAIN}") from None
    weights = [name.partition(STATE)[0] for name in found if STATE in name]
    for weight in weights:
        whole = StoredPacked(weight)
        for name in [name for name in found if name == weight or name.startswith(f"{weight}.")]:
            whole.parts[name.removeprefix(weight)] = found.pop(name)
        found[weight] = whole
    return found, bool(weights)


class Settings(QuantizationConfigMixin):
    """What `Quantiser` is to do, in the form in which transformers hands it over, and what it met."""

    def __init__(self, options: Mapping[str, Any]):
        super().__init__(quant_method=METHOD)
        self.options = dict(options)
        self.problem: ValueError | None = None


class Pack(ConversionOps):
    """What becomes of a weight that was read: nothing for transformers to place, but codes that its layer will hold."""

    def __init__(self, quantiser: Quantiser):
        self.quantiser = quantiser

    def convert(self, input_dict, source_patterns=None, target_patterns=None, model=None, missing_keys=None, **more):
        left = {}
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            try:
                if self.quantiser.take(model, name.removesuffix(".weight"), weight):
                    model.get_parameter(name)._is_hf_initialized = True  # or transformers would draw it at random
                    missing_keys.discard(name)
                else:
                    left[name] = value
            except ValueError as error:
                problem = ValueError(f"{name}: {str(error).removeprefix(name).strip()}")
                self.quantiser.quantization_config.problem = self.quantiser.quantization_config.problem or problem
                raise
        return left


@register_quantizer(METHOD)
class Quantiser(HfQuantizer):
    """Says which weights are to be packed, keeps their codes while transformers reads on, and puts the layers in."""

    requires_calibration = False
    quantized_element_size = 0.5  # bytes a weight, for the room that transformers reserves on a GPU

    def __init__(self, quantization_config: Settings, **more):
        super().__init__(quantization_config, **more)
        self.paths: set[str] = set()
        self.packed: dict[str, Packed] = {}

    def _process_model_before_weight_loading(self, model: nn.Module, **more) -> nn.Module:
        o = self.quantization_config.options
        if o["packed"]:
            self.paths = {path for path, module in model.named_modules() if is_linear(module)}
            return model
        self.paths = set(_quantizable(model, o["skip"], o["also"]))
        tied = getattr(model, "all_tied_weights_keys", {})
        for path in sorted(self.paths):
            try:
                _check(model, path, o["block"], o["kind"], o["compute"])
                if f"{path}.weight" in {*tied, *tied.values()}:
                    raise ValueError("it shares its weight with another module, which would keep the dense one; skip it")
            except ValueError as error:
                raise ValueError(f"{path!r} cannot be quantised: {error}") from None
        return model

    def param_needs_quantization(self, model: nn.Module, param_name: str, **more) -> bool:
        path, _, name = param_name.rpartition(".")
        return name == "weight" and path in self.paths

    def get_quantize_ops(self) -> Pack:
        return Pack(self)

    def take(self, model: nn.Module, path: str, weight: Tensor | StoredPacked) -> bool:
        """Pack what was read for the layer at `path` and keep it; False if a dense weight is to stay dense."""
        layer, o = at(model, path), self.quantization_config.options
        if isinstance(weight, StoredPacked):
            packed = weight.read()
            if packed.shape != shape_of(layer):
                raise ValueError(f"a matrix of {packed.shape} in the file, of {shape_of(layer)} in the model")
        else:
            if weight.shape != layer.weight.shape:
                raise ValueError(f"{tuple(weight.shape)} in the file, {tuple(layer.weight.shape)} in the model")
            if o["packed"]:
                return False
            packed = pack(weight.T if is_conv1d(layer) else weight, o["block"], o["kind"], o["double"])
        self.packed[path] = packed
        return True

    def postprocess_model(self, model: nn.Module, **more) -> None:
        """All has been read: the packed layers take their places, and transformers forgets that it had a quantiser."""
        o = self.quantization_config.options
        for path in list(self.packed):
            packed, layer = self.packed.pop(path), at(model, path)
            if o["packed"] and o["dtype"]:
                packed = packed._replace(dtype=o["dtype"])
            put(model, path, NF4Linear.of(packed, layer.bias, o["compute"]).train(layer.training))
        self.remove_quantization_config(model)

    def is_serializable(self, **more) -> bool:
        return False  # not by transformers: save_quantized does it

    @property
    def is_trainable(self) -> bool:
        return True


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """No progress bar and no report of the loader's: what is wrong becomes an error of ours."""
    from .base import quiet

    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with quiet():
            yield
    finally:
        logging.set_verbosity(before)


def load(name: str, config: PreTrainedConfig, tensors: Mapping[str, Stored | StoredPacked], options: Mapping[str, Any],
         dtype: torch.dtype, device: torch.device) -> nn.Module:  # fmt: skip
    """The model of a config with these tensors, packed as the options of `load_quantized` say."""
    kind, settings = type(meta_model(config)), Settings(options)
    try:
        with _silent():
            model, told = kind.from_pretrained(None, config=config, state_dict=dict(tensors), quantization_config=settings,
                                               dtype=dtype, device_map={"": device}, ignore_mismatched_sizes=True,
                                               output_loading_info=True)  # fmt: skip
    except RuntimeError as error:
        raise settings.problem or ValueError(f"{name!r}: {str(error).strip().splitlines()[0]}") from None
    for wrong, said in {"missing_keys": "lacks", "unexpected_keys": "holds weights for which its model has no place:",
                        "mismatched_keys": "holds weights of another shape than its config.json says:"}.items():  # fmt: skip
        if keys := sorted(told[wrong], key=str):
            more = f" and {len(keys) - 1:,} more" if len(keys) > 1 else ""
            raise ValueError(f"{name!r} {said} {keys[0]}{more}; it is damaged, or the checkpoint of another model than "
                             f"{kind.__name__}") from None  # fmt: skip
    return model
