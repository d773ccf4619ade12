"""Read and write adapters in the file format of HF PEFT: adapter_config.json and adapter_model.safetensors.

The two libraries read each other's folders. Only JSON and safetensors are read, never pickle. A folder is checked as a
whole before the model is touched: after an error the model is as it was.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .attach import adapters, attach_plan, defaults_of, detach, find_targets, fitted, hosts, switch_of
from .core import METHODS, Adapted, Adapter
from .formats import LAYOUTS, PREFIX, Plan, parameters
from .layers import is_linear, is_quantised, weight_of
from .paths import atomic_files
from .replicate import replicated_as_saved, replication
from .sites import at, bare, sites

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
COPY, PARAMETERS = "ModuleCopy", "ParameterLoRA"
# settings that change nothing in what a finished adapter computes, or that the weights' own names say already
IGNORED = {
    "auto_mapping", "base_model_name_or_path", "exclude_modules", "fan_in_fan_out", "inference_mode", "layers_pattern",
    "layers_to_transform", "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "revision",
    "layer_replication", "runtime_config", "target_modules", "task_type", "megatron_core", "ensure_weight_tying",
    "eva_config",
}  # fmt: skip
HEADED = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
BASE_CHANGING = ("pissa", "olora", "corda", "lora_ga", "loftq")  # initialisations that alter the base too


def task_type(model: nn.Module) -> str | None:
    """HF PEFT's name of what a model is for, by the end of its class's name."""
    endings = {"ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForSequenceClassification": "SEQ_CLS",
               "ForConditionalGeneration": "SEQ_2_SEQ_LM", "ForTokenClassification": "TOKEN_CLS",
               "ForQuestionAnswering": "QUESTION_ANS"}  # fmt: skip
    return next((task for end, task in endings.items() if type(model).__name__.endswith(end)), None)


def base_name(model: nn.Module) -> str | None:
    """The base's Hub id. A folder of this machine would mean nothing elsewhere, so it is not written into a file."""
    name = getattr(getattr(model, "config", None), "name_or_path", None)
    return None if not name or Path(name).exists() else name


def endings_of(model: nn.Module, paths: list[str]) -> list[str]:
    """Path endings that name exactly these modules: the last words if they suffice, else the whole paths."""
    endings = sorted({p.rsplit(".", 1)[-1] for p in paths})
    return endings if set(find_targets(model, endings)) == set(paths) else sorted(paths)


def _fingerprint(model: nn.Module, paths) -> dict[str, str]:
    """The first numbers of some adapted layers' weights, and how far packing may have moved them: enough to notice an
    adapter on another base, and not to mind its own base in four bits."""
    found, room = {}, {}
    for path in sorted(paths)[:: max(1, len(paths) // 8)]:
        for numbers, moved in _first(model, path)[:1]:
            found[path] = [round(v, 6) for v in numbers.tolist()]
            if moved:
                room[path] = round(moved, 6)
    return {"peftlab_base": json.dumps(found)} | ({"peftlab_packed": json.dumps(room)} if room else {})


def _first(model: nn.Module, path: str) -> list[tuple[Tensor, float]]:
    """The first eight numbers along W (out, in) of the layer at a path, or of the first one inside of it, and along Wᵀ;
    with each the largest error that four bits can have made in them. Empty if there are no values.

    Along Wᵀ, as a Conv1D lies in memory: older files of adapters on GPT-2 hold these.
    """
    layers = [bare(module) for module in _bare(model, path).modules()]
    layer = next((m for m in layers if is_quantised(m) or next(m.parameters(recurse=False), None) is not None), None)
    stored = getattr(layer, "weight", None)
    if not isinstance(stored, Tensor):
        stored = None if layer is None else next(layer.parameters(recurse=False), None)
    if layer is None or stored is None or stored.is_meta or not (is_quantised(layer) or stored.is_floating_point()):
        return []
    W = (weight_of(layer) if is_linear(layer) else stored).detach()
    W = W.unsqueeze(0) if W.dim() < 2 else W.flatten(1)
    out_features, in_features = W.shape
    k, found = torch.arange(min(8, W.numel())), []
    for i, j in ((k // in_features, k % in_features), (k % out_features, k // out_features)):
        room = 0.0
        if is_quantised(layer):  # half of NF4's widest step is 0.152 of the block's largest
            block = getattr(layer, "block", 64)
            starts = {n // block * block for n in (i * in_features + j).tolist()}
            room = 0.17 * max(W.view(-1)[start : start + block].abs().max().item() for start in starts)
        found.append((W[i, j].float().cpu(), room))
    return found


def _bare(model: nn.Module, path: str) -> nn.Module:
    site = at(model, path)
    return (site.original or site.layer) if isinstance(site, Adapted) else site


def save_adapter(model: nn.Module, folder: str | os.PathLike, name: str = "default") -> Path:
    """Write the named adapter into `folder`, in HF PEFT's format; returns the folder.

    Both files are complete on disk before either takes its name; other files in the folder are left alone.
    Raises ValueError for an unknown name or values that are not finite, OSError when it cannot be written.
    """
    from safetensors.torch import save

    there = adapters(model)
    if name not in there:
        raise ValueError(f"no adapter named {name!r} is attached. Attached: {', '.join(there) or 'none'}")
    found = there[name]
    copies = {p: a for p, a in found.items() if type(a).__name__ == COPY}
    main = {p: a.saved() for p, a in found.items() if p not in copies and type(a).part_of is None}
    loose = {p: a for p, a in found.items() if type(a).__name__ == PARAMETERS}
    ones = {f"{p}.{n}": one for p, a in loose.items() for n, one in a.each.items()}
    kinds = {type(a) for a in main.values()} | {METHODS[a.part_of] for a in loose.values() if a.part_of}
    if len(kinds) > 1:
        raise ValueError(f"adapter {name!r} mixes {', '.join(k.__name__ for k in kinds)}: HF PEFT's format holds one "
                         "method a folder; attach them under two names")  # fmt: skip
    if not main and not copies and not loose:
        what = ", ".join(sorted({type(a).__name__ for a in found.values()}))
        raise ValueError(f"{name!r} is {what}, which trains nothing: there is nothing to save; attach it anew")
    method, task = kinds.pop() if kinds else METHODS[COPY], task_type(model)
    settings: dict[str, Any]
    if method.hf_type in LAYOUTS:
        tensors, settings = LAYOUTS[method.hf_type].to_hf(model, main)
    else:
        named = method.hf_params
        tensors = {f"{PREFIX}{p}.{named.get(n, n)}": t for p, a in main.items() for n, t in a.state_dict().items()}
        settings = {"target_modules": endings_of(model, list(main)) if main else [], "modules_to_save": None,
                    **settings_of(method, main | ones)}  # fmt: skip
    if loose:
        more, settings["target_parameters"] = parameters.to_hf(model, loose)
        tensors |= more
    for path, adapter in copies.items():
        tensors |= {f"{_root(tensors)}{path}.{n}": t for n, t in adapter.module.state_dict().items()}
    if copies:
        settings["modules_to_save"] = endings_of(model, list(copies))
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{key} of adapter {name!r} holds NaN or inf; nothing was written")
    config: dict[str, Any] = {
        "peft_type": method.hf_type or method.__name__.upper(),
        "task_type": task if copies or task not in HEADED else None,  # there HF PEFT insists on a saved head
        "base_model_name_or_path": base_name(model),
        "inference_mode": True,
        **({"layer_replication": ranges} if (ranges := replication(model)) else {}),
        **settings,
    }
    data = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    metadata = {"format": "pt", **_fingerprint(model, list(main) or list(loose) or list(copies))}
    folder = Path(folder)
    atomic_files({folder / WEIGHTS: save(data, metadata), folder / CONFIG: json.dumps(config, indent=2) + "\n"})
    return folder


def _root(tensors: Mapping[str, Tensor]) -> str:
    """What HF PEFT writes before a module's path: soft prompts wrap the model once, all other methods twice."""
    return "base_model." if "prompt_embeddings" in tensors else PREFIX


def hyper_names(method: type[Adapter]) -> dict[str, str]:
    """Our hyper-parameter -> its name in adapter_config.json; a method that HF PEFT has not keeps its own names."""
    return method.hf_hyper if method.hf_type else {name: name for name in defaults_of(method)}


def patterns_of(method: type[Adapter]) -> dict[str, str]:
    """Our hyper-parameter -> the entry of adapter_config.json that holds it layer by layer; others are one a file."""
    return {ours: theirs for ours, theirs in method.hf_patterns.items() if ours in hyper_names(method)}


def settings_of(method: type[Adapter], main: Mapping[str, Adapter]) -> dict[str, Any]:
    """Hyper-parameters as HF PEFT spells them; layers that differ from the most common value go into its patterns."""
    settings: dict[str, Any] = dict(method.hf_flags)
    if any(type(site).__name__ == "Conv1D" for site in (a.layer for a in main.values())):
        settings["fan_in_fan_out"] = True
    for ours, theirs in hyper_names(method).items():
        values = {path: adapter.hyper[ours] for path, adapter in main.items()}
        if not values:
            continue
        common = Counter(values.values()).most_common(1)[0][0]
        head, _, tail = theirs.partition(".")  # "kasa_config.beta" is an entry of a section
        if tail:
            settings[head] = {**_section(settings, head), tail: common}
        else:
            settings[theirs] = common
        rest = {path: value for path, value in values.items() if value != common}
        if rest and ours not in patterns_of(method):
            raise ValueError(f"{ours} differs between layers, which HF PEFT's format cannot express")
        if rest:
            settings[patterns_of(method)[ours]] = rest
    return settings


def _section(config: Mapping[str, Any], head: str) -> dict[str, Any]:
    """What a config holds under `head`, if that is a section of its own."""
    return found if isinstance(found := config.get(head), dict) else {}


def _given(config: Mapping[str, Any], method: type[Adapter]) -> dict[str, Any]:
    """Our hyper-parameters, of those that a config names."""
    given = {}
    for ours, theirs in hyper_names(method).items():
        head, _, tail = theirs.partition(".")
        where, key = (_section(config, head), tail) if tail else (config, theirs)
        if key in where:
            given[ours] = where[key]
    return given


def read_folder(folder: Path) -> tuple[dict, dict[str, Tensor], dict[str, str]]:
    """(config, tensors, metadata) of an adapter folder, or an error that says what is wrong with which file."""
    from safetensors import SafetensorError, safe_open

    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder} is no adapter folder: it has no {CONFIG}")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("not a JSON object")
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG} is damaged ({error}); save or download the adapter again") from None
    if not (folder / WEIGHTS).is_file():
        pickled = (folder / "adapter_model.bin").exists()
        raise FileNotFoundError(f"{folder} has no {WEIGHTS}" + (
            "; adapter_model.bin is pickle, which can run any code and is not read: re-save it with HF PEFT "
            "(save_pretrained writes safetensors)" if pickled else ""))  # fmt: skip
    try:
        with safe_open(folder / WEIGHTS, "pt") as f:
            tensors, metadata = {k: f.get_tensor(k) for k in f.keys()}, f.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{folder / WEIGHTS} is truncated or damaged ({error}); copy or download it again") from None
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"{folder / WEIGHTS} holds NaN or inf in {key}: a damaged file or a diverged training")
    return config, tensors, metadata


def method_of(config: dict, folder: Path) -> type[Adapter]:
    """The method a config asks for; settings that would change its meaning and that we do not know are refused."""
    from . import methods  # noqa: F401  fills METHODS

    kind = config.get("peft_type")
    if not isinstance(kind, str):
        raise ValueError(f"{folder / CONFIG}: peft_type={kind!r} names no method; save or download the adapter again")
    named = [m for n, m in METHODS.items() if kind in (m.hf_type, n.upper())]
    fitting = [m for m in named if all(config.get(key) == value for key, value in m.hf_flags.items())]
    found = max(fitting, key=lambda m: len(m.hf_flags), default=None)
    if found is None:
        known = sorted({m.hf_type for m in METHODS.values() if m.hf_type})
        raise ValueError(f"{folder / CONFIG}: peft_type {kind!r} is not implemented here; there are {', '.join(known)}")
    layout = LAYOUTS.get(found.hf_type or "")
    named_in = {theirs.partition(".")[0] for theirs in hyper_names(found).values()}
    understood = {*IGNORED, *named_in, *patterns_of(found).values(), *(layout.known if layout else ()),
                  *found.hf_flags, *found.hf_ignored}  # fmt: skip
    for key, value in config.items():
        init = key.startswith("init_")
        if init and isinstance(value, str) and value.lower().startswith(BASE_CHANGING):
            raise ValueError(f"{folder / CONFIG}: {key}={value!r} changed the base weights when training began, so the "
                             "adapter does not fit the original base; convert it with HF PEFT's "
                             "path_initial_model_for_weight_conversion")  # fmt: skip
        unset = value in (None, False, "none", "", [], {}) or key.endswith("_config")
        if not (init or unset or key in understood):
            raise ValueError(f"{folder / CONFIG}: {key}={value!r} is a variant that {found.__name__} here has not")
    return found


@contextmanager
def _reading(folder: Path, method: type[Adapter], model: nn.Module) -> Iterator[None]:
    """Whatever reading a foreign file trips over, a number of the wrong kind or a tensor of the wrong form, is a
    ValueError that names the file."""
    try:
        yield
    except ValueError as error:
        raise error if str(folder) in str(error) else ValueError(f"{folder}: {error}") from None
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError) as error:
        raise ValueError(f"{folder} cannot be read as {method.__name__} for this {type(model).__name__}: {error!r}"
                         ) from error  # fmt: skip


def _plan(model: nn.Module, config: dict, tensors: dict[str, Tensor], method: type[Adapter], folder: Path):
    """({path: (method, hyper)}, {path: {our parameter: tensor}}) of a file, checked against the model's modules."""
    there = sites(model)
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(s, str) for s in saved):
        raise ValueError(f"{folder / CONFIG}: modules_to_save={saved!r} is no list of ends of paths")
    nothing = not tensors
    weights: dict[str, dict[str, Tensor]] = {}
    copies: dict[str, dict[str, Tensor]] = {}
    for key, tensor in list(tensors.items()):
        inside = key.removeprefix(_root(tensors))
        owners = (p for p in there if inside.startswith(p + ".") and any(f".{p}".endswith(f".{s}") for s in saved))
        if owner := next(owners, None):
            copies.setdefault(owner, {})[f"module.{inside.removeprefix(owner + '.')}"] = tensor
            del tensors[key]
    if method.hf_type in LAYOUTS:
        try:
            plan, weights = LAYOUTS[method.hf_type].from_hf(model, method, config, tensors)
        except (KeyError, ValueError) as error:
            raise ValueError(f"{folder} cannot be read as {method.hf_type} for this {type(model).__name__}: {error}"
                             ) from None  # fmt: skip
    else:
        try:
            loose, others = parameters.from_hf(model, config.get("target_parameters") or [], tensors)
        except ValueError as error:
            raise ValueError(f"{folder / WEIGHTS} does not fit: {error}") from None
        for key, tensor in tensors.items():
            path, parameter = _place(key.removeprefix(PREFIX), method, there)
            if path not in there:
                raise ValueError(f"{folder / WEIGHTS} holds {key!r}, for which {type(model).__name__} has no module: "
                                 "this is an adapter of another model")  # fmt: skip
            weights.setdefault(path, {})[parameter] = tensor
        by_layer = {ours: config.get(theirs) for ours, theirs in patterns_of(method).items()}
        given, paths = _given(config, method), [*(path for path in there if path in weights), *loose]
        try:  # one that works on others, which may be read later or be in training, sits where the file says
            planned = dict.fromkeys(paths, (method, given)) if method.on_others else method.plan(model, paths, given)
        except ValueError as error:
            raise ValueError(f"{folder} cannot be read as {method.__name__} for this {type(model).__name__}: {error}"
                             ) from None  # fmt: skip
        plan, weights = fitted(planned, method, by_layer), weights | others
    if nothing:
        raise ValueError(f"{folder / WEIGHTS} holds no tensors: nothing was saved in it; save or download it again")
    return plan | {path: (METHODS[COPY], {}) for path in copies}, weights | copies


def _place(key: str, method: type[Adapter], there: Mapping[str, nn.Module]) -> tuple[str, str]:
    """(path, our parameter) of a key: by the method's table of names, else the longest path that it begins with."""
    for ours, theirs in method.hf_params.items():
        if key.endswith(f".{theirs}"):
            return key.removesuffix(f".{theirs}"), ours
    path = max((p for p in there if key.startswith(f"{p}.")), key=len, default="")
    return path, key.removeprefix(f"{path}.")


def _check_base(model: nn.Module, metadata: Mapping[str, str], folder: Path) -> None:
    packed = json.loads(metadata.get("peftlab_packed", "{}"))
    for path, numbers in json.loads(metadata.get("peftlab_base", "{}")).items():
        there, here = torch.tensor(numbers), _first(model, path)
        room = packed.get(path, 0.0) + 1e-4  # and rtol: room for a bf16 copy of the base
        if here and not any(torch.allclose(n[: len(there)], there, rtol=0.02, atol=room + more) for n, more in here):
            raise ValueError(f"the adapter in {folder} was trained on another base: the weights of {path!r} differ. "
                             "Load that base, or pass check_base=False to use it all the same")  # fmt: skip


def load_adapter(
    model: nn.Module, folder: str | os.PathLike, name: str = "default", *, check_base: bool = True
) -> nn.Module:
    """Attach the adapter saved in `folder` (by us or by HF PEFT) under `name`, and make it the active one.

    If an adapter of that name, method and hyper-parameters is attached already, its values are replaced in place: a
    compiled model is not compiled again, and what is active stays so. Raises FileNotFoundError or ValueError (damaged
    file, other model, other base, unknown variant) with the model as it was before. Returns the model.
    """
    folder = Path(folder)
    config, tensors, metadata = read_folder(folder)
    with replicated_as_saved(model, config.get("layer_replication")):
        return _load(model, folder, name, check_base, config, tensors, metadata)


def _load(model: nn.Module, folder: Path, name: str, check_base: bool, config: dict, tensors: dict[str, Tensor],
          metadata: dict[str, str]) -> nn.Module:  # fmt: skip
    method = method_of(config, folder)
    with _reading(folder, method, model):
        plan, weights = _plan(model, config, tensors, method, folder)
        if check_base:
            _check_base(model, metadata, folder)
    swap = name in adapters(model)
    before = (switch_of(model).active, switch_of(model).rows) if hosts(model) else None
    trainable = None if hosts(model) else [p for p in model.parameters() if p.requires_grad]
    if swap:
        _check_swap(adapters(model)[name], plan, folder, name)
    else:
        with _reading(folder, method, model):
            attach_plan(model, name, plan)
    try:
        _fill(adapters(model)[name], weights, folder, name)
    except BaseException:
        if not swap:
            detach(model, name)
            if before:
                switch_of(model).active, switch_of(model).rows = before
            for parameter in trainable or ():
                parameter.requires_grad_(True)
        raise
    return model


def _check_swap(attached: Mapping[str, Adapter], plan: Plan, folder: Path, name: str) -> None:
    """ValueError if values alone do not make the attached adapter the saved one: another method, alpha or token."""
    for path, (method, hyper) in plan.items():
        there = attached.get(path)
        if there is None:
            continue  # `_fill` says so
        if type(there) is not method:
            raise ValueError(f"adapter {name!r} is {type(there).__name__} on {path!r} and {method.__name__} in "
                             f"{folder}; detach it first")  # fmt: skip
        for key, value in hyper.items():
            value = tuple(value) if isinstance(value, list) else value
            if there.hyper[key] != value and key != "dropout":  # that is for training alone
                raise ValueError(f"adapter {name!r} has {key}={there.hyper[key]!r} on {path!r}, and {value!r} in "
                                 f"{folder}; detach it first")  # fmt: skip


@torch.no_grad()
def _fill(into: dict[str, Adapter], weights: dict[str, dict[str, Tensor]], folder: Path, name: str) -> None:
    """Copy the tensors into the attached adapter; every name and shape is checked before the first copy."""
    into = {path: adapter for path, adapter in into.items() if type(adapter).part_of is None or path in weights}
    if set(into) != set(weights):
        other = sorted(set(into) ^ set(weights))[0]
        raise ValueError(f"adapter {name!r} is attached to other layers than {folder} ({other!r}); detach it first")
    copies: list[tuple[Tensor, Tensor]] = []
    for path, adapter in into.items():
        want = adapter.state_dict(keep_vars=True)
        odd = set(want) ^ set(weights[path])
        if odd:
            raise ValueError(f"{folder / WEIGHTS} and the model disagree on {path!r}: only one has {sorted(odd)[0]!r}")
        for key, tensor in weights[path].items():
            if want[key].is_floating_point() and not tensor.is_floating_point():
                raise ValueError(f"{folder / WEIGHTS}: {path}.{key} holds {tensor.dtype}, where fractions are needed")
            if want[key].shape != tensor.shape:
                raise ValueError(f"{folder / WEIGHTS}: {path}.{key} is {tuple(tensor.shape)}, this model needs "
                                 f"{tuple(want[key].shape)}: an adapter of another model or rank")  # fmt: skip
            copies.append((want[key], tensor))
    for there, tensor in copies:
        there.copy_(tensor)
