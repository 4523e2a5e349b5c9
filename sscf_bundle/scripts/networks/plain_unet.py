# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""A plain U-Net behind the interface of SSCFNet: its companion, and what it is compared with."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..contrasts import NUM_CONTRASTS, NUM_TUMOR_CLASSES
from .availability import network_input, read_availability
from .blocks import DEFAULT_ACT, DEFAULT_NORM, PRIOR_PROBABILITY, Decoder, Encoder, channel_numbers
from .settings import ConfiguredNetwork


class PlainUNet(ConfiguredNetwork):
    """One encoder and one decoder of SSCF's blocks: what SSCF is without its branches, banks and four-fold paths.

    Args:
        spatial_dims: 2 or 3.
        channels: channels of the five scales, or a name in ``blocks.PRESETS``.
        norm: MONAI normalization spec; must not use statistics of the batch.
        act: MONAI activation spec.

    Raises:
        ValueError: for an unknown preset or a batch normalization.
    """

    def __init__(
        self,
        spatial_dims: int = 2,
        channels: Sequence[int] | str = "base",
        norm: str | tuple = DEFAULT_NORM,
        act: str | tuple = DEFAULT_ACT,
    ) -> None:
        super().__init__()
        channels = channel_numbers(channels)
        self.keep_arguments(locals())
        if "batch" in str(norm).lower():
            raise ValueError("batch normalization would let one sample's missing contrasts reach another sample.")
        self.num_contrasts = NUM_CONTRASTS
        self.spatial_dims, self.channels = spatial_dims, tuple(channels)
        self.encoder = Encoder(spatial_dims, 2 * NUM_CONTRASTS, channels, norm, act)
        self.decoder = Decoder(spatial_dims, channels, NUM_CONTRASTS + NUM_TUMOR_CLASSES, norm, act)
        with torch.no_grad():
            # as in SSCFNet: a class holds some percent of a slice
            self.decoder.head.bias[NUM_CONTRASTS:] = math.log(PRIOR_PROBABILITY / (1 - PRIOR_PROBABILITY))

    def run(self, images: torch.Tensor, available: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """All contrasts and the tumor classes from the contrasts of ``images`` that ``available`` names.

        Args:
            images: B x 4 x spatial (multiples of 16) in [-1, 1]; missing contrasts are not read.
            available: B x 4 boolean.

        Returns:
            Images, B x 4 x spatial in [-1, 1]; logits, B x 3 x spatial.
        """
        out = self.decoder(self.encoder(network_input(images, available))).float()
        return torch.tanh(out[:, : self.num_contrasts]), out[:, self.num_contrasts :]

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """B x 8 x spatial (multiples of 16) to B x 7 x spatial, as ``SSCFNet.forward``."""
        available = read_availability(image)
        images, logits = self.run(image[:, : self.num_contrasts], available)
        return self.corrected(torch.cat([images, torch.sigmoid(logits)], dim=1), available)
