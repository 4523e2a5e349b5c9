# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Shares of the parts of a training iteration and of inference: measured time, and counted work with a roofline."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from ignite.engine import Events
from monai.engines.utils import IterationEvents
from torch import nn

from scripts.networks.sscf import ScenarioNetwork, SSCFNet
from scripts.training.trainer import SSCFTrainer, SynthesisTrainer

from .inference import filled_network, network_case, scenario
from .measure import H100, HOST, PartClock, Parts, Work, WorkCounter, precision, work_of_batch
from .training import build_trainer

#: Contrasts that are missing where inference is profiled.
MISSING = 2


def watch_network(parts: Parts, net: nn.Module) -> None:
    """Names the parts of both branches; those of another network stay together."""
    if not isinstance(net, SSCFNet):
        return
    parts.watch_method(net, "encode", "encoders, pass 1", "encoders, pass 2")
    parts.watch_method(net, "segment", "fusion of the contrasts")
    parts.watch_method(net, "decode_mask", "fusion of the contrasts")
    parts.watch_module(net.citim, "CITIM")
    parts.watch_module(net.citim.head, "CITIM")
    parts.watch_method(net, "compile_bank", "CITIM")
    parts.watch_module(net.segmentation_decoder, "segmentation decoder")
    parts.watch_method(net, "synthesize", "stacking and retrieval")
    for scale, ccp in enumerate(net.ccp, start=1):
        parts.watch_module(ccp, f"CCP, scale {scale}")
        parts.watch_method(ccp, "predict", f"CCP, scale {scale}")
    for decoder in net.synthesis_decoders:
        parts.watch_module(decoder, "synthesis decoders")


def watch_scenario(parts: Parts, network: ScenarioNetwork) -> None:
    """Names the parts of the network for one scenario."""
    watch_network(parts, network.net)
    parts.watch_method(network, "encode", "encoders, pass 1", "encoders, pass 2")
    parts.watch_method(network, "segment", "fusion of the contrasts")
    parts.watch_method(network, "predict", "stacking and retrieval")


def watch_trainer(parts: Parts, trainer: SynthesisTrainer) -> None:
    """Names the parts of an iteration; autograd runs as one."""
    watch_network(parts, trainer.training_step.net)
    for event, label in (
        (Events.ITERATION_STARTED, "rest of the forward pass"),
        (IterationEvents.FORWARD_COMPLETED, "losses"),
        (IterationEvents.LOSS_COMPLETED, "backward"),
        (IterationEvents.BACKWARD_COMPLETED, "discriminators"),
    ):
        trainer.add_event_handler(event, partial(parts.become, label))
    parts.watch_method(trainer, "draw_batch_scenarios", HOST)
    parts.watch_method(trainer.loss, "sampled_ctdl", "dependency loss")
    parts.watch_method(trainer.optimizer, "step", "optimizers")
    if trainer.discriminators is not None:
        parts.watch_module(trainer.discriminators, "discriminators")
        parts.watch_method(trainer.discriminator_optimizer, "step", "optimizers")
    parts.watch_method(trainer.average, "update", "moving average")
    if isinstance(trainer, SSCFTrainer):
        parts.watch_method(trainer.bank, "enqueue", "bank")


def training_parts(device: str = "cpu", warmup: int = 2, **case: Any) -> dict[str, float]:
    """Seconds of each part of one training iteration.

    Args:
        device: where to train.
        warmup: iterations before the measured one.
        case: of ``build_trainer``.
    """
    trainer, _ = build_trainer(device, iterations=warmup + 1, **case)
    parts = Parts()
    clock = PartClock(parts, torch.device(device))
    trainer.add_event_handler(Events.ITERATION_STARTED(once=warmup + 1), clock.start)
    watch_trainer(parts, trainer)
    seconds: dict[str, float] = {}
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=warmup + 1), lambda: seconds.update(clock.stop()))
    trainer.run()
    return seconds


def inference_parts(
    device: str = "cpu",
    width: str = "base",
    batch_size: int = 1,
    dtype: str = "float32",
    bank_size: int = 300,
    image_size: int = 192,
    warmup: int = 2,
) -> dict[str, float]:
    """Seconds of each part of one call of ``SSCFNet.for_scenario`` with two contrasts missing."""
    where = torch.device(device)
    net = filled_network(where, width, bank_size).for_scenario(scenario(MISSING))
    image = network_case(batch_size, image_size, MISSING, where)
    parts = Parts()
    watch_scenario(parts, net)
    clock = PartClock(parts, where)
    with torch.inference_mode(), precision(dtype, where):
        for _ in range(warmup):
            net(image)
        clock.start()
        net(image)
        return clock.stop()


#: Batches that are run to count the work of a larger one.
COUNTED_BATCHES = (2, 4)


def training_work(batch_size: int, sizes: Sequence[int] = COUNTED_BATCHES, **case: Any) -> dict[str, Work]:
    """Work of each part of one training iteration.

    Args:
        batch_size: slices in a batch.
        sizes: of the batches that are run, even.
        case: of ``build_trainer``.
    """
    counted = []
    for size in sizes:
        trainer, _ = build_trainer("cpu", iterations=2, batch_size=size, **case)
        parts = Parts()
        watch_trainer(parts, trainer)
        counter = WorkCounter(parts)
        # the first iteration makes the state of the optimizers, and the end of the epoch is no part of an iteration
        trainer.add_event_handler(Events.ITERATION_STARTED(once=2), counter.__enter__)
        trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), partial(counter.__exit__, None, None, None))
        # half of the samples lack a contrast, as on average, so that the work is affine in the size of the batch
        half = torch.tensor([[True, True, False, False], [False, False, True, True]]).repeat(size // 2, 1)
        with patch("scripts.training.trainer.draw_scenarios", return_value=half):
            trainer.run()
        counted.append(counter.operations)
    return work_of_batch(counted, sizes, batch_size)


#: Trainings whose steps are counted beside each other: overlays, and their bank.
STEPS: dict[str, dict[str, Any]] = {
    "train.json": {},
    "train.json, no discriminators": {"beta": [100.0, 30.0, 5.0, 50.0, 0.0]},
    # without the perceptual term, whose AlexNet may have to be downloaded
    "recipe, 3_full_size": {
        "overlays": ("recipe/common", "recipe/3_full_size"),
        "perceptual_weight": 0.0,
        "bank_size": 100,
        "sizes": (4, 6),
    },
    "plain U-Net": {"overlays": ("baselines/unet",)},
    "plain U-Net, no discriminators": {"overlays": ("baselines/unet",), "beta": [100.0, 30.0, 5.0, 50.0, 0.0]},
}


def step_work(image_sizes: Sequence[int], batch_size: int, **case: Any) -> list[dict]:
    """Work of one iteration of each of ``STEPS``, a row for each and size.

    Args:
        image_sizes: height and width of a slice.
        batch_size: slices in a batch.
        case: of ``build_trainer``.
    """
    rows = []
    for size in image_sizes:
        for name, changes in STEPS.items():
            work = training_work(batch_size, image_size=size, **{**case, **changes})
            total = Work(*map(sum, zip(*work.values(), strict=True)))
            row = {"step": name, "image_size": size, "GFLOP/sample": total.flops / 1e9 / batch_size}
            rows.append({**row, "MB/sample": total.traffic / 1e6 / batch_size, "kernels": total.kernels})
    return rows


def inference_work(
    width: str = "base", batch_size: int = 16, dtype: str = "bfloat16", bank_size: int = 300, image_size: int = 192
) -> dict[str, Work]:
    """Work of each part of one call of ``SSCFNet.for_scenario`` with two contrasts missing."""
    device = torch.device("cpu")
    net = filled_network(device, width, bank_size).for_scenario(scenario(MISSING))
    parts = Parts()
    watch_scenario(parts, net)
    counted = []
    for size in COUNTED_BATCHES:
        image = network_case(size, image_size, MISSING, device)
        counter = WorkCounter(parts)
        # under inference_mode a dispatch mode would see composite operations
        with torch.no_grad(), precision(dtype, device), counter:
            net(image)
        counted.append(counter.operations)
    return work_of_batch(counted, COUNTED_BATCHES, batch_size)


def time_rows(seconds: dict[str, float]) -> list[dict[str, Any]]:
    """Parts with their times and shares, the longest first."""
    total = sum(seconds.values())
    ordered = sorted(seconds.items(), key=lambda item: -item[1])
    rows = [{"part": label, "ms": 1000 * value, "share %": 100 * value / total} for label, value in ordered]
    return [*rows, {"part": "all", "ms": 1000 * total, "share %": 100.0}]


def work_rows(work: dict[str, Work], batch_size: int) -> list[dict[str, Any]]:
    """Parts with their work for each sample and the estimate of a whole batch, the longest first."""
    total = Work(*map(sum, zip(*work.values(), strict=True)))
    ordered = [*sorted(work.items(), key=lambda item: -item[1].seconds), ("all", total)]
    return [
        {
            "part": label,
            "GFLOP/sample": one.flops / 1e9 / batch_size,
            "MB/sample": one.traffic / 1e6 / batch_size,
            "kernels": one.kernels,
            f"estimated ms on {H100.name}": 1000 * one.seconds,
            "share %": 100 * one.seconds / total.seconds,
        }
        for label, one in ordered
    ]
