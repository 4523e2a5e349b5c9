# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Encoder and decoder of one contrast, and the small helpers that every network part shares."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

import torch
from monai.networks.blocks import Convolution, UpSample
from monai.networks.layers.factories import Conv
from monai.networks.layers.utils import get_act_layer, get_norm_layer
from torch import nn

#: Channels of F^1..F^5; ``paper`` is the width of the published code.
PRESETS = {
    "tiny": (8, 16, 24, 32, 48),
    "small": (16, 32, 64, 128, 256),
    "base": (32, 64, 128, 256, 512),
    "paper": (64, 128, 256, 512, 1024),
}
#: Probability of a tumor class at the start of training.
PRIOR_PROBABILITY = 0.02
#: Normalization of all blocks: its statistics span one image and one contrast, never the batch.
DEFAULT_NORM = ("group", {"num_groups": 4})
#: Added to a variance over space.
STATISTICS_EPS = 1e-5
DEFAULT_ACT = ("leakyrelu", {"negative_slope": 0.1, "inplace": True})


def channel_numbers(channels: Sequence[int] | str) -> tuple[int, ...]:
    """Channels of the five scales by a name in ``PRESETS``, or as given; a ``ValueError`` for anything else."""
    found = PRESETS.get(channels) if isinstance(channels, str) else channels
    if not isinstance(found, Sequence):
        raise ValueError(f"channels must be numbers or one of {sorted(PRESETS)}, got {channels!r}.")
    return tuple(found)


def number_of(mask: torch.Tensor) -> torch.Tensor:
    """How many a mask (... x K boolean) names in each row, at least 1."""
    return mask.sum(dim=-1).clamp(min=1)


def masked_mean(features: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over the contrasts that a mask (B x K boolean) names, zero where it names none.

    ``features`` are B x K x ...; what the mask leaves out may hold NaN.
    """
    total = torch.where(expand_dims_like(mask, features), features, 0.0).sum(dim=1)
    return total / expand_dims_like(number_of(mask), total)


def maximum_over(maps: torch.Tensor, dim: int) -> torch.Tensor:
    """Maximum over one dimension, by the function that is fastest on a CPU.

    With a gradient it is ``max``: the backward pass of ``amax`` is slower, and divides by the number of values that
    equal the maximum, of which torch.compile may find none, as it may compare half precision with what it was rounded
    from, and give NaN.

    Args:
        maps: tensor of any shape.
        dim: dimension that goes away.
    """
    return maps.max(dim=dim).values if maps.requires_grad else maps.amax(dim=dim)


def mean_of_maps(maps: Sequence[torch.Tensor]) -> torch.Tensor:
    """Mean of feature maps of one shape, without a stack of them in memory."""
    if len(maps) == 1:
        return maps[0]
    total = maps[0] + maps[1]
    for further in maps[2:]:
        total = total.add_(further)
    return total.div_(len(maps))


def scale_statistics(features: list[torch.Tensor], eps: float = STATISTICS_EPS) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation over space (mu and sigma of eq. 8) of several scales, each B x K x C_j x spatial.

    Both are float32, the channels of the scales one behind the other: B x K x (C_1 + C_2 + ...).
    """
    means: list[torch.Tensor] = []
    spreads: list[torch.Tensor] = []
    for scale in features:
        flat = scale.flatten(3).float()
        mean = flat.mean(dim=3)
        # deviations sum to 0, so the mean moves the norm by nothing and needs no gradient from it
        shift = mean.detach().unsqueeze(3)
        # on a CPU ten times as fast as var_mean, with the same two passes; what was converted is a copy of our own
        centered = flat - shift if flat.dtype == scale.dtype else flat.sub_(shift)
        means.append(mean)
        spreads.append(torch.linalg.vector_norm(centered, dim=3) * flat.shape[3] ** -0.5)
    return torch.cat(means, dim=2), torch.sqrt(torch.cat(spreads, dim=2).square() + eps)


def pooled_statistics(
    features: list[torch.Tensor], statistics: tuple[torch.Tensor, torch.Tensor] | None = None
) -> torch.Tensor:
    """Maximum over space and ``scale_statistics``, where these are not known: B x K x 3 x (C_1 + C_2 + ...) float32."""
    maxima = torch.cat([maximum_over(f.flatten(3), 3) for f in features], dim=2).float()
    mean, std = scale_statistics(features) if statistics is None else statistics
    return torch.stack([maxima, mean, std], dim=2)


def expand_dims_like(values: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """Values with trailing dimensions of size 1, up to the number of dimensions of ``maps``."""
    return values.reshape(values.shape + (1,) * (maps.dim() - values.dim()))


def stack_contrasts(maps: list[torch.Tensor]) -> torch.Tensor:
    """Stacks R feature maps B x C x spatial to B x R x C x spatial, contrast after contrast in memory.

    The memory layout of a map (channels first or last) is kept, and ``result[:, i]`` is as dense as ``maps[i]``, so
    that a decoder that reads one contrast needs no copy.
    """
    if len(maps) == 1:
        return maps[0].unsqueeze(1)
    if channels_are_last(maps[0]):
        return torch.stack([m.movedim(1, -1) for m in maps]).movedim(-1, 2).transpose(0, 1)
    return torch.stack(maps).transpose(0, 1)


def channels_are_last(maps: torch.Tensor) -> bool:
    """Whether the channels of B x C x spatial maps lie together in memory."""
    return maps.shape[1] > 1 and maps.stride(1) == 1


def gather_maps(maps: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """Rows (M int64) of a table of feature maps (R x C x spatial) in their own memory layout."""
    if channels_are_last(maps):
        return maps.movedim(1, -1).index_select(0, row).movedim(-1, 1)
    return maps.index_select(0, row)


def mix_channels(weight: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """A 1x1 convolution with weights of its own for each map, in the memory layout of the maps.

    Args:
        weight: M x O x C.
        maps: M x C x spatial.
    """
    flat, space = maps.flatten(2), maps.shape[2:]
    if channels_are_last(maps):
        return torch.bmm(flat.transpose(1, 2), weight.transpose(1, 2)).transpose(1, 2).unflatten(2, space)
    return torch.bmm(weight, flat).unflatten(2, space)


class Encoder(nn.Module):
    """Encoder E^i of one contrast: two 3-wide convolutions at each scale, the last of which gives F^j.

    F^j is tapped before normalization: behind a per-image normalization its channel statistics, which AdaIN and
    retrieval live on, would be almost the same for every slice.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the input (the contrast and the mask channels).
        channels: channels of F^1..F^5.
        norm, act: MONAI layer specs.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        channels: Sequence[int],
        norm: str | tuple = DEFAULT_NORM,
        act: str | tuple = DEFAULT_ACT,
    ) -> None:
        super().__init__()
        self.stages = nn.ModuleList()
        for j, (before, width) in enumerate(pairwise((in_channels, *channels))):
            # what the scale above gives is raw
            pre = nn.Sequential(get_norm_layer(norm, spatial_dims, before), get_act_layer(act)) if j else nn.Identity()
            strides = 2 if j else 1
            first = Convolution(
                spatial_dims, before, width, strides=strides, norm=norm, act=act, bias=False, adn_ordering="NA"
            )
            last = Convolution(spatial_dims, width, width, conv_only=True)
            self.stages.append(nn.Sequential(OrderedDict(pre=pre, conv1=first, conv2=last)))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """F^1..F^5 of B x in_channels x spatial, each B x C_j x spatial / 2^(j-1)."""
        features: list[torch.Tensor] = []
        for stage in self.stages:
            # the next stage activates in place, so it must not be given the tapped tensor where it starts with an
            # activation; it starts with a normalization, which makes a new tensor
            x = stage(x)
            features.append(x)
        return features


class DecoderStage(nn.Module):
    """Upsample, join the skip feature (``out_channels``), two 3-wide convolutions; arguments as of ``Decoder``."""

    def __init__(
        self, spatial_dims: int, in_channels: int, out_channels: int, norm: str | tuple, act: str | tuple
    ) -> None:
        super().__init__()
        self.up = UpSample(spatial_dims, in_channels, out_channels, scale_factor=2, mode="deconv")
        self.skip_act = get_act_layer(_out_of_place(act))
        self.convs = nn.Sequential(
            Convolution(
                spatial_dims, 2 * out_channels, out_channels, norm=norm, act=act, bias=False, adn_ordering="NA"
            ),
            Convolution(spatial_dims, out_channels, out_channels, norm=norm, act=act, bias=False, adn_ordering="NA"),
        )

    def forward(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        return self.convs(torch.cat([self.up(x), self.skip_act(skip)], dim=1))


class Decoder(nn.Module):
    """U-Net decoder D^i (or D_seg) over raw features F^1..F^5.

    The features enter without a normalization of their own, since that would undo the statistics that AdaIN gives.

    Args:
        spatial_dims: 2 or 3.
        channels: channels of F^1..F^5.
        out_channels: channels of the result (no final activation).
        norm, act: MONAI layer specs.
    """

    def __init__(
        self,
        spatial_dims: int,
        channels: Sequence[int],
        out_channels: int,
        norm: str | tuple = DEFAULT_NORM,
        act: str | tuple = DEFAULT_ACT,
    ) -> None:
        super().__init__()
        self.bottom_act = get_act_layer(_out_of_place(act))
        self.stages = nn.ModuleList(
            DecoderStage(spatial_dims, channels[j + 1], channels[j], norm, act)
            for j in reversed(range(len(channels) - 1))
        )
        self.head = Conv[Conv.CONV, spatial_dims](channels[0], out_channels, kernel_size=1)

    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:
        """B x out_channels x spatial of F^1, from F^1..F^5."""
        x = self.bottom_act(features[-1])
        for k, stage in enumerate(self.stages):
            x = stage(x, features[len(features) - 2 - k])
        return self.head(x)


def _out_of_place(act: str | tuple) -> str | tuple:
    """The same activation without ``inplace``: features are read again by other branches."""
    if isinstance(act, str):
        return act
    return act[0], {k: v for k, v in act[1].items() if k != "inplace"}
