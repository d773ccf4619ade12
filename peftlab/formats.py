"""HF PEFT's file layouts that are not one tensor per parameter and module: soft prompts and others, by peft_type.

`files` asks here first. A layout is two functions: `to_hf` turns an adapter's parts into tensors and settings,
`from_hf` turns a file back into what to attach where. Everything that is common to all files stays in `files`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from .sites import group

if TYPE_CHECKING:
    from .core import Adapter

Plan = dict[str, "tuple[type[Adapter], dict]"]  # bare path -> (method, hyper-parameters)
Weights = dict[str, dict[str, Tensor]]  # bare path -> {our parameter: tensor}


class Layout(NamedTuple):
    """How one peft_type is laid out.

    to_hf: (model, {path: adapter}) -> (key -> tensor, settings of adapter_config.json besides the common ones).
    from_hf: (model, method, config, tensors) -> (plan, weights); ValueError, naming the key, for what cannot be read.
    known: keys of the config that from_hf understands, or that change nothing in a finished adapter.
    """

    to_hf: Callable[[nn.Module, Mapping[str, Adapter]], tuple[dict[str, Tensor], dict[str, Any]]]
    from_hf: Callable[[nn.Module, type[Adapter], dict, dict[str, Tensor]], tuple[Plan, Weights]]
    known: frozenset[str]


def _prompt_to_hf(model: nn.Module, found: Mapping[str, Adapter]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """One tensor (k, d) for all, whatever made it; an encoder–decoder's two prompts one below the other."""
    import torch

    prompts = [adapter.vectors() for adapter in found.values()]  # type: ignore[operator]
    settings = {"num_virtual_tokens": len(prompts[0]), "token_dim": prompts[0].shape[1],
                "num_transformer_submodules": len(prompts)}  # fmt: skip
    return {"prompt_embeddings": torch.cat(prompts)}, settings


def _prompt_from_hf(model: nn.Module, method: type[Adapter], config: dict, tensors: dict[str, Tensor]):
    prompts, k = tensors["prompt_embeddings"], config["num_virtual_tokens"]
    paths = group(model, "decoder")
    plan: Plan = {path: (method, {"k": k}) for path in paths}
    return plan, {path: {"prompt": part} for path, part in zip(paths, prompts.split(k), strict=True)}


PROMPT_KEYS = frozenset({"num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads",
                         "num_layers"})  # fmt: skip

LAYOUTS: dict[str, Layout] = {
    "PROMPT_TUNING": Layout(_prompt_to_hf, _prompt_from_hf, PROMPT_KEYS | {
        "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"}),
}  # fmt: skip
