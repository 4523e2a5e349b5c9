# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Losses equal equations 5 to 7 and 10 to 15 written as loops over samples, contrasts, entries and locations."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from builders import (
    all_availabilities,
    compute_in_float64,
    generator,
    random_batch,
    random_entries,
    random_labels,
    tiny_step,
)
from monai.networks.nets import PatchDiscriminator
from skimage.metrics import structural_similarity

from scripts.contrasts import scenario_table
from scripts.data.randomness import hash_uniform
from scripts.networks.citim import PredictionHead
from scripts.networks.memory_bank import BankEntries, MemoryBank
from scripts.training.losses import (
    DiscriminatorLoss,
    Discriminators,
    Draw,
    GeneratorLoss,
    SegmentationLoss,
    dependency_loss,
    draw_entries,
    samples_to_judge,
    set_mean,
)

K, CLASSES = 4, 4


# ------------------------------------------------------------------------------------------------- eq. 5, 6 and 7: CTDL
def entries_of(maps: torch.Tensor, labels: torch.Tensor, present: torch.Tensor | None = None) -> BankEntries:
    """Bank entries that hold class maps (L x K x c' x N_l) and class maps y (L x N_l) alone."""
    bank = MemoryBank(maps.shape[0], K, 1, 1, 1, CLASSES, maps.shape[3])
    filled = random_entries(bank, range(maps.shape[0]))
    present = filled.present if present is None else present
    return filled._replace(class_map=maps, label=labels.to(torch.uint8), present=present)


def random_maps(*shape: int, seed: int) -> torch.Tensor:
    return (3 * torch.randn(shape, generator=generator(seed), dtype=torch.float64)).softmax(dim=-2)


def literal_entry_loss(w_entry: torch.Tensor, w: torch.Tensor, y_entry: Sequence[int], y: Sequence[int]) -> float:
    """Eq. 6 for one contrast: the mean over N_l x N of the cross-entropy of P = W_l^T W against M = y_l^T y (eq. 5)."""
    one_hot = [[float(k == value) for value in y] for k in range(CLASSES)]
    one_hot_entry = [[float(k == value) for value in y_entry] for k in range(CLASSES)]
    total = 0.0
    for row in range(len(y_entry)):
        for column in range(len(y)):
            m = sum(one_hot_entry[k][row] * one_hot[k][column] for k in range(CLASSES))
            p = sum(float(w_entry[k, row]) * float(w[k, column]) for k in range(CLASSES))
            p = min(max(p, 1e-6), 1 - 1e-6)
            total -= m * math.log(p) + (1 - m) * math.log(1 - p)
    return total / (len(y_entry) * len(y))


def literal_dependency(
    entries: BankEntries,
    chosen: Sequence[int],
    w: torch.Tensor,
    own: torch.Tensor,
    has: Sequence[bool],
    y: torch.Tensor,
) -> float:
    """Eq. 7 for one sample: W of the fused feature against the entries, and W^i of each own contrast likewise."""
    fused, contrasts = [], []
    for entry in chosen:
        held = [i for i in range(K) if entries.present[entry, i]]
        labels = (entries.label[entry].tolist(), y.tolist())
        if held:
            values = [literal_entry_loss(entries.class_map[entry, i], w, *labels) for i in held]
            fused.append(sum(values) / len(values))
        both = [i for i in held if has[i]]
        if both:
            values = [literal_entry_loss(entries.class_map[entry, i], own[i], *labels) for i in both]
            contrasts.append(sum(values) / len(values))
    return sum(sum(group) / len(group) for group in (fused, contrasts) if group)


@pytest.mark.parametrize("entry_cells,cells", [(6, 6), (5, 7)], ids=["same size", "other size"])
def test_dependency_loss_equals_equations_5_to_7(monkeypatch: pytest.MonkeyPatch, entry_cells: int, cells: int) -> None:
    compute_in_float64(monkeypatch)
    samples, size = 4, 5
    maps, own = random_maps(size, K, CLASSES, entry_cells, seed=0), random_maps(samples, K, CLASSES, cells, seed=1)
    w = random_maps(samples, CLASSES, cells, seed=2)
    present = torch.rand((size, K), generator=generator(3)) > 0.3
    present[4] = False
    entries = entries_of(maps, torch.randint(0, CLASSES, (size, entry_cells), generator=generator(4)), present)
    y = torch.randint(0, CLASSES, (samples, cells), generator=generator(5)).to(torch.uint8)
    has = torch.tensor([[True] * 4, [True, False, True, False], [False] * 4, [False, True, True, True]])
    index = torch.tensor([[0, 1, 2], [3, 4, 0], [2, 1, 3], [4, 1, 0]])
    usable = torch.tensor([[True, True, True], [True, True, False], [True, False, True], [False, False, False]])
    result = dependency_loss(entries, index, usable, w, own, has, y)
    assert result.dtype == torch.float64
    for b in range(samples):
        chosen = [int(e) for e, use in zip(index[b], usable[b], strict=True) if use]
        expected = literal_dependency(entries, chosen, w[b], own[b], has[b].tolist(), y[b])
        assert result[b].item() == pytest.approx(expected, rel=1e-10), b
    assert result[3] == 0


def differentiable_dependency(
    entries: BankEntries, index: torch.Tensor, w: torch.Tensor, own: torch.Tensor, y: torch.Tensor
) -> torch.Tensor:
    """Eq. 5 to 7 for complete entries with every affinity written out, for the gradient that autograd finds."""
    total = torch.zeros((), dtype=torch.float64)
    batch, drawn = index.shape
    for b, e, i in itertools.product(range(batch), range(drawn), range(K)):
        entry = int(index[b, e])
        m = (entries.label[entry].unsqueeze(1) == y[b]).double()
        for current in (w[b], own[b, i]):
            p = (entries.class_map[entry, i].double().t() @ current).clamp(1e-6, 1 - 1e-6)
            total = total - (m * p.log() + (1 - m) * (1 - p).log()).mean() / (drawn * K)
    return total / batch


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("sharpness", [1.0, 60.0], ids=["soft maps", "maps beyond the clamp"])
def test_gradient_of_the_dependency_loss_is_that_of_the_written_out_equations(
    sharpness: float, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The closed form of the gradient, zero where P is clamped, as it is computed eagerly and under a compiler."""
    compute_in_float64(monkeypatch)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiled)
    draw = generator(0)
    logits = sharpness * torch.randn((3, K + 1, CLASSES, 6), generator=draw, dtype=torch.float64)
    maps = (sharpness * torch.randn((4, K, CLASSES, 5), generator=draw, dtype=torch.float64)).softmax(dim=2)
    entries = entries_of(maps, torch.randint(0, CLASSES, (4, 5), generator=draw))
    index = torch.tensor([[0, 1], [2, 3], [3, 0]])
    y = torch.randint(0, CLASSES, (3, 6), generator=draw).to(torch.uint8)
    values, gradients = [], []
    for literal in (False, True):
        # with respect to the maps themselves: behind a saturated softmax every gradient is 0
        current = logits.softmax(dim=2).requires_grad_()
        w, own = current[:, K], current[:, :K]
        if literal:
            loss = differentiable_dependency(entries, index, w, own, y)
        else:
            everything = (torch.ones(3, 2, dtype=torch.bool), w, own, torch.ones(3, K, dtype=torch.bool), y)
            loss = dependency_loss(entries, index, *everything).mean()
        loss.backward()
        values.append(loss.detach())
        gradients.append(current.grad)
    torch.testing.assert_close(*values, rtol=1e-10, atol=0)
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12 * float(gradients[1].abs().max()))
    assert float(gradients[0].abs().max()) > 0


def test_dependency_loss_keeps_no_affinity_for_the_backward_pass() -> None:
    cells, samples, drawn = 36, 2, 3
    maps, w = random_maps(4, K, CLASSES, cells, seed=0).float(), random_maps(samples, CLASSES, cells, seed=1).float()
    own = random_maps(samples, K, CLASSES, cells, seed=2).float()
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        dependency_loss(
            entries_of(maps, torch.zeros(4, cells)),
            torch.zeros(samples, drawn, dtype=torch.int64),
            torch.ones(samples, drawn, dtype=torch.bool),
            w.requires_grad_(),
            own.requires_grad_(),
            torch.ones(samples, K, dtype=torch.bool),
            torch.zeros(samples, cells, dtype=torch.uint8),
        )
    assert saved and max(saved) <= samples * K * CLASSES * cells < cells**2


def train_toy_head(seed: int, with_contrasts: bool, steps: int = 120) -> float:
    """Trains a head by CTDL alone where the features of every contrast separate tumor and background linearly.

    Returns:
        Mean probability of the right class over the contrasts' own maps W^i, averaged over the two classes. CTDL tells
        equal from different and names no class, so the head's output channels are assigned one to one at their best.
    """
    torch.manual_seed(seed)
    draw, channels, side, batch, size = generator(seed), 32, 4, 4, 16
    head = PredictionHead(2, channels, CLASSES)
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
    centers = 1.5 * torch.randn((5, 2, channels), generator=draw)  # four contrasts and the fused feature
    maps, labels = torch.zeros(size, K, CLASSES, side**2), torch.zeros(size, side**2, dtype=torch.int64)

    def sample(number: int) -> tuple[torch.Tensor, torch.Tensor]:
        y = (torch.rand((number, side**2), generator=draw) < 0.3).to(torch.int64)
        noise = 0.3 * torch.randn((5, number, side**2, channels), generator=draw)
        return y, (centers[:, y] + noise).permute(1, 0, 3, 2).reshape(number, 5, channels, side, side)

    def classify(feature: torch.Tensor) -> torch.Tensor:
        return head(feature.flatten(0, 1)).unflatten(0, feature.shape[:2])

    for step in range(steps):
        y, feature = sample(batch)
        w = classify(feature)
        if step * batch >= size:
            index = torch.stack([torch.randperm(size, generator=draw)[:8] for _ in range(batch)])
            loss = dependency_loss(
                entries_of(maps, labels),
                index,
                torch.ones(batch, 8, dtype=torch.bool),
                w[:, 4],
                w[:, :4],
                torch.full((batch, K), with_contrasts),  # without any own contrast the second term is off
                y.to(torch.uint8),
            ).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        slots = torch.arange(step * batch, (step + 1) * batch) % size
        maps[slots], labels[slots] = w[:, :4].detach(), y
    y, feature = sample(64)
    with torch.no_grad():
        own = classify(feature)[:, :4].transpose(2, 3)  # B x K x N x c'
    mean = [own[y.unsqueeze(1).expand(-1, K, -1) == k].mean(dim=0) for k in (0, 1)]
    return max(float(mean[0][a] + mean[1][b]) / 2 for a, b in itertools.permutations(range(CLASSES), 2))


def test_the_head_learns_from_the_dependency_loss_only_with_the_contrasts_own_term() -> None:
    """Stored W_l carry no gradient: without BCE(W_l^T W^i, M) nothing trains what makes them (eq. 6)."""
    assert train_toy_head(0, True) > 0.9
    assert train_toy_head(0, False) < 0.75


def test_entries_are_drawn_without_bias_from_other_patients_with_a_mask() -> None:
    bank = MemoryBank(8, K, 1, 1, 1, CLASSES, 4)
    new = random_entries(bank, range(6), patients=[1, 1, 2, 3, 4, 5])
    new.has_mask[2] = False
    bank.enqueue(new)
    patient = torch.arange(2000) % 2 + 1  # patient 1 has two entries, patient 2 has one, without a mask
    priority = hash_uniform(torch.arange(2000), 0, 0, "ctdl", 8)
    _, index, usable = draw_entries(priority, bank.entries(), bank.count, patient, 2)
    assert index.shape == (2000, 2) and usable.all()
    assert (index[:, 0] != index[:, 1]).all()
    for own, candidates in ((1, [3, 4, 5]), (2, [0, 1, 3, 4, 5])):
        drawn = index[patient == own].flatten()
        counts = torch.bincount(drawn, minlength=8)
        assert counts.nonzero().flatten().tolist() == candidates
        expected = 2000 / len(candidates)
        assert (counts[candidates] - expected).abs().max() < 5 * expected**0.5


def test_a_draw_of_more_entries_than_there_are_marks_the_rest_unusable() -> None:
    bank = MemoryBank(4, K, 1, 1, 1, CLASSES, 4)
    patient = torch.tensor([0, 7])
    priority = hash_uniform(torch.arange(2), 0, 0, "ctdl", 4)
    _, index, usable = draw_entries(priority, bank.entries(), bank.count, patient, 8)
    assert index.shape == usable.shape == (2, 4) and not usable.any()
    bank.enqueue(random_entries(bank, [0, 1, 2]))
    _, index, usable = draw_entries(priority, bank.entries(), bank.count, patient, 8)
    assert usable.sum(dim=1).tolist() == [2, 3]
    assert sorted(index[0, usable[0]].tolist()) == [1, 2] and sorted(index[1, usable[1]].tolist()) == [0, 1, 2]


# ------------------------------------------------------------------------------------------------------ eq. 12 and 13
def literal_dice_and_bce(logits: np.ndarray, label: np.ndarray, eps: float) -> tuple[float, float]:
    """Eq. 12, a mean over the three classes, and eq. 13, a mean over classes and pixels, for one sample."""
    dice, bce = [], []
    for k in range(3):
        probability, truth = 1 / (1 + np.exp(-logits[k])), (label[0] == k + 1).astype(float)
        dice.append(1 - (2 * (truth * probability).sum() + eps) / (truth.sum() + probability.sum() + eps))
        bce.append(-(truth * np.log(probability) + (1 - truth) * np.log(1 - probability)).mean())
    return float(np.mean(dice)), float(np.mean(bce))


def test_absent_class_does_not_outweigh_a_present_one() -> None:
    """A class that one of two slices has, with a small probability everywhere: Dice lifts it where it is."""
    label = torch.zeros(2, 1, 32, 32)
    label[0, 0, :8, :8] = 2
    logits = torch.full((2, 3, 32, 32), -7.0, requires_grad=True)
    terms = SegmentationLoss()(logits, label, torch.ones(2, dtype=torch.bool))
    (gradient,) = torch.autograd.grad(terms["dice"], logits)
    assert float(gradient[0, 1].sum()) < 0 and float(gradient[:, 1].sum()) < 0
    terms = SegmentationLoss(eps=1.0)(logits, label, torch.ones(2, dtype=torch.bool))
    (gradient,) = torch.autograd.grad(terms["dice"], logits)
    assert float(gradient[:, 1].sum()) > 0


@pytest.mark.parametrize("size", [(6, 5), (4, 3, 2)], ids=["2d", "3d"])
@pytest.mark.parametrize("eps", [1.0, 1e-5])
def test_segmentation_loss_equals_equations_12_and_13(size: Sequence[int], eps: float) -> None:
    logits = 2 * torch.randn((4, 3, *size), generator=generator(0), dtype=torch.float64)
    label = random_labels(4, size, seed=1)
    label[1] = 0  # no tumor
    has_mask = torch.tensor([True, True, False, True])
    result = SegmentationLoss(eps)(logits, label, has_mask)
    expected = [literal_dice_and_bce(logits[b].numpy(), label[b].numpy(), eps) for b in (0, 1, 3)]
    # the sample without a mask gives 0 and is counted
    assert result["dice"].item() == pytest.approx(sum(d for d, _ in expected) / 4, rel=1e-6)
    assert result["bce"].item() == pytest.approx(sum(b for _, b in expected) / 4, rel=1e-6)


# ------------------------------------------------------------------------------------------------- eq. 10, 11, 14, 15
class Mixed:
    """Network outputs and truths of all 16 availabilities in one batch, with incomplete studies among them."""

    def __init__(self, seed: int = 0) -> None:
        draw, batch = generator(seed), 16
        shape, widths = (batch, K, 8, 6), ((3, 8, 6), (5, 4, 3))
        self.available = all_availabilities()
        self.has_contrast = self.available | (torch.rand((batch, K), generator=draw) > 0.3)
        self.has_mask = torch.arange(batch) % 3 != 1
        self.target = torch.rand(shape, generator=draw, dtype=torch.float64) * 2 - 1
        self.label = random_labels(batch, (8, 6), seed)
        self.logits = torch.randn((batch, 3, 8, 6), generator=draw, dtype=torch.float64)
        images = torch.rand(shape, generator=draw, dtype=torch.float64) * 2 - 1
        self.predicted = [torch.randn((batch, K, *w), generator=draw, dtype=torch.float64) for w in widths]
        self.features = [torch.randn((batch, K, *w), generator=draw, dtype=torch.float64) for w in widths]
        self.images = images
        self.maps = (3 * torch.randn((batch, K + 1, CLASSES, 4), generator=draw, dtype=torch.float64)).softmax(dim=2)
        self.cells = torch.randint(0, CLASSES, (batch, 4), generator=draw).to(torch.uint8)
        self.past_maps, self.past_cells = (
            random_maps(5, K, CLASSES, 4, seed=seed),
            torch.arange(20).view(5, 4) % CLASSES,
        )
        self.index = torch.randint(0, 5, (batch, 2), generator=draw)
        self.real = torch.randn((batch, K, 5), generator=draw, dtype=torch.float64)
        self.fake = torch.randn((batch, K, 5), generator=draw, dtype=torch.float64)

    def run(
        self, loss: GeneratorLoss, without: Sequence[str] = (), scored: bool = True, drawn: bool = True
    ) -> dict[str, torch.Tensor]:
        output = {
            "pred": torch.cat([self.images, torch.sigmoid(self.logits)], dim=1),
            "logits": self.logits,
            "available": self.available,
            "rows": torch.arange(K),
            "predicted": self.predicted,
            "features": self.features,
            "class_map": self.maps[:, K],
            "contrast_maps": self.maps[:, :K],
            "cells": self.cells,
        }
        output = {name: value for name, value in output.items() if name not in without}
        truth = (self.target, self.label, self.has_contrast, self.has_mask)
        return loss(output, *truth, self.fake if scored else None, self.draw() if drawn else None)

    def draw(self) -> Draw:
        return Draw(entries_of(self.past_maps, self.past_cells), self.index, torch.ones_like(self.index) > 0)

    def literal(self) -> dict[str, float]:
        """Every term as the mean over pixels, then over the contrasts of its set, then over samples."""
        names = ("ctdl", "bce", "dice", "synthesis", "reconstruction", "feature", "tumor", "adversarial")
        sums = dict.fromkeys(names, 0.0)
        batch = self.target.shape[0]
        for b in range(batch):
            truth, images, label = self.target[b].numpy(), self.images[b].numpy(), self.label[b].numpy()
            if self.has_mask[b]:
                entries, chosen = entries_of(self.past_maps, self.past_cells), self.index[b].tolist()
                maps, has = self.maps[b], self.available[b].tolist()
                sums["ctdl"] += literal_dependency(entries, chosen, maps[K], maps[:K], has, self.cells[b])
                dice, bce = literal_dice_and_bce(self.logits[b].numpy(), label, 1e-5)
                sums["dice"] += dice
                sums["bce"] += bce
            values: dict[str, list[float]] = {name: [] for name in names}
            for i in range(K):
                if not self.has_contrast[b, i]:
                    continue
                error = np.abs(images[i] - truth[i])
                if self.has_mask[b]:
                    whole_tumor = (label[0] > 0).astype(float)
                    masked = np.abs(images[i] * whole_tumor - truth[i] * whole_tumor)
                    values["tumor"].append(masked.sum() / masked.size)  # over ALL pixels, not those of the tumor
                if self.available[b, i]:
                    values["reconstruction"].append(error.mean())
                    continue
                values["synthesis"].append(error.mean())
                scales = [
                    ((p[b, i].numpy() - f[b, i].numpy()) ** 2).mean()
                    for p, f in zip(self.predicted, self.features, strict=True)
                ]
                values["feature"].append(sum(scales) / len(scales))  # eq. 10
                values["adversarial"].append(((self.fake[b, i].numpy() - 1) ** 2).mean())
            for name, found in values.items():
                if found:
                    sums[name] += sum(found) / len(found)
        return {name: total / batch for name, total in sums.items()}

    def literal_discriminator(self) -> float:
        total = 0.0
        for b in range(self.target.shape[0]):
            found = [
                ((self.real[b, i].numpy() - 1) ** 2).mean() + (self.fake[b, i].numpy() ** 2).mean()
                for i in range(K)
                if self.has_contrast[b, i] and not self.available[b, i]
            ]
            total += sum(found) / len(found) if found else 0.0
        return total / self.target.shape[0]


@pytest.mark.parametrize("seed", [0, 1])
def test_generator_terms_equal_equations_10_to_14(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    compute_in_float64(monkeypatch)
    mixed = Mixed(seed)
    result = mixed.run(GeneratorLoss(alpha=0.7, beta=(2, 3, 5, 7, 11), segmentation_weight=13))
    expected = mixed.literal()
    for name, value in expected.items():
        assert value > 0
        assert result[name].item() == pytest.approx(value, rel=1e-6), name
    # eq. 11 and 14
    total = 13 * (0.7 * expected["ctdl"] + expected["bce"] + expected["dice"])
    total += 2 * expected["synthesis"] + 3 * expected["reconstruction"] + 5 * expected["feature"]
    total += 7 * expected["tumor"] + 11 * expected["adversarial"]
    assert result["loss"].item() == pytest.approx(total, rel=1e-6)


def test_supervision_of_the_head_equals_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    compute_in_float64(monkeypatch)
    mixed = Mixed(3)
    expected = 0.0
    for b in range(16):
        if not mixed.has_mask[b]:
            continue
        errors = [
            np.mean([-np.log(max(mixed.maps[b, i, int(mixed.cells[b, n]), n].item(), 1e-6)) for n in range(4)])
            for i in range(K + 1)
        ]
        own = [errors[i] for i in range(K) if mixed.available[b, i]]
        expected += (errors[K] + (sum(own) / len(own) if own else 0.0)) / 16
    terms = mixed.run(GeneratorLoss(head_weight=2.0, segmentation_weight=3.0))
    assert terms["head"].item() == pytest.approx(expected, rel=1e-6)
    without = mixed.run(GeneratorLoss(segmentation_weight=3.0))
    assert "head" not in without
    assert (terms["loss"] - without["loss"]).item() == pytest.approx(6 * expected, rel=1e-6)


def test_relative_feature_loss_does_not_see_the_size_of_the_features(monkeypatch: pytest.MonkeyPatch) -> None:
    compute_in_float64(monkeypatch)
    mixed, loss = Mixed(4), GeneratorLoss(relative_feature=True)
    found = mixed.run(loss)["feature"].item()
    expected = 0.0
    for b in range(16):
        values = []
        for i in range(K):
            if mixed.has_contrast[b, i] and not mixed.available[b, i]:
                scales = [
                    ((p[b, i] - f[b, i]).numpy() ** 2).mean() / f[b, i].numpy().var(axis=(1, 2)).mean()
                    for p, f in zip(mixed.predicted, mixed.features, strict=True)
                ]
                values.append(sum(scales) / len(scales))
        expected += sum(values) / len(values) / 16 if values else 0.0
    assert found == pytest.approx(expected, rel=1e-6)
    mixed.predicted, mixed.features = ([10 * f for f in features] for features in (mixed.predicted, mixed.features))
    assert mixed.run(loss)["feature"].item() == pytest.approx(found, rel=1e-6)


def test_default_weights_are_those_of_section_3_2_and_there_must_be_five() -> None:
    weights = GeneratorLoss().weights
    assert [weights["ctdl"], weights["bce"], weights["dice"]] == [0.5, 1, 1]
    names = ("synthesis", "reconstruction", "feature", "tumor", "adversarial")
    assert [weights[name] for name in names] == [100, 30, 50, 50, 1]
    with pytest.raises(ValueError, match="five"):
        GeneratorLoss(beta=(1, 2, 3))


@pytest.mark.parametrize(
    "without,left_out",
    [
        (("logits",), {"bce", "dice"}),
        (("predicted", "features"), {"feature"}),
        (("class_map", "contrast_maps"), {"ctdl"}),
        (
            ("logits", "predicted", "features", "class_map", "contrast_maps", "cells"),
            {"bce", "dice", "feature", "ctdl"},
        ),
        (("scores",), {"adversarial"}),
        (("draw",), {"ctdl"}),
    ],
    ids=["no segmentation", "no CCP", "no CITIM", "plain network", "no discriminators", "no draw"],
)
def test_terms_without_inputs_are_left_out_of_the_sum(without: Sequence[str], left_out: set[str]) -> None:
    mixed, loss = Mixed(), GeneratorLoss()
    whole = mixed.run(loss)
    terms = mixed.run(loss, without, scored="scores" not in without, drawn="draw" not in without)
    assert set(whole) - set(terms) == left_out
    expected = sum(loss.weights[name] * value for name, value in terms.items() if name != "loss")
    assert terms["loss"].item() == pytest.approx(float(expected))
    assert all(torch.equal(terms[name], whole[name]) for name in terms if name != "loss")


def test_terms_of_weight_zero_are_not_computed() -> None:
    mixed = Mixed()
    assert set(mixed.run(GeneratorLoss(alpha=0, beta=(100, 0, 0, 50, 0)))) == {
        "loss",
        "bce",
        "dice",
        "synthesis",
        "tumor",
    }
    assert set(mixed.run(GeneratorLoss(segmentation_weight=0, beta=(0, 0, 0, 0, 1)))) == {"loss", "adversarial"}


@pytest.mark.parametrize("seed", [0, 1])
def test_discriminator_loss_equals_equation_15_on_missing_contrasts_with_truth(seed: int) -> None:
    mixed = Mixed(seed)
    missing = ~mixed.available & mixed.has_contrast
    result = DiscriminatorLoss()(mixed.real, mixed.fake, missing)
    assert result.item() == pytest.approx(mixed.literal_discriminator(), rel=1e-6)


def test_truth_that_a_study_lacks_may_hold_nan() -> None:
    reference = Mixed()
    expected = reference.run(GeneratorLoss())
    mixed = Mixed()
    mixed.target[~mixed.has_contrast] = float("nan")
    mixed.label[~mixed.has_mask] = 3  # and masks that are not known may hold anything
    for name in ("images", "logits", "fake"):
        getattr(mixed, name).requires_grad_()
    mixed.predicted = [p.requires_grad_() for p in mixed.predicted]
    result = mixed.run(GeneratorLoss())
    for name, value in expected.items():
        torch.testing.assert_close(result[name], value)
    result["loss"].backward()
    for tensor in (mixed.images, mixed.logits, mixed.fake, *mixed.predicted):
        assert tensor.grad is not None and torch.isfinite(tensor.grad).all()
    assert not mixed.images.grad[~mixed.has_contrast].any()
    assert not mixed.logits.grad[~mixed.has_mask].any()
    for p in mixed.predicted:
        assert not p.grad[mixed.available | ~mixed.has_contrast].any()


def test_ssim_term_is_that_of_scikit_image_on_missing_contrasts_with_truth() -> None:
    draw, batch = generator(3), 16
    available = all_availabilities()
    has_contrast = available | (torch.rand((batch, K), generator=draw) > 0.3)
    target = torch.rand((batch, K, 12, 9), generator=draw) * 2 - 1
    images = (target + 0.4 * torch.randn(target.shape, generator=draw)).clamp(-1, 1)
    expected = 0.0
    for b in range(batch):
        found = [
            1 - structural_similarity(((images + 1) / 2)[b, i].numpy(), ((target + 1) / 2)[b, i].numpy(), data_range=1)
            for i in range(K)
            if has_contrast[b, i] and not available[b, i]
        ]
        expected += sum(found) / len(found) / batch if found else 0.0
    target[~has_contrast] = float("nan")
    output = {"pred": torch.cat([images, images[:, :3]], dim=1).requires_grad_(), "available": available}
    truth = target, random_labels(batch, (12, 9), 0), has_contrast, torch.ones(batch, dtype=torch.bool)
    terms = GeneratorLoss(beta=(0, 0, 0, 0, 0), segmentation_weight=0, ssim_weight=3)(output, *truth)
    assert terms["ssim"].item() == pytest.approx(expected, rel=1e-5) and expected > 0.05
    assert terms["loss"].item() == pytest.approx(3 * expected, rel=1e-5)
    terms["loss"].backward()
    gradient = output["pred"].grad
    assert torch.isfinite(gradient).all()
    missing = ~available & has_contrast
    assert torch.equal(gradient[:, :K].flatten(2).abs().sum(2) > 0, missing)


def test_set_mean_counts_a_sample_without_members_as_zero() -> None:
    values = torch.tensor([[1.0, 2.0, 3.0, 6.0], [float("nan"), 5.0, 5.0, 5.0], [9.0, 9.0, 9.0, float("inf")]])
    members = torch.tensor([[True, False, True, False], [False, True, False, False], [False] * 4])
    assert set_mean(values, members).item() == pytest.approx((2 + 5 + 0) / 3)


# ------------------------------------------------------------------------------------------------------ discriminators
def patch_discriminator(norm: str = "INSTANCE") -> PatchDiscriminator:
    return PatchDiscriminator(spatial_dims=2, num_layers_d=2, channels=4, in_channels=1, norm=norm)


def test_discriminators_judge_each_contrast_by_its_own_network_and_last_output() -> None:
    torch.manual_seed(0)
    discriminators = Discriminators([patch_discriminator() for _ in range(K)]).eval()
    images = torch.rand((2, K, 32, 32), generator=generator(0)) * 2 - 1
    missing = torch.tensor([[True, False, True, False], [True, False, False, True]])
    scores = discriminators(images, samples_to_judge(missing))
    for b, i in itertools.product(range(2), range(K)):
        # a contrast that no sample lacks is judged once all the same, so that its network has a gradient
        if not missing[b, i] and (i, b) != (1, 0):
            assert not scores[b, i].any()
            continue
        outputs = discriminators[i](images[b : b + 1, i : i + 1])
        assert len(outputs) > 1
        torch.testing.assert_close(scores[b, i], outputs[-1].flatten(), rtol=0, atol=1e-5)


def test_discriminators_with_batch_normalization_are_refused() -> None:
    with pytest.raises(ValueError, match="INSTANCE"):
        Discriminators([patch_discriminator(), patch_discriminator("BATCH")])


# --------------------------------------------------------------------------------------------------------- whole step
def test_the_whole_objective_trains_every_parameter_from_a_mixed_batch() -> None:
    step = tiny_step()
    batch = random_batch(scenario_table())
    batch["has_contrast"][2, 3] = False
    batch["has_mask"][4] = False
    batch["target"][2, 3] = float("nan")
    discriminators = Discriminators([patch_discriminator() for _ in range(K)])
    output, loss = step(**batch), GeneratorLoss()
    priority = hash_uniform(batch["slice_id"], 0, 0, "ctdl", step.bank.size)
    draw = draw_entries(priority, step.bank.entries(), step.bank.count, batch["patient"], 8)
    truth = [batch[name] for name in ("target", "label", "has_contrast", "has_mask")]
    missing = ~output["available"] & batch["has_contrast"]
    terms = loss(output, *truth, discriminators(output["pred"][:, :K], samples_to_judge(missing)), draw)
    assert all(torch.isfinite(value) and value > 0 for value in terms.values())
    terms["loss"].backward()
    for name, parameter in step.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0 or name.endswith("psi.bias"), name
