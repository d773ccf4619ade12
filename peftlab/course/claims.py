"""The claims audit: what five introductory texts on PEFT say, and what comes out when it is computed.

A claim is a short quotation or paraphrase, the texts that make it, and a function that finds out: a sentence with our
numbers, of which it asserts those that the verdict rests on, and the verdict. Verdicts begin with "holds", "holds if"
or "wrong"; some rest on what another lesson measures, and say so. A word that is used in two senses is given the one in
which the claim holds, as a condition. Matters of opinion, fashion and price are not in the list.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from ..attach import attach, hosts, using
from ..count import Count, count
from ..merge import merge
from ..methods.lora import LoRA
from ..nf4_layer import quantize
from .ledger import GB, GIB, NF4, SHAPES, Ledger, Shape, compare, human

if TYPE_CHECKING:
    from ..vram import Memory

TEXTS = {
    1: "PEFT (Parameter-Efficient Fine-Tuning), with a box on its relevance for the front end",
    2: "Part 1b: Parameter-Efficient Fine-Tuning (PEFT), of a course on LoRA",
    3: "Parameter-Efficient Fine-Tuning (PEFT) for LLMs, with diagrams of the architecture",
    4: "PEFT, a page of notes with emojis",
    5: "Parameter-Efficient Fine-Tuning (PEFT): Fine-tuning giants on consumer hardware, with an interview section",
}
TOPICS = ("how many", "what the methods are", "disk", "memory", "time", "quality and forgetting")


class Finding(NamedTuple):
    """What came out, and the verdict on the claim."""

    found: str
    verdict: str


class Claim(NamedTuple):
    says: str
    texts: tuple[int, ...]
    topic: str
    check: Callable[[], Finding]

    @property
    def name(self) -> str:
        return self.check.__name__


CLAIMS: list[Claim] = []


def claim(says: str, *texts: int, topic: str):
    """Put a claim on the list, with the function under this line to find out."""

    def note(check: Callable[[], Finding]) -> Callable[[], Finding]:
        CLAIMS.append(Claim(says, texts, topic, check))
        return check

    return note


@functools.cache
def audit(topic: str | None = None) -> tuple[tuple[Claim, Finding], ...]:
    """All claims, or those of one of the TOPICS, each with what came out."""
    if topic is not None and topic not in TOPICS:
        raise ValueError(f"no claims on {topic!r}; the topics are {', '.join(TOPICS)}")
    return tuple((one, one.check()) for one in CLAIMS if topic in (None, one.topic))


def table(rows: Iterable[tuple[Claim, Finding]]) -> Any:
    """The claims as a table for a notebook: claim, texts, found, verdict."""
    from IPython.display import Markdown

    lines = ["| the claim | text | computed or measured | verdict |", "|---|---|---|---|"]
    for one, (found, verdict) in rows:
        cells = (one.says, ", ".join(map(str, one.texts)), found, f"**{verdict}**")
        lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return Markdown("\n".join(lines))


def kind(verdict: str) -> str:
    """holds, holds if or wrong"""
    return next(word for word in ("holds if", "holds", "wrong") if verdict.startswith(word))


# ------------------------------------------------------------------------------------------------------- what is used

SEVEN, SEVENTY = "llama-2-7b", "llama-3-70b"
QV = "q_proj|v_proj"
LEDGER_7B, LEDGER_70B = SHAPES["7B (Llama 2)"], SHAPES["70B (Llama 2)"]
LLAMA_65B = Shape(8192, 80, 22016, 32000, 8192)  # Touvron et al. 2023, arXiv:2302.13971, table 2


@functools.cache
def _count(model: str, method: str | None = None, targets: str | None = None, **hyper) -> Count:
    return count(model, method, targets, **hyper)


def _lora(model: str, r: int, targets: str = QV) -> int:
    return _count(model, "LoRA", targets, r=r).trainable


def _percent(counted: Count) -> float:
    """Trained, in percent of the base: what the texts mean by it."""
    return 100 * counted.trainable / counted.base


def _gib(ledger: Ledger) -> str:
    return f"{ledger.total / GIB:.1f} GiB"


@functools.cache
def _need(model: str, **asked) -> Memory:
    """Of one training step with LoRA, predicted."""
    from ..vram import predict

    return predict(model, "lora", **asked)


def _reserved(needs: dict[int, Memory]) -> str:
    return " and ".join(f"{need.reserved / GIB:.1f} GiB with {tokens:,} tokens" for tokens, need in needs.items())


@functools.cache
def _costs():
    from .. import lab

    return lab.costs("classic")


def _recorded(name: str, of: str, **wanted: Any) -> list[float]:
    """The median of one figure in the rows of a recorded benchmark that have the wanted values."""
    import json

    from ..paths import DATA

    rows = json.loads((DATA / "results" / f"{name}.json").read_text(encoding="utf-8"))["rows"]
    return [row[of][1] for row in rows if wanted.items() <= row.items()]


@functools.cache
def _classic():
    """The experiment of lessons 03 to 05 in short, a row for each task and method."""
    from .. import lab

    return lab.summary(lab.read("classic"), by=["task", "method"], also=["test_form"])


@functools.cache
def _after_some_sql() -> dict[str, float]:
    """What a little training on SQL does to the course's base: LoRA, three steps; and full fine-tuning, one step."""
    from ..base import load_base
    from ..baselines import full_finetuning
    from ..paths import DATA
    from ..tasks import load
    from ..train import train

    sql = load("sql")["train"]
    base, tokenizer = load_base(DATA / "base", device="cpu")  # this one, whatever PEFTLAB_BASE says: it is small
    weights = {name: p.detach().clone() for name, p in base.named_parameters()}
    ids = tokenizer("Question: who lives by the sea?\nAnswer:", return_tensors="pt").input_ids
    with torch.inference_mode():
        before = base(ids).logits

    model = attach(copy.deepcopy(base), LoRA, name="sql", r=8)
    train(model, sql, tokenizer, steps=3, batch_size=4, progress=False)
    matrices = [host.layer.weight.detach().clone() for host in hosts(model).values()]
    with torch.inference_mode():
        on = model(ids).logits
        with using(model):
            off = model(ids).logits
        merging = (merge(model)(ids).logits - on).abs().max().item()
    merged = [host.layer.weight for host in hosts(model).values()]

    full_finetuning(base)
    train(base, sql, tokenizer, steps=1, batch_size=4, progress=False)
    return {
        "off": (off != before).double().mean().item(),
        "on": (on != before).double().mean().item(),
        "merged": _moved(matrices, merged),
        "merging": merging,
        "entries": sum(w.numel() for w in matrices),
        "matrices": len(matrices),
        "full": _moved(weights.values(), base.parameters()),
        "weights": sum(w.numel() for w in weights.values()),
    }


def _moved(before: Iterable[torch.Tensor], after: Iterable[torch.Tensor]) -> float:
    """The part of all entries that are other numbers than before."""
    pairs = list(zip(before, after, strict=True))
    return sum(int((a != b).sum()) for a, b in pairs) / sum(a.numel() for a, _ in pairs)


@functools.cache
def _step_ratio(variant: str) -> tuple[float, float, float]:
    """Quartiles of a step's time as a part of full fine-tuning's, on the course's base."""
    import json

    from ..paths import DATA

    rows = json.loads((DATA / "results" / "step.json").read_text(encoding="utf-8"))["rows"]
    return next(tuple(row["ratio_to_full"]) for row in rows if row["variant"] == variant)


# ------------------------------------------------------------------------------------------------------------ how many


@claim("a 4096 × 4096 matrix has 16.7M parameters, B and A of rank 8 have 65K: “99.6 % fewer”", 3, topic="how many")
def one_matrix() -> Finding:
    matrix, factors = nn.Linear(4096, 4096, bias=False, device="meta").weight.numel(), LoRA.size(4096, 4096, r=8)
    saved = 100 * (1 - factors / matrix)
    assert (matrix, factors, round(saved, 1)) == (16_777_216, 65_536, 99.6)
    return Finding(
        f"{matrix:,} (rounded it is 16.8M) and {factors:,}: {saved:.2f} % fewer to train; the matrix itself stays",
        "holds",
    )


@claim("Llama-2-7B with r = 8 prints “4,194,304 || all params: 6,742,609,920 || trainable%: 0.06”", 5, topic="how many")
def llama_printed() -> Finding:
    c = _count(SEVEN, "LoRA", QV, r=8)
    assert (c.trainable, c.total, f"{c.percent:.2f}") == (4_194_304, 6_742_609_920, "0.06")
    return Finding(
        f"{c.trainable:,} of {c.total:,}, {c.percent:.4f} %. The text names no layers; it is q_proj and "
        "v_proj, the library's default. On all linear layers it would be "
        f"{_lora(SEVEN, 8, 'all-linear'):,}",
        "holds",
    )


@claim("LoRA “reduces trainable parameters by 10,000x (from 70B to 10M)”", 5, topic="how many")
def ten_thousand_times() -> Finding:
    gpt3 = 96 * 2 * LoRA.size(12288, 12288, r=4)  # 96 layers, q and v: Hu et al. 2021, arXiv:2106.09685, section 4.2
    printed, ours = 350e9 / 35e6, _count("gpt3-175b").total / gpt3
    seventy = {r: _count(SEVENTY).total / _lora(SEVENTY, r) for r in (3, 8)}
    assert 70e9 / 10e6 == 7000 and printed == 10_000 > ours > seventy[8] and seventy[3] > 10_000
    return Finding(
        f"70B to 10M is {70e9 / 10e6:,.0f} times. 10,000 is said of GPT-3 in the LoRA paper: of parameters in its "
        "abstract, of the file (350 GB to 35 MB, r = 4 on q and v) in section 4.2, where we count "
        f"{ours:,.0f} times fewer parameters. Llama 3 70B, q and v: {seventy[8]:,.0f} times with r = 8, "
        f"{seventy[3]:,.0f} with r = 3",
        "wrong: the division; 10,000 times itself takes r = 3",
    )


@claim("a 7B model: “train only ~30M parameters”, “over 200× smaller”", 4, topic="how many")
def thirty_million() -> Finding:
    base, twelve = _count(SEVEN).total, _lora(SEVEN, 12, "all-linear")
    assert round(twelve / 1e6) == 30 and base / twelve > 200 and 7e9 / 30e6 > 200
    return Finding(
        f"r = 12 on all linear layers: {twelve:,}, {base / twelve:.0f} times fewer; r = 8 on q and v: "
        f"{_lora(SEVEN, 8):,}, {base / _lora(SEVEN, 8):,.0f} times fewer",
        "holds",
    )


@claim("PEFT updates “often < 1 %” of the parameters", 1, 3, topic="how many")
def below_one_percent() -> Finding:
    shares = {
        (r, where): _percent(_count(SEVEN, "LoRA", where, r=r))
        for r, where in ((8, QV), (8, "all-linear"), (64, "all-linear"))
    }
    small = _percent(_count("gpt2", "LoRA", r=8))
    assert shares[8, QV] < 1 and shares[8, "all-linear"] < 1 < shares[64, "all-linear"]
    return Finding(
        f"Llama 2 7B: {shares[8, QV]:.2f} % (r = 8, q and v), {shares[8, 'all-linear']:.2f} % (r = 8, all "
        f"linear), {shares[64, 'all-linear']:.2f} % (r = 64, all linear); GPT-2: {small:.2f} % (r = 8, "
        "all linear)",
        "holds if the rank is small beside the width of the layers",
    )


@claim("LoRA trains “0.1–1 % of original parameters”", 3, topic="how many")
def tenth_to_one_percent() -> Finding:
    wide = {r: _percent(_count(SEVEN, "LoRA", "all-linear", r=r)) for r in (8, 64)}
    narrow = {r: _percent(_count(SEVEN, "LoRA", QV, r=r)) for r in (8, 64)}
    assert narrow[8] < 0.1 < wide[8] < 1 < wide[64] and 0.1 < narrow[64] < 1
    return Finding(
        f"Llama 2 7B, all linear layers: {wide[8]:.2f} % at r = 8, {wide[64]:.2f} % at r = 64; q and v: "
        f"{narrow[8]:.2f} % and {narrow[64]:.2f} %. The text's own ranks, 8 to 64, leave the range on "
        "both sides",
        "holds if r is in the middle",
    )


@claim("LoRA on q, k and v of every layer of a 7B model trains “0.1–1 % (e.g., 7–70M)”", 3, topic="how many")
def seven_to_seventy_million() -> Finding:
    one = _lora(SEVEN, 1, "q_proj|k_proj|v_proj")  # r times as many at rank r
    low, high = math.ceil(7e6 / one), math.floor(70e6 / one)
    assert _lora(SEVEN, low, "q_proj|k_proj|v_proj") == low * one
    return Finding(
        f"{one:,}·r on q, k and v: r = {low} to r = {high} gives 7 to 70 million. r = 8, the text's "
        f"example, gives {8 * one:,}",
        f"holds if r is {low} to {high}",
    )


@claim("with r = 8 on q and v “only train ~0.1 % of parameters”", 3, topic="how many")
def about_a_tenth_of_a_percent() -> Finding:
    models = ("llama-3.2-1b", "llama-2-7b", "llama-3.1-8b", "llama-3.1-70b", "qwen2.5-0.5b")
    shares = {name: _percent(_count(name, "LoRA", QV, r=8)) for name in models}
    assert all(share < 0.15 for share in shares.values())
    return Finding(
        "; ".join(f"{name} {share:.3f} %" for name, share in shares.items()),
        "holds if the model has about a billion parameters; larger ones train less",
    )


@claim("BitFit: “extremely low parameter count (< 0.1 %)”", 2, topic="how many")
def bitfit_share() -> Finding:
    models = ("gpt2", "roberta-base", "opt-350m", "opt-6.7b")
    shares = {name: _percent(_count(name, "BitFit")) for name in models}
    assert all(0.01 < share < 0.1 for share in shares.values())
    biases = sum(row.parameters for row in _count(SEVEN).rows if row.name == "bias")
    assert biases == 0
    return Finding(
        "; ".join(f"{name} {share:.3f} %" for name, share in shares.items()) + f"; {SEVEN} has {biases} biases",
        "holds if the model has biases; Llama has none",
    )


@claim("BitFit is the “simplest, most lightweight approach”", 4, topic="how many")
def bitfit_lightest() -> Finding:
    methods: dict[str, dict] = {"BitFit": {}, "IA3": {}, "LNTuning": {}, "PromptTuning": {"k": 20}}
    numbers = {name: _count("gpt2", name, **hyper).trainable for name, hyper in methods.items()}
    assert min(numbers, key=numbers.__getitem__) != "BitFit"
    return Finding(
        "trained in GPT-2: " + "; ".join(f"{name} {number:,}" for name, number in numbers.items()),
        "wrong: prompts, norms and (IA)³ train fewer",
    )


@claim("in PEFT “99 % of the original model parameters” are frozen", 2, topic="how many")
def ninety_nine_percent_frozen() -> Finding:
    c, bits = _count(SEVEN, "LoRA", "all-linear", r=64), _count("gpt2", "BitFit")
    frozen = sum(row.parameters for row in c.rows if row.adapter is None and not row.trainable)
    assert frozen == c.base and _percent(bits) < 1
    return Finding(
        f"LoRA freezes {100 * frozen / c.base:.0f} % of the original parameters; what it trains is new. "
        f"Of methods that train originals, BitFit leaves {100 - _percent(bits):.2f} % of GPT-2 frozen",
        "holds, and it is more",
    )


@claim("PEFT trains “added”, “new” parameters only: “Freeze and Add”", 1, 2, topic="how many")
def only_new_ones() -> Finding:
    rows = _count("gpt2").rows
    biases = sum(row.parameters for row in rows if row.name == "bias")
    norms = sum(row.parameters for row in rows if "ln_" in row.path)
    trained = {method: _count("gpt2", method).trainable for method in ("BitFit", "LNTuning")}
    assert trained == {"BitFit": biases, "LNTuning": norms}
    return Finding(
        f"BitFit, in text 2's own table, trains the {biases:,} biases that GPT-2 has, LN tuning the {norms:,} numbers "
        "of its norms: neither needs anything new (we keep the change beside them, so that it can be switched off)",
        "holds if methods that train a part of the model are left out",
    )


@claim("fine-tuning Llama-3-70B fully “requires updating 70B parameters”; 100 % are trained", 3, 5, topic="how many")
def full_is_everything() -> Finding:
    c = _count(SEVENTY, "full")
    assert c.trainable == c.total == 70_553_706_496 and c.percent == 100
    return Finding(f"{c.trainable:,} of {c.total:,}", "holds")


# ------------------------------------------------------------------------------------------------ what the methods are


@claim("the update is W + B·A with “A (d × r) and B (r × d)”", 5, topic="what the methods are")
def shapes_of_a_and_b() -> Finding:
    d, r = 4096, 8
    A, B = torch.empty(d, r, device="meta"), torch.empty(r, d, device="meta")
    product = tuple((B @ A).shape)
    assert product == (r, r) and tuple((A @ B).shape) == (d, d)
    return Finding(
        f"with these shapes B·A is {product[0]} × {product[1]} and cannot be added to W, {d} × {d}. In "
        "the paper A is (r, d) and B is (d, r)",
        "wrong: the shapes are swapped",
    )


@claim("Output = Input × (W + α/r · BA)", 3, topic="what the methods are")
def lora_equation() -> Finding:
    torch.manual_seed(0)
    layer = nn.Linear(12, 10, bias=False).double().requires_grad_(False)
    adapter = LoRA(layer, r=3, alpha=6).double()
    nn.init.normal_(adapter.lora_B)
    x = torch.randn(5, 12, dtype=torch.double)
    W = layer.weight + 6 / 3 * adapter.lora_B @ adapter.lora_A
    assert torch.allclose(adapter(layer, x), x @ W.T)
    return Finding(
        "equal to our LoRA in float64, with the transpose that the text leaves out: x·(W + α/r·BA)ᵀ",
        "holds",
    )


@claim("the adapted or merged weight is “W + BA”", 3, 5, topic="what the methods are")
def merging_without_scale() -> Finding:
    r, alpha = 8, 32  # the configuration that both texts show
    adapter = LoRA(nn.Linear(64, 64), r=r, alpha=alpha)
    A, B = torch.randn(r, 64, dtype=torch.double), torch.randn(64, r, dtype=torch.double)
    assert adapter.scaling == alpha / r == 4
    assert torch.equal(alpha / r * (B @ A), (alpha / r * B) @ A) and not torch.allclose(alpha / r * (B @ A), B @ A)
    return Finding(
        "so it stands in the paper's equation 3; the factor α/r comes in the sentence after it, and in text 3 further "
        f"down. In the configuration that both texts print, r = {r} and α = {alpha}, it is {alpha / r:.0f}: a file's "
        "B and A, added as they are, give a quarter of the change",
        "holds if α/r is folded into B",
    )


@claim(
    "LoRA trains small matrices in each transformer layer; embeddings and output layer stay frozen",
    1,
    3,
    4,
    topic="what the methods are",
)
def where_lora_sits() -> Finding:
    c = _count(SEVEN, "LoRA", QV, r=8)
    blocks = [part.trainable for name, part in c.per_layer.items() if name.isdigit()]
    rest = {name: part.trainable for name, part in c.per_layer.items() if not name.isdigit()}
    assert (
        len(set(blocks)) == 1
        and not any(rest.values())
        and {row.name for row in c.rows if row.trainable} == {"lora_A", "lora_B"}
    )
    return Finding(f"{blocks[0]:,} in each of {len(blocks)} blocks, 0 in {', '.join(rest)}", "holds")


@claim("the change “has a low intrinsic rank”; LoRA “approximates updates”", 4, 5, topic="what the methods are")
def low_rank() -> Finding:
    from .. import lab

    found = lab.summary(lab.read("lora_rank"), by=["method", "rank"])["mean"]
    by_rank = {int(rank): mean for (method, rank), mean in found.items() if method == "LoRA"}
    full = found[("full", 0)]
    assert list(by_rank.values()) == sorted(by_rank.values()) and max(by_rank.values()) < full
    shown = ", ".join(f"{100 * mean:.0f} % with r = {rank}" for rank, mean in by_rank.items())
    return Finding(
        f"on our base, SQL, 250 steps: {shown}, {100 * full:.0f} % by full fine-tuning. Each rank helps, and none of "
        "these is enough. In the spectrum of the full change a few directions stand out, and its tail is long "
        "(lesson 02)",
        "holds if “low” may mean more than 16, as here",
    )


@claim("adapters are inserted “between” transformer or model layers", 2, 3, 4, topic="what the methods are")
def adapters_between_layers() -> Finding:
    c = _count("gpt2", "Houlsby", bottleneck=64)
    hosting = {row.path for row in c.rows if row.adapter}
    places = sorted({path.split(".", 3)[3] for path in hosting})
    assert places == ["attn.c_proj", "mlp.c_proj"] and len(hosting) == 2 * 12
    return Finding(
        "Houlsby et al. (2019) say “between layers” too; their figure 2 shows two in each transformer layer, one after "
        f"each sublayer. In GPT-2 that is {len(hosting)}, behind {' and '.join(places)} of 12 layers; between whole "
        "transformer layers there is room for 11",
        "holds if “layer” means a sublayer",
    )


@claim(
    "prefix tuning prepends vectors to “the hidden states” or “the input” of each layer",
    2,
    3,
    topic="what the methods are",
)
def prefix_place() -> Finding:
    k, layers, d, d_kv = 20, 16, 2048, 512  # Llama 3.2 1B
    c = _count("llama-3.2-1b", "PrefixTuning", k=k)
    keys_values, hidden = layers * k * 2 * d_kv, layers * k * d
    assert c.trainable == keys_values != hidden
    return Finding(
        f"before the keys and the values of each attention: 2·L·k·d_kv = {keys_values:,} in Llama 3.2 1B with "
        f"k = {k}, and text 4 says so; vectors before what enters a layer would be L·k·d = {hidden:,}",
        "holds if a position's keys and values are meant",
    )


@claim(
    "prompt tuning trains vectors at the input only; the model remains frozen", 2, 3, 4, topic="what the methods are"
)
def prompt_place() -> Finding:
    c = _count(SEVEN, "PromptTuning", k=20)
    assert c.trainable == 20 * 4096 and c.per_method["base"] == 0
    return Finding(
        f"k·d = 20 · 4096 = {c.trainable:,} in Llama 2 7B; trained in the base: {c.per_method['base']}",
        "holds",
    )


@claim("PEFT explains “why you can run powerful AI on your MacBook”", 1, topic="what the methods are")
def running_locally() -> Finding:
    base, c = _count(SEVEN), _count(SEVEN, "LoRA", QV, r=8)
    ways = compare(LEDGER_7B, targets=QV)
    assert c.total > base.total and ways["QLoRA r=8"].weights < 0.4 * ways["full"].weights
    return Finding(
        "the text names quantised models and adapters in one breath. It is the 4-bit weights that shrink a 7B model, "
        f"from {human(ways['full'].weights)} to {human(ways['QLoRA r=8'].weights)}; an adapter adds to it, "
        f"{c.total:,} parameters instead of {base.total:,}",
        "holds if the quantised base is meant; an adapter alone only adds",
    )


@claim("one base serves many users, adapters are swapped on the fly", 1, 2, 3, topic="what the methods are")
def swapping() -> Finding:
    found = _after_some_sql()
    assert found["off"] == 0 and found["on"] > 0.99
    (many,) = _recorded("serve", "speed_to_plain", adapters=64, phase="decode", variant="ours, steady")
    assert many > 0.5
    return Finding(
        f"on our base, LoRA after three steps on SQL: with it on, {100 * found['on']:.0f} % of the outputs to another "
        f"question are other numbers; switched off again, {100 * found['off']:.0f} %: the same bits as before (a law "
        f"test says so of every method). 64 rows with 64 adapters are decoded at {100 * many:.0f} % of the speed with "
        "one for all (lesson 13)",
        "holds",
    )


# ---------------------------------------------------------------------------------------------------------------- disk


@claim("adapters are MBs (“a few MB”) instead of GBs", 1, 3, topic="disk")
def adapter_megabytes() -> Finding:
    sizes = {
        (r, where): _count(SEVEN, "LoRA", where, r=r).file_bytes("bfloat16")
        for r, where in ((8, QV), (16, "all-linear"), (64, "all-linear"))
    }
    base = _count(SEVEN).file_bytes("bfloat16")
    assert sizes[8, QV] < 10e6 and sizes[64, "all-linear"] > 100e6
    return Finding(
        f"Llama 2 7B in 16 bits is {human(base)}; its adapters: {human(sizes[8, QV])} (r = 8, q and v), "
        f"{human(sizes[16, 'all-linear'])} (r = 16, all linear), {human(sizes[64, 'all-linear'])} (r = "
        "64, all linear)",
        "holds if rank and targets are modest; “a few” only for q and v",
    )


@claim("a 70B model takes ~140 GB, ten tasks 1.4 TB", 2, 5, topic="disk")
def seventy_on_disk() -> Finding:
    sizes = {name: _count(name).file_bytes("bfloat16") for name in ("llama-2-70b", SEVENTY)}
    assert all(round(size / GB, -1) == 140 for size in sizes.values())
    return Finding(
        "; ".join(f"{name}: {human(size)}, ten of them {human(10 * size)}" for name, size in sizes.items()),
        "holds, in 16 bits",
    )


@claim("adapters of a 70B model take ~100 MB each", 2, topic="disk")
def hundred_megabytes() -> Finding:
    sizes = {
        (r, where): _count("llama-2-70b", "LoRA", where, r=r).file_bytes("bfloat16")
        for r, where in ((8, QV), (24, QV), (4, "all-linear"), (8, "all-linear"))
    }
    assert sizes[8, QV] < 100e6 < sizes[8, "all-linear"]
    return Finding(
        "in 16 bits: "
        + "; ".join(
            f"{human(size)} (r = {r}, {'q and v' if where == QV else 'all linear'})"
            for (r, where), size in sizes.items()
        ),
        "holds if r is about 4 on all layers, or 24 on q and v",
    )


@claim("one base and ten adapters: “total storage is reduced by over 80 %”", 2, topic="disk")
def ten_tasks() -> Finding:
    base, adapter = (
        _count("llama-2-70b").file_bytes("bfloat16"),
        _count("llama-2-70b", "LoRA", "all-linear", r=8).file_bytes("bfloat16"),
    )
    saved = {n: 100 * (1 - (base + n * adapter) / (n * base)) for n in (1, 5, 6, 10, 100)}
    assert saved[5] < 80 < saved[6] < saved[10] and round(saved[10]) == 90
    shown = "; ".join(f"{n} task{'s' * (n > 1)} {part:.1f} %" for n, part in saved.items())
    return Finding(
        f"saved, with r = 8 on all linear layers: {shown}", "holds; it is 90 %, and depends on the number of tasks"
    )


@claim("thousands of user-specific models can share one base", 1, topic="disk")
def thousands_of_users() -> Finding:
    base, adapter = (
        _count("llama-3.1-8b").file_bytes("bfloat16"),
        _count("llama-3.1-8b", "LoRA", QV, r=8).file_bytes("bfloat16"),
    )
    assert base + 1000 * adapter < 2 * base
    return Finding(
        f"Llama 3.1 8B: {human(base)}, and {human(1000 * adapter)} for a thousand adapters (r = 8, q and "
        f"v), instead of {human(1000 * base)}",
        "holds",
    )


# -------------------------------------------------------------------------------------------------------------- memory


@claim("full fine-tuning of a 7B model needs “often 80 GB+”", 3, topic="memory")
def eighty_gigabytes() -> Finding:
    mixed, frugal = compare(LEDGER_7B)["full"], compare(LEDGER_7B, precision="bfloat16 only", optimizer="SGD")["full"]
    assert frugal.total < 80 * GB < mixed.total
    return Finding(
        f"{human(mixed.total)} with Adam in mixed precision, {human(frugal.total)} with plain SGD in "
        "bfloat16, activations not counted",
        "holds if the optimizer is Adam, as nearly always",
    )


@claim("full fine-tuning of Llama-3-70B “needs 100s of GBs of VRAM”", 5, topic="memory")
def hundreds_of_gigabytes() -> Finding:
    total = 16 * _count(SEVENTY).total  # bytes: Rajbhandari et al. 2020, arXiv:1910.02054, section 3.1
    assert total > 1e12
    return Finding(
        f"{human(total)} in mixed precision with Adam, {math.ceil(total / (80 * GIB))} cards of 80 GiB",
        "holds, and it is more",
    )


@claim("full fine-tuning at this scale is “mathematically impossible” for most", 2, topic="memory")
def impossible() -> Finding:
    needs = {name: 16 * _count(name).total for name in (SEVENTY, "gpt3-175b")}
    cards = {name: math.ceil(need / (80 * GIB)) for name, need in needs.items()}
    assert all(10 < n < 50 for n in cards.values())
    return Finding(
        "nothing in the mathematics forbids it; it takes, with Adam in mixed precision and without activations, "
        + "; ".join(f"{human(needs[name])} or {n} cards of 80 GiB for {name}" for name, n in cards.items()),
        "wrong: only expensive",
    )


@claim("freezing drastically reduces the memory of gradients and optimizer states", 2, 3, 4, topic="memory")
def states_saved() -> Finding:
    ways = compare(LEDGER_7B, targets=QV)
    full, lora = (way.gradients + way.optimizer for way in (ways["full"], ways["LoRA r=8"]))
    assert lora < 0.001 * full
    return Finding(
        f"7B, r = 8 on q and v: {human(full)} become {human(lora)}; the weights stay, "
        f"{human(ways['LoRA r=8'].weights)}, and so do nearly all activations (lesson 01)",
        "holds",
    )


@claim("full fine-tuning requires multiple A100 or H100", 2, topic="memory")
def several_cards() -> Finding:
    cards = {name: math.ceil(compare(SHAPES[name])["full"].total / (80 * GIB)) for name in list(SHAPES)[1:]}
    assert cards["1B (Llama 3.2)"] == 1 and cards["7B (Llama 2)"] > 1
    return Finding(
        "cards of 80 GiB, activations not counted: " + "; ".join(f"{n}: {c}" for n, c in cards.items()),
        "holds if the model has several billion parameters",
    )


@claim("with PEFT a single consumer card (RTX 3090 or 4090, 24 GB) is enough", 1, 2, 3, 5, topic="memory")
def consumer_card() -> Finding:
    rows = {name: compare(SHAPES[name], targets=QV) for name in list(SHAPES)[1:]}
    most = {way: [name for name, ways in rows.items() if ways[way].fits(24)][-1] for way in ("LoRA r=8", "QLoRA r=8")}
    need = rows["70B (Llama 2)"]["QLoRA r=8"]
    assert most["LoRA r=8"] == "7B (Llama 2)" and not need.fits(24)
    return Finding(
        "largest of our models whose ledger fits 24 GiB: "
        + "; ".join(f"{w}: {n}" for w, n in most.items())
        + f". A 70B model takes {_gib(need)} even in 4 bits",
        "holds if the model is no larger than that",
    )


@claim("Llama-7B can be fine-tuned with LoRA on a single 16 GB GPU", 5, topic="memory")
def sixteen_gigabytes() -> Finding:
    lora = compare(LEDGER_7B, targets=QV)["LoRA r=8"]
    needs = {tokens: _need(SEVEN, targets=QV, r=8, tokens=tokens) for tokens in (512, 2048)}
    card = "RTX 4080"
    assert lora.fits(16) and needs[512].verdict(card, advise=False) and not needs[2048].verdict(card, advise=False)
    return Finding(
        f"{_gib(lora)} with the base in 16 bits; {16 - lora.total / GIB:.1f} GiB are left for activations. A step "
        f"with one text, predicted as in lesson 09, takes {_reserved(needs)}; the first is "
        f"{needs[512].verdict(card, advise=False).word} on an {card}, which has 16 GB by its name",
        "holds, tightly, if the texts are short",
    )


@claim("QLoRA fine-tunes 65B models on a single 48 GB GPU", 5, topic="memory")
def qlora_65b() -> Finding:
    ways = {r: compare(LLAMA_65B, r=r)[f"QLoRA r={r}"] for r in (8, 64)}
    need = _need("llama-65b", r=64, tokens=512, quantize="nf4", checkpointing=True)
    words = {card: need.verdict(card, advise=False).word for card in ("RTX A6000", "L40S")}
    assert all(way.fits(48) for way in ways.values()) and words == {"RTX A6000": "fits", "L40S": "does not fit"}
    return Finding(
        "; ".join(f"{_gib(way)} at r = {r} on all linear layers" for r, way in ways.items())
        + ", activations not counted. A step with one text, r = 64 and gradient checkpointing, predicted as in "
        f"lesson 09, takes {_reserved({512: need})}. Both sold as 48 GB: "
        + ", ".join(f"{card}: {word}" for card, word in words.items()),
        "holds if the card has nearly 48 GiB, gradients are checkpointed and the texts are not too long",
    )


@claim("QLoRA: the base frozen in 4-bit NF4, adapters in FP16 or BF16", 5, topic="memory")
def qlora_formats() -> Finding:
    stored = _count("llama-2-70b", "LoRA", "all-linear", r=64)
    sixteen, thirty_two = (stored.file_bytes(dtype) for dtype in ("bfloat16", "float32"))
    assert thirty_two > 1.99 * sixteen and 0.5 < NF4 < 0.52
    return Finding(
        "so says the paper (Dettmers et al. 2023, arXiv:2305.14314, section 3): NF4 is the type of storage, bfloat16 "
        f"that of computation and of the adapters. With the scales, a weight takes {8 * NF4:.2f} bits. Others, as we, "
        f"keep adapters in float32: at 70B and r = 64 that is {human(thirty_two)} instead of {human(sixteen)}",
        "holds, and in the paper it is BF16",
    )


# ---------------------------------------------------------------------------------------------------------------- time


@claim("PEFT makes fine-tuning “faster”", 4, topic="time")
def faster() -> Finding:
    (_, all_linear, most), (_, qv, _) = _step_ratio("ours, all linears"), _step_ratio("ours, q,v")
    (_, peft_all, _), (_, peft_qv, _) = _step_ratio("peft, all linears"), _step_ratio("peft, q,v")
    gpt3 = 32.5 / 43.1  # tokens a second on each V100, full and LoRA: Hu et al. 2021, arXiv:2106.09685, section 4.2
    assert qv < all_linear < most < 1 and round(100 * (1 - gpt3)) == 25
    return Finding(
        f"a step's time, as a part of full fine-tuning's: {qv:.2f} on our base with LoRA on q and v, {all_linear:.2f} "
        f"on all linear layers; {gpt3:.2f} as the LoRA paper reports it of GPT-3, the “25 %” of its section 4.2. On so "
        f"small a model each product more is felt: the reference library's steps take {peft_qv:.2f} and {peft_all:.2f}",
        "holds, by a tenth to a quarter",
    )


@claim("PEFT takes “hours instead of days”", 3, topic="time")
def hours_not_days() -> Finding:
    _, floor, _ = _step_ratio("floor")
    limit = 2 / 3  # products of a step: output, gradient of the input, gradient of the weight; the last is saved
    assert min(floor, limit, 32.5 / 43.1) > 24 / 48  # the third is GPT-3's: see `faster`
    return Finding(
        "two days in less than one are less than half of the time. Of a layer's three products in a step one is saved, "
        f"the gradient of the weight: {limit:.2f} of the multiplications are left, and {floor:.2f} of the time on our "
        "base, measured without any adapter. LoRA's own paper reports 25 % for GPT-3",
        "holds if full fine-tuning does not fit the cards at hand; faster steps alone do not do it",
    )


@claim("LoRA has “1 % of the cost” of full fine-tuning", 5, topic="time")
def one_percent_of_the_cost() -> Finding:
    ways, (_, ratio, _) = compare(LEDGER_7B, targets=QV), _step_ratio("ours, q,v")
    memory = 100 * ways["LoRA r=8"].total / ways["full"].total
    assert memory > 10 and ratio > 0.5
    return Finding(
        f"7B, r = 8 on q and v: {memory:.1f} % of the memory, activations aside; a step of our base takes "
        f"{100 * ratio:.0f} % of the time",
        "wrong",
    )


@claim("LoRA: “no inference latency”", 2, 3, topic="time")
def no_latency() -> Finding:
    lora = _costs().loc["LoRA"]
    assert lora.prefill > 1 and bool(lora.mergeable)
    beside, merged = (_recorded("latency", "ratio", variant=f"LoRA{way}") for way in ("", ", exported"))
    assert min(beside) > 1.05 > max(merged)
    return Finding(
        f"measured on our base, r = 8 on all linear layers, not merged: a forward pass takes {lora.prefill:.2f} times "
        f"the base's time, a generated token {lora.decode:.2f} times. Our layers are small, so the products beside "
        f"them weigh much. With a wider model too, 1 and 16 rows: {min(beside):.2f} to {max(beside):.2f} times; merged "
        f"and exported {min(merged):.2f} to {max(merged):.2f} times (lesson 12)",
        "holds if it is merged, and then nothing can be swapped",
    )


@claim("LoRA does not slow inference, for it can be merged: “it becomes a standard model again”", 5, topic="time")
def merged_is_standard() -> Finding:
    from .. import lab

    merged, before = {}, {}
    bases = {"dense": nn.Sequential(nn.Linear(64, 64)), "packed": quantize(nn.Sequential(nn.Linear(64, 64)))}
    for name, base in bases.items():
        model = attach(base, LoRA, targets="0", r=2)
        before[name] = sum(row.bytes for row in count(model).rows if row.adapter is None)
        merged[name] = next(iter(hosts(merge(model)).values())).layer
        assert type(merged[name]) is nn.Linear
    sizes = {name: sum(p.nbytes for p in layer.parameters()) for name, layer in merged.items()}
    assert sizes["dense"] == before["dense"] == sizes["packed"] > 4 * before["packed"]
    runs = lab.read("qlora")
    runs = runs[runs["method"] == "QLoRA"]
    logit = runs["requantised_error"].min()
    assert logit > 100 * runs["merged_error"].max()
    return Finding(
        "a merged layer is an ordinary nn.Linear of the same size (law tests: the outputs agree). On a base in four "
        "bits it is dense again; and packed again, it is another model: some logit moves by "
        f"{logit:.1f} or more (lesson 08, {len(runs)} runs)",
        "holds if the base is not in four bits",
    )


# --------------------------------------------------------------------------------------------- quality and forgetting


@claim(
    "LoRA is “comparable to full fine-tuning”, “nearly the same accuracy” for many or most tasks",
    3,
    4,
    5,
    topic="quality and forgetting",
)
def comparable_quality() -> Finding:
    from .. import lab

    found = lab.summary(lab.read("lora_rank"), by=["method", "rank"])
    names = [f"{method} r = {rank}" if rank else method for method, rank in found.index]
    lines = [f"{name} {100 * mean:.0f} %" for name, mean in zip(names, found["mean"], strict=True)]
    assert found["mean"].idxmax()[0] == "full"
    classic = _classic()
    tasks = [
        task
        for task in dict.fromkeys(task for task, _ in classic.index)
        if all((task, name) in classic.index and classic.seeds[task, name] == 3 for name in ("LoRA", "full"))
    ]
    more = [
        f"{task} {100 * classic['mean'][task, 'LoRA']:.0f} and {100 * classic['mean'][task, 'full']:.0f} %"
        for task in tasks
    ]
    return Finding(
        f"our base, equal steps, tuned rates, three seeds. SQL, 250 steps: {'; '.join(lines)}. The experiment of "
        f"lessons 03 to 05, LoRA r = 8 and full: {'; '.join(more)}",
        "holds if rank and steps suffice for the task; not here",
    )


@functools.cache
def _grid():
    """The runs of the experiment of lessons 10 and 11 on SQL, with what they retained."""
    from .. import lab
    from ..retention import with_retained

    return with_retained(lab.read("forgetting").query("task == 'sql'"))


@claim("LoRA is “very stable”", 2, topic="quality and forgetting")
def stability() -> Finding:
    runs, ranges, spread = _grid(), {}, {}
    for name in ("LoRA r=8 all", "full"):
        means = runs[runs.method == name].groupby("learning_rate").test_accuracy.mean()
        good = means[means >= 0.8 * means.max()].index
        ranges[name] = good.max() / good.min()
        best = runs[(runs.method == name) & (runs.learning_rate == means.idxmax())].test_accuracy
        spread[name] = 100 * (best.max() - best.min())
    assert ranges["LoRA r=8 all"] <= ranges["full"]
    return Finding(
        "SQL, three seeds at each of at least five rates: accuracy is within a fifth of its best over rates that "
        f"differ by a factor of {ranges['LoRA r=8 all']:.3g} for LoRA, {ranges['full']:.3g} for full fine-tuning; "
        f"seeds at the best rate are {spread['LoRA r=8 all']:.0f} and {spread['full']:.0f} points apart. See lesson 11",
        "wrong: no more than full fine-tuning is",
    )


@claim("prefix tuning is “excellent for controlling output style”", 2, topic="quality and forgetting")
def prefix_style() -> Finding:
    classic = _classic()
    shown = {"prefix tuning": "PrefixTuning", "with its network": "PrefixTuning MLP", "LoRA": "LoRA", "full": "full"}
    rows = {what: classic.loc[("voices", name)] for what, name in shown.items()}
    lines = [f"{what} {100 * row.test_form:.0f} ({100 * row['mean']:.0f}) %" for what, row in rows.items()]
    assert 0.8 < rows["prefix tuning"].test_form <= rows["LoRA"].test_form
    return Finding(
        "task voices: answers in the right voice (and the right sentence in it), tuned rates, three seeds: "
        f"{'; '.join(lines)}. See lesson 04",
        "holds if the tone alone counts; other methods do as well",
    )


@claim(
    "as base weights are frozen, forgetting is prevented: “the foundational intelligence is preserved”",
    2,
    4,
    5,
    topic="quality and forgetting",
)
def forgetting() -> Finding:
    from .. import lab

    found = _after_some_sql()
    best = lab.chosen(_grid().query("method == 'LoRA r=8 all'"), "method")
    assert found["off"] == 0 and best.retained.max() < 0.5
    return Finding(
        "with the adapter off, the base is there to the last bit. With it on, trained at its best rate for SQL, "
        f"LoRA retains {100 * best.retained.mean():.0f} % of the facts and list skills of our base ({len(best)} seeds, "
        f"at most {100 * best.retained.max():.0f} %). See lesson 10",
        "holds if the adapter is switched off; with it on, what the base knew goes as the rate rises",
    )


@claim("forgetting is mitigated because “most of the original weights are frozen”", 5, topic="quality and forgetting")
def most_are_frozen() -> Finding:
    from .. import retention

    c, found = _count(SEVEN, "LoRA", QV, r=8), _after_some_sql()
    assert c.per_method["base"] == 0 and found["merged"] > 0.9999 and found["merging"] < 1e-3
    runs = _grid()
    level = runs[runs.method == "full"].groupby("learning_rate").test_accuracy.mean().max() / 2
    kept = retention.at_equal_learning(runs, level).groupby("method").retained.mean()
    full, lora = kept["full"], kept["LoRA r=8 all"]
    assert full > 1.5 * lora
    return Finding(
        "with LoRA all of them are frozen, not most. Merged after three steps on our base, "
        f"{100 * found['merged']:.1f} % of the {found['entries']:,} entries of its {found['matrices']} matrices are "
        f"other numbers. And where both have learned {100 * level:.0f} % of SQL, full fine-tuning retains "
        f"{100 * full:.0f} % of the base's facts and list skills and LoRA {100 * lora:.0f} %. See lesson 10",
        "wrong: the frozen share is no measure of what is kept",
    )


@claim("fine-tuning fully on code can cost the model its poetry", 2, topic="quality and forgetting")
def full_forgets() -> Finding:
    from .. import lab

    found, chosen = _after_some_sql(), lab.chosen(_grid().query("method in ['full', 'LoRA r=8 all']"), "method")
    kept = chosen.groupby("method").retained.mean()
    assert found["full"] > 0.999 and kept["full"] < 0.5
    return Finding(
        f"at the rate that is best for SQL, full fine-tuning retains {100 * kept['full']:.0f} % of the facts and list "
        f"skills of our base, and there is no switch back. LoRA, at its own, retains "
        f"{100 * kept['LoRA r=8 all']:.0f} %; at lower rates both keep more and learn less. See lesson 10",
        "holds; it can with LoRA as well",
    )
