# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""The correction of a site as a table, which an exported network applies by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..contrasts import CONTRAST_KEYS, NUM_CONTRASTS, SCENARIOS, scenario_name
from .blocks import expand_dims_like

#: Key of the settings in the weights that holds a correction, see ``inference.correction.fit_correction``.
CORRECTION_KEY = "correction"


def for_network_range(slope: float, offset: float) -> tuple[float, float]:
    """Slope and offset for intensities in [-1, 1] from those for [0, 1]."""
    return slope, slope - 1 + 2 * offset


def correction_table(scenarios: Mapping[str, Mapping[str, Sequence[float]]]) -> torch.Tensor:
    """Slope and offset in [-1, 1] of every contrast under every availability, 16 x 4 x 2.

    Args:
        scenarios: of ``fit_correction``; what it does not name keeps slope 1 and offset 0.

    Returns:
        The number of a row is the availability over ``CONTRASTS`` in binary: FLAIR alone is 8.
    """
    table = torch.tensor([1.0, 0.0]).repeat(2**NUM_CONTRASTS, NUM_CONTRASTS, 1)
    for scenario in SCENARIOS:
        row = int("".join(map(str, scenario)), 2)
        for contrast, (slope, offset, *_) in scenarios.get(scenario_name(scenario), {}).items():
            table[row, CONTRAST_KEYS.index(contrast)] = torch.tensor(for_network_range(slope, offset))
    return table


def apply_table(pred: torch.Tensor, available: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """B x 7 x spatial predictions with corrected contrasts, still in [-1, 1]; for TorchScript and ONNX too.

    Args:
        pred: of a network.
        available: B x 4 boolean.
        table: of ``correction_table``.
    """
    k = available.shape[1]
    row = available[:, 0].long()
    for i in range(1, k):
        row = 2 * row + available[:, i].long()
    slope, offset = table.to(pred.device)[row].unbind(2)
    images = pred[:, :k] * expand_dims_like(slope, pred) + expand_dims_like(offset, pred)
    return torch.cat([images.clamp(-1.0, 1.0), pred[:, k:]], dim=1)
