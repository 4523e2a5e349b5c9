# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""SSCFNet: any available contrasts in, all four contrasts and the tumor classes out (Figure 1 of the paper)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
import torch.nn.functional as F
from monai.networks.layers.factories import Conv
from torch import nn

from ..contrasts import NUM_CONTRASTS, NUM_TUMOR_CLASSES
from .availability import read_availability
from .blocks import (
    DEFAULT_ACT,
    DEFAULT_NORM,
    PRIOR_PROBABILITY,
    Decoder,
    Encoder,
    channel_numbers,
    expand_dims_like,
    masked_mean,
    mean_of_maps,
    number_of,
    pooled_statistics,
    scale_statistics,
    stack_contrasts,
)
from .ccp import CCP, adain, gather, pairs_of_batch
from .citim import CITIM
from .memory_bank import BankEntries, CompiledBank, MemoryBank
from .plain_unet import PlainUNet
from .retrieval import active_pairs, key_distances, mean_prototype, retrieve, usable_for_pairs
from .settings import ConfiguredNetwork


class BranchOutputs(NamedTuple):
    """What both branches compute of one batch."""

    logits: torch.Tensor  #: B x 3 x spatial, logits of ED, ET, NET; -inf without a segmentation branch.
    images: torch.Tensor  #: B x K x spatial in [-1, 1]; -1 without a synthesis branch.
    class_map: torch.Tensor  #: B x c' x N, W of the fused feature; empty without CITIM.
    first: list[torch.Tensor]  #: F_i^1..F_i^5 of the first pass (no mask), each B x K x C_j x spatial.
    second: list[torch.Tensor]  #: F_i^1..F_i^5 of the second pass (predicted mask).
    #: of the second pass, mean and standard deviation, each B x K x (C_1 + ... + C_5).
    statistics: tuple[torch.Tensor, torch.Tensor]
    #: by scale F_CCP^j of the missing contrasts and F_i^j of the available, B x K x C_j x spatial; empty without a
    #: synthesis branch.
    predicted: list[torch.Tensor]


class SSCFNet(ConfiguredNetwork):
    """Segmentation-assisted synthesis network with a compiled memory bank.

    ``forward`` takes one tensor and returns one tensor. The compiled bank is part of its state; an empty bank (a
    network that was never given one) works: F_CITIM is zero and AdaIN keeps the statistics of the source.

    In the methods ``images`` are B x K x spatial in [-1, 1]; ``features`` by scale F_i^1..F_i^5, each B x K x C_j x
    spatial / 2^(j-1); ``available`` is B x K boolean; ``bank`` a compiled bank of L slots; ``allowed``, B x L, says
    which entries a sample may use; ``target`` and ``source``, B x P, are the contrasts of (target, source) pairs.

    Args:
        spatial_dims: 2 or 3.
        channels: channels of F^1..F^5, or a name in ``PRESETS``.
        bank_size: number of bank entries L.
        key_size: retrieval keys are F_i^5 pooled to ``key_size`` cells along each axis.
        prototype: ``sum`` (the literal eq. 2) or ``mean``, see ``class_prototypes``.
        aggregation: ``attention`` or ``concat``, see ``CITIM``.
        norm: MONAI normalization spec; must not use statistics of the batch.
        act: MONAI activation spec.
        entry: how what is retrieved enters the network: ``residual``, added to what stands there without it and zero at
            the start; or ``literal``, in its place (eq. 9) and concatenated (section 2.1), as in the paper.
        normalize_prototypes: see ``class_prototypes``; False is the paper.
        segmentation: ``citim``, the branch of the paper; ``plain``, one without CITIM; ``none``, no branch: the
            probabilities are 0 and there is one pass. All but the first are ablations, as the next five.
        synthesis: False leaves the segmentation branch alone: all images are -1.
        prediction: ``ccp``; or ``mean``, which predicts F^j of a missing contrast as the mean over the available ones.
        mask_input: False is one pass for both branches: encoders see no mask, and the loop is open.
        closed_loop: False detaches the mask that the second pass sees.
        retrieval: ``nearest``; the controls are ``random``, any usable entry, and ``mean``, the mean of all.
        head: ``softmax`` over tumor classes and background, or the paper's ``sigmoid`` of the tumor classes, see
            ``PredictionHead``.
        keys: ``bottleneck``, one key of F_i^5 for all scales; or ``each_scale``, as in the paper: F_i^j pooled to
            ``key_size`` 2^(5 - j) cells along each axis, the whole map where that is its size.
        scale_sources: False leaves out the factors (K - 1) / |S| of eq. 9 and K / |S| of the fused F^5.
        companion: channels of a ``PlainUNet``, which sees all available contrasts at once: decoded images are the mean
            of its and those of the synthesis branch. None, the paper, is the branch alone.

    Raises:
        ValueError: for an unknown preset or variant, variants that exclude each other, or a batch normalization.
    """

    FREE_ARGUMENTS = ("closed_loop", "retrieval")
    # constants, so that TorchScript leaves out what a variant does not have
    __constants__ = [
        "closed_loop",
        "two_passes",
        "residual",
        "retrieval",
        "synthesis",
        "with_ccp",
        "with_citim",
        "with_segmentation",
    ]
    if TYPE_CHECKING:  # TorchScript would read these, and cannot read them as text
        bank_key: torch.Tensor
        bank_key_square: torch.Tensor
        bank_mean: torch.Tensor
        bank_std: torch.Tensor
        bank_value: torch.Tensor
        bank_gram: torch.Tensor
        bank_present: torch.Tensor
        bank_patient: torch.Tensor

    def __init__(
        self,
        spatial_dims: int = 2,
        channels: Sequence[int] | str = "base",
        bank_size: int = 300,
        key_size: int = 3,
        prototype: str = "sum",
        aggregation: str = "attention",
        norm: str | tuple = DEFAULT_NORM,
        act: str | tuple = DEFAULT_ACT,
        entry: str = "residual",
        normalize_prototypes: bool = True,
        segmentation: str = "citim",
        synthesis: bool = True,
        prediction: str = "ccp",
        mask_input: bool = True,
        closed_loop: bool = True,
        retrieval: str = "nearest",
        head: str = "softmax",
        keys: str = "bottleneck",
        scale_sources: bool = True,
        companion: Sequence[int] | str | None = None,
    ) -> None:
        super().__init__()
        channels = channel_numbers(channels)
        self.keep_arguments(locals())
        for name, value, known in (
            ("entry", entry, ("residual", "literal")),
            ("prototype", prototype, ("sum", "mean")),
            ("aggregation", aggregation, ("attention", "concat")),
            ("segmentation", segmentation, ("citim", "plain", "none")),
            ("prediction", prediction, ("ccp", "mean")),
            ("retrieval", retrieval, ("nearest", "random", "mean")),
            ("head", head, ("softmax", "sigmoid")),
            ("keys", keys, ("bottleneck", "each_scale")),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}.")
        if segmentation == "none" and not synthesis:
            raise ValueError("a network without segmentation and without synthesis computes nothing.")
        if companion is not None and not synthesis:
            raise ValueError("a network without synthesis has no images that a companion could join.")
        if not (closed_loop or mask_input):
            raise ValueError("closed_loop false detaches the mask of a second pass: set mask_input to true.")
        self.with_segmentation, self.with_citim = segmentation != "none", segmentation == "citim"
        self.synthesis, self.with_ccp = synthesis, synthesis and prediction == "ccp"
        self.residual, self.normalize_prototypes = entry == "residual", normalize_prototypes
        self.two_passes = self.with_segmentation and synthesis and mask_input
        self.closed_loop, self.retrieval, self.mean_prototype = closed_loop, retrieval, prototype == "mean"
        if "batch" in str(norm).lower():
            raise ValueError("batch normalization would let one sample's missing contrasts reach another sample.")
        self.spatial_dims, self.channels, self.bank_size = spatial_dims, tuple(channels), bank_size
        self.feature_channels = sum(channels)
        self.num_contrasts, self.num_tumor_classes = NUM_CONTRASTS, NUM_TUMOR_CLASSES
        self.all_contrasts = list(range(NUM_CONTRASTS))
        #: c', classes of W
        self.num_classes = NUM_TUMOR_CLASSES + (head == "softmax")
        self.scale_sources, self.widths = scale_sources, list(channels)
        last = len(channels) - 1
        #: cells of the key of each scale along each axis, 0 where a scale has none
        self.key_cells = [key_size * 2 ** (last - j) if keys == "each_scale" else 0 for j in range(last)] + [key_size]
        self.key_lengths = [
            width * cells**spatial_dims for width, cells in zip(channels, self.key_cells, strict=True) if cells
        ]
        #: channels whose statistics are retrieved by the key of each scale that has one
        self.key_widths = self.widths if keys == "each_scale" else [self.feature_channels]
        k, c, classes = NUM_CONTRASTS, channels[-1], self.num_classes
        conv = Conv[Conv.CONV, spatial_dims]
        self.encoders = nn.ModuleList(
            Encoder(spatial_dims, 1 + NUM_TUMOR_CLASSES, channels, norm, act) for _ in range(k)
        )
        if self.with_segmentation:
            self.fuse_bottleneck = conv(k * c, c, kernel_size=1)
            self.segmentation_decoder = Decoder(spatial_dims, channels, NUM_TUMOR_CLASSES, norm, act)
            # a class holds some percent of a slice: starting at 0.5, hundreds of steps would go to learning that alone
            bias = math.log(PRIOR_PROBABILITY / (1 - PRIOR_PROBABILITY))
            nn.init.constant_(self.segmentation_decoder.head.bias, bias)
        if self.with_citim:
            self.citim = CITIM(spatial_dims, c, k, classes, bank_size, aggregation, norm, act, head == "sigmoid")
            if self.residual:
                nn.init.zeros_(self.citim.phi.weight)
                nn.init.zeros_(self.citim.phi.bias)
            else:
                self.join_citim = conv(2 * c, c, kernel_size=1)
        if self.with_ccp:
            self.ccp = nn.ModuleList(
                CCP(spatial_dims, width, k, residual=self.residual, scale_sources=scale_sources) for width in channels
            )
        if self.synthesis:
            self.synthesis_decoders = nn.ModuleList(Decoder(spatial_dims, channels, 1, norm, act) for _ in range(k))
        self.companion = None if companion is None else PlainUNet(spatial_dims, companion, norm, act)

        self.register_buffer("bank_key", torch.zeros(bank_size, k, sum(self.key_lengths)))
        self.register_buffer("bank_key_square", torch.zeros(bank_size, k))
        self.register_buffer("bank_mean", torch.zeros(bank_size, k, self.feature_channels))
        self.register_buffer("bank_std", torch.ones(bank_size, k, self.feature_channels))
        self.register_buffer("bank_value", torch.zeros(bank_size, k, classes, c))
        self.register_buffer("bank_gram", torch.zeros(bank_size, k, classes, classes))
        self.register_buffer("bank_present", torch.zeros(bank_size, k, dtype=torch.bool))
        self.register_buffer("bank_patient", torch.zeros(bank_size, dtype=torch.int64))

    # ------------------------------------------------------------------------------------------------------- banks
    def new_bank(self, image_size: Sequence[int], refresh: bool = True) -> MemoryBank:
        """An empty training bank for slices of a spatial size, multiples of 16; for ``refresh`` see ``MemoryBank``."""
        cells = math.prod(size // 2 ** (len(self.channels) - 1) for size in image_size)
        return MemoryBank(
            self.bank_size,
            NUM_CONTRASTS,
            sum(self.key_lengths),
            self.feature_channels,
            self.channels[-1],
            self.num_classes,
            cells,
            refresh,
        )

    @property
    def uses_bank(self) -> bool:
        """Whether any branch reads the bank."""
        return self.with_citim or self.with_ccp

    def compile_bank(self, entries: BankEntries) -> CompiledBank:
        """Folds entries with the present weights of CITIM; differentiable with respect to these."""
        if self.with_citim:
            value, gram = self.citim.fold(entries.prototype, entries.present)
        else:
            value, gram = torch.zeros_like(self.bank_value), torch.zeros_like(self.bank_gram)
        square = entries.key.float().square().sum(dim=2)
        return CompiledBank(
            entries.key, square, entries.mean, entries.std, value, gram, entries.present, entries.patient
        )

    @torch.no_grad()
    def load_bank(self, bank: CompiledBank) -> None:
        """Stores a compiled bank of L slots in the state of the network."""
        for name, tensor in zip(CompiledBank._fields, bank, strict=True):
            getattr(self, f"bank_{name}").copy_(tensor)

    def stored_bank(self) -> CompiledBank:
        """The compiled bank in the state of the network."""
        return CompiledBank(
            self.bank_key,
            self.bank_key_square,
            self.bank_mean,
            self.bank_std,
            self.bank_value,
            self.bank_gram,
            self.bank_present,
            self.bank_patient,
        )

    # ---------------------------------------------------------------------------------------------------- branches
    def encode(self, images: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
        """Features of all contrasts, see ``stack_contrasts``; the mask is B x 3 x spatial, zeros in the first pass."""
        per_contrast: list[list[torch.Tensor]] = []
        for i, encoder in enumerate(self.encoders):
            per_contrast.append(encoder(torch.cat([images[:, i : i + 1], mask], dim=1)))
        features: list[torch.Tensor] = []
        for j in range(len(per_contrast[0])):
            features.append(stack_contrasts([f[j] for f in per_contrast]))
        return features

    def contrast_maps(self, bottleneck: torch.Tensor) -> torch.Tensor:
        """W^i of each contrast's own F_i^5 of the first pass, B x K x c' x N float32; zero without CITIM."""
        b, k = bottleneck.shape[:2]
        if not self.with_citim:
            cells = bottleneck.flatten(3).shape[3]
            return torch.zeros(b, k, self.num_classes, cells, device=bottleneck.device)
        return self.citim.head(bottleneck.flatten(0, 1)).unflatten(0, (b, k))

    def segment(
        self, features: list[torch.Tensor], available: torch.Tensor, bank: CompiledBank, allowed: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The segmentation branch (section 2.1) on the features of the first pass; see ``decode_mask``."""
        bottleneck = features[-1]
        fused: list[torch.Tensor] = [masked_mean(f, available) for f in features]
        kept = torch.where(expand_dims_like(available, bottleneck), bottleneck, 0.0).flatten(1, 2)
        if self.scale_sources:
            count = number_of(available).to(bottleneck.dtype)
            kept = kept * expand_dims_like(available.shape[1] / count, kept)
        return self.decode_mask(fused, kept, bank, allowed)

    def decode_mask(
        self, fused: list[torch.Tensor], concatenated: torch.Tensor, bank: CompiledBank, allowed: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """CITIM and the decoder of the segmentation branch.

        Args:
            fused: by scale the mean over the available contrasts, B x C_j x spatial.
            concatenated: B x (K C) x spatial, the zero-filled F_i^5, scaled by K / |S|.
            bank, allowed: as in all methods.

        Returns:
            logits, B x 3 x spatial; W, B x c' x N, empty without CITIM.
        """
        f5 = self.fuse_bottleneck(concatenated)
        if self.with_citim:
            class_map = self.citim.head(f5)
            if torch.jit.is_scripting():
                context = self.citim(f5, class_map, bank.value, bank.gram, allowed)
            else:
                with torch.autocast(f5.device.type, enabled=False):
                    context = self.citim(f5, class_map, bank.value, bank.gram, allowed)
            if self.residual:
                f5 = f5 + context.to(f5.dtype)
            else:
                f5 = self.join_citim(torch.cat([f5, context.to(f5.dtype)], dim=1))
        else:
            class_map = f5.new_zeros(0)
        fused[-1] = f5
        return self.segmentation_decoder(fused), class_map

    def retrieval_key(self, features: list[torch.Tensor]) -> torch.Tensor:
        """Keys of eq. 8's l*, B x R x D float32: F_i^5, or all F_i^j one behind the other, pooled to a coarse grid.

        Args:
            features: by scale B x R x C_j x spatial; only those that have a key are read.
        """
        parts: list[torch.Tensor] = []
        for feature, cells in zip(features, self.key_cells):  # noqa: B905, TorchScript knows no strict
            if cells > 0:
                flat = feature.flatten(0, 1).float()
                if self.spatial_dims == 2:
                    pooled = F.adaptive_avg_pool2d(flat, (cells, cells))
                else:
                    pooled = F.adaptive_avg_pool3d(flat, (cells, cells, cells))
                parts.append(pooled.reshape(feature.shape[0], feature.shape[1], -1))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def retrieve(
        self,
        key: torch.Tensor,
        contrasts: list[int],
        row: torch.Tensor,
        bank: CompiledBank,
        allowed: torch.Tensor,
        target: torch.Tensor,
        source: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Statistics of each pair's retrieved prototype (eq. 8): of one entry or, with ``keys``, one for each scale.

        Args:
            key: B x R x D of ``retrieval_key``.
            contrasts: R contrasts whose keys these are.
            row: B x P, which of them is the source of a pair.
            bank, allowed, target, source: as in all methods.

        Returns:
            ``mean``, ``std``: B x P x (C_1 + ... + C_5); ``found``: B x P x 1, whether there is a usable entry.
        """
        usable = usable_for_pairs(bank, allowed, target, source)
        found = usable.any(dim=2, keepdim=True)
        if self.retrieval == "mean":
            return mean_prototype(bank.mean, usable, target), mean_prototype(bank.std, usable, target), found
        place = row.unsqueeze(2).expand(-1, -1, bank.key.shape[0])
        tables = bank.mean.split(self.key_widths, dim=2), bank.std.split(self.key_widths, dim=2)
        means: list[torch.Tensor] = []
        stds: list[torch.Tensor] = []
        start = 0
        for j, part in enumerate(key.split(self.key_lengths, dim=2)):
            distances = [key_distances(part[:, r], bank, i, start) for r, i in enumerate(contrasts)]
            index = retrieve(torch.stack(distances, dim=1).gather(1, place), usable, self.retrieval)
            means.append(tables[0][j][index, target])
            stds.append(tables[1][j][index, target])
            start += part.shape[2]
        return torch.cat(means, dim=2), torch.cat(stds, dim=2), found

    def style(
        self, own: torch.Tensor, target: torch.Tensor, retrieved: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """AdaIN (eq. 8) and CBAM's channel attention of all pairs, as one affine map of each channel of each scale.

        Args:
            own: (B P) x 3 x (C_1 + ... + C_5) of ``pooled_statistics`` of the sources.
            target: B x P.
            retrieved: of ``retrieve``.

        Returns:
            ``scale`` and ``shift``, (B P) x (C_1 + ... + C_5).
        """
        mean, std, found = [t.flatten(0, 1) for t in retrieved]
        maximum, center, own_std = own.unbind(1)
        ratio, offset, pooled = adain(maximum, center, own_std, found, mean, std)
        numbers = torch.arange(self.num_contrasts, device=target.device)
        chosen = (target.flatten().unsqueeze(1) == numbers).to(pooled.dtype).repeat(2, 1)
        parts = pooled.split(self.widths, dim=1)
        logits: list[torch.Tensor] = []
        for j, ccp in enumerate(self.ccp):
            logits.append(ccp.channel_attention(chosen, parts[j]))  # type: ignore[operator]
        attention = torch.sigmoid(torch.cat(logits, dim=1).unflatten(0, (2, -1)).sum(dim=0))
        return attention * ratio, attention * offset

    def synthesize(
        self,
        features: list[torch.Tensor],
        statistics: tuple[torch.Tensor, torch.Tensor],
        available: torch.Tensor,
        bank: CompiledBank,
        allowed: torch.Tensor,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The synthesis branch (section 2.2) on the features of the second pass and their ``scale_statistics``.

        Returns:
            images, B x K x spatial in [-1, 1]: missing contrasts from F_CCP, available ones from their own features;
            what the decoders read by scale, see ``BranchOutputs.predicted``.
        """
        predicted: list[torch.Tensor] = []
        if self.with_ccp:
            target, source, active = active_pairs(available)
            pairs = pairs_of_batch(available, target, source, active, self.scale_sources)
            table = pooled_statistics(features, statistics).transpose(0, 1).flatten(0, 1)
            own, key = gather(table, pairs.source_row), self.retrieval_key([f.detach() for f in features])
            if torch.jit.is_scripting():
                found = self.retrieve(key, self.all_contrasts, source, bank, allowed, target, source)
                maps = self.style(own, target, found)
            else:
                with torch.autocast(key.device.type, enabled=False):
                    found = self.retrieve(key, self.all_contrasts, source, bank, allowed, target, source)
                    maps = self.style(own, target, found)
            scales, shifts = [m.to(features[0].dtype).split(self.widths, dim=1) for m in maps]
            for j, ccp in enumerate(self.ccp):
                predicted.append(ccp(features[j], scales[j], shifts[j], available, pairs))
        else:
            for f in features:
                predicted.append(torch.where(expand_dims_like(available, f), f, masked_mean(f, available).unsqueeze(1)))
        # taken apart at once, so that autograd joins the gradients in one pass; contrast after contrast as in memory
        by_contrast = [f.transpose(0, 1).unbind(0) for f in predicted]
        images: list[torch.Tensor] = []
        for i, decoder in enumerate(self.synthesis_decoders):
            images.append(decoder([f[i] for f in by_contrast]))
        return torch.tanh(torch.cat(images, dim=1).float()), predicted

    def run_branches(
        self, images: torch.Tensor, available: torch.Tensor, bank: CompiledBank, allowed: torch.Tensor
    ) -> BranchOutputs:
        """Both branches, closed into a loop by the soft mask.

        ``images`` are finite; rows that ``available`` leaves out are encoded for the bank and the feature loss, and
        reach neither ``logits`` nor ``images`` of the result.
        """
        empty = torch.zeros_like(images[:, : self.num_tumor_classes])
        first = self.encode(images, empty)
        second = first
        if self.with_segmentation:
            logits, class_map = self.segment(first, available, bank, allowed)
            if self.two_passes:
                mask = torch.sigmoid(logits).to(images.dtype)
                second = self.encode(images, mask if self.closed_loop else mask.detach())
        else:
            logits, class_map = torch.full_like(empty, -float("inf")), empty.new_zeros(0)
        statistics = scale_statistics(second)
        predicted: list[torch.Tensor] = []
        if self.synthesis:
            synthetic, predicted = self.synthesize(second, statistics, available, bank, allowed)
            if self.companion is not None:
                synthetic = (synthetic + self.companion.run(images, available)[0]) / 2
        else:
            synthetic = torch.full_like(images, -1.0).float()
        return BranchOutputs(logits.float(), synthetic, class_map, first, second, statistics, predicted)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Fills in the missing contrasts and segments the tumor.

        Args:
            image: B x 8 x spatial (multiples of 16): the contrasts in the order FLAIR, T1, T1ce, T2 in [-1, 1] (missing
                ones -1), then four planes of 0/1 availability, read as their maximum over space > 0.5.

        Returns:
            B x 7 x spatial: four contrasts in [-1, 1], then probabilities of ED, ET, NET. Available contrasts are
            reconstructed.
        """
        available = read_availability(image)
        bank = self.stored_bank()
        allowed = bank.present.any(dim=1).unsqueeze(0).expand(image.shape[0], -1)
        images = image[:, : self.num_contrasts]
        # what stands in a missing contrast is not read, and no NaN may enter the features
        images = torch.where(expand_dims_like(available, images), images, -1.0)
        out = self.run_branches(images, available, bank, allowed)
        return self.corrected(torch.cat([out.images, torch.sigmoid(out.logits)], dim=1), available)

    def for_scenario(self, available: Sequence[bool]) -> ScenarioNetwork:
        """The same network for samples that all have one scenario; only what it needs is computed."""
        return ScenarioNetwork(self, available)


class ScenarioNetwork(nn.Module):
    """``SSCFNet`` for samples of one scenario: encoders of the available, decoders of the missing contrasts alone.

    It shares the weights and the bank of the network. Missing contrasts and probabilities are those of
    ``SSCFNet.forward``; available contrasts come back as they are given.

    Args:
        net: the network.
        available: which of the K contrasts are available, at least one.

    Raises:
        ValueError: unless ``available`` names K contrasts, at least one of them available.
    """

    def __init__(self, net: SSCFNet, available: Sequence[bool]) -> None:
        super().__init__()
        if len(available) != net.num_contrasts or not any(available):
            raise ValueError(f"a scenario needs {net.num_contrasts} truth values, one of them true: {available}.")
        self.net = net
        self.companion = net.companion
        self.sources = [i for i, given in enumerate(available) if given]
        self.targets = [i for i, given in enumerate(available) if not given]
        device = net.bank_present.device
        self.available = torch.tensor(list(available), dtype=torch.bool, device=device)
        self.source_index = torch.tensor(self.sources, device=device)
        self.target_index = torch.tensor(self.targets, device=device, dtype=torch.int64)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """The missing contrasts and the probabilities; the availability in ``image`` is not read."""
        net, bank = self.net, self.net.stored_bank()
        allowed = bank.present.any(dim=1).unsqueeze(0).expand(image.shape[0], -1)
        mask = torch.zeros_like(image[:, : net.num_tumor_classes])
        features = self.encode(image, mask, self.sources)
        if net.with_segmentation:
            logits, _ = self.segment(features, bank, allowed)
            mask = torch.sigmoid(logits.float())
            if self.targets and net.two_passes:
                features = self.encode(image, mask.to(image.dtype), self.sources)
        images = [image[:, i : i + 1].float() for i in range(net.num_contrasts)]
        if not net.synthesis:
            for i in self.targets:
                images[i] = torch.full_like(images[i], -1.0)
        elif self.targets:
            predicted = self.predict(features, bank, allowed)
            for row, i in enumerate(self.targets):
                images[i] = self.decode(i, [scale[row] for scale in predicted])
            self.join_companion(images, image[:, : net.num_contrasts], self.targets)
        return torch.cat([*images, mask.float()], dim=1)

    def encode(self, images: torch.Tensor, mask: torch.Tensor, contrasts: Sequence[int]) -> list[list[torch.Tensor]]:
        """Features of some contrasts by scale, then by contrast; arguments as those of ``SSCFNet.encode``."""
        runs = [self.net.encoders[i](torch.cat([images[:, i : i + 1], mask], dim=1)) for i in contrasts]
        return [list(scale) for scale in zip(*runs, strict=True)]

    def segment(
        self, features: list[list[torch.Tensor]], bank: CompiledBank, allowed: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The segmentation branch; features are those of ``sources``, results those of ``SSCFNet.decode_mask``."""
        kept = [torch.zeros_like(features[-1][0])] * self.net.num_contrasts
        for i, f in zip(self.sources, features[-1], strict=True):
            kept[i] = f * (self.net.num_contrasts / len(self.sources)) if self.net.scale_sources else f
        fused = [mean_of_maps(f) for f in features]
        return self.net.decode_mask(fused, torch.cat(kept, dim=1), bank, allowed)

    def predict(
        self, features: list[list[torch.Tensor]], bank: CompiledBank, allowed: torch.Tensor
    ) -> list[torch.Tensor]:
        """Features of the missing contrasts from those of ``sources``, by scale T x B x C_j x spatial."""
        net, sources, targets = self.net, self.source_index, self.target_index
        if not net.with_ccp:
            return [mean_of_maps(f).unsqueeze(0).expand(len(self.targets), *f[0].shape) for f in features]
        maps = [stack_contrasts(f) for f in features]
        b, num_sources, num_targets = len(maps[0]), len(self.sources), len(self.targets)
        # pairs in the order source, target
        target, source = targets.repeat(num_sources).expand(b, -1), sources.repeat_interleave(num_targets).expand(b, -1)
        row = torch.arange(num_sources, device=sources.device).repeat_interleave(num_targets).expand(b, -1)
        own = pooled_statistics(maps).unsqueeze(2).expand(-1, -1, num_targets, -1, -1)
        key = net.retrieval_key([f.detach() for f in maps])
        with torch.autocast(sources.device.type, enabled=False):
            found = net.retrieve(key, self.sources, row, bank, allowed, target, source)
            affine = net.style(own.flatten(0, 2), target, found)
        # source after source, as the maps lie in memory
        scales, shifts = (
            t.to(maps[0].dtype).unflatten(0, (b, num_sources, -1)).transpose(0, 1).flatten(0, 1).split(net.widths, 2)
            for t in affine
        )
        return [
            cast(CCP, ccp).predict(f, scale, shift, sources, targets)
            for ccp, f, scale, shift in zip(net.ccp, maps, scales, shifts, strict=True)
        ]

    def decode(self, contrast: int, features: list[torch.Tensor]) -> torch.Tensor:
        """One contrast from F^1..F^5, each B x C_j x spatial: B x 1 x spatial in [-1, 1]."""
        return torch.tanh(self.net.synthesis_decoders[contrast](features).float())

    def join_companion(self, images: list[torch.Tensor], given: torch.Tensor, decoded: Iterable[int]) -> None:
        """Puts the mean with the companion, if there is one, in the place of the decoded ones of K ``images``.

        Args:
            images: each B x 1 x spatial; changed.
            given: B x K x spatial, as in all methods.
            decoded: contrasts of ``images`` that were decoded.
        """
        if self.companion is None:
            return
        theirs, _ = self.companion.run(given, self.available.expand(len(given), -1))
        for i in decoded:
            images[i] = (images[i] + theirs[:, i : i + 1]) / 2
