"""The course's rooms: source listings, style, ledger."""

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from peftlab.course import show, style
from peftlab.course.ledger import (
    EIGHT_BIT,
    GIB,
    NF4,
    OPTIMIZERS,
    PRECISIONS,
    SHAPES,
    Ledger,
    compare,
    human,
    ledger,
    ledger_explorer,
    trained_bytes,
)

# ------------------------------------------------------------------------------------------------ show


def test_show_gives_the_source_and_where_it_is_from():
    shown = show(Ledger)
    assert shown.code == inspect.getsource(Ledger).rstrip("\n")
    assert shown.path == "peftlab/course/ledger.py"
    text = open(inspect.getsourcefile(Ledger), encoding="utf-8").read().split("\n")
    assert "\n".join(text[shown.first - 1 : shown.first + shown.code.count("\n")]) == shown.code
    assert repr(shown) == f"# {shown.where}\n{shown.code}"
    assert f"```python\n{shown.code}\n```" in shown._repr_markdown_()


def test_show_takes_methods_properties_modules_and_foreign_classes():
    assert show(Ledger.fits).code.startswith("def fits(self")  # no indent left
    assert show(Ledger.total).code.startswith("@property\ndef total(self")
    assert show(style).first == 1
    assert show(style).code == inspect.getsource(style).rstrip("\n")
    assert show(nn.Linear).path == "torch/nn/modules/linear.py"


def test_show_works_for_packages_and_for_code_with_fences():
    import peftlab.course

    assert show(peftlab.course).path == "peftlab/course/__init__.py"
    from peftlab.course.source import Source

    assert "````python" in Source("a.py", 1, "'''```'''")._repr_markdown_()


@pytest.mark.parametrize(
    ("obj", "message"),
    [
        (len, "len has no Python source"),
        (torch.matmul, "matmul has no Python source"),
        (3, r"a int object has no source of its own; show\(type\(obj\)\)"),
        (nn.Linear(2, 2), "a Linear object has no source"),
    ],
)
def test_show_refuses_what_has_no_source(obj, message):
    with pytest.raises(TypeError, match=message):
        show(obj)


# ------------------------------------------------------------------------------------------- style, imports


def test_figures_are_the_same_bytes_each_time_and_of_fixed_size():
    def once():
        with style.context():
            figure, axes = style.figure()
            axes.plot([1, 2, 3], label="a")
            axes.set(title="t", xlabel="x")
        return style.png(figure)

    assert once() == once()
    from PIL import Image

    size = Image.open(__import__("io").BytesIO(once())).size
    assert size == (round(style.WIDTH * style.DPI), round(style.HEIGHT * style.DPI))


def test_the_style_is_left_behind_with_its_block():
    import matplotlib

    before = dict(matplotlib.rcParams)
    with style.context():
        assert matplotlib.rcParams["figure.dpi"] == style.DPI
    assert dict(matplotlib.rcParams) == before


def test_a_backend_that_the_first_figure_starts_keeps_showing_figures():
    import matplotlib

    before = matplotlib.is_interactive()
    try:
        matplotlib.interactive(False)
        with style.context():
            matplotlib.interactive(True)  # what the notebook's backend does when it starts
        assert matplotlib.is_interactive()
    finally:
        matplotlib.interactive(before)


def test_every_cell_that_makes_a_figure_stores_it():
    for path in sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            lines = "".join(cell["source"]).splitlines()
            if cell["cell_type"] == "code" and any("plt.subplots(" in line for line in lines if line[:1] not in " #"):
                kinds = {kind for output in cell["outputs"] for kind in output.get("data", {})}
                assert "image/png" in kinds, f"{path.name}: no figure below {lines[0]!r}"


def test_importing_the_room_imports_neither_widgets_nor_figures():
    code = (
        "import sys, peftlab.course, peftlab.course.style, peftlab.course.source;"
        "print([m for m in ('ipywidgets', 'matplotlib', 'IPython') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_every_public_name_of_the_room_exists():
    import peftlab.course as course

    for name in course.__all__:
        assert getattr(course, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        course.nonsense  # noqa: B018


# ----------------------------------------------------------------------------------------------- ledger


def test_mixed_precision_adam_takes_16_bytes_for_each_parameter():
    """ZeRO (arXiv:1910.02054), section 3.1: 2 + 2 + 12 bytes; its example of 1.5B parameters takes 24 GB."""
    assert ledger(1.5e9).total == 24e9
    assert ledger(7e9) == Ledger(14e9, 14e9, 84e9)
    assert str(ledger(7e9)) == "weights 14.0 GB + gradients 14.0 GB + optimizer 84.0 GB = 112 GB"


@pytest.mark.parametrize(
    ("precision", "optimizer", "total"),
    [
        ("float32", "Adam", 16),  # 4 + 4 + 8
        ("float32", "SGD", 8),
        ("float32", "SGD + momentum", 12),
        ("mixed (bf16 + float32 copy)", "Adam", 16),  # 2 + 2 + 4 + 8
        ("mixed (bf16 + float32 copy)", "SGD", 8),  # 2 + 2 + 4
        ("bfloat16 only", "Adam", 8),  # 2 + 2 + 4
        ("float32", "8-bit Adam", 4 + 4 + 2 + 8 / 256),
    ],
)
def test_bytes_for_each_trained_parameter(precision, optimizer, total):
    assert sum(trained_bytes(precision, optimizer)) == pytest.approx(total)


def test_published_parameter_counts():
    """The sizes that the models' own cards and checkpoints give."""
    assert [SHAPES[name].params for name in SHAPES if "Llama" in name] == [
        1_235_814_400,
        6_738_415_616,
        13_015_864_320,
        68_976_648_192,
    ]
    assert SHAPES["7B (Llama 2)"].lora(8, "q_proj|v_proj") == 4_194_304  # as peft prints it


def test_counts_agree_with_a_real_model():
    transformers = pytest.importorskip("transformers")
    shape = SHAPES["3.4M (the course's base)"]
    config = transformers.LlamaConfig(
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=6,
        vocab_size=4096,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    assert shape.params == sum(p.numel() for p in model.parameters())
    linears = [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    assert shape.lora(8) == sum(8 * (m.in_features + m.out_features) for m in linears)


def test_four_bit_base_takes_4127_bits():
    """QLoRA (arXiv:2305.14314), section 3: double quantisation leaves 0.127 bits per parameter for the scales."""
    assert NF4 * 8 == pytest.approx(4.127, abs=5e-4)
    assert EIGHT_BIT == 1.015625


def test_compare_adds_up():
    shape = SHAPES["7B (Llama 2)"]
    ways = compare(shape, r=8, targets="q_proj|v_proj")
    assert list(ways) == ["full", "LoRA r=8", "QLoRA r=8"]
    assert ways["full"].total == 16 * shape.params
    lora = ways["LoRA r=8"]
    assert lora.weights == 2 * shape.params + 4 * 4_194_304
    assert (lora.gradients, lora.optimizer) == (4 * 4_194_304, 8 * 4_194_304)
    assert ways["QLoRA r=8"].weights < 0.3 * lora.weights
    assert ways["QLoRA r=8"].optimizer == lora.optimizer


def test_compare_holds_for_every_choice():
    for shape in SHAPES.values():
        for precision in PRECISIONS:
            for optimizer in OPTIMIZERS:
                full, lora, qlora = compare(shape, precision=precision, optimizer=optimizer).values()
                assert full.total > lora.total > qlora.total > 0


def test_what_fits_a_card_is_counted_in_gib():
    assert Ledger(24 * GIB, 0, 0).fits(24)
    assert not Ledger(24 * GIB, 1, 0).fits(24)
    assert Ledger(25e9, 0, 0).fits(24)  # 25 GB are 23.3 GiB


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((-1,), "n_params=-1 is negative"), ((10, 11), "trainable=11 is more than n_params=10; add a ledger")],
)
def test_impossible_ledgers_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ledger(*arguments)


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (16_777_216, "16.8 MB"), (112e9, "112 GB"), (1.104e12, "1.10 TB")],
)
def test_human(n_bytes, text):
    assert human(n_bytes) == text


def test_ledger_explorer_tells_what_its_figure_shows():
    w = ledger_explorer()
    assert "full=108 GB" in repr(w)  # 16 × 6.738e9
    w.set(model="70B (Llama 2)", optimizer="SGD", precision="bfloat16 only")
    assert w.summary["full"] == human(4 * SHAPES["70B (Llama 2)"].params)
    with pytest.raises(ValueError, match="optimizer='Adamm' is not one of its choices: 'SGD'"):
        w.set(optimizer="Adamm")
