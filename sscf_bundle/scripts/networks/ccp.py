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
the pixels of a (target, source) pair: m, s and max(f) are computed once for each source, and one pass gives y.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from monai.networks.layers.factories import Conv
from torch import nn

from .blocks import (
    channel_statistics,
    expand_dims_like,
    gather_maps,
    masked_mean,
    maximum_over,
    mean_of_maps,
    mix_channels,
)


def gather(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows of a table for an index of any shape: ``index.shape + table.shape[1:]``.

    Unlike ``table[index]``, its backward pass adds in a fixed order on the CPU, which an exact resume needs.
    """
    return table.index_select(0, index.flatten()).unflatten(0, index.shape)


class CCP(nn.Module):
    """The CCP modules of all targets at one scale, as one grouped call over the active pairs (eq. 8, 9).

    Every target has its own CBAM and every (target, source) pair its own part of gamma. Missing sources count as zeros
    in the concatenation; the sum is scaled by (K - 1) / |S|, so that its size does not depend on the scenario, unless
    ``scale_sources`` is False, as in the paper.

    Args:
        spatial_dims: 2 or 3.
        channels: C_j.
        num_contrasts: K.
        reduction: bottleneck ratio of CBAM's channel attention.
        kernel_size: kernel of CBAM's spatial attention.
        residual: add the result of eq. 9 to the mean of the available features, with gamma zero at the start; False is
            eq. 9 as it stands, which puts a random mixture in the place of every skip connection at the start.
        scale_sources: see above.
    """

    def __init__(
        self,
        spatial_dims: int,
        channels: int,
        num_contrasts: int,
        reduction: int = 16,
        kernel_size: int = 7,
        residual: bool = False,
        scale_sources: bool = True,
    ) -> None:
        super().__init__()
        k, c, hidden = num_contrasts, channels, max(channels // reduction, 4)
        self.num_contrasts, self.residual, self.scale_sources = k, residual, scale_sources
        self.squeeze_weight = nn.Parameter(torch.empty(k, hidden, c))
        self.squeeze_bias = nn.Parameter(torch.zeros(k, hidden))
        self.excite_weight = nn.Parameter(torch.empty(k, c, hidden))
        self.excite_bias = nn.Parameter(torch.zeros(k, c))
        # all targets' attention maps come from one convolution, the pair's own is picked afterwards: cheaper than
        # one small grouped convolution for each pair
        self.spatial = Conv[Conv.CONV, spatial_dims](2, k, kernel_size, padding=kernel_size // 2)
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

    def channel_attention(self, target: torch.Tensor, mean: torch.Tensor, maximum: torch.Tensor) -> torch.Tensor:
        """CBAM's channel attention in (0, 1) from the spatial mean and maximum (... x C) of the targets (...)."""
        pooled = torch.stack([mean, maximum], dim=-1)
        hidden = torch.matmul(gather(self.squeeze_weight.float(), target), pooled)
        hidden = torch.relu(hidden + gather(self.squeeze_bias.float(), target).unsqueeze(-1))
        out = torch.matmul(gather(self.excite_weight.float(), target), hidden)
        return torch.sigmoid((out + gather(self.excite_bias.float(), target).unsqueeze(-1)).sum(dim=-1))

    def affine(
        self,
        maximum: torch.Tensor,
        center: torch.Tensor,
        own_std: torch.Tensor,
        target: torch.Tensor,
        found: torch.Tensor,
        mean: torch.Tensor,
        std: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """AdaIN (eq. 8) and CBAM's channel attention of pairs, as one affine map of each source channel.

        Args:
            maximum: ... x C spatial maximum of the source feature.
            center: ... x C, its mean.
            own_std: ... x C, its standard deviation.
            target: ... contrast indices.
            found: ...; without a retrieved entry the source's own statistics are kept.
            mean: ... x C prototype mean mu.
            std: ... x C prototype standard deviation sigma.

        Returns:
            ``scale`` and ``shift``, ... x C.
        """
        keep = found.unsqueeze(-1)
        ratio = torch.where(keep, std.float(), own_std) / own_std
        mean = torch.where(keep, mean.float(), center)
        attention = self.channel_attention(target, mean, ratio * (maximum - center) + mean)
        return attention * ratio, attention * (mean - ratio * center)

    def attend(
        self, maps: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, gamma: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """AdaIN, CBAM's channel attention and gamma for R targets of each source feature, but for spatial attention.

        Spatial attention is one number for a pixel, so it can be multiplied behind gamma, and gamma and the affine map
        of AdaIN and channel attention are one matrix.

        Args:
            maps: M x C x spatial source features.
            scale: M x R x C of ``affine``.
            shift: M x R x C of ``affine``.
            gamma: M x R x C x C.

        Returns:
            ``mixed``, M x R x C x spatial, gamma of the refined feature; ``pooled``, M x R x 2 x spatial, its mean and
            maximum over channels.
        """
        r, c = scale.shape[1:]
        # the mean over channels is one more row of the matrix
        weight = torch.cat([gamma * scale.unsqueeze(2), (scale / c).unsqueeze(2)], dim=2).flatten(1, 2)
        bias = torch.cat([torch.matmul(gamma, shift.unsqueeze(3)).squeeze(3), shift.mean(2, keepdim=True)], dim=2)
        rows = mix_channels(weight.to(maps.dtype), maps, expand_dims_like(bias.flatten(1, 2), maps).to(maps.dtype))
        rows = rows.unflatten(1, (r, c + 1))
        # two vectorized passes take a fifth of the time of addcmul's one over operands of unequal shapes on a CPU
        refined = maps.unsqueeze(1) * expand_dims_like(scale.to(maps.dtype), rows)
        refined = refined.add_(expand_dims_like(shift.to(maps.dtype), rows))
        return rows[:, :, :c], torch.stack([rows[:, :, c], maximum_over(refined, 2).to(rows.dtype)], dim=2)

    def forward(
        self,
        feature: torch.Tensor,
        center: torch.Tensor,
        own_std: torch.Tensor,
        available: torch.Tensor,
        target: torch.Tensor,
        source: torch.Tensor,
        active: torch.Tensor,
        found: torch.Tensor,
        mean: torch.Tensor,
        std: torch.Tensor,
    ) -> torch.Tensor:
        """Predicts the features of the missing contrasts of samples with different scenarios.

        Args:
            feature: B x K x C x spatial features F_i^j, finite; those of missing contrasts do not reach the result.
            center: B x K x C, their means over space.
            own_std: B x K x C, their standard deviations.
            available: B x K.
            target: B x P of ``active_pairs``, like ``source`` and ``active``.
            source: B x P.
            active: B x P.
            found: B x P, like ``mean`` and ``std`` as in ``affine``.
            mean: B x P x C.
            std: B x P x C.

        Returns:
            B x K x C x spatial, what the decoders read: F_CCP^j of the missing contrasts, F_i^j of the available.
        """
        b, k = feature.shape[:2]
        sample = torch.arange(b, device=feature.device).unsqueeze(1)
        # contrast after contrast, as the features lie in memory
        maps = feature.transpose(0, 1).flatten(0, 1)
        # an idle slot repeats the first pair with gain 0, so that it reads no missing contrast
        row = (torch.where(active, source, source[:, :1]) * b + sample).flatten()
        maximum = maximum_over(maps.flatten(2), 2).float()
        scale, shift = self.affine(
            gather(maximum, row),
            gather(center.transpose(0, 1).flatten(0, 1), row),
            gather(own_std.transpose(0, 1).flatten(0, 1), row),
            target.flatten(),
            found.flatten(),
            mean.flatten(0, 1),
            std.flatten(0, 1),
        )
        gain = active.float()
        if self.scale_sources:
            gain = active / available.sum(dim=1, keepdim=True).clamp(min=1) * (k - 1)
        gamma = gather(self.gamma_weight.flatten(0, 1), (target * k + source).flatten()) * gain.flatten()[:, None, None]
        mixed, pooled = self.attend(gather_maps(maps, row), scale.unsqueeze(1), shift.unsqueeze(1), gamma.unsqueeze(1))
        attended = self.spatial(pooled.squeeze(1))
        gate = attended.gather(1, expand_dims_like(target.flatten().unsqueeze(1), attended).expand_as(attended[:, :1]))
        fused = mixed.squeeze(1) * torch.sigmoid(gate)
        own = expand_dims_like(available.t().flatten(), maps)
        base = expand_dims_like(self.gamma_bias.to(fused.dtype).repeat_interleave(b, dim=0), maps)
        if self.residual:
            base = base + torch.cat([masked_mean(feature, available).to(fused.dtype)] * k)
        out = torch.where(own, maps.to(fused.dtype), base).index_add_(0, (target * b + sample).flatten(), fused)
        return out.unflatten(0, (k, b)).transpose(0, 1)

    def predict(
        self,
        features: list[torch.Tensor],
        sources: torch.Tensor,
        targets: torch.Tensor,
        found: torch.Tensor,
        mean: torch.Tensor,
        std: torch.Tensor,
    ) -> torch.Tensor:
        """``forward`` for samples that share one scenario: only what the scenario needs is computed.

        Args:
            features: of each available contrast, B x C x spatial.
            sources: S indices of the available contrasts.
            targets: T indices of the missing contrasts.
            found: B x T x S, like ``mean`` and ``std`` as in ``affine``.
            mean: B x T x S x C.
            std: B x T x S x C.

        Returns:
            F_CCP^j of the missing contrasts, T x B x C x spatial.
        """
        num_targets, b = targets.shape[0], features[0].shape[0]
        target = targets.unsqueeze(1).expand(-1, b)
        kernel = self.spatial.weight.index_select(0, targets)
        assert self.spatial.bias is not None
        offset = self.spatial.bias.index_select(0, targets)
        convolve = F.conv2d if features[0].dim() == 4 else F.conv3d
        gain = (self.num_contrasts - 1) / len(features) if self.scale_sources else 1.0
        gamma = self.gamma_weight.index_select(0, targets).index_select(1, sources) * gain  # T x S x C x C
        bias = self.gamma_bias.index_select(0, targets).unsqueeze(0).to(features[0].dtype)
        out = expand_dims_like(bias, features[0].unsqueeze(1))
        if self.residual:
            out = out + mean_of_maps(features).unsqueeze(1)
        # one source after the other: they add up, and no stack of feature maps has to be made
        for s, maps in enumerate(features):
            center, own_std = (t[:, 0] for t in channel_statistics(maps.unsqueeze(1)))
            scale, shift = self.affine(
                maximum_over(maps.flatten(2), 2).float(),
                center,
                own_std,
                target,
                found[:, :, s].t(),
                mean[:, :, s].transpose(0, 1),
                std[:, :, s].transpose(0, 1),
            )
            mixed, pooled = self.attend(
                maps, scale.transpose(0, 1), shift.transpose(0, 1), gamma[:, s].expand(b, -1, -1, -1)
            )
            # each target's own kernel alone: targets become groups of the convolution
            gate = convolve(pooled.flatten(1, 2), kernel, offset, padding=kernel.shape[-1] // 2, groups=num_targets)
            out = torch.addcmul(out, mixed, torch.sigmoid(gate).unsqueeze(2).to(mixed.dtype))
        return out.transpose(0, 1)
