"""Well-known models by their shape: built on torch's meta device, so without weights, network or memory.

`shapes.json` has only configuration numbers, those of the config.json published with each model (`hub`), and the number
of parameters that its card or file states (`parameters`), where it does.
"""

from __future__ import annotations

import difflib
import functools
import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig



@functools.cache
def shapes() -> dict[str, dict[str, Any]]:
    """name -> {hub: id, parameters: as published or None, config: {…}} of the built-in shapes."""
    return json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))


def config_of(source: Any, **changes) -> PreTrainedConfig:
    """The transformers config that `source` names, with `changes` to its entries (architectures=["…"], num_labels=2).

    source: a built-in name ("llama-2-7b") or its Hub id, a config.json or the folder it is in, a dictionary like it, a
    config, or any Hub id, which is the only one that needs the network.
    Raises ValueError for a name that is none of these, TypeError for another kind of object.
    """
    from transformers import AutoConfig, PreTrainedConfig

    if isinstance(source, PreTrainedConfig):
        config = type(source).from_dict(source.to_dict())  # a copy: changes must not reach the caller's
    elif isinstance(source, Mapping):
        config = _from_entries(source)
    elif not isinstance(source, (str, os.PathLike)):
        raise TypeError("peftlab takes a model (torch.nn.Module), a transformers config or the name of one, not "
                        f"{type(source).__name__}")  # fmt: skip
    elif (name := _built_in(str(source))) is not None:
        config = _from_entries(shapes()[name]["config"])
    elif (path := Path(source).expanduser()).exists():
        config = _from_file(path / "config.json" if path.is_dir() else path)
    else:
        try:
            _reach_hub()
            config = AutoConfig.from_pretrained(str(source))
        except (OSError, ValueError) as error:
            raise ValueError(_unknown(str(source), error)) from None
    for key, value in changes.items():
        setattr(config, key, value)
    return config


def meta_model(source: Any, **changes) -> nn.Module:
    """The model that `source` names (see `config_of`) on the meta device: all of its tensors, none of their numbers.

    Its class is the config's architecture, else what transformers' Auto classes choose: a language model if they can.
    """
    import transformers

    config = config_of(source, **changes)
    named = [getattr(transformers, name, None) for name in config.architectures or ()]
    autos = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForMaskedLM", "AutoModel")
    known = [getattr(transformers, auto)._model_mapping for auto in autos]
    kinds = [kind for kind in named if kind is not None] + [m[type(config)] for m in known if type(config) in m]
    if not kinds:
        raise ValueError(f"transformers has no model for a {type(config).__name__}; build the model under "
                         "torch.device('meta') yourself and pass that")  # fmt: skip
    with torch.device("meta"):
        return kinds[0](config).eval()


def _built_in(name: str) -> str | None:
    found = name.strip().lower()
    return next((n for n, entry in shapes().items() if found in (n, str(entry["hub"]).lower())), None)


def _from_entries(entries: Mapping[str, Any]) -> PreTrainedConfig:
    from transformers import AutoConfig

    rest = dict(entries)
    kind = rest.pop("model_type", None)
    if kind is None:
        raise ValueError("the config has no 'model_type' (\"llama\", \"gpt2\", …), so its class is unknown; add it")
    return AutoConfig.for_model(kind, **rest)  # ValueError for a kind that transformers does not know


def _from_file(path: Path) -> PreTrainedConfig:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"the folder {path.parent} has no config.json") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no JSON file of a config: {error}") from None
    if not isinstance(entries, Mapping):
        raise ValueError(f"{path} holds a {type(entries).__name__}, not the entries of a config")
    return _from_entries(entries)


def _reach_hub() -> None:
    """OSError at once where there is no network: the Hub's client would try for half a minute."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() not in ("1", "ON", "YES", "TRUE"):
        host = urlparse(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname
        proxies = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")
        if not any(os.environ.get(name) for name in proxies):  # behind a proxy names are resolved there
            socket.getaddrinfo(host, 443)


def _unknown(name: str, error: Exception) -> str:
    word = name.rpartition("/")[2].lower()
    close = difflib.get_close_matches(word, shapes(), n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else f". Built in are: {', '.join(shapes())}."
    reason = str(error).strip().split("\n")[0].rstrip(".")
    return (f"no built-in shape, file or folder is named {name!r}{hint} The Hugging Face Hub was asked too and gave no "
            f"config ({reason}); a config.json or a transformers config will do instead")  # fmt: skip
