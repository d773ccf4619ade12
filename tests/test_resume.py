"""A killed run goes on with the very losses of the run that was not killed; a wrong or broken checkpoint is refused."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

from peftlab import checkpoint
from peftlab.log import Log
from peftlab.train import train, train_steps

FILE = checkpoint.FILE
RUN = {"steps": 12, "batch_size": 4, "lr": 1e-2, "checkpoint_every": 3, "valid_every": 2, "patience": 50, "seed": 3}


def tiny(seed=0, width=32) -> LlamaForCausalLM:
    """Half frozen, with dropout, so that the state of every random generator matters."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64, hidden_size=width, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32, attention_dropout=0.2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    model.model.layers[1].requires_grad_(True)
    return model


def token_rows(n=10, seed=1) -> list[dict]:
    draw = np.random.default_rng(seed)
    return [{"input_ids": draw.integers(0, 64, int(draw.integers(3, 12))).tolist()} for _ in range(n)]


def run(model, folder=None, **settings) -> Log:
    own = settings.pop("on_step", None)
    return train(
        model, token_rows(), valid=token_rows(3, 2), checkpoint=folder, progress=False, on_step=own, **RUN | settings
    )


def numbers(log: Log) -> tuple:
    """Everything but the times."""
    return log.losses, log.learning_rates, log.grad_norms, log.tokens, log.valid_losses


def parameters(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a, b) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def steps_in(folder: Path) -> int:
    if not (folder / FILE).exists():
        return 0
    with safe_open(folder / FILE, framework="pt") as file:
        return len(json.loads(file.metadata()["state"])["log"]["losses"])


@pytest.fixture(scope="module")
def uninterrupted():
    model = tiny()
    return run(model), parameters(model)


@pytest.mark.parametrize("moment", ["between two steps", "while it writes a checkpoint"])
def test_kill_9(moment, tmp_path, uninterrupted):
    child = subprocess.Popen(
        [sys.executable, __file__, str(tmp_path), moment],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    try:
        patience = time.monotonic() + 120
        while child.poll() is None and steps_in(tmp_path) < 6 and time.monotonic() < patience:
            time.sleep(0.05)
        if moment == "between two steps":
            child.send_signal(signal.SIGKILL)  # it waits for this after step 8
        assert child.wait(60) == -signal.SIGKILL
    finally:
        child.kill()
    assert steps_in(tmp_path) == 6, "the newest complete checkpoint"
    if moment != "between two steps":
        assert len(list(tmp_path.iterdir())) == 2, "the killed process left a temporary file"

    model, (expected, end) = tiny(), uninterrupted
    torch.manual_seed(99)  # a new process has other generator states
    log = run(model, tmp_path)
    assert numbers(log) == numbers(expected), "bit for bit"
    assert same(parameters(model), end)
    assert [path.name for path in tmp_path.iterdir()] == [FILE], "nothing of the killed process is left"


def test_a_checkpoint_changes_nothing_and_a_finished_run_is_not_repeated(tmp_path, uninterrupted):
    model, (expected, end) = tiny(), uninterrupted
    log = run(model, tmp_path)
    assert numbers(log) == numbers(expected)
    other = tiny()
    began = []
    again = run(other, tmp_path, on_step=began.append)
    assert again == log and len(began) == 1, "times too: the log is read, not made again"
    assert same(parameters(other), end)


@pytest.mark.parametrize("stop", [1, 4, 6])
def test_leaving_the_loop_writes_a_checkpoint(stop, tmp_path, uninterrupted):
    model = tiny()
    steps = train_steps(model, token_rows(), valid=token_rows(3, 2), checkpoint=tmp_path, **RUN)
    for _ in range(stop):
        next(steps)
    steps.close()
    assert steps_in(tmp_path) == stop
    assert numbers(run(tiny(), tmp_path)) == numbers(uninterrupted[0])


@pytest.mark.parametrize("where", ["forward", "callback", "optimizer"])
def test_ctrl_c(where, tmp_path, uninterrupted):
    """Between updates the last step is saved; inside one, whose halves do not fit, the last checkpoint stays."""
    model = tiny()
    calls = []

    def interrupt(*args):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt

    class Adam(torch.optim.AdamW):
        def step(self, closure=None):
            if where == "optimizer":
                interrupt()
            return super().step(closure)

    def optimizer(parameters):
        return Adam(parameters, lr=RUN["lr"], weight_decay=0.0, fused=True)

    on_step = interrupt if where == "callback" else None
    forward = model.model.layers[0].register_forward_pre_hook(
        lambda module, args: interrupt() if where == "forward" and model.training else None
    )
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path, on_step=on_step, optimizer=optimizer)
    forward.remove()
    assert not model.training and all(p.grad is None for p in model.parameters())
    assert steps_in(tmp_path) == {"forward": 4, "callback": 5, "optimizer": 3}[where]
    where = "resumed"
    assert numbers(run(tiny(), tmp_path, optimizer=optimizer)) == numbers(uninterrupted[0])


@pytest.mark.parametrize("make", ["sgd", "adamw", "adagrad", "two groups"])
def test_the_state_of_other_optimizers(make, tmp_path):
    def optimizer(parameters):
        if make == "two groups":
            return torch.optim.AdamW([{"params": parameters[:3], "lr": 1e-2}, {"params": parameters[3:], "lr": 3e-3}])
        kinds = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW, "adagrad": torch.optim.Adagrad}
        extra = {"momentum": 0.9} if make == "sgd" else {}
        return kinds[make](parameters, lr=1e-2, **extra)

    expected = run(tiny(), optimizer=optimizer)
    steps = train_steps(tiny(), token_rows(), valid=token_rows(3, 2), checkpoint=tmp_path, optimizer=optimizer, **RUN)
    for _ in range(5):
        next(steps)
    steps.close()
    assert numbers(run(tiny(), tmp_path, optimizer=optimizer)) == numbers(expected)


def test_the_best_parameters_survive_a_restart(tmp_path):
    """Early stopping over a restart: rates so high that the first validation stays the best one."""
    settings = {"lr": 0.5, "patience": 3, "checkpoint_every": 1, "steps": 40}
    model = tiny()
    expected = run(model, **settings)
    assert len(expected) < 40 and expected.best_step < len(expected)
    steps = train_steps(tiny(), token_rows(), valid=token_rows(3, 2), checkpoint=tmp_path, **RUN | settings)
    for _ in range(len(expected) - 1):
        next(steps)
    steps.close()
    resumed = tiny()
    assert numbers(run(resumed, tmp_path, **settings)) == numbers(expected)
    assert same(parameters(resumed), parameters(model))
    finished = tiny()
    assert numbers(run(finished, tmp_path, **settings)) == numbers(expected)
    assert same(parameters(finished), parameters(model))


@pytest.fixture(scope="module")
def half_done(tmp_path_factory) -> bytes:
    folder = tmp_path_factory.mktemp("half")
    steps = train_steps(tiny(), token_rows(), valid=token_rows(3, 2), checkpoint=folder, **RUN)
    for _ in range(3):
        next(steps)
    steps.close()
    return (folder / FILE).read_bytes()


@pytest.mark.parametrize(
    "settings, named",
    [({"lr": 2e-2}, "lr: 0.01 there, 0.02 here"), ({"seed": 4}, "seed: 3 there, 4 here"), ({"steps": 20}, "steps"),
     ({"optimizer": lambda p: torch.optim.SGD(p, lr=1e-2)}, "optimizer: AdamW there, SGD here"),
     ({"schedule": "linear"}, "schedule"), ({"batch_size": 5}, "batch_size"), ({"warmup": 0.5}, "warmup")],
)  # fmt: skip
def test_other_settings_are_refused(settings, named, tmp_path, half_done):
    refused(tiny(), tmp_path, half_done, f"belongs to another run.*{named}.*resume=False", **settings)


def test_another_model_is_refused(tmp_path, half_done):
    refused(tiny(width=16), tmp_path, half_done, r"layers\.1.*q_proj.*there.*here")
    refused(tiny(seed=5), tmp_path, half_done, "frozen weights")
    more = tiny()
    more.lm_head.requires_grad_(True)
    refused(more, tmp_path, half_done, "lm_head.weight: absent there")


def test_another_data_set_is_refused(tmp_path, half_done):
    (tmp_path / FILE).write_bytes(half_done)
    with pytest.raises(ValueError, match="data set: .* there, .* here"):
        train(tiny(), token_rows(seed=8), valid=token_rows(3, 2), checkpoint=tmp_path, progress=False, **RUN)


@pytest.mark.parametrize("damage", ["cut", "bit", "state", "empty", "other"])
def test_damaged_files_are_refused(damage, tmp_path, half_done):
    content = bytearray(half_done)
    if damage == "cut":
        del content[len(content) // 2 :]
    elif damage == "bit":
        content[-5] ^= 1
    elif damage == "state":  # a digit of the log, in the header
        at = content.index(b'\\"losses\\": [') + len(b'\\"losses\\": [') + 3
        content[at] = ord("0") + (content[at] - ord("0") + 1) % 10
    elif damage == "empty":
        content.clear()
    else:
        content = bytearray(b"\x80\x04\x95 not safetensors at all")
    refused(tiny(), tmp_path, bytes(content), f"{FILE} is damaged or not a checkpoint.*resume=False")


def refused(model, folder, content, match, **settings):
    (folder / FILE).write_bytes(content)
    before = parameters(model)
    with pytest.raises(ValueError, match=match):
        run(model, folder, **settings)
    assert same(parameters(model), before), "the model is as it was"
    assert (folder / FILE).read_bytes() == content, "the checkpoint is as it was"


def test_resume_false_starts_again(tmp_path, half_done, uninterrupted):
    (tmp_path / FILE).write_bytes(half_done)
    assert numbers(run(tiny(), tmp_path, resume=False)) == numbers(uninterrupted[0])
    assert steps_in(tmp_path) == 12


def test_a_full_disk(tmp_path, monkeypatch, uninterrupted):
    """The second checkpoint does not fit: the first is intact, the folder is named, and the run can go on later."""
    model, synced = tiny(), []
    real = os.fsync

    def full(handle):
        synced.append(1)
        if steps_in(tmp_path) >= 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=f"no checkpoint written to .*{tmp_path.name}.*disk is full.*intact") as error:
        run(model, tmp_path)
    assert error.value.errno == errno.ENOSPC and len(synced) >= 2
    assert [path.name for path in tmp_path.iterdir()] == [FILE] and steps_in(tmp_path) == 3
    monkeypatch.undo()
    assert numbers(run(tiny(), tmp_path)) == numbers(uninterrupted[0])


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError):
        run(tiny(), tmp_path / "file")


def test_only_safetensors_and_json(half_done, tmp_path):
    (tmp_path / FILE).write_bytes(half_done)
    tensors, state = checkpoint.load(tmp_path)
    assert {name.split(".")[0] for name in tensors} == {"trained", "best", "optimizer"}
    assert not any("layers.0." in name for name in tensors), "the frozen base is not copied into checkpoints"
    assert state["run"]["model"] == "LlamaForCausalLM" and len(state["log"]["losses"]) == 3


def main(folder: str, moment: str) -> None:
    """The process that is killed."""
    torch.set_num_threads(1)

    def wait(log):
        if len(log) == 8 and moment == "between two steps":
            time.sleep(300)

    real = os.replace

    def replace(source, target):
        if steps_in(Path(folder)) == 6 and moment != "between two steps":
            os.kill(os.getpid(), signal.SIGKILL)  # the new file is complete, but not yet in its place
        real(source, target)

    os.replace = replace
    run(tiny(), folder, on_step=wait)


if __name__ == "__main__":
    main(*sys.argv[1:])
