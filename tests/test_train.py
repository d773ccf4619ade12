"""The training loop: equal to one written by hand, and careful with what it was lent."""

import copy
import dataclasses
import errno
import inspect
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from peftlab.log import Log
from peftlab.rows import collate, encode, kind_of, order
from peftlab.train import Settings, train, train_steps

VOCABULARY = 64


def tiny(dropout=0.0, seed=0) -> LlamaForCausalLM:
    """A Llama whose last layer is trained and whose rest is frozen."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32, attention_dropout=dropout, tie_word_embeddings=True, initializer_range=0.3,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    model.model.layers[1].requires_grad_(True)
    return model


def token_rows(n=24, seed=1) -> list[dict]:
    """Each token is the one before plus 3: can be learned. Very different lengths, the first third without labels."""
    draw = np.random.default_rng(seed)
    rows = []
    for _ in range(n):
        start, length = int(draw.integers(64)), int(draw.integers(3, 25))
        ids = [(start + 3 * i) % VOCABULARY for i in range(length)]
        rows.append({"input_ids": ids, "labels": [-100] * (length // 3) + ids[length // 3 :]})
    return rows


def trained(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def frozen_bytes(model) -> bytes:
    tensors = [p for p in model.parameters() if not p.requires_grad] + list(model.buffers())
    return b"".join(t.detach().numpy().tobytes() for t in tensors)


def by_hand(model, rows, steps, batch_size, lr, warmup, clip, optimizer=torch.optim.AdamW) -> list[float]:
    """The same training in plain PyTorch; only the order of the rows is taken from the package."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    adamw = optimizer(parameters, lr=lr, weight_decay=0.0) if optimizer is torch.optim.AdamW else optimizer(parameters)
    warm, losses = math.ceil(warmup * steps), []
    model.train()
    for step in range(steps):
        factor = (step + 1) / warm if step < warm else (1 + math.cos(math.pi * (step - warm) / (steps - warm))) / 2
        adamw.param_groups[0]["lr"] = lr * factor
        batch = [rows[i] for i in order(len(rows), step * batch_size, (step + 1) * batch_size, 0)]
        longest = max(len(row["input_ids"]) for row in batch)
        ids, labels = torch.zeros(batch_size, longest, dtype=torch.long), torch.full((batch_size, longest), -100)
        for i, row in enumerate(batch):
            ids[i, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
            labels[i, : len(row["labels"])] = torch.tensor(row["labels"])
        # Right padding behind a causal mask: no counted position sees it, so no attention mask is needed here.
        logits = model(input_ids=ids).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, clip)
        adamw.step()
        adamw.zero_grad()
        losses.append(loss.item())
    return losses


# The loop itself


def test_equals_a_loop_written_by_hand():
    model, rows = tiny(), token_rows()
    twin = copy.deepcopy(model)
    log = train(model, rows, steps=40, batch_size=8, lr=3e-2, warmup=0.1, clip=0.5, progress=False)
    losses = by_hand(twin, rows, steps=40, batch_size=8, lr=3e-2, warmup=0.1, clip=0.5)
    # The two differ in the attention kernel (mask or not) and in AdamW's (fused or not): rounding, not more.
    assert log.losses == pytest.approx(losses, abs=1e-5)
    assert log.losses[:5] == pytest.approx(losses[:5], abs=1e-6)
    assert log.final < 0.5 * log.losses[0]
    assert max(log.grad_norms) > 0.5, "this test needs gradients long enough to be clipped"


@pytest.mark.parametrize("accumulation", [2, 3, 8])
def test_accumulation_changes_nothing_but_memory(accumulation):
    """Micro-batches with few labels must not weigh more: rows here have from 2 to 16."""
    rows = token_rows()
    logs, ends = [], []
    for k in (1, accumulation):
        model = tiny()
        sgd = lambda parameters: torch.optim.SGD(parameters, lr=0.5)  # noqa: E731 (Adam would hide a wrong scale)
        logs.append(train(model, rows, steps=6, batch_size=8, accumulation=k, optimizer=sgd, progress=False))
        ends.append(trained(model))
    assert logs[1].losses == pytest.approx(logs[0].losses, abs=2e-6)
    assert logs[1].grad_norms == pytest.approx(logs[0].grad_norms, rel=1e-4)
    for name in ends[0]:
        torch.testing.assert_close(ends[1][name], ends[0][name], atol=2e-6, rtol=1e-5)


def test_the_mean_of_means_would_be_another_gradient():
    """What the test above guards against is large on these rows, so that it could not pass by chance."""
    model, rows = tiny(), encode(tiny(), token_rows())[:8]
    losses = [model(**collate(part, 0, torch.device("cpu"))).loss.item() for part in (rows, rows[:4], rows[4:])]
    assert abs(losses[0] - (losses[1] + losses[2]) / 2) > 1e-4


def test_clipping_bounds_the_update():
    rows = token_rows()
    for clip in (None, 0.01):
        model = tiny()
        before = trained(model)
        log = train(model, rows, steps=1, warmup=0, clip=clip, schedule="constant", progress=False,
                    optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0))  # fmt: skip
        moved = math.sqrt(sum(float((p - before[name]).square().sum()) for name, p in trained(model).items()))
        assert moved == pytest.approx(log.grad_norms[0] if clip is None else clip, rel=1e-3)
    assert log.grad_norms[0] > 0.1, "the log shows the norm before clipping"


def test_learning_rates():
    settings = Settings(steps=100, warmup=0.1)
    assert [settings.rate(i) for i in range(10)] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert settings.rate(10) == 1 and settings.rate(55) == pytest.approx(0.5)
    assert 0 < settings.rate(99) < 0.001
    assert Settings(steps=100, warmup=0, schedule="linear").rate(25) == pytest.approx(0.75)
    assert Settings(steps=100, warmup=0.5, schedule="constant").rate(99) == 1
    assert Settings(steps=4, warmup=0, schedule=lambda progress: 3 - progress).rate(2) == 2.5
    log = train(tiny(), token_rows(), steps=10, lr=3e-3, warmup=0.2, schedule="linear", progress=False)
    assert log.learning_rates == pytest.approx(
        [3e-3 * f for f in (0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8)]
    )


def test_groups_keep_their_ratio():
    """An optimizer with a rate per group (LoRA+ is one) is scheduled as a whole."""
    seen = []

    def two_groups(parameters):
        seen.append(torch.optim.SGD([{"params": parameters[:2], "lr": 0.1}, {"params": parameters[2:], "lr": 0.4}]))
        return seen[0]

    log = train(tiny(), token_rows(), steps=4, warmup=0.5, optimizer=two_groups, progress=False)
    assert log.learning_rates[0] == pytest.approx(0.05)
    assert [g["lr"] / 0.1 for g in seen[0].param_groups] == pytest.approx(
        [log.learning_rates[-1] / 0.1 * k for k in (1, 4)]
    )


def test_every_epoch_shows_every_row_once():
    positions = order(10, 0, 30, seed=4)
    epochs = [positions[0:10], positions[10:20], positions[20:30]]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert order(10, 7, 23, seed=4) == positions[7:23], "a pure function of the position"
    assert order(10, 0, 10, seed=5) != epochs[0]


def test_a_batch_larger_than_the_data_set_wraps():
    log = train(tiny(), token_rows(5), steps=3, batch_size=12, progress=False)
    assert len(log) == 3


def test_seeds():
    runs = [train(tiny(dropout=0.2), token_rows(), steps=5, seed=seed, progress=False).losses for seed in (0, 0, 1)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_what_happens_between_steps_changes_nothing():
    """Sampling and drawing between two steps must not alter the run; nor the run the caller's generators."""
    rows, plain, disturbed = token_rows(), tiny(dropout=0.2), tiny(dropout=0.2)

    def disturb(log):
        torch.rand(100), np.random.rand(3)
        assert not disturbed.training, "between two steps the model is in the mode it was in"
        disturbed.generate(torch.tensor([[3]]), do_sample=True, max_new_tokens=3, pad_token_id=0)

    a = train(plain, rows, steps=4, progress=False)
    b = train(disturbed, rows, steps=4, progress=False, on_step=disturb)
    assert a.losses == b.losses
    torch.manual_seed(9), np.random.seed(9)
    expected = torch.rand(3), np.random.rand(3)
    model = tiny(dropout=0.2)
    torch.manual_seed(9), np.random.seed(9)
    train(model, rows, steps=2, progress=False)
    assert torch.equal(torch.rand(3), expected[0]) and np.array_equal(np.random.rand(3), expected[1])


# What was lent comes back


def test_the_frozen_base_and_the_model_s_state():
    model = tiny(dropout=0.1)
    model.train()
    model.model.layers[0].eval()
    before, needs = frozen_bytes(model), [p.requires_grad for p in model.parameters()]
    modes, values = [m.training for m in model.modules()], trained(model)
    train(model, token_rows(), steps=3, valid=token_rows(4), valid_every=2, progress=False)
    assert frozen_bytes(model) == before
    assert [p.requires_grad for p in model.parameters()] == needs
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    assert all(not torch.equal(p, values[name]) for name, p in trained(model).items())


def test_bf16_autocast_is_undone():
    model, rows = tiny(), token_rows()
    log = train(model, rows, steps=3, precision="bf16", progress=False)
    exact = train(tiny(), rows, steps=3, progress=False)
    assert log.losses != exact.losses
    assert log.losses == pytest.approx(exact.losses, rel=0.02)  # bf16 keeps 8 bits
    assert "_original_forward" not in vars(model)
    with torch.no_grad():
        assert model(input_ids=torch.tensor([[1, 2]])).logits.dtype == torch.float32


def test_bf16_base_with_float32_trained_part():
    model = tiny().to(torch.bfloat16)
    extra = torch.nn.Parameter(torch.zeros(32))
    model.model.norm.register_parameter("extra", extra)
    model.model.norm.register_forward_hook(lambda module, args, out: out + module.extra.to(out.dtype))
    model.requires_grad_(False)
    extra.requires_grad_(True)
    log = train(model, token_rows(), steps=40, lr=0.3, progress=False)
    assert log.final < log.losses[0] and extra.dtype == torch.float32 and extra.abs().sum() > 0


# Validation and stopping


def test_validation_loss_is_a_mean_over_labels_in_eval_mode():
    model, rows, valid = tiny(dropout=0.3), token_rows(), token_rows(7, seed=5)
    log = train(model, rows, steps=5, batch_size=4, valid=valid, valid_every=2, progress=False)
    assert list(log.valid_losses) == [2, 4, 5]
    total, count = 0.0, 0
    with torch.no_grad():
        for row in valid:
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
            logits = model(input_ids=ids).logits[0, :-1]
            total += float(torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum"))
            count += int((labels[1:] != -100).sum())
    assert log.valid_losses[5] == pytest.approx(total / count, abs=1e-5)


def test_early_stop_puts_the_best_back():
    """Four rows learned by heart at a high rate: the loss on others falls, then rises."""
    model = tiny()
    valid = [{"input_ids": list(np.random.default_rng(i).integers(0, 64, 12).tolist())} for i in range(8)]
    log = train(model, token_rows(4), steps=200, batch_size=4, lr=2e-2, valid=valid, valid_every=2, patience=3,
                progress=False)  # fmt: skip
    assert len(log) < 200
    assert len(log) == log.best_step + 3 * 2
    assert list(log.valid_losses)[-1] == len(log)
    again = train_steps(model, token_rows(4), steps=1, lr=1e-30, valid=valid, batch_size=4)
    assert next(again).valid_losses[1] == pytest.approx(log.valid_losses[log.best_step], abs=1e-6)


# Kinds of rows


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<eos>", "<unk>", *[f"w{i}" for i in range(60)]]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def test_prompt_and_completion(tokenizer):
    rows = encode(tiny(), [{"prompt": "w1 w2 w3", "completion": " w4 w5", "other": None}], tokenizer)
    assert rows[0].inputs["input_ids"].tolist() == [4, 5, 6, 7, 8]
    assert rows[0].inputs["labels"].tolist() == [-100, -100, -100, 7, 8]
    assert (rows[0].tokens, rows[0].trained) == (5, 2)


def test_text(tokenizer):
    row = encode(tiny(), [{"text": "w1 w2 w3"}], tokenizer)[0]
    assert row.inputs["labels"].tolist() == row.inputs["input_ids"].tolist() == [4, 5, 6]
    assert row.trained == 2, "nothing predicts the first token"


def test_padding_is_on_the_right_and_masked(tokenizer):
    rows = encode(tiny(), [{"text": "w1 w2 w3"}, {"text": "w1 w2"}], tokenizer)
    batch = collate(rows, 0, torch.device("cpu"))
    assert batch["input_ids"].tolist() == [[4, 5, 6], [4, 5, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[4, 5, 6], [4, 5, -100]]


def test_data_sets_of_every_make(tokenizer):
    from datasets import Dataset

    class Own(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, i):
            return {"input_ids": torch.arange(i, i + 5), "labels": torch.arange(i, i + 5)}

    as_list = [Own()[i] for i in range(4)]
    for data in (Own(), as_list, Dataset.from_list([{k: v.tolist() for k, v in row.items()} for row in as_list])):
        rows = encode(tiny(), data)
        assert [row.inputs["input_ids"].tolist() for row in rows] == [list(range(i, i + 5)) for i in range(4)]


def test_a_classifier_learns(tokenizer):
    torch.manual_seed(0)
    config = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
                        max_position_embeddings=16, num_labels=2)  # fmt: skip
    model = BertForSequenceClassification(config)
    assert kind_of(model) == "other"
    text = [{"text": f"w{i} w{7 * i % 60} {'w50' if i % 2 else 'w51'}", "label": i % 2} for i in range(20)]
    log = train(model, text, tokenizer, steps=30, lr=3e-3, accumulation=3, progress=False)
    assert log.final < 0.3 < log.losses[0]
    ready = [{"input_ids": [3 + i, 5], "labels": i % 2} for i in range(4)]
    assert collate(encode(model, ready), 0, torch.device("cpu"))["labels"].tolist() == [0, 1, 0, 1]


def test_an_encoder_decoder_learns(tokenizer):
    torch.manual_seed(0)
    config = T5Config(vocab_size=64, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config)
    assert kind_of(model) == "seq2seq"
    text = [{"prompt": f"w{i} w{i + 1}", "completion": f"w{i} w{i}"[: 3 + 3 * (i % 2)]} for i in range(20)]
    row = encode(model, text, tokenizer)[1]
    assert row.inputs["labels"].tolist() == [4, 4] and row.trained == 2, "nothing is shifted: all labels count"
    whole, cut = copy.deepcopy(model), copy.deepcopy(model)
    log = train(whole, text, tokenizer, steps=20, lr=1e-2, progress=False)
    assert log.final < log.losses[0]
    parts = train(cut.eval(), text, tokenizer, steps=1, accumulation=5, progress=False)
    assert math.isfinite(parts.final)


# Refusals


def refused(match, *args, error=ValueError, **settings):
    with pytest.raises(error, match=match):
        train(*args, progress=False, **({"steps": 2} | settings))


@pytest.mark.parametrize(
    "name, value, rule",
    [("steps", 0, "at least 1"), ("batch_size", 0, "at least 1"), ("lr", -1, "positive"), ("lr", math.nan, "finite"),
     ("warmup", 5, "fraction"), ("schedule", "cosinus", "'cosine'"), ("clip", 0, "no clipping"),
     ("accumulation", 99, "16"),
     ("patience", 2, "valid="), ("precision", "fp8", "bf16"), ("seed", -1, "at least 0")],
)  # fmt: skip
def test_settings_that_cannot_be_right(name, value, rule):
    refused(rf"{name}=.*{rule}", tiny(), token_rows(), **{name: value})


def test_a_misspelt_setting():
    refused("no setting 'step'; did you mean 'steps'", tiny(), token_rows(), error=TypeError, step=3)


def test_rows_that_cannot_be_right(tokenizer):
    model = tiny()
    refused("empty", model, [])
    refused("dictionary of data sets.*train", model, {"train": token_rows()})
    refused("no length", model, iter(token_rows()))
    refused("row 0 is a str", model, ["text"])
    refused(r"columns \['answer', 'question'\].*prompt.*completion", model, [{"question": "a", "answer": "b"}])
    refused("pass the tokenizer", model, [{"text": "w1 w2"}])
    refused("row 1 has no 'text'", model, [{"text": "w1 w2"}, {"words": "w1"}], tokenizer)
    refused("row 1 has 40 tokens, more than max_length=32", model, [{"input_ids": [1, 2]}, {"input_ids": [1] * 40}])
    refused("max_length=3", model, [{"input_ids": [1, 2, 3, 4]}], max_length=3)
    refused("row 0 has token 64, but the model knows 64", model, [{"input_ids": [1, 64]}])
    refused(
        "row 1 has no label to learn",
        model,
        [{"input_ids": [1, 2], "labels": [1, 2]}, {"input_ids": [1, 2], "labels": [-100, -100]}],
    )
    refused("row 1 has no 'labels'", model, [{"input_ids": [1, 2], "labels": [1, 2]}, {"input_ids": [1, 2]}])
    refused("row 0 has no label to learn", model, [{"input_ids": [1, 2], "labels": [1, -100]}])
    refused("one label per token", model, [{"input_ids": [1, 2], "labels": [1]}])


def test_nothing_to_train():
    refused("Attach an adapter", tiny().requires_grad_(False), token_rows())


def test_trained_part_that_is_not_used():
    model = tiny().requires_grad_(False)
    model.model.register_parameter("unused", torch.nn.Parameter(torch.zeros(3)))
    refused("does not depend on any trained parameter", model, token_rows())


def test_float16_parameters():
    refused("float16.*float32", tiny().half(), token_rows())


def test_an_optimizer_with_a_frozen_parameter():
    model = tiny()
    refused("frozen", model, token_rows(), optimizer=lambda _: torch.optim.SGD(model.parameters(), lr=1e-3))


@pytest.mark.parametrize("how", ["rate", "weights", "gradient"])
def test_not_a_number(how, tmp_path):
    """Whatever breaks, the parameters are those from before the call, bit for bit."""
    model, before = tiny(), trained(tiny())
    if how == "gradient":
        victim = next(p for p in model.parameters() if p.requires_grad)
        calls = []
        victim.register_hook(lambda g: calls.append(1) or (g * math.inf if len(calls) == 3 else g))
    settings = {"lr": 1e30, "clip": None} if how == "rate" else {}
    if how == "weights":
        settings["optimizer"] = lambda parameters: torch.optim.SGD(parameters, lr=math.inf)
        settings["steps"] = 1  # no later loss would show it: only a look at the parameters does
    expected = {
        "rate": "loss is nan|loss is inf|norm is",
        "weights": "parameters is",
        "gradient": "norm is .* at step 3",
    }
    refused(
        expected[how], model, token_rows(), error=FloatingPointError, **({"steps": 20} | settings), checkpoint=tmp_path
    )
    assert all(torch.equal(p, before[name]) for name, p in trained(model).items())
    assert not model.training and all(p.grad is None for p in model.parameters())


# The log


def test_log(tmp_path):
    log = train(tiny(), token_rows(), steps=12, valid=token_rows(3), valid_every=5, progress=False)
    best = min(log.valid_losses.values())
    shown = (
        f"12 steps, loss {log.losses[0]:.3g} → {log.final:.3g}, best validation loss {best:.3g} at step {log.best_step}"
    )
    assert repr(log) == shown
    frame = log.to_pandas()
    assert list(frame.index) == list(range(1, 13)) and frame["loss"].tolist() == log.losses
    assert frame["valid_loss"].dropna().to_dict() == log.valid_losses
    assert Log.load(log.save(tmp_path / "log.json")) == log, "every bit of every number"
    json.loads((tmp_path / "log.json").read_text())
    (tmp_path / "log.json").write_text("{}")
    with pytest.raises(ValueError, match="log.json is not a training log"):
        Log.load(tmp_path / "log.json")
    ax = log.plot()
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("step", "loss (nats)")
    assert log.plot(ax) is ax
    assert log.smoothed(1) == pytest.approx(log.losses)
    assert Log(losses=[2.0] * 50).smoothed() == pytest.approx([2.0] * 50), "no bias towards the start"
    assert repr(Log()) == "0 steps" and math.isnan(Log().final)


def test_progress(capsys):
    train(tiny(), token_rows(), steps=3)
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("\rtraining:") and "3/3" in err and "tokens/s" in err and "loss " in err
    train(tiny(), token_rows(), steps=3, progress=False)
    assert capsys.readouterr() == ("", "")


def test_help_shows_every_setting():
    shown = inspect.signature(train).parameters
    for field in dataclasses.fields(Settings):
        assert shown[field.name].default == field.default
    assert list(shown)[:3] == ["model", "dataset", "tokenizer"]


def test_log_is_not_lost_when_the_disk_is_full(tmp_path, monkeypatch):
    log = train(tiny(), token_rows(), steps=2, progress=False)
    path = log.save(tmp_path / "log.json")
    old = path.read_bytes()

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    log.losses.append(0.0)
    with pytest.raises(OSError):
        log.save(path)
    assert path.read_bytes() == old


# Several processes


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    out = tmp_path / "log.json"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*launch, __file__, str(out)], check=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    two, one = Log.load(out), shared_run()
    assert two.losses == pytest.approx(one.losses, abs=1e-5)
    assert two.grad_norms == pytest.approx(one.grad_norms, rel=1e-3)
    assert two.valid_losses == pytest.approx(one.valid_losses, abs=1e-5)
    assert two.tokens == one.tokens


def shared_run() -> Log:
    return train(tiny(), token_rows(), steps=8, batch_size=6, accumulation=2, valid=token_rows(5), progress=False)


if __name__ == "__main__":  # one of the two processes
    finished = shared_run()
    if torch.distributed.get_rank() == 0:
        assert torch.distributed.get_world_size() == 2
        finished.save(sys.argv[1])
    torch.distributed.destroy_process_group()
