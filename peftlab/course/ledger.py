"""What training costs in memory: weights, gradients and optimizer states (computed), activations (measured).

bytes = P·weight + T·(gradient + optimizer), with P parameters in all, T of them trained.

Activations are not in the formula: they grow with batch and tokens, are measured rather than computed here, and
adapters save few of them, because the gradient still passes through every frozen layer above the first adapter.
Source: Rajbhandari et al. 2020 (ZeRO), arXiv:1910.02054, section 3.1: 2 + 2 + 12 = 16 bytes for each parameter.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..runtime import mode
from . import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .widgets import Explorer

GB, GIB = 10**9, 2**30  # files and papers count in GB; a "24 GB" card has 24 GiB
CARDS = (24, 80)  # GiB: a large consumer card; a data-centre card


@dataclass(frozen=True)
class Ledger:
    """Bytes by kind. Ledgers add up: a frozen base and its adapter, say."""

    weights: float
    gradients: float
    optimizer: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer

    def fits(self, gib: float) -> bool:
        """Whether a card of so many GiB holds it; activations need room beside it."""
        return self.total <= gib * GIB

    def __add__(self, other: Ledger) -> Ledger:
        return Ledger(self.weights + other.weights, self.gradients + other.gradients, self.optimizer + other.optimizer)

    def __str__(self) -> str:
        parts = f"weights {human(self.weights)} + gradients {human(self.gradients)} + optimizer {human(self.optimizer)}"
        return f"{parts} = {human(self.total)}"


def ledger(
    n_params: float,
    trainable: float | None = None,
    *,
    weight_bytes: float = 2,
    grad_bytes: float = 2,
    optimizer_bytes: float = 12,
) -> Ledger:
    """The ledger of a model with n_params parameters of which `trainable` (None: all) are trained.

    The *_bytes are per parameter. Their defaults are mixed precision with Adam: weights and gradients in 16 bits; a
    float32 copy of the weights, momentum and variance, 4 bytes each, count as optimizer states.

        ledger(7e9)                                       full fine-tuning of 7B parameters: 112 GB
        ledger(7e9, 0) + ledger(4e6, weight_bytes=4, grad_bytes=4, optimizer_bytes=8)     frozen, and an adapter

    Raises ValueError for a negative number, or if more is trained than there is.
    """
    trained = n_params if trainable is None else trainable
    for name, value in {
        "n_params": n_params,
        "trainable": trained,
        "weight_bytes": weight_bytes,
        "grad_bytes": grad_bytes,
        "optimizer_bytes": optimizer_bytes,
    }.items():
        if value < 0:
            raise ValueError(f"{name}={value} is negative")
    if trained > n_params:
        raise ValueError(
            f"trainable={trained:,} is more than n_params={n_params:,}; add a ledger of the adapter's own parameters"
        )
    return Ledger(n_params * weight_bytes, trained * grad_bytes, trained * optimizer_bytes)


def human(n_bytes: float) -> str:
    """Bytes with a unit that a reader can picture: 112 GB, 13.5 GB, 1.10 TB."""
    value, unit = float(n_bytes), "B"
    for bigger in ("kB", "MB", "GB", "TB", "PB"):
        if value < 1000:
            break
        value, unit = value / 1000, bigger
    digits = 0 if value >= 99.95 or unit == "B" else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f} {unit}"


# ---------------------------------------------------------------------------------- a model that is there: measured


@dataclass(frozen=True)
class Measured:
    """What one training step of a model held: the ledger, and the activations, which depend on the batch."""

    ledger: Ledger
    activations: float

    @property
    def total(self) -> float:
        return self.ledger.total + self.activations

    def __str__(self) -> str:
        kinds = vars(self.ledger) | {"activations": self.activations}
        return " + ".join(f"{kind} {human(size)}" for kind, size in kinds.items()) + f" = {human(self.total)}"


def measured_ledger(
    model: nn.Module, input_ids: Tensor, optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW
) -> Measured:
    """Take one training step on input_ids (B, T), count the bytes that it holds, and leave the model as it was.

    Trained is what requires a gradient. Weights are all parameters, shared ones once; gradients are those that the
    backward pass leaves behind; optimizer states are its tensors, without torch's step counters. Activations are what
    autograd saves in the forward pass for the backward pass, each storage once, without parameters and buffers.
    Not counted: what a layer needs only while it runs, and what the allocator and the libraries keep for themselves.
    Raises ValueError if nothing is trained, or under gradient checkpointing, which hides what it saves.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("nothing is trained: attach an adapter (pl.attach) or call pl.full_finetuning(model) first")
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise ValueError("gradient checkpointing keeps its tensors where autograd's hooks do not see them; "
                         "switch it off to measure")  # fmt: skip
    kept = {_place(t) for t in (*model.parameters(), *model.buffers())}
    saved: dict[int, torch.UntypedStorage] = {}  # holds on to them: freed memory would be handed out again

    def pack(tensor: Tensor) -> Tensor:
        if _place(tensor) not in kept:
            saved[_place(tensor)] = tensor.untyped_storage()
        return tensor

    before = [p.grad for p in trained]
    step = optimizer(trained, lr=0.0)  # states are made, weights stay
    try:
        with mode(model, training=True), torch.random.fork_rng():  # dropout must not move anyone's random numbers
            step.zero_grad()
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                loss = model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
            activations = sum(storage.nbytes() for storage in saved.values())
            saved.clear()
            loss.backward()
            gradients = _bytes(p.grad for p in trained if p.grad is not None)
            step.step()
    finally:
        for parameter, gradient in zip(trained, before, strict=True):
            parameter.grad = gradient
    states = _bytes(t for state in step.state.values() for t in state.values() if isinstance(t, Tensor) and t.dim())
    return Measured(Ledger(_bytes(model.parameters()), gradients, states), activations)


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum({id(t): t.nbytes for t in tensors}.values())


# ------------------------------------------------------------------------- models by their shape, not by name


@dataclass(frozen=True)
class Shape:
    """A Llama-like decoder: enough of its shape to count parameters, the adapter's too.

    Source of the figures: the config.json published with each model.
    """

    width: int
    layers: int
    hidden: int  # width of the feed-forward layer
    vocabulary: int
    kv_width: int  # width of keys and of values: smaller than `width` if heads share them
    tied: bool = False  # the output layer is the embedding

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """The linear layers of one block: name -> (in, out)."""
        d, m, kv = self.width, self.hidden, self.kv_width
        attention = {"q_proj": (d, d), "k_proj": (d, kv), "v_proj": (d, kv), "o_proj": (d, d)}
        return attention | {"gate_proj": (d, m), "up_proj": (d, m), "down_proj": (m, d)}

    @property
    def embeddings(self) -> int:
        return self.vocabulary * self.width * (1 if self.tied else 2)

    @property
    def params(self) -> int:
        linears = sum(i * o for i, o in self.linears.values())
        norms = 2 * self.width
        return self.layers * (linears + norms) + self.width + self.embeddings

    def lora(self, r: int, targets: str = "all-linear") -> int:
        """The parameters of LoRA with rank r: r·(in + out) for each adapted layer."""
        names = self.linears if targets == "all-linear" else targets.split("|")
        return self.layers * sum(r * sum(self.linears[name]) for name in names)


SHAPES = {
    "3.4M (the course's base)": Shape(192, 6, 512, 4096, 192, tied=True),
    "1B (Llama 3.2)": Shape(2048, 16, 8192, 128256, 512, tied=True),
    "7B (Llama 2)": Shape(4096, 32, 11008, 32000, 4096),
    "13B (Llama 2)": Shape(5120, 40, 13824, 32000, 5120),
    "70B (Llama 2)": Shape(8192, 80, 28672, 32000, 1024),
}

# Per trained parameter: bytes of the weight, of its gradient, of one number in an optimizer state, of a float32 copy.
PRECISIONS = {
    "float32": (4, 4, 4, 0),
    "mixed (bf16 + float32 copy)": (2, 2, 4, 4),
    "bfloat16 only": (2, 2, 2, 0),
}
# Numbers kept for each trained parameter. Adam: momentum and variance (Kingma and Ba 2015, arXiv:1412.6980).
OPTIMIZERS = {"SGD": 0, "SGD + momentum": 1, "Adam": 2, "8-bit Adam": 2}
# One byte each, and a float32 scale for each block of 256 (Dettmers et al. 2022, arXiv:2110.02861; their block: 2048).
EIGHT_BIT = 1 + 4 / 256
# 4 bits, an 8-bit scale per block of 64, a float32 scale per 256 of these (Dettmers et al. 2023, arXiv:2305.14314).
NF4 = (4 + 8 / 64 + 32 / (64 * 256)) / 8


def trained_bytes(precision: str, optimizer: str) -> tuple[float, float, float]:
    """Bytes of weight, gradient and optimizer states for each trained parameter."""
    weight, gradient, state, copy = PRECISIONS[precision]
    number = EIGHT_BIT if optimizer == "8-bit Adam" else state
    return weight, gradient, copy + OPTIMIZERS[optimizer] * number


def compare(
    shape: Shape,
    *,
    precision: str = "mixed (bf16 + float32 copy)",
    optimizer: str = "Adam",
    r: int = 8,
    targets: str = "all-linear",
) -> dict[str, Ledger]:
    """The ledgers of full fine-tuning, of LoRA, and of LoRA on a 4-bit base (QLoRA), for one model.

    Adapters are float32 whatever the base is, as in this package: few numbers, and small steps that bfloat16 would
    round away. In the 4-bit base the embeddings and the norms stay in bfloat16.
    """
    weight, gradient, states = trained_bytes(precision, optimizer)
    full = ledger(shape.params, weight_bytes=weight, grad_bytes=gradient, optimizer_bytes=states)
    *_, states = trained_bytes("float32", optimizer)
    adapter = ledger(shape.lora(r, targets), weight_bytes=4, grad_bytes=4, optimizer_bytes=states)
    linears = shape.layers * sum(i * o for i, o in shape.linears.values())
    four_bit = ledger(linears, 0, weight_bytes=NF4) + ledger(shape.params - linears, 0, weight_bytes=2)
    return {
        "full": full,
        f"LoRA r={r}": ledger(shape.params, 0, weight_bytes=weight) + adapter,
        f"QLoRA r={r}": four_bit + adapter,
    }


def draw(model: str, precision: str, optimizer: str, r: int, targets: str) -> tuple[Figure, dict[str, str]]:
    """The figure of `ledger_explorer`: a stacked bar for each way to train, and what two cards hold."""
    ways = compare(SHAPES[model], precision=precision, optimizer=optimizer, r=r, targets=targets)
    figure, axes = style.figure(7.2, 3.0, margins=(0.13, 0.16, 0.97, 0.78))
    unit, name = (GB, "GB") if max(way.total for way in ways.values()) >= GB else (10**6, "MB")
    left = [0.0] * len(ways)
    for kind, colour in (("weights", style.BLUE), ("gradients", style.ORANGE), ("optimizer", style.GREEN)):
        sizes = [getattr(way, kind) / unit for way in ways.values()]
        label = "optimizer states" if kind == "optimizer" else kind
        axes.barh(list(ways), sizes, left=left, color=colour, label=label)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    right = 1.2 * max(left)  # room for the totals
    for row, way in enumerate(ways.values()):
        axes.annotate(
            human(way.total), (left[row], row), xytext=(5, 0), textcoords="offset points", va="center",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1}, zorder=3,
        )  # fmt: skip
    for gib, dashes in zip(CARDS, ("--", ":"), strict=True):
        size = gib * GIB / unit
        if size < 2 * max(left):  # a card that dwarfs the bars would only squeeze them
            axes.axvline(size, color=style.BLACK, linestyle=dashes, linewidth=1.4, label=f"{gib} GiB card")
            right = max(right, 1.1 * size)
    axes.set_xlim(0, right)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set(xlabel=f"{name}, without activations (they depend on batch and tokens)")
    axes.set_title(f"{model}: {SHAPES[model].params:,} parameters", pad=24)
    axes.legend(loc="upper center", bbox_to_anchor=(0.45, 1.19), ncols=5, columnspacing=1.2, handlelength=1.6)
    return figure, {way: human(one.total) for way, one in ways.items()}


def ledger_explorer() -> Explorer:
    """The ledger as a widget: model, precision, optimizer, rank and targets against what a card holds."""
    from .widgets import Explorer, knob

    return Explorer(
        draw,
        model=knob("7B (Llama 2)", choices=SHAPES, label="model"),
        precision=knob("mixed (bf16 + float32 copy)", choices=PRECISIONS, label="precision"),
        optimizer=knob("Adam", choices=OPTIMIZERS, label="optimizer"),
        r=knob(8, choices=(1, 2, 4, 8, 16, 32, 64, 128, 256), label="LoRA rank r"),
        targets=knob("q_proj|v_proj", choices=("q_proj|v_proj", "all-linear"), label="LoRA on"),
    )
