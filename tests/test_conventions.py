# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Scores of the protocols against scikit-image, MONAI, the lpips package, literal loops and closed forms."""

from __future__ import annotations

import math
import os
from pathlib import Path

import lpips
import numpy as np
import pytest
import torch
from builders import generator
from monai.metrics.regression import compute_ssim_and_cs
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torchvision.models import alexnet

from scripts.contrasts import StudyError
from scripts.evaluation.protocols import (
    BraSynProtocol,
    PerceptualDistance,
    PerSliceProtocol,
    StudyTarget,
    VolumeProtocol,
    bounding_box,
    quantile_with_background,
    region_dice,
    slice_dice,
    slice_jump,
    tumor_boxes,
)
from scripts.ssim import ssim_map

SIZE = (14, 48, 40)
#: Weights of the real AlexNet, where there are some.
REAL_WEIGHTS = Path(
    os.environ.get(
        "SSCF_LPIPS_WEIGHTS", Path(__file__).resolve().parents[2] / "shared" / "lpips" / "alexnet_features.pth"
    )
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """AlexNet's features with random weights."""
    torch.manual_seed(0)
    state = {f"features.{name}": tensor for name, tensor in alexnet(weights=None).features.state_dict().items()}
    path = tmp_path_factory.mktemp("alexnet") / "features.pth"
    torch.save(state, path)
    return path


def make_target(seed: int = 0) -> StudyTarget:
    """A brain that touches no border of the frame, with a tumor in some slices; contrasts of different range."""
    draw = generator(seed)
    brain = torch.zeros(SIZE, dtype=torch.bool)
    brain[1:13, 4:44, 3:36] = True
    brain &= torch.rand(SIZE, generator=draw) < 0.95
    tumor = torch.zeros(SIZE, dtype=torch.bool)
    tumor[3:9, 10:22, 12:26] = True
    tumor[5, 6:43, 12:20] = True  # longer than the smallest box
    tumor &= torch.rand(SIZE, generator=draw) < 0.7
    images = torch.rand((SIZE[0], 4, *SIZE[1:]), generator=draw) * torch.tensor([0.5, 1.0, 0.8, 0.9]).view(1, 4, 1, 1)
    images = torch.where(brain.unsqueeze(1), images, 0.0)
    return StudyTarget(images, brain, tumor)


def make_slices(*rows: int) -> StudyTarget:
    """Some slices of it, one contrast of which goes beyond what a prediction can have."""
    target = StudyTarget(*(values[list(rows)] for values in make_target()[:3]))
    target.images[:, 3] *= 1.5
    return target


def make_guess(target: StudyTarget, k: int, seed: int = 5) -> torch.Tensor:
    noise = 0.2 * torch.randn(target.brain.shape, generator=generator(seed))
    return torch.where(target.brain, (target.images[:, k] + noise).clamp(0, 1), 0.0)


GAUSSIAN = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}


def full_ssim(prediction: np.ndarray, target: np.ndarray, options: dict = GAUSSIAN) -> np.ndarray:
    """scikit-image's map with background around the image, as it pads by reflection itself."""
    padded = (np.pad(np.asarray(image, dtype=np.float64), 10) for image in (prediction, target))
    _, similarity = structural_similarity(*padded, full=True, data_range=1.0, **options)
    return similarity[tuple(slice(10, -10) for _ in prediction.shape)]


# -------------------------------------------------------------------------------------------------- building blocks
@pytest.mark.parametrize("shape", [(20, 17), (13, 18, 15)])
def test_ssim_map_is_that_of_monai_and_of_scikit_image(shape: tuple[int, ...]) -> None:
    dims = len(shape)
    prediction, target = (torch.rand(shape, generator=generator(i), dtype=torch.float64) for i in (0, 1))
    ours = ssim_map(prediction, target, dims)
    theirs, _ = compute_ssim_and_cs(prediction[None, None], target[None, None], dims, [11] * dims, [1.5] * dims)
    torch.testing.assert_close(ours, theirs[0, 0].double(), rtol=0, atol=2e-5)
    padded = ssim_map(prediction, target, dims, margin=5)
    np.testing.assert_allclose(padded.numpy(), full_ssim(prediction.numpy(), target.numpy()), atol=1e-9)
    assert torch.equal(padded[tuple(slice(5, -5) for _ in shape)], ours)


@pytest.mark.parametrize("fraction", [0.0, 0.005, 0.3, 0.77, 0.995, 1.0])
@pytest.mark.parametrize("zeros", [0, 1, 57])
def test_quantile_counts_the_zeros_that_are_not_held(fraction: float, zeros: int) -> None:
    values = torch.rand((5, 8), generator=generator(3), dtype=torch.float64)
    expected = np.quantile(np.concatenate([values.numpy().ravel(), np.zeros(zeros)]), fraction)
    assert float(quantile_with_background(values, fraction, 40 + zeros)) == pytest.approx(expected, abs=1e-12)


def test_bounding_box_has_a_margin_where_there_is_room() -> None:
    mask = torch.zeros(6, 9, dtype=torch.bool)
    mask[1, 4] = mask[3, 6] = True
    assert bounding_box(mask) == (slice(1, 4), slice(4, 7))
    assert bounding_box(mask, 2) == (slice(0, 6), slice(2, 9))


def test_boxes_hold_the_tumor_have_rounded_sides_and_lie_in_the_frame() -> None:
    tumor = torch.zeros(3, 64, 48, dtype=torch.bool)
    tumor[0, 60:64, 0:3] = True  # in a corner
    tumor[1, 10:51, 20:24] = True  # 41 x 4
    tumor[2, 2:62, 2:47] = True  # 60 x 45, as large as the frame after rounding
    first, size = tumor_boxes(tumor, min_box=32)
    assert size.tolist() == [[32, 32], [48, 32], [64, 48]]
    assert first.tolist() == [[32, 0], [6, 6], [0, 0]]


def test_dice_of_regions() -> None:
    label, prediction = torch.zeros(2, 2, 1, 4, 4, dtype=torch.uint8)
    label[0, 0, 0] = 1  # 4 pixels of ED, no core
    prediction[0, 0, 0, :2] = 1  # half of it
    assert region_dice(prediction, label).tolist() == pytest.approx([2 * 2 / (2 + 4), 1.0, 1.0])
    prediction[1, 0, 3, 3] = 2  # ET where there is none
    assert region_dice(prediction, label).tolist() == pytest.approx([2 * 2 / (3 + 4), 0.0, 0.0])
    assert region_dice(torch.zeros_like(label), label).tolist() == [0.0, 1.0, 1.0]


def test_dice_of_slices_is_the_mean_over_those_that_have_the_region() -> None:
    label, prediction = torch.zeros(2, 3, 1, 4, 4, dtype=torch.uint8)
    label[0, 0, 0] = label[1, 0, :2] = 1  # 4 and 8 pixels of ED
    prediction[0, 0, 0, :2] = 1
    prediction[2, 0, 0, 0] = 2  # ET in a slice without tumor
    dice = slice_dice(prediction, label)
    assert float(dice[0]) == pytest.approx((2 * 2 / (2 + 4) + 0) / 2) and dice[1:].isnan().all()


# ------------------------------------------------------------------------------------------------------------ LPIPS
def test_distance_is_that_of_the_package(weights: Path) -> None:
    ours = PerceptualDistance(weights)
    first, second = (torch.rand((2, 40, 36), generator=generator(i)) for i in (0, 1))
    theirs = ours.model(*((2 * image - 1).unsqueeze(1).expand(-1, 3, -1, -1) for image in (first, second)))
    result = ours(ours.features(first), ours.features(second))
    torch.testing.assert_close(result, theirs.flatten())
    assert float(result.min()) > 0 and not result.requires_grad


def test_weights_of_a_whole_checkpoint_and_of_its_features_alone_are_the_same(weights: Path, tmp_path: Path) -> None:
    features = torch.load(weights)
    torch.save({**features, "classifier.6.bias": torch.zeros(1000)}, tmp_path / "whole.pth")
    one, other = PerceptualDistance(weights), PerceptualDistance(tmp_path / "whole.pth")
    assert one.fingerprint() == other.fingerprint() and len(one.fingerprint()) == 64
    loaded = one.model.net.state_dict()
    assert torch.equal(loaded["slice1.0.weight"], features["features.0.weight"])
    assert torch.equal(loaded["slice5.10.bias"], features["features.10.bias"])
    torch.save({name: tensor + 1 for name, tensor in features.items()}, tmp_path / "changed.pth")
    assert PerceptualDistance(tmp_path / "changed.pth").fingerprint() != one.fingerprint()


def test_weights_that_cannot_be_had_are_refused_by_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StudyError, match=r"no file .*absent\.pth: correct lpips_weights"):
        PerceptualDistance(tmp_path / "absent.pth")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(StudyError, match="does not hold torchvision's AlexNet"):
        PerceptualDistance(tmp_path / "other.pth")

    def offline(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(lpips, "LPIPS", offline)
    with pytest.raises(StudyError, match="could not be downloaded: give a file"):
        PerceptualDistance()


@pytest.mark.skipif(not REAL_WEIGHTS.is_file(), reason="no AlexNet: set SSCF_LPIPS_WEIGHTS")
def test_distance_with_the_real_weights_orders_distortions() -> None:
    distance = PerceptualDistance(REAL_WEIGHTS)
    y, x = torch.meshgrid(torch.linspace(0, 9, 64), torch.linspace(0, 9, 64), indexing="ij")
    image = (0.5 + 0.25 * torch.sin(y) + 0.25 * torch.cos(2 * x)).unsqueeze(0)
    noise = torch.randn(image.shape, generator=generator(0))
    known = distance.features(image)
    distances = [float(distance(distance.features(image + s * noise), known)) for s in (0, 0.02, 0.1, 0.3)]
    assert distances[0] == 0 and distances == sorted(distances) and 0.3 < distances[3] < 2


# ------------------------------------------------------------------------------------------------------------ paper
def literal_paper(
    target: StudyTarget, k: int, prediction: torch.Tensor, model: lpips.LPIPS
) -> dict[tuple[str, str], float]:
    collected: dict[tuple[str, str], list[float]] = {}

    def distance(a: np.ndarray, b: np.ndarray) -> float:
        a, b = (torch.from_numpy(2 * v - 1).float()[None, None].expand(1, 3, -1, -1) for v in (a, b))
        return float(model(a, b))

    for z in range(len(target.brain)):
        t = target.images[z, k].double().numpy()
        g = np.clip((prediction[z].double().numpy() - t.min()) / (t.max() - t.min()), 0, 1)
        t = (t - t.min()) / (t.max() - t.min())
        values = {
            ("whole", "psnr"): peak_signal_noise_ratio(t, g, data_range=1.0),
            ("whole", "ssim"): structural_similarity(t, g, data_range=1.0),
            ("whole", "nmse"): ((g - t) ** 2).sum() / (t**2).sum(),
            ("whole", "lpips"): distance(g, t),
        }
        m = target.tumor[z].numpy()
        if m.any():
            box = []
            for axis in (0, 1):
                hit = np.flatnonzero(m.any(axis=1 - axis))
                side = min(max(math.ceil((hit[-1] + 1 - hit[0]) / 16) * 16, 32), m.shape[axis])
                start = min(max((hit[0] + hit[-1] + 1 - side) // 2, 0), m.shape[axis] - side)
                box.append(slice(start, start + side))
            tb, gb, mb = t[tuple(box)], g[tuple(box)], m[tuple(box)]
            values |= {
                ("tumor_box", "psnr"): peak_signal_noise_ratio(tb, gb, data_range=1.0),
                ("tumor_box", "ssim"): structural_similarity(tb, gb, data_range=1.0),
                ("tumor_box", "nmse"): ((gb - tb) ** 2).sum() / (tb**2).sum(),
                ("tumor_box", "lpips"): distance(gb, tb),
                ("tumor", "psnr"): -10 * np.log10(((g - t)[m] ** 2).mean()),
                ("tumor", "ssim"): full_ssim(g, t, {})[m].mean(),
                ("tumor", "nmse"): ((g - t)[m] ** 2).sum() / (t[m] ** 2).sum(),
                ("tumor", "lpips"): distance(np.where(mb, gb, 0), np.where(mb, tb, 0)),
            }
        for key, value in values.items():
            collected.setdefault(key, []).append(value)
    return {key: float(np.mean(values)) for key, values in collected.items()}


def test_paper_convention_is_the_literal_one(weights: Path) -> None:
    target, distance = make_slices(2, 4, 5, 7, 8), PerceptualDistance(weights)
    protocol = PerSliceProtocol(distance)
    protocol.start(target)
    assert len(protocol.crops) == 2  # boxes of two sizes
    for k in (0, 3):
        prediction = make_guess(target, k)
        expected = literal_paper(target, k, prediction, distance.model)
        scores = protocol.score(k, prediction)["per_slice"]
        assert set(scores) == set(expected) and len(expected) == 12
        for key, value in expected.items():
            assert float(scores[key]) == pytest.approx(value, rel=1e-4, abs=1e-5), key


def test_slices_where_the_truth_is_constant_are_left_out() -> None:
    target = make_slices(2, 4, 5, 7, 8)
    prediction, others = make_guess(target, 1), [0, 2, 3, 4]
    protocol = PerSliceProtocol()
    protocol.start(StudyTarget(*(values[others] for values in target[:3])))
    expected = protocol.score(1, prediction[others])["per_slice"]
    target.images[1, 1] = 0.3
    protocol.start(target)
    for key, value in protocol.score(1, prediction)["per_slice"].items():
        assert float(value) == pytest.approx(float(expected[key]), rel=1e-5), key


# ----------------------------------------------------------------------------------------------------------- robust
def literal_jump(error: np.ndarray, mask: np.ndarray, axis: int) -> float:
    error, mask = np.moveaxis(error, axis, 0), np.moveaxis(mask, axis, 0)
    squares, weights = [], []
    for z in range(len(error) - 1):
        both = mask[z] & mask[z + 1]
        if both.any():
            squares.append((error[z + 1][both] - error[z][both]).mean() ** 2)
            weights.append(both.sum())
    return float(np.sqrt(np.average(squares, weights=weights)))


def test_slices_that_jump_are_told_from_faint_and_blurred_ones() -> None:
    target = make_target()
    protocol = VolumeProtocol()
    protocol.start(target)
    volume = target.images[:, 1]
    kernel = torch.ones(1, 1, 3, 3) / 9
    blurred = torch.nn.functional.conv2d(volume.permute(2, 0, 1)[:, None], kernel, padding=1)[:, 0].permute(1, 2, 0)
    jumps = volume + 0.2 * (torch.arange(volume.shape[2]) % 2)
    found = [float(protocol.score(1, v)["volume"]["whole", "jump"]) for v in (jumps, blurred, volume + 0.1, volume)]
    assert found[0] == pytest.approx(0.2, rel=1e-4) and found[1] < 0.03
    assert found[2:] == pytest.approx([0, 0], abs=1e-6)
    nothing = torch.zeros_like(volume, dtype=torch.bool)
    assert slice_jump(jumps, volume, nothing, 2).isnan()


def test_robust_convention_is_the_literal_one() -> None:
    target = make_target()
    protocol = VolumeProtocol()
    protocol.start(target)
    for k in (1, 2):
        prediction = make_guess(target, k)
        scores = protocol.score(k, prediction)["volume"]
        t, g = target.images[:, k].double().numpy(), prediction.double().numpy()
        similarity = full_ssim(g, t)
        assert len(scores) == 7
        for axis in range(3):
            protocol.start(target._replace(slice_axis=axis))
            found = protocol.score(k, prediction)["volume"]["whole", "jump"]
            assert float(found) == pytest.approx(literal_jump(g - t, target.brain.numpy(), axis), rel=1e-4)
        for region, m in (("whole", target.brain.numpy()), ("tumor", target.tumor.numpy())):
            expected = {
                "psnr": -10 * np.log10(((g - t)[m] ** 2).mean()),
                "nmse": ((g - t)[m] ** 2).sum() / (t[m] ** 2).sum(),
                "ssim": similarity[m].mean(),
            }
            for score, value in expected.items():
                assert float(scores[region, score]) == pytest.approx(value, rel=1e-4), (region, score)


# ----------------------------------------------------------------------------------------------------------- BraSyn
@pytest.mark.parametrize(
    "room",
    [((13, 15), (11, 11), (7, 8)), ((1, 0), (1, 1), (2, 2)), ((0, 6), (1, 1), (2, 2)), ((0, 0), (0, 0), (0, 0))],
    ids=["brain in the middle", "brain at the borders", "brain at the lower end", "no room"],
)
def test_brasyn_is_the_literal_one_over_the_whole_volume(room: tuple[tuple[int, int], ...]) -> None:
    padding = [n for pair in reversed(room) for n in pair]
    small, k = make_target(), 3
    images = torch.nn.functional.pad(small.images, [*padding[:4], 0, 0, *padding[4:]])
    target = StudyTarget(images, *(torch.nn.functional.pad(mask, padding) for mask in small[1:3]))
    prediction = torch.nn.functional.pad(make_guess(small, k), padding)
    protocol = BraSynProtocol()
    protocol.start(target)
    scores = protocol.score(k, prediction)
    t, g, m = target.images[:, k].double().numpy(), prediction.double().numpy(), target.tumor.numpy()

    def own(image: np.ndarray) -> np.ndarray:
        low, high = np.percentile(image, (0.5, 99.5))
        return (np.clip(image, max(0, low), high) - low) / (high - low)

    for region, mask in (("tumor", m), ("healthy", ~m)):
        a, b = (torch.from_numpy(own(image) * mask)[None, None] for image in (g, t))
        similarity, _ = compute_ssim_and_cs(a, b, 3, [11] * 3, [1.5] * 3, data_range=float(max(a.max(), b.max())))
        assert float(scores["brasyn"][region, "ssim"]) == pytest.approx(float(similarity.mean()), abs=2e-5), region

    low, high = np.percentile(t[(t > 0) & ~m], (0.5, 99.5))
    a, b = (np.clip((image - low) / (high - low), 0, 1) for image in (g, t))
    error = ((a - b)[m] ** 2).mean()
    expected = {"mse": error, "psnr": -10 * np.log10(error), "ssim": full_ssim(a, b)[m].mean()}
    assert {score for _, score in scores["brasyn_reference"]} == set(expected)
    for score, value in expected.items():
        assert float(scores["brasyn_reference"]["tumor", score]) == pytest.approx(value, rel=1e-4), score


def test_own_scaling_is_blind_to_intensity_and_the_reference_scaling_is_not() -> None:
    target = make_target()
    protocol = BraSynProtocol()
    protocol.start(target)
    scores = protocol.score(1, target.images[:, 1] / 2)
    assert float(scores["brasyn"]["healthy", "ssim"]) == pytest.approx(1, abs=1e-5)
    assert float(scores["brasyn_reference"]["tumor", "psnr"]) < 15


# ----------------------------------------------------------------------------------------------------- closed forms
def all_conventions(weights: Path) -> list:
    return [PerSliceProtocol(PerceptualDistance(weights)), VolumeProtocol(), BraSynProtocol()]


def all_scores(protocols: list, contrast: int, prediction: torch.Tensor) -> dict[tuple[str, ...], torch.Tensor]:
    found = [item for protocol in protocols for item in protocol.score(contrast, prediction).items()]
    return {(name, *key): value for name, scores in found for key, value in scores.items()}


def test_identical_images_have_the_best_scores(weights: Path) -> None:
    target, protocols = make_target(), all_conventions(weights)
    for protocol in protocols:
        protocol.start(target)
    scores = all_scores(protocols, 2, target.images[:, 2])
    best = {"psnr": 100.0, "ssim": 1.0, "lpips": 0.0, "nmse": 0.0, "mse": 0.0, "jump": 0.0}
    assert len(scores) == 12 + 7 + 2 + 3
    for key, value in scores.items():
        assert float(value) == pytest.approx(best[key[2]], abs=1e-5), key


def test_study_without_tumor_has_no_region_scores(weights: Path) -> None:
    target = make_target()
    target = target._replace(tumor=torch.zeros_like(target.tumor))
    protocols = all_conventions(weights)
    for protocol in protocols:
        protocol.start(target)
    scores = all_scores(protocols, 0, make_guess(target, 0))
    finite = {key for key, value in scores.items() if bool(value.isfinite())}
    assert {key[:2] for key in finite} == {("per_slice", "whole"), ("volume", "whole")}
    assert len(finite) == 4 + 4
