# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""All losses of the paper (section 2.3, eq. 5-7 and 10-15).

Every term is a mean over the pixels of an image, then over the contrasts of its set (T missing, S available, X all) in
the sample, then over the samples. A contrast without truth and a study without a mask give 0 and still count as a
sample, so that accumulation over batches or processes equals one large batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from monai.losses import DiceLoss, PatchAdversarialLoss
from torch import nn

from .citim import affinity
from .contrasts import NUM_TUMOR_CLASSES
from .memory_bank import BankEntries
from .network import cell_labels


def set_mean(values: torch.Tensor, members: torch.Tensor) -> torch.Tensor:
    """Mean over the members of each sample's set, then over samples.

    Args:
        values: B x K; what is no member may be NaN.
        members: B x K boolean.

    Returns:
        Scalar; a sample without members counts as 0.
    """
    kept = torch.where(members, values, torch.zeros_like(values)).sum(dim=1)
    return (kept / members.sum(dim=1).clamp(min=1)).mean()


def dependency_loss(
    entries: BankEntries,
    index: torch.Tensor,
    usable: torch.Tensor,
    class_map: torch.Tensor,
    contrast_maps: torch.Tensor,
    has_contrast: torch.Tensor,
    label: torch.Tensor,
) -> torch.Tensor:
    """Cross-Image Tumor Dependency Loss (eq. 5-7), on drawn entries.

    The ideal map is M = y_l^T y with one-hot y, background included, memory x current as the affinity P of eq. 1. (Eq.
    5 as printed is the transpose.) Entries carry no gradient, so the head also has to learn what makes entries: the
    affinity is taken once with W of the fused feature and once with W^i of the sample's own contrasts.

    Args:
        entries: all L slots of the bank.
        index: B x E slots drawn for each sample.
        usable: B x E, False where the draw found no entry or the entry has no mask.
        class_map: B x c' x N, W.
        contrast_maps: B x K x c' x N, W^i.
        has_contrast: B x K.
        label: B x N class map y.

    Returns:
        B tensor, the mean over entries, contrasts and N^2 for each sample; 0 without a usable entry.
    """
    entry_maps = entries.class_map[index].float()  # B x E x K x c' x N_l
    same = entries.label[index].unsqueeze(3) == label[:, None, None, :]  # M: B x E x N_l x N
    same = same.unsqueeze(2)

    def cross_entropy(current: torch.Tensor) -> torch.Tensor:
        p = affinity(entry_maps, current)
        return -torch.log(torch.where(same, p, 1 - p)).mean(dim=(3, 4))  # B x E x K

    present = entries.present[index] & usable.unsqueeze(2)
    own = present & has_contrast.unsqueeze(1)
    total = torch.zeros(label.shape[0], device=label.device)
    for values, members in (
        (cross_entropy(class_map.float()[:, None, None]), present),
        (cross_entropy(contrast_maps.float().unsqueeze(1)), own),
    ):
        per_entry = torch.where(members, values, torch.zeros_like(values)).sum(dim=2)
        per_entry = per_entry / members.sum(dim=2).clamp(min=1)
        count = members.any(dim=2).sum(dim=1).clamp(min=1)
        total = total + per_entry.sum(dim=1) / count
    return total


def draw_entries(
    priority: torch.Tensor, entries: BankEntries, count: torch.Tensor, patient: torch.Tensor, number: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws entries of other patients with a mask, without replacement and each with the same probability.

    Args:
        priority: B x L uniform numbers.
        entries: all L slots.
        count: filled slots.
        patient: B patient hashes.
        number: how many for each sample.

    Returns:
        ``index``: B x E; ``usable``: B x E, False where fewer than E entries can be used. E is at most L.
    """
    size = priority.shape[1]
    filled = torch.arange(size, device=priority.device) < count
    allowed = (filled & entries.has_mask).unsqueeze(0) & (entries.patient.unsqueeze(0) != patient.unsqueeze(1))
    value, index = torch.topk(torch.where(allowed, priority, -1.0), min(number, size), dim=1)
    return index, value >= 0


class SegmentationLoss(nn.Module):
    """BCE and Dice of the segmentation branch (eq. 12, 13).

    Args:
        eps: of eq. 12, in pixels.
    """

    def __init__(self, eps: float = 1.0) -> None:
        super().__init__()
        self.dice = DiceLoss(sigmoid=True, smooth_nr=eps, smooth_dr=eps, reduction="none")

    def forward(self, logits: torch.Tensor, label: torch.Tensor, has_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """Args: logits: B x 3 x spatial; label: B x 1 x spatial classes; has_mask: B. Returns: ``bce`` and ``dice``."""
        truth = torch.cat([label == k + 1 for k in range(NUM_TUMOR_CLASSES)], dim=1).to(logits.dtype)
        bce = F.binary_cross_entropy_with_logits(logits, truth, reduction="none").flatten(1).mean(dim=1)
        dice = self.dice(logits, truth).flatten(1).mean(dim=1)
        zero = torch.zeros_like(bce)
        return {"bce": torch.where(has_mask, bce, zero).mean(), "dice": torch.where(has_mask, dice, zero).mean()}


class GeneratorLoss(nn.Module):
    """The whole objective of the network: the weighted sum of eq. 11 and eq. 14.

    Args:
        alpha: weight of the dependency loss (eq. 11).
        beta: weights of synthesis, reconstruction, feature, tumor and adversarial loss (eq. 14).
        ctdl_entries: bank entries drawn for each sample's dependency loss (eq. 7 averages over all L; the draw is
            unbiased).
        dice_eps: of eq. 12.
        segmentation_weight: of eq. 11 in the sum. The paper does not say how eq. 11 and 14 are joined. The loop is
            differentiable, so eq. 14 reaches the mask with weights of about 100; added with weight 1, eq. 11 is drowned
            and the mask is not learned.

    Raises:
        ValueError: unless ``beta`` has five numbers.
    """

    def __init__(
        self,
        alpha: float = 0.5,
        beta: Sequence[float] = (100.0, 30.0, 50.0, 50.0, 1.0),
        ctdl_entries: int = 8,
        dice_eps: float = 1.0,
        segmentation_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.segmentation_weight = segmentation_weight
        if len(beta) != 5:
            raise ValueError(f"beta must have five weights (eq. 14), got {len(beta)}.")
        self.alpha, self.beta, self.ctdl_entries = alpha, tuple(beta), ctdl_entries
        self.segmentation = SegmentationLoss(dice_eps)
        self.adversarial = PatchAdversarialLoss(criterion="least_squares", no_activation_leastsq=True, reduction="none")

    def forward(
        self,
        output: dict,
        target: torch.Tensor,
        label: torch.Tensor,
        has_contrast: torch.Tensor,
        has_mask: torch.Tensor,
        ctdl: torch.Tensor,
        fake_scores: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Computes all terms.

        Args:
            output: of ``SSCFTrainingStep``.
            target: B x K x spatial in [-1, 1].
            label: B x 1 x spatial classes.
            has_contrast: B x K.
            has_mask: B.
            ctdl: B dependency losses of ``dependency_loss``.
            fake_scores: B x K x patches, discriminator outputs for the synthesized images.

        Returns:
            Scalars, unweighted: ``ctdl, bce, dice, synthesis, reconstruction, feature, tumor, adversarial``; and the
            weighted sum ``loss``.
        """
        available = output["available"]
        missing = ~available & has_contrast
        images = output["pred"][:, : target.shape[1]].float()
        known = has_contrast.view(has_contrast.shape + (1,) * (target.dim() - 2))
        error = torch.where(known, (images - target.float()).abs(), torch.zeros_like(images))
        absolute = error.flatten(2).mean(dim=2)
        tumor = (error * (label > 0)).flatten(2).mean(dim=2)
        feature = torch.stack(
            [
                (predicted.float() - truth.float()).square().flatten(2).mean(dim=2)
                for predicted, truth in zip(output["predicted"], output["features"], strict=True)
            ]
        ).mean(dim=0)
        (judged,) = self.adversarial(fake_scores.float(), target_is_real=True, for_discriminator=False)
        terms = {
            "ctdl": torch.where(has_mask, ctdl, torch.zeros_like(ctdl)).mean(),
            **self.segmentation(output["logits"].float(), label, has_mask),
            "synthesis": set_mean(absolute, missing),
            "reconstruction": set_mean(absolute, available),
            "feature": set_mean(feature, missing),
            "tumor": set_mean(tumor, has_contrast & has_mask.unsqueeze(1)),
            "adversarial": set_mean(judged.mean(dim=2), missing),
        }
        segmentation = self.alpha * terms["ctdl"] + terms["bce"] + terms["dice"]
        names = ("synthesis", "reconstruction", "feature", "tumor", "adversarial")
        synthesis = sum(weight * terms[name] for weight, name in zip(self.beta, names, strict=True))
        return {"loss": self.segmentation_weight * segmentation + synthesis, **terms}

    def sampled_ctdl(
        self,
        output: dict,
        bank_entries: BankEntries,
        count: torch.Tensor,
        priority: torch.Tensor,
        label: torch.Tensor,
        has_contrast: torch.Tensor,
        patient: torch.Tensor,
        stride: int,
    ) -> torch.Tensor:
        """Draws entries and computes their dependency loss.

        Args:
            output: of ``SSCFTrainingStep``.
            bank_entries: all L slots.
            count: filled slots.
            priority: B x L uniform numbers that decide the draw.
            label: B x 1 x spatial classes.
            has_contrast: B x K.
            patient: B patient hashes.
            stride: of F^5.

        Returns:
            B tensor.
        """
        index, usable = draw_entries(priority, bank_entries, count, patient, self.ctdl_entries)
        return dependency_loss(
            bank_entries,
            index,
            usable,
            output["class_map"],
            output["contrast_maps"],
            has_contrast,
            cell_labels(label, stride),
        )


class DiscriminatorLoss(nn.Module):
    """Least-squares loss of the discriminators on the missing contrasts (eq. 15)."""

    def __init__(self) -> None:
        super().__init__()
        self.criterion = PatchAdversarialLoss(criterion="least_squares", no_activation_leastsq=True, reduction="none")

    def forward(self, real: torch.Tensor, fake: torch.Tensor, missing: torch.Tensor) -> torch.Tensor:
        """Args: real, fake: B x K x patches scores; missing: B x K contrasts with truth in T. Returns: scalar."""
        (on_real,) = self.criterion(real.float(), target_is_real=True, for_discriminator=True)
        (on_fake,) = self.criterion(fake.float(), target_is_real=False, for_discriminator=True)
        return set_mean(on_real.mean(dim=2) + on_fake.mean(dim=2), missing)


class Discriminators(nn.ModuleList):
    """One discriminator P_i for each contrast.

    Args:
        modules: K networks that take B x 1 x spatial and return a list whose last tensor holds the patch scores, as
            MONAI's ``PatchDiscriminator`` does. Their normalization must not use the batch.

    Raises:
        ValueError: if a module uses batch normalization.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__(modules)
        if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in self.modules()):
            raise ValueError("batch normalization would mix samples: build PatchDiscriminator with norm='INSTANCE'.")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Args: images: B x K x spatial. Returns: B x K x patches."""
        return torch.stack([d(images[:, i : i + 1])[-1].flatten(1) for i, d in enumerate(self)], dim=1)
