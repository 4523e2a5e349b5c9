# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Cross-Contrast Prediction (section 2.2 of the paper, eq. 8 and 9): retrieval, AdaIN, CBAM and fusion at one scale.

AdaIN takes nothing of a prototype but its channel statistics, and both AdaIN and CBAM's channel attention are affine in
the feature f of the source contrast. With m, s its own mean and standard deviation, mu, sigma those of the prototype
and r = sigma / s, the attention is

    a = sigmoid(MLP(mu) + MLP(r (max(f) - m) + mu)),      y = (a r) f + a (mu - r m),

where the spatial mean of AdaIN's result is mu and its spatial maximum r (max(f) - m) + mu, so neither needs a pass over
the pixels of a (target, source) pair: m, s and max(f) are computed once for each source, and one pass gives y. What has
no pixels is computed for all scales at once, with their channels one behind the other.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from monai.networks.layers.factories import Conv
from torch import nn

from .blocks import expand_dims_like, gather_maps, masked_mean, maximum_over, mean_of_maps, mix_channels, number_of

#: Bottleneck ratio of CBAM's channel attention.
REDUCTION = 16
#: Kernel of CBAM's spatial attention.
KERNEL_SIZE = 7


class Pairs(NamedTuple):
    """The M (target, source) pairs of a batch of samples with different scenarios, see ``pairs_of_batch``."""

    target: torch.Tensor  #: M target contrasts.
    target_row: torch.Tensor  #: M rows of the targets in a table of K B rows, contrast after contrast.
    source_row: torch.Tensor  #: M rows of the sources in it.
    gamma_row: torch.Tensor  #: M rows of the pairs in a table of K K rows, target after target.
    gain: torch.Tensor  #: M factors of eq. 9, 0 for an idle pair.


def pairs_of_batch(
    available: torch.Tensor, target: torch.Tensor, source: torch.Tensor, active: torch.Tensor, scale_sources: bool
) -> Pairs:
    """The pairs of ``active_pairs`` as rows of tables; for ``scale_sources`` see ``CCP``."""
    b, k = available.shape
    sample = torch.arange(b, device=available.device).unsqueeze(1)
    gain = active.float()
    if scale_sources:
        gain = gain / number_of(available).unsqueeze(1) * (k - 1)
    return Pairs(
        target.flatten(),
        (target * b + sample).flatten(),
        (source * b + sample).flatten(),
        (target * k + source).flatten(),
        gain.flatten(),
    )


def gather(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows of a table for an index of any shape: ``index.shape + table.shape[1:]``.

    Unlike ``table[index]``, its backward pass adds in a fixed order on the CPU, which an exact resume needs.
    """
    return table.index_select(0, index.flatten()).unflatten(0, index.shape)


def adain(
    maximum: torch.Tensor,
    center: torch.Tensor,
    own_std: torch.Tensor,
    found: torch.Tensor,
    mean: torch.Tensor,
    std: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """AdaIN (eq. 8) of M pairs as an affine map of each source channel.

    ``maximum``, ``center`` and ``own_std`` are those of the source feature over space, ``mean`` and ``std`` the mu and
    sigma of the prototype, all M x C; where nothing was ``found`` (M x 1), the source's own are kept.

    Returns:
        ``ratio`` and ``offset``, M x C, and ``pooled``, 2 M x C: the spatial means of the result, then its maxima.
    """
    ratio = torch.where(found, std.float(), own_std) / own_std
    mean = torch.where(found, mean.float(), center)
    offset = mean - ratio * center
    return ratio, offset, torch.cat([mean, ratio * maximum + offset])


class CCP(nn.Module):
    """The CCP modules of all targets at one scale, as one grouped call over the active pairs (eq. 8, 9).

    Every target has its own CBAM and every (target, source) pair its own part of gamma. Missing sources count as zeros
    in the concatenation; the sum is scaled by (K - 1) / |S|, so that its size does not depend on the scenario, unless
    ``scale_sources`` is False, as in the paper.

    Args:
        spatial_dims: 2 or 3.
        channels: C_j.
        num_contrasts: K.
        residual: add the result of eq. 9 to the mean of the available features, with gamma zero at the start; False is
            eq. 9 as it stands, which puts a random mixture in the place of every skip connection at the start.
        scale_sources: see above.
    """

    def __init__(
        self, spatial_dims: int, channels: int, num_contrasts: int, residual: bool = False, scale_sources: bool = True
    ) -> None:
        super().__init__()
        k, c, hidden = num_contrasts, channels, max(channels // REDUCTION, 4)
        self.num_contrasts, self.residual, self.scale_sources = k, residual, scale_sources
        self.squeeze_weight = nn.Parameter(torch.empty(k, hidden, c))
        self.squeeze_bias = nn.Parameter(torch.zeros(k, hidden))
        self.excite_weight = nn.Parameter(torch.empty(k, c, hidden))
        self.excite_bias = nn.Parameter(torch.zeros(k, c))
        # all targets' attention maps come from one convolution, the pair's own is picked afterwards: cheaper than
        # one small grouped convolution for each pair
        self.spatial = Conv[Conv.CONV, spatial_dims](2, k, KERNEL_SIZE, padding=KERNEL_SIZE // 2)
        self.gamma_weight = nn.Parameter(torch.empty(k, k, c, c))
        self.gamma_bias = nn.Parameter(torch.zeros(k, c))
        for weight, fan_in in (
            (self.squeeze_weight, c),
            (self.excite_weight, hidden),
            (self.gamma_weight, (k - 1) * c),
        ):
            nn.init.uniform_(weight, -(fan_in**-0.5), fan_in**-0.5)
        if residual:
            nn.init.zeros_(self.gamma_weight)

    def channel_attention(self, chosen: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        """The MLP of CBAM's channel attention, whose results for mean and maximum are added before a sigmoid.

        Args:
            chosen: M x K float, 1 at the target of each row.
            pooled: M x C.

        Returns:
            M x C.
        """
        # of all targets, of which the own one is kept: no weights have to be gathered
        squeeze, squeeze_bias = self.squeeze_weight.float().flatten(0, 1), self.squeeze_bias.float().flatten()
        hidden = torch.relu(F.linear(pooled, squeeze, squeeze_bias))
        kept = (hidden.unflatten(1, self.squeeze_bias.shape) * chosen.unsqueeze(2)).flatten(1)
        excite = self.excite_weight.float().transpose(1, 2).flatten(0, 1)
        return torch.mm(kept, excite) + torch.mm(chosen, self.excite_bias.float())

    def attend(self, refined: torch.Tensor, gamma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gamma and what spatial attention is computed from.

        Spatial attention is one number for a pixel, so it can be multiplied behind gamma.

        Args:
            refined: M x C x spatial features behind AdaIN and channel attention.
            gamma: M x (C + 1) x C, whose last row gives the mean over channels.

        Returns:
            ``mixed``, M x C x spatial, gamma of the refined feature; ``pooled``, M x 2 x spatial, its mean and maximum
            over channels.
        """
        mixed, mean = mix_channels(gamma, refined).split([refined.shape[1], 1], dim=1)
        return mixed, torch.cat([mean, maximum_over(refined, 1).to(mean.dtype).unsqueeze(1)], dim=1)

    def forward(
        self, feature: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, available: torch.Tensor, pairs: Pairs
    ) -> torch.Tensor:
        """Predicts the features of the missing contrasts of samples with different scenarios.

        Args:
            feature: B x K x C x spatial features F_i^j, finite; those of missing contrasts do not reach the result.
            scale: M x C in the type of the features; with ``shift`` AdaIN and channel attention of each pair.
            shift: M x C.
            available: B x K.
            pairs: M pairs.

        Returns:
            B x K x C x spatial, what the decoders read: F_CCP^j of the missing contrasts, F_i^j of the available.
        """
        b, k = feature.shape[:2]
        maps = feature.transpose(0, 1).flatten(0, 1)  # contrast after contrast, as the features lie in memory
        refined = gather_maps(maps, pairs.source_row) * expand_dims_like(scale, maps)
        refined = refined.add_(expand_dims_like(shift, maps))
        gamma = gather(mean_row(self.gamma_weight.flatten(0, 1)), pairs.gamma_row).to(maps.dtype)
        mixed, pooled = self.attend(refined, gamma)
        attended = self.spatial(pooled)
        place = expand_dims_like(pairs.target.unsqueeze(1), attended).expand_as(attended[:, :1])
        gate = torch.sigmoid(attended.gather(1, place)) * expand_dims_like(pairs.gain.to(attended.dtype), attended)
        base = expand_dims_like(self.gamma_bias.to(mixed.dtype).unsqueeze(1).expand(-1, b, -1), feature)
        if self.residual:
            base = base + masked_mean(feature, available).to(mixed.dtype)
        out = torch.where(expand_dims_like(available.t().flatten(), maps), maps.to(mixed.dtype), base.flatten(0, 1))
        out = out.index_add_(0, pairs.target_row, mixed * gate.to(mixed.dtype))
        return out.unflatten(0, (k, b)).transpose(0, 1)

    def predict(
        self,
        feature: torch.Tensor,
        scale: torch.Tensor,
        shift: torch.Tensor,
        sources: torch.Tensor,
        targets: torch.Tensor,
    ) -> torch.Tensor:
        """``forward`` for samples that share one scenario: only what the scenario needs is computed.

        Args:
            feature: B x S x C x spatial, those of the available contrasts.
            scale: (S B) x T x C, source after source, like ``shift`` as in ``forward``.
            shift: (S B) x T x C.
            sources: S indices of the available contrasts.
            targets: T indices of the missing contrasts.

        Returns:
            F_CCP^j of the missing contrasts, T x B x C x spatial.
        """
        b, num_sources = feature.shape[:2]
        maps, num_targets = feature.transpose(0, 1).flatten(0, 1), targets.shape[0]
        refined = maps.unsqueeze(1) * expand_dims_like(scale, feature)
        refined = refined.add_(expand_dims_like(shift, feature)).flatten(0, 1)
        gain = (self.num_contrasts - 1) / num_sources if self.scale_sources else 1.0
        pairs = targets * self.num_contrasts + sources.unsqueeze(1)  # S x T
        gamma = mean_row(gather(self.gamma_weight.flatten(0, 1), pairs) * gain).to(maps.dtype)
        mixed, pooled = self.attend(refined, gamma.unsqueeze(1).expand(-1, b, -1, -1, -1).flatten(0, 2))
        # each target's own kernel alone: targets become groups of the convolution
        kernel, offset = self.spatial.weight.index_select(0, targets), self.spatial.bias
        assert offset is not None
        gate = (F.conv2d if maps.dim() == 4 else F.conv3d)(
            pooled.unflatten(0, (-1, num_targets)).flatten(1, 2),
            kernel,
            offset.index_select(0, targets),
            padding=KERNEL_SIZE // 2,
            groups=num_targets,
        )
        mixed = mixed.unflatten(0, (num_sources, b, num_targets))
        gate = torch.sigmoid(gate).unflatten(0, (num_sources, b)).unsqueeze(3)
        bias = expand_dims_like(self.gamma_bias.index_select(0, targets).to(mixed.dtype).unsqueeze(0), feature)
        if self.residual:
            bias = bias + mean_of_maps(feature.unbind(1)).to(mixed.dtype).unsqueeze(1)
        # on a CPU faster than a sum in half precision
        first, *further = (mixed * gate.to(mixed.dtype)).unbind(0)
        out = first + bias
        for fused in further:
            out = out.add_(fused)
        return out.transpose(0, 1)


def mean_row(gamma: torch.Tensor) -> torch.Tensor:
    """Gamma (... x C x C) with one more row, which gives the mean over channels."""
    return F.pad(gamma, (0, 0, 0, 1), value=1.0 / gamma.shape[-1])
