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

import torch
import torch.nn.functional as F
from torch import nn

from ..contrasts import NUM_CONTRASTS, TUMOR_CLASSES
from ..networks.citim import class_prototypes
from ..networks.memory_bank import BankEntries
from ..networks.sscf import SSCFNet, over_space, read_availability

#: Where two classes meet in one cell of y, the rarer wins: with nearest sampling a third of the slices would lose ET.
_CELL_PRIORITY = ("ED", "NET", "ET")


class SSCFTrainingStep(nn.Module):
    """The training forward pass: what DistributedDataParallel and torch.compile wrap.

    Args:
        net: the network.
        image_size: spatial size of the training slices, multiples of 16.
    """

    def __init__(self, net: SSCFNet, image_size: Sequence[int]) -> None:
        super().__init__()
        if any(s % 2 ** (len(net.channels) - 1) for s in image_size):
            raise ValueError(
                f"image_size must be multiples of {2 ** (len(net.channels) - 1)}, got {tuple(image_size)}."
            )
        self.net = net
        self.bank = net.new_bank(image_size)

    def forward(
        self,
        image: torch.Tensor,
        target: torch.Tensor,
        label: torch.Tensor,
        has_contrast: torch.Tensor,
        has_mask: torch.Tensor,
        patient: torch.Tensor,
        slice_id: torch.Tensor,
    ) -> dict[str, torch.Tensor | list[torch.Tensor] | BankEntries]:
        """Runs both branches against the training bank, without the entries of the sample's own patient.

        Args:
            image: B x 8 x spatial, as for ``SSCFNet.forward``.
            target: B x K x spatial, the complete study; rows without ``has_contrast`` are ignored.
            label: B x 1 x spatial classes (0 background, 1 ED, 2 ET, 3 NET).
            has_contrast: B x K boolean.
            has_mask: B boolean.
            patient: B int64 patient hashes.
            slice_id: B int64 slice hashes.

        Returns:
            ``pred``: B x 7 x spatial, a function of ``image`` alone; ``available``: B x K. With a segmentation branch
            ``logits``: B x 3 x spatial. With CITIM ``class_map``: B x c' x N, W, and ``contrast_maps``:
            B x K x c' x N, W^i of each contrast's own F_i^5. With CCP the lists ``predicted`` (see ``BranchOutputs``)
            and ``features``, the detached F_i^j. With either ``entries``, the new bank entries.
        """
        available = read_availability(image) & has_contrast
        images = torch.where(over_space(available, image), image[:, :NUM_CONTRASTS], target)
        # a contrast that the study does not have stands as background, and no NaN may enter the encoders' gradients
        images = torch.where(over_space(has_contrast, image) & torch.isfinite(images), images, -1.0)
        bank = self.net.compile_bank(self.bank.entries())
        filled = bank.present.any(dim=1) & (torch.arange(self.bank.size, device=image.device) < self.bank.count)
        allowed = filled.unsqueeze(0) & (bank.patient.unsqueeze(0) != patient.unsqueeze(1))
        out = self.net.run_branches(images, available, bank, allowed)
        output: dict[str, torch.Tensor | list[torch.Tensor] | BankEntries] = {
            "pred": torch.cat([out.images, torch.sigmoid(out.logits)], dim=1),
            "available": available,
        }
        if self.net.with_segmentation:
            output["logits"] = out.logits
        if self.net.with_ccp:
            output["predicted"] = out.predicted
            output["features"] = [f.detach() for f in out.second]
        if self.net.uses_bank:
            contrast_maps = self.net.contrast_maps(out.first[-1])
            output["entries"] = make_entries(
                self.net,
                out.first,
                out.second,
                out.statistics,
                contrast_maps,
                label,
                has_contrast,
                has_mask,
                patient,
                slice_id,
            )
            if self.net.with_citim:
                output["class_map"] = out.class_map
                output["contrast_maps"] = contrast_maps
        return output


@torch.no_grad()
def make_entries(
    net: SSCFNet,
    first: list[torch.Tensor],
    second: list[torch.Tensor],
    statistics: list[tuple[torch.Tensor, torch.Tensor]],
    contrast_maps: torch.Tensor,
    label: torch.Tensor,
    has_contrast: torch.Tensor,
    has_mask: torch.Tensor,
    patient: torch.Tensor,
    slice_id: torch.Tensor,
) -> BankEntries:
    """Bank entries of a batch: G and W_l of the first pass, keys, mu and sigma of the second.

    Args:
        net: the network that made the features.
        first: features of the first pass, each B x K x C_j x spatial.
        second: features of the second pass.
        statistics: means and standard deviations of the second pass by scale.
        contrast_maps: B x K x c' x N, W^i.
        label: B x 1 x spatial classes.
        has_contrast: B x K boolean.
        has_mask: B boolean.
        patient: B int64.
        slice_id: B int64.
    """
    prototype = class_prototypes(
        first[-1].flatten(3).flatten(0, 1), contrast_maps.flatten(0, 1), net.mean_prototype, net.normalize_prototypes
    )
    return BankEntries(
        key=net.retrieval_key(second[-1]),
        mean=torch.cat([mean for mean, _ in statistics], dim=2),
        std=torch.cat([std for _, std in statistics], dim=2),
        prototype=prototype.unflatten(0, contrast_maps.shape[:2]),
        class_map=contrast_maps.detach().float(),
        label=cell_labels(label, 2 ** (len(net.channels) - 1)),
        present=has_contrast,
        has_mask=has_mask,
        patient=patient,
        slice_id=slice_id,
    )


def cell_labels(label: torch.Tensor, factor: int) -> torch.Tensor:
    """The class map y at the resolution of F^5: a class holds a cell if any voxel of the cell has it.

    Args:
        label: B x 1 x spatial classes (0 background, 1 ED, 2 ET, 3 NET).
        factor: stride of F^5.

    Returns:
        B x N uint8; where classes meet, ET > NET > ED > background.
    """
    pool = F.max_pool2d if label.dim() == 4 else F.max_pool3d
    out = torch.zeros([], device=label.device)
    for name in _CELL_PRIORITY:
        value = TUMOR_CLASSES.index(name) + 1
        held = pool((label == value).float(), factor) > 0
        out = torch.where(held, float(value), out)
    return out.flatten(1).to(torch.uint8)
