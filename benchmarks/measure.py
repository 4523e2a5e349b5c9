# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""What all benchmarks share: facts of the machine, time, memory, parts of a step, counted work, Markdown tables."""

from __future__ import annotations

import functools
import gc
import itertools
import os
import platform
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import monai
import pandas as pd
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import flop_registry

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIGS = REPOSITORY / "sscf_bundle" / "configs"


# ----------------------------------------------------------------------------------------------------- the machine
def facts(device: torch.device) -> dict[str, Any]:
    """What a figure depends on: device, processor, threads, versions, commit (None where git does not know)."""
    known: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "monai": monai.__version__,
        "commit": _git("rev-parse", "--short", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain")),
    }
    if device.type == "cuda":
        known |= {
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "device_memory_gib": round(torch.cuda.get_device_properties(device).total_memory / 2**30, 1),
        }
    return known


def _processor() -> str:
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text().splitlines() if listed.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def synchronize(device: torch.device) -> None:
    """Waits for all work of a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ------------------------------------------------------------------------------------------------- time and memory
def median_seconds(function: Callable[[], Any], min_time: float, device: torch.device) -> float:
    """Median time of a call after two calls to warm up, in seconds.

    Args:
        function: what is timed.
        min_time: calls are repeated for at least this many seconds.
        device: a GPU is waited for before and after each block of calls.
    """
    for _ in range(2 if device.type == "cuda" else 1):
        function()
    synchronize(device)
    timer = Timer("function()", globals={"function": function}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=min_time).median


def precision(dtype: str, device: torch.device) -> Any:
    """Autocast to a half precision, or nothing for ``float32``."""
    if dtype == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, dtype))


class PeakMemory:
    """Largest memory since the object was made.

    On a GPU the tensors that torch holds; on the CPU the growth of the process's resident memory, which is never given
    back, so that a fresh process is needed for each figure.

    Args:
        device: whose memory.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self.start = self._resident("VmRSS")

    def gib(self) -> float | None:
        """Peak in GiB; None where the system does not tell."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        peak = self._resident("VmHWM")
        return None if peak is None or self.start is None else (peak - self.start) / 2**30

    @staticmethod
    def _resident(field: str) -> int | None:
        status = Path("/proc/self/status")
        lines = status.read_text().splitlines() if status.is_file() else []
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)


# ------------------------------------------------------------------------------------------------- parts of a step
#: Part of what runs on the host whatever the device is, which starts no kernel.
HOST = "host"


class Parts:
    """Knows which part of a step is running.

    Parts nest; the time or work of a part is without that of the parts inside it. ``on_change`` is called before every
    change, while ``label`` is still the part that has been running.
    """

    def __init__(self) -> None:
        self.label = "rest"
        self.on_change: Callable[[], None] = lambda: None
        self._outer: list[str] = []

    def become(self, label: str) -> None:
        """The present part ends and ``label`` begins."""
        self.on_change()
        self.label = label

    def enter(self, label: str) -> None:
        """``label`` begins inside the present part."""
        self._outer.append(self.label)
        self.become(label)

    def leave(self) -> None:
        """The part that was entered last ends."""
        self.become(self._outer.pop())

    def watch_module(self, module: nn.Module, label: str) -> None:
        """Makes every call of a module a part."""
        module.register_forward_pre_hook(lambda *_: self.enter(label))
        module.register_forward_hook(lambda *_: self.leave(), always_call=True)

    def watch_method(self, owner: Any, name: str, *labels: str) -> None:
        """Makes every call of a method of an object a part; successive calls take the labels in turn."""
        original, turn = getattr(owner, name), itertools.cycle(labels)

        @functools.wraps(original)
        def watched(*args: Any, **kwargs: Any) -> Any:
            self.enter(next(turn))
            try:
                return original(*args, **kwargs)
            finally:
                self.leave()

        setattr(owner, name, watched)


class PartClock:
    """Time of each part; on a GPU between events on its stream, so that nothing waits while it runs.

    Args:
        parts: what is running.
        device: where it runs.
    """

    def __init__(self, parts: Parts, device: torch.device) -> None:
        self.parts, self.device = parts, device
        self._marks: list[tuple[str, Any]] = []

    def start(self) -> None:
        """Forgets all earlier time and begins."""
        synchronize(self.device)
        self._marks = []
        self._mark()
        self.parts.on_change = self._mark

    def stop(self) -> dict[str, float]:
        """Ends, and gives seconds for each part."""
        self._mark()
        self.parts.on_change = lambda: None
        synchronize(self.device)
        seconds: dict[str, float] = defaultdict(float)
        for (_, before), (label, after) in itertools.pairwise(self._marks):
            gpu = self.device.type == "cuda"
            seconds[label] += before.elapsed_time(after) / 1000 if gpu else after - before
        return dict(seconds)

    def _mark(self) -> None:
        now: Any = time.perf_counter()
        if self.device.type == "cuda":
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        self._marks.append((self.parts.label, now))


class Gpu(NamedTuple):
    """Published peak rates of a GPU for the roofline.

    Args:
        name: of the GPU.
        flops: dense bfloat16 operations per second.
        bandwidth: of its memory, bytes per second.
    """

    name: str
    flops: float
    bandwidth: float


H100 = Gpu("H100 SXM", 989e12, 3.35e12)


class Operation(NamedTuple):
    """One counted operation.

    Args:
        part: that it belongs to.
        name: of the ATen operation.
        flops: multiplications and additions; those of convolutions and matrix products alone are counted.
        traffic: bytes that it reads and writes.
    """

    part: str
    name: str
    flops: int
    traffic: int


class Work(NamedTuple):
    """Counted work of one part.

    Args:
        flops: sum over operations.
        traffic: sum over operations: what is read and written when nothing is fused.
        kernels: number of operations that compute; views are none.
        seconds: sum over operations of the longer of computing and memory time.
    """

    flops: float
    traffic: float
    kernels: int
    seconds: float


def work_of_batch(
    counted: Sequence[Sequence[Operation]], sizes: Sequence[int], batch_size: int, gpu: Gpu = H100
) -> dict[str, Work]:
    """Work of each part for a large batch from two small ones.

    The operations of an iteration are the same for every batch, and flops and traffic of each are affine in its size:
    weights are read once, slices one by one.

    Args:
        counted: operations of the two batches.
        sizes: slices in them.
        batch_size: slices in the batch that is asked for.
        gpu: rates for ``Work.seconds``.

    Raises:
        RuntimeError: if the two batches did not run the same operations.
    """
    first, second = counted
    if [one.name for one in first] != [one.name for one in second]:
        raise RuntimeError("batches of different size run different operations, so a larger one cannot be told.")
    step = (batch_size - sizes[0]) / (sizes[1] - sizes[0])
    work: dict[str, Work] = {}
    for small, large in zip(first, second, strict=True):
        flops = small.flops + step * (large.flops - small.flops)
        traffic = small.traffic + step * (large.traffic - small.traffic)
        seconds = max(flops / gpu.flops, traffic / gpu.bandwidth)
        before = work.get(small.part, Work(0, 0, 0, 0))
        work[small.part] = Work(*(a + b for a, b in zip(before, (flops, traffic, 1, seconds), strict=True)))
    return work


class WorkCounter(TorchDispatchMode):
    """Lists the operations that run, with the part they belong to.

    Every ATen operation that is no view counts as one kernel that reads its inputs and writes its outputs, those of the
    part ``HOST`` excepted. That is the traffic without fusion, and without what a kernel reads twice.

    Args:
        parts: what is running.
    """

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.parts = parts
        self.operations: list[Operation] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func._overloadpacket
        if func.is_view or func.namespace != "aten" or packet in _FREE or self.parts.label == HOST:
            return out
        # a fill writes only
        traffic = _tensor_bytes(out) + (0 if packet in _WRITE_ONLY else _tensor_bytes((args, kwargs)))
        if traffic:
            flops = flop_registry[packet](*args, **kwargs, out_val=out) if packet in flop_registry else 0
            self.operations.append(Operation(self.parts.label, str(packet), flops, traffic))
        return out


_aten = torch.ops.aten
#: Allocate or look at tensors, and start no kernel.
_FREE = {
    *(_aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty, _aten.new_empty_strided, _aten.detach),
    *(_aten.lift_fresh, _aten._unsafe_view, _aten._reshape_alias, _aten.resize_, _aten.set_, _aten.is_same_size),
    _aten._local_scalar_dense,
}
_WRITE_ONLY = {
    *(_aten.zeros, _aten.zeros_like, _aten.new_zeros, _aten.ones, _aten.ones_like, _aten.new_ones, _aten.arange),
    *(_aten.full, _aten.full_like, _aten.new_full, _aten.fill_, _aten.zero_, _aten.scalar_tensor),
}


def _tensor_bytes(tree: Any) -> int:
    if isinstance(tree, torch.Tensor):
        return tree.numel() * tree.element_size()
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, list | tuple):
        return 0
    return sum(_tensor_bytes(item) for item in tree)


# ------------------------------------------------------------------------------------------------------------ tables
def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Rows with the same keys as a Markdown table."""
    texts = [{name: _text(value) for name, value in row.items()} for row in rows]
    return pd.DataFrame(texts).to_markdown(index=False, disable_numparse=True)


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return str(value)
