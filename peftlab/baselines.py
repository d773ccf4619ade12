"""What adapters are compared with: full fine-tuning, and training the last layers only. Neither adds a module."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from .attach import hosts
from .core import Adapted
from .layers import is_quantised

# The last words of the paths of what stands between the blocks and the output.
HEADS = re.compile(r"(.*\.)?(lm_head|score|classifier|pre_classifier|classification_head|qa_outputs|pooler|cls|heads?)")


def full_finetuning(model: nn.Module) -> nn.Module:
    """Make every parameter trainable, in place; returns the model.

    Raises ValueError if adapters are attached or the base is quantised; then nothing was changed.
    """
    _check_bare(model, "full fine-tuning")
    _check_dense(model)
    _train_only(model, model.parameters())
    return model


def last_layers(model: nn.Module, n: int = 1, head: bool = True, tied: bool = False) -> nn.Module:
    """Freeze the model, then train its last n blocks, the final norm and the head, in place; returns the model.

    n: 1 to the number of blocks; of an encoder–decoder, the decoder's. head: train the output layer or the classifier
    too, with the pooler before it. A head whose weight is tied to the input embeddings stays frozen (a bias of its own
    does not), as training it would train the embeddings: tied=True does just that.
    Raises ValueError if adapters are attached, the base is quantised, there are no blocks or n is out of range; then
    nothing was changed.
    Source: Lee et al. 2019, "What Would Elsa Do? Freezing Layers During Transformer Fine-Tuning", arXiv:1911.03090.
    """
    _check_bare(model, "training the last layers")
    path, blocks = main_stack(model)
    if type(n) is not int or not 1 <= n <= len(blocks):
        raise ValueError(f"n={n!r} is not in 1…{len(blocks)}: {type(model).__name__} has {len(blocks)} blocks ({path})")
    parts = [*blocks[-n:], *_final_norms(model, path)]
    for part in parts:
        _check_dense(part)
    trained = [p for part in parts for p in part.parameters()]
    if head:
        embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding)]
        frozen = set() if tied else {id(p) for module in embeddings for p in module.parameters()}
        trained += [p for module in heads(model).values() for p in module.parameters() if id(p) not in frozen]
    _train_only(model, trained)
    return model


def stacks(model: nn.Module) -> dict[str, nn.ModuleList]:
    """path -> list of blocks: the outermost nn.ModuleLists whose entries are all of one class and made of parts.

    One for most transformers, two for an encoder–decoder; the experts inside of a block are not among them.
    """
    found: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) and not inside:
            bare = [m.layer if isinstance(m, Adapted) else m for m in module]
            if len({type(m) for m in bare}) == 1 and any(True for _ in bare[0].children()):
                found[path] = module
    return found


def main_stack(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """(path, blocks) of the longest stack, of the decoder's if there is an encoder too. ValueError if there is none."""
    found = stacks(model)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        found = {p: blocks for p, blocks in found.items() if "decoder" in p.split(".")} or found
    if not found:
        raise ValueError(f"{type(model).__name__} has no nn.ModuleList of equal blocks, so its last ones are unknown; "
                         "set requires_grad of its parameters yourself")  # fmt: skip
    path = max(found, key=lambda p: len(found[p]))
    return path, found[path]


def heads(model: nn.Module) -> dict[str, nn.Module]:
    """path -> module of what makes the output from the last block: language-model head, classifier, pooler."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    inside = tuple(f"{path}." for path in stacks(model))
    return {path: module for path, module in model.named_modules() if path and not path.startswith(inside)
            and (module is output or HEADS.fullmatch(path))}  # fmt: skip


def _final_norms(model: nn.Module, path: str) -> list[nn.Module]:
    """Norms beside the stack or beside one of its owners; one after the embeddings (BLOOM, BART) is named so."""
    words = path.split(".")
    owners = [model.get_submodule(".".join(words[:i])) for i in range(len(words))]
    children = [pair for owner in owners for pair in owner.named_children()]
    return [m for name, m in children if "norm" in type(m).__name__.lower() and "emb" not in name]


def _check_bare(model: nn.Module, what: str) -> None:
    there = sorted({name for host in hosts(model).values() for name in host.adapters})
    if there:
        raise ValueError(f"{what} is a baseline without adapters, but {', '.join(map(repr, there))} "
                         f"{'is' if len(there) == 1 else 'are'} attached; call detach(model) first")  # fmt: skip


def _check_dense(module: nn.Module) -> None:
    packed = [name for name, inner in module.named_modules() if is_quantised(inner)]
    if packed:
        raise ValueError(f"{packed[0]!r} of {type(module).__name__} is quantised, which has no gradient; load the base "
                         "without quantisation, or attach adapters to it instead")  # fmt: skip


def _train_only(model: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    wanted = {id(p) for p in parameters}
    for name, parameter in model.named_parameters():
        if id(parameter) in wanted and not parameter.is_floating_point():
            raise ValueError(f"{name!r} is stored as {parameter.dtype}, which has no gradient; load the base without "
                             "quantisation, or attach adapters to it instead")  # fmt: skip
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in wanted)
