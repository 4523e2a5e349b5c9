# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Inference: the network alone against a plain U-Net, by bank size, and whole studies from files to files."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from ignite.engine import Events
from monai.bundle import ConfigWorkflow

from scripts.contrasts import CONTRAST_KEYS, NUM_CONTRASTS
from scripts.demo.phantom import incomplete_study, write_phantom_cohort
from scripts.inference.inferer import BrainSliceInferer
from scripts.networks.availability import network_input
from scripts.networks.memory_bank import BankEntries
from scripts.networks.plain_unet import PlainUNet
from scripts.networks.sscf import SSCFNet
from scripts.networks.weights import save_weights

from .measure import CONFIGS, median_seconds, precision, synchronize

#: Contrasts that are left out first, second and third.
LEFT_OUT = ("t1ce", "flair", "t2")


def random_entries(net: SSCFNet, size: int, cells: int = 144) -> BankEntries:
    """Finite entries for all slots of a bank, each of another patient."""
    k, c, classes = NUM_CONTRASTS, net.channels[-1], net.num_classes
    number = torch.arange(1, size + 1)
    return BankEntries(
        key=torch.randn(size, k, net.bank_key.shape[2]),
        mean=torch.randn(size, k, net.feature_channels),
        std=torch.rand(size, k, net.feature_channels) + 0.5,
        prototype=torch.randn(size, k, c, classes),
        class_map=torch.randn(size, k, classes, cells).softmax(dim=2),
        label=torch.zeros(size, cells, dtype=torch.uint8),
        present=torch.ones(size, k, dtype=torch.bool),
        has_mask=torch.ones(size, dtype=torch.bool),
        patient=number,
        slice_id=number,
    )


def filled_network(device: torch.device, width: str | Sequence[int], bank_size: int) -> SSCFNet:
    """A network with random weights and a full compiled bank of random entries, in eval mode."""
    torch.manual_seed(0)
    net = SSCFNet(2, width, bank_size).eval()
    with torch.no_grad():
        net.load_bank(net.compile_bank(random_entries(net, bank_size)))
    return net.to(device)


def scenario(missing: int) -> tuple[bool, ...]:
    """Availability of FLAIR, T1, T1ce, T2 where so many contrasts are missing."""
    return tuple(key not in LEFT_OUT[:missing] for key in CONTRAST_KEYS)


def network_case(batch_size: int, image_size: int, missing: int, device: torch.device) -> torch.Tensor:
    """Network input of noise, of which so many contrasts are missing."""
    target = torch.rand(batch_size, NUM_CONTRASTS, image_size, image_size) * 2 - 1
    available = torch.tensor(scenario(missing)).expand(batch_size, -1)
    return network_input(target, available).to(device)


def network_speed(
    device: str = "cpu",
    width: str | Sequence[int] = "base",
    batches: Sequence[int] = (1, 8),
    missing: Sequence[int] = (1, 2, 3),
    dtype: str = "float32",
    compiled: bool = False,
    channels_last: bool = False,
    bank_size: int = 300,
    image_size: int = 192,
    min_time: float = 0.5,
) -> list[dict[str, Any]]:
    """Slices per second of the plain U-Net, of ``SSCFNet.forward`` and of ``SSCFNet.for_scenario``.

    Returns:
        One row for each network and batch: ``network``, ``batch``, ``missing``, ``slices_per_second``,
        ``of_u_net`` (the share of the plain U-Net's speed).
    """
    where = torch.device(device)
    net = filled_network(where, width, bank_size)
    networks: list[tuple[str, int, torch.nn.Module]] = [
        ("plain U-Net", 2, PlainUNet(2, width).eval().to(where)),
        ("forward", 2, net),
        *(("for_scenario", count, net.for_scenario(scenario(count)).eval()) for count in missing),
    ]
    rows: list[dict[str, Any]] = []
    for batch in batches:
        plain = 0.0
        for name, count, module in networks:
            image = network_case(batch, image_size, count, where)
            if channels_last:
                module, image = (x.to(memory_format=torch.channels_last) for x in (module, image))
            called = torch.compile(module, dynamic=False) if compiled else module
            with torch.inference_mode(), precision(dtype, where):
                speed = batch / median_seconds(lambda called=called, image=image: called(image), min_time, where)
            plain = plain or speed
            rows.append(
                {
                    "network": name,
                    "missing": count,
                    "batch": batch,
                    "slices_per_second": speed,
                    "of_u_net": speed / plain,
                }
            )
    return rows


def bank_size_ratio(
    device: str = "cpu",
    width: str | Sequence[int] = "base",
    batch: int = 8,
    dtype: str = "float32",
    sizes: Sequence[int] = (10, 1000),
    image_size: int = 192,
    min_time: float = 0.5,
) -> list[dict[str, Any]]:
    """Time of ``SSCFNet.forward`` by bank size, relative to the first one.

    Returns:
        One row for each size: ``bank_size``, ``batch``, ``milliseconds``, ``relative``.
    """
    where = torch.device(device)
    rows: list[dict[str, Any]] = []
    image = network_case(batch, image_size, 2, where)
    for size in sizes:
        net = filled_network(where, width, size)
        with torch.inference_mode(), precision(dtype, where):
            seconds = median_seconds(lambda net=net: net(image), min_time, where)
        first = rows[0]["milliseconds"] if rows else 1000 * seconds
        rows.append(
            {"bank_size": size, "batch": batch, "milliseconds": 1000 * seconds, "relative": 1000 * seconds / first}
        )
    return rows


class TimedInferer(BrainSliceInferer):
    """``BrainSliceInferer`` that notes of each study how long it takes and how many slices have brain."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seconds: list[float] = []
        self.slices: list[int] = []

    def __call__(self, inputs: torch.Tensor, network: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        has_brain = (inputs[:, :NUM_CONTRASTS] > -1).flatten(1, 3).any(dim=1)
        self.slices.append(int(has_brain.sum()))
        synchronize(inputs.device)
        begin = time.perf_counter()
        out = super().__call__(inputs, network, *args, **kwargs)
        synchronize(inputs.device)
        self.seconds.append(time.perf_counter() - begin)
        return out


def study_speed(
    device: str = "cpu",
    width: str | Sequence[int] = "base",
    studies: int = 3,
    bank_size: int = 300,
    image_size: int = 192,
    shape: Sequence[int] = (240, 240, 155),
    phantoms: str | None = None,
    **overrides: Any,
) -> dict[str, Any]:
    """Seconds for a phantom study without FLAIR and T1ce, from files to written NIfTI, as ``inference.json`` does it.

    Args:
        device: of the network.
        width: of the network.
        studies: how many; the first one warms up and is told apart.
        bank_size: of the network.
        image_size: of the network.
        shape: voxels of a study.
        phantoms: folder that keeps the phantom cohort between runs; None makes it anew.
        overrides: of other ids of the config.

    Returns:
        ``first_study``, ``study`` (median of the others), ``network`` (the part of that in the slice-wise inferer),
        ``slices`` (number that the network saw).
    """
    if studies < 2:
        raise ValueError(f"the first study only warms up, so at least 2 are needed, got {studies}.")
    logging.getLogger("scripts").setLevel(logging.WARNING)
    with TemporaryDirectory() as folder:
        root = Path(folder)
        cohort = Path(phantoms) if phantoms else root / "cohort"
        write_phantom_cohort(cohort, studies, seed=0, shape=tuple(shape))
        for study in sorted(path for path in cohort.iterdir() if path.is_dir())[:studies]:
            incomplete_study(study, root / "in", LEFT_OUT[:2])
        settings = {"preprocessing": {"image_size": image_size, "spacing": 1.0, "scaling": "brain"}}
        save_weights(root / "model.pt", filled_network(torch.device("cpu"), width, bank_size), settings)
        workflow = ConfigWorkflow(
            config_file=str(CONFIGS / "inference.json"),
            workflow_type="infer",
            logging_file=False,
            bundle_root=str(CONFIGS.parent),
            ckpt_path=str(root / "model.pt"),
            dataset_dir=str(root / "in"),
            output_dir=str(root / "out"),
            device=device,
            handlers=[],
            **{"inferer#_target_": "benchmarks.inference.TimedInferer"},
            **overrides,
        )
        workflow.initialize()
        evaluator = workflow.parser.get_parsed_content("evaluator")
        marks: list[float] = []
        evaluator.add_event_handler(Events.STARTED, lambda: marks.append(time.perf_counter()))
        evaluator.add_event_handler(Events.ITERATION_COMPLETED, lambda: marks.append(time.perf_counter()))
        workflow.run()
        inferer = evaluator.inferer
    whole = torch.tensor(marks, dtype=torch.float64).diff()
    network = torch.tensor(inferer.seconds[1:], dtype=torch.float64)
    return {
        "studies": studies,
        "first_study": float(whole[0]),
        "study": float(whole[1:].quantile(0.5)),
        "network": float(network.quantile(0.5)),
        "slices": int(torch.tensor(inferer.slices[1:]).median()),
    }
