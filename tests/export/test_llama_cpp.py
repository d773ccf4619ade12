"""The real llama.cpp reads what we write: the same tokens, the same logits, the same answers as transformers.

`make test-export`; needs llama-cpp-python (`pip install -e ".[llama]"`, ten minutes of compiling). Prints its counts.
"""

import sys
from pathlib import Path

import pytest
import torch

import peftlab as pl
from peftlab import export, gguf
from peftlab.attach import switch_of

sys.path.append(str(Path(__file__).resolve().parents[1]))
from families import build, scripts, shake  # noqa: E402

pytestmark = pytest.mark.export

PROMPTS = 20
TEXTS = [
    "Question: sort the parks by highest price and show the size of the first 4\nSQL:",
    "def f(x):\n\treturn x ** 2  # it's\r\n\r\n\n    y = 'I'll'",
    "1 22 333 4444 3.14 1e-05 ½ ⅷ ٣٤ १२३",
    "Ünïcödé, naïve café; 漢字かな 한국어 עברית العربية ไทย",
    "🚀🚀 👩‍👩‍👧 🇪🇺 \u00a0\u3000\u200d",
    "  lead   and trail   ",
    "<eos>a<pad>b <eos>",
    "don't WE'LL 'RE you've'd",
    "!!!???...---===~~~``` (a[b]{c}) <|x|>",
    "\n\n\n \n\t\t\n",
    "é e\u0301",  # composed and decomposed
    "SELECT a, b FROM t WHERE x >= 3 AND y != 'z';",
]


with scripts("agreement") as (agreement,):
    pass


@pytest.fixture(scope="module")
def llama():
    """path, adapter -> llama.cpp's model; skipped where it is not installed."""
    pytest.importorskip("llama_cpp", reason='llama-cpp-python is not installed: pip install -e ".[llama]" (ten minutes)'
                        ", then make test-export")  # fmt: skip
    return agreement.opened


@pytest.fixture(scope="module")
def trained():
    """(model, tokenizer) with the adapter 'sql', trained for 100 steps."""
    model, tokenizer = pl.load_base(device="cpu")
    torch.manual_seed(0)
    pl.attach(model, pl.LoRA, targets="all-linear", name="sql", r=8, alpha=16)
    pl.train(model, pl.tasks.load("sql")["train"], tokenizer, steps=100, batch_size=16, lr=5e-3, progress=False)
    return model, tokenizer


@pytest.fixture(scope="module")
def prompts():
    return [row["prompt"] for row in list(pl.tasks.load("sql")["test"])[:PROMPTS]]


ANSWERS = {}  # several tests compare with the same ones


def ours(model, tokenizer, prompt):
    """transformers' greedy continuation, with the active adapters."""
    key = switch_of(model).active, prompt
    if key not in ANSWERS:
        ANSWERS[key] = agreement.ours(model, tokenizer, prompt)
    return ANSWERS[key]


logits, reference = agreement.logits, agreement.reference


def compare(model, tokenizer, loaded, prompts, tolerance, label):
    """Print the counts; returns (equal answers, largest difference of logits, equal five best tokens)."""
    found = agreement.agreement(model, tokenizer, loaded, prompts, [ours(model, tokenizer, p) for p in prompts])
    answers, best, apart = found["equal answers"], found["equal five best"], found["logits apart"]
    print(f"\n{label}: {answers} of {len(prompts)} greedy answers equal, five best tokens equal for {best}, logits "
          f"differ by at most {apart:.2g} (tolerance {tolerance:g})")  # fmt: skip
    assert apart <= tolerance
    return answers, apart, best


def test_tokens_are_the_same(llama, trained, prompts, tmp_path):
    _, tokenizer = trained
    path = export.to_gguf(*trained, tmp_path / "base.gguf", "f32", name=())
    with llama(path) as loaded:
        for text in [*TEXTS, *prompts]:
            assert loaded.tokenize(text.encode(), add_bos=True, special=True) == tokenizer(text)["input_ids"], text
        assert loaded.token_eos() == tokenizer.eos_token_id
    print(f"\n{len(TEXTS) + len(prompts)} texts: the same tokens")


@pytest.mark.parametrize("way", ["base", "base and adapter", "merged"])
def test_answers_are_the_same(way, llama, trained, prompts, tmp_path):
    """In float32 both compute the same sums in another order: 1e-3 on logits of size 10 is a hundred times that."""
    model, tokenizer = trained
    name = "sql" if way == "merged" else ()
    path = export.to_gguf(model, tokenizer, tmp_path / "model.gguf", "f32", name)
    adapter = export.lora_to_gguf(model, tmp_path / "sql.gguf", "sql") if "adapter" in way else None
    with llama(path, adapter) as loaded, pl.using(model, *(() if way == "base" else ("sql",))):
        answers, _, best = compare(model, tokenizer, loaded, prompts, 1e-3, way)
    assert answers == best == len(prompts)


def test_the_adapter_matters(trained, prompts):
    """Or the comparison above would show nothing."""
    model, tokenizer = trained
    with pl.using(model):
        before = [ours(model, tokenizer, prompt) for prompt in prompts]
    after = [ours(model, tokenizer, prompt) for prompt in prompts]
    print(f"\nthe adapter changes {sum(a != b for a, b in zip(before, after, strict=True))} of {len(prompts)} answers")
    assert sum(a != b for a, b in zip(before, after, strict=True)) > len(prompts) / 2


# For each type: at least so many equal answers of 20, and at most so large a difference of logits. Rounding, not an
# error of ours: f16 and bf16 have 11 and 8 bits, and with packed weights llama.cpp packs activations to 8 bits too.
ROUNDED = {"f16": (19, 0.1), "bf16": (16, 0.6), "q8_0": (14, 1.5), "q5_1": (5, 4), "q5_0": (5, 4), "q4_1": (2, 8),
           "q4_0": (2, 8)}  # fmt: skip


@pytest.mark.parametrize("quantize", ROUNDED)
def test_packed_files_are_near(quantize, llama, trained, prompts, tmp_path):
    model, tokenizer = trained
    path = export.to_gguf(model, tokenizer, tmp_path / "model.gguf", quantize)
    least, tolerance = ROUNDED[quantize]
    with llama(path) as loaded:
        answers, _, _ = compare(model, tokenizer, loaded, prompts, tolerance, f"merged, {quantize}, "
                                f"{path.stat().st_size / 2**20:.1f} MiB")  # fmt: skip
    assert answers >= least


def tiny(family, tokenizer, **more):
    """A random model of a family with the course's words: all vectors off their initial ones and zeros."""
    model = build(family, **more)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.2)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


ROPE = {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}
ROPE3 = {"rope_type": "llama3", "factor": 8.0, "rope_theta": 500.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 32}  # fmt: skip
MODELS = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, wide heads": ("llama", {"head_dim": 16}),
    "llama, linear rope": ("llama", {"rope_parameters": ROPE}),
    "llama, llama3 rope": ("llama", {"rope_parameters": ROPE3}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen2, linear rope": ("qwen2", {"rope_parameters": ROPE}),
    "qwen3": ("qwen3", {}),
    "qwen3, tied": ("qwen3", {"tie_word_embeddings": True}),
    "gpt2": ("gpt2", {}),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_architecture(name, llama, trained, tmp_path):
    """Logits of the base, of base and adapter, and of the merged model. llama.cpp's GELU is a table in float16."""
    _, tokenizer = trained
    family, more = MODELS[name]
    model = tiny(family, tokenizer, **more)
    pl.attach(model, pl.LoRA, targets="all-linear", name="a", r=4, rank_pattern={r"[^.]*1\..*": 6} if family != "gpt2"
              else {r"h\.1\..*": 6}, alpha_pattern={"down_proj" if family != "gpt2" else "mlp.c_proj": 3})  # fmt: skip
    for adapter in pl.adapters(model)["a"].values():
        shake(adapter)
    ids = tokenizer(TEXTS[1])["input_ids"][:48]
    base = export.to_gguf(model, tokenizer, tmp_path / "base.gguf", "f32", ())
    merged = export.to_gguf(model, tokenizer, tmp_path / "merged.gguf", "f32", "a")
    adapter = export.lora_to_gguf(model, tmp_path / "a.gguf", "a")
    apart = {}
    with pl.using(model), llama(base, context=64) as loaded:
        plain = reference(model, ids)
        apart["base"] = abs(plain - logits(loaded, ids)).max()
    adapted = reference(model, ids)
    for way, files in {"base and adapter": (base, adapter), "merged": (merged, None)}.items():
        with llama(*files, context=64) as loaded:
            apart[way] = abs(adapted - logits(loaded, ids)).max()
    tolerance = 2e-2 if family == "gpt2" else 1e-4
    print(f"\n{name}: logits up to {abs(adapted).max():.1f} differ by", {k: f"{v:.1g}" for k, v in apart.items()})
    assert abs(plain - adapted).max() > 0.5 and max(apart.values()) < tolerance


def check_base_and_adapter(llama, model, tokenizer, folder):
    """llama.cpp's base with the adapter "a", moved off its start, has the model's logits."""
    for adapter in pl.adapters(model)["a"].values():
        shake(adapter)
    ids = tokenizer(TEXTS[0])["input_ids"]
    base = export.to_gguf(model, tokenizer, folder / "m.gguf", "f32", ())
    with llama(base, export.lora_to_gguf(model, folder / "a.gguf"), context=64) as loaded:
        assert abs(reference(model, ids) - logits(loaded, ids)).max() < 1e-4


@pytest.mark.parametrize("alpha", [16, 0, -4])
def test_rslora_and_odd_alphas(alpha, llama, trained, tmp_path):
    """alpha = 0 means "no scale" to llama.cpp, not "no effect"."""
    _, tokenizer = trained
    model = tiny("llama", tokenizer)
    pl.attach(model, pl.LoRA, targets="q_proj|v_proj", name="a", r=5, alpha=alpha, rslora=True)
    check_base_and_adapter(llama, model, tokenizer, tmp_path)


def test_head_in_the_adapter(llama, trained, tmp_path):
    """An untied head is a tensor of its own in llama.cpp too."""
    _, tokenizer = trained
    model = tiny("llama", tokenizer)
    pl.attach(model, pl.LoRA, targets="lm_head|k_proj", name="a", r=4)
    check_base_and_adapter(llama, model, tokenizer, tmp_path)


def test_four_bit_base_becomes_what_its_codes_stand_for(llama, trained, tmp_path):
    _, tokenizer = trained
    model = pl.quantize(tiny("llama", tokenizer))
    pl.attach(model, pl.IA3, name="a")
    for adapter in pl.adapters(model)["a"].values():
        shake(adapter)
    ids = tokenizer(TEXTS[0])["input_ids"]
    path = export.to_gguf(model, tokenizer, tmp_path / "m.gguf", "f32")
    with llama(path, context=64) as loaded:
        assert abs(reference(model, ids) - logits(loaded, ids)).max() < 1e-3


def test_sliding_window_is_the_context(llama, trained, tmp_path):
    _, tokenizer = trained
    model = tiny("mistral", tokenizer, sliding_window=24)
    path = export.to_gguf(model, tokenizer, tmp_path / "m.gguf", "f32")
    ids = tokenizer(TEXTS[1])["input_ids"][:24]
    with llama(path, context=24) as loaded:
        assert loaded.metadata["llama.context_length"] == "24"
        assert abs(reference(model, ids) - logits(loaded, ids)).max() < 1e-4


def test_all_types_are_tried():
    assert {"f32", *ROUNDED} == set(gguf.KINDS)
