"""What a test says that it compares with HF PEFT is what it runs: the mark `reference` and its proof.

    @pytest.mark.reference("DoRA", "writes", "reads", "gradients")     # HF PEFT reads what we write, we read its file
    @pytest.mark.reference("LoRA, rslora", "writes")                       # a method with something switched on
    @pytest.mark.reference("lora_fa", "peft.optimizers.create_lorafa_optimizer")        # beside the function named

docs/methods.md is made of these marks, read without running a test. So a test that has passed fails all the same if it
never made the method that it names, or an adapter of that type of the reference; if it wrote or read no file, took no
gradients, compared no numbers; or if ours, or one of the functions named, was not called.
"""

from __future__ import annotations

import functools
import inspect
import pkgutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import FunctionType, ModuleType

WORDS = {
    "outputs": ("torch.testing.assert_close",),
    "writes": ("peftlab.save_adapter", "peft.PeftModel.from_pretrained", "torch.testing.assert_close"),
    "reads": ("peft.PeftModel.save_pretrained", "peftlab.load_adapter", "torch.testing.assert_close"),
    "gradients": ("torch.Tensor.backward", "torch.testing.assert_close"),
}


@dataclass
class Seen:
    made: set[type] = field(default_factory=set)  # our adapters
    configs: list = field(default_factory=list)  # of the reference's models
    steps: set[str] = field(default_factory=set)  # of those that WORDS ask for
    called: set[int] = field(default_factory=set)  # ids of the code objects of all functions, if they are traced

    def confirm(self, name: str, *what: str) -> None:
        """AssertionError, and what is missing, unless all of it was seen."""
        from peftlab.catalogue import classes

        name, _, switched = name.partition(", ")
        if name in classes():
            method = classes()[name]
            assert method in self.made, f"no {name} was made"
            there = [c for c in self.configs if c.peft_type == method.hf_type
                     and all(flag == getattr(c, key, None) for key, flag in method.hf_flags.items())
                     and (not switched or getattr(c, method.hf_hyper.get(switched, switched)))]  # fmt: skip
            alone = any(word.startswith("peft.") for word in what)  # its function, called by itself
            assert there or alone or not method.hf_type, f"the reference made no {name} {switched}"
        elif not any(word.startswith("peftlab.") for word in what):  # a part of it
            assert self._called(functions()[name]), f"{name} was not called"
        for word in what:
            for step in WORDS.get(word, ()):
                assert step in self.steps, f"{name}: {step} was not called"
            assert word in WORDS or self._called(pkgutil.resolve_name(word)), f"{name}: {word} was not called"

    def _called(self, function) -> bool:
        return id(inspect.unwrap(getattr(function, "__func__", function)).__code__) in self.called


def functions() -> dict[str, FunctionType]:
    """What is no method, by its name in the catalogue."""
    from peftlab.catalogue import procedures
    from peftlab.inits import INITS
    from peftlab.optim import OPTIMIZERS

    return {**INITS, **OPTIMIZERS, **procedures()}


def needs_trace(name: str, *what: str) -> bool:
    """Whether a mark names functions; one of a method says what was done with it, and tracing takes time."""
    from peftlab.catalogue import classes

    return name.partition(", ")[0] not in classes() or not WORDS.keys() >= set(what)


@contextmanager
def watching(trace: bool = True) -> Iterator[Seen]:
    """Which adapters of ours are made, the reference's configs, the steps of WORDS, and all functions if traced."""
    import peft

    from peftlab.core import Adapter

    seen, before = Seen(), sys.gettrace()  # a debugger's, or of who measures coverage

    def adapter(self, *args, **more):
        seen.made.add(type(self))

    def model(self, *args, **more):
        seen.configs += [a for a in (*args, *more.values()) if isinstance(a, peft.PeftConfig)]

    def call(frame, event, arg):
        seen.called.add(id(frame.f_code))
        return before and before(frame, event, arg)

    with ExitStack() as patches:
        patches.enter_context(preceded(Adapter, "__init__", adapter))
        patches.enter_context(preceded(peft.PeftModel, "__init__", model))
        for step in {step for steps in WORDS.values() for step in steps}:
            owner, _, name = step.rpartition(".")
            note = functools.partial(lambda step, *_, **more: seen.steps.add(step), step)
            patches.enter_context(preceded(pkgutil.resolve_name(owner), name, note))
        if trace:
            sys.settrace(call)
        try:
            yield seen
        finally:
            sys.settrace(before)


@contextmanager
def preceded(owner, name: str, note) -> Iterator[None]:
    """`note` is called with the arguments before each call of owner.name."""
    there = vars(owner).get(name) or getattr(owner, name)  # the second for what peftlab loads when it is asked for
    function = getattr(there, "__func__", there)

    @functools.wraps(function)
    def noted(*args, **more):
        note(*args, **more)
        return function(*args, **more)

    setattr(owner, name, classmethod(noted) if isinstance(there, classmethod) else noted)
    try:
        yield
    finally:
        setattr(owner, name, there)


def claims(module: ModuleType) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(name, what) of each mark in a module of tests, those of single cases of a parametrised test too."""
    for test in vars(module).values():
        for mark in getattr(test, "pytestmark", ()):
            cases = mark.args[1] if mark.name == "parametrize" else ()
            for one in (mark, *(m for case in cases for m in getattr(case, "marks", ()))):
                if one.name == "reference":
                    known = [w for w in one.args[1:] if w in WORDS or w.startswith(("peft.", "peftlab."))]
                    if not known or known != list(one.args[1:]):
                        raise ValueError(f"{test.__name__}: reference{one.args} says {', '.join(WORDS)} or functions")
                    yield one.args[0], one.args[1:]
