"""One tiny random model of each family that the core promises to work on, from a config: nothing is downloaded."""

from __future__ import annotations

import importlib.util
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import peftlab as pl

VOCABULARY, WIDTH = 96, 32

# family -> an adaptable pattern of two kinds of layers, and the head (None: no head of its own)
TARGETS = {
    "llama": "q_proj|down_proj",
    "qwen2": "v_proj|up_proj",
    "qwen3": "q_proj|o_proj",
    "mistral": "k_proj|gate_proj",
    "gpt2": "c_attn|c_fc",
    "opt": "q_proj|fc1",
    "bert": "query|intermediate.dense",
    "t5": "q|wi",
}
FAMILIES = tuple(TARGETS)


def build(family: str, seed: int = 0, **more):
    """The model in eval mode, with weights large enough that adapters show in the logits."""
    import transformers as t

    llama_like = dict(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2, pad_token_id=0, **more
    )  # fmt: skip
    torch.manual_seed(seed)
    if family == "llama":
        model = t.LlamaForCausalLM(t.LlamaConfig(**llama_like))
    elif family == "qwen2":
        model = t.Qwen2ForCausalLM(t.Qwen2Config(**llama_like))
    elif family == "qwen3":
        model = t.Qwen3ForCausalLM(t.Qwen3Config(head_dim=8, **llama_like))
    elif family == "mistral":
        model = t.MistralForCausalLM(t.MistralConfig(**llama_like))
    elif family == "gpt2":
        model = t.GPT2LMHeadModel(
            t.GPT2Config(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=2, n_head=4, n_positions=64,
                         initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=1, **more))
    elif family == "opt":
        model = t.OPTForCausalLM(
            t.OPTConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, ffn_dim=64, num_hidden_layers=2,
                        num_attention_heads=4, max_position_embeddings=64, init_std=0.2, pad_token_id=0,
                        word_embed_proj_dim=WIDTH, **more))
    elif family == "bert":
        model = t.BertForSequenceClassification(
            t.BertConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=4, max_position_embeddings=64, num_labels=3, initializer_range=0.2,
                         pad_token_id=0, **more))
    elif family == "t5":
        model = t.T5ForConditionalGeneration(
            t.T5Config(vocab_size=VOCABULARY, d_model=WIDTH, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
                       decoder_start_token_id=0, pad_token_id=0, **more))
    else:
        assert not more, "only for the families above"
        return build_other(family, seed)
    return model.eval()


def inputs(family: str, rows: int = 3, length: int = 9, seed: int = 7) -> dict:
    """A batch of token ids (rows, length) for the family, with what else its forward needs."""
    draw = torch.Generator().manual_seed(seed)
    batch = {"input_ids": torch.randint(2, VOCABULARY, (rows, length), generator=draw)}
    if family == "t5":
        batch["decoder_input_ids"] = torch.randint(2, VOCABULARY, (rows, 5), generator=draw)
    return batch


def labels(family: str, batch: dict) -> torch.Tensor:
    """Something to learn from the batch."""
    if family == "bert":
        return torch.arange(len(batch["input_ids"])) % 3
    return batch["decoder_input_ids"] if family == "t5" else batch["input_ids"]


def check_refused(said: str, method: str, targets: str | None = None, **hyper) -> None:
    """Attaching the method to a tiny Llama raises a ValueError that says so, and the model is as it was."""
    model = build("llama")
    before = list(model.state_dict())
    with pytest.raises(ValueError, match=said):
        pl.attach(model, method, targets, **hyper)
    assert not pl.hosts(model) and list(model.state_dict()) == before


def shake(module: torch.nn.Module, scale: float = 0.1, seed: int = 1) -> None:
    """Move an adapter's parameters off their initial values, so that its effect is not nil."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=draw).to(parameter))


def attach_each(model, method, case, names, moved: bool):
    """Adapters of one method under several names, each from a seed of its own; moved: off their start."""
    import peftlab as pl

    for seed, name in enumerate(names):
        torch.manual_seed(seed)
        pl.attach(model, method, case.targets, name=name, **case.hyper)
        for adapter in pl.adapters(model)[name].values():
            if moved:
                shake(adapter, case.shake, seed=seed)
    return model


def build_other(family: str, seed: int = 0):
    """A tiny model of a family on which not every method is promised to work: it works, or is refused by name."""
    import transformers as t

    bert_like = dict(vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2, num_labels=3,
                     num_attention_heads=4, max_position_embeddings=64, initializer_range=0.2,
                     pad_token_id=0)  # fmt: skip
    llama_like = dict(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2, pad_token_id=0, bos_token_id=1,
        eos_token_id=1,
    )  # fmt: skip
    gemma_like = dict(head_dim=8, **llama_like)
    configs = {
        "bloom": lambda: t.BloomConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, n_layer=2, n_head=4, pad_token_id=0,
                                       initializer_range=0.2),
        "cohere": lambda: t.CohereConfig(**llama_like),
        "deepseek": lambda: t.DeepseekV3Config(
            **{**llama_like, "num_key_value_heads": 4}, moe_intermediate_size=16, n_routed_experts=4, n_group=1,
            num_experts_per_tok=2, topk_group=1, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4, v_head_dim=8,
            qk_nope_head_dim=8, first_k_dense_replace=1),
        "distilbert": lambda: t.DistilBertConfig(vocab_size=VOCABULARY, dim=WIDTH, n_layers=2, n_heads=4, hidden_dim=64,
                                                 num_labels=3, max_position_embeddings=64, pad_token_id=0),
        "electra": lambda: t.ElectraConfig(embedding_size=16, **bert_like),
        "gemma": lambda: t.GemmaConfig(**gemma_like),
        "gemma2": lambda: t.Gemma2Config(query_pre_attn_scalar=8, **gemma_like),
        "gemma3": lambda: t.Gemma3TextConfig(query_pre_attn_scalar=8, **gemma_like),
        "gptj": lambda: t.GPTJConfig(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=2, n_head=4, n_positions=64,
                                     rotary_dim=4, pad_token_id=0, bos_token_id=1, eos_token_id=1),
        "gpt_neox": lambda: t.GPTNeoXConfig(**{n: v for n, v in llama_like.items() if n != "num_key_value_heads"}),
        "granite": lambda: t.GraniteConfig(**llama_like),
        "mixtral": lambda: t.MixtralConfig(num_local_experts=4, **llama_like),
        "modernbert": lambda: t.ModernBertConfig(cls_token_id=1, sep_token_id=1, bos_token_id=1, eos_token_id=1,
                                                 **bert_like),
        "mpt": lambda: t.MptConfig(vocab_size=VOCABULARY, d_model=WIDTH, n_layers=2, n_heads=4, max_seq_len=64,
                                   initializer_range=0.2),
        "olmo2": lambda: t.Olmo2Config(**llama_like),
        "phi": lambda: t.PhiConfig(**llama_like),
        "qwen2_moe": lambda: t.Qwen2MoeConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
                                              shared_expert_intermediate_size=32, **llama_like),
        "roberta": lambda: t.RobertaConfig(**bert_like),
        "smollm3": lambda: t.SmolLM3Config(**llama_like),
        "stablelm": lambda: t.StableLmConfig(**llama_like),
        "starcoder2": lambda: t.Starcoder2Config(**llama_like),
    }  # fmt: skip
    torch.manual_seed(seed)
    labelled = family in ("distilbert", "electra", "modernbert", "roberta")
    auto = t.AutoModelForSequenceClassification if labelled else t.AutoModelForCausalLM
    return auto.from_config(configs[family]()).eval()


@contextmanager
def scripts(*names):
    """Files of benchmarks/ as modules that find each other by name, in this order; own copies: what is replaced in them
    must not reach other tests."""
    before = {name: sys.modules.pop(name, None) for name in names}
    try:
        for name in names:
            path = Path(__file__).resolve().parent.parent / "benchmarks" / f"{name}.py"
            spec = importlib.util.spec_from_file_location(name, path)
            sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[name])
        yield tuple(sys.modules[name] for name in names)
    finally:
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module


def script(name):
    """One file of benchmarks/ as a module, own copy."""
    with scripts(name) as (module,):
        return module


def tiny_experiment(monkeypatch, classic, **sizes):
    """benchmarks/classic.py, loaded as `classic`, made small: a tiny Llama of these sizes with the course's words, few
    rows of each task, batches of two. Returns the model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    _, tokenizer = pl.load_base(classic.DATA / "base", device="cpu")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), num_attention_heads=2, max_position_embeddings=256, tie_word_embeddings=True,
        pad_token_id=0, bos_token_id=None, eos_token_id=1, **sizes,
    ))  # fmt: skip
    few = {task: {split: found[:4] for split, found in classic.rows(task).items()} for task in classic.STEPS}
    monkeypatch.setattr(classic, "base", lambda: (model, tokenizer))
    monkeypatch.setattr(classic, "rows", few.__getitem__)
    monkeypatch.setattr(classic, "BATCH", 2)
    return model
