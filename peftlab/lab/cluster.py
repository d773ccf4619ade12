"""The runs of an experiment through Ray, on this machine or many: an executor like those of concurrent.futures.

Ray is optional: pip install 'peftlab[ray]'. On a cluster, this package and the experiment's own file must lie at the
same paths on all machines, or on a file system that they share; what was prepared there is read there. Rows are written
by the one process that started the grid.
Source: Moritz et al. 2018, "Ray: A Distributed Framework for Emerging AI Applications", arXiv:1712.05889.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from functools import cache
from types import ModuleType
from typing import Any


class RayExecutor(Executor):
    """Calls functions of modules in Ray's workers, each with one core.

    address: of a running cluster ("auto": the one of this machine; "ray://…"); None starts one here, with `jobs`
    workers, that ends with the executor. `cores`: how many the cluster has.
    Raises ImportError: ray is not installed.
    """

    def __init__(self, address: str | None = None, jobs: int | None = None):
        try:
            import ray
        except ImportError as error:
            raise ImportError("engine='ray' needs the library ray: pip install 'peftlab[ray]'") from error
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # by default, a cluster that it starts reports its use
        self._ray, self._ours = ray, not ray.is_initialized()
        if self._ours and address is None:
            ray.init("local", num_cpus=jobs, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
        elif self._ours:
            ray.init(address, log_to_driver=False)
        self.cores = int(ray.cluster_resources().get("CPU", 1))
        # A run that dies is named in the end and taken up by the next start; at once, it may only die again.
        self._call = ray.remote(num_cpus=1, max_retries=0)(_call)
        self._open: dict[Future, Any] = {}

    def submit(self, function: Callable, /, *arguments: Any, **named: Any) -> Future:
        """The function goes by its name, as it does to a new process: what it uses of its module is imported there."""
        home = sys.modules[function.__module__]
        file = getattr(home, "__file__", None) if function.__module__ == "__main__" else None
        if "<" in function.__qualname__ or (function.__module__ == "__main__" and file is None):
            raise ValueError(f"{function.__qualname__} cannot be found by other processes: put it into a .py file, "
                             "outside of other functions")  # fmt: skip
        where = (sys.path, function.__module__, file, function.__qualname__)
        reference = self._call.remote(*where, arguments, named)
        future: Future = Future()
        future.set_running_or_notify_cancel()
        self._open[future] = reference

        def done(answer: Future) -> None:
            self._open.pop(future, None)
            if (error := answer.exception()) is None:
                future.set_result(answer.result())
            else:  # what the function raised, without Ray's wrapping
                future.set_exception(getattr(error, "cause", None) or error)

        reference.future().add_done_callback(done)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Runs in flight are waited for or, with cancel_futures, ended."""
        for future, reference in list(self._open.items()):
            if cancel_futures:
                self._ray.cancel(reference, force=True)
            elif wait:
                future.exception()
        if self._ours and self._ray.is_initialized():
            self._ray.shutdown()


def _call(path: Sequence[str], module: str, file: str | None, name: str, arguments: tuple, named: dict) -> Any:
    """In a worker: import what the caller has imported, and call the function of that name."""
    sys.path.extend(folder for folder in path if folder not in sys.path)
    found: Any = importlib.import_module(module) if file is None else _program(file)
    for part in name.split("."):
        found = getattr(found, part)
    return found(*arguments, **named)


@cache
def _program(file: str) -> ModuleType:
    """A program as a module that is not `__main__`, under the name that multiprocessing gives it too."""
    spec = importlib.util.spec_from_file_location("__mp_main__", file)
    assert spec is not None and spec.loader is not None, file
    module = importlib.util.module_from_spec(spec)
    sys.modules["__mp_main__"] = module
    spec.loader.exec_module(module)
    return module
