"""One file per run that a killed training goes on from: safetensors with JSON in its header, replaced atomically."""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .attach import adapters
from .paths import atomic_write

FILE = "checkpoint.safetensors"


def save(folder: str | Path, groups: Mapping[str, Mapping[str, Tensor]], state: dict) -> None:
    """Write groups of tensors and a JSON-able state; the checkpoint before stays until the last byte is on disk.

    Raises OSError, naming the folder, when the disk is full or may not be written.
    """
    from safetensors.torch import save as pack

    folder, text = Path(folder), json.dumps(state)
    tensors, memory = {}, set()
    for group, entries in groups.items():
        for name, t in entries.items():
            t = t.detach().cpu().contiguous()
            shared = t.data_ptr() in memory  # 8-bit optimizers share a table, and safetensors wants each tensor apart
            tensors[f"{group}.{name}"] = t.clone() if shared else t
            memory.add(t.data_ptr())
    content = pack(tensors, metadata={"state": text, "sha256": _sum(tensors, text)})
    try:
        for left_behind in folder.glob(f".{FILE}.*"):  # by a process killed while it wrote
            left_behind.unlink()
        atomic_write(folder / FILE, content)
    except OSError as error:
        why = "the disk is full" if error.errno == errno.ENOSPC else str(error)
        kept = "; the checkpoint before it is intact" if (folder / FILE).exists() else ""
        raise OSError(
            error.errno, f"no checkpoint written to {folder}: {why}{kept}. Make room, then run again"
        ) from error


def load(folder: str | Path) -> tuple[dict[str, Tensor], dict] | None:
    """The tensors and the state in `folder`, or None if there is no checkpoint. ValueError if the file is damaged."""
    from safetensors import SafetensorError, safe_open

    path = Path(folder) / FILE
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        if header["sha256"] != _sum(tensors, header["state"]):
            raise ValueError("its checksum does not match")
        return tensors, json.loads(header["state"])
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged or not a checkpoint ({error}); delete it, or pass resume=False to start again"
        ) from error


def _sum(tensors: dict[str, Tensor], text: str) -> str:
    total = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        total.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        total.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def part(tensors: dict[str, Tensor], group: str) -> dict[str, Tensor]:
    """The tensors that were saved as one group, under their own names."""
    return {name.removeprefix(f"{group}."): t for name, t in tensors.items() if name.startswith(f"{group}.")}


def flatten(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict]:
    """An optimizer's state as named tensors and a JSON-able rest: no pickle."""
    whole = optimizer.state_dict()
    groups = [{k: v for k, v in group.items() if isinstance(v, int | float | None)} for group in whole["param_groups"]]
    tensors, rest = {}, {}
    for path, value in _flat(whole["state"], end=".").items():
        if isinstance(value, Tensor):
            tensors[path] = value
        elif isinstance(value, int | float | None):
            rest[path] = value
        else:
            name, key = type(optimizer).__name__, path.partition(".")[2]
            raise TypeError(f"{name} keeps {key!r} as {type(value).__name__}: only tensors and numbers can be saved")
    return tensors, {"groups": groups, "state": rest}


def unflatten(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], rest: dict) -> None:
    """Put back what `flatten` gave."""
    state: dict[int, dict[str, Any]] = {}
    for path, value in [*tensors.items(), *rest["state"].items()]:
        number, *inside, key = path.split(".")
        entries = state.setdefault(int(number), {})
        for name in inside:  # bitsandbytes keeps tensors in a dictionary of their own
            entries = entries.setdefault(name, {})
        entries[key] = value
    groups = [now | then for now, then in zip(optimizer.state_dict()["param_groups"], rest["groups"], strict=True)]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    for p, entries in optimizer.state.items():  # a file has rows one by one; fused kernels go by p's layout in memory
        for key, value in entries.items():
            if isinstance(value, Tensor) and value.shape == p.shape and value.stride() != p.stride():
                entries[key] = torch.empty_like(p, dtype=value.dtype).copy_(value)


def identity(model: nn.Module) -> dict:
    """What a checkpoint must have been made from: trained names and shapes, and a sample of every frozen tensor."""
    frozen, trained = hashlib.sha256(), {}
    moving = {id(getattr(a, name)) for made in adapters(model).values() for a in made.values() for name in a.memory}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.requires_grad:
            trained[name] = f"{list(tensor.shape)} {tensor.dtype}"
        elif id(tensor) not in moving:
            sample = tensor.detach().flatten()[:: max(1, tensor.numel() // 64)]
            frozen.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            frozen.update(sample.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return {"model": type(model).__name__, "trained": trained, "frozen weights": frozen.hexdigest()[:16]}


def compare(folder: str | Path, there: dict, here: dict) -> None:
    """Refuse a checkpoint of another model, data set or setting. ValueError names what differs."""
    flat = [_flat(there), _flat(here)]
    names = [name for name in dict.fromkeys([*flat[0], *flat[1]]) if flat[0].get(name) != flat[1].get(name)]
    if names:
        listed = [
            f"{name}: {flat[0].get(name, 'absent')} there, {flat[1].get(name, 'absent')} here" for name in names[:4]
        ]
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        raise ValueError(
            f"the checkpoint in {folder} belongs to another run ({'; '.join(listed)}{more}). "
            "Give the same model, data and settings, another folder, or resume=False to start again and replace it"
        )


def _flat(entries: dict, prefix: str = "", end: str = " ") -> dict:
    out: dict[str, Any] = {}
    for key, value in entries.items():
        out |= _flat(value, f"{prefix}{key}{end}", end) if isinstance(value, dict) else {f"{prefix}{key}": value}
    return out
