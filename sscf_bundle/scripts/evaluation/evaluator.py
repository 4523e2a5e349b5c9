# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Evaluation over fixed scenarios: by slices, quickly, for validation, and by whole studies for the final scores."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.engines import Evaluator
from monai.engines.utils import IterationEvents
from monai.inferers import Inferer, SimpleInferer
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ..contrasts import (
    CONTRASTS,
    NUM_CONTRASTS,
    NUM_TUMOR_CLASSES,
    REGIONS,
    SCENARIOS,
    StudyError,
    region_masks,
    scenario_name,
)
from ..networks.sscf import network_input
from .metrics import fill_background
from .protocols import Protocol, StudyTruth, region_dice, volume_scores


def scenario_indices(names: Sequence[str] | None) -> list[int]:
    """Positions in ``SCENARIOS``.

    Args:
        names: as ``FLAIR+T2``; None means all 14.

    Raises:
        ValueError: for an unknown name.
    """
    known = {scenario_name(row): i for i, row in enumerate(SCENARIOS)}
    unknown = sorted(set(names or ()) - set(known))
    if unknown:
        raise ValueError(f"unknown scenario {', '.join(unknown)}: write one of {', '.join(known)}.")
    return list(known.values()) if names is None else [known[name] for name in names]


class ScenarioSlices(Dataset):
    """Every slice of a dataset under each of some scenarios.

    Args:
        dataset: a ``SliceDataset``.
        scenarios: names as ``FLAIR+T2``; None means all 14.

    Raises:
        ValueError: for an unknown scenario name.
    """

    def __init__(self, dataset: Dataset, scenarios: Sequence[str] | None = None) -> None:
        self.dataset = dataset
        self.scenarios = scenario_indices(scenarios)

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
    """Refuses to evaluate patients whose slices are in the network's bank; a network without a bank passes.

    Args:
        network: the evaluated network.
        patients: int64 patient hashes of the evaluated slices.
    """

    def __init__(self, network: nn.Module, patients: torch.Tensor) -> None:
        self.network, self.patients = network, patients

    def attach(self, engine: Engine) -> None:
        """Checks at ``STARTED``."""
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Raises: StudyError: if a patient is in the bank."""
        if not hasattr(self.network, "bank_present"):
            return
        filled = self.network.bank_present.any(dim=1).cpu()
        shared = set(self.network.bank_patient.cpu()[filled].tolist()) & set(self.patients.tolist())
        if shared:
            raise StudyError(
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


# --------------------------------------------------------------------------------------------------- whole studies
class StudyVolumes(Dataset):
    """Studies of a dataset of slices, each as one stack of its slices in z order.

    An item has ``study`` and ``patient`` (names), ``target`` (Z x K x H x W in [-1, 1]), ``label`` (Z x 1 x H x W),
    ``has_contrast`` (K), ``has_mask``, ``largest_tumor`` (Z boolean) and ``first`` (z of the first slice).

    Args:
        slices: a ``SliceDataset`` with the evaluated slices.
        items: datalist items of at least these studies, for the names of the patients.
        largest_tumor: a ``SliceDataset`` of the same studies with the slices of the choice ``largest_tumor``.
        dense: put background where a slice between two others is not in the dataset, so that neighbors in the stack
            are neighbors in the volume; for whole studies.
    """

    def __init__(
        self, slices: Dataset, items: Iterable[Mapping[str, Any]], largest_tumor: Dataset, dense: bool = True
    ) -> None:
        self.slices, self.dense = slices, dense
        patients = {item["study"]: item["patient"] for item in items}
        self.studies = list(slices.studies)
        self.patients = [patients[study] for study in self.studies]
        self.largest_tumor = torch.isin(slices.slice_ids, largest_tumor.slice_ids)
        self._positions: list[list[int]] = [[] for _ in self.studies]
        for position in slices.index[:, 1].argsort(stable=True).tolist():
            self._positions[int(slices.index[position, 0])].append(position)
        self.has_contrast = torch.stack([slices[positions[0]]["has_contrast"] for positions in self._positions])

    def __len__(self) -> int:
        return len(self.studies)

    def __getitem__(self, index: int) -> dict[str, Any]:
        positions = self._positions[index]
        items = [self.slices[position] for position in positions]
        target, label = (torch.stack([item[key] for item in items]) for key in ("target", "label"))
        largest_tumor, z = self.largest_tumor[positions], self.slices.index[positions, 1]
        if self.dense and int(z[-1] - z[0]) >= len(z):
            place, number = z - z[0], int(z[-1] - z[0]) + 1
            target = torch.full((number, *target.shape[1:]), -1.0).index_copy_(0, place, target)
            label = label.new_zeros((number, *label.shape[1:])).index_copy_(0, place, label)
            largest_tumor = largest_tumor.new_zeros(number).index_copy_(0, place, largest_tumor)
        return {
            "study": self.studies[index],
            "patient": self.patients[index],
            "target": target,
            "label": label,
            "has_contrast": items[0]["has_contrast"],
            "has_mask": items[0]["has_mask"],
            "largest_tumor": largest_tumor,
            "first": int(z[0]),
        }


class StudyScenarios:
    """Every study under every scenario whose contrasts it has; a study is read and moved to the device once.

    Each process of a distributed run takes its share of the studies.

    Args:
        volumes: the studies.
        scenarios: names as ``FLAIR+T2``; None means all 14.
        device: where the tensors go.
        num_workers: processes that read ahead.
        rank: number of this process.
        world_size: number of processes.

    Raises:
        ValueError: for an unknown scenario name.
        StudyError: if there is nothing to evaluate, or less than a study for each process.
    """

    def __init__(
        self,
        volumes: StudyVolumes,
        scenarios: Sequence[str] | None = None,
        device: torch.device | str = "cpu",
        num_workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.device, rows = torch.device(device), torch.tensor(SCENARIOS, dtype=torch.bool)
        chosen = scenario_indices(scenarios)
        studies = list(range(rank, len(volumes), world_size))
        self._scenarios = [[s for s in chosen if bool(volumes.has_contrast[i][rows[s]].all())] for i in studies]
        if len(volumes) < world_size:
            raise StudyError(f"{len(volumes)} studies cannot be shared by {world_size} processes: start fewer.")
        if not any(self._scenarios):
            raise StudyError("No evaluated study has the contrasts of a scenario: give complete studies, or others.")
        self._loader = DataLoader(
            volumes,
            batch_size=None,
            sampler=studies,
            num_workers=num_workers,
            pin_memory=self.device.type == "cuda",
        )

    def __len__(self) -> int:
        return sum(len(scenarios) for scenarios in self._scenarios)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yields: an item of ``StudyVolumes`` with ``scenario``, position in ``SCENARIOS``."""
        for scenarios, item in zip(self._scenarios, self._loader, strict=True):
            item = {k: v.to(self.device, non_blocking=True) if torch.is_tensor(v) else v for k, v in item.items()}
            for scenario in scenarios:
                yield {**item, "scenario": scenario}


class ScenarioEvaluator(Evaluator):
    """Fills in whole studies; ``state.output`` is the item of ``StudyScenarios`` with ``pred`` (Z x 7 x H x W) added.

    A network with ``for_scenario`` (as ``SSCFNet``) computes only what the scenario needs.

    Attributes: ``seconds``, time of the network by study.

    Args:
        device: of the network and the studies.
        val_data_loader: ``StudyScenarios``.
        network: one tensor to one tensor, as ``SSCFNet``.
        batch_size: slices in one call of the network.
        inferer: how the network is called.
        val_handlers: Ignite handlers.
        amp: run with autocast.
        amp_dtype: dtype of autocast.
    """

    def __init__(
        self,
        device: torch.device | str,
        val_data_loader: Iterable,
        network: nn.Module,
        batch_size: int = 16,
        inferer: Inferer | None = None,
        val_handlers: Sequence | None = None,
        amp: bool = False,
        amp_dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__(
            device=device, val_data_loader=val_data_loader, val_handlers=val_handlers, amp=amp, decollate=False
        )
        self.network, self.batch_size, self.inferer = network, batch_size, inferer or SimpleInferer()
        self.amp_dtype = amp_dtype
        self.seconds: Counter[str] = Counter()

    def _iteration(self, engine: ScenarioEvaluator, batchdata: dict[str, Any]) -> dict[str, Any]:  # type: ignore[override]
        target, device = batchdata["target"], engine.state.device
        given = [bool(value) for value in SCENARIOS[batchdata["scenario"]]]
        available = torch.tensor(given, device=device).expand(len(target), -1)
        started = time.perf_counter()
        with self.mode(self.network), torch.autocast(device.type, dtype=self.amp_dtype, enabled=self.amp):
            network = self.network.for_scenario(given) if hasattr(self.network, "for_scenario") else self.network
            parts = [
                self.inferer(network_input(images, known), network.eval()).float()
                for images, known in zip(target.split(self.batch_size), available.split(self.batch_size), strict=True)
            ]
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.seconds[batchdata["study"]] += time.perf_counter() - started
        engine.state.output = {**batchdata, "available": available, "pred": torch.cat(parts)}
        engine.fire_event(IterationEvents.FORWARD_COMPLETED)
        engine.fire_event(IterationEvents.MODEL_COMPLETED)
        return engine.state.output


class StudyScores:
    """Scores every filled-in study, and what reference_methods give of the same input, under several protocols.

    All methods get the same background: outside the union of the available brains. Intensities are clipped to the
    range of the cache.

    Attributes: ``rows``, one dict for each value with the columns of ``statistics.COLUMNS``; ``seconds``, time of
    scoring by study; ``regions``, number of studies with WT, TC and ET; ``studies``, names of the scored studies.

    Args:
        protocols: see ``protocols``.
        reference_methods: functions of contrasts and availability by their names, see ``reference_methods``.
    """

    def __init__(self, protocols: Sequence[Protocol], reference_methods: Mapping[str, Callable] | None = None) -> None:
        self.protocols, self.reference_methods = list(protocols), dict(reference_methods or {})
        self._forget()

    def _forget(self, *_: Any) -> None:
        self.rows: list[dict[str, Any]] = []
        self.seconds: Counter[str] = Counter()
        self.regions: Counter[str] = Counter()
        self.studies: list[str] = []

    def attach(self, engine: Engine) -> None:
        """Starts anew at ``STARTED``, scores after every iteration."""
        engine.add_event_handler(Events.STARTED, self._forget)
        engine.add_event_handler(Events.ITERATION_COMPLETED, lambda e: self.update(e.state.output))

    @torch.no_grad()
    def update(self, output: Mapping[str, Any]) -> None:
        """Takes in one study under one scenario; the scenarios of a study follow each other.

        Args:
            output: as ``ScenarioEvaluator`` gives it.
        """
        started = time.perf_counter()
        if not self.studies or self.studies[-1] != output["study"]:
            self._start(output)
        target, available, pred = output["target"], output["available"], output["pred"]
        scenario = SCENARIOS[output["scenario"]]
        exists = output["has_contrast"].tolist()
        missing = [k for k in range(NUM_CONTRASTS) if exists[k] and not scenario[k]]
        known = torch.where(available[..., None, None], target, -1.0)
        keys: list[tuple[str, str, str, str, str]] = []
        values: list[torch.Tensor] = []
        for method, fill in {"network": lambda *_: pred[:, :NUM_CONTRASTS], **self.reference_methods}.items():
            images = fill_background(fill(known, available)[:, missing], known, available)
            predictions = ((images + 1) / 2).clamp(0, 1)
            for position, k in enumerate(missing):
                scores = volume_scores(self.protocols, k, predictions[:, position], sum(scenario))
                for (protocol, region, score), value in scores.items():
                    keys.append((CONTRASTS[k], method, protocol, region, score))
                    values.append(value)
        probabilities = pred[:, NUM_CONTRASTS:]
        if bool(output["has_mask"]) and bool(probabilities.any()):  # without a segmentation branch they are 0
            for name, value in zip(REGIONS, region_dice(probabilities, output["label"]), strict=True):
                keys.append((name, "network", "segmentation", "whole", "dice"))
                values.append(value)
        if values:
            common = {
                "study": output["study"],
                "patient": output["patient"],
                "scenario": scenario_name(scenario),
                "available": sum(scenario),
            }
            numbers = torch.stack([value.double() for value in values]).tolist()  # the one synchronization
            names = ("of", "method", "protocol", "region", "score")
            for key, number in zip(keys, numbers, strict=True):
                if math.isfinite(number):
                    self.rows.append({**common, **dict(zip(names, key, strict=True)), "value": number})
        self.seconds[output["study"]] += time.perf_counter() - started

    def _start(self, output: Mapping[str, Any]) -> None:
        self.studies.append(output["study"])
        target, label = output["target"], output["label"]
        target = torch.where(output["has_contrast"][:, None, None], target, -1.0)
        brain = (target > -1).any(dim=1)
        tumor = (label[:, 0] > 0) & output["has_mask"]
        truth = StudyTruth(((target + 1) / 2).clamp(0, 1), brain, tumor, output["largest_tumor"], output["first"])
        for protocol in self.protocols:
            protocol.start(truth)
        if bool(output["has_mask"]):
            classes = torch.cat([label == k + 1 for k in range(NUM_TUMOR_CLASSES)], dim=1)
            present = region_masks(classes).transpose(0, 1).flatten(1).any(dim=1).tolist()
            self.regions.update(name for name, found in zip(REGIONS, present, strict=True) if found)
