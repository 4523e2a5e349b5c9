# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""How a network is told which contrasts it is given: a plane of 0 or 1 for each."""

from __future__ import annotations

import torch

from .blocks import expand_dims_like


def read_availability(image: torch.Tensor) -> torch.Tensor:
    """Availability of each contrast: B x 8 x spatial network input to B x K boolean."""
    return image[:, image.shape[1] // 2 :].flatten(2).amax(dim=2) > 0.5


def network_input(target: torch.Tensor, available: torch.Tensor) -> torch.Tensor:
    """B x 2K x spatial network input: the available contrasts (missing ones -1) and the availability planes.

    Args:
        target: B x K x spatial in [-1, 1].
        available: B x K boolean.
    """
    mask = expand_dims_like(available, target)
    return torch.cat([torch.where(mask, target, -1.0), mask.expand(target.shape).to(target.dtype)], dim=1)
