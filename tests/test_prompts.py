"""Soft prompts: the reference's numbers, files both ways, and the traps of caches, padding and checkpointing."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from families import FAMILIES, VOCABULARY, WIDTH, build, build_other, inputs, shake

import peftlab as pl

peft = pytest.importorskip("peft")

K = 4
KINDS = {
    "prompt": (pl.PromptTuning, {}),
    "ptuning-mlp": (pl.PTuning, {"hidden": 12}),
    "ptuning-lstm": (pl.PTuning, {"encoder": "lstm", "hidden": 12}),
    "multitask": (pl.MultitaskPromptTuning, {"tasks": 3, "rank": 2}),
}
SETTINGS = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
TASKS = {"bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}
DECODER_ONLY = [f for f in FAMILIES if f not in TASKS]
FROM_PEFT = {"embedding.weight": "prompt", "mlp_head": "mlp", "lstm_head": "lstm", "prefix_task_cols": "u",
             "prefix_task_rows": "v"}  # fmt: skip

families = pytest.mark.parametrize("family", FAMILIES)
def kinds(*what: str):
    """Each kind as a case that says what it compares of it."""
    return pytest.mark.parametrize("kind", [
        pytest.param(kind, marks=pytest.mark.reference(method.__name__, *what)) for kind, (method, _) in KINDS.items()])




def ours(family: str, kind: str = "prompt", **more):
    """The tiny model with a prompt attached, its parameters moved off their start."""
    method, hyper = KINDS[kind]
    torch.manual_seed(5)
    model = pl.attach(build(family), method, k=K, **{**hyper, **more})
    shake(the_adapter(model), 0.3)
    return model


def the_adapter(model, name: str = "default"):
    (found,) = [a for a in pl.adapters(model)[name].values() if a.part_of is None]
    return found


def theirs(family: str, kind: str = "prompt", submodules: int = 1):
    """The same tiny model under the reference library's prompt."""
    common = dict(task_type=TASKS.get(family, "CAUSAL_LM"), num_virtual_tokens=K, num_transformer_submodules=submodules)
    config = {
        "prompt": lambda: peft.PromptTuningConfig(**common),
        "ptuning-mlp": lambda: peft.PromptEncoderConfig(encoder_hidden_size=12, **common),
        "ptuning-lstm": lambda: peft.PromptEncoderConfig(
            encoder_reparameterization_type="LSTM", encoder_hidden_size=12, **common),
        "multitask": lambda: peft.MultitaskPromptTuningConfig(num_tasks=3, num_ranks=2, **common),
    }[kind]()  # fmt: skip
    torch.manual_seed(6)
    model = peft.get_peft_model(build(family), config).eval()
    with torch.no_grad():
        for tensor in _encoder(model).parameters():
            tensor.add_(0.2 * torch.randn(tensor.shape))
    return model


def _encoder(reference):
    return reference.prompt_encoder["default"]


def same_parameters(model, reference) -> dict[str, torch.nn.Parameter]:
    """Copy the reference's prompt encoder into our adapter; returns our name -> the reference's parameter."""
    pairs = {}
    for name, parameter in _encoder(reference).named_parameters():
        mine = name
        for there, here in FROM_PEFT.items():
            mine = mine.replace(there, here)
        pairs[mine] = parameter
        with torch.no_grad():
            the_adapter(model).get_parameter(mine).copy_(parameter[:K] if mine == "prompt" else parameter)
    assert set(pairs) == {n for n, _ in the_adapter(model).named_parameters()}
    return pairs


def batch_of(family: str, padding: str = "none", kind: str = "prompt") -> dict:
    batch = inputs(family)
    mask = torch.ones_like(batch["input_ids"])
    if padding != "none":
        side = slice(None, 3) if padding == "left" else slice(-3, None)
        mask[1, side] = 0
        batch["input_ids"] = batch["input_ids"] * mask
    batch["attention_mask"] = mask
    if kind == "multitask":
        batch["task_ids"] = torch.tensor([2, 0, 1])
    return batch


def on_tokens(family: str, logits, k: int = K):
    """The reference's logits at the tokens: it leaves the prompt's positions in."""
    return logits if family in TASKS else logits[:, k:]


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@families
@kinds("outputs", "gradients")
def test_logits_and_gradients_are_the_references(kind, family, padding):
    if kind == "multitask" and family == "t5":
        pytest.skip("the reference calls T5 without its decoder's input there: see the next test")
    model, reference = ours(family, kind), theirs(family, kind)
    pairs = same_parameters(model, reference)
    batch = batch_of(family, padding, kind)
    mine = model(**batch).logits
    want = on_tokens(family, reference(**batch).logits)
    real = batch["attention_mask"].bool() if family not in TASKS else slice(None)
    torch.testing.assert_close(mine[real], want[real], rtol=1e-5, atol=1e-5)
    weight = torch.randn(mine[real].shape, generator=torch.Generator().manual_seed(0))
    (mine[real] * weight).sum().backward()
    (want[real] * weight).sum().backward()
    for name, parameter in pairs.items():
        torch.testing.assert_close(the_adapter(model).get_parameter(name).grad, parameter.grad, rtol=1e-4, atol=1e-4)
    assert sum(p.numel() for p in pairs.values()) == the_adapter(model).expected() == pl.count(model).trainable


def test_multitask_on_t5_is_the_references_with_labels():
    model, reference = ours("t5", "multitask"), theirs("t5", "multitask")
    same_parameters(model, reference)
    batch = batch_of("t5", "right", "multitask")
    batch["labels"] = batch.pop("decoder_input_ids")
    torch.testing.assert_close(model(**batch).loss, reference(**batch).loss, rtol=1e-5, atol=1e-5)


@families
@kinds("reads")
def test_their_file_is_read(kind, family, tmp_path):
    reference = theirs(family, kind)
    reference.save_pretrained(tmp_path)
    model = pl.load_adapter(build(family), tmp_path)
    batch = batch_of(family, "right", kind)
    if kind == "multitask" and family == "t5":
        batch["labels"] = batch.pop("decoder_input_ids")
    with torch.no_grad():
        want = on_tokens(family, reference(**batch).logits)
        torch.testing.assert_close(model(**batch).logits, want, rtol=1e-5, atol=1e-5)


@families
@kinds("writes")
def test_our_file_is_read(kind, family, tmp_path):
    model = ours(family, kind)
    pl.save_adapter(model, tmp_path)
    reference = peft.PeftModel.from_pretrained(build(family), tmp_path).eval()
    batch = batch_of(family, "right", kind)
    if kind == "multitask" and family == "t5":
        batch["labels"] = batch.pop("decoder_input_ids")
    with torch.no_grad():
        want = on_tokens(family, reference(**batch).logits)
        torch.testing.assert_close(model(**batch).logits, want, rtol=1e-5, atol=1e-5)
    again = pl.load_adapter(build(family), tmp_path)
    assert torch.equal(again(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("end", [
    pytest.param("ours", marks=pytest.mark.reference("ModuleCopy", "writes")),
    pytest.param("theirs", marks=pytest.mark.reference("ModuleCopy", "reads")),
])  # fmt: skip
def test_a_trained_head_goes_with_the_prompt(end, tmp_path):
    batch = batch_of("bert")
    if end == "theirs":
        first = theirs("bert")
        shake(first.base_model.classifier.modules_to_save["default"], 0.5)
        first.save_pretrained(tmp_path)
        second = pl.load_adapter(build("bert"), tmp_path)
    else:
        first = pl.attach(build("bert"), pl.PromptTuning, k=K, modules_to_save="classifier")
        shake(pl.adapters(first)["default"]["classifier"], 0.5)
        pl.save_adapter(first, tmp_path)
        second = peft.PeftModel.from_pretrained(build("bert"), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(second(**batch).logits, first(**batch).logits, rtol=1e-5, atol=1e-5)
        assert (second(**batch).logits - ours("bert")(**batch).logits).abs().max() > 0.1


def test_half_of_the_references_t5_prompt_is_dead(tmp_path):
    """Its default for T5 has 2·k rows, the second half of which no forward pass reads; ours has the paper's k."""
    reference = theirs("t5", submodules=2)
    reference(**batch_of("t5")).logits.square().sum().backward()
    grad = _encoder(reference).embedding.weight.grad
    assert grad.shape == (2 * K, WIDTH) and grad[:K].abs().min() > 0 and not grad[K:].any()
    reference.save_pretrained(tmp_path)
    model = pl.load_adapter(build("t5"), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch_of("t5")).logits, reference(**batch_of("t5")).logits)
    assert pl.count(model).trainable == K * WIDTH


def test_a_multitask_file_that_prompts_the_decoder_too_is_refused(tmp_path):
    theirs("t5", "multitask", submodules=2).save_pretrained(tmp_path)
    model = build("t5")
    with pytest.raises(ValueError, match="prompts the decoder too"):
        pl.load_adapter(model, tmp_path)
    assert not pl.hosts(model) and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("family", [*DECODER_ONLY, "t5"])
def test_generation_is_the_references(family):
    model, reference = ours(family), theirs(family)
    same_parameters(model, reference)
    ids = inputs(family)["input_ids"]
    for cache in (True, False):
        settings = dict(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=cache, **SETTINGS)
        assert torch.equal(model.generate(**settings), reference.generate(**settings))


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("family", [*DECODER_ONLY, "t5"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_padded_batch_generates_what_each_row_alone_does(kind, family, cache):
    model = ours(family, kind)
    if kind == "multitask":
        the_adapter(model).task = 1
    batch = batch_of(family, "right" if family == "t5" else "left")
    together = model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=cache, **SETTINGS)
    for row, (ids, mask) in enumerate(zip(batch["input_ids"], batch["attention_mask"], strict=True)):
        one = ids[mask.bool()][None]
        alone = model.generate(one, attention_mask=torch.ones_like(one), use_cache=cache, **SETTINGS)
        assert torch.equal(together[row, -6:], alone[0, -6:])


def test_the_reference_moves_left_padded_rows_away_from_their_prompt():
    """It drops position ids, so that the padding counts as distance: why the test above has no reference."""
    reference, batch = theirs("llama"), batch_of("llama", "left")
    together = reference.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **SETTINGS)
    one = batch["input_ids"][1:2, 3:]
    alone = reference.generate(input_ids=one, attention_mask=torch.ones_like(one), **SETTINGS)
    assert not torch.equal(together[1, -6:], alone[0, -6:])


@pytest.mark.parametrize("family", DECODER_ONLY)
def test_cached_steps_give_the_logits_of_one_pass(family):
    model, batch = ours(family), batch_of(family)
    ids = batch["input_ids"]
    with torch.no_grad():
        want = model(**batch).logits
        first = model(ids[:, :5], use_cache=True)
        second = model(ids[:, 5:], past_key_values=first.past_key_values, use_cache=True,
                       attention_mask=batch["attention_mask"])  # fmt: skip
    got = torch.cat([first.logits, second.logits], 1)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert second.past_key_values.get_seq_length() == K + ids.shape[1]


@families
def test_embeddings_in_place_of_ids(family):
    model, batch = ours(family), batch_of(family, "right")
    want = model(**batch).logits
    embedded = model.get_input_embeddings()(batch.pop("input_ids"))
    torch.testing.assert_close(model(inputs_embeds=embedded, **batch).logits, want)


@pytest.mark.parametrize("reentrant", [True, False])
@families
def test_gradient_checkpointing_needs_no_further_call(family, reentrant):
    grads = []
    for checkpointing in (False, True):
        model = ours(family, "ptuning-mlp").train()
        for part in model.modules():  # no dropout, so that both runs compute the same
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.0
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model(**batch_of(family), use_cache=False).logits.square().mean().backward()
        grads.append({n: p.grad for n, p in the_adapter(model).named_parameters()})
    for name, gradient in grads[0].items():
        assert gradient.abs().sum() > 0
        torch.testing.assert_close(grads[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_tokens_and_labels_stay_in_line():
    """Loss is over the tokens after the first; the reference also scores the first one, from the last prompt vector."""
    model = ours("llama")
    ids = inputs("llama")["input_ids"]
    out = model(ids, labels=ids)
    assert out.logits.shape[:2] == ids.shape
    want = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(out.loss, want)


def test_bert_takes_token_types():
    model, reference = ours("bert"), theirs("bert")
    same_parameters(model, reference)
    batch = batch_of("bert") | {"token_type_ids": torch.ones(3, 9, dtype=torch.long)}
    torch.testing.assert_close(model(**batch).logits, reference(**batch).logits, rtol=1e-5, atol=1e-5)


def test_two_prompts_and_a_lora_compose():
    model = ours("llama")
    pl.attach(model, pl.PromptTuning, k=2, name="second")
    pl.attach(model, pl.LoRA, "q_proj", name="low", r=2)
    shake(pl.adapters(model)["low"]["model.layers.0.self_attn.q_proj"], 0.3)
    batch = batch_of("llama", "left")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    first, second = (the_adapter(model, n).prompt.expand(3, -1, -1) for n in ("default", "second"))
    with pl.using(model, "low"):
        embedded = torch.cat([first, second, model.get_input_embeddings()(ids)], 1)
        longer = torch.cat([torch.ones(3, K + 2, dtype=torch.long), mask], 1)
        want = model(inputs_embeds=embedded, attention_mask=longer).logits[:, K + 2 :]
    with pl.using(model, "default", "second", "low"):
        torch.testing.assert_close(model(ids, attention_mask=mask).logits, want)
        tokens = model.generate(ids, attention_mask=mask, **SETTINGS)
        assert torch.equal(tokens, model.generate(ids, attention_mask=mask, use_cache=False, **SETTINGS))


def test_tasks_are_chosen_by_row_or_by_attribute():
    model = ours("llama", "multitask")
    ids = inputs("llama")["input_ids"]
    by_row = model(ids, task_ids=torch.tensor([2, 0, 1])).logits
    for row, task in enumerate([2, 0, 1]):
        the_adapter(model).task = task
        torch.testing.assert_close(model(ids[row : row + 1]).logits[0], by_row[row])
    the_adapter(model).task = 3
    with pytest.raises(ValueError, match=r"task 3 is not in 0…2"):
        model(ids)
    the_adapter(model).task = None
    with pytest.raises(ValueError, match="which of the 3 tasks"):
        model(ids)


def test_starts():
    model = build("llama")
    table = model.get_input_embeddings().weight.detach()
    for k, init, want in [(5, [7, 8, 9], [7, 8, 9, 7, 8]), (2, [7, 8, 9], [7, 8])]:
        prompt = the_adapter(pl.attach(copy.deepcopy(model), pl.PromptTuning, k=k, init=init)).prompt
        assert torch.equal(prompt, table[want])
    sampled = the_adapter(pl.attach(copy.deepcopy(model), pl.PromptTuning, k=9)).prompt
    assert all((table == row).all(1).any() for row in sampled)
    drawn = the_adapter(pl.attach(copy.deepcopy(model), pl.PromptTuning, k=60, init="random")).prompt
    assert 0.45 < drawn.abs().max() <= 0.5
    start_of_multitask = the_adapter(pl.attach(model, pl.MultitaskPromptTuning, k=2, init=[3, 4])).prompt
    assert torch.equal(start_of_multitask, table[[3, 4]])


@pytest.mark.parametrize(
    "method, hyper, words",
    [
        ("PromptTuning", dict(k=64), "k=64 leaves no room for a token: the model's context is 64 positions"),
        ("PTuning", dict(k=65), "k=65 .* 64 positions"),
        ("PromptTuning", dict(k=0), "k=0 is no prompt"),
        ("PromptTuning", dict(init=[]), "the prompt text has no tokens"),
        ("PromptTuning", dict(init="Classify this:"), r"pass tokenizer\(text\).input_ids"),
        ("PromptTuning", dict(init=[5, VOCABULARY]), f"token ids in 0…{VOCABULARY - 1}"),
        ("PromptTuning", dict(targets="q_proj"), "not on a Linear; use targets='decoder'"),
        ("PTuning", dict(encoder="gru"), "encoder='gru' is not known"),
        ("PTuning", dict(hidden=0), "hidden=0 must be at least 1"),
        ("MultitaskPromptTuning", dict(tasks=0), "at least one task"),
        ("MultitaskPromptTuning", dict(k=4, rank=5), "a rank in 1…4"),
    ],
)
def test_bad_input_changes_nothing(method, hyper, words):
    model = build("llama")
    with pytest.raises(ValueError, match=words):
        pl.attach(model, method, **hyper)
    assert not pl.hosts(model) and all(p.requires_grad for p in model.parameters())


def test_bad_calls_are_refused():
    model = ours("gpt2")
    with pytest.raises(ValueError, match="a prompt of 4 and 61 tokens need 65 positions, the model has 64"):
        model(torch.ones(1, 61, dtype=torch.long))
    with pytest.raises(ValueError, match="mask of shape"):
        model(torch.ones(1, 3, dtype=torch.long), attention_mask=torch.ones(1, 1, 3, 3))
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model.transformer(torch.ones(1, 3, dtype=torch.long), inputs_embeds=torch.zeros(1, 3, WIDTH))
    with pytest.raises(ValueError, match="default cache"):
        ours("llama").generate(torch.ones(1, 3, dtype=torch.long), cache_implementation="static", **SETTINGS)
    with pytest.raises(ValueError, match="PromptTuning"), pl.using(model, rows=["default", None]):
        pass


def test_a_prompt_cannot_be_merged():
    model = ours("llama")
    with pytest.raises(ValueError, match="no weight can stand for it"):
        pl.merge(model)


def test_a_damaged_file_is_refused(tmp_path):
    pl.save_adapter(ours("llama"), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"num_virtual_tokens": K + 1}))
    model = build("llama")
    with pytest.raises(ValueError, match="prompt_embeddings has 4 rows, the config speaks of 5"):
        pl.load_adapter(model, tmp_path)
    assert not pl.hosts(model)


def test_counts_in_closed_form():
    d, h = WIDTH, 12
    lstm = 2 * 4 * h * (d + h + 2) + 2 * 4 * h * (2 * h + h + 2)  # two directions, four gates, two biases each
    counts = {
        "prompt": K * d,
        "ptuning-mlp": K * d + (d * h + h) + (h * h + h) + (h * d + d),
        "ptuning-lstm": K * d + lstm + (2 * h * 2 * h + 2 * h) + (2 * h * d + d),
        "multitask": K * d + 3 * (K * 2 + 2 * d),
    }
    for kind, number in counts.items():
        model = ours("llama", kind)
        assert pl.count(model).trainable == the_adapter(model).expected() == number


def test_the_papers_counts():
    """Lester et al. 2021, section 2.1: 20,480 for T5-XXL with k = 5; Wang et al. 2023, table 1: 77.6K for T5-base."""
    import transformers as t

    for d, method, k, want in [(4096, pl.PromptTuning, 5, 20_480), (768, pl.MultitaskPromptTuning, 100, 77_668)]:
        with torch.device("meta"):
            model = t.T5ForConditionalGeneration(t.T5Config(d_model=d, num_layers=1, d_ff=8, d_kv=4, num_heads=1))
        pl.attach(model, method, k=k)
        assert pl.count(model).trainable == want


def test_a_classifier_that_reads_the_first_position_has_no_common_file(tmp_path):
    """RoBERTa's head reads position 0: the first token here, the prompt in the reference. So no file is written."""
    model = pl.attach(build_other("roberta"), pl.PromptTuning, k=3)
    batch = {"input_ids": torch.randint(2, 90, (2, 5), generator=torch.Generator().manual_seed(0))}
    assert model(**batch).logits.shape == (2, 3)
    with pytest.raises(ValueError, match="reads the first position"):
        pl.save_adapter(model, tmp_path)
    assert not list(tmp_path.iterdir())
    pl.save_adapter(pl.attach(build("bert"), pl.PromptTuning, k=3), tmp_path)
    with pytest.raises(ValueError, match="reads the first position"):
        pl.load_adapter(build_other("roberta"), tmp_path, check_base=False)
