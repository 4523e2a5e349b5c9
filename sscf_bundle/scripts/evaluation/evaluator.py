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

from collections.abc import Mapping, Sequence
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from monai.engines import Evaluator
from monai.engines.utils import IterationEvents
from monai.inferers import Inferer, SimpleInferer
from torch import nn
from torch.utils.data import Dataset

from ..checked_settings import refuse_unknown
from ..contrasts import CONTRAST_KEYS, SCENARIOS, StudyError, scenario_name
from ..data.slices import SliceDataset
from ..inference.trust import patients_in_bank
from ..networks.availability import network_input


def scenario_indices(names: str | Sequence[str] | None) -> list[int]:
    """Positions in ``SCENARIOS`` of names as ``FLAIR+T2``; None means all 14, an unknown one is a ``StudyError``."""
    known = {scenario_name(row): i for i, row in enumerate(SCENARIOS)}
    if names is None:
        return list(known.values())
    names = names if isinstance(names, list | tuple) else [str(names)]
    refuse_unknown("scenarios", names, list(known))
    return [known[name] for name in names]


class ScenarioSlices(Dataset):
    """Every slice of a ``SliceDataset`` under each of some scenarios, see ``scenario_indices``."""

    def __init__(self, data: SliceDataset, scenarios: Sequence[str] | None = None) -> None:
        self.data = data
        self.scenarios = scenario_indices(scenarios)

    def __len__(self) -> int:
        return len(self.data) * len(self.scenarios)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """The slice's item with ``image`` (8 x H x W, network input), ``available`` (K) and ``scenario``.

        ``unclipped`` is that of ``SliceDataset`` or, where it gives none, ``target``.
        """
        item = dict(self.data[index // len(self.scenarios)])
        scenario = self.scenarios[index % len(self.scenarios)]
        available = torch.tensor(SCENARIOS[scenario], dtype=torch.bool) & item["has_contrast"]
        image = network_input(item["target"].unsqueeze(0), available.unsqueeze(0)).squeeze(0)
        item.setdefault("unclipped", item["target"])
        return {**item, "image": image, "available": available, "scenario": torch.tensor(scenario)}


class UnseenPatients:
    """Refuses at ``STARTED`` to evaluate patients (int64 hashes of all slices) that are in the network's bank."""

    def __init__(self, network: nn.Module, patients: torch.Tensor) -> None:
        self.network, self.patients = network, patients

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Engine) -> None:
        shared = patients_in_bank(self.network) & set(self.patients.tolist())
        if shared:
            raise StudyError(
                f"{len(shared)} of the evaluated patients are in the memory bank of the weights, so the scores would "
                "be too good: evaluate the split of the training (its output_dir or split_file)."
            )


class SliceEvaluator(Evaluator):
    """Runs a network over ``ScenarioSlices``; ``state.output`` is the batch with ``pred`` (B x 7 x H x W) added.

    ``options`` are those of ``monai.engines.Evaluator``.
    """

    def __init__(self, network: nn.Module, inferer: Inferer | None = None, **options: Any) -> None:
        super().__init__(**options, non_blocking=True, decollate=False)
        self.network, self.inferer = network, inferer or SimpleInferer()

    def _iteration(self, engine: SliceEvaluator, batchdata: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        device = engine.state.device
        batch = {k: v.to(device, non_blocking=True) for k, v in batchdata.items()}
        with self.mode(self.network), torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.amp):
            batch["pred"] = self.inferer(batch["image"], self.network).float()
        engine.state.output = batch
        engine.fire_event(IterationEvents.FORWARD_COMPLETED)
        engine.fire_event(IterationEvents.MODEL_COMPLETED)
        return batch


def list_scenarios(
    items: Sequence[Mapping[str, Any]], scenarios: Sequence[str] | None = None, studies: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """Datalist for inference: every study under every scenario whose contrasts it has, without its other files.

    Args:
        items: of complete or incomplete studies.
        scenarios: names as ``FLAIR+T2``; None means all 14.
        studies: names of those that are taken; None takes all.

    Returns:
        Items with ``study``, ``patient``, the paths that the scenario gives, ``scenario`` (position in ``SCENARIOS``)
        and ``complete``, the item as it was. The scenarios of a study follow each other.

    Raises:
        StudyError: if there is nothing to evaluate, less than a study for each process, or an unknown scenario.
    """
    chosen = scenario_indices(scenarios)
    taken = [item for item in items if studies is None or item["study"] in studies]
    world_size = idist.get_world_size()
    if len(taken) < world_size:
        raise StudyError(f"{len(taken)} studies cannot be shared by {world_size} processes: start fewer.")
    datalist = []
    for item in taken[idist.get_rank() :: world_size]:
        for scenario in chosen:
            paths = {key: item.get(key) for key, given in zip(CONTRAST_KEYS, SCENARIOS[scenario], strict=True) if given}
            if all(paths.values()):
                names = {key: item[key] for key in ("study", "patient")}
                datalist.append({**names, **paths, "scenario": scenario, "complete": dict(item)})
    if not datalist:
        raise StudyError("No evaluated study has the contrasts of a scenario: give complete studies, or others.")
    return datalist


class StudySlices(Dataset):
    """Studies of a ``SliceDataset``, each as one stack of its slices in z order.

    An item has ``target`` (Z x K x H x W in [-1, 1]), ``unclipped`` where the slices do, ``label`` (Z x 1 x H x W),
    ``has_contrast`` (K) and ``has_mask``.
    """

    def __init__(self, slices: SliceDataset) -> None:
        self.slices, self.studies = slices, list(slices.studies)
        order = slices.index[:, 1].argsort(stable=True)
        self.positions: list[list[int]] = [[] for _ in self.studies]
        for position, study in zip(order.tolist(), slices.index[order, 0].tolist(), strict=True):
            self.positions[study].append(position)

    def __len__(self) -> int:
        return len(self.studies)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        items = [self.slices[position] for position in self.positions[index]]
        keys = [key for key in ("target", "unclipped", "label") if key in items[0]]
        stacks: dict[str, torch.Tensor] = {key: torch.stack([item[key] for item in items]) for key in keys}
        return stacks | {key: items[0][key] for key in ("has_contrast", "has_mask")}


class SliceScenarios(Dataset):
    """Slices of studies under scenarios, as ``StudyEvaluator`` takes them: on the network's grid, and without files.

    An item is that of the datalist with ``image`` (8 x H x W x Z, network input of the slices that it is shown) and
    ``slices``, the item of ``StudySlices`` with ``shown`` (positions of these).

    Args:
        slices: a ``SliceDataset``, what reference methods may read.
        shown: a ``SliceDataset`` of the same studies with the slices that are filled in and scored.
        datalist: of ``list_scenarios``; what is in no slice is left out.
    """

    def __init__(self, slices: SliceDataset, shown: SliceDataset, datalist: Sequence[Mapping[str, Any]]) -> None:
        self.stacks, self._shown = StudySlices(slices), torch.isin(slices.slice_ids, shown.slice_ids)
        self._index = {study: k for k, study in enumerate(self.stacks.studies)}
        self.datalist = [item for item in datalist if item["study"] in self._index]
        self._last: tuple[int, dict[str, torch.Tensor]] | None = None

    def __len__(self) -> int:
        return len(self.datalist)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.datalist[index]
        k = self._index[item["study"]]
        if self._last is None or self._last[0] != k:  # the scenarios of a study follow each other
            self._last = k, self.stacks[k]
        stack, shown = self._last[1], self._shown[self.stacks.positions[k]].nonzero().flatten()
        available = torch.tensor(SCENARIOS[item["scenario"]], dtype=torch.bool).expand(len(shown), -1)
        image = network_input(stack["target"][shown], available).permute(1, 2, 3, 0)
        return {**item, "image": image, "slices": {**stack, "shown": shown}}
