"""The small model of `Shadow`: a mirror of the base with few blocks, and its room in the cache. arXiv:2604.19254."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..sites import _takes, at, bare, group


def decoder_only(model: nn.Module) -> str:
    """The path of the decoder; ValueError for encoders, which read a text at once."""
    top = group(model, "decoder")
    decoder: Any = bare(at(model, top[0]))
    encodes = getattr(decoder.config, "is_decoder", None) is False or not _takes(decoder, "past_key_values")
    if len(top) > 1 or encodes:
        raise ValueError(f"{type(model).__name__} is no decoder-only model, and the method reads along with one")
    return top[0]


def with_blocks(model: nn.Module, paths: Sequence[str]) -> list[str]:
    """The decoder and these blocks of it; ValueError for other sites."""
    decoder, blocks = decoder_only(model), group(model, "all-blocks")
    odd = [path for path in paths if path not in (decoder, *blocks)]
    if odd or not set(paths) & set(blocks):
        raise ValueError(f"{[*odd, *paths][0]!r} is no block, as {blocks[0]!r} is; leave targets out")
    return [decoder, *(path for path in paths if path != decoder)]


def mirrored(decoder: Any, layers: int) -> nn.Module:
    """A new, random model of the decoder's kind and width with this many blocks, and without a token table."""
    config = copy.deepcopy(decoder.config)
    depth, config.num_hidden_layers = config.num_hidden_layers, layers
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == depth:  # one entry a layer, such as Qwen's layer_types
            setattr(config, name, (value + value[-1:] * layers)[:layers])
    made = type(decoder)(config)
    table = made.get_input_embeddings()
    for name, child in list(made.named_children()):
        if child is table:
            setattr(made, name, None)  # not deleted: transformers asks for it where it checkpoints activations
    for module in made.modules():
        if isinstance(getattr(module, "layer_idx", None), int):
            module.layer_idx += depth  # its places in the cache, behind the base's
    return made


def with_room(cache: Any, depth: int, layers: int) -> Any:
    """The model's cache with empty layers for the mirror behind its own. ValueError if another has filled it."""
    if cache is None:
        return None
    if (there := len(getattr(cache, "layers", ()))) == depth and not cache.get_seq_length():
        cache.layers.extend(copy.deepcopy(cache.layers[:1])[0] for _ in range(layers))
    elif there not in (0, depth + layers) or (there == 0 and cache.get_seq_length()):
        raise ValueError("this cache was filled without the shadow, or by another one, and has no keys and values of "
                         "it; begin with an empty cache of the model, or with use_cache=False")  # fmt: skip
    elif there and cache.layers[depth].get_seq_length() > cache.get_seq_length():
        raise ValueError("two side networks cannot write into one cache: use one at a time, or use_cache=False")
    return cache


def first_state(decoder: Any, backbone: Any, depth: int, args: tuple, kwargs: dict) -> Tensor:
    """What the backbone gives (B, T, D) for what the decoder, of `depth` blocks, is called with."""
    if (x := kwargs.get("inputs_embeds")) is None:
        x = decoder.get_input_embeddings()(args[0] if args else kwargs["input_ids"])
    cache = with_room(kwargs.get("past_key_values"), depth, backbone.config.num_hidden_layers)
    more = {name: kwargs[name] for name in ("attention_mask", "position_ids") if kwargs.get(name) is not None}
    x = x.to(next(backbone.parameters()).dtype)
    return backbone(inputs_embeds=x, past_key_values=cache, use_cache=cache is not None, **more).last_hidden_state


def freeze(*parts: nn.Module) -> None:
    """Turn the parts' parameters into buffers: they are in the file, and nothing trains them."""
    for module in (module for part in parts for module in part.modules()):
        for name, p in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            module.register_buffer(name, p.detach())
