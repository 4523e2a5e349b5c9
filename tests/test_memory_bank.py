# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""The memory bank is a first-in-first-out store that rejects, replaces and counts as a plain Python queue would."""

from __future__ import annotations

import random
from collections import deque

import numpy as np
import pytest
import torch
from builders import random_entries

from scripts.networks.memory_bank import BankEntries, MemoryBank
from scripts.networks.sscf import SSCFNet

FLOAT_FIELDS = ("key", "mean", "std", "prototype", "class_map")


def small_bank(size: int) -> MemoryBank:
    return MemoryBank(
        size, num_contrasts=4, key_dim=3, feature_channels=5, bottleneck_channels=2, num_classes=4, num_cells=6
    )


def fifo_order(bank: MemoryBank) -> list[int]:
    """Slots from the oldest to the newest entry."""
    count, head = int(bank.count), int(bank.head)
    return [(head - count + k) % bank.size for k in range(count)]


def contents(bank: MemoryBank) -> list[tuple[int, float]]:
    return [(int(bank.slice_id[slot]), float(bank.key[slot, 0, 0])) for slot in fifo_order(bank)]


class QueueModel:
    """The same store in plain Python: slice id and one number of the payload, oldest first."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.items: deque[tuple[int, float]] = deque()

    def enqueue(self, new: list[tuple[int, float, bool]]) -> None:
        accepted: dict[int, float] = {}
        for slice_id, payload, good in new:
            if good:
                accepted.pop(slice_id, None)  # of several entries of one slice the last counts, at its own place
                accepted[slice_id] = payload
        known = {slice_id for slice_id, _ in self.items}
        rewritten = known & accepted.keys()
        self.items = deque((s, accepted.get(s, payload)) for s, payload in self.items)
        for slice_id, payload in accepted.items():
            if slice_id in known:
                continue
            while len(self.items) >= self.size:
                oldest = self.items.popleft()
                if oldest[0] not in rewritten:
                    break
                self.items.append(oldest)  # written by this very call: not old
            self.items.append((slice_id, payload))


@pytest.mark.parametrize("size", [1, 2, 5, 8])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_bank_equals_a_python_queue_over_random_sequences(size: int, seed: int) -> None:
    draw, bank, model = random.Random(100 * size + seed), small_bank(size), QueueModel(size)
    rejected = replaced = 0
    for step in range(40):
        number = draw.randint(1, size)
        # few different ids, so that repeats within a batch and over batches are frequent
        ids = [draw.randint(1, 2 * size + 1) for _ in range(number)]
        new = random_entries(bank, ids, seed=1000 * seed + step)
        good = [draw.random() > 0.2 for _ in ids]
        for k, fine in enumerate(good):
            if not fine:
                rejected += 1
                if draw.random() < 0.2:
                    new.present[k] = False
                else:
                    value = draw.choice([float("nan"), float("inf"), -float("inf")])
                    getattr(new, draw.choice(FLOAT_FIELDS))[k].view(-1)[-1] = value
        replaced += sum(s in {i for i, _ in model.items} for s in ids)
        payload = [float(p) for p in new.key[:, 0, 0]]
        bank.enqueue(new)
        model.enqueue(list(zip(ids, payload, good, strict=True)))
        assert contents(bank) == list(model.items)
        assert int(bank.count) == len(model.items)
    assert rejected > 3 and replaced > 3


def test_enqueue_stores_every_field() -> None:
    bank = small_bank(4)
    new = random_entries(bank, [11, 12, 13], seed=3, patients=[-5, 2**62, 7])
    new.present[1, 2] = False
    new.has_mask[2] = False
    bank.enqueue(new)
    entries = bank.entries()
    for name in BankEntries._fields:
        assert torch.equal(getattr(entries, name)[:3], getattr(new, name)), name


def test_slice_id_zero_is_an_id_like_any_other() -> None:
    """Empty slots hold id 0; a slice that hashes to 0 must still be taken as new, and once only."""
    bank = small_bank(3)
    bank.enqueue(random_entries(bank, [0], seed=0))
    bank.enqueue(random_entries(bank, [5, 0], seed=1))
    assert [s for s, _ in contents(bank)] == [0, 5]


def test_a_rejected_update_leaves_the_stored_entry_as_it_is() -> None:
    bank = small_bank(3)
    bank.enqueue(random_entries(bank, [1, 2], seed=0))
    before = {name: tensor.clone() for name, tensor in bank.entries()._asdict().items()}
    bad = random_entries(bank, [2, 9], seed=1)
    bad.std[:, 3, 4] = float("nan")
    bank.enqueue(bad)
    assert bank.count == 2
    for name, tensor in bank.entries()._asdict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(torch.isfinite(getattr(bank, name)).all() for name in FLOAT_FIELDS)  # the scratch row, too


def test_more_entries_than_the_bank_holds_are_refused() -> None:
    bank = small_bank(2)
    with pytest.raises(ValueError, match="3 entries"):
        bank.enqueue(random_entries(bank, [1, 2, 3]))
    with pytest.raises(ValueError, match="size=0"):
        small_bank(0)


def test_entries_are_stored_without_a_graph() -> None:
    bank = small_bank(2)
    new = random_entries(bank, [1])
    new.mean.requires_grad_()
    bank.enqueue(new._replace(mean=new.mean * 2))
    assert not any(tensor.requires_grad for tensor in bank.entries())
    assert torch.equal(bank.mean[0], 2 * new.mean[0].detach())


@pytest.mark.parametrize("filled", [0, 1, 3, 5, 7])
def test_statistics_equal_numpy(filled: int) -> None:
    bank = small_bank(5)
    ids = list(range(1, filled + 1))
    patients = [(s + 1) // 2 for s in ids]  # none is the 0 of an empty slot
    for s, p in zip(ids, patients, strict=True):
        new = random_entries(bank, [s], seed=s, patients=[p])
        new.present[0, 1] = s % 2 == 0
        bank.enqueue(new)
    result = {name: value.item() for name, value in bank.statistics().items()}
    kept = list(range(max(filled - 5, 0), filled))
    assert result["effective_size"] == len(kept)
    assert result["patients"] == len({patients[k] for k in kept})
    slots = fifo_order(bank)
    for name in ("mean", "std"):
        relative = []
        for i in range(4):
            rows = [slot for slot in slots if bank.present[slot, i]]
            for c in range(5):
                values = np.array([getattr(bank, name)[r, i, c].item() for r in rows])
                level = np.array([bank.std[r, i, c].item() for r in rows])
                relative.append(values.std() / max(level.mean(), 1e-6) if rows else 0.0)
        assert result[f"{name}_spread"] == pytest.approx(np.mean(relative), rel=1e-4, abs=1e-6)


def test_state_round_trip_restores_the_bank_and_its_place_in_the_queue() -> None:
    bank, copy = small_bank(4), small_bank(4)
    for seed in range(3):
        bank.enqueue(random_entries(bank, [2 * seed, 2 * seed + 1], seed=seed))
    copy.load_state_dict(bank.state_dict())
    assert contents(copy) == contents(bank)
    for both in (bank, copy):
        both.enqueue(random_entries(both, [50, 51, 52], seed=9))
    assert contents(copy) == contents(bank)
    assert {name for name, _ in bank.named_buffers()} == set(bank.state_dict())
    assert not list(bank.parameters())


def test_paper_sized_bank_takes_less_than_50_megabytes() -> None:
    with torch.device("meta"):  # shapes only
        bank = SSCFNet(channels=(32, 64, 128, 256, 512), bank_size=300, key_size=3).new_bank((192, 192))
    assert bank.label.shape[1] == 144
    assert 10 < sum(buffer.numel() * buffer.element_size() for buffer in bank.buffers()) / 1e6 < 50
