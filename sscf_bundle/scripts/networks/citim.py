# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Cross-Image Tumor Information Modeling (section 2.1 of the paper, eq. 1-7), in factorized form.

With the class maps W of the current slice (c' x N) and W_l of entry l, the affinity P = W_l^T W has rank c', so

    b P = (b W_l^T) W = G W,        G = b W_l^T  (C x c')                                          (eq. 1, 2)

and the layer normalization over channels closes over the same factors: with Gc = G minus its channel mean and
Q = Gc^T Gc / C, the value at location n is Gc W(n) / sqrt(W(n)^T Q W(n) + eps). psi (eq. 3) is linear, so it is applied
to Gc once for each entry. The N x N affinity exists in the loss alone.
"""

from __future__ import annotations

import torch
from monai.networks.blocks import Convolution
from monai.networks.layers.factories import Conv
from torch import nn

from .blocks import DEFAULT_ACT, DEFAULT_NORM

#: A class with less mass than half a cell has no mean prototype.
MIN_CLASS_MASS = 0.5


class PredictionHead(nn.Module):
    """The light head of CITIM: four convolution blocks from a bottleneck feature to class probabilities W.

    The probabilities are a softmax over the tumor classes and background, or, as in the paper's text, independent
    sigmoids of the tumor classes (``sigmoid``); with these an entry of W_l^T W can exceed 1, where eq. 6 is undefined.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        num_classes: int,
        norm: str | tuple = DEFAULT_NORM,
        act: str | tuple = DEFAULT_ACT,
        sigmoid: bool = False,
    ) -> None:
        super().__init__()
        self.sigmoid = sigmoid
        # a quarter, as a multiple of 4, which the groups of the default normalization ask for
        hidden = max(in_channels // 16 * 4, 4)
        self.blocks = nn.Sequential(
            *(
                Convolution(spatial_dims, width, hidden, norm=norm, act=act, adn_ordering="NA")
                for width in (in_channels, hidden, hidden)
            ),
            Convolution(spatial_dims, hidden, num_classes, kernel_size=1, conv_only=True),
        )

    def forward(self, feature: torch.Tensor) -> torch.Tensor:
        """W, B x c' x N float32, of B x C x spatial; of the softmax, summing to 1 over c'."""
        logits = self.blocks(feature).flatten(2).float()
        return torch.sigmoid(logits) if self.sigmoid else torch.softmax(logits, dim=1)


def class_prototypes(
    feature: torch.Tensor, class_map: torch.Tensor, mean: bool, normalize: bool = False
) -> torch.Tensor:
    """Class prototypes G = b W_l^T, the part of eq. 2 that depends on the entry alone.

    Args:
        feature: E x C x N bottleneck features b.
        class_map: E x c' x N class probabilities W_l.
        mean: divide each prototype by the mass of its class (zero below half a cell), instead of the literal sum.
        normalize: bring each channel of b to mean 0 and variance 1 over the cells first. Raw features are mostly
            constants of their channels, which make the prototypes of all classes nearly parallel.

    Returns:
        E x C x c', float32.
    """
    with torch.autocast(feature.device.type, enabled=False):
        if normalize:
            variance, mean_over_cells = torch.var_mean(feature.float(), dim=2, correction=0, keepdim=True)
            feature = (feature.float() - mean_over_cells) * torch.rsqrt(variance + 1e-5)
        prototype = torch.matmul(feature.float(), class_map.float().transpose(1, 2))
    if mean:
        mass = class_map.float().sum(dim=2).unsqueeze(1)
        prototype = torch.where(mass < MIN_CLASS_MASS, torch.zeros_like(prototype), prototype / mass.clamp(min=1e-6))
    return prototype


class CITIM(nn.Module):
    """Turns the fused bottleneck feature and the bank into F_CITIM (eq. 1-4).

    Args:
        spatial_dims: 2 or 3.
        channels: C of F^5.
        num_contrasts: K.
        num_classes: c', with background but for ``sigmoid``.
        bank_size: L; only the ``concat`` aggregation has weights for each slot.
        aggregation: ``attention`` pools the entries by attention of the current feature, whatever their order and
            number; ``concat`` is the literal 1x1 convolution phi over Concat(F'_1..F'_L) of eq. 4.
        norm, act: MONAI layer specs.
        sigmoid: see ``PredictionHead``.
    """

    def __init__(
        self,
        spatial_dims: int,
        channels: int,
        num_contrasts: int,
        num_classes: int,
        bank_size: int,
        aggregation: str = "attention",
        norm: str | tuple = DEFAULT_NORM,
        act: str | tuple = DEFAULT_ACT,
        sigmoid: bool = False,
    ) -> None:
        super().__init__()
        self.eps = 1e-5
        self.channels, self.num_contrasts, self.bank_size = channels, num_contrasts, bank_size
        self.concat = aggregation == "concat"
        self.head = PredictionHead(spatial_dims, channels, num_classes, norm, act, sigmoid)
        conv = Conv[Conv.CONV, spatial_dims]
        #: psi (eq. 3), a 1x1 convolution from K * C to C, kept as a matrix since it acts on prototypes
        self.psi = nn.Linear(num_contrasts * channels, channels)
        if self.concat:
            self.phi = conv(bank_size * channels, channels, kernel_size=1)
            self.query: nn.Module = nn.Identity()
        else:
            self.phi = conv(channels, channels, kernel_size=1)
            self.query = nn.Linear(channels, channels)

    def fold(self, prototype: torch.Tensor, present: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Folds the layer normalization (eq. 2) and psi (eq. 3), with ``concat`` also phi (eq. 4), into the prototypes.

        Args:
            prototype: L x K x C x c' class prototypes G.
            present: L x K, contrasts that the entry has; the others give 0 and the rest is scaled by K / present.

        Returns:
            ``value``: L x K x c' x C, psi_i Gc, with ``concat`` phi_l psi_i Gc; ``gram``: L x K x c' x c', Q. Both
            float32.
        """
        centered = prototype.float() - prototype.float().mean(dim=2, keepdim=True)
        psi = self.psi.weight.float().view(self.channels, self.num_contrasts, self.channels)
        with torch.autocast(prototype.device.type, enabled=False):
            gram = torch.matmul(centered.transpose(2, 3), centered) / self.channels
            value = torch.einsum("oki,lkic->lkco", psi, centered).contiguous()
            if self.concat:
                phi = self.phi.weight.float().view(self.channels, self.bank_size, self.channels)
                value = torch.einsum("olp,lkcp->lkco", phi, value).contiguous()
        scale = self.num_contrasts / present.sum(dim=1).clamp(min=1).to(value.dtype)
        value = torch.where(present[:, :, None, None], value * scale[:, None, None, None], torch.zeros_like(value))
        return value, gram

    def forward(
        self,
        feature: torch.Tensor,
        class_map: torch.Tensor,
        value: torch.Tensor,
        gram: torch.Tensor,
        allowed: torch.Tensor,
    ) -> torch.Tensor:
        """Aggregates all allowed entries (eq. 2-4).

        Args:
            feature: B x C x spatial, the fused F^5.
            class_map: B x c' x N, W of the current slice.
            value: L x K x c' x C of ``fold``.
            gram: L x K x c' x c' of ``fold``.
            allowed: B x L, entries that the sample may use.

        Returns:
            F_CITIM, B x C x spatial, float32; zero for a sample without an allowed entry.
        """
        b, n = class_map.shape[0], class_map.shape[2]
        size, k, classes, c = value.shape
        w = class_map.float().transpose(1, 2)  # B x N x c'
        pairs = (w.unsqueeze(3) * w.unsqueeze(2)).flatten(2)  # B x N x c'^2
        variance = torch.matmul(pairs, gram.reshape(size * k, classes * classes).t())  # W^T Q W
        inverse_std = torch.rsqrt(variance.clamp(min=0) + self.eps).view(b, n, size, k)
        table = value.reshape(-1, c)  # (L K c') x C
        if self.concat:
            phi = self.phi.weight.float().view(c, size, c)
            bias = torch.matmul(allowed.to(phi.dtype), torch.matmul(phi, self.psi.bias.float()).t())
            weights = inverse_std * allowed[:, None, :, None].to(inverse_std.dtype)
            out = torch.matmul(self._coefficients(weights, w), table) + (bias + self._phi_bias(phi)).unsqueeze(1)
        else:
            query = self.query(feature.flatten(2).transpose(1, 2).float())
            # product of the query with what each entry and contrast retrieves at n: inverse_std sum_c' w_c' psi_i Gc
            scores = torch.matmul(query, table.t()).view(b, n, size * k, classes)
            scores = torch.matmul(scores, w.unsqueeze(3)).view(b, n, size, k)
            scores = (scores * inverse_std).sum(dim=3) / c**0.5
            scores = scores.masked_fill(~allowed.unsqueeze(1), -1e30)
            weights = inverse_std * torch.softmax(scores, dim=2).unsqueeze(3)
            pooled = torch.matmul(self._coefficients(weights, w), table) + self.psi.bias.float()
            out = torch.matmul(pooled, self.phi.weight.float().view(c, c).t()) + self._phi_bias(pooled)
        out = torch.where(allowed.any(dim=1)[:, None, None], out, torch.zeros_like(out))
        return out.transpose(1, 2).reshape(feature.shape)

    def _coefficients(self, weights: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """What multiplies each row psi_i Gc, B x N x (L K c'), from B x N x L x K weights and B x N x c' W."""
        return (weights.flatten(2).unsqueeze(3) * w.unsqueeze(2)).flatten(2)

    def _phi_bias(self, like: torch.Tensor) -> torch.Tensor:
        bias = self.phi.bias
        assert bias is not None
        return bias.to(like.dtype)
