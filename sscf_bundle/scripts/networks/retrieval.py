# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Retrieval: which entry of the bank a (target, source) pair takes its statistics from (l* of eq. 8)."""

from __future__ import annotations

import torch

from .memory_bank import CompiledBank


def active_pairs(available: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The (target, source) pairs of each sample, packed to the front with a static shape.

    Args:
        available: B x K boolean; K = 4 gives 3 or 4 active pairs for 1 to 3 available contrasts.

    Returns:
        ``target``, ``source``: B x P contrast indices with P = (K / 2)^2; ``active``: B x P boolean. An idle pair has
        the first source of its sample, so that it reads no missing contrast.
    """
    k = available.shape[1]
    table = (~available).unsqueeze(2) & available.unsqueeze(1)  # B x target x source
    flat = table.flatten(1)
    order = torch.argsort((~flat).to(torch.int64), dim=1, stable=True)[:, : (k // 2) * ((k + 1) // 2)]
    source, active = order % k, torch.gather(flat, 1, order)
    return torch.div(order, k, rounding_mode="floor"), torch.where(active, source, source[:, :1]), active


def usable_for_pairs(
    bank: CompiledBank, allowed: torch.Tensor, target: torch.Tensor, source: torch.Tensor
) -> torch.Tensor:
    """Entries (B x P x L) that the sample may use (``allowed``, B x L) and that hold both contrasts of a pair."""
    has = bank.present.t()  # K x L
    return allowed.unsqueeze(1) & has[source] & has[target]


def key_distances(query: torch.Tensor, bank: CompiledBank, source: int, start: int = 0) -> torch.Tensor:
    """Squared distances (B x L float32) of keys (B x D) of one contrast, less their own norm, which moves no argmin.

    The keys may be the part of one scale, which begins at ``start``.
    """
    key = bank.key[:, source, start : start + query.shape[1]].float()
    whole = query.shape[1] == bank.key.shape[2]
    square = bank.key_square[:, source] if whole else key.square().sum(dim=1)
    return torch.addmm(square, query, key.t(), alpha=-2.0)


def retrieve(distance: torch.Tensor, usable: torch.Tensor, mode: str = "nearest") -> torch.Tensor:
    """The entry l* of every (target, source) pair (eq. 8): B x P slots, 0 where none is usable.

    Args:
        distance: B x P x L distances of the source's keys.
        usable: B x P x L of ``usable_for_pairs``.
        mode: ``nearest``, or ``random`` for a control that ignores the distances.
    """
    if mode == "random":
        distance = torch.rand_like(distance)
    return distance.masked_fill(~usable, float("inf")).argmin(dim=2)


def mean_prototype(table: torch.Tensor, usable: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Statistics of the target averaged over all usable entries: the control that carries no image's information.

    Args:
        table: L x K x C means or standard deviations.
        usable: B x P x L.
        target: B x P.
    """
    weight = usable.to(table.dtype) / usable.sum(dim=2, keepdim=True).clamp(min=1)
    per_contrast = torch.matmul(weight, table.flatten(1)).unflatten(2, table.shape[1:])
    place = target[:, :, None, None].expand(-1, -1, 1, table.shape[2])
    return per_contrast.gather(2, place).squeeze(2)
