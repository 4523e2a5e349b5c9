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
the normalized feature x of the source contrast. With mu, sigma of the prototype, the attention is

    a_c = sigmoid(MLP(mu) + MLP(sigma max(x) + mu)),      y = (a sigma) x + a mu,

where the spatial mean of AdaIN's result is mu and its spatial maximum sigma max(x) + mu, so neither needs a pass over
the pixels of a (target, source) pair: x and max(x) are computed once for each source, and one pass gives y.
"""

from __future__ import annotations

import torch
from monai.networks.layers.factories import Conv
from torch import nn

from .memory_bank import CompiledBank


def active_pairs(available: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The (target, source) pairs of each sample, packed to the front with a static shape.

    Args:
        available: B x K boolean; K = 4 gives 3 or 4 active pairs for 1 to 3 available contrasts.

    Returns:
        ``target``, ``source``: B x P contrast indices with P = (K / 2)^2; ``active``: B x P boolean.
    """
    k = available.shape[1]
    table = (~available).unsqueeze(2) & available.unsqueeze(1)  # B x target x source
    flat = table.flatten(1)
    order = torch.argsort((~flat).to(torch.int64), dim=1, stable=True)[:, : (k // 2) * ((k + 1) // 2)]
    return torch.div(order, k, rounding_mode="floor"), order % k, torch.gather(flat, 1, order)


def retrieve(
    query: torch.Tensor,
    bank: CompiledBank,
    allowed: torch.Tensor,
    target: torch.Tensor,
    source: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearest entry l* of every (target, source) pair by Euclidean distance of the source's keys.

    Args:
        query: B x K x D keys of the current slice.
        bank: the compiled bank of L slots.
        allowed: B x L, entries that the sample may use.
        target: B x P.
        source: B x P.

    Returns:
        ``index``: B x P slot l* (0 where none is usable); ``found``: B x P boolean.
    """
    keys = bank.key.float()
    if torch.jit.is_scripting():
        products = torch.einsum("bkd,lkd->bkl", query.float(), keys)
    else:
        with torch.autocast(query.device.type, enabled=False):
            products = torch.einsum("bkd,lkd->bkl", query.float(), keys)
    distance = (keys * keys).sum(dim=2).t().unsqueeze(0) - 2 * products  # the query's own norm moves no argmin
    rows = torch.arange(query.shape[0], device=query.device).unsqueeze(1)
    has = bank.present.t()  # K x L
    usable = allowed.unsqueeze(1) & has[source] & has[target]
    distance = distance[rows, source].masked_fill(~usable, float("inf"))
    return distance.argmin(dim=2), usable.any(dim=2)


def pick(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows of a table for an index of any shape.

    Unlike ``table[index]``, its backward pass adds in a fixed order on the CPU, which an exact resume needs.

    Args:
        table: R x ... tensor.
        index: int64 tensor of any shape, values below R.

    Returns:
        Tensor of shape ``index.shape + table.shape[1:]``.
    """
    return table.index_select(0, index.flatten()).unflatten(0, index.shape)


class CCP(nn.Module):
    """The CCP modules of all targets at one scale, as one grouped call over the active pairs (eq. 8, 9).

    Every target has its own CBAM and every (target, source) pair its own part of gamma. Missing sources count as zeros
    in the concatenation; the sum is scaled by (K - 1) / |S|, so that its size does not depend on the scenario.

    Args:
        spatial_dims: 2 or 3.
        channels: C_j.
        num_contrasts: K.
        reduction: bottleneck ratio of CBAM's channel attention.
        kernel_size: kernel of CBAM's spatial attention.
        eps: of AdaIN's variance.
    """

    def __init__(
        self,
        spatial_dims: int,
        channels: int,
        num_contrasts: int,
        reduction: int = 16,
        kernel_size: int = 7,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        k, c, hidden = num_contrasts, channels, max(channels // reduction, 4)
        self.num_contrasts, self.eps = k, eps
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

    def channel_attention(self, target: torch.Tensor, mean: torch.Tensor, maximum: torch.Tensor) -> torch.Tensor:
        """CBAM's channel attention from the pooled values of each pair.

        Args:
            target: B x P.
            mean: B x P x C spatial mean.
            maximum: B x P x C spatial maximum.

        Returns:
            B x P x C in (0, 1).
        """
        pooled = torch.stack([mean, maximum], dim=3)  # B x P x C x 2
        hidden = torch.matmul(pick(self.squeeze_weight.float(), target), pooled)
        hidden = torch.relu(hidden + pick(self.squeeze_bias.float(), target).unsqueeze(3))
        out = torch.matmul(pick(self.excite_weight.float(), target), hidden)
        return torch.sigmoid((out + pick(self.excite_bias.float(), target).unsqueeze(3)).sum(dim=3))

    def forward(
        self,
        feature: torch.Tensor,
        target: torch.Tensor,
        source: torch.Tensor,
        active: torch.Tensor,
        found: torch.Tensor,
        mean: torch.Tensor,
        std: torch.Tensor,
    ) -> torch.Tensor:
        """Predicts the features of the missing contrasts.

        Args:
            feature: B x K x C x spatial features F_i^j; only rows that ``source`` names with ``active`` are used.
            target: B x P.
            source: B x P.
            active: B x P.
            found: B x P; without a retrieved entry the source's own statistics are kept.
            mean: B x P x C prototype mean mu.
            std: B x P x C prototype standard deviation sigma.

        Returns:
            F_CCP^j, B x K x C x spatial; rows of contrasts that are no target hold the bias of gamma alone.
        """
        b, k, c = feature.shape[:3]
        pairs, space = target.shape[1], feature.shape[3:]
        rows = torch.arange(b, device=feature.device).unsqueeze(1)
        flat = feature.flatten(3)
        # a source that is not really available is replaced before anything is computed from it
        usable = torch.zeros(b, k, dtype=torch.int64, device=feature.device).scatter_add(1, source, active.long()) > 0
        flat = torch.where(usable[:, :, None, None], flat, torch.zeros((), dtype=flat.dtype, device=flat.device))
        variance, center = torch.var_mean(flat.float(), dim=3, correction=0)
        own_std = torch.sqrt(variance + self.eps)
        normalized = ((flat - center.unsqueeze(3)) / own_std.unsqueeze(3)).to(feature.dtype)
        maximum = normalized.amax(dim=3).float()

        keep, from_source = found.unsqueeze(2), rows * k + source
        mean = torch.where(keep, mean.float(), pick(center.flatten(0, 1), from_source))
        std = torch.where(keep, std.float(), pick(own_std.flatten(0, 1), from_source))
        attention = self.channel_attention(target, mean, std * pick(maximum.flatten(0, 1), from_source) + mean)
        scale = (attention * std).flatten(0, 1)  # (B P) x C: y = scale * x + shift
        shift = (attention * mean).flatten(0, 1)

        x = normalized.flatten(0, 1).index_select(0, from_source.flatten())  # (B P) x C x N
        y = x * scale.to(x.dtype).unsqueeze(2) + shift.to(x.dtype).unsqueeze(2)
        pooled = torch.stack([y.mean(dim=1), y.amax(dim=1)], dim=1)
        maps = self.spatial(pooled.unflatten(2, space)).flatten(2)
        gate = torch.sigmoid(maps.gather(1, target.flatten()[:, None, None].expand(-1, 1, maps.shape[2])))
        gate = gate * active.flatten()[:, None, None].to(gate.dtype)

        gamma = pick(self.gamma_weight.flatten(0, 1), target * k + source).flatten(0, 1)
        fused = torch.bmm(gamma.to(y.dtype), y) * gate
        sources = usable.sum(dim=1).clamp(min=1).to(fused.dtype)
        fused = fused * ((self.num_contrasts - 1) / sources).repeat_interleave(pairs)[:, None, None]
        out = torch.zeros((b * k, c, flat.shape[3]), dtype=fused.dtype, device=fused.device)
        out = out.index_add(0, (rows * k + target).flatten(), fused)
        out = out.view(b, k, c, -1) + self.gamma_bias.to(out.dtype).unsqueeze(2)
        return out.unflatten(3, space)
