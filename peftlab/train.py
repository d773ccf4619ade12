"""The training loop: any model, any adapter; on accelerate, so that one CPU, one GPU and several are the same code.

`train` runs to the end, `train_steps` gives control back after every step (live plots, games with knobs).
Nothing random has to be remembered: the order of the rows is a function of (seed, position) and every step draws its
dropout from a stream of its own, (seed, step). So a killed run goes on with the very losses it would have had, and what
happens between two steps (sampling text, drawing a plot) cannot change them.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
import time
import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import Tensor, nn

from . import checkpoint as files
from . import hooks
from .hyper import fits, said
from .log import Log
from .rows import Row, collate, digest, encode, kind_of, order
from .runtime import accelerator_on, mode, stream
from .texts import pad_of

# name -> what bitsandbytes calls it; None: AdamW of torch. Its 8 bits are for matrices of 4,096 numbers and more, its
# pages (which move to CPU memory when the GPU's is full) for those of 100,000; smaller states stay as they are.
OPTIMIZERS = {
    "adamw": None,
    "adamw8bit": "AdamW8bit",
    "paged_adamw": "PagedAdamW",
    "paged_adamw8bit": "PagedAdamW8bit",
}
SCHEDULES: dict[str, Callable[[float], float]] = {  # progress after the warm-up, 0 to 1 -> factor on the learning rate
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1 - progress,
    "constant": lambda progress: 1.0,
}


@dataclass(frozen=True)
class Settings:
    """The knobs of a training run, as `train` and `train_steps` take them by name."""

    steps: int = 250  # optimizer steps
    batch_size: int = 16  # rows per step, over all micro-batches and processes
    lr: float = 2e-3  # peak learning rate of the default optimizer
    warmup: float = 0.05  # fraction of the steps in which the rate climbs in a straight line
    schedule: str | Callable[[float], float] = "cosine"  # then: "cosine", "linear", "constant" or your own function
    weight_decay: float = 0.0  # of the default optimizer
    clip: float | None = 1.0  # longest gradient (L2 norm over all trained parameters); None: not clipped
    accumulation: int = 1  # micro-batches that a batch is cut into: less memory, the same gradient
    seed: int = 0  # order of the rows and dropout
    # "adamw", on a GPU also bitsandbytes' "adamw8bit", "paged_adamw", "paged_adamw8bit"; or your own function
    optimizer: str | Callable[[list[nn.Parameter]], torch.optim.Optimizer] = "adamw"
    valid: Any = None  # rows for a validation loss
    valid_every: int = 50  # steps between two validations
    patience: int | None = None  # validations without a new best before stopping; the best parameters are put back
    checkpoint: str | Path | None = None  # folder to go on from after a crash
    checkpoint_every: int = 50  # steps between two checkpoints
    resume: bool = True  # go on from the checkpoint in the folder if there is one
    precision: str | None = None  # autocast: "bf16", "fp16" (GPU); None: computes in the weights' own dtype
    max_length: int | None = None  # longest row in tokens; None: the model's context
    penalty: Callable[[nn.Module], Tensor] | None = None  # a number added to each step's loss (see `remedies.KLToBase`)

    def __post_init__(self):
        def need(right: bool, name: str, rule: str) -> None:
            if not right:
                raise ValueError(f"{name}={getattr(self, name)!r}: {rule}")

        for name in ("steps", "batch_size", "accumulation", "valid_every", "checkpoint_every"):
            value = getattr(self, name)
            need(isinstance(value, int) and value >= 1, name, "must be a whole number, at least 1")
        for name, hint in get_type_hints(Settings).items():
            need(fits(getattr(self, name), hint), name, f"must be {said(hint)}")
        need(self.accumulation <= self.batch_size, "accumulation", f"more micro-batches than rows ({self.batch_size})")
        need(self.lr > 0 and math.isfinite(self.lr), "lr", "must be a positive number")
        need(0 <= self.warmup < 1, "warmup", "is a fraction of the steps: 0 ≤ warmup < 1")
        known = callable(self.optimizer) or self.optimizer in list(OPTIMIZERS)
        need(known, "optimizer", f"must be one of {list(OPTIMIZERS)} or a function from parameters to an optimizer")
        known = callable(self.schedule) or self.schedule in list(SCHEDULES)
        need(known, "schedule", f"must be a function or one of {list(SCHEDULES)}")
        need(self.clip is None or self.clip > 0, "clip", "must be positive, or None for no clipping")
        need(self.max_length is None or self.max_length >= 1, "max_length", "must be at least 1, or None")
        need(self.weight_decay >= 0, "weight_decay", "must not be negative")
        need(self.penalty is None or callable(self.penalty), "penalty", "must be a function of the model, or None")
        need(isinstance(self.seed, int) and self.seed >= 0, "seed", "must be a whole number, at least 0")
        need(self.precision in (None, "bf16", "fp16"), "precision", 'must be None, "bf16" or "fp16"')
        need(self.patience is None or self.patience >= 1, "patience", "must be at least 1, or None")
        need(self.patience is None or self.valid is not None, "patience", "early stopping needs rows: valid=")

    def rate(self, step: int) -> float:
        """Factor on the learning rate at a step counted from 0: (step + 1)/warm while warming up, then the schedule."""
        warm = math.ceil(self.warmup * self.steps)
        if step < warm:
            return (step + 1) / warm
        shape = self.schedule if callable(self.schedule) else SCHEDULES[self.schedule]
        return shape((step - warm) / (self.steps - warm))


def train(
    model: nn.Module,
    dataset: Any,
    tokenizer: Any = None,
    *,
    progress: bool = True,
    on_step: Callable[[Log], None] | None = None,
    **settings: Any,
) -> Log:
    """Train whatever in `model` requires a gradient, in place, and return the log.

    `settings` are those of `Settings`; `on_step` is called with the growing log after every step; rows as in
    `peftlab.rows.encode`. The model stays on its device, and which parameters are trainable, which adapters are active
    and every module's train or eval mode are left as they were. Several processes (torchrun) share each batch.

    Costs beside the model: gradients and optimizer state of the trained parameters, and one copy of them in CPU memory
    (two with `patience`) to put back if the loss stops being a number.

    Raises
      ValueError: nothing to train, a setting or row that cannot be right, another run's or a damaged checkpoint.
      FloatingPointError: loss or gradient is NaN or infinite; the trained parameters are as before the call.
      OSError: a checkpoint could not be written; the one before is intact.
      KeyboardInterrupt: stopped by hand; with `checkpoint`, the same call goes on from there.
    """
    from accelerate import PartialState
    from tqdm import tqdm

    with closing(train_steps(model, dataset, tokenizer, **settings)) as steps:
        begun = next(steps)  # there is always one: a run that was finished before gives its log
        first, total, quiet = len(begun), Settings(**settings).steps, not (progress and PartialState().is_main_process)
        with tqdm(desc="training", unit="step", initial=first, total=total, disable=quiet) as bar:
            for log in chain([begun], steps):
                speed = sum(log.tokens[first - 1 :]) / sum(log.seconds[first - 1 :])
                bar.set_postfix_str(f"loss {log.final:.4f}, {speed:,.0f} tokens/s", refresh=False)
                bar.update(len(log) - bar.n)
                if on_step is not None:
                    on_step(log)
    return log


def train_steps(model: nn.Module, dataset: Any, tokenizer: Any = None, **settings: Any) -> Generator[Log, None, None]:
    """`train`, one step at a time: checks settings and rows now, then gives the growing log after each step.

    Leave the loop whenever you like: the model is trained as far as it got, and with `checkpoint` a later call goes on.
    Between two steps the model is in the modes you left it in. A run that was finished before gives its log once.
    """
    wrong = next((name for name in settings if name not in Settings.__dataclass_fields__), None)
    if wrong is not None:
        near = difflib.get_close_matches(wrong, Settings.__dataclass_fields__, 1)
        raise TypeError(f"train has no setting {wrong!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    s = Settings(**settings)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise ValueError(
            "nothing to train: no parameter requires a gradient. Attach an adapter (pl.attach), "
            "or unfreeze with requires_grad_(True)"
        )
    half = [name for name, p in trained.items() if p.dtype == torch.float16]
    if half:
        raise ValueError(
            f"{half[0]!r} is trained in float16, whose gradients vanish below 6e-8: make trained parameters float32 or "
            'bfloat16 (p.data = p.data.float()); the frozen base may stay float16, with precision="fp16"'
        )
    if s.checkpoint is not None:
        Path(s.checkpoint).mkdir(parents=True, exist_ok=True)  # an impossible folder fails now, not at step 50
    rows = encode(model, dataset, tokenizer, s.max_length)
    valid = encode(model, s.valid, tokenizer, s.max_length) if s.valid is not None else []
    return _steps(model, trained, rows, valid, pad_of(model, tokenizer), s)


def _steps(
    model: nn.Module, trained: dict[str, nn.Parameter], rows: list[Row], valid: list[Row], pad: int, s: Settings
) -> Generator[Log, None, None]:
    parameters = list(trained.values())
    accelerator = accelerator_on(parameters[0].device, s.precision)
    world, scaler = accelerator.num_processes, accelerator.scaler
    if s.accumulation * world > s.batch_size:
        raise ValueError(
            f"batch_size={s.batch_size} is too small for {world} processes × accumulation={s.accumulation}"
        )
    run = files.identity(model)
    plain = _optimizer(parameters, s)  # may freeze some for a while (`optim.badam`)
    peaks = [group["lr"] for group in plain.param_groups]
    learning = hooks.learning(model)
    memory = hooks.memory(learning)
    before, forgotten, best, log = _copy(trained), _copy(memory), {}, Log()

    run |= _description(s, plain, rows, valid, world)
    found = files.load(s.checkpoint) if s.checkpoint is not None and s.resume else None
    if found is not None and s.checkpoint is not None:
        tensors, state = found
        files.compare(s.checkpoint, state["run"], run)
        log = Log.from_dict(state["log"])
        _put(trained, files.part(tensors, "trained"))
        _put(memory, files.part(tensors, "memory"))
        best = files.part(tensors, "best")
        files.unflatten(plain, files.part(tensors, "optimizer"), state["optimizer"])
        if scaler is not None:
            scaler.load_state_dict(state["scaler"])
        if state["finished"]:
            yield log
            return
    saved = len(log)

    def save(finished: bool = False) -> None:
        nonlocal saved
        if s.checkpoint is None:
            return
        if accelerator.is_main_process:
            momenta, rest = files.flatten(plain)
            state = {"run": run, "log": asdict(log), "optimizer": rest, "finished": finished}
            state["scaler"] = scaler.state_dict() if scaler is not None else None
            tensors = {"trained": trained, "best": best, "optimizer": momenta, "memory": memory}
            files.save(s.checkpoint, tensors, state)
        accelerator.wait_for_everyone()
        saved = len(log)

    ready, optimizer = accelerator.prepare(model, plain)
    optimizer.zero_grad()
    whole = True  # parameters, optimizer and log belong to the same step: a checkpoint may be written
    try:
        for step in range(len(log), s.steps):
            start = time.perf_counter()
            batch = [rows[i] for i in order(len(rows), step * s.batch_size, (step + 1) * s.batch_size, s.seed)]
            for group, peak in zip(plain.param_groups, peaks, strict=True):
                group["lr"] = peak * s.rate(step)
            own = stream(s.seed, step, accelerator.process_index, device=parameters[0].device)
            with mode(model, training=True), own:
                loss = _gradient(ready, batch, pad, accelerator, s.accumulation, s.penalty, learning)
                norm = float(accelerator.clip_grad_norm_(parameters, s.clip or math.inf))
                _check(loss, "loss", step, plain)
                if scaler is None:  # with one, infinite gradients are its business: it skips the step
                    _check(norm, "gradient norm", step, plain)
                whole = False
                optimizer.step()
                hooks.stepped(learning, step + 1, s.steps)
                optimizer.zero_grad()

            log.losses.append(loss)
            log.learning_rates.append(plain.param_groups[0]["lr"])
            log.grad_norms.append(norm)
            log.tokens.append(sum(row.tokens for row in batch))
            log.seconds.append(time.perf_counter() - start)
            done, finished = step + 1, step + 1 == s.steps
            if valid and (finished or done % s.valid_every == 0):
                log.valid_losses[done] = _evaluate(model, valid, pad, accelerator, s.batch_size // s.accumulation)
                _check(log.valid_losses[done], "validation loss", step, plain)
                if s.patience is not None:
                    lowest = log.best_step or done
                    best = _copy(trained) if lowest == done else best
                    finished = finished or sum(at > lowest for at in log.valid_losses) >= s.patience
            if finished and best:
                _put(trained, best)
            if finished or done % s.checkpoint_every == 0:
                _check(sum(p.detach().float().sum().item() for p in parameters), "sum of the parameters", step, plain)
                save(finished)
            whole = True
            yield log
            if finished:
                break
    except FloatingPointError:
        _put(trained, before)
        _put(memory, forgotten)
        raise
    except (KeyboardInterrupt, GeneratorExit):  # Ctrl-C, or the loop over the steps was left
        if whole and saved < len(log):
            save()
        raise
    finally:
        optimizer.zero_grad()
        for p in parameters:
            p.requires_grad_(True)  # as they were
        accelerator.unwrap_model(ready, keep_fp32_wrapper=False)
        accelerator.free_memory()


def _gradient(
    model: nn.Module, batch: list[Row], pad: int, accelerator: Any, accumulation: int, penalty: Callable | None,
    learning: list[hooks.Group],
) -> float:  # fmt: skip
    """Add up the gradient of the batch's mean loss over its micro-batches, a share of them on each process.

    Every label of the batch weighs the same. The mean of the micro-batches' means would favour labels in micro-batches
    that have few of them: a mistake of most training loops until October 2024 (transformers pull request 34191).
    """
    world, total = accelerator.num_processes, sum(row.trained for row in batch)
    cuts, loss = accumulation * world, torch.zeros((), device=next(model.parameters()).device)
    if penalty is not None:  # its own mean over the processes; what is returned and logged is the loss without it
        with accelerator.no_sync(model):
            accelerator.backward(penalty(accelerator.unwrap_model(model, keep_fp32_wrapper=False)))
    for cut in range(accelerator.process_index, cuts, world):
        part = batch[cut * len(batch) // cuts : (cut + 1) * len(batch) // cuts]
        share = sum(row.trained for row in part) / total
        with nullcontext() if cut + world >= cuts else accelerator.no_sync(model):  # processes meet once per step
            mean = loss_of(model, part, pad)
            own = hooks.penalty(learning)  # a method's own term; not logged either
            whole = mean if own is None else mean + own
            accelerator.backward(whole * (share * world))  # gradients of processes are averaged, ours must add up
        loss = loss + mean.detach() * share
    return accelerator.reduce(loss, "sum").item()


def loss_of(model: nn.Module, rows: list[Row], pad: int) -> Tensor:
    """The model's own loss: the mean over the labels of these rows."""
    bare = getattr(model, "module", model)  # inside DistributedDataParallel
    device = getattr(bare, "device", None) or next(bare.parameters()).device
    inputs: dict[str, Any] = dict(collate(rows, pad, device))
    if kind_of(bare) != "other":
        inputs["use_cache"] = False  # keys and values for generation: dead weight here
    loss = model(**inputs)["loss"]
    if torch.is_grad_enabled() and not loss.requires_grad:
        raise ValueError(
            "the loss does not depend on any trained parameter: make the adapter active (pl.using), or, with gradient "
            "checkpointing on a frozen base, call model.enable_input_require_grads()"
        )
    return loss.float()


@torch.no_grad()
def _evaluate(model: nn.Module, rows: list[Row], pad: int, accelerator: Any, size: int) -> float:
    """Mean loss over all labels of `rows`; every process takes its share of the batches."""
    batches = [rows[i : i + size] for i in range(0, len(rows), size)]
    total = torch.zeros((), device=next(model.parameters()).device)
    with mode(model, training=False):
        for batch in batches[accelerator.process_index :: accelerator.num_processes]:
            total = total + loss_of(model, batch, pad) * sum(row.trained for row in batch)
    return accelerator.reduce(total, "sum").item() / sum(row.trained for row in rows)


def _check(value: float, what: str, step: int, optimizer: torch.optim.Optimizer) -> None:
    if not math.isfinite(value):
        raise FloatingPointError(
            f"{what} is {value} at step {step + 1}, learning rate {optimizer.param_groups[0]['lr']:.3g}; the trained "
            "parameters are as they were before. Lower lr, raise warmup, set clip=1.0, or compute in float32 or bf16"
        )


def _optimizer(parameters: list[nn.Parameter], s: Settings) -> torch.optim.Optimizer:
    """As named, or made by the caller's function. bitsandbytes' own need a GPU: elsewhere AdamW, and a warning."""
    if isinstance(s.optimizer, str):
        theirs, device = OPTIMIZERS[s.optimizer], parameters[0].device
        if theirs is not None and device.type == "cuda":
            return _bitsandbytes(theirs, s.optimizer)(parameters, lr=s.lr, weight_decay=s.weight_decay)
        if theirs is not None:
            warnings.warn(f"optimizer={s.optimizer!r} saves memory on a GPU; on {device} plain AdamW runs instead: "
                          "the same rule with float32 states", stacklevel=2)  # fmt: skip
        fused = all(p.device.type in ("cpu", "cuda", "mps") for p in parameters)  # one kernel instead of ten per tensor
        return torch.optim.AdamW(parameters, lr=s.lr, weight_decay=s.weight_decay, fused=fused)
    optimizer = s.optimizer(parameters)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(f"optimizer= must be a function from parameters to a torch optimizer; it gave {optimizer!r}")
    if any(not p.requires_grad for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(f"{type(optimizer).__name__} holds a frozen parameter: give it only those it is called with")
    return optimizer


def _bitsandbytes(kind: str, asked: str) -> type[torch.optim.Optimizer]:
    try:
        import bitsandbytes
    except ImportError as error:
        raise ImportError(f"optimizer={asked!r} is one of bitsandbytes, which cannot be imported ({error}): install it "
                          "(pip install bitsandbytes), or take optimizer=\"adamw\"") from error  # fmt: skip
    return getattr(bitsandbytes.optim, kind)


def _description(s: Settings, optimizer: torch.optim.Optimizer, rows: list[Row], valid: list[Row], world: int) -> dict:
    """Everything beside the model that the losses depend on, as JSON: what a checkpoint must agree with."""
    keys = "steps batch_size lr warmup weight_decay clip accumulation seed valid_every patience precision".split()
    schedule = s.schedule if isinstance(s.schedule, str) else s.schedule.__qualname__
    penalty = {} if s.penalty is None else {"penalty": getattr(s.penalty, "__qualname__", type(s.penalty).__name__)}
    rates = [group["lr"] for group in optimizer.param_groups]
    return {key: getattr(s, key) for key in keys} | {
        "schedule": schedule, "optimizer": type(optimizer).__name__, "learning rates": rates, "processes": world,
        "data set": digest(rows), "validation set": digest(valid),
    } | penalty  # fmt: skip


def _copy(trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: p.detach().cpu().clone() for name, p in trained.items()}


@torch.no_grad()
def _put(trained: Mapping[str, Tensor], values: dict[str, Tensor]) -> None:
    for name, p in trained.items():
        p.copy_(values[name])


# Readers of `help(train)`, and Shift-Tab in a notebook, see every setting with its default.
for _function in (train, train_steps):
    _own = [p for p in inspect.signature(_function).parameters.values() if p.kind != p.VAR_KEYWORD]
    _knobs = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type)
        for f in dataclasses.fields(Settings)
    ]
    _shown = inspect.Signature([*_own, *_knobs], return_annotation=_function.__annotations__["return"])
    _function.__signature__ = _shown  # type: ignore[union-attr]
