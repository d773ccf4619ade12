"""One thread, no network, no GPU, the same seed for each test: set before torch is imported."""

import os
import random
import socket
import sys

os.environ.update(
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
    CUDA_VISIBLE_DEVICES=os.environ.get("PEFTLAB_TEST_GPUS", ""),  # a test on a GPU is asked for
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
)
os.environ.pop("PEFTLAB_BASE", None)

import hypothesis  # noqa: E402
import pytest  # noqa: E402

# The same examples in each run, and no time limit per example: a busy machine must not fail a law.
hypothesis.settings.register_profile("peftlab", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("peftlab")


@pytest.fixture(autouse=True)
def fixed_seed():
    """Each test starts from seed 0, whatever ran before it and in whatever order."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(autouse=True)
def no_windows(monkeypatch):
    """For the time of a unit test only: a notebook's kernel that inherited this would draw nothing inline."""
    monkeypatch.setenv("MPLBACKEND", "agg")


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """A connection that would leave this machine raises, so that no test passes only where there is a network."""
    connect = socket.socket.connect

    def only_local(self, address):
        local = self.family not in (socket.AF_INET, socket.AF_INET6) or address[0] in ("127.0.0.1", "::1", "localhost")
        if not local:
            raise OSError(f"a test tried to reach {address[0]}: tests have no network")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", only_local)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """A test that is marked as a comparison with HF PEFT has made it, or it fails: see witness.py."""
    marks = list(pyfuncitem.iter_markers("reference"))
    if not marks:
        return (yield)
    from witness import needs_trace, watching

    with watching(trace=any(needs_trace(*mark.args) for mark in marks)) as seen:
        done = yield
    for mark in marks:
        seen.confirm(*mark.args)
    return done
