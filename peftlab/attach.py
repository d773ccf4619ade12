"""Attach adapters to any model, choose which run, and remove them. The model is changed in place."""

from __future__ import annotations

import difflib
import inspect
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .core import METHODS, Adapted, Adapter, Switch
from .hyper import checked
from .layers import device_of, is_linear, shape_of
from .mixed import Rows
from .sites import GROUPS, at, bare, group, loose, parameters, put, sites

Targets = str | Sequence[str]


def hosts(model: nn.Module) -> dict[str, Adapted]:
    """bare path -> host, of every adapted module, outermost first."""
    return {path: module for path, module in sites(model).items() if isinstance(module, Adapted)}


def adapters(model: nn.Module) -> dict[str, dict[str, Adapter]]:
    """adapter name -> {path of its layer: adapter}, in the order of attachment."""
    found: dict[str, dict[str, Adapter]] = {}
    for path, host in hosts(model).items():
        for name, adapter in host.adapters.items():
            found.setdefault(name, {})[path] = adapter
    return found


def did_you_mean(word: str, known) -> str:
    """For an error: "; did you mean 'q_proj'?", or just the end of the sentence if nothing known is close."""
    spelled = {k.lower(): k for k in sorted(set(known))}
    close = difflib.get_close_matches(word.lower(), spelled, n=1, cutoff=0.5)
    return f"; did you mean {spelled[close[0]]!r}?" if close else "."


def find_targets(model: nn.Module, targets: Targets, with_parameters: bool = False) -> list[str]:
    """The paths of the modules that `targets` names, in model order.

    targets: a regular expression that matches the end of a path after a dot ("q_proj|v_proj", r"layers\\.0\\..*_proj"),
    a list of path endings, or a group of `sites.GROUPS`, such as "all-linear": every linear layer but the output head.
    Groups can be in lists ("all-linear|all-experts"). with_parameters: those of `sites.loose` too, after modules.
    Raises ValueError for a pattern without a match, or if only a part of a list (or of "a|b") matches.
    """
    listed = isinstance(targets, Iterable) and all(isinstance(t, str) for t in targets)
    if not listed:  # a str is one too
        raise TypeError(f"targets={targets!r} must be a group, such as 'all-linear', a regular expression, or a list "
                        "of ends of paths")  # fmt: skip
    there: dict[str, Any] = sites(model) | (loose(model) if with_parameters else {})
    if not isinstance(targets, str):
        patterns = [t if t in GROUPS else re.escape(t) for t in targets]
    else:  # "a|b" is a list too, so each part must match; with brackets it is one expression
        patterns = [targets] if re.search(r"[()\[]", targets) else targets.split("|")
    if not patterns:
        raise ValueError("targets is an empty list: name at least one module, or 'all-linear'")
    hit: set[str] = set()
    missed = []
    for pattern in patterns:
        try:
            hits = set(group(model, pattern) if pattern in GROUPS else _ending(there, pattern))
        except re.error as error:
            raise ValueError(f"targets {pattern!r} is not a regular expression: {error}") from None
        hit |= hits
        missed += [] if hits else [pattern]
    if missed or not hit <= set(there):
        _check_no_parameter(model, missed[0] if missed else next(p for p in hit if p not in there))
        wrong = missed[0].replace("\\", "")
        endings = {p.rsplit(".", 1)[-1] for p in there} | set(GROUPS)
        linear = sorted({p.rsplit(".", 1)[-1] for p, m in there.items() if is_linear(bare(m))})
        part = f"The other names match {len(hit)} modules; nothing was attached. " if hit else ""
        raise ValueError(
            f"no module path matches {wrong!r}{did_you_mean(wrong.split('.')[-1], endings)} {part}"
            f"Linear layers of {type(model).__name__}: {', '.join(linear)}"
        )
    return [p for p in there if p in hit]


def _ending(paths: Iterable[str], pattern: str) -> list[str]:
    return [p for p in paths if re.fullmatch(rf"(.*\.)?({pattern})", p)]


def _check_no_parameter(model: nn.Module, pattern: str) -> None:
    """ValueError, with what to do, if a pattern that matches no module that can be a target matches a parameter."""
    own = parameters(model)
    for path in _ending(own, pattern)[:1]:
        owner, parameter = own[path]
        kind, shape = type(owner).__name__, "×".join(map(str, parameter.shape))
        if path in loose(model):
            cure = "LoRA can be put on it, other methods cannot: give them modules"
        elif is_linear(owner):
            cure = f"adapt its layer, targets={'.'.join(path.split('.')[-3:-1])!r}"
        elif parameter.dim() == 1:
            cure = "a change of low rank needs a matrix, or several in one tensor; LNTuning trains norms, BitFit biases"
        else:
            cure = "no method can adapt it there; choose others"
        raise ValueError(f"{path!r} is no module but a parameter ({shape}) of {kind}; {cure}")


@contextmanager
def _naming(whose: str) -> Iterator[None]:
    """An error of a method's own says whose it is; a layer that lacks what the method reads there is one too."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{whose}: {error}") from None
    except AttributeError as error:
        if error.obj is None or isinstance(error.obj, Adapter):  # a fault of the method, not of the model
            raise
        raise ValueError(f"{whose}: {type(error.obj).__name__} has no {error.name!r}, which the method needs; choose "
                         "other targets, or another method for this model") from error  # fmt: skip


def _check_site(model: nn.Module, path: str) -> None:
    """Refuse layers whose owner would bypass a host without a word."""
    if isinstance(bare(at(model, path)), (nn.ModuleList, nn.ModuleDict)):
        raise ValueError(f"{path!r} is a {type(bare(at(model, path))).__name__}, which no model calls, so an adapter "
                         "there would do nothing; name the modules in it")  # fmt: skip
    if isinstance(bare(at(model, path.rpartition(".")[0])), nn.MultiheadAttention):
        raise ValueError(f"{path!r} belongs to nn.MultiheadAttention, which reads its weight and never calls it: "
                         "an adapter there would do nothing. Adapt layers outside of it")  # fmt: skip


def _check_kinds(method: Any, patterns: Mapping[str, Any]) -> None:
    """TypeError or ValueError for arguments of `attach` that are other things than it takes."""
    if not (isinstance(method, type) and issubclass(method, Adapter) and method is not Adapter):
        raise TypeError(f"attach needs a method, such as pl.LoRA or 'LoRA', not {method!r}")
    for key, pattern in patterns.items():
        if pattern is not None and not isinstance(pattern, Mapping):
            raise TypeError(f"{key} pattern {pattern!r} must be {{end of a path: {key} there}}")
        for expression in pattern or {}:
            try:
                re.compile(expression)
            except (re.error, TypeError) as error:
                raise ValueError(f"{key} pattern {expression!r} is not a regular expression: {error}") from None


def check_name(model: nn.Module, name: str) -> None:
    """ValueError for a name under which no adapter can be attached, or under which one is."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_][\w-]*", name) or hasattr(nn.ModuleDict(), name):
        raise ValueError(f"adapter name {name!r} cannot be used; take letters, digits, '_' and '-', such as 'sql_v2'")
    if name in adapters(model):
        raise ValueError(f"an adapter named {name!r} is attached already; choose another name or detach it first")


def _check_hyper(method: type[Adapter], hyper: Mapping) -> None:
    known = [n for n in inspect.signature(method.__init__).parameters if n not in ("self", "layer")]
    for name in hyper:
        if name not in known:
            raise TypeError(f"{method.__name__} has no hyper-parameter {name!r}{did_you_mean(name, known)} "
                            f"It takes: {', '.join(known) or 'none'}")  # fmt: skip


def defaults_of(method: type[Adapter]) -> dict:
    parameters = inspect.signature(method.__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


def patterned(path: str, hyper: dict, patterns: Mapping[str, Mapping | None]) -> dict:
    """The hyper-parameters of one layer: the first pattern that matches the end of its path overrides the default.
    Of several parameters of one module, each has its own path and its own ones."""
    if "each" in hyper:
        return {"each": {n: patterned(f"{path}.{n}", own, patterns) for n, own in hyper["each"].items()}}
    for key, pattern in patterns.items():
        for expression, value in (pattern or {}).items():
            if re.fullmatch(rf"(.*\.)?({expression})", path):
                hyper = {**hyper, key: value}
                break
    return hyper


def fitted(plan: Mapping, method: type[Adapter], patterns: Mapping[str, Mapping | None]) -> dict:
    """A method's plan with the hyper-parameters of each layer; its other parts have their own."""
    return {path: (kind, patterned(path, own, patterns) if kind is method or "each" in own else own)
            for path, (kind, own) in plan.items()}  # fmt: skip


def switch_of(model: nn.Module) -> Switch:
    """The switch that all hosts of the model share. Raises ValueError if nothing is attached."""
    host = next(iter(hosts(model).values()), None)
    if host is None:
        raise ValueError(f"no adapter is attached to this {type(model).__name__}; call attach(model, LoRA, …) first")
    return host.switch


def wrap(model: nn.Module, path: str, switch: Switch) -> Adapted:
    """The host at `path`, put there if there is none."""
    site = at(model, path)
    if isinstance(site, Adapted):
        return site
    host = Adapted(site, switch)
    host.train(site.training)
    put(model, path, host)
    return host


def attach(
    model: nn.Module,
    method: type[Adapter] | str,
    targets: Targets | None = None,
    name: str = "default",
    *,
    modules_to_save: Targets = (),
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    **hyper,
) -> nn.Module:
    """Freeze the base and put an adapter around every target layer; the new adapter becomes the active one.

    method: a class of `METHODS` or its name; `hyper` are its hyper-parameters. targets: see `find_targets`; by
    default the method's own (`LoRA.targets`: all linear layers). LoRA's may also name parameters that no layer owns, as
    experts in one tensor: "q_proj|gate_up_proj", "all-linear|all-experts"; there are as many A and B as experts.
    modules_to_save: further modules (heads) of which a full copy is trained, switched and saved with the adapter.
    rank_pattern, alpha_pattern: {end of a path, as a regular expression: r or alpha on those layers}.
    Adapters attached earlier stay attached and trainable, but no longer active: see `using` and `activate`.
    Raises ValueError or TypeError with the model as it was before. Returns the model.
    """
    from .methods.module_copy import ModuleCopy

    method = method_named(method) if isinstance(method, str) else method
    patterns = {"r": rank_pattern, "alpha": alpha_pattern}
    _check_kinds(method, patterns)
    check_name(model, name)
    _check_hyper(method, {**hyper, **{k: 0 for k, p in patterns.items() if p}})
    paths = _own_targets(model, method) if targets is None else []
    if targets:
        paths = find_targets(model, targets, method.loose)
    if (method.targets if targets is None else targets) == "all-linear" and method.loose:
        _say_what_is_left(model)
    copies = find_targets(model, modules_to_save) if modules_to_save else []
    with _naming(method.__name__):
        hyper = checked(method, hyper)
        plan = method.plan(model, paths, hyper) if paths else {}
    plan = fitted(plan, method, patterns) | {p: (ModuleCopy, {}) for p in copies}
    for key, pattern in patterns.items():
        if pattern and method.hf_type and key not in method.hf_patterns:
            warnings.warn(f"the file of {method.__name__} has no place for a {key}_pattern, so save_adapter will "
                          "refuse it; attach those layers under a name of their own", stacklevel=2)  # fmt: skip
        for expression in pattern or {}:
            if not any(re.fullmatch(rf"(.*\.)?({expression})", p) for p in paths):
                raise ValueError(f"{key} pattern {expression!r} matches none of the {len(paths)} target layers")
    return attach_plan(model, name, plan)


def _say_what_is_left(model: nn.Module) -> None:
    """A warning if the experts, most of a mixture's weights, are no linear layers and so are not adapted."""
    there = loose(model)
    if experts := [p for p in there if GROUPS["all-experts"][0](p, there[p], model)]:
        share = sum(there[p].numel() for p in experts) / sum(p.numel() for p in model.parameters())
        warnings.warn(f"'all-linear' leaves out the experts of {type(model).__name__}, {100 * share:.0f} % of its "
                      f"weights: they are no linear layers but parameters, such as {experts[0]!r}. "
                      "targets='all-linear|all-experts' adapts them too", stacklevel=3)  # fmt: skip


def _own_targets(model: nn.Module, method: type[Adapter]) -> list[str]:
    """Where a method sits if the user names no targets; ValueError, in few words, if it cannot tell."""
    if method.targets in GROUPS:
        return group(model, method.targets)
    try:
        return find_targets(model, method.targets)
    except ValueError as error:
        kinds = str(error).rpartition("Linear layers of")
        raise ValueError(f"{method.__name__} knows none of the layers of {type(model).__name__} by name; "
                         f"name them with targets=… {''.join(kinds[1:])}") from None  # fmt: skip


def attach_plan(model: nn.Module, name: str, plan: Mapping[str, tuple[type[Adapter], dict]]) -> nn.Module:
    """`attach` with the method and hyper-parameters of every path given one by one: {path: (method, hyper)}."""
    check_name(model, name)
    if not plan:
        raise ValueError("nothing to attach: neither targets nor modules_to_save name a module")
    made: dict[str, Adapter] = {}
    for path, (method, hyper) in plan.items():  # build all before the model is touched: an error changes nothing
        _check_site(model, path)
        site = at(model, path)
        layer = site.original if isinstance(site, Adapted) and site.original is not None else bare(site)
        if _owns(method) and Sharing(model).tied(layer):
            raise ValueError(f"{path!r} shares its weight with another module; a trained copy would untie them. "
                             "Adapt it with an added term (LoRA) instead")  # fmt: skip
        with _naming(f"{method.__name__} on {path!r}"), torch.device(device_of(layer)):
            hyper = checked(method, hyper)
            made[path] = method(layer, **hyper)
        made[path].train(site.training)
        given = {**defaults_of(method), **hyper}
        made[path].hyper = {n: tuple(v) if isinstance(v, list) else v for n, v in given.items()}
    for method in {type(adapter) for adapter in made.values() if type(adapter).part_of is None}:
        with _naming(method.__name__):  # with its parts
            method.share({p: a for p, a in made.items() if method.__name__ in (type(a).__name__, type(a).part_of)})
    if not hosts(model):
        model.requires_grad_(False)
    switch = switch_of(model) if hosts(model) else Switch()
    for path, adapter in made.items():
        host = wrap(model, path, switch)
        host.adapters[name] = adapter
        adapter.__dict__["peers"] = host.adapters
    switch.active, switch.rows = (*merged_names(model), name), None
    return model


def _owns(method: type[Adapter]) -> bool:
    return method.__name__ == "ModuleCopy"


class Sharing:
    """What stands at more than one place of a model: looked up once, asked for many layers, while nothing changes."""

    def __init__(self, model: nn.Module):
        self.holders = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
        self.places = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))

    def tied(self, layer: nn.Module) -> bool:
        """Whether a layer of the model shares a parameter with a module outside of it."""
        inside = Counter(id(p) for module in layer.modules() for p in module.parameters(recurse=False))
        return any(self.holders[p] > number for p, number in inside.items())

    def repeated(self, layer: nn.Module) -> bool:
        """Whether one and the same module stands at several places."""
        return self.places[id(layer)] > 1


def method_named(name: str) -> type[Adapter]:
    """The class of `METHODS` with this name, whatever its case."""
    from . import methods  # noqa: F401  fills METHODS

    found = {n.lower(): c for n, c in METHODS.items()}.get(name.lower())
    if found is None:
        raise ValueError(f"unknown method {name!r}{did_you_mean(name, METHODS)} Known: {', '.join(METHODS)}")
    return found


def check_attached(model: nn.Module, names) -> None:
    there = adapters(model)
    for name in names:
        if name is not None and name not in there:
            raise ValueError(f"no adapter named {name!r} is attached{did_you_mean(str(name), there)} "
                             f"Attached: {', '.join(there) or 'none'}")  # fmt: skip


def check_mixes(model: nn.Module, rows) -> None:
    """ValueError if one of the adapters named in `rows` cannot be in a mixed batch."""
    for name, found in adapters(model).items():
        alone = next((type(a).__name__ for a in found.values() if not a.mixes), None)
        if name in rows and alone:
            raise ValueError(f"{name!r} is {alone}, which changes the whole batch at once and cannot be in a mixed "
                             f"batch; run its rows apart: using(model, {name!r})")  # fmt: skip


def merged_names(model: nn.Module) -> tuple[str, ...]:
    return next((host.merged for host in hosts(model).values() if host.merged), ())


def activate(model: nn.Module, *names: str) -> None:
    """Make exactly these adapters run from now on, innermost first; none: the bare base. Trains and freezes nothing."""
    switch = switch_of(model)
    check_attached(model, names)
    merged = merged_names(model)
    if names[: len(merged)] != merged:
        raise ValueError(f"{', '.join(merged)} is merged into the weights and cannot be switched off; "
                         "unmerge(model) first")  # fmt: skip
    _check_place(model, names)
    switch.active, switch.rows = names, None


def _check_place(model: nn.Module, names: Sequence[str]) -> None:
    """Refuse an adapter inside of one that never calls what is inside: it would do nothing without a word."""
    for path, host in hosts(model).items():
        here = [name for name in names if name in host.adapters]
        for inner, name in zip(here, here[1:], strict=False):
            if host.adapters[name].replaces:
                method = type(host.adapters[name]).__name__
                raise ValueError(f"{name!r} ({method}) takes the place of {path!r}, so {inner!r} inside of it would do "
                                 f"nothing there; activate one of them alone, or {name!r} first if {inner!r} can "
                                 "stand around it")  # fmt: skip


@contextmanager
def using(model: nn.Module, *names: str, rows: Sequence[str | None] | Rows | None = None) -> Iterator[nn.Module]:
    """`with using(model, "sql"):` these adapters run inside the block; `using(model)` gives the bare base.

    rows: one adapter name (None: the bare base) for each row of the batch, for a mixed batch; rows that generate()
    repeats for beams or return sequences keep the adapter of the row they come from. Low-rank adapters are computed
    together, and without gradients their factors are gathered once: what changes in the block is seen all the same.
    A `mixed.Rows` of the names, instead of a list, keeps what was gathered for the next block.
    """
    switch = switch_of(model)
    before = switch.active, switch.rows
    try:
        if rows is None:
            activate(model, *names)
        else:
            if names:
                raise ValueError("give either adapter names for the whole batch or rows=[…], not both")
            if merged_names(model):
                raise ValueError("a mixed batch needs the bare base; unmerge(model) first")
            rows = rows if isinstance(rows, Rows) else Rows(rows)
            check_attached(model, rows.used)
            check_mixes(model, rows.used)
            switch.rows = rows
        yield model
    finally:
        switch.active, switch.rows = before


def freeze(model: nn.Module, name: str, frozen: bool = True) -> None:
    """Freeze an adapter's parameters, or make them trainable again (`frozen=False`)."""
    check_attached(model, [name])
    for adapter in adapters(model)[name].values():
        adapter.requires_grad_(not frozen)


def detach(model: nn.Module, *names: str) -> nn.Module:
    """Remove adapters (default: all); a layer without adapters is put back as it was. The base stays frozen.

    Raises ValueError for adapters that are merged, or that another one needs (AdapterFusion); then none is removed.
    """
    switch = switch_of(model)
    check_attached(model, names)
    names = names or tuple(adapters(model))
    if set(names) & set(merged_names(model)):
        raise ValueError("these adapters are merged into the weights; unmerge(model) first")
    for name, found in adapters(model).items():
        needed = sorted({n for adapter in found.values() for n in adapter.needs} & set(names))
        if needed and name not in names:
            raise ValueError(f"{name!r} needs {needed[0]!r}; detach {name!r} first, or both at once")
    for path, host in hosts(model).items():
        for name in set(names) & set(host.adapters):
            del host.adapters[name]
        if not host.adapters:
            put(model, path, host.layer)
    switch.active, switch.rows = tuple(n for n in switch.active if n not in names), None
    return model


def layer_shapes(model: nn.Module, targets: Targets = "all-linear") -> dict[str, tuple[int, int]]:
    """path -> (out, in) of the linear layers that `targets` names."""
    there = sites(model)
    return {path: shape_of(bare(there[path])) for path in find_targets(model, targets)}
