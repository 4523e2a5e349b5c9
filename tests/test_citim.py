# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""CITIM in its factorized form equals equations 1 to 4 written out with the full N x N affinity."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from builders import compute_in_float64, generator

from scripts.networks.citim import CITIM, PredictionHead, class_prototypes

K, C, CLASSES = 4, 8, 4
LAYER_NORM_EPS = 1e-5


def make_citim(bank_size: int, **changes: object) -> CITIM:
    torch.manual_seed(5)
    settings: dict[str, object] = {"spatial_dims": 2, "channels": C, "num_contrasts": K, "num_classes": CLASSES}
    citim = CITIM(**{**settings, "bank_size": bank_size, **changes})  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in citim.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return citim


class Case:
    """Features b, class maps W_l and W, as float64 arrays and as tensors: L entries of N_l cells, B samples of N."""

    def __init__(
        self, entries: int, entry_cells: int, samples: int, space: tuple[int, ...], prototype: str = "sum"
    ) -> None:
        draw, self.mean = generator(0), prototype == "mean"
        cells = int(np.prod(space))
        self.b = torch.randn((entries, K, C, entry_cells), generator=draw, dtype=torch.float64)
        self.w_entry = (
            3 * torch.randn((entries, K, CLASSES, entry_cells), generator=draw, dtype=torch.float64)
        ).softmax(dim=2)
        # class 2 is nearly absent from every entry, so that the mean prototype has something to mask
        self.w_entry[:, :, 2] *= 1e-3
        self.w_entry = self.w_entry / self.w_entry.sum(dim=2, keepdim=True)
        self.w = (3 * torch.randn((samples, CLASSES, cells), generator=draw, dtype=torch.float64)).softmax(dim=1)
        self.feature = torch.randn((samples, C, *space), generator=draw, dtype=torch.float64)
        self.present = torch.ones(entries, K, dtype=torch.bool)
        self.allowed = torch.ones(samples, entries, dtype=torch.bool)

    def run(self, citim: CITIM, dtype: torch.dtype) -> torch.Tensor:
        prototype = class_prototypes(
            self.b.flatten(0, 1).to(dtype), self.w_entry.flatten(0, 1).to(dtype), self.mean
        ).unflatten(0, self.b.shape[:2])
        value, gram = citim.fold(prototype, self.present)
        return citim(self.feature.to(dtype), self.w.to(dtype), value, gram, self.allowed)


def literal_retrieved(citim: CITIM, case: Case, entry: int, sample: int) -> np.ndarray:
    """F'_l of eq. 3 for one entry and sample, C x N, with the affinity of eq. 1 as a full N_l x N matrix."""
    b, w_entry, w = case.b[entry].numpy(), case.w_entry[entry].numpy(), case.w[sample].numpy()
    blocks = []
    for i in range(K):
        if not case.present[entry, i]:
            blocks.append(np.zeros((C, w.shape[1])))
            continue
        maps = w_entry[i].copy()
        if case.mean:  # every class weighs one in the sum over memory locations, however many cells it has
            for k in range(CLASSES):
                mass = sum(maps[k])
                maps[k] = 0 if mass < 0.5 else maps[k] / mass
        p = np.zeros((maps.shape[1], w.shape[1]))
        for m in range(maps.shape[1]):
            for n in range(w.shape[1]):
                p[m, n] = sum(maps[k, m] * w[k, n] for k in range(CLASSES))  # eq. 1
        retrieved = b[i] @ p  # eq. 2
        center = retrieved.mean(axis=0)
        spread = ((retrieved - center) ** 2).mean(axis=0)
        blocks.append((retrieved - center) / np.sqrt(spread + LAYER_NORM_EPS))
    scale = K / max(int(case.present[entry].sum()), 1)
    weight, bias = citim.psi.weight.detach().double().numpy(), citim.psi.bias.detach().double().numpy()
    return weight @ (np.concatenate(blocks) * scale) + bias[:, None]  # eq. 3


def literal_citim(citim: CITIM, case: Case) -> np.ndarray:
    """F_CITIM of eq. 4 for all samples, B x C x N."""
    samples, entries = case.allowed.shape
    phi = citim.phi.weight.detach().double().flatten(1).numpy()
    phi_bias = citim.phi.bias.detach().double().numpy()[:, None]
    out = np.zeros(tuple(case.w[:, :1].expand(-1, C, -1).shape))
    for sample in range(samples):
        chosen = [entry for entry in range(entries) if case.allowed[sample, entry]]
        if not chosen:
            continue
        retrieved = {entry: literal_retrieved(citim, case, entry, sample) for entry in chosen}
        if citim.concat:
            absent = np.zeros_like(out[sample])
            out[sample] = phi @ np.concatenate([retrieved.get(entry, absent) for entry in range(entries)]) + phi_bias
            continue
        query_weight = citim.query.weight.detach().double().numpy()
        query_bias = citim.query.bias.detach().double().numpy()
        feature = case.feature[sample].flatten(1).numpy()
        for n in range(feature.shape[1]):
            query = query_weight @ feature[:, n] + query_bias
            scores = np.array([query @ retrieved[entry][:, n] / np.sqrt(C) for entry in chosen])
            attention = np.exp(scores - scores.max())
            attention /= attention.sum()
            pooled = sum(a * retrieved[entry][:, n] for a, entry in zip(attention, chosen, strict=True))
            out[sample, :, n] = phi @ pooled + phi_bias[:, 0]
    return out


def assert_equals_literal(result: torch.Tensor, expected: np.ndarray, relative: float) -> None:
    error = np.abs(result.detach().double().flatten(2).numpy() - expected).max()
    assert error <= relative * np.abs(expected).max(), f"{error} against a maximum of {np.abs(expected).max()}"


VARIANTS = [(p, a) for p in ("sum", "mean") for a in ("attention", "concat")]


@pytest.mark.parametrize("prototype,aggregation", VARIANTS)
@pytest.mark.parametrize("entry_cells,space", [(6, (2, 3)), (9, (2, 2)), (8, (2, 2, 2))], ids=["same", "other", "3d"])
def test_citim_equals_equations_1_to_4_in_float64(
    monkeypatch: pytest.MonkeyPatch, prototype: str, aggregation: str, entry_cells: int, space: tuple[int, ...]
) -> None:
    compute_in_float64(monkeypatch)
    citim = make_citim(3, aggregation=aggregation, spatial_dims=len(space)).double()
    case = Case(3, entry_cells, 2, space, prototype)
    result = case.run(citim, torch.float64)
    assert result.dtype == torch.float64 and result.shape == case.feature.shape
    assert_equals_literal(result, literal_citim(citim, case), 1e-11)


@pytest.mark.parametrize("prototype,aggregation", VARIANTS)
def test_citim_equals_equations_1_to_4_in_float32(prototype: str, aggregation: str) -> None:
    citim, case = make_citim(4, aggregation=aggregation), Case(4, 12, 2, (3, 4), prototype)
    result = case.run(citim, torch.float32)
    assert result.dtype == torch.float32
    assert_equals_literal(result, literal_citim(citim, case), 1e-4)


@pytest.mark.parametrize("prototype,aggregation", VARIANTS)
def test_what_is_not_allowed_or_lacking_is_left_out_and_the_contrasts_of_an_entry_are_scaled_up(
    monkeypatch: pytest.MonkeyPatch, prototype: str, aggregation: str
) -> None:
    compute_in_float64(monkeypatch)
    citim, case = make_citim(4, aggregation=aggregation).double(), Case(4, 6, 3, (2, 2), prototype)
    case.allowed = torch.tensor([[True, False, True, True], [False, False, True, False], [False] * 4])
    case.present = torch.tensor([[True, False, True, True], [True] * 4, [False, False, False, True], [True] * 4])
    result = case.run(citim, torch.float64)
    assert_equals_literal(result, literal_citim(citim, case), 1e-11)
    assert torch.equal(result[2], torch.zeros_like(result[2]))  # without any entry: exactly zero, no bias
    # what a forbidden entry and an absent contrast hold does not matter
    case.b[1], case.b[0, 1] = 1e3, -50.0
    assert torch.equal(case.run(citim, torch.float64), result)


@pytest.mark.parametrize("aggregation", ["attention", "concat"])
def test_an_empty_bank_gives_exactly_zero_and_finite_gradients(aggregation: str) -> None:
    citim = make_citim(3, aggregation=aggregation)
    value, gram = citim.fold(torch.zeros(3, K, C, CLASSES), torch.zeros(3, K, dtype=torch.bool))
    feature = torch.randn((2, C, 2, 2), requires_grad=True)
    w = torch.randn((2, CLASSES, 4), requires_grad=True)
    result = citim(feature, w.softmax(dim=1), value, gram, torch.zeros(2, 3, dtype=torch.bool))
    assert torch.equal(result, torch.zeros_like(result))
    result.sum().backward()
    weights = [parameter for name, parameter in citim.named_parameters() if not name.startswith("head")]
    for tensor in (w, *weights, *([feature] if aggregation == "attention" else [])):
        assert tensor.grad is not None and torch.equal(tensor.grad, torch.zeros_like(tensor))


def test_normalized_prototypes_of_constant_channels_are_zero_and_differ_between_classes() -> None:
    generator = torch.Generator().manual_seed(0)
    feature = 100 * torch.randn(1, 6, 1, generator=generator) + torch.randn(1, 6, 12, generator=generator)
    class_map = torch.rand(1, 3, 12, generator=generator).softmax(dim=1)
    constant = feature.mean(dim=2, keepdim=True).expand_as(feature)
    assert class_prototypes(constant, class_map, False, normalize=True).abs().max() < 1e-2
    raw, normalized = (class_prototypes(feature, class_map, True, normalize=n)[0] for n in (False, True))
    likeness = [torch.cosine_similarity(p[:, 0], p[:, 1], dim=0).item() for p in (raw, normalized)]
    assert likeness[0] > 0.99 and abs(likeness[1]) < 0.9


@pytest.mark.parametrize("mean", [False, True])
def test_class_prototypes_equal_loops_and_drop_a_class_below_half_a_cell(mean: bool) -> None:
    feature = torch.randn((2, 3, 5), generator=generator(0))
    class_map = torch.rand((2, CLASSES, 5), generator=generator(1))
    class_map[0, 1] = 0.099  # mass .495
    class_map[0, 2] = 0.101  # mass .505
    result = class_prototypes(feature, class_map, mean)
    for e in range(2):
        for k in range(CLASSES):
            mass = float(sum(class_map[e, k]))
            for c in range(3):
                expected = sum(float(feature[e, c, n]) * float(class_map[e, k, n]) for n in range(5))
                if mean:
                    expected = expected / mass if mass >= 0.5 else 0.0
                assert result[e, c, k].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_prediction_head_gives_a_float32_distribution_over_classes_under_autocast_too(spatial_dims: int) -> None:
    """With independent sigmoids an entry of P (eq. 1) could exceed 1 and eq. 6 would be undefined."""
    head = PredictionHead(spatial_dims, C, CLASSES)
    feature = 20 * torch.randn((2, C, *(4, 3, 2)[:spatial_dims]), generator=generator(0))
    for half in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            class_map = head(feature)
        assert class_map.shape == (2, CLASSES, 12 if spatial_dims == 2 else 24) and class_map.dtype == torch.float32
        assert class_map.min() >= 0
        torch.testing.assert_close(class_map.sum(dim=1), torch.ones(2, class_map.shape[2]), rtol=0, atol=1e-6)
    convolutions = [m for m in head.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Conv3d))]
    assert len(convolutions) == 4  # the four convolution blocks of the paper
