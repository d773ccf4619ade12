"""The base models: the small one that the course ships, or any other by name or folder."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import torch

from ..paths import DATA

EMBEDDED = DATA / "base"


def base_name(name: str | os.PathLike | None = None) -> str:
    """What `load_base` would load: the argument, else PEFTLAB_BASE, else the embedded model's folder."""
    return str(name or os.environ.get("PEFTLAB_BASE") or EMBEDDED)


def no_such_base(name: str, error: Exception) -> Exception:
    """A load error in words that say what is missing and what helps."""
    folder = Path(name)
    if name == str(EMBEDDED):
        return FileNotFoundError(f"the embedded base model is not in {folder}; run `git checkout data/base`, or train "
                                 "it anew with `python -m peftlab.base`")  # fmt: skip
    if folder.is_dir():
        return ValueError(f"the folder {name!r} holds no model that transformers can read: {error}")
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        return FileNotFoundError(f"there is no folder {name!r}; give a folder with config.json and model.safetensors, "
                                 "a Hub id such as 'Qwen/Qwen3-0.6B', or nothing for the embedded model")  # fmt: skip
    return OSError(f"{name!r} is neither a folder nor a model that the Hugging Face Hub would give us now ({error}). "
                   "Check the spelling, the network and, for a gated model, `hf auth login`; without network, "
                   "unset PEFTLAB_BASE to use the embedded model")  # fmt: skip


@contextlib.contextmanager
def quiet():
    """No weight-loading progress bars in notebooks: their text is stored and compared."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def load_base(
    name: str | os.PathLike | None = None, device: str | torch.device | None = None, dtype: torch.dtype | None = None,
    quantize: str | None = None,
) -> tuple[Any, Any]:  # fmt: skip
    """(model, tokenizer) of a base model, in eval mode.

    name: a Hub id or a folder; default: the environment's PEFTLAB_BASE, else the embedded model (3.4M parameters).
    device: default the GPU if there is one. dtype: default float32 for the embedded model, else as stored.
    quantize: "nf4" or another kind, to pack its layers while they are read (see `load_quantized`); default: dense.
    Raises FileNotFoundError, OSError or ValueError that say what is missing.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = base_name(name)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(name)
            if quantize is None:
                model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype or "auto", use_safetensors=True)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise no_such_base(name, RuntimeError(first)) from None
    if quantize is not None:
        from ..nf4_loading import load_quantized

        model = load_quantized(name, kind=quantize, dtype=dtype, device=device)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # many Hub models have none; padding is masked, so any token does
    return model.to(device).eval(), tokenizer
