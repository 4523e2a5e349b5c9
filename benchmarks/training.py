# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""A training iteration as the trainer does it, built from ``configs/train.json``, with slices held in memory."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from ignite.engine import Events
from monai.bundle import ConfigParser

from scripts.contrasts import NUM_CONTRASTS
from scripts.training.trainer import SSCFTrainer

from .measure import CONFIGS, PeakMemory, synchronize


class MemoryBatches:
    """The same few batches again and again, in host memory: the loader of a user whose data never makes it wait.

    Args:
        batch_size: slices in a batch.
        size: height and width of a slice.
        length: batches of an epoch.
        pin: page-locked memory, as the config's own loader gives on a GPU.
    """

    def __init__(self, batch_size: int, size: Sequence[int], length: int, pin: bool = False) -> None:
        self.length = length
        self.batches = [synthetic_batch(batch_size, size, first=k * batch_size) for k in range(4)]
        if pin:
            self.batches = [{name: tensor.pin_memory() for name, tensor in batch.items()} for batch in self.batches]

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return (self.batches[k % len(self.batches)] for k in range(self.length))


def synthetic_batch(batch_size: int, size: Sequence[int], first: int = 0) -> dict[str, torch.Tensor]:
    """A batch like that of the slice dataset: a disk of noise for a brain, nested squares for a tumor.

    Args:
        batch_size: slices.
        size: height and width.
        first: number of the first patient.
    """
    draw = torch.Generator().manual_seed(first)
    rows, columns = (torch.linspace(-1, 1, extent) for extent in size)
    brain = rows[:, None] ** 2 + columns[None] ** 2 < 0.8
    target = torch.rand((batch_size, NUM_CONTRASTS, *size), generator=draw) * 2 - 1
    radius = torch.maximum((rows[:, None] - 0.2).abs(), (columns[None] + 0.1).abs())
    label = torch.zeros(tuple(size), dtype=torch.uint8)
    for value, extent in ((1, 0.3), (2, 0.2), (3, 0.1)):
        label[radius < extent] = value
    identity = torch.arange(first, first + batch_size, dtype=torch.int64)
    return {
        "target": torch.where(brain, target, -1.0),
        "label": label.expand(batch_size, 1, *size).clone(),
        "has_contrast": torch.ones(batch_size, NUM_CONTRASTS, dtype=torch.bool),
        "has_mask": torch.ones(batch_size, dtype=torch.bool),
        "patient": identity,
        "slice_id": identity + 10**6,
    }


def build_trainer(
    device: str,
    width: str | Sequence[int],
    batch_size: int,
    dtype: str = "float32",
    compiled: bool = False,
    channels_last: bool = False,
    bank_size: int = 300,
    image_size: int = 192,
    iterations: int = 1,
    overlays: Sequence[str] = (),
    **overrides: Any,
) -> tuple[SSCFTrainer, ConfigParser]:
    """The trainer of ``configs/train.json`` on synthetic slices and without handlers.

    Args:
        device: where to train.
        width: the config's ``channels``.
        batch_size: of the config.
        dtype: ``float32``, or the half precision that autocast uses.
        compiled: the config's ``compile``.
        channels_last: memory format of the networks.
        bank_size: of the config.
        image_size: of the config.
        iterations: of the only epoch.
        overlays: names of configs that are laid over the config; what is given here is above them.
        overrides: of other ids of the config.

    Returns:
        The trainer, and the parser that built it.
    """
    settings = {
        "bundle_root": str(CONFIGS.parent),
        "device": device,
        "channels": width,
        "batch_size": batch_size,
        "amp": dtype != "float32",
        "compile": compiled,
        "bank_size": bank_size,
        "image_size": image_size,
        "max_epochs": 1,
        "train#trainer#train_handlers": [],
        "train#dataloader": {
            "_target_": "benchmarks.training.MemoryBatches",
            "batch_size": "@batch_size",
            "size": "$[@image_size] * 2",
            "length": iterations,
            "pin": torch.device(device).type == "cuda",
        },
        **overrides,
    }
    parser = ConfigParser()
    parser.read_config([str(CONFIGS / f"{name}.json") for name in ("train", *overlays)])
    if overlays:  # what an overlay starts from are weights that are not there
        settings["network"] = {"_target_": "copy.copy", "x": "$@network_def.to(@device)"}
    if "channels_last" in parser:
        settings["channels_last"] = channels_last
    parser.update(settings)
    if channels_last and "channels_last" not in parser:
        for name in ("network", "discriminators"):
            parser.get_parsed_content(name).to(memory_format=torch.channels_last)
    return parser.get_parsed_content("train#trainer"), parser


def training_speed(
    device: str = "cpu", warmup: int = 2, repeats: int = 3, block: int = 1, **case: Any
) -> dict[str, Any]:
    """Samples per second and peak memory of whole training iterations.

    Args:
        device: where to train.
        warmup: iterations before the first timed one.
        repeats: timed blocks, of which the median counts.
        block: iterations of a block; a GPU is waited for only between blocks.
        case: of ``build_trainer``.

    Returns:
        ``samples_per_second``, ``milliseconds`` (of an iteration), ``peak_gib``, ``first_seconds`` (of the first
        iteration, where compilation happens).
    """
    where = torch.device(device)
    memory = PeakMemory(where)
    trainer, _ = build_trainer(device, iterations=warmup + repeats * block, **case)
    marks: list[float] = []

    @trainer.on(Events.ITERATION_STARTED(once=1))
    def begin() -> None:
        synchronize(where)
        marks.append(time.perf_counter())

    @trainer.on(Events.ITERATION_COMPLETED)
    def mark() -> None:
        done = trainer.state.iteration
        if done == 1 or (done >= warmup and (done - warmup) % block == 0):
            synchronize(where)
            marks.append(time.perf_counter())

    trainer.run()
    timed = torch.tensor(marks[-repeats - 1 :], dtype=torch.float64).diff() / block
    seconds = float(timed.median())
    return {
        "samples_per_second": case["batch_size"] / seconds,
        "milliseconds": 1000 * seconds,
        "peak_gib": memory.gib(),
        "first_seconds": marks[1] - marks[0],
    }
