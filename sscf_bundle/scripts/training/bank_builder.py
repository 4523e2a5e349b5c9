# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Builds the frozen bank of a network: chosen training slices, recomputed with the final weights in eval mode."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from torch.utils.data import Subset

from ..data.randomness import hash_uniform
from ..data.slices import SliceDataset
from ..networks.blocks import scale_statistics
from ..networks.memory_bank import BankEntries, CompiledBank, MemoryBank, usable_entries
from ..networks.sscf import SSCFNet
from .step import make_entries
from .trainer import BATCH_KEYS, draw_scenarios


def bank_slices(dataset: SliceDataset, size: int, seed: int = 0) -> Subset:
    """Chooses at most ``size`` slices: every patient in turn gives one, in random order, until the bank is full."""
    ids, patients = dataset.slice_ids, dataset.patients
    order = hash_uniform(ids, seed, 0, "bank").squeeze(1).argsort()
    seen: dict[int, int] = {}
    rounds = []
    for i in order.tolist():
        patient = int(patients[i])
        seen[patient] = seen.get(patient, -1) + 1
        rounds.append(seen[patient])
    ranked = order[torch.tensor(rounds).argsort(stable=True)]
    return Subset(dataset, ranked[:size].tolist())


@torch.no_grad()
def freeze_bank(network: SSCFNet, batches: Iterable[dict[str, Any]], device: torch.device | str, seed: int = 0) -> int:
    """Fills the bank of a network from complete training slices and stores it, compiled, in its state.

    Two passes: the first makes G and W_l of all entries, the second makes keys, mu and sigma with the mask that the
    network predicts under a scenario drawn by seed, when it reads the other patients' part of that bank.

    Args:
        network: set to eval mode; its stored bank is replaced.
        batches: of ``SliceDataset`` items, iterated twice, not more than ``network.bank_size`` in all.
        device: where to compute.
        seed: of the scenarios.

    Returns:
        Number of entries; a slice with a non-finite value gives none.

    Raises:
        ValueError: if there are no slices, or more than the bank holds.
    """
    network.eval()
    bank: CompiledBank | None = None
    for _ in range(2):
        made: list[BankEntries] = []
        for batch in batches:
            data = {k: batch[k].to(device) for k in BATCH_KEYS}
            target = data["target"]
            if bank is None:
                first = second = network.encode(target, torch.zeros_like(target[:, : network.num_tumor_classes]))
                statistics = scale_statistics(first)
            else:
                available = draw_scenarios(data["slice_id"], data["has_contrast"], seed, 0)
                allowed = bank.present.any(dim=1) & (bank.patient != data["patient"].unsqueeze(1))
                out = network.run_branches(target, available, bank, allowed)
                first, second, statistics = out.first, out.second, out.statistics
            metadata = (data[key] for key in ("label", "has_contrast", "has_mask", "patient", "slice_id"))
            made.append(make_entries(network, first[-1], second, statistics, *metadata))
        if not made:
            raise ValueError("no slice was given for the memory bank: check that the training split has studies.")
        entries = BankEntries(*(torch.cat(tensors) for tensors in zip(*made, strict=True)))
        usable = usable_entries(entries)
        missing = network.bank_size - int(usable.sum())
        if missing < 0:
            raise ValueError(f"{int(usable.sum())} slices do not fit a bank of {network.bank_size}.")
        padded = (torch.cat([t[usable], t.new_zeros((missing, *t.shape[1:]))]) for t in entries)
        bank = network.compile_bank(BankEntries(*padded))
    assert bank is not None
    network.load_bank(bank)
    return int(bank.present.any(dim=1).sum())


class BankFreezer:
    """Ignite handler that freezes the bank of an evaluated network before every run of its evaluator.

    Args:
        network: the network that the evaluator uses; one without a bank is left as it is.
        data_loader: the bank's slices.
        device: where to compute.
        seed: of the scenarios.
        list_file: JSON file that gets the study and slice of every entry; None writes none.
    """

    def __init__(
        self,
        network: SSCFNet,
        data_loader: Any,
        device: torch.device | str,
        seed: int = 0,
        list_file: str | Path | None = None,
    ) -> None:
        self.network, self.data_loader, self.device, self.seed = network, data_loader, device, seed
        self.list_file = None if list_file is None else Path(list_file)

    def attach(self, engine: Engine) -> None:
        """Freezes at ``STARTED``."""
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Engine | None = None) -> None:
        if not getattr(self.network, "uses_bank", False):
            return
        number = freeze_bank(self.network, self.data_loader, self.device, self.seed)
        if self.list_file is not None and idist.get_rank() == 0:
            subset = self.data_loader.dataset
            dataset = subset.dataset
            listed = [
                {"study": dataset.studies[dataset.index[i][0]], "slice": int(dataset.index[i][1])}
                for i in subset.indices
            ]
            self.list_file.parent.mkdir(parents=True, exist_ok=True)
            self.list_file.write_text(json.dumps(listed, indent=1))
        if engine is not None:
            engine.logger.info(f"memory bank frozen: {number} of {self.network.bank_size} entries")


class BankAsItStands:
    """In the place of ``BankFreezer``: the evaluated network reads the training bank as it stands, as in the paper.

    Args:
        network: the network that the evaluator uses.
        bank: of the training.
    """

    def __init__(self, network: SSCFNet, bank: MemoryBank) -> None:
        self.network, self.bank = network, bank

    def attach(self, engine: Engine) -> None:
        """Copies at ``STARTED``."""
        engine.add_event_handler(Events.STARTED, self)

    @torch.no_grad()
    def __call__(self, engine: Engine | None = None) -> None:
        entries = self.bank.entries()
        filled = torch.arange(self.bank.size, device=entries.present.device) < self.bank.count
        entries = entries._replace(present=entries.present & filled.unsqueeze(1))
        self.network.load_bank(self.network.compile_bank(entries))
