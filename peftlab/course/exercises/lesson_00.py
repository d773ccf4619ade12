"""Exercises of 00_start_here: how much is trained, and how large is the file."""

from torch import nn

from ._frame import exercise

LESSON = "00_start_here"


def _models() -> list[tuple]:
    """A frozen layer under a trained one; everything trained; a tied weight, which must be counted once."""
    head = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 3, bias=False))
    head[0].requires_grad_(False)
    bias_only = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)).requires_grad_(False)
    bias_only[0].bias.requires_grad_(True)
    tied = nn.Sequential(nn.Embedding(30, 6), nn.Linear(6, 6), nn.Linear(6, 30, bias=False))
    tied[2].weight = tied[0].weight
    tied[1].requires_grad_(False)
    return [(head,), (bias_only,), (tied,)]


@exercise(LESSON, "add up p.numel() over model.parameters(), once for all and once where p.requires_grad", _models)
def trainable_fraction(model):
    """Return the fraction, between 0 and 1, of the model's numbers that are trained (p.requires_grad)."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trained / sum(p.numel() for p in model.parameters())


@trainable_fraction.mistake("you count tensors; a large tensor must weigh more than a small one: p.numel()")
def _counts_tensors(model):
    trained = [p for p in model.parameters() if p.requires_grad]
    return len(trained) / len(list(model.parameters()))


@trainable_fraction.mistake("this is a percentage; the fraction is a hundredth of it, between 0 and 1")
def _percentage(model):
    return 100 * trainable_fraction.reference(model)


@trainable_fraction.mistake("this is the frozen part; what is asked for is the rest")
def _frozen_part(model):
    return 1 - trainable_fraction.reference(model)


@trainable_fraction.mistake("you divide by the frozen numbers only; divide by all of them, the trained ones too")
def _trained_by_frozen(model):
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    return sum(p.numel() for p in model.parameters() if p.requires_grad) / frozen


@trainable_fraction.mistake("this is the number of trained parameters; divide it by the number of all parameters")
def _only_counts(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@trainable_fraction.mistake(
    "a weight that two layers share is counted twice: state_dict() lists it under both names, parameters() once"
)
def _counts_tied_twice(model):
    named = list(model.named_parameters(remove_duplicate=False))
    return sum(p.numel() for _, p in named if p.requires_grad) / sum(p.numel() for _, p in named)


def _files() -> list[tuple]:
    return [
        (8, [(192, 192), (192, 512), (512, 192)], 4),
        (4, [(1024, 1024)] * 48, 4),  # GPT-2 medium, q and v of 24 layers
        (16, [(4096, 1024), (4096, 4096)], 2),
    ]


@exercise(LESSON, "a layer has lora_A (r, in) and lora_B (out, r); count the numbers in both", _files)
def adapter_bytes(r, layers, bytes_per_number):
    """Return the bytes of the tensors in a LoRA file of rank r.

    layers is a list of (in_features, out_features), one pair for each adapted layer.
    """
    return sum(r * (n_in + n_out) for n_in, n_out in layers) * bytes_per_number


@adapter_bytes.mistake("this counts numbers; each of them takes bytes_per_number bytes")
def _numbers_not_bytes(r, layers, bytes_per_number):
    return sum(r * (n_in + n_out) for n_in, n_out in layers)


@adapter_bytes.mistake("in × out is the size of the full update ΔW; LoRA stores two thin matrices instead")
def _full_update(r, layers, bytes_per_number):
    return sum(n_in * n_out for n_in, n_out in layers) * bytes_per_number


@adapter_bytes.mistake("r × in × out is larger than the layer itself; the sizes of A and B are added, not multiplied")
def _rank_times_full(r, layers, bytes_per_number):
    return sum(r * n_in * n_out for n_in, n_out in layers) * bytes_per_number


@adapter_bytes.mistake("this is A alone, r × in numbers; B has another r × out")
def _only_a(r, layers, bytes_per_number):
    return sum(r * n_in for n_in, _ in layers) * bytes_per_number


@adapter_bytes.mistake("2·r·in holds for square layers only; B has r × out numbers")
def _square_layers(r, layers, bytes_per_number):
    return sum(2 * r * n_in for n_in, _ in layers) * bytes_per_number


@adapter_bytes.mistake("this is the first layer alone; add up all of them")
def _first_layer(r, layers, bytes_per_number):
    return r * sum(layers[0]) * bytes_per_number


@adapter_bytes.mistake("these are bits; bytes_per_number already counts bytes")
def _bits(r, layers, bytes_per_number):
    return 8 * adapter_bytes.reference(r, layers, bytes_per_number)
