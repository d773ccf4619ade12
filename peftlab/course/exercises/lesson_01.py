"""Exercises of 01_why_peft: the ledger of memory, and the disk that ten tasks take."""

from ._frame import exercise

LESSON = "01_why_peft"


def _trainings() -> list[tuple]:
    """Full fine-tuning of 7B in mixed precision; the same with 4 million trained; a small float32 model."""
    return [
        (7_000_000_000, 7_000_000_000, 2, 2, 12),
        (7_004_194_304, 4_194_304, 2, 4, 8),
        (3_443_136, 36_864, 4, 4, 8),
    ]


@exercise(LESSON, "all parameters have a weight; only trained ones have a gradient and optimizer states", _trainings)
def training_bytes(n_params, trainable, weight_bytes, grad_bytes, optimizer_bytes):
    """Return {"weights": …, "gradients": …, "optimizer": …}, the bytes that training needs of each.

    n_params counts all parameters, trainable those that are trained; the *_bytes are per parameter.
    """
    return {
        "weights": n_params * weight_bytes,
        "gradients": trainable * grad_bytes,
        "optimizer": trainable * optimizer_bytes,
    }


def _ledger(weights, gradients, optimizer):
    return {"weights": weights, "gradients": gradients, "optimizer": optimizer}


@training_bytes.mistake("frozen parameters get no gradient: that is what freezing saves first")
def _gradients_for_all(n, t, w, g, o):
    return _ledger(n * w, n * g, t * o)


@training_bytes.mistake("the optimizer keeps states for trained parameters only; frozen ones are never stepped")
def _states_for_all(n, t, w, g, o):
    return _ledger(n * w, t * g, n * o)


@training_bytes.mistake("nothing is saved here: gradients and optimizer states exist for the trained parameters only")
def _everything_for_all(n, t, w, g, o):
    return _ledger(n * w, n * g, n * o)


@training_bytes.mistake("the frozen weights are in memory too: the forward pass needs every one of them")
def _frozen_weights_free(n, t, w, g, o):
    return _ledger(t * w, t * g, t * o)


@training_bytes.mistake("this is the sum; return the three parts, so that one sees where the memory goes")
def _sum_only(n, t, w, g, o):
    return n * w + t * (g + o)


@training_bytes.mistake("optimizer_bytes is already the sum of all states of a parameter: do not double it")
def _two_states(n, t, w, g, o):
    return _ledger(n * w, t * g, 2 * t * o)


def _stores() -> list[tuple]:
    return [(140, 0.1, 10), (14, 0.5, 3), (0.0138, 0.0007, 4)]


@exercise(LESSON, "1 − (what you store with adapters) / (what you store without)", _stores)
def storage_saved(base_gb, adapter_gb, tasks):
    """Return the fraction of the disk, between 0 and 1, that one base and an adapter per task save.

    The comparison is one full copy of the model, of base_gb, for each of the tasks.
    """
    return 1 - (base_gb + tasks * adapter_gb) / (tasks * base_gb)


@storage_saved.mistake("this is a percentage; the fraction is a hundredth of it")
def _percentage(base_gb, adapter_gb, tasks):
    return 100 * storage_saved.reference(base_gb, adapter_gb, tasks)


@storage_saved.mistake("the base must be stored too, once: adapters alone answer nothing")
def _base_forgotten(base_gb, adapter_gb, tasks):
    return 1 - adapter_gb / base_gb


@storage_saved.mistake("this is the part that is still stored; what is saved is the rest")
def _part_kept(base_gb, adapter_gb, tasks):
    return (base_gb + tasks * adapter_gb) / (tasks * base_gb)


@storage_saved.mistake("there is one adapter for each task, not one in all")
def _one_adapter(base_gb, adapter_gb, tasks):
    return 1 - (base_gb + adapter_gb) / (tasks * base_gb)


@storage_saved.mistake("these are gigabytes; divide by what is stored without adapters")
def _gigabytes(base_gb, adapter_gb, tasks):
    return tasks * base_gb - (base_gb + tasks * adapter_gb)


@storage_saved.mistake("the base is shared: it is stored once, not once for each task")
def _base_per_task(base_gb, adapter_gb, tasks):
    return 1 - tasks * (base_gb + adapter_gb) / (tasks * base_gb)
