"""The places of a model where a method can sit: bare paths, and groups of sites that all families name differently.

A bare path is a module's path in the model without adapters: the steps through hosts are left out, so it stays the same
whatever is attached.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator

from torch import nn

from .core import Adapted
from .layers import is_linear

# The last linear layer of a sublayer, as the families name it. BERT's and RoBERTa's stand beside the attention module.
ATTENTION_OUTPUT = re.compile(
    r"(.*\.)?(o_proj|out_proj|out_lin|attn\.c_proj|attn\.Wo|attention\.output\.dense|\w*Attention\.o|"
    r"(\w+ttention|self_attn)\.dense)"
)
FFN_OUTPUT = re.compile(
    r"(.*\.)?(down_proj|fc2|mlp\.c_proj|mlp\.fc_out|mlp\.Wo|wo|dense_4h_to_h|lin2|(?<!attention\.)output\.dense)"
)
FEED_FORWARD = re.compile(r".*(MLP|FeedForward|FFN|DenseAct|DenseGatedAct).*")  # by class name
POSITIONS = re.compile(r"(.*\.)?(rotary_emb|wpe|embed_positions|position_embeddings)")
HEAD = re.compile(r"(.*\.)?(lm_head|cls|score|classifier|qa_outputs)(\..*)?")  # heads are trained, not adapted


def sites(model: nn.Module) -> dict[str, nn.Module]:
    """bare path -> module (or the host around it), of every module an adapter could wrap."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"needs a model, a torch.nn.Module, not {type(model).__name__}; see load_base")

    def walk(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
        if id(module) in seen:
            return
        seen.add(id(module))
        if path:
            yield path, module
        for name, child in bare(module).named_children():
            yield from walk(child, f"{path}.{name}" if path else name)

    seen: set[int] = set()
    return dict(walk(model, ""))


def at(model: nn.Module, path: str) -> nn.Module:
    """The module, or the host around it, at a bare path. get_submodule would take a host's `layer` for that of T5's
    blocks and BERT's encoder."""
    for name in path.split(".") if path else ():
        model = getattr(bare(model), name)
    return model


def bare(site: nn.Module) -> nn.Module:
    """The frozen module itself, without its host if it has one; while merged, the one with the adapters in it."""
    return site.layer if isinstance(site, Adapted) else site


def put(model: nn.Module, path: str, module: nn.Module) -> None:
    """Make `module` the one that stands at a bare path."""
    parent, _, name = path.rpartition(".")
    setattr(bare(at(model, parent)), name, module)


def parameters(model: nn.Module) -> dict[str, tuple[nn.Module, nn.Parameter]]:
    """bare path -> (the module that owns it, the parameter), of every parameter of the base."""
    there = {path: bare(site) for path, site in sites(model).items()}
    return {f"{path}.{name}": (module, parameter) for path, module in there.items()
            for name, parameter in module.named_parameters(recurse=False)}  # fmt: skip


def loose(model: nn.Module) -> dict[str, nn.Parameter]:
    """bare path -> matrix, or stack of matrices (E, …), that a module multiplies by without a layer: experts, routers.

    Not the weights of layers (linear ones and convolutions), of embeddings, and of nn.MultiheadAttention, which is
    not always called: nn.TransformerEncoderLayer reads its weights.
    """
    layers = (nn.Embedding, nn.modules.conv._ConvNd, nn.MultiheadAttention)
    return {path: p for path, (owner, p) in parameters(model).items()
            if p.dim() in (2, 3) and not (is_linear(owner) or isinstance(owner, layers))}  # fmt: skip


def _is_head(model: nn.Module, path: str, site: nn.Module) -> bool:
    return site is getattr(model, "get_output_embeddings", lambda: None)() or HEAD.fullmatch(path) is not None


def _linear(path: str, site: nn.Module, model: nn.Module) -> bool:
    return is_linear(bare(site)) and not _is_head(model, path, site)


def _attention(path: str, site: nn.Module, model: nn.Module) -> bool:
    """By class name, with projections of its own: BERT's and T5's wrappers around the attention proper have none."""
    module = bare(site)
    return "Attention" in type(module).__name__ and any(is_linear(bare(m)) for m in module.children())


def _feed_forward(path: str, site: nn.Module, model: nn.Module) -> bool:
    module = bare(site)
    linear = sum(is_linear(bare(m)) for m in module.children())
    return FEED_FORWARD.fullmatch(type(module).__name__) is not None and linear >= 2


def _block(path: str, site: nn.Module, model: nn.Module) -> bool:
    """An outermost member of a list of modules that holds attention: T5's blocks are lists of sublayers themselves."""
    if [name.isdigit() for name in path.split(".")].count(True) != 1 or not path.rpartition(".")[2].isdigit():
        return False
    listed = isinstance(bare(at(model, path.rpartition(".")[0])), nn.ModuleList)
    return listed and any(_attention(inner, module, model) for inner, module in sites(bare(site)).items())


def _attention_output(path: str, site: nn.Module, model: nn.Module) -> bool:
    return _linear(path, site, model) and ATTENTION_OUTPUT.fullmatch(path) is not None  # RoBERTa's head has an out_proj


def _ffn_output(path: str, site: nn.Module, model: nn.Module) -> bool:
    return _linear(path, site, model) and FFN_OUTPUT.fullmatch(path) is not None


def _norm(path: str, site: nn.Module, model: nn.Module) -> bool:
    return "norm" in type(bare(site)).__name__.lower() and getattr(bare(site), "weight", None) is not None


def _biased(path: str, site: nn.Module, model: nn.Module) -> bool:
    own = dict(bare(site).named_parameters(recurse=False))
    return own.get("bias") is not None and not _is_head(model, path, site)


def _decoder(path: str, site: nn.Module, model: nn.Module) -> bool:
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        name = path.rpartition(".")[2]
        return name in ("encoder", "decoder") and _takes(bare(site), "inputs_embeds")
    prefix = getattr(model, "base_model_prefix", None)
    inner = getattr(bare(getattr(model, prefix or "", model)), "decoder", None)  # OPT's model calls it directly
    prefix = f"{prefix}.decoder" if inner is not None and _takes(bare(inner), "inputs_embeds") else prefix
    return path == prefix and _takes(bare(site), "inputs_embeds")


def _positions(path: str, site: nn.Module, model: nn.Module) -> bool:
    return POSITIONS.fullmatch(path) is not None


def _embeddings(path: str, site: nn.Module, model: nn.Module) -> bool:
    table = getattr(model, "get_input_embeddings", lambda: None)()
    return table is not None and bare(site) is bare(table)


def _experts(path: str, site: nn.Module, model: nn.Module) -> bool:
    """Of parameters: one matrix for each expert of the module that owns it."""
    owner = bare(at(model, path.rpartition(".")[0]))
    return site.dim() == 3 and len(site) == getattr(owner, "num_experts", None)  # type: ignore[operator, arg-type]


def _takes(module: nn.Module, argument: str) -> bool:
    return argument in inspect.signature(type(module).forward).parameters


# group -> (its test, what to call it in an error)
GROUPS: dict[str, tuple[Callable[[str, nn.Module, nn.Module], bool], str]] = {
    "all-linear": (_linear, "linear layer besides its output head"),
    "all-experts": (_experts, "experts whose weights are one parameter of three dimensions"),  # LoRA alone
    "all-attention": (_attention, "attention module"),
    "all-blocks": (_block, "list of blocks that hold attention"),
    "all-mlp": (_feed_forward, "feed-forward module of its own"),
    "attention-output": (_attention_output, "linear layer known as an attention's last"),
    "ffn-output": (_ffn_output, "linear layer known as a feed-forward network's last"),
    "sublayer-output": (lambda *a: _attention_output(*a) or _ffn_output(*a), "linear layer known as a sublayer's last"),
    "all-norms": (_norm, "normalisation layer with a weight"),
    "all-biases": (_biased, "bias (BitFit on targets='all-linear' adds new ones; LNTuning and IA3 need none)"),
    "decoder": (_decoder, "module known to turn input_ids into hidden states"),
    "positions": (_positions, "module known for its positions"),
    "embeddings": (_embeddings, "input embedding"),
}


def group(model: nn.Module, name: str) -> list[str]:
    """The bare paths of a group of sites, in model order; of parameters, for "all-experts". Raises ValueError if the
    model has none.

    "sublayer-output" must have both of its halves: else a model would be adapted by half without a word.
    """
    for half in ("attention-output", "ffn-output") if name == "sublayer-output" else ():
        group(model, half)
    belongs, what = GROUPS[name]
    there = loose(model) if name == "all-experts" else sites(model)
    found = [path for path, site in there.items() if belongs(path, site, model)]
    if not found:
        raise ValueError(f"{type(model).__name__} has no {what}, so targets={name!r} finds nothing; "
                         "name its modules with targets=…")  # fmt: skip
    return found
