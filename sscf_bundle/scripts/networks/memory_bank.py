# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""The memory bank: a first-in-first-out store of what past slices of other patients teach, and its compiled form."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import nn


class BankEntries(NamedTuple):
    """What the bank keeps of E slices (the feature bank B_f and the mask bank B_m of the paper in one)."""

    key: torch.Tensor  #: E x K x D retrieval keys, pooled F_i^5 of the second pass.
    mean: torch.Tensor  #: E x K x (C_1 + ... + C_5) channel means of the second pass (mu of eq. 8).
    std: torch.Tensor  #: E x K x (C_1 + ... + C_5) channel standard deviations (sigma of eq. 8).
    prototype: torch.Tensor  #: E x K x C x c' class prototypes G = b W_l^T of the first pass (eq. 2).
    class_map: torch.Tensor  #: E x K x c' x N class probabilities W_l of the first pass (eq. 1).
    label: torch.Tensor  #: E x N class map y_l, uint8 (eq. 5).
    present: torch.Tensor  #: E x K, which contrasts the study really has.
    has_mask: torch.Tensor  #: E, whether y_l is known.
    patient: torch.Tensor  #: E patient hashes, int64.
    slice_id: torch.Tensor  #: E slice hashes, int64.


def usable_entries(entries: BankEntries) -> torch.Tensor:
    """Which entries a bank may take (E boolean): all values finite and at least one contrast."""
    values = (entries.key, entries.mean, entries.std, entries.prototype, entries.class_map)
    largest = torch.stack([torch.linalg.vector_norm(t.flatten(1), ord=math.inf, dim=1) for t in values], dim=1)
    return entries.present.any(dim=1) & torch.isfinite(largest).all(dim=1)


def style_spread(mean: torch.Tensor, std: torch.Tensor, present: torch.Tensor) -> dict[str, torch.Tensor]:
    """How much the statistics that AdaIN takes from a bank differ from entry to entry; what retrieval can carry.

    Args:
        mean: L x K x channels, mu of eq. 8.
        std: L x K x channels, sigma of eq. 8.
        present: L x K, which of them exist.

    Returns:
        ``mean_spread``, ``std_spread``: standard deviation over entries of mu and sigma relative to the mean sigma, a
        mean over contrasts and channels (0 where there are fewer than two entries).
    """
    usable = present.unsqueeze(2)
    total = usable.sum(dim=0).clamp(min=1)
    zero = torch.zeros((), device=mean.device)

    def average(values: torch.Tensor) -> torch.Tensor:
        return torch.where(usable, values, zero).sum(dim=0) / total

    level = average(std)
    return {
        f"{name}_spread": (average((values - average(values)) ** 2).sqrt() / level.clamp(min=1e-6)).mean()
        for name, values in (("mean", mean), ("std", std))
    }


class CompiledBank(NamedTuple):
    """What the network reads of a bank of L slots: the linear maps of CITIM are folded into the prototypes."""

    key: torch.Tensor  #: L x K x D.
    key_square: torch.Tensor  #: L x K, squared norms of the keys.
    mean: torch.Tensor  #: L x K x (C_1 + ... + C_5).
    std: torch.Tensor  #: L x K x (C_1 + ... + C_5).
    value: torch.Tensor  #: L x K x c' x C, what ``CITIM.fold`` makes of the prototypes.
    gram: torch.Tensor  #: L x K x c' x c', Q = Gc^T Gc / C.
    present: torch.Tensor  #: L x K; an empty slot has no contrast.
    patient: torch.Tensor  #: L.


class MemoryBank(nn.Module):
    """First-in-first-out bank of L entries, all of it in buffers, so that it travels with the training state.

    It is written by the trainer after a step, never inside a forward pass. Writing needs no synchronization with the
    host: row L is a scratch row that takes what is rejected.

    Args:
        size: number of entries L.
        num_contrasts, key_dim, feature_channels, bottleneck_channels, num_classes, num_cells: K, D, C_1 + ... + C_5, C
            of F^5, c' and N of F^5, see ``BankEntries``.
        refresh: a slice that is in the bank is rewritten in its place; False is a plain queue, which may hold it twice.
    """

    mean: torch.Tensor
    std: torch.Tensor
    present: torch.Tensor
    patient: torch.Tensor
    slice_id: torch.Tensor
    count: torch.Tensor
    head: torch.Tensor

    def __init__(
        self,
        size: int,
        num_contrasts: int,
        key_dim: int,
        feature_channels: int,
        bottleneck_channels: int,
        num_classes: int,
        num_cells: int,
        refresh: bool = True,
    ) -> None:
        super().__init__()
        self.refresh = refresh
        if size < 1:
            raise ValueError(f"the bank needs at least one entry, got size={size}.")
        self.size = size
        rows, k = size + 1, num_contrasts
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "key": ((rows, k, key_dim), torch.float32),
            "mean": ((rows, k, feature_channels), torch.float32),
            "std": ((rows, k, feature_channels), torch.float32),
            "prototype": ((rows, k, bottleneck_channels, num_classes), torch.float32),
            "class_map": ((rows, k, num_classes, num_cells), torch.float32),
            "label": ((rows, num_cells), torch.uint8),
            "present": ((rows, k), torch.bool),
            "has_mask": ((rows,), torch.bool),
            "patient": ((rows,), torch.int64),
            "slice_id": ((rows,), torch.int64),
        }
        for name, (shape, dtype) in shapes.items():
            self.register_buffer(name, torch.zeros(shape, dtype=dtype))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("head", torch.zeros((), dtype=torch.int64))

    def entries(self) -> BankEntries:
        """All L slots, empty ones included (their ``present`` is False)."""
        return BankEntries(*(getattr(self, name)[: self.size] for name in BankEntries._fields))

    @torch.no_grad()
    def enqueue(self, new: BankEntries) -> None:
        """Writes E entries: a known slice in its place (with ``refresh``), others over the oldest.

        Entries with a non-finite value or without any contrast are rejected. With ``refresh`` the last of several
        entries of one slice is kept. E may not exceed L.

        Args:
            new: entries, on the device of the bank.
        """
        num = new.slice_id.shape[0]
        if num > self.size:
            raise ValueError(f"{num} entries at once do not fit a bank of {self.size}: raise the bank size.")
        accepted = usable_entries(new)
        if self.refresh:
            same = new.slice_id.unsqueeze(0) == new.slice_id.unsqueeze(1)
            later = torch.ones_like(same).triu(diagonal=1)
            accepted = accepted & ~(same & later & accepted.unsqueeze(0)).any(dim=1)

        filled = torch.arange(self.size, device=new.slice_id.device) < self.count
        known = (new.slice_id.unsqueeze(1) == self.slice_id[: self.size]) & filled & self.refresh
        fresh = accepted & ~known.any(dim=1)
        # a fresh entry takes the oldest slot; oldest slots that this very call rewrites in place are passed over
        kept_in_place = (known & accepted.unsqueeze(1)).any(dim=0)
        age = (torch.arange(self.size, device=new.slice_id.device) - self.head) % self.size
        order = torch.argsort(age + self.size * kept_in_place.to(age.dtype))
        rank = (fresh.to(torch.int64).cumsum(0) - 1).clamp(min=0)
        slot = torch.where(fresh, order[rank], known.to(torch.int64).argmax(dim=1))
        slot = torch.where(accepted, slot, self.size)
        for name, value in zip(BankEntries._fields, new, strict=True):
            buffer = getattr(self, name)
            buffer.index_copy_(0, slot, value.to(buffer.dtype))
            buffer[self.size].zero_()
        written = fresh.sum()
        self.count.copy_((self.count + written).clamp(max=self.size))
        # a tensor without dimensions as an index would be read on the host
        newest = order.gather(0, (written - 1).clamp(min=0).view(1)).squeeze(0)
        self.head.copy_(torch.where(written > 0, (newest + 1) % self.size, self.head))

    @torch.no_grad()
    def statistics(self) -> dict[str, torch.Tensor]:
        """``effective_size``: filled slots, each another slice; ``patients``: their number; and ``style_spread``."""
        filled = torch.arange(self.size, device=self.count.device) < self.count
        patients = torch.where(filled, self.patient[: self.size], self.patient[:1])
        ordered = patients.sort().values
        distinct = ordered[1:].ne(ordered[:-1]).sum() + (self.count > 0).to(torch.int64)
        usable = self.present[: self.size] & filled.unsqueeze(1)
        spread = style_spread(self.mean[: self.size], self.std[: self.size], usable)
        return {"effective_size": self.count.clone(), "patients": distinct, **spread}
