"""Hand a fine-tuned model over: to transformers, HF PEFT, llama.cpp, Ollama; and see beforehand what a tool refuses.

The model in memory is only read: adapters are folded in copies of their layers, one layer at a time, in float64. Files
and folders appear under their names when they are complete; after an error, what was there before is there still.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .attach import Sharing, adapters, check_attached, did_you_mean, hosts, switch_of
from .core import METHODS, Adapted
from .files import base_name, read_folder, save_adapter
from .gguf import KINDS, Factors, check_path, write_lora, write_model
from .layers import dense, dtype_of, is_quantised
from .lowrank import product_of
from .model_card import MARK, About, card
from .paths import atomic_folder, atomic_write
from .provenance import provenance
from .replicate import check_untied
from .sites import put

__all__ = ["KINDS", "TARGETS", "About", "check", "lora_to_gguf", "merged_copy", "modelfile", "to_gguf", "to_ollama",
           "to_peft", "to_transformers"]  # fmt: skip

RECORD = "export.json"  # by which a folder of ours is known again
Names = str | Sequence[str] | None


def _names(model: nn.Module, name: Names) -> tuple[str, ...]:
    """The adapters meant: those named, else the active ones."""
    if name is None:
        return switch_of(model).active if hosts(model) else ()
    names = (name,) if isinstance(name, str) else tuple(name)
    check_attached(model, names)
    return names


def _one(model: nn.Module, name: Names) -> str:
    names = _names(model, name)
    if len(names) != 1:
        attached = ", ".join(adapters(model)) or "none"
        raise ValueError(f"a file holds one adapter, not {len(names)} ({', '.join(names) or 'none is active'}): name "
                         f"one, or combine them first. Attached: {attached}")  # fmt: skip
    return names[0]


def _check_model(model: nn.Module) -> None:
    if not hasattr(model, "save_pretrained") or not hasattr(model, "config"):
        raise ValueError(f"{type(model).__name__} is no model of transformers, so there is no folder format for it; "
                         "hand the adapter over: to_peft(model, folder, name)")  # fmt: skip


def _free(folder: str | os.PathLike, kind: str) -> Path:
    """The absolute folder, if an export may take its place: new, empty, or an export of the same kind."""
    path = Path(os.path.abspath(folder))
    here = Path.cwd()
    if path.is_symlink() or path.exists() and not path.is_dir():
        raise ValueError(f"{str(folder)!r} is a {'link' if path.is_symlink() else 'file'}; name a new folder")
    if path == here or path in here.parents:
        raise ValueError(f"{str(folder)!r} is the folder that you work in, or holds it; name a new folder")
    if not path.is_dir() or not any(path.iterdir()):
        return path
    try:
        record = json.loads((path / RECORD).read_text(encoding="utf-8"))
        ours = record["made_by"] == "peftlab.export" and record["kind"]
    except (OSError, ValueError, KeyError, TypeError):
        ours = None
    if ours != kind:
        what = f"an export to {ours}" if ours else "no export of peftlab"
        raise ValueError(f"{str(folder)!r} is there and is {what}, so it is left alone; name a new folder, or move "
                         "this one away")  # fmt: skip
    return path


def _check_card(path: Path) -> None:
    """ValueError for a model card of another's making."""
    if path.exists() and MARK not in path.read_text(encoding="utf-8", errors="replace"):
        raise ValueError(f"{path} is not a card of ours and is left alone; move it away, or choose another place")


def _describe(folder: Path, text: str, kind: str, names: Sequence[str]) -> None:
    """The card, and the record by which the folder is known again."""
    record = {"made_by": "peftlab.export", "kind": kind, "adapters": list(names), **provenance()}
    atomic_write(folder / "README.md", text)
    atomic_write(folder / RECORD, json.dumps(record, indent=2) + "\n")


# --- an ordinary model ----------------------------------------------------------------------------------------------


@torch.no_grad()
def merged_copy(model: nn.Module, name: Names = None, dtype: torch.dtype | None = None) -> nn.Module:
    """The model with adapters folded into its weights (default: the active ones), as an ordinary one without hosts.

    What no adapter touches is shared with `model`, packed layers too, so it costs the adapted layers only: read and
    save it, but do not train it. dtype: of all weights; default as they are, rounded once from float64.
    Raises ValueError, with the reason, for adapters that no weight can stand for; `model` is never changed.
    """
    names, there, sharing = _names(model, name), hosts(model), Sharing(model)
    check_untied(model)
    for path, host in there.items():  # what can be seen at once, outer layers first
        with _saying(host, names, path):
            host.check_merge(names)
    shared: dict[int, Any] = {id(t): t for m in model.modules() for t in (*m._parameters.values(), *m._buffers.values())
                              if t is not None}  # fmt: skip
    for path, host in reversed(there.items()):  # inner hosts first; deepcopy then finds them in its memo
        shared[id(host)] = _fold(host, names, path, sharing, dtype, shared)
    plain = copy.deepcopy(model, shared).eval()
    if dtype is not None:
        _cast(plain, dtype)
    return plain


def _untouched(host: Adapted) -> nn.Module:
    """The base's layer, even while adapters are merged."""
    return host.layer if host.original is None else host.original


def _fold(host: Adapted, names: Sequence[str], path: str, sharing: Sharing, dtype: torch.dtype | None,
          shared: dict[int, Any]) -> nn.Module:  # fmt: skip
    """What stands in for a host: its layer, with the named adapters folded into a copy of it."""
    layer = _untouched(host)
    here = [name for name in names if name in host.adapters]
    if not here:
        return copy.deepcopy(layer, shared)
    with _saying(host, here, path):
        if sharing.tied(layer):
            raise ValueError("it shares its weight with another module, and merging would untie them")
        folded = copy.deepcopy(layer).double()
        for name in here:
            folded = host.adapters[name].fold(folded)
    return folded.to(dtype or dtype_of(layer)).requires_grad_(False)


@contextlib.contextmanager
def _saying(host: Adapted, names: Sequence[str], path: str) -> Iterator[None]:
    """A refusal with the names, the place and the cure."""
    try:
        yield
    except ValueError as error:
        here = ", ".join(repr(name) for name in names if name in host.adapters)
        methods = [METHODS.get(a.part_of or "", type(a)) for n, a in host.adapters.items() if n in names]
        ours = next((method.__name__ for method in methods if method.hf_type is None), None)
        cure = (f"No other tool has {ours}: it stays peftlab's, save_adapter(model, folder, name)" if ours else
                "Hand it over as an adapter: to_peft(model, folder, name)")  # fmt: skip
        raise ValueError(f"{here} cannot be folded into {path!r}: {error}. {cure}") from None


def _cast(plain: nn.Module, dtype: torch.dtype) -> None:
    """New parameters of another dtype in the copy. Not `.to(dtype)`: it would change the shared ones in place."""
    cast: dict[int, nn.Parameter] = {}
    for module in plain.modules():
        for key, p in module._parameters.items():
            if p is not None and p.is_floating_point():
                cast.setdefault(id(p), nn.Parameter(p.to(dtype), requires_grad=False))  # tied ones once
                module._parameters[key] = cast[id(p)]


def _unpack(plain: nn.Module, dtype: torch.dtype | None) -> int:
    """Replace packed layers of a copy by dense ones; how many there were."""
    packed = [path for path, module in plain.named_modules() if is_quantised(module)]
    for path in packed:
        module = plain.get_submodule(path)
        put(plain, path, dense(module).to(dtype or dtype_of(module)))
    if getattr(plain.config, "quantization_config", None) is not None:
        del plain.config.quantization_config
    plain.hf_quantizer = None  # or transformers would ask it for the weights
    return len(packed)


def _check_fits(plain: nn.Module) -> None:
    """ValueError if a model that transformers builds from the config would have other weights: it would leave some out
    without an error, or draw them at random."""
    with torch.device("meta"):
        built = set(type(plain)(copy.deepcopy(plain.config)).state_dict())
    if odd := sorted(set(plain.state_dict()) ^ built):
        more = "has no place for" if odd[0] not in built else "needs"
        raise ValueError(f"a {type(plain).__name__} of this config {more} {odd[0]!r} ({len(odd)} such): a folder of "
                         "transformers cannot hold this model. If the config has an option for it (attention_bias, "
                         "mlp_bias), set it; else hand the adapter over: to_peft(model, folder, name)")  # fmt: skip


def to_transformers(
    model: nn.Module, folder: str | os.PathLike, tokenizer: Any = None, name: Names = None, *,
    dtype: torch.dtype | None = None, about: About | None = None,
) -> Path:  # fmt: skip
    """Write the merged model as an ordinary transformers folder; `AutoModelFor….from_pretrained(folder)` reads it.

    name: the adapters to fold in, innermost first; default the active ones. dtype: of the file, default as in memory.
    A base in four bits becomes dense: the numbers that its codes stand for, not those that it was packed from.
    An export that stands at `folder` is replaced as a whole; any other folder with something in it is refused.
    Raises ValueError for adapters that cannot be merged, OSError when it cannot be written; nothing is lost then.
    """
    _check_model(model)
    folder, about, names = _free(folder, "transformers"), about or About(), _names(model, name)
    plain = merged_copy(model, names, dtype)
    unpacked = _unpack(plain, dtype)
    _check_fits(plain)
    note = f"The weights are those of the base with {' + '.join(names)} folded in." if names else ""
    if unpacked:
        note += (f" {unpacked} layers of the base were packed in four bits; here they are dense, with the values their "
                 "codes stand for.")  # fmt: skip
    with atomic_folder(folder) as new:
        from .base import quiet

        with quiet():
            plain.save_pretrained(new)
            if tokenizer is not None:
                tokenizer.save_pretrained(new)
        _describe(new, card(model, names, "transformers", folder.name, about, note.strip()), "transformers", names)
    return folder


def to_peft(model: nn.Module, folder: str | os.PathLike, name: str | None = None, *, about: About | None = None
            ) -> Path:  # fmt: skip
    """Write one adapter in HF PEFT's format (`save_adapter`) with a model card beside it; returns the folder.

    name: default the active one. Raises ValueError for a README.md that is not ours, before anything is written.
    """
    folder, name = Path(folder), _one(model, name)
    _check_card(folder / "README.md")
    kind = "peft" if any(type(a).hf_type for a in adapters(model)[name].values()) else "peftlab"
    text = card(model, [name], kind, folder.name, about or About())
    save_adapter(model, folder, name)
    atomic_write(folder / "README.md", text)
    return folder


# --- llama.cpp and Ollama -------------------------------------------------------------------------------------------


def to_gguf(
    model: nn.Module, tokenizer: Any, path: str | os.PathLike, quantize: str = "f16", name: Names = None, *,
    about: About | None = None,
) -> Path:  # fmt: skip
    """Write the merged model (without adapters: the base) and its tokenizer as one GGUF file, with a card beside it.

    quantize: one of `KINDS`; f32 is exact, f16 and bf16 halve the file, q8_0 … q4_0 pack blocks of 32 weights.
    name: the adapters to fold in; default the active ones, () for the base alone.
    Raises ValueError for what llama.cpp would compute otherwise (architecture, rope scaling, tokenizer), with the cure.
    """
    path, about, names = check_path(path), about or About(), _names(model, name)
    _check_card(path.with_suffix(".md"))
    title = about.title or " + ".join([(base_name(model) or "peftlab base").rpartition("/")[2], *names])
    folded = f" with {' + '.join(names)} folded in" if names else ""
    note = f"The weights are those of the base{folded}, stored as {quantize}."
    text = card(model, names, "gguf", path.name, about, note)
    write_model(merged_copy(model, names), tokenizer, path, quantize, title=title, base=base_name(model),
                license=about.license)  # fmt: skip
    atomic_write(path.with_suffix(".md"), text)
    return path


def factors_of(model: nn.Module, name: str) -> dict[str, Factors]:
    """bare path -> (A, B, scale) of an adapter that is a low-rank product everywhere; else a ValueError says where not.

    Dropout does not count: what is handed over is what the adapter computes after training.
    """
    check_attached(model, [name])
    found = {}
    for path, adapter in adapters(model)[name].items():
        factors = product_of(adapter)
        if factors is None:
            raise ValueError(f"{name!r} is {type(adapter).__name__} at {path!r}, and a GGUF adapter holds low-rank "
                             f"products only. If it merges, to_lora(model, {name!r}, r=16, into='{name}_lora') "
                             "approximates it on linear layers, and to_gguf(model, tokenizer, path) merges it, which "
                             "is exact")  # fmt: skip
        found[path] = Factors(*factors)
    return found


def lora_to_gguf(
    model: nn.Module, path: str | os.PathLike, name: str | None = None, quantize: str = "f32", *,
    about: About | None = None,
) -> Path:  # fmt: skip
    """Write one LoRA adapter as a GGUF file, for `llama-cli -m base.gguf --lora path`, with a card beside it.

    Ranks and scales may differ between layers: the file has one α, the rest is folded into B (`gguf.scaled`).
    Raises ValueError for methods that are no low-rank product, a head that is tied, or layers llama.cpp does not know.
    """
    path, about, name = check_path(path), about or About(), _one(model, name)
    _check_card(path.with_suffix(".md"))
    factors, sharing, there = factors_of(model, name), Sharing(model), hosts(model)
    for place in factors:
        if sharing.tied(_untouched(there[place])):  # an adapter would act on both
            raise ValueError(f"{place!r} shares its weight with another module, and llama.cpp keeps one tensor for "
                             "both: train without it, or hand it over by to_peft(model, folder, name)")  # fmt: skip
    text = card(model, [name], "gguf-lora", path.name, about)
    write_lora(model, factors, path, quantize, title=about.title or name, base=base_name(model), license=about.license)
    atomic_write(path.with_suffix(".md"), text)
    return path


def modelfile(
    folder: str | os.PathLike, model: str = "model.gguf", adapter: str | None = None, tokenizer: Any = None, *,
    stop: Sequence[str] = (), context: int | None = None,
) -> Path:  # fmt: skip
    """Write Ollama's `Modelfile` into a folder, for `ollama create my-model -f Modelfile`; returns its path.

    model: a GGUF file in the folder, or the name of a model that Ollama has. adapter: a GGUF file in the folder.
    tokenizer: its end of text becomes a stop word; if it has a chat template, that (it is in the GGUF) stays in force,
    else prompts are passed on as they are. stop: further stop words. context: tokens (num_ctx).
    Source: docs.ollama.com/modelfile. Not run against Ollama itself.
    """
    folder = Path(folder)
    lines = []
    for word, file in (("FROM", model), ("ADAPTER", adapter)):
        if file is None:
            continue
        if Path(file).name != file and file.endswith(".gguf"):
            raise ValueError(f"{file!r} is not a plain file name; the Modelfile names files that stand beside it")
        if file.endswith(".gguf") and not (folder / file).is_file():
            raise FileNotFoundError(f"there is no {file} in {folder}; write it first: to_gguf or lora_to_gguf")
        lines.append(f"{word} ./{file}" if file.endswith(".gguf") else f"{word} {file}")
    words = [*([tokenizer.eos_token] if tokenizer is not None and tokenizer.eos_token else []), *stop]
    lines += [f"PARAMETER stop {json.dumps(word, ensure_ascii=False)}" for word in dict.fromkeys(words)]
    lines += [f"PARAMETER num_ctx {context}"] if context else []
    if model.endswith(".gguf") and not getattr(tokenizer, "chat_template", None):
        lines.append('TEMPLATE """{{ .Prompt }}"""')  # a base model continues text: nothing around it
    return atomic_write(folder / "Modelfile", "\n".join(lines) + "\n")


def to_ollama(
    model: nn.Module, tokenizer: Any, folder: str | os.PathLike, quantize: str = "f16", name: Names = None, *,
    merged: bool = True, about: About | None = None,
) -> Path:  # fmt: skip
    """A folder for Ollama: model.gguf, Modelfile, README.md; with merged=False the base and an adapter.gguf apart.

    Like `to_transformers`, it replaces an export of ours as a whole and refuses any other folder that is not empty.
    """
    folder, about, names = _free(folder, "ollama"), about or About(), _names(model, name)
    apart = None if merged else _one(model, name)
    with atomic_folder(folder) as new:
        to_gguf(model, tokenizer, new / "model.gguf", quantize, () if apart else names, about=about)
        if apart:
            lora_to_gguf(model, new / "adapter.gguf", apart, about=about)
        for extra in new.glob("*.md"):
            extra.unlink()  # one card for the folder
        modelfile(new, "model.gguf", "adapter.gguf" if apart else None, tokenizer)
        _describe(new, card(model, names, "ollama", folder.name, about), "ollama", names)
    return folder


# --- what a tool would refuse ---------------------------------------------------------------------------------------

TARGETS = ("vllm", "llama.cpp", "ollama", "peft", "transformers")
# vllm/config/lora.py (MaxLoRARanks, max_lora_rank = 16; the same in version 0.26); the rest from peft_helper.py,
# lora_weights.py and lora_model.py in vllm/lora, as of versions around 0.10 to 0.13. Not run against vLLM itself.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
VLLM_DEFAULT = 16
PROMPTS = {"PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CARTRIDGE"}


def check(target: str, folder: str | os.PathLike) -> list[str]:
    """What keeps a tool from using an adapter folder in HF PEFT's format: one line per problem, each with its cure.

    target: one of `TARGETS`. An empty list means that nothing is known against it. Only the folder's two files are
    read, not the base, so a layer that the tool's version of the base has not is not noticed.
    Raises ValueError for an unknown target, FileNotFoundError or ValueError for a folder that holds no whole adapter.
    """
    if target not in TARGETS:
        raise ValueError(f"unknown target {target!r}{did_you_mean(target, TARGETS)} Known: {', '.join(TARGETS)}")
    config, tensors, _ = read_folder(Path(folder))
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    return CHECKS[target](config, shapes)


def _plain_lora(tool: str, config: dict, shapes: dict[str, tuple]) -> list[str]:
    """What all servers of LoRA ask for: two factors a layer, and nothing else."""
    found, kind = [], config.get("peft_type")
    merge = "merge it into the whole model: to_transformers or to_gguf"
    if kind != "LORA":
        return [f"{tool} takes LoRA only, and this is {kind}. If it merges, to_lora(model, name, r=16, into=…) "
                f"approximates it, or {merge}"]  # fmt: skip
    if config.get("use_dora"):
        found.append(f"{tool} has no DoRA (use_dora): {merge}, which is exact")
    if config.get("modules_to_save"):
        found.append(f"{tool} takes no modules_to_save ({', '.join(config['modules_to_save'])}): {merge}, or train "
                     "without them")  # fmt: skip
    if config.get("bias", "none") != "none":
        found.append(f"{tool} leaves trained biases out (bias={config['bias']!r}): {merge}")
    if config.get("target_parameters"):
        found.append(f"{tool} takes no LoRA on parameters, such as experts in one tensor (target_parameters): {merge}")
    if config.get("trainable_token_indices") or any("trainable_tokens" in key for key in shapes):
        found.append(f"{tool} takes no trained tokens (trainable_token_indices): {merge}")
    factor = re.compile(r".*\.lora_(embedding_)?[AB](\.weight)?")
    saved = tuple(f".{module}." for module in config.get("modules_to_save") or ())
    odd = [key for key in shapes if not factor.fullmatch(key) and "trainable_tokens" not in key
           and "magnitude" not in key and not any(module in f".{key}" for module in saved)]  # fmt: skip
    if odd:
        found.append(f"{tool} knows no tensor {odd[0]!r} ({len(odd)} such): {merge}")
    return found


def _vllm(config: dict, shapes: dict[str, tuple]) -> list[str]:
    found = _plain_lora("vLLM", config, shapes)
    if config.get("peft_type") != "LORA":
        return found
    rank = max([config["r"], *(shape[0] for key, shape in shapes.items() if ".lora_A" in key)])
    room = next((r for r in VLLM_RANKS if r >= rank), None)
    same = f"to_lora(model, name, r={rank}, into=…) makes one rank and one alpha of them"
    for pattern in ("rank_pattern", "alpha_pattern"):
        if config.get(pattern):  # LoRALayerWeights.from_config: alpha / r of the config for each layer, and no word
            found.append(f"vLLM ignores {pattern} and would scale those layers wrongly: {same}")
    if room is None:
        found.append(f"vLLM serves ranks up to {VLLM_RANKS[-1]}, this one has {rank}: to_lora(model, name, "
                     f"r={VLLM_RANKS[-1]}, into=…), or merge it: to_transformers")  # fmt: skip
    elif rank > VLLM_DEFAULT:
        found.append(f"vLLM's limit is rank {VLLM_DEFAULT} by default, this one has {rank}: start it with "
                     f"--max-lora-rank {room}, or to_lora(model, name, r={VLLM_DEFAULT}, into=…)")  # fmt: skip
    if any(".c_attn." in key or ".c_fc." in key for key in shapes):  # GPT2LMHeadModel is no SupportsLoRA
        found.append("vLLM's GPT-2 takes no adapters: merge it: to_transformers")
    if any("lm_head" in key or "lora_embedding" in key for key in shapes):
        found.append("only some of vLLM's models take adapters on lm_head or the embedding (embedding_modules in the "
                     "model's class): train without them, or merge it: to_transformers")  # fmt: skip
    return found


def _llama_cpp(config: dict, shapes: dict[str, tuple]) -> list[str]:
    found = _plain_lora("llama.cpp", config, shapes)
    if any("lora_embedding" in key for key in shapes):
        found.append("lora_to_gguf writes no adapters on the embedding: merge it: to_gguf")
    if any("lm_head" in key for key in shapes):
        found.append("llama.cpp takes an adapter on lm_head only if the base's head is not tied to its embedding; if "
                     "it is tied, train without it")  # fmt: skip
    return found


def _ollama(config: dict, shapes: dict[str, tuple]) -> list[str]:
    return [problem.replace("llama.cpp", "Ollama (llama.cpp)", 1) for problem in _llama_cpp(config, shapes)]


def _peft(config: dict, shapes: dict[str, tuple]) -> list[str]:
    """What we write under a peft_type of our own is for us alone."""
    from . import methods  # noqa: F401  fills METHODS

    kind = config.get("peft_type")
    ours = next((m for n, m in METHODS.items() if m.hf_type is None and kind == n.upper()), None)
    return [f"HF PEFT has no {ours.__name__}: load it with peftlab, or, if it merges, to_transformers"] if ours else []


def _transformers(config: dict, shapes: dict[str, tuple]) -> list[str]:
    """model.load_adapter(folder) of transformers, by way of HF PEFT. Source: integrations/peft.py, transformers 5."""
    found, kind = _peft(config, shapes), config.get("peft_type")
    if kind in PROMPTS:
        found.append(f"transformers' load_adapter takes no prompts ({kind}): PeftModel.from_pretrained of HF PEFT does")
    return found


CHECKS: dict[str, Callable[[dict, dict[str, tuple]], list[str]]] = {
    "vllm": _vllm, "llama.cpp": _llama_cpp, "ollama": _ollama, "peft": _peft, "transformers": _transformers,
}  # fmt: skip
