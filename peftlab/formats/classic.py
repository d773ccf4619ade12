"""The layouts of soft prompts, (IA)³ and trainable tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..layers import is_conv1d, shape_of
from ..sites import at, bare, group, sites
from ..vocabulary import ties
from .common import PREFIX, Layout, Plan, Weights, keyed, paths_of

if TYPE_CHECKING:
    from ..core import Adapter


def headed(model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(task_type, the head's tensors) for a classifier. Without the task HF PEFT leaves a soft prompt out, without a
    word; with it, it insists on a saved head. A head that is trained with the adapter replaces this one of the base."""
    task = PROMPT_TASKS.get(type(model).__name__.rpartition("For")[2])
    if task is None:
        return {}, {}
    heads = {path: bare(site) for path, site in sites(model).items() if path in HEADS}
    tensors = {f"base_model.{path}.{n}": t for path, head in heads.items() for n, t in head.state_dict().items()}
    return {"task_type": task}, tensors


def refuse_others(model: nn.Module, tensors: Mapping[str, Tensor], known: set[str]) -> None:
    """ValueError for a tensor that is neither known nor of the base's own head."""
    ours = {*known, *headed(model)[1]}
    if odd := sorted(set(tensors) - ours):
        raise ValueError(f"{odd[0]!r} belongs to no module of this model")


def _refuse_first(model: nn.Module) -> None:
    """ValueError for classifiers that read position 0 behind the decoder (RoBERTa): with HF PEFT that is the prompt."""
    if type(model).__name__.endswith("ForSequenceClassification") and hasattr(model, "classifier"):
        body = bare(at(model, group(model, "decoder")[0]))
        if getattr(body, "pooler", None) is None:
            raise ValueError("its head reads the first position, which is the text's first token here and the prompt's "
                             "first vector in HF PEFT, so a prompt means another thing there; PrefixTuning does not")


def _prompt_to_hf(model: nn.Module, found: Mapping[str, Adapter]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The vectors before the tokens, whatever made them; of P-tuning's network the file keeps only what it wrote."""
    _refuse_first(model)
    ((_, adapter),) = found.items()
    tensors: dict[str, Tensor] = {theirs: getattr(adapter, ours) for ours, theirs in adapter.hf_params.items()}
    if adapter.hf_type == "P_TUNING":
        tensors["prompt_embeddings"] = adapter.vectors()  # type: ignore[operator]
    settings = {theirs: adapter.hyper[ours] for ours, theirs in adapter.hf_hyper.items()}
    settings |= {"token_dim": tensors["prompt_embeddings"].shape[1], "num_transformer_submodules": 1}
    task, head = headed(model)
    return tensors | head, settings | task


def _prompt_from_hf(model: nn.Module, method: type[Adapter], config: dict, tensors: dict[str, Tensor]):
    """HF PEFT's prompts for an encoder–decoder have 2·k rows, of which its forward pass uses the first k."""
    _refuse_first(model)
    refuse_others(model, tensors, set(method.hf_params.values()))
    prompts, k = tensors["prompt_embeddings"], config["num_virtual_tokens"]
    twice = len(prompts) == 2 * k and config.get("num_transformer_submodules") == 2
    if len(prompts) != k and not twice:
        raise ValueError(f"prompt_embeddings has {len(prompts)} rows, the config speaks of {k}")
    if twice and method.hf_type == "MULTITASK_PROMPT_TUNING":  # the only one whose second half is used
        raise ValueError("it prompts the decoder too (num_transformer_submodules 2), which is not implemented here")
    hyper = {ours: config[theirs] for ours, theirs in method.hf_hyper.items()}
    if method.hf_type == "P_TUNING":
        hyper["encoder"] = "none"  # only the finished vectors are in the file
    weights = {ours: tensors[theirs] for ours, theirs in method.hf_params.items()} | {"prompt": prompts[:k]}
    plan: Plan = method.plan(model, group(model, "decoder"), hyper)
    return plan, {path: weights for path, (kind, _) in plan.items() if kind is method}


# The end of a model's class name -> HF PEFT's task_type
PROMPT_TASKS = {"SequenceClassification": "SEQ_CLS", "TokenClassification": "TOKEN_CLS",
                "QuestionAnswering": "QUESTION_ANS"}  # fmt: skip
HEADS = ("classifier", "score", "qa_outputs")
PROMPT_KEYS = frozenset({"num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads",
                         "num_layers"})  # fmt: skip
PROMPT_STARTS = {"prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs",
                 "prompt_tuning_init_state_dict_path", "prompt_tuning_init_task"}  # fmt: skip
ENCODERS = {"encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout"}


def _prefix_to_hf(model: nn.Module, found: Mapping[str, Adapter]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(k, 2·L·d_kv): keys, then values, layer by layer; an MLP that made them is left out."""
    if list(found) != group(model, "all-attention"):
        raise ValueError("HF PEFT's format has a prefix in each attention layer; attach with targets='all-attention'")
    one: Any = next(iter(found.values()))
    settings = {"num_virtual_tokens": one.k, "token_dim": one.d_kv, "num_attention_heads": one.heads,
                "num_layers": len(found), "num_transformer_submodules": 1, "prefix_projection": False,
                "encoder_hidden_size": one.width}  # fmt: skip
    task, head = headed(model)
    prefix = torch.cat([a.prefix() for a in found.values()], -1)  # type: ignore[operator]
    return {"prompt_embeddings": prefix} | head, settings | task


def _prefix_from_hf(model: nn.Module, method: type[Adapter], config: dict, tensors: dict[str, Tensor]):
    refuse_others(model, tensors, {"prompt_embeddings"})
    paths = group(model, "all-attention")
    parts = tensors["prompt_embeddings"].chunk(2 * len(paths), -1)
    weights = {path: {"P_k": P_k, "P_v": P_v} for path, P_k, P_v in zip(paths, parts[::2], parts[1::2], strict=True)}
    return method.plan(model, paths, {"k": config["num_virtual_tokens"]}), weights


def _adaption_to_hf(model: nn.Module, found: Mapping[str, Adapter]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """HF PEFT finds the layers again as the last `adapter_layers` modules of one name, so these they must be."""
    one, name = next(iter(found.values())), next(iter(found)).rpartition(".")[2]
    if list(found) != [p for p in sites(model) if p.endswith(f".{name}")][-len(found) :]:
        raise ValueError("HF PEFT's format has LLaMA-Adapter in the last attention layers only, without a gap")
    return keyed(found), {"target_modules": name, "adapter_len": one.hyper["k"], "adapter_layers": len(found)}


def _adaption_from_hf(model: nn.Module, method: type[Adapter], config: dict, tensors: dict[str, Tensor]):
    weights: Weights = {}
    for key, tensor in tensors.items():
        path, _, parameter = key.removeprefix(PREFIX).rpartition(".")
        if path not in sites(model):
            raise ValueError(f"{key!r} belongs to no module of this model")
        weights.setdefault(path, {})[parameter] = tensor
    plan: Plan = {p: (method, {"k": config["adapter_len"], "layers": config["adapter_layers"]}) for p in weights}
    return plan, weights


def _ia3_to_hf(model: nn.Module, found: Mapping[str, Adapter]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """HF PEFT takes a target for feed-forward if its path ends in one of `feedforward_modules`, dot or no dot.

    They must be among `target_modules` too. Where endings would say something else, whole paths are written.
    """
    from ..files import endings_of

    inner = [path for path, adapter in found.items() if adapter.hyper["feedforward"]]
    outer = [path for path in found if path not in inner]
    targets, endings = endings_of(model, list(found)), endings_of(model, inner) if inner else []
    if not set(endings) <= set(targets) or any(path.endswith(ending) for path in outer for ending in endings):
        targets, endings = list(found), inner
    settings: dict[str, Any] = {"target_modules": targets, "feedforward_modules": endings}
    if any(is_conv1d(adapter.layer) for adapter in found.values()):
        settings["fan_in_fan_out"] = True
    return keyed(found), settings


def _ia3_from_hf(model: nn.Module, method: type[Adapter], config: dict, tensors: dict[str, Tensor]):
    found = paths_of(model, tensors, "ia3_l")
    there = sites(model)
    inner = {path: tuple(scale.shape) == (1, shape_of(bare(there[path]))[1]) for path, scale in found.items()}
    plan: Plan = {path: (method, {"feedforward": inner[path]}) for path in found}
    return plan, {path: {"ia3_l": scale} for path, scale in found.items()}


def _tokens_to_hf(model: nn.Module, found: Mapping[str, Adapter]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tied tables are written once each, as HF PEFT does; only the first of them is a target there."""
    owners = [path for path, adapter in found.items() if not adapter.tied]
    settings = {"target_modules": owners, "token_indices": list(found[owners[0]].hyper["tokens"])}
    return keyed(found), settings


def _tokens_from_hf(model: nn.Module, method: type[Adapter], config: dict, tensors: dict[str, Tensor]):
    found = paths_of(model, tensors, "trainable_tokens_delta")
    rows = {tied: rows for path, rows in found.items() for tied in ties(model, path)} | found
    plan: Plan = {path: (method, {"tokens": config["token_indices"]}) for path in rows}
    return plan, {path: {"rows": own} for path, own in rows.items()}


LAYOUTS: dict[str, Layout] = {
    "PROMPT_TUNING": Layout(_prompt_to_hf, _prompt_from_hf, PROMPT_KEYS | PROMPT_STARTS),
    "MULTITASK_PROMPT_TUNING": Layout(_prompt_to_hf, _prompt_from_hf, PROMPT_KEYS | PROMPT_STARTS),
    "P_TUNING": Layout(_prompt_to_hf, _prompt_from_hf, PROMPT_KEYS | ENCODERS),
    "PREFIX_TUNING": Layout(_prefix_to_hf, _prefix_from_hf, PROMPT_KEYS | {"encoder_hidden_size", "prefix_projection"}),
    "ADAPTION_PROMPT": Layout(_adaption_to_hf, _adaption_from_hf, frozenset({"adapter_len", "adapter_layers"})),
    "IA3": Layout(_ia3_to_hf, _ia3_from_hf, frozenset({"feedforward_modules"})),
    "TRAINABLE_TOKENS": Layout(_tokens_to_hf, _tokens_from_hf, frozenset({"token_indices"})),
}  # fmt: skip
