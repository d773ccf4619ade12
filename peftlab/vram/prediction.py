"""`predict`: the memory of fine-tuning or running a model, without a GPU, without weights, in seconds.

The real code runs: transformers' model, the method's adapters, autograd, torch's optimizer, for two steps, since Adam's
states appear in the first. But on the meta device, where a tensor is its shape. A tape notes each storage as it comes
and goes, with what CUDA's kernels do otherwise (kernels.py), and a copy of the allocator plays it again (allocator.py).

Not in it: the CUDA context (see cards.py), workspaces of kernels other than those named in kernels.py, torch.compile,
several GPUs, and what other programs take.
"""

from __future__ import annotations

import copy
import inspect
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..attach import Targets, adapters, attach
from ..baselines import full_finetuning
from ..core import Adapter
from ..nf4_layer import quantize as quantize_model
from ..rows import kind_of
from .allocator import CachingAllocator
from .ghost import build, ghost, puppet
from .kernels import ATTENTION, Autocast, kernels, like, replaced
from .memory import Memory, from_tape, size
from .step import OPTIMIZERS, Generation, TrainingStep, batch_of, without_labels
from .tape import Recorder, Unknown

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
          "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # fmt: skip
QUANTIZE = ("nf4", "fp4", "int4", "int8")
MOST = 10**9  # rows, tokens or micro-batches; more are a slip of the keyboard
Optimizer = str | Callable[[list[nn.Parameter]], torch.optim.Optimizer]
# (model, batch, optimizer, mark): one step of a training loop of your own; mark("forward") and so on begin its phases
Step = Callable[[nn.Module, dict[str, Tensor], torch.optim.Optimizer, Callable[[str], None]], None]
Method = type[Adapter] | str | Callable[[nn.Module], Any] | None


def predict(
    model: Any,
    method: Method = None,
    targets: Targets | None = None,
    *,
    batch: int = 1,
    tokens: int = 512,
    new_tokens: int = 0,
    train: bool | None = None,
    dtype: str = "bfloat16",
    adapter_dtype: str = "float32",
    quantize: str | None = None,
    checkpointing: bool = False,
    attention: str = "auto",
    optimizer: Optimizer = "adamw",
    autocast: str | None = None,
    padding: bool = False,
    micro_batches: int = 1,
    device: str = "cuda",
    expandable: bool = False,
    inputs: Mapping[str, Tensor] | None = None,
    loss: Callable[[Any], Tensor] | None = None,
    step: Step | None = None,
    **hyper: Any,
) -> Memory:
    """The memory of one training step, or of generating text, as a `Memory`.

        predict("llama-3.1-8b", "lora", r=16, quantize="nf4", batch=1, tokens=2048, checkpointing=True)
        predict("llama-3.1-8b", new_tokens=256)           running it: a prompt of `tokens`, then so many more
        predict(model)                                    a model that is there, with its adapters and what trains

    model: what `count` takes: a built-in shape, Hub id, config.json, config; or any nn.Module, which is copied without
    its numbers and never changed: one of peft, with bitsandbytes' layers, or your own (then give `inputs`, a batch by
    the names of its arguments, of which only shapes count, and `loss`, from its output to the loss).
    method, targets, hyper: as for `attach`; "full" for full fine-tuning; None: the model as it is; or a function that
    gets the model and changes it (`lambda model: peft.get_peft_model(model, config)`).
    batch, tokens: rows (B) and their length (T). padding: rows of unequal length, so that attention needs a mask.
    train: False for a forward pass without gradients; by default whether anything trains.
    dtype: of the base's weights; adapter_dtype: of what a method adds; quantize: "nf4", "fp4", "int4", "int8" for its
    linear layers. autocast: "bf16" or "fp16", as torch.autocast around the forward pass.
    attention: "auto": what torch chooses on an Ampere card or newer; "flash", "efficient", "cudnn", "math", "eager".
    optimizer: a name of `step.OPTIMIZERS`, or a function from parameters to a torch optimizer.
    micro_batches: how many batches of `batch` rows add up their gradients before a step (gradient accumulation).
    device: "cuda", or "cpu" for torch's CPU kernels, where nothing is rounded and nothing reserved. expandable: with
    PYTORCH_ALLOC_CONF=expandable_segments:True.
    Raises ValueError for an unknown name, an impossible size, what `attach` refuses, and a model that asks a tensor for
    its numbers; TypeError for a hyper-parameter that the method does not have.
    """
    start, before = time.perf_counter(), _resident()
    call = {name: value for name, value in locals().items() if name not in ("start", "before", "hyper")} | hyper
    asked = {name: value for name, value in call.items() if name not in ("inputs", "loss", "step", *hyper)}
    asked["hyper"] = hyper
    _check(asked, OPTIMIZERS)
    with _in_words(), _few_words():
        made = _made(model, attention, DTYPES[dtype])
        made = _changed(made, method, targets, hyper, quantize, DTYPES[adapter_dtype], isinstance(model, nn.Module))
        trained = [p for p in made.parameters() if p.requires_grad]
        training = _trains(made, trained, train, new_tokens)
        if isinstance(model, nn.Module):
            asked["dtype"] = next((str(p.dtype).removeprefix("torch.") for p in made.parameters()), None)
        asked |= {"model": _name(model), "method": _name(method), "optimizer": _name(optimizer), "train": training}
        made.train(training)
        if checkpointing and training:
            _checkpoint(made)
        if inputs is None:
            _fits_context(made, tokens + new_tokens)
        given = _given(inputs) if inputs is not None else batch_of(made, batch, tokens, padding)
        given = given if training else without_labels(made, given)
        recorder = Recorder(made, like=device, answer=not padding, kernels=kernels(device))
        base, added = _parameters(made)
        for tensors, kind in ((base, "weights"), (added, "adapter"), (given.values(), "activations")):
            recorder.tag(tensors, kind)
        optim = None
        with _recording(recorder, device, attention, DTYPES[autocast] if autocast else None) as cast:
            if training:
                optim = OPTIMIZERS[optimizer](trained) if isinstance(optimizer, str) else optimizer(trained)
                few = min(2, micro_batches)  # from the second one on, each is like the one before
                ours = TrainingStep(made, given, optim, autocast=cast, micro_batches=few, loss=loss)
                mark = partial(_mark, recorder, trained, optim)
                for _ in range(2):
                    ours(mark) if step is None else step(made, given, optim, mark)
                _name_states(recorder, optim)
            else:
                run = Generation(made, given, new_tokens, cast)
                run(partial(_mark_cache, recorder, run))
                recorder.tag(_cached(run.cache), "cache")
    tape, played = recorder.tape, CachingAllocator(expandable=expandable)
    tape.name_the_rest(_vocabulary(made))
    if device == "cuda":
        played.replay(tape)
    return from_tape("predicted", tape, played.peak_reserved, asked, played.levels or None,
                     notes=tuple(_notes(made, tokens + new_tokens, optim)), seconds=time.perf_counter() - start,
                     host=max(0, _resident() - before), again=partial(_again, call))  # fmt: skip


def _again(call: Mapping[str, Any], **changes: Any) -> Memory:
    return predict(**{**call, **changes})


@contextmanager
def _recording(
    recorder: Recorder, device: str, attention: str, autocast: torch.dtype | None
) -> Iterator[Autocast]:
    """All that runs inside is on the recorder's tape, as on `device`. Gives the autocast context."""
    tape = recorder.tape
    watched = [(torch.cuda, "empty_cache", lambda: tape.emptied.append(len(tape.events)))]
    if device == "cpu":  # checkpointing keeps states of the random numbers, on meta fewer; no operation makes them
        watched += [(torch, "get_rng_state", partial(_seen, recorder, torch.get_rng_state)),
                    (torch.random, "fork_rng", _as_on_cpu(torch.random.fork_rng))]  # fmt: skip
    with replaced(*watched), like(device, attention, autocast) as cast, recorder.watching(), recorder:
        yield cast
    recorder.live.clear()  # what is freed from now on is no part of the program


# ------------------------------------------------------------------------------------------------------------ the model


def _made(model: Any, attention: str, dtype: torch.dtype) -> nn.Module:
    if isinstance(model, nn.Module):
        made = ghost(model)
        if attention != "auto" and hasattr(made, "set_attn_implementation"):
            made.set_attn_implementation("eager" if attention == "eager" else "sdpa")
        return made
    made = build(model, dtype, **({"_attn_implementation": "eager"} if attention == "eager" else {}))
    if made.config.is_encoder_decoder and getattr(made.config, "decoder_start_token_id", None) is None:
        made.config.decoder_start_token_id = 0  # a shape has no token ids; which one it is changes no memory
    return made


def _changed(model: nn.Module, method: Method, targets: Any, hyper: dict, quantize: str | None, dtype: torch.dtype,
             there: bool) -> nn.Module:  # fmt: skip
    """Quantised and adapted, in place unless the caller's own method gives another model."""
    if method == "full":
        if targets is not None or hyper:
            raise ValueError(f"full fine-tuning trains all there is; it takes no {', '.join(hyper) or 'targets'}")
        if quantize:
            raise ValueError(f"quantize={quantize!r} freezes weights that full fine-tuning trains; take a method")
        return full_finetuning(model)
    if method is None and (targets is not None or hyper):
        raise ValueError(f"{', '.join(hyper) or 'targets'} given, but no method; say which, such as method='lora'")
    if method is None and not there:
        model.requires_grad_(False)
    if quantize:
        quantize_model(model, kind=quantize)
    if method is None:
        return model
    if isinstance(method, str) or (isinstance(method, type) and issubclass(method, Adapter)):
        attach(model, method, targets=targets, **hyper)
    elif callable(method):
        model = _by_function(method, model)
    else:
        raise TypeError(f"method={method!r}: give a name such as 'lora', a class of METHODS or a function of the model")
    for p in _parameters(model)[1] if dtype != torch.float32 else ():
        p.data = p.data.to(dtype)
    return model


def _by_function(method: Callable[[nn.Module], Any], model: nn.Module) -> nn.Module:
    """What the caller's function makes of the model. An adapter that looks at random numbers when it is made gets some
    on the CPU, and if they are as many as the weights, weights that are all nil; of it, too, only shapes are kept."""
    ways: tuple[tuple[Callable, str], ...] = ((copy.deepcopy, "meta"), (copy.deepcopy, "cpu"), (puppet, "cpu"))
    for last, (prepared, device) in enumerate(ways, 1 - len(ways)):
        try:
            start = prepared(model)
            with torch.device(device):
                made = method(start)
            break
        except (NotImplementedError, RuntimeError) as error:  # what torch says of numbers that are not there
            if not last or "copy out of meta" in str(error):  # it reads the weights themselves
                raise
    made = made if isinstance(made, nn.Module) else start
    return ghost(made) if any(not t.is_meta for t in (*made.parameters(), *made.buffers())) else made


def _parameters(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """(those of the base with all buffers and scales, those of adapters): ours by their host, others' by being few."""
    own = {id(p) for found in adapters(model).values() for a in found.values() for p in a.parameters()}
    rest = [p for p in model.parameters() if id(p) not in own]
    frozen = any(not p.requires_grad for p in rest)
    added = [p for p in model.parameters() if id(p) in own or (frozen and p.requires_grad)]
    base = [p for p in rest if not (frozen and p.requires_grad)]
    states = [s for p in base if (s := getattr(p, "quant_state", None)) is not None]
    nested = [s.state2 for s in states if getattr(s, "state2", None) is not None]
    scales = [t for s in (*states, *nested) for t in vars(s).values() if isinstance(t, Tensor)]
    return [*base, *model.buffers(), *scales], added


def _checkpoint(model: nn.Module) -> None:
    """Gradient checkpointing, by the name that this version of transformers has for it."""
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    switches = [switch for name in names if (switch := getattr(model, name, None)) is not None]
    if not switches:
        raise ValueError(f"{type(model).__name__} has no {names[1]}(); switch it on in the model yourself")
    switches[0]()


def _given(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The caller's batch, without its numbers."""
    if not isinstance(inputs, Mapping):
        raise TypeError(f"inputs is a {type(inputs).__name__}; give a dictionary, argument of the model -> tensor")
    return {name: value.to("meta") if isinstance(value, Tensor) else value for name, value in inputs.items()}


def _vocabulary(model: nn.Module) -> int | None:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return None if head is None else getattr(head, "out_features", None) or head.weight.shape[0]


def _cached(cache: Any) -> list[Tensor]:
    return [t for layer in getattr(cache, "layers", []) for t in (layer.keys, layer.values) if isinstance(t, Tensor)]


# -------------------------------------------------------------------------------------------------- while it is running


def _mark(recorder: Recorder, trained: list[nn.Parameter], optimizer: torch.optim.Optimizer, phase: str) -> None:
    """A phase begins: name the gradients that are there, then put the mark on the tape."""
    recorder.tag((p.grad for p in trained if p.grad is not None), "gradients")
    _name_states(recorder, optimizer)
    recorder.tape.enter(phase)


def _mark_cache(recorder: Recorder, run: Generation, phase: str) -> None:
    recorder.tag(_cached(run.cache), "cache")
    recorder.tape.enter(phase)


def _seen(recorder: Recorder, function: Callable[[], Tensor]) -> Tensor:
    recorder.see(state := function(), "get_rng_state")
    return state


def _as_on_cpu(fork_rng: Callable) -> Callable:
    return lambda *args, **kwargs: fork_rng(*args, **{**kwargs, "device_type": "cpu"})


def _name_states(recorder: Recorder, optimizer: torch.optim.Optimizer) -> None:
    recorder.tag((t for state in optimizer.state.values() for t in state.values()), "optimizer")


# ------------------------------------------------------------------------------------------------------------- refusals


def _check(asked: Mapping[str, Any], optimizers: Mapping[str, Any]) -> None:
    for name, least in {"batch": 1, "tokens": 1, "micro_batches": 1, "new_tokens": 0}.items():
        value = asked[name]
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= MOST:
            raise ValueError(f"{name}={value!r}: must be a whole number, at least {least}, at most {MOST:,}")
    choices = {"dtype": DTYPES, "adapter_dtype": DTYPES, "attention": ATTENTION, "device": ("cuda", "cpu"),
               "quantize": (None, *QUANTIZE), "autocast": (None, "bf16", "fp16")}  # fmt: skip
    for name, known in choices.items():
        if asked[name] not in list(known):
            raise ValueError(f"{name}={asked[name]!r} is not one of {', '.join(map(repr, known))}")
    if not callable(asked["optimizer"]) and asked["optimizer"] not in optimizers:
        raise ValueError(f"optimizer={asked['optimizer']!r} is none of {', '.join(optimizers)}, nor a function from "
                         "parameters to an optimizer")  # fmt: skip


def _trains(model: nn.Module, trained: list[nn.Parameter], train: bool | None, new_tokens: int) -> bool:
    """Whether a training step is asked for; ValueError if it cannot be, or if a training step should write tokens."""
    training = bool(trained) if train is None else train
    if training and not trained:
        raise ValueError('nothing to train: name a method ("lora", "full", …), or train=False to run it only')
    if new_tokens and (training or kind_of(model) != "causal"):
        why = "it trains; train=False runs it" if training else "it does not write one token after the other"
        raise ValueError(f"new_tokens={new_tokens} is no question to this {type(model).__name__}: {why}")
    return training


def _fits_context(model: nn.Module, tokens: int) -> None:
    takes = inspect.signature(model.forward).parameters
    if "input_ids" not in takes and all(p.kind != p.VAR_KEYWORD for p in takes.values()):
        raise ValueError(f"{type(model).__name__} takes {', '.join(takes)}, and no input_ids: give inputs=, a batch by "
                         "the names of its arguments, and loss=, a function from its output to the loss")  # fmt: skip
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    learned = not any("rotary" in name.lower() for name, _ in model.named_modules())
    if limit and learned and tokens > limit:
        raise ValueError(f"{tokens} tokens are longer than the context of {type(model).__name__}, which has learned "
                         f"{limit} positions; take fewer tokens")  # fmt: skip


def _notes(model: nn.Module, tokens: int, optimizer: Any) -> list[str]:
    found, limit = [], getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if limit and tokens > limit:
        found.append(f"{tokens} tokens are longer than the context of {limit} that the model was made for")
    if getattr(optimizer, "paged_bytes", 0):
        paged = size(optimizer.paged_bytes)
        found.append(f"{paged} of optimizer states are paged: in CPU memory, and on the card only while they are used")
    return found


@contextmanager
def _in_words() -> Any:
    """What a model on the meta device can stumble over, as a ValueError that says what to do."""
    try:
        yield
    except Unknown as error:
        raise ValueError(f"{error}; measure it instead (pl.vram.measure), or predict with another method") from None
    except (NotImplementedError, TypeError) as error:
        said = str(error).split("\n")[0]
        if isinstance(error, TypeError) and "meta" not in said:
            raise
        raise ValueError(f"an operation of this model cannot run without numbers ({said}); measure it instead "
                         "(pl.vram.measure)") from error  # fmt: skip
    except (RuntimeError, OverflowError) as error:
        if any(word in str(error) for word in ("overflow", "too large", "exceeds")):
            raise ValueError(f"tensors of this size cannot exist ({str(error).splitlines()[0]}); take fewer rows or "
                             "tokens") from None  # fmt: skip
        if "Expected inputs of BF16 type" in str(error):  # of torch's grouped_mm, where it has no numbers
            raise ValueError("experts are predicted in bfloat16 alone (dtype='bfloat16', or the model so); measure "
                             "them in another dtype (pl.vram.measure)") from None  # fmt: skip
        raise


@contextmanager
def _few_words() -> Iterator[None]:
    """Without transformers' remarks on a model that is only a shape; notebooks would store them."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _name(thing: Any) -> Any:
    """How a model, method or optimizer is called in a line."""
    if thing is None or isinstance(thing, str):
        return thing
    if isinstance(thing, nn.Module):
        return type(thing).__name__
    return getattr(thing, "__name__", None) or getattr(thing, "name_or_path", None) or type(thing).__name__


def _resident() -> int:
    """Most memory this process has had so far, in bytes."""
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return psutil.Process().memory_info().peak_wset
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
