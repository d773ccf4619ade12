"""The exercises: a check takes the reference, says `not tried yet` to the stub, and knows the typical mistakes."""

import numpy as np
import pytest
import torch
from torch import nn

from peftlab.course import exercises
from peftlab.course.exercises import EXERCISES, check
from peftlab.course.ledger import ledger

FUNCTIONS = [name for name, one in EXERCISES.items() if one.is_function]
ANSWERS = [name for name, one in EXERCISES.items() if not one.is_function]


@pytest.mark.parametrize("name", EXERCISES)
def test_the_reference_is_right(name, capsys):
    assert check(name, EXERCISES[name].reference)
    assert capsys.readouterr().out.startswith(f"✔ {name}: right")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_untouched_stub_is_not_tried_yet(name, capsys):
    space = {}
    exec(exercises.stub(name), space)  # the very text that a notebook holds
    result = check(name, space[name])
    assert not result and result.status == "not tried yet"
    assert capsys.readouterr().out == f"… {name}: not tried yet\n"
    for blank in (None, ..., lambda *arguments: None, lambda *arguments: NotImplemented):
        assert EXERCISES[name].check(blank).status == "not tried yet"

    def raising(*arguments):
        raise NotImplementedError

    assert EXERCISES[name].check(raising).status == "not tried yet"


@pytest.mark.parametrize("name", ANSWERS)
def test_the_untouched_answer_is_not_tried_yet(name):
    space = {}
    exec(exercises.stub(name), space)
    assert EXERCISES[name].check(space[name]).status == "not tried yet"


@pytest.mark.parametrize("name", EXERCISES)
def test_every_mistake_is_refused_with_its_own_hint(name):
    one = EXERCISES[name]
    assert len(one.mistakes) >= 3
    assert len({known.hint for known in one.mistakes}) == len(one.mistakes)
    for known in one.mistakes:
        result = one.check(known.answer)
        assert not result
        assert result.message == known.hint


@pytest.mark.parametrize("name", EXERCISES)
def test_the_solution_is_shown_and_is_right(name):
    source = exercises.solution(name)
    space = {"torch": torch}
    exec(source.code, space)
    assert EXERCISES[name].check(space[name])
    assert "@" not in source.code.split("\n")[0]


def test_every_lesson_has_exercises():
    assert exercises.names("00_start_here") == ["trainable_fraction", "adapter_bytes"]
    assert exercises.names("01_why_peft") == ["training_bytes", "storage_saved"]
    assert {"lora_forward", "lora_count", "lora_merge", "best_low_rank", "both_zero"} <= set(exercises.names("02_lora"))
    assert sum(len(exercises.names(one.lesson)) > 0 for one in EXERCISES.values()) == len(EXERCISES)


# Other ways to be right or wrong than those written beside the reference.


@pytest.mark.parametrize(
    ("name", "attempt"),
    [
        ("lora_forward", lambda x, W, A, B, alpha: x @ (W + alpha / len(A) * B @ A).T),
        (
            "lora_forward",
            lambda x, W, A, B, alpha: (
                nn.functional.linear(x, W) + alpha / len(A) * torch.einsum("oi,...i->...o", B @ A, x)
            ),
        ),
        ("lora_merge", lambda W, A, B, alpha: torch.addmm(W, B, A, alpha=alpha / B.shape[1])),
        ("lora_count", lambda n_in, n_out, r: torch.empty(r, n_in).numel() + torch.empty(n_out, r).numel()),
        ("lora_count", lambda n_in, n_out, r: np.float32(r * (n_in + n_out))),
        ("best_low_rank", lambda D, r: (lambda u, s, v: u @ torch.diag(s) @ v.T)(*_topr(D, r))),
        ("trainable_fraction", lambda m: torch.tensor(_counts(m)[0] / _counts(m)[1], dtype=torch.double)),
        ("storage_saved", lambda base, adapter, n: (n * base - base - n * adapter) / (n * base)),
        (
            "training_bytes",
            lambda n, t, w, g, o: vars(ledger(n, t, weight_bytes=w, grad_bytes=g, optimizer_bytes=o)),
        ),
        ("both_zero", " Neither "),
        (
            "bottleneck_forward",
            lambda h, down, c, up, d: h + nn.functional.linear(nn.functional.linear(h, down, c).clamp(min=0), up, d),
        ),
        ("adapter_count", lambda D, b, blocks, each: sum((D + 1) * b + (b + 1) * D for _ in range(blocks * each))),
        ("kronecker_weight", lambda A, s, t: torch.einsum("ipq,iar,irc->paqc", A, s, t).flatten(0, 1).flatten(1)),
        (
            "fuse",
            lambda h, z, Q, K, V: (
                h + torch.einsum("an,and->nd", torch.einsum("nd,and->an", h @ Q.T @ K, z).softmax(0), z) @ V.T
            ),
        ),
        ("folds", "lora"),
        (
            "quantize_blocks",
            lambda w, level, block: torch.cat(
                [
                    level[torch.bucketize(part / part.abs().max(), (level[1:] + level[:-1]) / 2)] * part.abs().max()
                    for part in w.split(block)
                ]
            ),
        ),
        ("pack_codes", lambda codes: (codes[::2] << 4) | codes[1::2]),
        ("unpack_codes", lambda packed: torch.stack([packed // 16, packed % 16], -1).flatten()),
        ("bits_per_weight", lambda bits, block, double: bits + (8 + 32 / 256 if double else 32) / block),
    ],
)
def test_other_right_answers(name, attempt):
    assert EXERCISES[name].check(attempt), EXERCISES[name].check(attempt)


def _topr(D, r):
    u, s, vh = torch.linalg.svd(D.double())
    return u[:, :r].float(), s[:r].float(), vh[:r].T.float()


def _counts(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad), sum(p.numel() for p in model.parameters())


def test_gradients_by_autograd_are_right():
    """The reference is held against autograd, which knows nothing of the formula."""

    def by_autograd(x, G, A, B, alpha):
        A, B = A.requires_grad_(), B.requires_grad_()
        h = alpha / len(A) * (x @ A.T @ B.T)
        return torch.autograd.grad((h * G).sum(), (A, B))

    one = EXERCISES["lora_gradients"]
    for case in one.cases():
        for mine, theirs in zip(one.reference(*case), by_autograd(*case), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "attempt", "words"),
    [
        ("lora_forward", lambda x, W, A, B, alpha: nn.functional.linear(x, W + B @ A), "scaling is missing"),
        ("lora_forward", lambda x, W, A, B, alpha: x @ (W + alpha * B @ A).T, "alpha / r"),
        ("lora_forward", lambda x, W, A, B, alpha: nn.functional.linear(x, alpha / len(A) * B @ A), "W is not used"),
        ("lora_forward", lambda x, W, A, B, alpha: x @ W.T + alpha / len(A) * x @ (A @ B).T, "swapped"),
        ("lora_forward", lambda x, W, A, B, alpha: 1 / 0, "it raised ZeroDivisionError: division by zero. Hint: h ="),
        ("lora_forward", lambda x, W, A, B, alpha: [1.0], "a list where a tensor is expected"),
        ("lora_forward", lambda x, W, A, B, alpha: x.sum(), r"the shape () instead of (2, 5, 12)"),
        ("lora_forward", lambda x, W, A, B, alpha: x @ W.T + 1, "right shape, but values that differ by up to"),
        ("lora_forward", lambda x, W: x, "it must take 5 arguments, (x, W, A, B, alpha)"),
        ("lora_forward", torch.ones(3), "takes a function, got a Tensor"),
        ("lora_merge", lambda W, A, B, alpha: W.add_(B @ A, alpha=alpha / len(A)), "changed in place"),
        ("lora_merge", lambda W, A, B, alpha: W.zero_(), "changed its argument W in place"),
        ("best_low_rank", lambda D, r: torch.linalg.svd(D)[0][:, :r] @ torch.linalg.svd(D)[2][:r], "singular values"),
        ("lora_gradients", lambda x, G, A, B, alpha: A, "a Tensor where a tuple is expected"),
        ("lora_gradients", lambda x, G, A, B, alpha: (A,), "1 values instead of 2"),
        ("lora_gradients", lambda x, G, A, B, alpha: (A, B), "as value 1 the right shape, but values"),
        ("training_bytes", lambda n, t, w, g, o: {"weights": n * w}, "1 values instead of 3"),
        ("training_bytes", lambda n, t, w, g, o: dict.fromkeys("abc", 1), "the keys a, b, c instead of weights"),
        ("training_bytes", lambda *a: {"weights": 1, "gradients": 2, "optimizer": 3}, "for 'weights' 1 instead of"),
        ("lora_count", lambda a, b, r: 7, "it returned 7 instead of 65536"),
        ("lora_count", lambda a, b, r: True, "it returned True instead of 65536"),
        ("lora_count", lambda a, b, r: np.ones(3), "instead of 65536"),
        ("lora_count", lambda a, b, r: exit(), "it raised SystemExit"),
        ("trainable_fraction", lambda m: m.requires_grad_(False) and 0.5, "changed its argument model in place"),
        ("quantize_blocks", lambda w, level, block: w, "right shape, but values that differ by up to"),
        ("quantize_blocks", lambda w, level, block: w / w.abs().max(), "then the nearest level of each quotient"),
        ("pack_codes", lambda codes: codes, "the shape (8,) instead of (4,)"),
        ("pack_codes", lambda codes: codes[1::2] * 16 + codes[::2], "swapped"),
        ("unpack_codes", lambda packed: packed & 15, "the shape (4,) instead of (8,)"),
        ("bits_per_weight", lambda bits, block, double: 4, "in test 1 of 7 it returned 4 instead of 4.5"),
        ("after_outlier", "as before", "absmax has changed"),
        ("first_gradient", "A", "through B"),
        ("first_gradient", "W", "'W' is not one of the answers. The answers are 'A', 'B', 'both', 'neither'."),
        ("first_gradient", 3, "3 is not one of the answers"),
    ],
)
def test_wrong_answers_get_a_fitting_hint(name, attempt, words):
    result = EXERCISES[name].check(attempt)
    assert not result and result.status == "not right yet"
    assert words in result.message


def test_a_hostile_answer_does_not_raise(capsys):
    class Hostile:
        def __eq__(self, other):
            raise RuntimeError("no")

        def __repr__(self):
            raise RuntimeError("no")

        __hash__ = None

    for name in EXERCISES:
        assert not check(name, (lambda *arguments: Hostile()) if name in FUNCTIONS else Hostile())
    assert not check("lora_forward", lambda x, W, A, B, alpha: x.to("meta") @ W.to("meta").T)


def test_checking_leaves_no_trace_in_what_is_shown():
    result = EXERCISES["lora_count"].check(lambda *a: 1)
    assert result._ipython_display_() is None  # printed already, and nothing more
    assert repr(result) == repr(EXERCISES["lora_count"].check(lambda *a: 1))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lora_foward", "no exercise 'lora_foward'; did you mean 'lora_forward'"),
        ("zzz", "there are trainable_fraction"),
    ],
)
def test_unknown_names_are_refused_with_a_cure(name, message):
    for ask in (check, exercises.solution, exercises.stub, exercises.question):
        with pytest.raises(KeyError) as raised:
            ask(name)
        assert message in str(raised.value)
