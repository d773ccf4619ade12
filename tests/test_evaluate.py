"""evaluate.py: batching changes no answer, losses are the plain sum, intervals are the published ones."""

import math

import pytest
import torch
import torch.nn.functional as F

from peftlab import evaluate
from peftlab.evaluate import Score, accuracy, exact_match, execution_accuracy, generate, token_loss, wilson

WORDS = "the cat sat on a mat and dog ran far away from red blue green ship port SELECT FROM WHERE".split()


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {t: i for i, t in enumerate(["<pad>", "<eos>", *alphabet])}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", padding_side="right")


@pytest.fixture
def model(tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, initializer_range=0.3, attention_dropout=0.5, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config)


PROMPTS = ["a", "the cat sat", "on a mat and far away", "dog", "red blue green red blue"]


def test_a_batch_gives_what_each_prompt_gives_alone(model, tokenizer):
    together = generate(model, tokenizer, PROMPTS, max_new_tokens=12)
    alone = [generate(model, tokenizer, [p], max_new_tokens=12)[0] for p in PROMPTS]
    by_two = generate(model, tokenizer, PROMPTS, max_new_tokens=12, batch_size=2)
    assert together == alone == by_two
    assert len(set(together)) > 1  # the answers do depend on the prompt


def test_generate_is_greedy_and_stops_at_the_line(model, tokenizer):
    """A loop without cache, padding or library code gives the same, also where the model writes a newline."""
    newline, stopped = tokenizer("\n")["input_ids"][0], 0
    model.eval()
    with torch.no_grad():  # exchange the newline's logit with that of the token that follows the first prompt
        first = int(model(torch.tensor([tokenizer(PROMPTS[0])["input_ids"]])).logits[0, -1].argmax())
        weight = model.lm_head.weight
        weight[[newline, first]] = weight[[first, newline]]
    for prompt in PROMPTS:
        ids = tokenizer(prompt)["input_ids"]
        new = []
        for _ in range(12):
            with torch.no_grad():
                new.append(int(model(torch.tensor([ids + new])).logits[0, -1].argmax()))
            if new[-1] in (newline, tokenizer.eos_token_id):
                stopped += 1
                break
        expected = tokenizer.decode(new, skip_special_tokens=True).split("\n")[0].strip()
        assert generate(model, tokenizer, [prompt], max_new_tokens=12) == [expected]
    assert 0 < stopped


@pytest.mark.parametrize("call", [
    lambda m, t: generate(m, t, PROMPTS, max_new_tokens=3),
    lambda m, t: token_loss(m, t, ["the cat sat"]),
], ids=["generate", "token_loss"])  # fmt: skip
def test_the_model_comes_back_as_it_was(model, tokenizer, call, monkeypatch):
    monkeypatch.setattr(evaluate, "context_of", lambda model: 512)
    model.train()
    model.model.layers[0].eval()  # a mixture of modes survives too
    modes = {name: module.training for name, module in model.named_modules()}
    grads = {name: p.requires_grad for name, p in model.named_parameters()}
    before = {name: p.clone() for name, p in model.state_dict().items()}
    first = call(model, tokenizer)
    assert first == call(model, tokenizer)  # no dropout
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert grads == {name: p.requires_grad for name, p in model.named_parameters()}
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert tokenizer.padding_side == "right"


def test_modes_come_back_after_an_error(model, tokenizer, monkeypatch):
    monkeypatch.setattr(model, "generate", lambda **_: 1 / 0)
    model.train()
    with pytest.raises(ZeroDivisionError):
        generate(model, tokenizer, PROMPTS, max_new_tokens=3)
    assert all(module.training for module in model.modules())


def _row(model, tokenizer, prompt, **more):
    return {"prompt": prompt, "completion": f" {generate(model, tokenizer, [prompt], 8)[0]}\n", **more}


def test_exact_match_counts_and_keeps_the_predictions(model, tokenizer):
    rows = [{"prompt": p, "completion": " no such answer\n", "split": "bad"} for p in PROMPTS[:2]]
    # The model's own answer, where it is text that survives a round trip through the tokenizer.
    own = [_row(model, tokenizer, p, split="good") for p in PROMPTS[2:]]
    score = exact_match(model, tokenizer, rows + own, max_new_tokens=16)
    got = generate(model, tokenizer, PROMPTS, 16)
    right = [g == r["completion"].strip() for g, r in zip(got, rows + own, strict=True)]
    assert score.value == sum(right) / 5 and score.n == 5
    assert (score.low, score.high) == wilson(sum(right), 5)
    assert [p["right"] for p in score.predictions] == right and [p["got"] for p in score.predictions] == got
    assert list(score.frame().columns) == ["prompt", "expected", "got", "right", "split"]
    parts = score.by("split")
    assert list(parts) == ["bad", "good"] and parts["bad"].value == 0 and parts["good"].n == 3
    with pytest.raises(ValueError, match="no column 'colour'.*split"):
        score.by("colour")


def test_accuracy_asks_the_judge(model, tokenizer):
    rows = [{"prompt": p, "completion": " x\n"} for p in PROMPTS]
    assert accuracy(model, tokenizer, rows, lambda row, got: "cat" in row["prompt"], 4).value == 1 / 5


def test_execution_accuracy_runs_the_queries(model, tokenizer, monkeypatch):
    gold = "SELECT cargo FROM ships WHERE port = 'Oslo'"
    answers = [gold, "SELECT cargo FROM ships WHERE 'Oslo' = port", "SELECT crew FROM ships", "SELECT nothing"]
    monkeypatch.setattr(evaluate, "generate", lambda *_: answers)
    rows = [{"prompt": "q", "completion": f" {gold}\n", "db": "fleet"}] * 4
    score = execution_accuracy(model, tokenizer, rows, max_new_tokens=64)
    assert [p["right"] for p in score.predictions] == [True, True, False, False]
    assert [p["exact"] for p in score.predictions] == [True, False, False, False]
    assert [bool(p["error"]) for p in score.predictions] == [False, False, False, True]
    with pytest.raises(ValueError, match="row 0 has no column 'db'"):
        execution_accuracy(model, tokenizer, [{"prompt": "q", "completion": " a\n"}])


def _plain_loss(model, ids, window):
    """Each token but the first, from the tokens of its window before it: one forward per token."""
    losses = []
    for i in range(1, len(ids)):
        start = (i - 1) // window * window
        with torch.no_grad():
            logits = model(torch.tensor([ids[start:i]])).logits[0, -1]
        losses.append(-F.log_softmax(logits.double(), -1)[ids[i]].item())
    return losses


@pytest.mark.parametrize("window", [1, 7, 16, 64])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_token_loss_is_the_plain_sum(model, tokenizer, window, batch_size):
    texts = ["the cat sat on a mat and ran", "dog", "red blue green", "ab", "x" * 17, "y" * 16]
    model.eval()
    losses = [_plain_loss(model, tokenizer(text)["input_ids"], window) for text in texts]
    score = token_loss(model, tokenizer, texts, window=window, batch_size=batch_size)
    flat = sum(losses, [])
    assert score.value == pytest.approx(sum(flat) / len(flat), abs=1e-5)  # fp32 forward of a 2-layer model
    assert [p["tokens"] for p in score.predictions] == [len(tokenizer(text)["input_ids"]) - 1 for text in texts]
    for p, expected in zip(score.predictions, losses, strict=True):
        assert p["loss"] == pytest.approx(sum(expected) / len(expected), abs=1e-5)
    assert score.low < score.value < score.high and score.n == len(texts) and "nats/token" in repr(score)


def test_bootstrap_interval():
    """For many equal-sized texts it is the normal interval of the mean; it is repeatable, and absent for one text."""
    torch.manual_seed(0)
    sums, counts = 100 * (3 + torch.randn(400, dtype=torch.float64)), torch.full((400,), 100.0, dtype=torch.float64)
    low, high = evaluate._bootstrap(sums, counts, seed=0)
    mean, half = (sums / counts).mean().item(), 1.96 * (sums / counts).std().item() / 20
    # 1000 resamples place each end to about 7 % of the half width (one standard error); three of them are allowed
    assert low == pytest.approx(mean - half, abs=0.2 * half) and high == pytest.approx(mean + half, abs=0.2 * half)
    assert (low, high) == evaluate._bootstrap(sums, counts, seed=0) != evaluate._bootstrap(sums, counts, seed=1)
    assert all(map(math.isnan, evaluate._bootstrap(sums[:1], counts[:1], seed=0)))


def test_wilson_matches_published_intervals():
    """Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3 (no correction)."""
    published = [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611), (1, 29, 0.0061, 0.1718)]
    for hits, n, low, high in published:
        assert wilson(hits, n) == pytest.approx((low, high), abs=5e-5)  # printed to four digits


def test_wilson_solves_its_equation():
    """The ends are where |p̂ − p| = z √(p(1−p)/n), and mirror each other for hits and misses."""
    for hits, n in [(1, 7), (5, 10), (97, 100), (199, 200)]:
        for p in wilson(hits, n):
            assert abs(hits / n - p) == pytest.approx(evaluate.Z95 * math.sqrt(p * (1 - p) / n), rel=1e-9)
        low, high = wilson(hits, n)
        assert wilson(n - hits, n) == pytest.approx((1 - high, 1 - low), abs=1e-12)
    assert wilson(0, 5)[0] == 0 and wilson(5, 5)[1] == 1
    for hits, n in [(0, 0), (3, 2), (-1, 2)]:
        with pytest.raises(ValueError, match="0 ≤ hits ≤ n"):
            wilson(hits, n)


def test_how_a_score_reads():
    assert repr(Score.of([{"right": i < 194} for i in range(200)])) == "97.0 % (93.6–98.6, n=200)"
    assert repr(Score(3.21444, 3.1, 3.33, 24, "nats/token")) == "3.214 nats/token (3.100–3.330, n=24)"
    assert "no interval" in repr(Score(3.2, math.nan, math.nan, 1, "nats/token"))
    assert float(Score(0.5, 0.4, 0.6, 9)) == 0.5


@pytest.mark.parametrize("message, call", [
    ("list of prompts is empty", lambda m, t: generate(m, t, [])),
    ("prompt 1 is empty", lambda m, t: generate(m, t, ["a", ""])),
    (r"prompt 0 has 70 tokens.*context of 64", lambda m, t: generate(m, t, ["x" * 70])),
    (r"prompt 0 has 20 tokens.*lower max_new_tokens", lambda m, t: generate(m, t, ["x" * 20])),
    ("start at 1", lambda m, t: generate(m, t, ["x"], 0)),
    ("data set is empty", lambda m, t: exact_match(m, t, [])),
    ("row 0 has no column 'completion'.*prompt", lambda m, t: exact_match(m, t, [{"prompt": "x"}])),
    ("several lines", lambda m, t: exact_match(m, t, [{"prompt": "x", "completion": " a\nb\n"}])),
    ("more than max_new_tokens=2", lambda m, t: exact_match(m, t, [{"prompt": "x", "completion": " abc\n"}], 2)),
    ("list of texts is empty", lambda m, t: token_loss(m, t, [], window=8)),
    (r"text 1 has 1 token\(s\)", lambda m, t: token_loss(m, t, ["ab", "a"], window=8)),
    ("window=65.*context of 64", lambda m, t: token_loss(m, t, ["ab"], window=65)),
    ("only an accuracy", lambda m, t: token_loss(m, t, ["ab"], window=8).by("text")),
])  # fmt: skip
def test_bad_input_is_named(model, tokenizer, message, call):
    with pytest.raises(ValueError, match=message):
        call(model, tokenizer)


def test_encoder_decoders_are_refused(tokenizer):
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=300, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder–decoder"):
        generate(T5ForConditionalGeneration(config), tokenizer, ["a"], 2)
