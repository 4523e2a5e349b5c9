# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Pictures: scenarios beside the truth, runs side by side, one filled-in study, scores of single patients."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from monai.bundle import ConfigParser
from monai.metrics import PSNRMetric, SSIMMetric
from torch import nn

from ..contrasts import CONTRAST_KEYS, CONTRASTS, MASK_KEY, NUM_CONTRASTS
from ..data.datalist import find_studies
from ..data.slices import SliceDataset
from ..evaluation.metrics import fill_background, mean_of_available, zero_filling
from ..evaluation.panels import show_slice
from ..inference.inferer import BrainSliceInferer, predict
from ..networks.sscf import network_input
from ..networks.weights import with_weights


def predict_one_missing(network: nn.Module, target: torch.Tensor) -> torch.Tensor:
    """What a network makes of one slice in each of the four scenarios with a single missing contrast.

    Args:
        network: B x 8 x H x W to B x 7 x H x W, or to B x 4 x H x W.
        target: K x H x W, the complete slice in [-1, 1].

    Returns:
        K x H x W on the CPU: image k was made without contrast k; background outside the available brains.
    """
    device, images = next(network.parameters()).device, []
    for k, available in enumerate(~torch.eye(NUM_CONTRASTS, dtype=torch.bool)):
        complete = target.float()[None]
        image = network_input(complete, available[None])[0, ..., None]  # a study of one slice
        pred = predict(image, network, BrainSliceInferer(), device)[None, :NUM_CONTRASTS, ..., 0].cpu()
        images.append(fill_background(pred, complete, available[None])[0, k])
    return torch.stack(images)


def one_missing_panel(target: torch.Tensor, label: torch.Tensor, predictions: Mapping[str, torch.Tensor]) -> Figure:
    """Methods side by side where one contrast is missing, with a red box around the tumor and the absolute errors.

    Two rows for each missing contrast: the three inputs, the truth and what each method makes of it, and below the
    absolute error of each in units of the truth's scale (0 to 0.5).

    Args:
        target: K x H x W, the complete slice in [-1, 1].
        label: H x W or 1 x H x W classes, 0 is background.
        predictions: for each method K x H x W, image k made without contrast k (``predict_one_missing``).
    """
    label = label.reshape(label.shape[-2:])
    rows, columns = ((target > -1).any(dim=0).any(dim=1 - axis).nonzero() for axis in (0, 1))
    if not len(rows):
        raise ValueError("the slice has no brain: choose another one.")
    box = (slice(int(rows.min()), int(rows.max()) + 1), slice(int(columns.min()), int(columns.max()) + 1))
    target, label = target[(slice(None), *box)], label[box]
    width = NUM_CONTRASTS + len(predictions)
    figure = Figure(figsize=(1.7 * width, 1.9 * 2 * NUM_CONTRASTS), facecolor="black", layout="tight")
    axes = figure.subplots(2 * NUM_CONTRASTS, width, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for k, missing in enumerate(CONTRASTS):
        shown = [(f"{name} (input)", target[i]) for i, name in enumerate(CONTRASTS) if i != k]
        shown.append((f"{missing}, truth", target[k]))
        made = [(f"{missing}, {name}", images[k][box]) for name, images in predictions.items()]
        for axis, (title, image) in zip(axes[2 * k], shown + made, strict=True):
            show_slice(axis, image, title)
            _tumor_box(axis, label)
        for axis, (_, image) in zip(axes[2 * k + 1, NUM_CONTRASTS:], made, strict=True):
            error = (image - target[k]).abs() / 2
            show_slice(axis, error, f"error, mean {float(error.mean()):.3f}", cmap="magma", vmin=0, vmax=0.5)
            _tumor_box(axis, label)
    return figure


def _tumor_box(axis: Axes, label: torch.Tensor) -> None:
    """A red rectangle around everything that is not background, on an axis of ``_show``."""
    found = (label > 0).nonzero()
    if len(found):
        low, high = found.amin(dim=0), found.amax(dim=0)
        corner, size = (low - 0.5).tolist(), (high - low + 1).tolist()
        axis.add_patch(Rectangle(corner, *size, fill=False, edgecolor="red", linewidth=1))


def load_run(config_file: Sequence[str], part: str = "test", **overrides: Any) -> tuple[nn.Module, SliceDataset]:
    """The network of a run with its weights, and of each study of a part the slice with the largest tumor.

    Args:
        config_file: configs of the run, later ones over earlier ones, as ``monai.bundle run`` takes them.
        part: of the split.
        overrides: of the configs, ``ckpt_path`` and ``output_dir`` for example.
    """
    parser = ConfigParser()
    parser.read_config(list(config_file))
    parser.update(overrides)
    network = with_weights(parser.get_parsed_content("network_def"), parser.get_parsed_content("ckpt_path"))
    slices = parser.get_parsed_content("cohort").slices(part=part, choice="largest_tumor", count=1)
    return network.to(parser.get_parsed_content("device")), slices


def runs_panel(runs: Mapping[str, Mapping[str, Any]], study: str | None = None, part: str = "test") -> Figure:
    """``one_missing_panel`` of several trained runs for the slice with the largest tumor of one study.

    Args:
        runs: for each name the ``config_file`` list and overrides that ``load_run`` takes; all with the same split and
            preprocessing.
        study: name; None takes the first one.
        part: of the split.

    Raises:
        SystemExit: if the study is not in the part, or weights cannot be loaded.
    """
    predictions: dict[str, torch.Tensor] = {}
    item: dict[str, torch.Tensor] = {}
    for name, settings in runs.items():
        network, slices = load_run(part=part, **settings)
        chosen = slices.studies[0] if study is None else study
        if chosen not in slices.studies:
            raise SystemExit(f"Study {chosen} is not in the {part} part of {name}: choose one of {slices.studies}.")
        study = chosen
        item = slices[slices.index[:, 0].tolist().index(slices.studies.index(chosen))]
        predictions[name] = predict_one_missing(network, item["target"])
    return one_missing_panel(item["target"], item["label"], predictions)


def patient_plot(values: Mapping[str, Sequence[float]], title: str) -> Figure:
    """A box and a point for each patient, one column for each method.

    Args:
        values: for each method one number for each patient.
        title: of the vertical axis, with its unit.
    """
    figure = Figure(figsize=(1.5 + 1.2 * len(values), 3.4), layout="tight")
    axis = figure.subplots()
    axis.boxplot(list(values.values()), tick_labels=list(values), showfliers=False, medianprops={"color": "black"})
    for column, numbers in enumerate(values.values(), start=1):
        # spread by the golden ratio: even, and the same in every run
        offset = 0.5 * (np.arange(len(numbers)) * 0.618034 % 1 - 0.5)
        axis.plot(column + offset, numbers, ".", alpha=0.6, markersize=4)
    axis.set_ylabel(title)
    axis.tick_params(axis="x", rotation=30)
    axis.grid(axis="y", alpha=0.3)
    return figure


def difference_plot(rows: Mapping[str, tuple[float, float | None, float | None]], title: str) -> Figure:
    """Differences from a reference with their intervals, one line for each method.

    Args:
        rows: for each method the mean difference and the ends of its interval; None draws none.
        title: of the horizontal axis, with its unit.
    """
    figure = Figure(figsize=(5, 1 + 0.35 * len(rows)), layout="tight")
    axis = figure.subplots()
    for y, (mean, low, high) in enumerate(rows.values()):
        if low is not None:
            axis.plot([low, high], [y, y], color="tab:blue")
        axis.plot([mean], [y], "o", color="tab:blue")
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(rows)), labels=list(rows))
    axis.set_ylim(len(rows) - 0.5, -0.5)  # the first on top
    axis.set_xlabel(title)
    axis.grid(axis="x", alpha=0.3)
    return figure


def compare_study(
    truth: Mapping[str, str],
    result: Mapping[str, str | Path],
    picture: str | Path,
    scale: float = 1.0,
) -> dict[str, float]:
    """Draws a filled-in study beside the truth and scores it, with the reference_methods of the same input.

    Scores are of the 3-D study in [0, 1] (brain's 99.5th percentile = 1, as the network sees it), over all axial slices
    with brain, outside the brain all the same: PSNR and SSIM are means over slices.

    Args:
        truth: datalist item of the complete study, with a path for each contrast (and ``seg``).
        result: path of each synthesized contrast by its key (and ``seg``), as ``synthesize_study`` returns.
        picture: PNG file to write.
        scale: ``output_scale`` of the inference.

    Returns:
        ``<contrast>_psnr``, ``<contrast>_ssim`` of each synthesized contrast, and the same with the prefixes
        ``mean_of_available_`` and ``zero_filling_``.
    """
    real = []
    for key in CONTRAST_KEYS:
        image = nib.as_closest_canonical(nib.load(truth[key]))
        values = image.get_fdata(dtype=np.float32)
        brain = values > 0
        real.append(np.clip(values / np.percentile(values[brain], 99.5), 0, 1) * 2 - 1)
    missing = [k in result for k in CONTRAST_KEYS]
    made = [
        nib.as_closest_canonical(nib.load(result[key])).get_fdata(dtype=np.float32) / scale * 2 - 1 if gone else real[i]
        for i, (key, gone) in enumerate(zip(CONTRAST_KEYS, missing, strict=True))
    ]
    target = torch.from_numpy(np.stack(real)).permute(3, 0, 1, 2)  # slices x K x X x Y
    images = torch.from_numpy(np.stack(made)).permute(3, 0, 1, 2)
    available = ~torch.tensor(missing).expand(target.shape[0], -1)
    kept = (target > -1).flatten(1).any(dim=1)
    target, images, available = target[kept], images[kept], available[kept]
    scores: dict[str, float] = {}
    for prefix, prediction in (
        ("", images),
        ("mean_of_available_", mean_of_available(target, available)),
        ("zero_filling_", zero_filling(target, available)),
    ):
        prediction = (fill_background(prediction, target, available) + 1) / 2
        for k, key in enumerate(CONTRAST_KEYS):
            if missing[k]:
                pair = prediction[:, k : k + 1].clamp(0, 1), (target[:, k : k + 1] + 1) / 2
                scores[f"{prefix}{key}_psnr"] = float(PSNRMetric(max_val=1.0)(*pair).clamp(max=100).mean())
                scores[f"{prefix}{key}_ssim"] = float(SSIMMetric(spatial_dims=2, data_range=1.0)(*pair).mean())
    masks = [
        nib.as_closest_canonical(nib.load(p[MASK_KEY])).get_fdata(dtype=np.float32).transpose(2, 0, 1)[kept.numpy()]
        if MASK_KEY in p
        else None
        for p in (truth, result)
    ]
    _study_figure(target, images, missing, masks).savefig(picture, dpi=110, facecolor="black")
    return scores


def _study_figure(target: torch.Tensor, images: torch.Tensor, missing: list[bool], masks: list) -> Figure:
    """Rows: truth, result, absolute error; columns: contrasts and mask; the slice with the largest tumor."""
    guide = masks[0] if masks[0] is not None else masks[1]
    z = int((guide > 0).sum(axis=(1, 2)).argmax()) if guide is not None else target.shape[0] // 2
    rows, columns = ((target[z] > -1).any(dim=0).any(dim=1 - axis).nonzero() for axis in (0, 1))
    box = (slice(int(rows.min()), int(rows.max()) + 1), slice(int(columns.min()), int(columns.max()) + 1))
    truth, made = target[z][:, box[0], box[1]], images[z][:, box[0], box[1]]
    figure = Figure(figsize=(11, 8), facecolor="black", layout="tight")
    axes = figure.subplots(3, 5)
    for k, name in enumerate(CONTRASTS):
        show_slice(axes[0, k], truth[k], f"{name}, truth")
        show_slice(axes[1, k], made[k], f"{name}, {'SYNTHETIC' if missing[k] else 'input'}")
        if missing[k]:
            show_slice(
                axes[2, k], (made[k] - truth[k]).abs() / 2, "absolute error, 0 to 0.5", cmap="magma", vmin=0, vmax=0.5
            )
        else:
            axes[2, k].axis("off")
    # BraTS labels on file: 1 NET, 2 ED, 4 (or 3) ET
    order = np.array([0, 3, 1, 2, 2])
    given = missing.index(False)
    for row, (mask, title) in enumerate(zip(masks, ("mask, annotated", "mask, predicted"), strict=True)):
        shown = None if mask is None else order[mask[z][box].astype(int).clip(0, 4)]
        show_slice(axes[row, 4], truth[given], title, shown)
    axes[2, 4].axis("off")
    axes[2, 4].text(0.05, 0.5, "green: edema\nyellow: enhancing\nred: non-enhancing core", color="white", fontsize=9)
    return figure


def demo_picture(
    split_file: str | Path, dataset_dir: str | Path, result_dir: str | Path, picture: str | Path
) -> dict[str, float]:
    """``compare_study`` for the first test study of a split; prints the scores as one line.

    Args:
        split_file: JSON file of a split.
        dataset_dir: folder of the complete studies.
        result_dir: ``output_dir`` of the inference.
        picture: PNG file to write.

    Returns:
        As ``compare_study``.
    """
    study = json.loads(Path(split_file).read_text())["test"][0]
    truth = next(item for item in find_studies(dataset_dir) if item["study"] == study)
    folder = Path(result_dir) / study
    files = {key: folder / f"{study}_{key}_synthetic.nii.gz" for key in CONTRAST_KEYS}
    result = {key: path for key, path in files.items() if path.is_file()} | {MASK_KEY: folder / f"{study}_seg.nii.gz"}
    scores = compare_study(truth, result, picture)
    parts = []
    for key in result:
        if key != MASK_KEY:
            ours, mean, zero = (
                f"{scores[f'{reference_method}{key}_psnr']:.2f} dB / {scores[f'{reference_method}{key}_ssim']:.3f}"
                for reference_method in ("", "mean_of_available_", "zero_filling_")
            )
            parts.append(f"{key} PSNR / SSIM {ours} (mean of available {mean}, zero filling {zero})")
    print(f"{study}: " + "; ".join(parts) + f"; picture {picture}")
    return scores
