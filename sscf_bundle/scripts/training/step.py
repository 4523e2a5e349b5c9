# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""The training step: both branches against the training bank, and the entries that the bank gets of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ..contrasts import NUM_CONTRASTS, StudyError
from ..networks.availability import read_availability
from ..networks.blocks import expand_dims_like, scale_statistics, stack_contrasts
from ..networks.citim import class_prototypes
from ..networks.memory_bank import BankEntries, CompiledBank
from ..networks.precision import half_weights
from ..networks.sscf import SSCFNet


class Scenario(NamedTuple):
    """A scenario that all samples of a batch share, known on the host."""

    available: tuple[bool, ...]  #: which of the K contrasts are available.
    decoded: tuple[int, ...]  #: contrasts of ``available`` that are decoded for the reconstruction loss.


class SSCFTrainingStep(nn.Module):
    """The training forward pass: what DistributedDataParallel and torch.compile wrap.

    Args:
        net: the network.
        image_size: spatial size of the training slices, multiples of 16.
        feature_targets: compute the features of the missing contrasts, which the feature loss (eq. 10) needs.
        bank_samples: how many samples of a batch become bank entries; None means all.
        own_patient: a sample may use the entries of its own patient, as in the paper.
        refresh: see ``MemoryBank``; False is the paper's queue.

    Raises:
        ValueError: for an ``image_size`` that is no multiple of 16, or ``bank_samples`` below 1.
    """

    def __init__(
        self,
        net: SSCFNet,
        image_size: Sequence[int],
        feature_targets: bool = True,
        bank_samples: int | None = None,
        own_patient: bool = False,
        refresh: bool = True,
    ) -> None:
        super().__init__()
        if not isinstance(net, SSCFNet):
            raise StudyError(
                f"The network is a {type(net).__name__}, not an SSCFNet: put the overlay of its baseline after "
                "train.json; diagnosis and building are for SSCFNet alone."
            )
        if any(s % 2 ** (len(net.channels) - 1) for s in image_size):
            raise ValueError(
                f"image_size must be multiples of {2 ** (len(net.channels) - 1)}, got {tuple(image_size)}."
            )
        if bank_samples is not None and bank_samples < 1:
            raise ValueError(f"bank_samples must be at least 1, got {bank_samples}.")
        self.net = net
        self.feature_targets, self.bank_samples = feature_targets, bank_samples
        self.own_patient = own_patient
        self.bank = net.new_bank(image_size, refresh)

    def forward(
        self,
        image: torch.Tensor,
        target: torch.Tensor,
        label: torch.Tensor,
        has_contrast: torch.Tensor,
        has_mask: torch.Tensor,
        patient: torch.Tensor,
        slice_id: torch.Tensor,
        scenario: Scenario | None = None,
    ) -> dict[str, torch.Tensor | list[torch.Tensor] | BankEntries]:
        """Runs both branches against the training bank, by default without the entries of the sample's own patient.

        Args:
            image: B x 8 x spatial, as for ``SSCFNet.forward``.
            target: B x K x spatial, the complete study; rows without ``has_contrast`` are ignored.
            label, has_contrast, has_mask, patient, slice_id: as of ``SliceDataset``.
            scenario: that of all samples, which then computes only what it needs; None reads it of each sample.

        Returns:
            ``pred``: B x 7 x spatial, a function of ``image`` alone; ``available``: B x K. With ``scenario``
            ``decoded``: B x K, whose images in ``pred`` are decoded; the others are as they were given. With a
            segmentation branch ``logits``: B x 3 x spatial. With CITIM ``cells``: B x N classes y; ``class_map``: B x
            c' x N, W; ``contrast_maps``: B x K x c' x N, W^i of F_i^5 of each available contrast. With CCP, if
            ``feature_targets``, the lists ``predicted`` (F_CCP^j) and ``features`` (F_i^j, detached), B x R x C_j x
            spatial, of the contrasts ``rows`` (R int64), and where it is known their standard deviation
            ``feature_std``, B x R x (C_1 + ... + C_5). With either ``entries``, the new bank entries.
        """
        net = self.net
        available = read_availability(image) & has_contrast
        images = torch.where(expand_dims_like(available, image), image[:, :NUM_CONTRASTS], target)
        # a contrast that the study does not have stands as background, and no NaN may enter the encoders' gradients
        images = torch.where(expand_dims_like(has_contrast, image) & torch.isfinite(images), images, -1.0)
        bank = net.compile_bank(self.bank.entries())
        filled = bank.present.any(dim=1) & (torch.arange(self.bank.size, device=image.device) < self.bank.count)
        others = (bank.patient.unsqueeze(0) != patient.unsqueeze(1)) | self.own_patient
        allowed = filled.unsqueeze(0) & others
        with half_weights(net, but=[net.citim.phi] if net.with_citim else []):
            if scenario is None:
                output, first, features, statistics = self._run_mixed(images, available, bank, allowed)
            else:
                output, first, features, statistics = self._run_shared(images, available, bank, allowed, scenario)
            if net.uses_bank:
                metadata = (t[: self.bank_samples] for t in (label, has_contrast, has_mask, patient, slice_id))
                output["entries"] = make_entries(net, first, features, statistics, *metadata)
            if net.with_citim:
                output["cells"] = cell_labels(label, 2 ** (len(net.channels) - 1))
        return output

    def _run_mixed(
        self, images: torch.Tensor, available: torch.Tensor, bank: CompiledBank, allowed: torch.Tensor
    ) -> tuple[dict[str, Any], torch.Tensor, list[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
        """Samples of several scenarios: the output, and what ``make_entries`` takes of the features."""
        net = self.net
        out = net.run_branches(images, available, bank, allowed)
        output: dict[str, Any] = {
            "pred": torch.cat([out.images, torch.sigmoid(out.logits)], dim=1),
            "available": available,
        }
        if net.with_segmentation:
            output["logits"] = out.logits
        if net.with_citim:
            output["class_map"], output["contrast_maps"] = out.class_map, net.contrast_maps(out.first[-1])
        if net.with_ccp and self.feature_targets:
            output["predicted"], output["features"] = out.predicted, [f.detach() for f in out.second]
            output["rows"] = torch.arange(NUM_CONTRASTS, device=images.device)
            output["feature_std"] = out.statistics[1].detach()
        number = self.bank_samples
        mean, std = (t[:number] for t in out.statistics)
        return output, out.first[-1][:number], [f[:number] for f in out.second], (mean, std)

    def _run_shared(
        self,
        images: torch.Tensor,
        available: torch.Tensor,
        bank: CompiledBank,
        allowed: torch.Tensor,
        scenario: Scenario,
    ) -> tuple[dict[str, Any], torch.Tensor, list[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
        """``_run_mixed`` for samples of one scenario.

        Missing contrasts are encoded without a gradient, and as far as the feature loss and the entries ask. Of the
        available ones those are decoded that ``scenario.decoded`` names.
        """
        net = self.net
        part = net.for_scenario(scenario.available)
        empty = torch.zeros_like(images[:, : net.num_tumor_classes])
        first = part.encode(images, empty, part.sources)
        output: dict[str, Any] = {"available": available}
        second, probabilities, mask = first, empty, empty
        if net.with_segmentation:
            logits, class_map = part.segment(first, bank, allowed)
            output["logits"] = logits.float()
            probabilities = torch.sigmoid(logits)
            if net.two_passes:
                mask = probabilities.to(images.dtype)
                second = part.encode(images, mask if net.closed_loop else mask.detach(), part.sources)
        made = list((images if net.synthesis else torch.full_like(images, -1.0)).float().split(1, dim=1))
        decoded = [not net.synthesis] * NUM_CONTRASTS
        if net.synthesis:
            predicted = part.predict(second, bank, allowed)
            for i, *features in zip(part.targets, *predicted, strict=True):
                made[i], decoded[i] = part.decode(i, features), True
            for row, i in enumerate(part.sources):
                if i in scenario.decoded:
                    made[i], decoded[i] = part.decode(i, [scale[row] for scale in second]), True
            part.join_companion(made, images, [i for i, kept in enumerate(decoded) if kept])
        output["pred"] = torch.cat([*made, probabilities.float()], dim=1)
        output["decoded"] = torch.tensor(decoded, device=images.device).expand_as(available)

        if not net.uses_bank:
            return output, empty, [], (empty, empty)
        number, compared = self.bank_samples, net.with_ccp and self.feature_targets
        with torch.no_grad():
            rows = None if compared else number
            others = part.encode(images[:rows], mask[:rows], part.targets)
        if compared:
            output["predicted"] = [scale.transpose(0, 1) for scale in predicted]
            output["features"] = [torch.stack(scale, dim=1) for scale in others]
            output["rows"] = part.target_index
        order = [*part.sources, *part.targets]
        place = [order.index(i) for i in range(NUM_CONTRASTS)]
        with torch.no_grad():
            unmasked = others[-1]
            if net.two_passes:
                unmasked = part.encode(images[:number], empty[:number], part.targets)[-1]
            bottleneck = stack_contrasts([(*first[-1], *unmasked)[row][:number] for row in place])
            features = [
                stack_contrasts([(*own, *other)[row][:number] for row in place])
                for own, other in zip(second, others, strict=True)
            ]
            statistics = scale_statistics(features)
        if net.with_citim:
            maps = net.contrast_maps(torch.stack(first[-1], dim=1))
            zero = torch.zeros_like(maps[:, :1]).expand(-1, len(part.targets), -1, -1)
            output["class_map"], output["contrast_maps"] = class_map, torch.cat([maps, zero], dim=1)[:, place]
        return output, bottleneck, features, statistics


@torch.no_grad()
def make_entries(
    net: SSCFNet,
    first: torch.Tensor,
    second: list[torch.Tensor],
    statistics: tuple[torch.Tensor, torch.Tensor],
    label: torch.Tensor,
    has_contrast: torch.Tensor,
    has_mask: torch.Tensor,
    patient: torch.Tensor,
    slice_id: torch.Tensor,
) -> BankEntries:
    """Bank entries of E samples: G and W_l of the first pass, keys, mu and sigma of the second.

    Args:
        net: the network that made the features.
        first: E x K x C x spatial, F_i^5 of the first pass.
        second: by scale E x K x C_j x spatial, F_i^j of the second pass.
        statistics: ``scale_statistics`` of the second pass.
        label, has_contrast, has_mask, patient, slice_id: as of ``SliceDataset``.
    """
    class_map = net.contrast_maps(first)
    prototype = class_prototypes(
        first.flatten(3).flatten(0, 1), class_map.flatten(0, 1), net.mean_prototype, net.normalize_prototypes
    )
    return BankEntries(
        key=net.retrieval_key(second),
        mean=statistics[0].detach(),
        std=statistics[1].detach(),
        prototype=prototype.unflatten(0, class_map.shape[:2]),
        class_map=class_map.float(),
        label=cell_labels(label, 2 ** (len(net.channels) - 1)),
        present=has_contrast,
        has_mask=has_mask,
        patient=patient,
        slice_id=slice_id,
    )


def cell_labels(label: torch.Tensor, factor: int) -> torch.Tensor:
    """The class map y (B x N uint8) at the stride of F^5: a class holds a cell if any voxel of the cell has it.

    Where classes meet, ET > NET > ED > background: the rarer wins, since with nearest sampling a third of the slices
    would lose ET. ``label`` is B x 1 x spatial.
    """
    pool = F.max_pool2d if label.dim() == 4 else F.max_pool3d
    largest = pool(_exchange(label).float(), factor).to(torch.uint8)
    return _exchange(largest).flatten(1)


def _exchange(label: torch.Tensor) -> torch.Tensor:
    """Exchanges ET (2) and NET (3), so that of two classes the one that has priority is the larger."""
    return label ^ (label >> 1)
