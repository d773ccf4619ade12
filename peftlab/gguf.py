"""Models and low-rank adapters as GGUF files, which llama.cpp, Ollama and LM Studio read.

A GGUF file is a header of named values (sizes, vocabulary, …), a list of tensors, and their numbers. What llama.cpp
expects differs from transformers in three things: tensors have other names; the rows of W_q and W_k of a Llama stand in
another order (`interleave`); and an adapter has one α for all layers (`scaled`). Names and meanings were read off
llama.cpp's source as of llama-cpp-python 0.3.36: src/models/*.cpp, src/llama-adapter.cpp and .h, src/llama-vocab.cpp.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .layers import is_linear, shape_of, weight_of

# Types that `gguf.quants.quantize` makes. K-quants ("q4_k_m") are made by llama.cpp's own llama-quantize.
KINDS = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
CONVERTER = "to_transformers(model, folder), then llama.cpp's own convert_hf_to_gguf.py on that folder, may know it"

# transformers' module -> llama.cpp's tensor; those of a block without "model.layers.3." and "blk.3."
NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "transformer.wte": "token_embd", "transformer.wpe": "position_embd", "transformer.ln_f": "output_norm",
    "ln_1": "attn_norm", "ln_2": "ffn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
}  # fmt: skip
BLOCK = re.compile(r"(?:model\.layers|transformer\.h)\.(\d+)\.(.+)")
QKV, FFN = {"attn_q", "attn_k", "attn_v"}, {"ffn_gate", "ffn_up", "ffn_down"}


class Architecture(NamedTuple):
    """What llama.cpp's graph of an architecture can express.

    name: llama.cpp's. biases: tensors whose bias it reads. ropes: rope types that it computes.
    interleaved: whether its rotary embedding turns neighbouring rows (2i, 2i+1) instead of (i, i + d/2).
    square: whether heads·head_dim must be the width.
    """

    name: str
    biases: frozenset[str]
    ropes: tuple[str, ...]
    interleaved: bool = False
    square: bool = False


LLAMA = Architecture("llama", frozenset(QKV | FFN | {"attn_output"}), ("default", "linear", "llama3"), interleaved=True)
ARCHITECTURES = {
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": LLAMA,
    "Qwen2ForCausalLM": Architecture("qwen2", frozenset(QKV), ("default", "linear"), square=True),
    "Qwen3ForCausalLM": Architecture("qwen3", frozenset(QKV), ("default", "linear")),
    "GPT2LMHeadModel": Architecture("gpt2", frozenset({"attn_norm", "attn_qkv", "attn_output", "ffn_norm", "ffn_up",
                                                       "ffn_down", "output_norm"}), (), square=True),
}  # fmt: skip


def _library() -> Any:
    try:
        import gguf
    except ImportError:
        raise ModuleNotFoundError("GGUF files need the package gguf: pip install gguf, or peftlab[gguf]") from None
    return gguf


def architecture(model: nn.Module) -> Architecture:
    """The entry of `ARCHITECTURES`; ValueError, with the cure, for a model that llama.cpp would compute otherwise."""
    kind = type(model).__name__
    if kind not in ARCHITECTURES:
        raise ValueError(f"GGUF is written for {', '.join(ARCHITECTURES)}, not for {kind}; {CONVERTER}")
    found, text = ARCHITECTURES[kind], model.config.get_text_config()
    act = getattr(text, "hidden_act", None) or text.activation_function
    if act not in (("gelu_new", "gelu_pytorch_tanh") if found.name == "gpt2" else ("silu", "swish")):
        raise ValueError(f"llama.cpp has another activation for {found.name} than {act!r}; {CONVERTER}")
    for option in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        if getattr(text, option, False):
            raise ValueError(f"llama.cpp's {found.name} has no {option}; {CONVERTER}")
    if not getattr(text, "scale_attn_weights", True):
        raise ValueError(f"llama.cpp's {found.name} always scales its attention (scale_attn_weights); {CONVERTER}")
    rope = getattr(text, "rope_parameters", None) or {}
    if found.ropes and rope.get("rope_type", "default") not in found.ropes:
        raise ValueError(f"rope scaling {rope.get('rope_type')!r} is not written for {found.name} ("
                         f"{', '.join(found.ropes)} are); {CONVERTER}")  # fmt: skip
    if rope.get("partial_rotary_factor", 1) != 1:
        raise ValueError(f"llama.cpp's {found.name} turns all of a head, not partial_rotary_factor="
                         f"{rope['partial_rotary_factor']}; {CONVERTER}")  # fmt: skip
    if found.square and text.num_attention_heads * head_size(text) != text.hidden_size:
        raise ValueError(f"llama.cpp's {found.name} needs heads·head_dim = width, here {text.num_attention_heads}·"
                         f"{head_size(text)} and {text.hidden_size}; {CONVERTER}")  # fmt: skip
    return found


def head_size(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def tensor_name(path: str) -> str:
    """llama.cpp's name of a module's tensors ("blk.3.attn_q"), without ".weight". ValueError for an unknown module."""
    block = BLOCK.fullmatch(path)
    inner = block.group(2) if block else path
    if inner not in NAMES:
        raise ValueError(f"llama.cpp has no tensor for {path!r}; {CONVERTER}")
    return f"blk.{block.group(1)}.{NAMES[inner]}" if block else NAMES[inner]


def interleave(rows: Tensor, heads: int) -> Tensor:
    """Reorder the rows of W_q or W_k (heads·d, …), of its bias or of lora_B, for llama.cpp's rotary embedding.

    transformers turns the pairs of rows (i, i + d/2) of each head, llama.cpp's Llama the pairs (2i, 2i + 1). Moving row
    i to 2i and row i + d/2 to 2i + 1, in queries and keys alike, leaves every product q·k as it was.
    """
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(rows.shape)


def ordered(found: Architecture, config: Any, name: str, rows: Tensor) -> Tensor:
    """`interleave` if llama.cpp wants the rows of this tensor so."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": getattr(config, "num_key_value_heads", None)}
    kind = name.rpartition(".")[2]
    return interleave(rows, heads[kind]) if found.interleaved and kind in heads else rows


class Entry(NamedTuple):
    """One tensor of a file: its name, shape (as torch has it), type, and how to get its numbers when they are due."""

    name: str
    shape: tuple[int, ...]
    kind: str
    read: Callable[[], Tensor]


def kind_of(name: str, shape: tuple[int, ...], quantize: str) -> str:
    """The type a tensor is stored in. llama.cpp computes vectors and positions in float32. Tables of tokens suffer most
    from few bits: eight for them, where llama-quantize takes six. Rows that no block divides stay in sixteen."""
    if len(shape) == 1 or name.startswith("position_embd"):
        return "f32"
    small = quantize.startswith(("q4", "q5")) and name in ("token_embd.weight", "output.weight")
    kind = "q8_0" if small else quantize
    return "f16" if kind.startswith("q") and shape[-1] % 32 else kind


def _parts(module: nn.Module) -> dict[str, tuple[tuple[int, ...], Callable[[], Tensor]]]:
    """"weight" and "bias" of one module: shape and how to get the numbers; matrices as (out, in), packed ones dense."""
    parts: dict[str, tuple[tuple[int, ...], Callable[[], Tensor]]]
    parts = {kind: (tuple(p.shape), p.detach) for kind, p in module.named_parameters(recurse=False)}
    if is_linear(module):
        parts["weight"] = (shape_of(module), lambda: weight_of(module).detach())
    return parts


def _entries(model: nn.Module, found: Architecture, quantize: str) -> Iterator[Entry]:
    """All tensors of a model without hosts, in model order; a tied head is left out, and llama.cpp ties it again."""
    config, table = model.config.get_text_config(), model.get_input_embeddings()
    for path, module in model.named_modules():
        if module is not table and getattr(module, "weight", None) is table.weight:
            continue
        for kind, (shape, read) in _parts(module).items():
            name = tensor_name(path)
            if kind not in ("weight", "bias") or kind == "bias" and name.rpartition(".")[2] not in found.biases:
                raise ValueError(f"llama.cpp's {found.name} has no {kind} for {path!r}; {CONVERTER}")
            due = partial(_due, found, config, name, read)
            yield Entry(f"{name}.{kind}", shape, kind_of(f"{name}.{kind}", shape, quantize), due)
    if (getattr(config, "rope_parameters", None) or {}).get("rope_type") == "llama3":
        slower = rope_factors(config)
        yield Entry("rope_freqs.weight", tuple(slower.shape), "f32", lambda: slower)


def _due(found: Architecture, config: Any, name: str, read: Callable[[], Tensor]) -> Tensor:
    return ordered(found, config, name, read())


def rope_factors(config: Any) -> Tensor:
    """(d/2,): by how much Llama 3.1's scaling slows down each frequency θ^(−2i/d) of the rotary embedding."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    slowed, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    d = head_size(config)
    return config.rope_parameters["rope_theta"] ** (-torch.arange(0, d, 2).float() / d) / slowed


def _sizes(writer: Any, config: Any, found: Architecture) -> None:
    """The header's numbers about the network."""
    gpt2 = found.name == "gpt2"
    window = getattr(config, "sliding_window", None)
    writer.add_block_count(config.num_hidden_layers)
    # No graph here knows sliding windows; within the first window attention is full, so there both compute the same.
    writer.add_context_length(min(config.max_position_embeddings, window or config.max_position_embeddings))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length((config.n_inner or 4 * config.n_embd) if gpt2 else config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    if gpt2:
        return writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_head_count_kv(config.num_key_value_heads)
    for add in (writer.add_key_length, writer.add_value_length, writer.add_rope_dimension_count):
        add(head_size(config))
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(_library().RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


# --- the tokenizer --------------------------------------------------------------------------------------------------

GPT2 = "GPT-2's words"  # ByteLevel's own expression
DIGITS = "each digit alone"
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")  # fmt: skip
QWEN2 = LLAMA3.replace("{1,3}", "")
# (how a text is cut before merging, whether a word that is a token skips the merges) -> tokenizer.ggml.pre.
# Source: llm_tokenizer_bpe and the reading of tokenizer_pre in src/llama-vocab.cpp.
CUTS = {((GPT2,), False): "gpt-2", ((DIGITS, GPT2), False): "smollm", ((LLAMA3,), True): "llama-bpe",
        ((LLAMA3,), False): "dbrx", ((QWEN2,), False): "qwen2"}  # fmt: skip


def _cuts(step: Mapping[str, Any] | None) -> Iterator[str]:
    """The cutting steps of a pre-tokenizer in tokenizer.json, one by one; unknown ones as they stand there."""
    step = step or {"type": "none"}
    regular = step.get("pattern", {}).get("Regex")
    if step["type"] == "Sequence":
        for inner in step["pretokenizers"]:
            yield from _cuts(inner)
    elif step["type"] == "ByteLevel" and not step["add_prefix_space"]:
        yield from [GPT2] if step.get("use_regex", True) else []
    elif step["type"] == "Digits" and step["individual_digits"]:
        yield DIGITS
    elif step["type"] == "Split" and regular and step["behavior"] == "Isolated" and not step["invert"]:
        yield regular
    else:
        yield json.dumps(step, ensure_ascii=False)


def _described(tokenizer: Any) -> dict[str, Any]:
    """tokenizer.json as a dictionary; ValueError for what is not byte-level BPE as llama.cpp knows it."""
    kind = type(tokenizer).__name__
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ValueError(f"{kind} has no tokenizer.json; load it with AutoTokenizer, or: {CONVERTER}")
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    model = described["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        sort = "BPE with byte fallback" if model.get("byte_fallback") else model.get("type")
        raise ValueError(f"GGUF is written for byte-level BPE tokenizers, and {kind} is {sort}; {CONVERTER}")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise ValueError(f"{kind} has {option}={model[option]!r}, which llama.cpp has not; {CONVERTER}")
    # Qwen's NFC is tolerated, as llama.cpp's converter does: it changes only text in decomposed letters (e + accent)
    if (described.get("normalizer") or {"type": "NFC"})["type"] != "NFC":
        raise ValueError(f"{kind} normalises text ({described['normalizer']['type']}), llama.cpp does not; {CONVERTER}")
    for token in described["added_tokens"]:
        if flag := next((f for f in ("lstrip", "rstrip", "single_word") if token[f]), None):
            raise ValueError(f"token {token['content']!r} has {flag}, which a GGUF cannot say; {CONVERTER}")
    return described


def _pre(described: Mapping[str, Any]) -> str:
    """llama.cpp's name for the way the tokenizer cuts text into words."""
    cuts = tuple(_cuts(described["pre_tokenizer"])), bool(described["model"].get("ignore_merges"))
    if cuts not in CUTS:
        raise ValueError(f"llama.cpp knows ways of cutting text into words by name, and {' then '.join(cuts[0])!r} is "
                         f"none of {', '.join(CUTS.values())}; {CONVERTER}")  # fmt: skip
    return CUTS[cuts]


def _frame(tokenizer: Any) -> tuple[bool, bool]:
    """Whether the tokenizer puts its bos before a text, and its eos behind it; ValueError for anything else."""
    bare, framed = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for before, after in ((False, False), (True, False), (False, True), (True, True)):
        if framed == [bos] * before + bare + [eos] * after:
            return before, after
    raise ValueError(f"the tokenizer makes {framed} of {bare}: llama.cpp can add only bos and eos; {CONVERTER}")


def _vocabulary(writer: Any, tokenizer: Any, rows: int, config: Any) -> None:
    """The header's part about words: the vocabulary with a type for each token, merges, special tokens."""
    kinds = _library().TokenType
    described = _described(tokenizer)
    words = {id: (word, kinds.NORMAL) for word, id in described["model"]["vocab"].items()}
    for token in described["added_tokens"]:
        words[token["id"]] = token["content"], kinds.CONTROL if token["special"] else kinds.USER_DEFINED
    if max(words) >= rows:
        raise ValueError(f"the tokenizer has token {max(words)} and the model {rows} rows: they do not belong "
                         "together, or peftlab.add_tokens did not make room")  # fmt: skip
    listed = [words.get(id, (f"[PAD{id}]", kinds.UNUSED)) for id in range(rows)]  # tables are padded to round sizes
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in described["model"]["merges"]]
    before, after = _frame(tokenizer)
    eos = config.eos_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    eos = eos[0] if isinstance(eos, list) else eos
    bos = next((id for id in (tokenizer.bos_token_id, config.bos_token_id, eos) if id is not None), None)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre(described))
    writer.add_token_list([word for word, _ in listed])
    writer.add_token_types([kind for _, kind in listed])
    writer.add_token_merges(merges)
    for add, id in ((writer.add_bos_token_id, bos), (writer.add_eos_token_id, eos),
                    (writer.add_pad_token_id, tokenizer.pad_token_id)):  # fmt: skip
        if id is not None:  # without them llama.cpp takes token 11 for both, whatever it is
            add(id)
    writer.add_add_bos_token(before)
    writer.add_add_eos_token(after)
    template = getattr(tokenizer, "chat_template", None)
    if template:
        writer.add_chat_template(template if isinstance(template, str) else template["default"])


# --- files ----------------------------------------------------------------------------------------------------------


def check_path(path: str | os.PathLike) -> Path:
    """ValueError for a path that is no name of a GGUF file, or where something else stands."""
    path = Path(path)
    if path.suffix != ".gguf":
        raise ValueError(f"{str(path)!r} does not end in .gguf, by which other tools know such a file")
    if path.is_symlink() or path.exists() and not path.is_file():
        raise ValueError(f"{str(path)!r} is a {'link' if path.is_symlink() else 'folder'}; name a new file")
    if path.exists():
        with path.open("rb") as f:
            if (start := f.read(4)) not in (b"GGUF", b""):
                raise ValueError(f"{str(path)!r} is there and no GGUF file (it begins with {start!r}); choose another "
                                 "name or move it away")  # fmt: skip
    return path


@contextlib.contextmanager
def _new_file(path: Path) -> Iterator[Path]:
    """A new file beside `path` to fill, which takes its name when the block ends without an error, else is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as f:
            os.fsync(f.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes private files
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, f"could not write {path} ({error.strerror or error}); what was there before is "
                      "untouched") from error  # fmt: skip
    finally:
        temporary.unlink(missing_ok=True)


def _packed(entry: Entry) -> Any:
    """An entry's numbers as they are stored. ValueError for numbers that are not finite there."""
    import numpy as np

    gguf = _library()
    numbers = entry.read().to("cpu", torch.float32).contiguous().numpy()
    if not np.isfinite(numbers).all():
        raise ValueError(f"{entry.name} holds NaN or inf; nothing was written")
    with np.errstate(over="ignore"):
        stored = gguf.quants.quantize(numbers, gguf.GGMLQuantizationType[entry.kind.upper()])
    if entry.kind == "f16" and not np.isfinite(stored).all():
        raise ValueError(f"{entry.name} holds {abs(numbers).max():.3g}, more than float16 has room for (65504); "
                         "take quantize='bf16'. Nothing was written")  # fmt: skip
    return stored


def _write(path: Path, name: str, entries: list[Entry], header: Callable[[Any], None]) -> Path:
    """One file: header, list of tensors, then their numbers, of which one tensor at a time is in memory."""
    import numpy as np

    gguf = _library()
    with _new_file(path) as temporary:
        writer = gguf.GGUFWriter(temporary, name)
        try:
            header(writer)
            for entry in entries:
                kind = gguf.GGMLQuantizationType[entry.kind.upper()]
                block, bytes_a_block = gguf.GGML_QUANT_SIZES[kind]
                size = int(np.prod(entry.shape)) // block * bytes_a_block
                plain = {"f32": np.float32, "f16": np.float16}.get(entry.kind)
                shape = entry.shape if plain else gguf.quant_shape_to_byte_shape(entry.shape, kind)
                writer.add_tensor_info(entry.name, shape, np.dtype(plain or np.uint8), size, raw_dtype=kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for entry in entries:
                writer.write_tensor_data(_packed(entry))
        finally:
            writer.close()
    return path


def _check_kind(quantize: str) -> None:
    if quantize not in KINDS:
        raise ValueError(f"quantize={quantize!r} is not written here; there are {', '.join(KINDS)}. For others write "
                         "f16 and let llama.cpp pack it: llama-quantize model.gguf small.gguf Q4_K_M")  # fmt: skip


def _about(writer: Any, title: str, base: str | None, license: str | None) -> None:
    writer.add_name(title)
    if license:
        writer.add_license(license)
    if base:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, base.rpartition("/")[2])
        writer.add_base_model_repo_url(0, f"https://huggingface.co/{base}")


def write_model(model: nn.Module, tokenizer: Any, path: str | os.PathLike, quantize: str = "f16", *,
                title: str = "model", base: str | None = None, license: str | None = None) -> Path:  # fmt: skip
    """Write a model without adapters (`export.to_gguf` merges them first) and its tokenizer into one GGUF file.

    quantize: one of `KINDS`. title, base (a Hub id), license: for the header. Returns the path.
    Raises ValueError for a model or tokenizer that llama.cpp would compute otherwise, or numbers that do not fit;
    OSError when it cannot be written. Whatever was at `path` before is untouched then.
    """
    gguf = _library()
    path, found = check_path(path), architecture(model)
    _check_kind(quantize)
    config = model.config.get_text_config()

    def header(writer: Any) -> None:
        writer.add_type(gguf.GGUFType.MODEL)
        _about(writer, title, base, license)
        _sizes(writer, config, found)
        _vocabulary(writer, tokenizer, len(model.get_input_embeddings().weight), config)
        kind = "ALL_F32" if quantize == "f32" else f"MOSTLY_{quantize.upper()}"
        writer.add_file_type(gguf.LlamaFileType[kind])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)

    return _write(path, found.name, list(_entries(model, found, quantize)), header)


class Factors(NamedTuple):
    """One layer's low-rank change: Δ(x) = scale·x·Aᵀ·Bᵀ, with A (r, in) and B (out, r)."""

    A: Tensor
    B: Tensor
    scale: float


def scaled(layers: Mapping[str, Factors]) -> tuple[float, dict[str, tuple[Tensor, Tensor]]]:
    """(α of the file, path -> (A, B)): one α for all layers, what differs from it folded into B.

    llama.cpp computes Δ(x) = (α/r)·x·Aᵀ·Bᵀ with r read off B, and takes α = 0 for "no scale", that is 1
    (llama_adapter_lora_weight::get_scale). With α the most common scale·r, plain LoRA keeps its B bit for bit; with
    rank_pattern, alpha_pattern or rslora, B is multiplied by scale·r/α.
    """
    alphas = {path: round(f.scale * len(f.A), 9) for path, f in layers.items()}
    alpha = Counter(value for value in alphas.values() if value).most_common(1)
    common = alpha[0][0] if alpha else 1.0
    return common, {path: (f.A, f.B if alphas[path] == common else f.B * (f.scale * len(f.A) / common))
                    for path, f in layers.items()}  # fmt: skip


def write_lora(model: nn.Module, layers: Mapping[str, Factors], path: str | os.PathLike, quantize: str = "f32", *,
               title: str = "adapter", base: str | None = None, license: str | None = None) -> Path:  # fmt: skip
    """Write low-rank changes of a model's layers, by bare path, as a GGUF adapter: `llama-cli -m … --lora …`.

    Raises ValueError for a model or layer that llama.cpp would compute otherwise, OSError when it cannot be written.
    """
    gguf = _library()
    path, found = check_path(path), architecture(model)
    _check_kind(quantize)
    config = model.config.get_text_config()
    alpha, factors = scaled(layers)
    entries = []
    for place, (A, B) in factors.items():
        name = tensor_name(place)
        for letter, matrix in (("a", A), ("b", ordered(found, config, name, B))):
            shape = tuple(matrix.shape)
            kind = kind_of(f"{name}.lora", shape, quantize)
            entries.append(Entry(f"{name}.weight.lora_{letter}", shape, kind, matrix.detach))

    def header(writer: Any) -> None:
        writer.add_type(gguf.GGUFType.ADAPTER)
        _about(writer, title, base, license)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        writer.add_file_type(gguf.LlamaFileType["ALL_F32" if quantize == "f32" else f"MOSTLY_{quantize.upper()}"])

    return _write(path, found.name, entries, header)
