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
the sample, then over the samples. A contrast without a target and a study without a mask give 0 and still count as a
sample, so that accumulation over batches or processes equals one large batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ..contrasts import NUM_CONTRASTS, NUM_TUMOR_CLASSES, class_masks
from ..networks.blocks import STATISTICS_EPS, expand_dims_like, number_of, scale_statistics
from ..networks.memory_bank import BankEntries
from ..networks.precision import half_weights
from ..ssim import slice_ssim_map

#: Least distance of an affinity or a probability from 0 and 1 in a logarithm.
AFFINITY_EPS = 1e-6


def set_mean(values: torch.Tensor, members: torch.Tensor, size: torch.Tensor | None = None) -> torch.Tensor:
    """Mean over the members of each sample's set, or what stands for their sum, then the mean over samples.

    Args:
        values: ... x B x K; what is no member may be NaN.
        members: ... x B x K boolean.
        size: ... x B, what each sample's mean is multiplied by; None is the mean.

    Returns:
        ..., in which a sample without members counts as 0.
    """
    kept = torch.where(members, values, 0.0).sum(dim=-1) / number_of(members)
    return (kept if size is None else kept * size).mean(dim=-1)


def affinity_cross_entropy(
    entry_map: torch.Tensor, class_map: torch.Tensor, differ: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """Weighted sum over entries of the mean cross-entropy of P = W_l^T W against M (eq. 6).

    Value and gradient are computed at once in closed form. With q = P where the classes are equal and P - 1 where they
    differ, the cross-entropy is -log|q| and its derivative by P is -1/q. So no tensor of N_l x N outlives this call,
    and where it is compiled none exists.

    Args:
        entry_map: B x K x E x N_l x c', W_l, of which no gradient is taken.
        class_map: B x K x c' x N or B x 1 x c' x N, W or W^i.
        differ: B x 1 x E x N_l x N, 1 - M.
        weight: B x K x E.

    Returns:
        B tensor; P is clamped away from 0 and 1, and has no gradient beyond the clamp.
    """
    b, k, e, cells, classes = entry_map.shape
    with torch.no_grad():
        current = class_map.expand(b, k, -1, -1)
        weighted = entry_map * (weight / (cells * current.shape[-1]))[..., None, None]
        if torch.compiler.is_compiling():
            # outer products, which fuse into the sums below, where a matrix product would be written to memory
            rows = current.unsqueeze(2)
            q = -differ
            for c in range(classes):
                q = q + entry_map[..., c, None] * rows[..., c, None, :]
        else:
            q = torch.matmul(entry_map.flatten(2, 3), current).view(b, k, e, cells, -1).sub_(differ)
        if classes == NUM_TUMOR_CLASSES:
            # sigmoids, whose P can exceed 1: where the classes differ, P - 1 is then 0, beyond the clamp
            q = torch.where((differ > 0) & (q > 0), torch.zeros_like(q), q)
        size = q.abs()
        beyond = (size < AFFINITY_EPS) | (size > 1 - AFFINITY_EPS)
        slope = q.masked_fill_(beyond, float("inf")).reciprocal_()
        if torch.compiler.is_compiling():
            gradient = torch.stack([(weighted[..., c, None] * slope).sum(dim=(2, 3)) for c in range(classes)], dim=2)
        else:
            gradient = torch.matmul(weighted.flatten(2, 3).transpose(2, 3), slope.flatten(2, 3))
        value = size.clamp_(AFFINITY_EPS, 1 - AFFINITY_EPS).log_().mean(dim=(3, 4))
        value = -(value * weight).sum(dim=(1, 2))
    # adds 0 to the value and the gradient to the graph
    return value - (gradient * (class_map - class_map.detach())).sum(dim=(1, 2, 3))


def dependency_loss(
    entries: BankEntries,
    index: torch.Tensor,
    usable: torch.Tensor,
    class_map: torch.Tensor,
    contrast_maps: torch.Tensor,
    has_contrast: torch.Tensor,
    label: torch.Tensor,
    own_maps: bool = True,
    printed_order: bool = False,
) -> torch.Tensor:
    """Cross-Image Tumor Dependency Loss (eq. 5-7), on drawn entries.

    The ideal map is M = y_l^T y with one-hot y, memory x current as the affinity P of eq. 1. It includes background
    where W does. (Eq. 5 as printed is the transpose.) Entries carry no gradient, so the head also has to learn what
    makes entries: the affinity is taken once with W of the fused feature and once with W^i of the sample's own
    contrasts.

    Args:
        entries: all L slots of the bank.
        index, usable: ``slots`` and ``usable`` of a ``Draw``.
        class_map: B x c' x N, W.
        contrast_maps: B x K x c' x N, W^i.
        has_contrast: B x K.
        label: B x N class map y.
        own_maps: False leaves out the second of these, as in the paper.
        printed_order: M as printed, current x memory, against P as it is.

    Returns:
        B tensor, the mean over entries, contrasts and N^2 for each sample; 0 without a usable entry.
    """
    entry_map = entries.class_map[index].float().permute(0, 2, 1, 4, 3).contiguous()  # B x K x E x N_l x c'
    dtype = entry_map.dtype
    theirs, ours = entries.label[index].unsqueeze(3), label[:, None, None, :]
    differ = theirs != ours
    if entry_map.shape[-1] == NUM_TUMOR_CLASSES:  # without background, whose row of y is 0
        differ = differ | (ours == 0)
    if printed_order:
        differ = differ.transpose(2, 3)
    differ = differ.unsqueeze(1).to(dtype)
    present = (entries.present[index] & usable.unsqueeze(2)).transpose(1, 2)  # B x K x E

    def mean_weights(members: torch.Tensor) -> torch.Tensor:
        """Weights of a mean over the contrasts of an entry, then over the entries that have any."""
        held = members.sum(dim=1, keepdim=True)
        return members.to(dtype) / held.clamp(min=1) / (held > 0).sum(dim=2, keepdim=True).clamp(min=1)

    fused = mean_weights(present)
    own = mean_weights(present & has_contrast.unsqueeze(2))
    value = affinity_cross_entropy(entry_map, class_map.float().unsqueeze(1), differ, fused)
    return value + affinity_cross_entropy(entry_map, contrast_maps.float(), differ, own) if own_maps else value


class Draw(NamedTuple):
    """Bank entries drawn for the dependency loss of a batch."""

    entries: BankEntries  #: all L.
    slots: torch.Tensor  #: B x E, the drawn ones.
    usable: torch.Tensor  #: B x E, False where the draw found no entry.


def draw_entries(
    priority: torch.Tensor,
    entries: BankEntries,
    count: torch.Tensor,
    patient: torch.Tensor,
    number: int,
    own_patient: bool = False,
) -> Draw:
    """Draws entries of other patients with a mask, without replacement and each with the same probability.

    Args:
        priority: B x L uniform numbers.
        entries: all L slots.
        count: filled slots.
        patient: B patient hashes.
        number: how many for each sample, E; at most L are drawn.
        own_patient: take those of the sample's own patient too.
    """
    size = priority.shape[1]
    filled = torch.arange(size, device=priority.device) < count
    others = (entries.patient.unsqueeze(0) != patient.unsqueeze(1)) | own_patient
    allowed = (filled & entries.has_mask).unsqueeze(0) & others
    value, index = torch.topk(torch.where(allowed, priority, -1.0), min(number, size), dim=1)
    return Draw(entries, index, value >= 0)


class SegmentationLoss(nn.Module):
    """BCE and Dice of the segmentation branch (eq. 12, 13).

    Args:
        eps: of eq. 12, in pixels. It has to be small: with 1, a slice without a class pushes all of its probabilities
            to 0 as strongly as a slice with the class lifts them, and a rare class dies out.
    """

    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, logits: torch.Tensor, label: torch.Tensor, has_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """``bce`` and ``dice`` of B x 3 x spatial logits against B x 1 x spatial classes."""
        target = class_masks(label).to(logits.dtype)
        bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none").flatten(1).mean(dim=1)
        # MONAI's DiceLoss reads a tensor on the host, which breaks the graph of a compiler
        p, y = torch.sigmoid(logits).flatten(2), target.flatten(2)
        overlap = (2 * (p * y).sum(dim=2) + self.eps) / (p.sum(dim=2) + y.sum(dim=2) + self.eps)
        dice = 1 - overlap.mean(dim=1)
        zero = torch.zeros_like(bce)
        return {"bce": torch.where(has_mask, bce, zero).mean(), "dice": torch.where(has_mask, dice, zero).mean()}


def space_variance(features: list[torch.Tensor], std: torch.Tensor | None = None) -> torch.Tensor:
    """Variances over space of B x K x C x spatial features, means over channels, scales x B x K, at least 1e-6.

    Where they are known, ``std`` are their standard deviations of ``scale_statistics``.
    """
    variance = scale_statistics(features, eps=0.0)[1].square() if std is None else std.square() - STATISTICS_EPS
    parts = variance.split([f.shape[2] for f in features], dim=2)
    return torch.stack([part.mean(dim=2) for part in parts]).clamp(min=1e-6)


def class_map_cross_entropy(
    class_map: torch.Tensor,
    contrast_maps: torch.Tensor,
    label: torch.Tensor,
    has_contrast: torch.Tensor,
    has_mask: torch.Tensor,
) -> torch.Tensor:
    """Cross-entropy of W, and of W^i as a mean over the contrasts, against y; the sum of both, a mean over samples.

    Args:
        class_map: B x c' x N, W.
        contrast_maps: B x K x c' x N, W^i.
        label: B x N classes y.
        has_contrast: B x K.
        has_mask: B; a sample without a mask counts as 0.
    """
    index = label.long()[:, None, None, :].expand(-1, contrast_maps.shape[1] + 1, 1, -1)
    maps = torch.cat([class_map.unsqueeze(1), contrast_maps], dim=1).float()
    error = -maps.gather(2, index).clamp(min=AFFINITY_EPS).log().mean(dim=(2, 3))  # B x (1 + K)
    own = torch.where(has_contrast, error[:, 1:], 0.0).sum(dim=1) / has_contrast.sum(dim=1).clamp(min=1)
    return torch.where(has_mask, error[:, 0] + own, 0.0).mean()


class GeneratorLoss(nn.Module):
    """The whole objective of the network: the weighted sum of eq. 11 and eq. 14.

    A term is computed where its weight is not 0 and the training step gives its inputs: ``bce`` and ``dice`` need
    ``logits``; ``feature`` needs ``predicted`` and ``features``; ``head`` and ``ctdl`` need ``class_map``,
    ``contrast_maps`` and ``entries``, ``ctdl`` drawn bank entries too; ``adversarial`` needs scores of discriminators,
    ``perceptual`` distances of images.

    Args:
        alpha: weight of the dependency loss (eq. 11).
        beta: weights of synthesis, reconstruction, feature, tumor and adversarial loss (eq. 14).
        ctdl_entries: bank entries drawn for each sample's dependency loss (eq. 7 averages over all L; the draw is
            unbiased).
        dice_eps: see ``SegmentationLoss``.
        segmentation_weight: of eq. 11 in the sum. The paper does not say how eq. 11 and 14 are joined. The loop is
            differentiable, so eq. 14 reaches the mask with weights of about 100; added with weight 1, eq. 11 is drowned
            and the mask is not learned.
        head_weight: of the cross-entropy between the class maps W, W^i and the class map y, beside the dependency loss,
            in eq. 11; 0 is the paper.
        relative_feature: divide the feature loss (eq. 10) of each scale by the variance over space of the target, so
            that features which grow in training do not come to be most of the objective; False is the paper.
        perceptual_weight: of the perceptual distance between synthesized and true contrasts; 0 is the paper.
        ssim_weight: of 1 - SSIM (``slice_ssim_map``) of synthesized and true contrasts in [0, 1]; 0 is the paper.
        own_maps: see ``dependency_loss``.
        printed_order: see ``dependency_loss``.
        sums: sums over the sets of contrasts in the place of means, but for eq. 10, as printed in eq. 14.

    Attributes: ``weights``, the weight of each term in the sum.

    Raises:
        ValueError: unless ``beta`` has five numbers.
    """

    def __init__(
        self,
        alpha: float = 0.5,
        beta: Sequence[float] = (100.0, 30.0, 50.0, 50.0, 1.0),
        ctdl_entries: int = 8,
        dice_eps: float = 1e-5,
        segmentation_weight: float = 1.0,
        head_weight: float = 0.0,
        relative_feature: bool = False,
        perceptual_weight: float = 0.0,
        ssim_weight: float = 0.0,
        own_maps: bool = True,
        printed_order: bool = False,
        sums: bool = False,
    ) -> None:
        super().__init__()
        if len(beta) != 5:
            raise ValueError(f"beta must have five weights (eq. 14), got {len(beta)}.")
        names = ("synthesis", "reconstruction", "feature", "tumor", "adversarial")
        self.weights = {
            "ctdl": segmentation_weight * alpha,
            "head": segmentation_weight * head_weight,
            "bce": segmentation_weight,
            "dice": segmentation_weight,
            **dict(zip(names, beta, strict=True)),
            "perceptual": perceptual_weight,
            "ssim": ssim_weight,
        }
        self.ctdl_entries, self.relative_feature = ctdl_entries, relative_feature
        self.own_maps, self.printed_order, self.sums = own_maps, printed_order, sums
        self.segmentation = SegmentationLoss(dice_eps)

    def forward(
        self,
        output: dict[str, Any],
        target: torch.Tensor,
        label: torch.Tensor,
        has_contrast: torch.Tensor,
        has_mask: torch.Tensor,
        fake_scores: torch.Tensor | None = None,
        draw: Draw | None = None,
        distances: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Computes the terms.

        Args:
            output: of the training step.
            target: B x K x spatial in [-1, 1].
            label: B x 1 x spatial classes.
            has_contrast: B x K.
            has_mask: B.
            fake_scores: B x K x patches, discriminator outputs for the synthesized images.
            draw: bank entries for the dependency loss.
            distances: B x K, perceptual distances of the synthesized images.

        Returns:
            Scalars, unweighted, those that apply of ``ctdl, head, bce, dice, synthesis, reconstruction, feature, tumor,
            adversarial, perceptual, ssim``; and the weighted sum ``loss``.
        """
        used = {name for name, weight in self.weights.items() if weight}
        available = output["available"]
        missing = ~available & has_contrast
        #: values of contrasts with their sets, and the sets whose sizes stand for these
        sets: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        terms: dict[str, torch.Tensor] = {}
        if "ctdl" in used and draw is not None and "class_map" in output:
            terms["ctdl"] = self.sampled_ctdl(output, draw, has_mask)
        if "head" in used and "class_map" in output:
            if output["class_map"].shape[1] == NUM_TUMOR_CLASSES:
                raise ValueError("head_weight needs a head with background: set it to 0, or head to softmax.")
            terms["head"] = class_map_cross_entropy(
                output["class_map"], output["contrast_maps"], output["cells"], available, has_mask
            )
        if "bce" in used and "logits" in output:
            terms |= self.segmentation(output["logits"].float(), label, has_mask)
        if used & {"synthesis", "reconstruction", "tumor", "ssim"}:
            images = output["pred"][:, :NUM_CONTRASTS].float()
            # what a study lacks may hold NaN
            known = torch.where(expand_dims_like(has_contrast, target), target.float(), images.detach())
            if "ssim" in used:
                alike = slice_ssim_map((images + 1) / 2, (known + 1) / 2)
                sets["ssim"] = 1 - alike.flatten(2).mean(dim=2), missing, missing
            error = (images - known).abs()
            absolute = error.flatten(2).mean(dim=2)
            shown = available & output["decoded"] if "decoded" in output else available
            if "synthesis" in used:
                sets["synthesis"] = absolute, missing, missing
            if "reconstruction" in used:
                sets["reconstruction"] = absolute, shown, available
            if "tumor" in used:
                tumor = (error * (label > 0)).flatten(2).mean(dim=2)
                if "decoded" in output:
                    # of the available contrasts those that are decoded stand for all
                    share = available.sum(dim=1, keepdim=True) / number_of(shown).unsqueeze(1)
                    tumor = tumor * torch.where(available, shown * share, 1.0)
                known_mask = has_contrast & has_mask.unsqueeze(1)
                sets["tumor"] = tumor, known_mask, known_mask
        if "feature" in used and "predicted" in output:
            pairs = zip(output["predicted"], output["features"], strict=True)
            squares = torch.stack(
                [F.mse_loss(p.float(), f.float(), reduction="none").flatten(2).mean(dim=2) for p, f in pairs]
            )
            if self.relative_feature:
                squares = squares / space_variance(output["features"], output.get("feature_std"))
            terms["feature"] = set_mean(squares.mean(dim=0), missing.index_select(1, output["rows"]))
        if "adversarial" in used and fake_scores is not None:
            sets["adversarial"] = (fake_scores.float() - 1).square().mean(dim=2), missing, missing
        if "perceptual" in used and distances is not None:
            sets["perceptual"] = distances.float(), missing, missing
        if sets:
            values, members, whole = (torch.stack(tensors) for tensors in zip(*sets.values(), strict=True))
            means = set_mean(values, members, whole.sum(dim=-1) if self.sums else None)
            terms |= zip(sets, means.unbind(), strict=True)
        loss = torch.zeros((), device=target.device)
        for name, value in terms.items():
            loss = torch.add(loss, value, alpha=self.weights[name])
        return {"loss": loss, **terms}

    def sampled_ctdl(self, output: dict[str, Any], draw: Draw, has_mask: torch.Tensor) -> torch.Tensor:
        """The dependency loss on drawn entries, the mean over samples; one without a mask counts as 0."""
        values = dependency_loss(
            *draw,
            output["class_map"],
            output["contrast_maps"],
            output["available"],
            output["cells"],
            self.own_maps,
            self.printed_order,
        )
        return torch.where(has_mask, values, torch.zeros_like(values)).mean()


class DiscriminatorLoss(nn.Module):
    """Least-squares loss of the discriminators on the missing contrasts (eq. 15).

    Args:
        sums: sum over the missing contrasts, as printed, in the place of their mean.
    """

    def __init__(self, sums: bool = False) -> None:
        super().__init__()
        self.sums = sums

    def forward(self, real: torch.Tensor, fake: torch.Tensor, missing: torch.Tensor) -> torch.Tensor:
        """Scalar from B x K x patches scores; ``missing`` (B x K) are the contrasts with a target in T."""
        size = missing.sum(dim=1) if self.sums else None
        return set_mean((real.float() - 1).square().mean(dim=2) + fake.float().square().mean(dim=2), missing, size)


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

    def forward(self, images: torch.Tensor, samples: Sequence[torch.Tensor]) -> torch.Tensor:
        """Scores of some samples of each contrast.

        Args:
            images: B x K x spatial.
            samples: for each contrast the int64 indices of the samples to judge, at least one, so that every process of
                a distributed run has a gradient for every discriminator.

        Returns:
            B x K x patches; 0 for what is not judged.
        """
        scores: list[torch.Tensor] = []
        with half_weights(self):
            for i, (discriminator, rows) in enumerate(zip(self, samples, strict=True)):
                judged = discriminator(images[:, i : i + 1].index_select(0, rows))[-1].flatten(1)
                scores.append(judged.new_zeros(len(images), judged.shape[1]).index_copy(0, rows, judged))
        return torch.stack(scores, dim=1)


def samples_to_judge(missing: torch.Tensor) -> list[torch.Tensor]:
    """``samples`` of ``Discriminators``: those that lack a contrast, or the first one where none does.

    Args:
        missing: B x K boolean on the CPU, where reading it waits for nothing.
    """
    return [torch.tensor([b for b, lacks in enumerate(column) if lacks] or [0]) for column in missing.t().tolist()]
