"""Contexts, prefixes from a text, and mixtures of experts: beside the reference, and what is their own."""

from __future__ import annotations

import copy
import json

import peft
import pytest
import torch
from families import TARGETS, VOCABULARY, WIDTH, build, inputs, labels, shake
from parity import CLOSE, Pair, check_reads_ours, check_reads_theirs
from peft.tuners.cartridge.utils import compose_cartridge_adapters, prompt_embeddings_from_past_key_values
from peft.tuners.lora.arrow import ArrowLoraLinearLayer, create_arrow_model
from safetensors.torch import load_file

import peftlab as pl
from peftlab.context import answers_loss
from peftlab.lorahub import evolve, lorahub
from peftlab.lowrank import attach_products
from peftlab.methods._experts import load
from peftlab.methods.arrow import Arrow
from peftlab.methods.cartridge import prefill
from peftlab.methods.poly import set_task


def logits(model, **batch):
    with torch.no_grad():
        return model(**(batch or inputs("llama"))).logits


# ---------------------------------------------------------------------------------------------- a context of examples

# two examples: template, input, template, answer; the kinds of the second are those of the first plus 4
CONTEXT = dict(tokens=[5, 6, 7, 8, 9, 10, 11, 12, 13, 14], kinds=[1, 2, 2, 3, 4, 5, 6, 7, 8, 8])
K = len(CONTEXT["tokens"])


def their_context(family="llama", name="default", **more):
    config = peft.CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=CONTEXT["tokens"],
                            cpt_tokens_type_mask=CONTEXT["kinds"], opt_projection_epsilon=0.9, **more)  # fmt: skip
    return peft.get_peft_model(build(family), config, adapter_name=name).eval()


@pytest.mark.reference("CPT", "writes", "reads", "gradients")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_cpt_is_the_references_in_files_both_ways_with_its_gradients_and_loss(family, tmp_path):
    model = pl.attach(build(family), pl.CPT, **CONTEXT, epsilon=0.9, decay=0.5)
    ((path, cpt),) = pl.adapters(model)["default"].items()
    start = logits(model)
    shake(cpt, 0.03)  # inputs stay within 0.9·√(32/2048) = 0.11, templates do not within 0.0125
    assert (logits(model) - start).abs().max() > 1e-2
    pl.save_adapter(model, tmp_path / "ours")
    reading = peft.PeftModel.from_pretrained(build(family), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(reading)[:, K:], logits(model), **CLOSE)

    theirs = their_context(family, opt_weighted_loss_type="decay", opt_loss_decay_factor=0.5)
    delta = theirs.prompt_encoder["default"].delta_embedding.weight
    delta.data = 0.03 * torch.randn(delta.shape, generator=torch.Generator().manual_seed(3))
    theirs.save_pretrained(tmp_path / "theirs")
    delta.data[[4, 8, 9]] = 0  # answers are never moved there either, only projected
    model = pl.load_adapter(build(family), tmp_path / "theirs")
    ((path, cpt),) = pl.adapters(model)["default"].items()
    torch.testing.assert_close(logits(model), logits(theirs)[:, K:], **CLOSE)
    assert cpt.expected() == delta.numel() == pl.count(model).trainable == K * WIDTH

    batch = inputs(family)
    mine, want = model(**batch, labels=batch["input_ids"]), theirs(**batch, labels=batch["input_ids"].clone())
    # the reference's one mean over all answers: 3 of the context and 9 of the text a row, of which the first 8 + 1
    text = torch.nn.functional.cross_entropy(
        torch.cat([last_of_the_context(model), mine.logits[:, :-1]], 1).flatten(0, 1), batch["input_ids"].flatten())
    total = (9 * text + 3 * answers_loss(model)) / 12
    torch.testing.assert_close(total, want.loss, rtol=1e-5, atol=1e-6)
    total.backward()
    want.loss.backward()
    torch.testing.assert_close(cpt.prompt.grad, delta.grad, rtol=1e-4, atol=1e-6)
    assert not cpt.prompt.grad[[4, 8, 9]].any() and cpt.prompt.grad[[0, 1, 2, 3]].any(1).all()


def last_of_the_context(model):
    """Logits (B, 1, V) at the context's last token, which the reference lets predict the text's first."""
    ((_, cpt),) = pl.adapters(model)["default"].items()
    with pl.using(model):
        return model(inputs_embeds=cpt.vectors()[None]).logits[:, -1:].expand(3, -1, -1)


def test_an_untrained_cpt_is_in_context_learning():
    """With ε = 0 it stays that, whatever happens to its parameters."""
    batch = inputs("llama")
    whole = torch.cat([torch.tensor(CONTEXT["tokens"]).expand(3, -1), batch["input_ids"]], 1)
    want = logits(build("llama"), input_ids=whole)[:, K:]
    model = pl.attach(build("llama"), pl.CPT, **CONTEXT, epsilon=0.0, format_epsilon=0.0)
    torch.testing.assert_close(logits(model), want, **CLOSE)
    shake(pl.adapters(model)["default"]["model"], 1.0)
    torch.testing.assert_close(logits(model), want, **CLOSE)


def test_a_step_of_training_ends_in_the_ball():
    model = pl.attach(build("llama"), pl.CPT, **CONTEXT, epsilon=0.8, decay=0.9)
    cpt = pl.adapters(model)["default"]["model"]
    rows = [{"input_ids": row} for row in inputs("llama")["input_ids"].tolist()]
    pl.train(model, rows, steps=3, batch_size=3, lr=0.1, progress=False, penalty=answers_loss)
    length = (cpt.prompt - cpt.E).norm(dim=1)
    size = (WIDTH / 2048) ** 0.5
    radius = torch.tensor([0.1, 0.8, 0.8, 0.1, 0, 0.1, 0.8, 0.1, 0, 0]) * size
    torch.testing.assert_close(length, radius, rtol=1e-4, atol=1e-6)  # steps of 0.1 a number reach the edge


def test_the_references_loss_is_not_a_number_unless_the_last_kind_is_an_answer():
    """The text's kind there is 4 above the context's last one, and only kinds divisible by 4 are learned: with the
    default kinds, all 1, nothing is. A name other than "default" is a KeyError."""
    batch = inputs("llama")
    config = peft.CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[5, 6])
    theirs = peft.get_peft_model(build("llama"), config)
    assert theirs(**batch, labels=batch["input_ids"].clone()).loss.isnan()
    with pytest.raises(KeyError):
        their_context(name="other")(**batch, labels=batch["input_ids"].clone())
    model = pl.attach(build("llama"), pl.CPT, tokens=[5, 6])
    assert model(**batch, labels=batch["input_ids"]).loss.isfinite()
    with pytest.raises(ValueError, match="kinds of 4"):
        answers_loss(model)


def test_the_references_decay_counts_only_where_its_kind_of_loss_says_so(tmp_path):
    for kind, want in (("none", 1.0), ("decay", 0.5)):
        their_context(opt_weighted_loss_type=kind, opt_loss_decay_factor=0.5).save_pretrained(tmp_path)
        model = pl.load_adapter(build("llama"), tmp_path)
        assert pl.adapters(model)["default"]["model"].decay == want


@pytest.mark.parametrize(("hyper", "said"), [
    (dict(), "no context"),
    (dict(tokens=[1, 2], kinds=[1]), "2 tokens, 1 kinds"),
    (dict(tokens=[VOCABULARY]), f"vocabulary's {VOCABULARY}"),
    (dict(tokens=[1] * 64), "no room"),
])  # fmt: skip
def test_what_is_no_context_is_refused(hyper, said):
    model = build("llama")
    with pytest.raises(ValueError, match=said):
        pl.attach(model, pl.CPT, **hyper)
    assert not pl.hosts(model)


# ------------------------------------------------------------------------------------------------- skills and experts

POLY = {
    "one task": dict(r=4, skills=3),
    "tasks": dict(r=4, tasks=4, skills=2),
    "splits": dict(r=3, tasks=3, skills=2, splits=4),
}


def spelled(hyper):
    return {peftlab_to_theirs.get(k, k): v for k, v in hyper.items()}


peftlab_to_theirs = {"tasks": "n_tasks", "skills": "n_skills", "splits": "n_splits"}


@pytest.mark.reference("Poly", "writes", "reads", "gradients")
@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("hyper", POLY.values(), ids=POLY)
def test_poly_is_the_references_in_files_both_ways_with_its_gradients(hyper, family, tmp_path):
    targets, tasks = TARGETS[family], hyper.get("tasks", 1)
    batch = inputs(family) | {"task_ids": torch.tensor([2, 0, 1]) % tasks}
    model = pl.attach(build(family), pl.Poly, targets, name="a", **hyper)
    bare = logits(model, **batch)
    for seed, adapter in enumerate(pl.adapters(model)["a"].values()):
        shake(adapter, 0.5, seed=seed)
    want = logits(model, **batch)
    assert (want - bare).abs().max() > 1e-2
    if tasks > 1:
        assert (want - logits(model, **batch | {"task_ids": torch.tensor([0, 2, 1]) % tasks})).abs().max() > 1e-3
    pl.save_adapter(model, tmp_path / "ours", name="a")
    # its own forward: a PeftModel without a task_type would lose task_ids on the way
    theirs = peft.PeftModel.from_pretrained(build(family), tmp_path / "ours").eval().base_model
    torch.testing.assert_close(logits(theirs, **batch), want, **CLOSE)

    config = peft.PolyConfig(target_modules=targets.split("|"), **spelled(hyper))
    theirs = peft.get_peft_model(build(family), config).eval()
    trained = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == pl.count(model).trainable == pl.count(model).expected["a"]
    for seed, parameter in enumerate(trained.values()):
        parameter.data += 0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
    theirs.save_pretrained(tmp_path / "theirs")
    model = pl.load_adapter(build(family), tmp_path / "theirs", name="a")
    torch.testing.assert_close(logits(model, **batch), logits(theirs.base_model, **batch), **CLOSE)
    for one in (theirs.base_model, model):
        one(**batch, labels=labels(family, batch)).loss.backward()
    for path, adapter in pl.adapters(model)["a"].items():
        for name, parameter in adapter.named_parameters():
            key = {"module_logits": "poly_router.default.module_logits"}.get(name, f"{name}.default")
            torch.testing.assert_close(parameter.grad, trained.pop(f"base_model.model.{path}.{key}").grad,
                                       rtol=1e-4, atol=1e-6)  # fmt: skip
    assert not trained


def test_one_task_of_poly_is_a_lora_and_the_attribute_says_which():
    model = pl.attach(build("llama"), pl.Poly, "q_proj|v_proj", name="a", tasks=3, skills=4, splits=2)
    linear = {p: a for p, a in pl.adapters(model)["a"].items() if a.part_of is None}
    for adapter in linear.values():
        shake(adapter, 0.5)
    with pytest.raises(ValueError, match="which of the 3 tasks"):
        logits(model)
    set_task(model, 2)
    want = logits(model)
    torch.testing.assert_close(logits(model, **inputs("llama"), task_ids=torch.tensor([2, 2, 2])), want, **CLOSE)
    with torch.no_grad():
        products = {p: (A[0].T, B[0].T / 8) for p, a in linear.items() for A, B in [a.mixtures(torch.tensor([2]))]}
    attach_products(model, "two", products)
    torch.testing.assert_close(logits(model), want, **CLOSE)
    with pytest.raises(ValueError, match="not in 0…2"):
        set_task(model, 3)
    pl.activate(model, "a")
    with pytest.raises(ValueError, match="2 task_ids for 3 rows"):
        logits(model, **inputs("llama"), task_ids=torch.tensor([0, 1]))


def test_skills_are_drawn_in_training_around_their_evaluation_weights():
    """Median of σ(z + logistic noise) is σ(z), and it is at least ½ as often as σ(z) says."""
    torch.manual_seed(0)
    poly = pl.Poly(torch.nn.Linear(4, 4), r=1, skills=2)
    with torch.no_grad():
        poly.module_logits.copy_(torch.tensor([[1.0, -1.0]]))
        poly.poly_lora_A.copy_(torch.tensor([1.0, 0.0])[None, :, None, None].expand_as(poly.poly_lora_A))
    drawn = poly.mixtures(torch.zeros(20_000, dtype=torch.long))[0][:, 0, 0]  # α of the first skill
    # α ≥ ½ if its own draw is the larger: the difference of two logistic draws plus 2 is positive
    noise = torch.distributions.Uniform(0, 1).sample((2, 200_000)).logit()
    want = (2 + noise[0] - noise[1] > 0).float().mean()
    torch.testing.assert_close((drawn >= 0.5).float().mean(), want, rtol=0, atol=0.012)  # 4 deviations of a mean
    poly.eval()
    a = torch.sigmoid(torch.tensor([1.0, -1.0]))
    torch.testing.assert_close(poly.mixtures(torch.tensor([0]))[0][0, 0, 0], a[0] / a.sum())


# ------------------------------------------------------------------------------------------------------- X-LoRA, Arrow

X = dict(width=8, dropout=0.0)
XLORA = {
    "one s": {},
    "layerwise": dict(layerwise=True, temperature=0.3),
    "depth 3": dict(depth=3, layerwise=True, **X),
    "top 2": dict(top_k=2, scale=1.5),
    "softmax of top 2": dict(softmax=False, top_k=2, topk_softmax=True),
    "no softmax": dict(softmax=False),
}


def with_experts(family, names=("x", "y", "z"), **more):
    """Trained LoRAs, of which the first right singular value is much larger than the second."""
    model = build(family)
    for seed, name in enumerate(names, 20):
        pl.attach(model, pl.LoRA, TARGETS[family], name=name, r=4, alpha=4 * seed / 20, **more)
        for adapter in pl.adapters(model)[name].values():
            shake(adapter, 0.3, seed=seed)
            with torch.no_grad():
                adapter.lora_A[0] *= 4
        pl.freeze(model, name)
    return model


# not GPT-2: the reference finds an expert's layers again only where their paths begin with "model."
def saved_experts(family, folder, **more):
    model = with_experts(family, **more)
    for name in pl.adapters(model):
        pl.save_adapter(model, folder / name, name=name)
    return model, {str(i): str(folder / name) for i, name in enumerate(pl.adapters(model))}


def their_xlora(family, paths, hyper):
    base = build(family)
    base.config.use_cache = False
    theirs = {pl.XLoRA.hf_hyper[k]: v for k, v in hyper.items()} | dict(hidden_size=WIDTH, adapters=paths)
    return peft.get_peft_model(base, peft.XLoraConfig(task_type="CAUSAL_LM", **theirs))


@pytest.mark.reference("XLoRA", "outputs", "writes", "gradients")
@pytest.mark.parametrize(("family", "hyper"), [("llama", h) for h in XLORA.values()] + [("qwen2", XLORA["layerwise"])],
                         ids=[*XLORA, "qwen2"])  # fmt: skip
def test_xlora_is_the_references_with_its_gradients_and_the_reference_reads_ours(family, hyper, tmp_path):
    model, paths = saved_experts(family, tmp_path)
    pl.attach(model, pl.XLoRA, of=("x", "y", "z"), name="a", **hyper)
    ours = next(a for a in pl.adapters(model)["a"].values() if a.part_of is None)
    shake(ours, 0.5)
    want = logits(model)
    with pl.using(model, "x"):
        assert (logits(model) - want).abs().max() > 1e-2
    theirs = their_xlora(family, paths, hyper).eval()
    classifier = theirs.base_model.internal_xlora_classifier
    trained = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == ours.expected() == pl.count(model).per_adapter["a"]
    classifier.load_state_dict(ours.state_dict())  # the names are the same
    torch.testing.assert_close(logits(theirs), want, **CLOSE)
    for one in (theirs, model):
        one(**inputs(family), labels=inputs(family)["input_ids"]).loss.backward()
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, classifier.get_parameter(name).grad, rtol=1e-4, atol=1e-6)

    pl.save_adapter(model, tmp_path / "ours", name="a")
    config = json.loads((tmp_path / "ours/adapter_config.json").read_text())
    assert config["adapters"] == {"0": "x", "1": "y", "2": "z"}
    (tmp_path / "ours/adapter_config.json").write_text(json.dumps(config | {"adapters": paths}))
    base = build(family)
    base.config.use_cache = False
    torch.manual_seed(99)  # what it does not read would be drawn
    reading = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    torch.testing.assert_close(logits(reading), want, **CLOSE)


def test_the_reference_saves_no_classifier_and_knows_no_names(tmp_path):
    """Experts must be named 0, 1, … there, and `layers.0` of the classifier is then taken for the first one's."""
    _, paths = saved_experts("llama", tmp_path)
    theirs = their_xlora("llama", paths, {})
    theirs.save_pretrained(tmp_path / "theirs")
    assert not load_file(tmp_path / "theirs/adapter_model.safetensors")
    with pytest.raises(ValueError, match="leaves it out"):
        pl.load_adapter(with_experts("llama"), tmp_path / "theirs", name="a")
    named = their_xlora("llama", {name: paths[str(i)] for i, name in enumerate("xyz")}, {})
    with pytest.raises(KeyError):
        named(**inputs("llama"))


def test_xlora_with_one_expert_chosen_is_that_expert_and_with_none_the_base():
    model = pl.attach(with_experts("llama"), pl.XLoRA, of=("x", "y", "z"), name="a")
    head = next(a for a in pl.adapters(model)["a"].values() if a.part_of is None)
    with torch.no_grad():
        head.layers[0].weight.zero_()
        head.layers[0].bias.copy_(torch.tensor([0.0, 60.0, 0.0]))  # softmax: e⁻⁶⁰ is nothing
    chosen = logits(model)
    with pl.using(model, "y"):
        torch.testing.assert_close(chosen, logits(model), **CLOSE)
    head.scale = 0.0
    with pl.using(model):
        bare = logits(model)
    torch.testing.assert_close(logits(model), bare, **CLOSE)


def test_xlora_writes_without_a_cache_only():
    model = pl.attach(with_experts("llama"), pl.XLoRA, of=("x", "y"), name="a")
    ids = inputs("llama")["input_ids"][:1]
    settings = dict(max_new_tokens=3, do_sample=False, attention_mask=torch.ones_like(ids))
    with pytest.raises(ValueError, match="use_cache=False"):
        model.generate(ids, **settings)
    got = model.generate(ids, use_cache=False, **settings)[0]
    for end in range(9, 12):
        assert got[end] == logits(model, input_ids=got[None, :end])[0, -1].argmax()


@pytest.mark.parametrize(("hyper", "said"), [
    (dict(of=("x",)), "two or more"),
    (dict(of=("x", "w")), "no adapter named 'w'"),
    (dict(of=("x", "scale")), "no added term"),
    (dict(of=("x", "y"), top_k=3), "up to the 2 experts"),
])  # fmt: skip
def test_what_are_no_experts_is_refused(hyper, said):
    model = pl.attach(with_experts("llama"), pl.IA3, TARGETS["llama"], name="scale")
    with pytest.raises(ValueError, match=said):
        pl.attach(model, pl.XLoRA, name="a", **hyper)
    assert "a" not in pl.adapters(model)


def their_arrow(folder, names=("x", "y", "z"), general=(), **more):
    config = peft.ArrowConfig(rng_seed=0, use_gks=bool(general), **more)
    return create_arrow_model(build("llama"), [str(folder / n) for n in names], config,
                              [str(folder / n) for n in general] or None).eval()  # fmt: skip


@pytest.mark.reference("Arrow", "outputs", "peft.tuners.lora.arrow.create_arrow_model")
@pytest.mark.parametrize("more", [dict(top_k=1), dict(top_k=2, temperature=0.3), dict(top_k=3)], ids=str)
def test_arrow_is_the_references_where_its_prototypes_have_converged(more, tmp_path):
    model, _ = saved_experts("llama", tmp_path)
    pl.attach(model, Arrow, TARGETS["llama"], name="a", of=("x", "y", "z"), **more)
    got = logits(model)
    theirs = their_arrow(tmp_path, **{"router_temperature" if k == "temperature" else k: v for k, v in more.items()})
    torch.testing.assert_close(logits(theirs), got, **CLOSE)
    assert pl.count(model).expected["a"] == 0


def test_arrow_has_nothing_to_save_and_says_so(tmp_path):
    model = with_experts("llama")
    pl.attach(model, Arrow, "q_proj", name="a", of=("x", "y"))
    with pytest.raises(ValueError, match="'a' is Arrow, which trains nothing"):
        pl.save_adapter(model, tmp_path / "arrow", name="a")
    assert not (tmp_path / "arrow").exists()


def test_arrow_sends_a_token_to_the_expert_whose_direction_it_has():
    model = with_experts("llama")
    pl.attach(model, Arrow, "q_proj", name="a", of=("x", "y", "z"), top_k=1)
    arrow = next(iter(pl.adapters(model)["a"].values()))
    v = arrow.prototypes(torch.zeros(1))
    for i, name in enumerate(arrow.of):
        A, B = arrow.product(name)
        Vt = torch.linalg.svd(B @ A)[2]
        assert v[i].double().dot(Vt[0]).abs() > 1 - 1e-6
        for sign in (1, -1):
            x = sign * v[i][None]
            want = arrow.layer(x) + arrow.peers[name].change(x)
            torch.testing.assert_close(arrow(arrow.layer, x), want, **CLOSE)


def test_prototypes_are_made_anew_when_an_expert_changes_and_saved_ones_are_not_needed():
    model = with_experts("llama")
    pl.attach(model, Arrow, TARGETS["llama"], name="a", of=("x", "y", "z"))
    arrow = next(iter(pl.adapters(model)["a"].values()))
    before, first = logits(model), arrow.prototypes(torch.zeros(1))
    assert arrow.prototypes(torch.zeros(1)) is first
    shake(arrow.peers["x"], 0.5)
    assert (arrow.prototypes(torch.zeros(1))[0] - first[0]).abs().max() > 0.1
    assert (logits(model) - before).abs().max() > 1e-3
    host, x = next(iter(pl.hosts(model).values())), torch.randn(2, 3, WIDTH)
    torch.testing.assert_close(torch.compile(host, fullgraph=True, backend="aot_eager")(x), host(x), **CLOSE)
    with pytest.raises(ValueError, match="needs 'x'|detach 'a' first"):
        pl.detach(model, "x")


def test_what_the_references_power_iteration_finds_of_two_equal_directions():
    """15 steps are not enough where the second singular value is near the first: ours is exact."""
    layer = torch.nn.Linear(32, 32)
    A, B = torch.eye(32)[:2], torch.eye(32)[:, :2] * torch.tensor([1.0, 0.97])
    config = peft.ArrowConfig(rng_seed=0)
    config.task_adapter_names = config.gks_adapter_names = ["x"]
    theirs = ArrowLoraLinearLayer(32, config)
    v = theirs.top_right_singular_vec_from_BA(A, B)
    assert v[0].abs() < 0.99  # of 1
    lora = pl.LoRA(layer, r=2, alpha=2)
    lora.lora_A.data, lora.lora_B.data = A, B
    arrow = Arrow(layer, of=("x", "y"))
    arrow.__dict__["peers"] = {"x": lora, "y": lora}
    torch.testing.assert_close(arrow.prototypes(A).abs(), torch.eye(32)[[0, 0]], rtol=0, atol=1e-6)


def test_general_knowledge_is_subtracted_as_a_product_and_not_factor_by_factor(tmp_path):
    """B·A is the expert; B·c and A/c are the same one. The reference subtracts B_g from B and A_g from A."""
    model, _ = saved_experts("llama", tmp_path)
    pl.attach(model, Arrow, TARGETS["llama"], name="a", of=("x", "y"), general="z", top_k=1)
    arrow = next(iter(pl.adapters(model)["a"].values()))
    (A, B), (A_g, B_g) = arrow.product("x"), arrow.product("z")
    rest = B @ A - B_g @ A_g
    v = torch.linalg.svd(rest)[2][:1].float()
    torch.testing.assert_close(arrow(arrow.layer, v) - arrow.layer(v), (v.double() @ rest.T).float(), **CLOSE)
    ours, theirs = logits(model), logits(their_arrow(tmp_path, ("x", "y"), ("z",), top_k=1))
    for adapter in pl.adapters(model)["z"].values():
        with torch.no_grad():
            adapter.lora_A.div_(8)
            adapter.lora_B.mul_(8)
    torch.testing.assert_close(logits(model), ours, **CLOSE)
    pl.save_adapter(model, tmp_path / "z", name="z")
    again = logits(their_arrow(tmp_path, ("x", "y"), ("z",), top_k=1))
    assert (theirs - again).abs().max() > 0.1, "mended there: compare it with ours"


@pytest.mark.parametrize(("hyper", "said"), [
    (dict(of="x"), r"write of=\('x',\)"),
    (dict(of=("x", "y"), top_k=3), "choose 1…2"),
    (dict(of=("x", "y"), general="w"), "no adapter named 'w'"),
    (dict(of=("x", "y"), temperature=0), "temperature above 0"),
])  # fmt: skip
def test_what_arrow_cannot_choose_from_is_refused(hyper, said):
    model = with_experts("llama", ("x", "y"))
    with pytest.raises(ValueError, match=said):
        pl.attach(model, Arrow, "q_proj", name="a", **hyper)
    assert "a" not in pl.adapters(model)


# ------------------------------------------------------------------------------------------------------------- LoraHub


def test_the_search_finds_a_minimum_in_the_box_and_at_its_edge():
    inside = torch.tensor([0.7, -0.9, 0.2])
    w, values = evolve(lambda w: float((w - inside).square().sum()), 3, 200, 1.5, seed=0)
    torch.testing.assert_close(w, inside, rtol=0, atol=1e-2)
    assert values[0] == pytest.approx(float(inside.square().sum())) and values == sorted(values, reverse=True)
    w, _ = evolve(lambda w: float(w.sum()) if w[0] < 1 else float("nan"), 2, 100, 1.5, seed=1)
    torch.testing.assert_close(w, torch.tensor([-1.5, -1.5]))


def test_lorahub_finds_the_expert_that_the_examples_came_from():
    """Rows in the style of y: what it would say next at each place. w is near (0, 1), and the loss near y's own."""
    model = with_experts("llama", ("x", "y"))
    ids = inputs("llama", rows=4)["input_ids"]
    with pl.using(model, "y"):
        said = logits(model, input_ids=ids).argmax(-1)
    labels = torch.cat([ids[:, :1], said[:, :-1]], 1)
    rows = [{"input_ids": i, "labels": t} for i, t in zip(ids.tolist(), labels.tolist(), strict=True)]
    hub = lorahub(model, rows, of=("x", "y"), name="hub", trials=60, l1=0.0)
    assert abs(hub.weights["y"]) > 0.6 and abs(hub.weights["x"]) < 0.4 and "y " in repr(hub)
    with pl.using(model, "y"), torch.no_grad():
        assert hub.losses[-1] < model(input_ids=ids, labels=labels).loss + 0.05 < hub.losses[0] - 1
    for path, adapter in pl.adapters(model)["hub"].items():
        x, y = (pl.adapters(model)[name][path] for name in "xy")
        w = hub.weights
        torch.testing.assert_close(adapter.lora_A, w["x"] * x.lora_A + w["y"] * y.lora_A)
        torch.testing.assert_close(adapter.lora_B, w["x"] * x.scaling * x.lora_B + w["y"] * y.scaling * y.lora_B)
    with torch.no_grad():
        assert model(input_ids=ids, labels=labels).loss.item() == pytest.approx(hub.losses[-1], rel=1e-5)


def test_lorahub_refuses_what_it_cannot_sum():
    model = with_experts("llama", ("x", "y"))
    pl.attach(model, pl.LoRA, TARGETS["llama"], name="thick", r=5)
    pl.attach(model, pl.IA3, TARGETS["llama"], name="scale")
    rows = [{"input_ids": [3, 4, 5]}]
    for of, said in {("x",): "two or more", ("x", "thick"): "other layers or ranks", ("x", "scale"): "no LoRA"}.items():
        with pytest.raises(ValueError, match=said):
            lorahub(model, rows, of=of)
    assert "hub" not in pl.adapters(model)


# ----------------------------------------------------------------------------------------------------------- Cartridge

TEXT = [11, 12, 13, 14, 15, 16]


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_a_prefilled_cartridge_is_the_text_itself(family):
    model = pl.attach(build(family), pl.Cartridge, k=6)
    prefill(model, [*TEXT, 80])
    ids = inputs(family)["input_ids"]
    with pl.using(model):
        want = logits(model, input_ids=torch.cat([torch.tensor(TEXT).expand(3, -1), ids], 1))[:, 6:]
    torch.testing.assert_close(logits(model, input_ids=ids), want, **CLOSE)
    settings = dict(max_new_tokens=4, do_sample=False, pad_token_id=0)
    said = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    with pl.using(model):
        whole = torch.cat([torch.tensor(TEXT).expand(3, -1), ids], 1)
        read = model.generate(whole, attention_mask=torch.ones_like(whole), **settings)
    assert torch.equal(said[:, 9:], read[:, 15:])


@pytest.mark.reference("Cartridge", "writes", "reads", "gradients")
@pytest.mark.parametrize(("family", "frozen"), [("llama", 1), ("llama", 0), ("gpt2", 2)])
def test_cartridge_is_the_references_in_files_both_ways_with_its_prefill_and_gradients(family, frozen, tmp_path):
    model = pl.attach(build(family), pl.Cartridge, k=4, frozen=frozen)
    prefill(model, TEXT)
    config = peft.CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, num_frozen_tokens=frozen)
    theirs = peft.get_peft_model(build(family), config).eval()
    with torch.no_grad():
        cache = build(family)(input_ids=torch.tensor([TEXT]), use_cache=True).past_key_values
    table = prompt_embeddings_from_past_key_values([(a.keys, a.values) for a in cache.layers], num_virtual_tokens=4)
    theirs.prompt_encoder["default"].load_prompt_embeddings(table)
    made = [a for a in pl.adapters(model)["default"].values() if a.part_of is None]
    torch.testing.assert_close(torch.cat([a.prefix() for a in made], -1), table)
    torch.testing.assert_close(logits(theirs), logits(model), **CLOSE)
    trained = theirs.prompt_encoder["default"].trainable_embedding
    assert trained.numel() == pl.count(model).trainable == sum(a.expected() for a in made)
    for one in (theirs, model):
        one(**inputs(family), labels=inputs(family)["input_ids"]).loss.backward()
    ours = torch.cat([torch.cat([a.P_k.grad, a.P_v.grad], -1) for a in made], -1)
    torch.testing.assert_close(ours, trained.grad, rtol=1e-4, atol=1e-6)

    for seed, adapter in enumerate(made):
        shake(adapter, 0.3, seed=seed)
    pl.save_adapter(model, tmp_path / "ours")
    reading = peft.PeftModel.from_pretrained(build(family), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(reading), logits(model), **CLOSE)
    reading.save_pretrained(tmp_path / "theirs")
    again = pl.load_adapter(build(family), tmp_path / "theirs")
    torch.testing.assert_close(logits(again), logits(reading), **CLOSE)
    assert {a.frozen for a in pl.adapters(again)["default"].values() if a.part_of is None} == {frozen}


def test_two_active_cartridges_stand_one_behind_the_other_as_composed_files_do(tmp_path):
    model = build("llama")
    for name, k in (("a", 3), ("b", 5)):
        pl.attach(model, pl.Cartridge, name=name, k=k)
        pl.save_adapter(model, tmp_path / name, name=name)
    pl.activate(model, "a", "b")
    compose_cartridge_adapters([tmp_path / "a", tmp_path / "b"], output_path=tmp_path / "both")
    whole = pl.load_adapter(build("llama"), tmp_path / "both")
    torch.testing.assert_close(logits(model), logits(whole), **CLOSE)


def test_training_leaves_the_frozen_tokens_and_short_texts_are_refused():
    model = pl.attach(build("llama"), pl.Cartridge, k=4, frozen=2)
    with pytest.raises(ValueError, match="give it k or more"):
        prefill(model, TEXT[:3])
    prefill(model, TEXT)
    one = next(a for a in pl.adapters(model)["default"].values() if a.part_of is None)
    before = one.prefix().detach().clone()
    rows = [{"input_ids": row} for row in inputs("llama")["input_ids"].tolist()]
    pl.train(model, rows, steps=2, batch_size=3, lr=0.1, progress=False)
    after = one.prefix().detach()
    assert torch.equal(after[:2], before[:2]) and (after[2:] - before[2:]).abs().min(1).values.max() > 1e-3
    for hyper, said in ((dict(k=4, frozen=4), "left to train"), (dict(k=2, frozen=-1), "frozen=-1 must be at least 0")):
        with pytest.raises(ValueError, match=said):
            pl.attach(build("llama"), pl.Cartridge, **hyper)


# ---------------------------------------------------------------------------------------------------------------- Lily

LILY = {
    "alone": Pair("Lily", peft.LilyConfig, dict(r=4), dict(r=4), 0.4, merges=False, gradients=False),
    "stride 2": Pair("Lily", peft.LilyConfig, dict(r=4, stride=2, experts=3, scaling=0.7),
                     dict(r=4, stride_A=2, num_B=3, scaling=0.7), 0.4, merges=False, gradients=False),
}  # fmt: skip


@pytest.mark.reference("Lily", "writes", "reads")
@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("pair", LILY.values(), ids=LILY)
def test_lily_is_the_references_in_files_both_ways(family, pair, tmp_path):
    check_reads_ours(family, pair, tmp_path / "ours")
    check_reads_theirs(family, pair, tmp_path / "theirs")


def twelve_layers():
    import transformers as t

    torch.manual_seed(0)
    return t.LlamaForCausalLM(t.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=12, num_attention_heads=2,
        max_position_embeddings=32, initializer_range=0.3, pad_token_id=0)).eval()  # fmt: skip


@pytest.mark.reference("Lily", "reads", "gradients")
def test_lily_shares_in_model_order_which_is_not_the_alphabets(tmp_path):
    """Twelve layers in blocks of five: 10 comes after 9 here and after 1 in a file. Gradients of shared ones too."""
    config = peft.LilyConfig(r=3, stride_A=5, num_B=2, target_modules=["q_proj", "up_proj"])
    theirs = peft.get_peft_model(twelve_layers(), config).eval()
    trained = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
    for seed, parameter in enumerate(trained.values()):
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
    theirs.save_pretrained(tmp_path)
    model = pl.load_adapter(twelve_layers(), tmp_path, name="a")
    torch.testing.assert_close(logits(model), logits(theirs), **CLOSE)
    assert pl.count(model).trainable == sum(p.numel() for p in trained.values()) == pl.count(model).expected["a"]
    for one in (theirs, model):
        one(**inputs("llama"), labels=inputs("llama")["input_ids"]).loss.backward()
    for path, adapter in pl.adapters(model)["a"].items():
        for name, parameter in adapter.named_parameters():
            want = trained.pop(f"base_model.model.{path}.{name}.default.weight").grad
            torch.testing.assert_close(parameter.grad, want, rtol=1e-4, atol=1e-6)
    assert not trained
    layers = [pl.adapters(model)["a"][f"model.layers.{i}.self_attn.q_proj"] for i in range(12)]
    assert len({id(a.lily_A) for a in layers}) == 3 and len({id(a.lily_B) for a in layers}) == 1
    assert layers[10].lily_A is layers[11].lily_A is not layers[9].lily_A


def test_a_file_of_lily_that_shares_otherwise_is_refused(tmp_path):
    names = [f"layers.{i}.self_attn.q_proj" for i in range(2)]  # each a target of its own: nothing is shared there
    theirs = peft.get_peft_model(build("llama"), peft.LilyConfig(r=3, stride_A=2, target_modules=names))
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="share lily_A here and not in the file"):
        pl.load_adapter(build("llama"), tmp_path)


def test_a_row_of_lily_depends_on_the_rows_beside_it_and_on_later_words():
    """The router's weights are a mean over the batch, here as in the reference: no bug of either, but not causal."""
    model = pl.attach(build("llama"), pl.Lily, TARGETS["llama"], r=4)
    for seed, adapter in enumerate(pl.adapters(model)["default"].values()):
        shake(adapter, 0.5, seed=seed)
    ids = inputs("llama")["input_ids"]
    whole = logits(model, input_ids=ids)
    assert (whole[:1] - logits(model, input_ids=ids[:1])).abs().max() > 1e-3
    assert (whole[:, :5] - logits(model, input_ids=ids[:, :5])).abs().max() > 1e-3
    for hyper in (dict(experts=1), dict(stride=0), dict(r=0)):
        with pytest.raises(ValueError, match="2 for a router"):
            pl.attach(build("llama"), pl.Lily, "q_proj", **hyper)


# ------------------------------------------------------------------------------------------------------------- MixLoRA


def mixed(family="llama", **hyper):
    torch.manual_seed(0)
    model = pl.attach(build(family), pl.MixLoRA, name="a", **{"r": 3, "experts": 4, **hyper})
    for seed, adapter in enumerate(pl.adapters(model)["a"].values()):
        shake(adapter, 0.3, seed=seed)
    return model


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_mixlora_is_its_equation_with_each_expert_a_merged_network(family):
    model = mixed(family).double()  # the equation, not its rounding
    path, mix = next((p, a) for p, a in pl.adapters(model)["a"].items() if a.part_of is None)
    bare = build(family).double().get_submodule(path)
    networks = []
    for i in range(4):
        network = copy.deepcopy(bare)
        for name in mix.lora_A:
            change = mix.scaling * mix.lora_B[name][i] @ mix.lora_A[name][i]
            weight = network.get_submodule(name).weight
            weight.data += change.T if family == "gpt2" else change
        networks.append(network)
    x = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        p = torch.softmax(x @ mix.router.T, -1)
        kept = torch.where(p >= p.topk(2, -1).values[..., -1:], p, 0.0)
        want = sum((kept / kept.sum(-1, keepdim=True))[..., i, None] * networks[i](x) for i in range(4))
        torch.testing.assert_close(model.get_submodule(path)(x), want, rtol=1e-10, atol=1e-10)


def test_equal_experts_are_one_whatever_the_router_says():
    model = mixed()
    for mix in (a for a in pl.adapters(model)["a"].values() if a.part_of is None):
        for parameter in (*mix.lora_A.values(), *mix.lora_B.values()):
            parameter.data[:] = parameter.data[:1].clone()
    want = logits(model)
    for mix in (a for a in pl.adapters(model)["a"].values() if a.part_of is None):
        mix.router.data.normal_()
    torch.testing.assert_close(logits(model), want, **CLOSE)


def test_after_a_step_with_checkpointing_the_next_one_begins_with_the_base():
    """Checkpointing runs a layer again only as far as it must, and leaves by an exception in the middle of the experts:
    if that expert stayed, the next step would save other tensors than its second run, which torch refuses."""
    model = mixed().train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    for _ in range(2):
        model.zero_grad()
        model(**inputs("llama"), labels=inputs("llama")["input_ids"]).loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model = mixed().train()
    model(**inputs("llama"), labels=inputs("llama")["input_ids"]).loss.backward()
    for name, gradient in grads.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, rtol=1e-4, atol=1e-6)


def test_the_load_is_one_when_even_and_the_number_of_experts_when_one_does_everything():
    even = torch.full((8, 4), 0.25)
    torch.testing.assert_close(load(even), torch.tensor(1.0))
    torch.testing.assert_close(load(torch.eye(4)), torch.tensor(1.0))
    torch.testing.assert_close(load(torch.eye(4)[[2] * 8]), torch.tensor(4.0))
    # all first choices are the first's, F = (1, 0), at P = (0.6, 0.4): 2·(1·0.6 + 0·0.4)
    torch.testing.assert_close(load(torch.tensor([[0.6, 0.4]] * 3)), torch.tensor(1.2))


def test_training_evens_out_the_load():
    """One expert has everything at first. The penalty alone is strong enough to spread the tokens; without it nothing
    of the kind happens. Each step leaves no tensor behind."""
    rows = [{"input_ids": row} for row in inputs("llama", rows=4)["input_ids"].tolist()]
    loads = {}
    for balance in (0.0, 3.0):
        model = mixed(balance=balance)
        mixes = [a for a in pl.adapters(model)["a"].values() if a.part_of is None]
        with torch.no_grad():
            for mix in mixes:
                mix.router.copy_(torch.tensor([[1.0], [0.5], [0.0], [-0.5]]) * mix.router[:1].sign())
        pl.train(model, rows, steps=12, batch_size=4, lr=0.05, progress=False)
        assert all(mix.x is None for mix in mixes)
        model.train()
        with torch.no_grad():
            model(**inputs("llama", rows=4))
            loads[balance] = sum(load(mix.probabilities(mix.x).flatten(0, -2)) for mix in mixes) / len(mixes)
    assert loads[3.0] < loads[0.0] - 0.1 and loads[3.0] < 1.3


@pytest.mark.parametrize(("targets", "hyper", "said"), [
    (None, dict(top_k=1), "teaches R nothing"),
    (None, dict(experts=2, top_k=3), "top_k=3 of experts=2"),
    ("input_layernorm", dict(), "linear layers inside"),
])  # fmt: skip
def test_what_is_no_mixture_is_refused(targets, hyper, said):
    model = build("llama")
    with pytest.raises(ValueError, match=said):
        pl.attach(model, pl.MixLoRA, targets, **hyper)
    assert not pl.hosts(model)


# ---------------------------------------------------------------------------------------------------------- LoRA soups


def test_a_soup_is_the_loras_side_by_side_and_becomes_one_of_their_ranks_sum():
    model = pl.attach(with_experts("llama"), pl.LoRASoup, TARGETS["llama"], name="soup", of=("x", "y", "z"))
    for seed, adapter in enumerate(pl.adapters(model)["soup"].values()):
        assert adapter.expected() == 3 and torch.equal(adapter.alpha.detach(), torch.full((3,), 1 / 3))
        shake(adapter, 0.5, seed=seed)
    want = logits(model)
    first = next(iter(pl.adapters(model)["soup"]))
    parts = {name: pl.adapters(model)[name][first] for name in ("x", "y", "z")}
    change = sum(a * p.scaling * p.lora_B @ p.lora_A for a, p in zip(
        pl.adapters(model)["soup"][first].alpha, parts.values(), strict=True))  # fmt: skip
    torch.testing.assert_close(pl.adapters(model)["soup"][first].delta(torch.eye(WIDTH)).T, change, **CLOSE)
    table = pl.to_lora(model, "soup", r=12, into="one")
    assert table.error < 1e-6
    torch.testing.assert_close(logits(model), want, **CLOSE)


def test_a_soup_with_dropout_in_its_parts_learns_and_finds_the_part_that_is_asked_for():
    """Rows that y would write: its weights grow, and the others' shrink."""
    model = with_experts("llama", ("x", "y"), dropout=0.05)
    ids = inputs("llama", rows=4)["input_ids"]
    with pl.using(model, "y"):
        said = logits(model, input_ids=ids).argmax(-1)
    labels = torch.cat([ids[:, :1], said[:, :-1]], 1)
    rows = [{"input_ids": i, "labels": t} for i, t in zip(ids.tolist(), labels.tolist(), strict=True)]
    pl.attach(model, pl.LoRASoup, TARGETS["llama"], name="soup", of=("x", "y"))
    log = pl.train(model, rows, steps=30, batch_size=4, lr=0.05, progress=False)
    alpha = torch.stack([a.alpha.detach() for a in pl.adapters(model)["soup"].values()]).mean(0)
    assert log.losses[-1] < log.losses[0] - 0.5 and alpha[1] > 0.7 and alpha[0] < 0.3


def test_what_does_not_go_into_a_soup_is_refused():
    model = pl.attach(with_experts("llama", ("x", "y")), pl.LoHa, TARGETS["llama"], name="other", r=2)
    with pytest.raises(ValueError, match="LoHa, no product"):
        pl.attach(model, pl.LoRASoup, TARGETS["llama"], name="a", of=("x", "other"))
    with pytest.raises(ValueError, match="two or more"):
        pl.attach(model, pl.LoRASoup, TARGETS["llama"], name="a", of=("x",))


# ---------------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(("method", "hyper", "per_layer", "layers"), [
    ("CPT", dict(tokens=[1, 2, 3]), 3 * 4096, 1),
    ("Poly", dict(targets="q_proj", r=4, tasks=3, skills=2, splits=2), 2 * 4 * 8192 + 3 * 2 * 2, 32),
    ("Lily", dict(targets="q_proj", r=4, stride=32), 4 * 4096 / 32 + 2 * 4 * 4096 / 32 + 4 * 2, 32),
    ("Cartridge", dict(k=8, frozen=1), 2 * 7 * 4096, 32),
    ("MixLoRA", dict(r=4, experts=8), 8 * (3 * 4 * (4096 + 11008) + 4096), 32),
])  # fmt: skip
def test_counted_on_a_model_without_weights(method, hyper, per_layer, layers):
    assert pl.count("llama-2-7b", method, **hyper).trainable == per_layer * layers
