"""Hyper-parameters, checked before anything is built: their types are the annotations of a method's `__init__`.

One place for what is wrong whatever the method: r=2.5, r=True, alpha=nan, a word for a number. What depends on the
layer (a rank above its width, a block size that does not divide it) a method checks itself.
"""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from functools import cache, wraps
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

Function = TypeVar("Function", bound=Callable)
MOST = 2**31 - 1  # of anything; above it, a size is a slip that would eat all memory before it is noticed
SEEDS = 2**32 - 1  # methods multiply them, and torch.Generator takes 63 bits
# weights of a loss, radii, sizes of noise: below zero they would do the opposite of what they are for
NOT_NEGATIVE = {"balance", "beta", "cayley_neumann_eps", "decay", "eps", "epsilon", "format_epsilon", "gamma", "kl",
                "lr", "noise", "orth", "penalty_weight", "regularization_alpha", "weight_decay"}  # fmt: skip
ZERO_TOO = {"boft_block_size", "oft_block_size", "niter"}  # not given, in HF PEFT's files; no turns at all
KINDS = {int: "a whole number", float: "a finite number", bool: "True or False", str: "a word", NoneType: "None"}


@cache
def hints(method: Callable) -> dict[str, tuple[Any, Any]]:
    """hyper-parameter of a method, or argument of a function -> (its annotation, its default)."""
    called: Callable = method.__init__ if isinstance(method, type) else method  # type: ignore[misc]
    parameters = inspect.signature(called).parameters
    try:
        found = get_type_hints(called)
    except NameError:  # a name that is there for the type checker alone, or local to a function: nothing to check by
        found = {}
    return {n: (found.get(n, Any), p.default) for n, p in parameters.items() if n not in ("self", "layer")}


def checked(method: Callable, hyper: Mapping[str, Any]) -> dict[str, Any]:
    """The hyper-parameters as plain Python values; ValueError for one that cannot be meant, whatever the layer."""
    known = hints(method)
    return {name: _checked(name, value, *known[name]) if name in known else value for name, value in hyper.items()}


def checks(function: Function) -> Function:
    """The same function, whose arguments are what their annotations say: a ValueError names the first that is not."""

    @wraps(function)
    def call(*args, **kwargs):
        given = inspect.signature(function).bind(*args, **kwargs).arguments
        try:
            checked(function, given)
        except ValueError as error:
            raise ValueError(f"{function.__name__}: {error}") from None
        return function(*args, **kwargs)

    return cast(Function, call)


def _checked(name: str, value: Any, hint: Any, default: Any) -> Any:
    found = _plain(value, hint)
    if found is _NO:
        one = f"; for one, write {name}=({value!r},)" if isinstance(value, str) and "list" in said(hint) else ""
        raise ValueError(f"{name}={value!r} must be {said(hint)}{one}")
    if isinstance(found, (int, float)) and not isinstance(found, bool):
        least, most = _range(name, hint, default)
        if "dropout" in name and not 0 <= found < 1:
            raise ValueError(f"{name}={value!r} is the probability to leave a number out: 0 ≤ {name} < 1")
        if name == "reduction" and found <= 0:
            raise ValueError(f"{name}={value!r} is the width divided by the bottleneck's; it must be above 0")
        if not least <= found <= most:
            raise ValueError(f"{name}={value!r} must be {f'at least {least}' if found < least else f'at most {most}'}")
    return found


def _range(name: str, hint: Any, default: Any) -> tuple[float, float]:
    if int not in (hint, *get_args(hint)):
        return (0 if name in NOT_NEGATIVE else -math.inf), math.inf
    seed = name.endswith("seed")
    if default is None and not seed:
        return 0 if name in ZERO_TOO or float in get_args(hint) else 1, MOST
    return min(0, default if type(default) is int else 0), SEEDS if seed else MOST  # LoKr's factor=-1: its own choice


_NO = object()


def _plain(value: Any, hint: Any) -> Any:
    """The value as a plain Python one if it fits the annotation, else _NO. NumPy's numbers are numbers."""
    if hint is Any:
        return value
    if hint is int:
        return int(value) if isinstance(value, numbers.Integral) and not isinstance(value, bool) else _NO
    if hint is float:
        number: Any = value  # NumPy's too; compared, since isfinite(10**400) is an OverflowError
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not -1e308 <= number <= 1e308:
            return _NO
        return value if type(value) in (int, float) else float(value)
    if isinstance(hint, type) and get_origin(hint) is None:
        return value if isinstance(value, hint) else _NO
    inner = get_args(hint)
    if get_origin(hint) in (tuple, list, Sequence):
        if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
            return _NO
        each = inner if get_origin(hint) is tuple and inner[-1] is not Ellipsis else inner[:1] * len(value)
        items = [_plain(v, h) for v, h in zip(value, each, strict=False)] if len(each) == len(value) else [_NO]
        return _NO if any(v is _NO for v in items) else tuple(items) if isinstance(value, tuple) else items
    if get_origin(hint) not in (Union, UnionType):
        return value  # a method's parts may be given other things, by its `plan`
    return next((found for found in (_plain(value, h) for h in inner) if found is not _NO), _NO)


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is what an annotation says; numbers must be finite, and True is no number."""
    return _plain(value, hint) is not _NO


def said(hint: Any) -> str:
    """An annotation in words."""
    if hint in KINDS:
        return KINDS[hint]
    inner = get_args(hint)
    if get_origin(hint) in (tuple, list, Sequence):
        if get_origin(hint) is tuple and inner[-1] is not Ellipsis:
            return f"({', '.join(map(said, inner))})"
        return "a list of " + said(inner[0]).removeprefix("a ") + ("s" if inner[0] in KINDS else "")
    if get_origin(hint) not in (Union, UnionType):
        return getattr(hint, "__name__", str(hint))
    *words, last = map(said, inner)
    return f"{', '.join(words)} or {last}"
