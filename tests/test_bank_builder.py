# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The frozen bank: which slices it holds, how its entries are made, and that nothing else decides about them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from builders import assert_same, config_files, random_batch, tiny_net
from ignite.engine import Engine
from monai.bundle import create_workflow
from torch.utils.data import DataLoader, Dataset

from scripts.contrasts import NUM_CONTRASTS, StudyError, scenario_table
from scripts.data.datalist import find_studies
from scripts.data.randomness import stable_hash
from scripts.data.transforms import study_transforms
from scripts.networks.availability import network_input
from scripts.networks.blocks import scale_statistics
from scripts.networks.memory_bank import BankEntries, CompiledBank
from scripts.networks.sscf import SSCFNet
from scripts.networks.weights import load_weights, network_from_weights, read_state, save_weights
from scripts.training.bank_builder import BankFreezer, bank_slices, freeze_bank
from scripts.training.step import make_entries
from scripts.training.trainer import BATCH_KEYS, draw_scenarios

SIZE = (32, 32)
BANK = [f"bank_{name}" for name in CompiledBank._fields]


class Slices(Dataset):
    """Random slices with the attributes of a ``SliceDataset``."""

    def __init__(self, patients: list[int], seed: int = 0) -> None:
        number = len(patients)
        batch = random_batch(scenario_table()[:1].expand(number, -1), SIZE, seed)
        self.batch = {key: batch[key] for key in BATCH_KEYS}
        self.batch["patient"] = self.patients = torch.tensor(patients)
        self.slice_ids = torch.tensor([stable_hash(f"{p}/{i}") for i, p in enumerate(patients)])
        self.batch["slice_id"] = self.slice_ids
        self.studies = [f"study{i}" for i in range(number)]
        self.index = torch.stack([torch.arange(number), torch.arange(number) + 50], dim=1)

    def __len__(self) -> int:
        return len(self.patients)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {key: value[i] for key, value in self.batch.items()}


def loader(data: Dataset, batch_size: int = 2) -> DataLoader:
    return DataLoader(data, batch_size)


def stored(net: SSCFNet) -> dict[str, torch.Tensor]:
    return {name: getattr(net, name).clone() for name in BANK}


# ------------------------------------------------------------------------------------------------- choice of slices
def test_slices_are_spread_over_the_patients() -> None:
    data = Slices([1] * 10 + [2] * 10 + [3] * 3 + [4])
    for size, shares in ((4, {1: {1}, 2: {1}, 3: {1}, 4: {1}}), (8, {1: {2, 3}, 2: {2, 3}, 3: {2, 3}, 4: {1}})):
        chosen = [int(data.patients[i]) for i in bank_slices(data, size).indices]
        assert len(chosen) == size
        for patient, counts in shares.items():
            assert chosen.count(patient) in counts
    assert sorted(bank_slices(data, 300).indices) == list(range(24))
    assert len(set(bank_slices(data, 20).indices)) == 20


def test_choice_depends_on_seed_and_slices_alone() -> None:
    data = Slices([1] * 6 + [2] * 6 + [3] * 6)

    def chosen(dataset: Slices, seed: int) -> set[int]:
        return {int(dataset.slice_ids[i]) for i in bank_slices(dataset, 6, seed).indices}

    assert chosen(data, 0) == chosen(data, 0)
    turned = Slices([1] * 6 + [2] * 6 + [3] * 6)
    turned.slice_ids, turned.patients = data.slice_ids.flip(0), data.patients.flip(0)
    assert chosen(turned, 0) == chosen(data, 0)
    assert len({frozenset(chosen(data, seed)) for seed in range(8)}) > 4


# ------------------------------------------------------------------------------------------------------ frozen bank
def test_freezing_fills_the_bank_and_changes_what_the_network_gives() -> None:
    net = tiny_net().train()
    image = network_input(Slices([9]).batch["target"], torch.tensor([[True, False, False, True]]))
    with torch.no_grad():
        before = net.eval()(image)
    net.train()
    data = Slices([1, 2, 3, 3])
    data.batch["has_contrast"][1, 2] = False
    assert freeze_bank(net, loader(data), "cpu") == 4
    assert not net.training
    assert net.bank_present.tolist() == data.batch["has_contrast"].tolist() + [[False] * NUM_CONTRASTS] * 2
    assert net.bank_patient.tolist() == [1, 2, 3, 3, 0, 0]
    assert all(bool(torch.isfinite(value).all()) for value in stored(net).values())
    with torch.no_grad():
        after = net(image)
    assert float((after[:, 1:3] - before[:, 1:3]).abs().max()) > 1e-3  # by AdaIN
    assert float((after[:, 4:] - before[:, 4:]).abs().max()) > 1e-5  # by CITIM


def test_frozen_bank_does_not_depend_on_the_batch_size_or_on_what_was_in_the_bank() -> None:
    data, one, other = Slices([1, 2, 3, 4, 4]), tiny_net(), tiny_net()
    freeze_bank(one, loader(data, 1), "cpu")
    freeze_bank(other, loader(data, 4), "cpu")
    expected = stored(other)
    for name, value in stored(one).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)
    freeze_bank(other, loader(Slices([5, 6, 7, 8, 9, 10], seed=3)), "cpu")
    assert not torch.equal(other.bank_key, expected["bank_key"])
    freeze_bank(other, loader(data, 4), "cpu")
    assert_same(stored(other), expected)


@torch.no_grad()
def entries_of(net: SSCFNet, sample: dict[str, torch.Tensor], others: BankEntries | None) -> BankEntries:
    """Literal entries of one slice: of the first pass without a bank, else of the second with the others' entries."""
    made = {key: sample[key] for key in ("label", "has_contrast", "has_mask", "patient", "slice_id")}
    target = sample["target"]
    first = second = net.encode(target, torch.zeros_like(target[:, :3]))
    if others is not None:
        available = draw_scenarios(sample["slice_id"], sample["has_contrast"], 5, 0)
        allowed = torch.ones(1, len(others.patient), dtype=torch.bool)
        second = net.run_branches(target, available, net.compile_bank(others), allowed).second
    return make_entries(net, first[-1], second, scale_statistics(second), **made)


def test_entries_are_made_with_the_first_pass_entries_of_the_other_patients() -> None:
    data = Slices([1, 2, 2, 3])
    samples = [{key: value.unsqueeze(0) for key, value in data[i].items()} for i in range(4)]
    net = tiny_net().eval()
    first = [entries_of(net, sample, None) for sample in samples]
    expected, own_included = [], []
    for i, sample in enumerate(samples):
        foreign = [e for e, other in zip(first, samples, strict=True) if other["patient"] != sample["patient"]]
        assert len(foreign) == (2 if i in (1, 2) else 3)
        for part, result in ((foreign, expected), (first, own_included)):
            joined = BankEntries(*(torch.cat(tensors) for tensors in zip(*part, strict=True)))
            result.append(entries_of(net, sample, joined).key)
    freeze_bank(net, loader(data, 3), "cpu", seed=5)
    torch.testing.assert_close(net.bank_key[:4], torch.cat(expected), rtol=1e-4, atol=1e-5)
    assert float((net.bank_key[:4] - torch.cat(own_included)).abs().max()) > 1e-4


def test_slice_with_a_non_finite_value_gives_no_entry() -> None:
    data, net = Slices([1, 2, 3]), tiny_net()
    data.batch["target"][0, :, 3, 3] = float("nan")
    assert freeze_bank(net, loader(data), "cpu") == 2
    assert net.bank_patient[net.bank_present.any(dim=1)].tolist() == [2, 3]
    assert all(bool(torch.isfinite(getattr(net, name)).all()) for name in BANK)


def test_wrong_number_of_slices_is_refused() -> None:
    net = tiny_net()
    with pytest.raises(ValueError, match="7 slices do not fit a bank of 6"):
        freeze_bank(net, loader(Slices(list(range(7)))), "cpu")
    with pytest.raises(ValueError, match="no slice was given"):
        freeze_bank(net, [], "cpu")


# --------------------------------------------------------------------------------------------------------- handler
def test_handler_freezes_before_a_run_and_lists_the_slices(tmp_path: Path) -> None:
    data = Slices([1, 1, 2, 3, 4, 5, 6, 7])
    net = tiny_net()
    subset = bank_slices(data, net.bank_size)
    listed = tmp_path / "new" / "bank.json"
    present_at_start = []
    engine = Engine(lambda *_: present_at_start.append(int(net.bank_present.any(dim=1).sum())))
    BankFreezer(net, loader(subset), "cpu", list_file=listed).attach(engine)
    engine.run([0])
    assert present_at_start == [6]
    assert json.loads(listed.read_text()) == [{"study": f"study{i}", "slice": i + 50} for i in subset.indices]
    assert net.bank_patient.tolist() == [int(data.patients[i]) for i in subset.indices]


# --------------------------------------------------------------------------------------------------- intensities
def test_weights_learn_how_the_contrasts_of_a_cohort_are_related(tmp_path: Path, phantom_cohort: Path) -> None:
    net = tiny_net()
    preprocessing = {"image_size": 64, "spacing": 4.0, "scaling": "brain"}
    save_weights(tmp_path / "model.pt", net, {"preprocessing": preprocessing})
    workflow = create_workflow(
        config_file=config_files("train", "build_bank"),
        workflow_type="train",
        logging_file=False,
        run_id="measuring",
        dataset_dir=str(phantom_cohort),
        output_dir=str(tmp_path / "out"),
        source_path=str(tmp_path / "model.pt"),
        site_path=str(tmp_path / "site.pt"),
        device="cpu",
    )
    workflow.run()
    state, settings, _ = read_state(tmp_path / "site.pt")
    assert settings["preprocessing"] == preprocessing and settings["intensities"]["studies"] == 5
    assert all(torch.equal(state[name], value) for name, value in net.state_dict().items() if name != "settings")
    transform = study_transforms(**preprocessing)
    scales = torch.stack([transform(item)["intensity_scale"] for item in find_studies(phantom_cohort)]).double()
    ratios = (scales[:, :, None] / scales[:, None, :]).log()
    expected = ratios.median(dim=0).values
    torch.testing.assert_close(
        torch.tensor(settings["intensities"]["log_ratios"]).double(), expected, atol=1e-4, rtol=0
    )
    spread = 1.4826 * (ratios - expected).abs().median(dim=0).values
    torch.testing.assert_close(torch.tensor(settings["intensities"]["spread"]).double(), spread, atol=1e-4, rtol=0)
    # what is written is not more than the buffer of earlier weights holds
    load_weights(network_from_weights(tmp_path / "model.pt"), tmp_path / "site.pt")


def test_more_settings_than_weights_hold_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"bytes, more than the 4096 that weights hold: .* notes is the longest"):
        save_weights(tmp_path / "model.pt", tiny_net(), {"preprocessing": {}, "notes": "a" * 4096})
    assert not list(tmp_path.iterdir())
