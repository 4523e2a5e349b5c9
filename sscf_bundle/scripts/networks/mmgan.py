# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""The generator of MM-GAN behind the interface of SSCFNet: what it is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from monai.networks.blocks import Convolution
from torch import nn

from ..contrasts import NUM_CONTRASTS, NUM_TUMOR_CLASSES
from .availability import network_input, read_availability
from .blocks import expand_dims_like
from .settings import ConfiguredNetwork


class MMGANGenerator(ConfiguredNetwork):
    """Generator of MM-GAN (Sharma and Hamarneh, IEEE TMI 2020): a pix2pix U-Net that sees the contrasts alone.

    Imputation with zeros: a missing contrast holds the background, -1 here. There are no availability planes; a blank
    contrast is a missing one. Implicit conditioning: available contrasts of the result are those of the input. Every
    level halves the resolution; sides that are no multiple of 2 ** levels (256 with the published eight) are padded
    with background and cropped again, so a slice of 192 is computed at 256, as the published code computes all.

    Args:
        spatial_dims: 2 or 3.
        channels: of the levels, at least two; the defaults are pix2pix's.
        dropout: of the three innermost decoder levels (fewer where there are fewer), as in pix2pix.
    """

    FREE_ARGUMENTS = ("dropout",)

    def __init__(
        self,
        spatial_dims: int = 2,
        channels: Sequence[int] = (64, 128, 256, 512, 512, 512, 512, 512),
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.keep_arguments(locals())
        self.num_contrasts, self.num_tumor_classes = NUM_CONTRASTS, NUM_TUMOR_CLASSES
        self.spatial_dims, self.channels, self.factor = spatial_dims, tuple(channels), 2 ** len(channels)
        widths = [NUM_CONTRASTS, *channels]
        last = len(channels) - 1
        common: dict[str, Any] = {"kernel_size": 4, "strides": 2, "padding": 1}
        halve, double = common | {"act": ("leakyrelu", {"negative_slope": 0.2})}, common | {"output_padding": 0}
        double["is_transposed"] = True
        self.down = nn.ModuleList(
            # neither the image nor a bottleneck of one voxel is normalized
            Convolution(spatial_dims, widths[k], widths[k + 1], norm=None if k in (0, last) else "INSTANCE", **halve)
            for k in range(len(channels))
        )
        self.up = nn.ModuleList(
            Convolution(
                spatial_dims,
                channels[k] if k == last else 2 * channels[k],
                channels[k - 1],
                norm="INSTANCE",
                act="RELU",
                dropout=dropout if k > last - 3 else None,
                **double,
            )
            for k in range(last, 0, -1)
        )
        self.head = Convolution(spatial_dims, 2 * channels[0], NUM_CONTRASTS, conv_only=True, **double)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Fills in the missing contrasts; B x 8 x spatial (any size) to B x 7 x spatial, as ``SSCFNet.forward``.

        The available contrasts come back as given, and the last three channels are 0, since MM-GAN has no mask.
        """
        available = read_availability(image)
        given = network_input(image[:, : self.num_contrasts], available)[:, : self.num_contrasts]
        margins: list[int] = []
        for size in given.shape[:1:-1]:
            extra = -size % self.factor
            margins += [extra // 2, extra - extra // 2]
        x = F.pad(given, margins, value=-1.0)
        skips: list[torch.Tensor] = []
        for stage in self.down:
            x = stage(x)
            skips.append(x)
        for k, stage in enumerate(self.up):
            x = torch.cat([stage(x), skips[len(skips) - 2 - k]], dim=1)
        made = torch.tanh(F.pad(self.head(x), [-m for m in margins]).float())
        images = torch.where(expand_dims_like(available, made), given.float(), made)
        masks = torch.zeros_like(images[:, : self.num_tumor_classes])
        return self.corrected(torch.cat([images, masks], dim=1), available)
