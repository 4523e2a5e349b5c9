# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Evaluation over fixed scenarios: every slice under every listed scenario, and the engine that runs it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.engines import Evaluator
from monai.engines.utils import IterationEvents
from monai.inferers import Inferer, SimpleInferer
from torch import nn
from torch.utils.data import Dataset

from .contrasts import SCENARIOS, scenario_name
from .network import SSCFNet, network_input


class ScenarioSlices(Dataset):
    """Every slice of a dataset under each of some scenarios.

    Args:
        dataset: a ``SliceDataset``.
        scenarios: names as ``FLAIR+T2``; None means all 14.

    Raises:
        ValueError: for an unknown scenario name.
    """

    def __init__(self, dataset: Dataset, scenarios: Sequence[str] | None = None) -> None:
        names = {scenario_name(row): i for i, row in enumerate(SCENARIOS)}
        unknown = sorted(set(scenarios or ()) - set(names))
        if unknown:
            raise ValueError(f"unknown scenario {', '.join(unknown)}: write one of {', '.join(names)}.")
        self.dataset = dataset
        self.scenarios = list(range(len(SCENARIOS))) if scenarios is None else [names[s] for s in scenarios]

    def __len__(self) -> int:
        return len(self.dataset) * len(self.scenarios)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Returns: the slice's item with ``image`` (8 x H x W, network input), ``available`` (K) and ``scenario``."""
        item = dict(self.dataset[index // len(self.scenarios)])
        scenario = self.scenarios[index % len(self.scenarios)]
        available = torch.tensor(SCENARIOS[scenario], dtype=torch.bool) & item["has_contrast"]
        image = network_input(item["target"].unsqueeze(0), available.unsqueeze(0)).squeeze(0)
        return {**item, "image": image, "available": available, "scenario": torch.tensor(scenario)}


class UnseenPatients:
    """Refuses to evaluate patients whose slices are in the network's bank.

    Args:
        network: the evaluated network.
        patients: int64 patient hashes of the evaluated slices.
    """

    def __init__(self, network: SSCFNet, patients: torch.Tensor) -> None:
        self.network, self.patients = network, patients

    def attach(self, engine: Engine) -> None:
        """Checks at ``STARTED``."""
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Raises: SystemExit: if a patient is in the bank."""
        filled = self.network.bank_present.any(dim=1).cpu()
        shared = set(self.network.bank_patient.cpu()[filled].tolist()) & set(self.patients.tolist())
        if shared:
            raise SystemExit(
                f"{len(shared)} of the evaluated patients are in the memory bank of the weights, so the scores would "
                "be too good: evaluate the split of the training (its output_dir or split_file)."
            )


class SliceEvaluator(Evaluator):
    """Runs a network over ``ScenarioSlices``; ``state.output`` is the batch with ``pred`` (B x 7 x H x W) added.

    Args:
        device: of the network and the batches.
        val_data_loader: batches of ``ScenarioSlices``.
        network: one tensor to one tensor, as ``SSCFNet``.
        inferer: how the network is called.
        key_val_metric: Ignite metric that decides what is best.
        additional_metrics: further Ignite metrics.
        val_handlers: Ignite handlers.
        amp: run with autocast.
        amp_dtype: dtype of autocast.
    """

    def __init__(
        self,
        device: torch.device | str,
        val_data_loader: Any,
        network: nn.Module,
        inferer: Inferer | None = None,
        key_val_metric: dict | None = None,
        additional_metrics: dict | None = None,
        val_handlers: Sequence | None = None,
        amp: bool = False,
        amp_dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__(
            device=device,
            val_data_loader=val_data_loader,
            non_blocking=True,
            key_val_metric=key_val_metric,
            additional_metrics=additional_metrics,
            val_handlers=val_handlers,
            amp=amp,
            decollate=False,
        )
        self.network, self.inferer, self.amp_dtype = network, inferer or SimpleInferer(), amp_dtype

    def _iteration(self, engine: SliceEvaluator, batchdata: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:  # type: ignore[override]
        device = engine.state.device
        batch = {k: v.to(device, non_blocking=True) for k, v in batchdata.items()}
        with self.mode(self.network), torch.autocast(device.type, dtype=self.amp_dtype, enabled=self.amp):
            batch["pred"] = self.inferer(batch["image"], self.network).float()
        engine.state.output = batch
        engine.fire_event(IterationEvents.FORWARD_COMPLETED)
        engine.fire_event(IterationEvents.MODEL_COMPLETED)
        return batch
