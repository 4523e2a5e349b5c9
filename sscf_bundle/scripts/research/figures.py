# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Figures: runs side by side, one filled-in study beside the target, scores of single patients."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from monai.bundle import ConfigParser
from monai.metrics import PSNRMetric, SSIMMetric
from torch import nn

from ..contrasts import CONTRAST_KEYS, CONTRASTS, MASK_KEY, NUM_CONTRASTS, StudyError
from ..data.datalist import find_studies
from ..evaluation.metrics import MAX_PSNR, fill_background, mean_of_available, zero_filling
from ..evaluation.panels import show_slice
from ..evaluation.protocols import bounding_box
from ..inference.inferer import BrainSliceInferer, predict
from ..networks.availability import network_input
from ..networks.weights import with_weights


def predict_one_missing(network: nn.Module, target: torch.Tensor) -> torch.Tensor:
    """What a network makes of a complete slice (K x H x W in [-1, 1]) without each contrast in turn.

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

    Two rows for each missing contrast: the three inputs, the target and what each method makes of it, and below the
    absolute error of each in units of the target's scale (0 to 0.5).

    Args:
        target: K x H x W, the complete slice in [-1, 1].
        label: H x W or 1 x H x W classes, 0 is background.
        predictions: for each method K x H x W, image k made without contrast k (``predict_one_missing``).
    """
    label = label.reshape(label.shape[-2:])
    box = _brain(target)
    target, label = target[(slice(None), *box)], label[box]
    width = NUM_CONTRASTS + len(predictions)
    figure = Figure(figsize=(1.7 * width, 1.9 * 2 * NUM_CONTRASTS), facecolor="black", layout="tight")
    axes = figure.subplots(2 * NUM_CONTRASTS, width, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for k, missing in enumerate(CONTRASTS):
        shown = [(f"{name} (input)", target[i]) for i, name in enumerate(CONTRASTS) if i != k]
        shown.append((f"{missing}, target", target[k]))
        made = [(f"{missing}, {name}", images[k][box]) for name, images in predictions.items()]
        for axis, (title, image) in zip(axes[2 * k], shown + made, strict=True):
            show_slice(axis, image, title)
            _tumor_box(axis, label)
        for axis, (_, image) in zip(axes[2 * k + 1, NUM_CONTRASTS:], made, strict=True):
            error = (image - target[k]).abs() / 2
            show_slice(axis, error, f"error, mean {float(error.mean()):.3f}", cmap="magma", vmin=0, vmax=0.5)
            _tumor_box(axis, label)
    return figure


def _brain(target: torch.Tensor) -> tuple[slice, ...]:
    """The box of what is above background in any contrast of a slice, K x H x W."""
    if not (target > -1).any():
        raise ValueError("the slice has no brain: choose another one.")
    return bounding_box((target > -1).any(dim=0))


def _tumor_box(axis: Axes, label: torch.Tensor) -> None:
    """A red rectangle around everything that is not background, H x W."""
    if label.any():
        (x, right), (y, top) = ((side.start, side.stop) for side in bounding_box(label > 0))
        axis.add_patch(Rectangle((x - 0.5, y - 0.5), right - x, top - y, fill=False, edgecolor="red", linewidth=1))


def runs_panel(runs: Mapping[str, Mapping[str, Any]], study: str | None = None) -> Figure:
    """``one_missing_panel`` of several trained runs for the slice with the largest tumor of the first or a named study.

    ``runs`` give for each name the ``config_file`` list, as ``monai.bundle run`` takes it, and overrides of the
    configs, ``ckpt_path`` and ``output_dir`` for example; all with the same split and preprocessing.

    Raises:
        StudyError: if the study is not in the test part, or weights cannot be loaded.
    """
    predictions: dict[str, torch.Tensor] = {}
    item: dict[str, torch.Tensor] = {}
    for name, settings in runs.items():
        parser = ConfigParser()
        parser.read_config(list(settings["config_file"]))
        parser.update({key: value for key, value in settings.items() if key != "config_file"})
        network = with_weights(parser.get_parsed_content("network_def"), parser.get_parsed_content("ckpt_path"))
        network.to(parser.get_parsed_content("device"))
        slices = parser.get_parsed_content("cohort").slices(part="test", choice="largest_tumor", count=1)
        chosen = slices.studies[0] if study is None else study
        if chosen not in slices.studies:
            raise StudyError(f"Study {chosen} is not in the test part of {name}: choose one of {slices.studies}.")
        study = chosen
        item = slices[slices.index[:, 0].tolist().index(slices.studies.index(chosen))]
        predictions[name] = predict_one_missing(network, item["target"])
    return one_missing_panel(item["target"], item["label"], predictions)


def patient_plot(values: Mapping[str, Sequence[float] | np.ndarray], title: str) -> Figure:
    """A box and a point for each patient, one column for each method."""
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


def difference_plot(differences: Mapping[str, Mapping[str, float | None]], title: str) -> Figure:
    """Differences (``mean``, ``low``, ``high``) of methods from a reference with their intervals, a line for each."""
    frame = pd.DataFrame.from_dict(differences, orient="index", columns=["mean", "low", "high"], dtype=float)
    figure = Figure(figsize=(5, 1 + 0.35 * len(frame)), layout="tight")
    axis = figure.subplots()
    spread = [frame["mean"] - frame["low"], frame["high"] - frame["mean"]]
    axis.errorbar(frame["mean"], list(frame.index), xerr=spread, fmt="o")
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_ylim(len(frame) - 0.5, -0.5)  # the first on top
    axis.set_xlabel(title)
    axis.grid(axis="x", alpha=0.3)
    return figure


def demo_figure(
    study: str, dataset_dir: str | Path, result_dir: str | Path, path: str | Path, caption: str = ""
) -> dict[str, float]:
    """Draws a filled-in study beside the complete one and scores it, with the reference methods of the same input.

    Scores are of the 3-D study in [0, 1] (brain's 99.5th percentile = 1, as the network sees it), over all axial slices
    with brain, outside the brain all the same: PSNR and SSIM are means over slices. They are printed as one line.

    Args:
        study: name of the study, or a JSON file of a split, which means its first test study.
        dataset_dir: folder of the complete studies.
        result_dir: ``output_dir`` of the inference.
        path: PNG file to write.
        caption: put below the mask, for example the source of the images.

    Returns:
        ``<contrast>_psnr``, ``<contrast>_ssim`` of each synthesized contrast, and the same with the prefixes
        ``mean_of_available_`` and ``zero_filling_``.
    """

    def load(file: str | Path) -> torch.Tensor:
        """Slices x X x Y, from inferior to superior."""
        volume = nib.as_closest_canonical(nib.load(file)).get_fdata(dtype=np.float32)
        return torch.from_numpy(volume.transpose(2, 0, 1).copy())  # torch takes no flipped view

    def scaled(volume: torch.Tensor) -> torch.Tensor:
        return (volume / np.percentile(volume[volume > 0], 99.5)).clamp(0, 1) * 2 - 1

    if study.endswith(".json"):
        study = json.loads(Path(study).read_text())["test"][0]
    target = next(item for item in find_studies(dataset_dir) if item["study"] == study)
    names = {**{key: f"{key}_synthetic" for key in CONTRAST_KEYS}, MASK_KEY: "seg"}
    files = {key: Path(result_dir) / study / f"{study}_{name}.nii.gz" for key, name in names.items()}
    result = {key: file for key, file in files.items() if file.is_file()}
    real = torch.stack([scaled(load(target[key])) for key in CONTRAST_KEYS], dim=1)
    missing = [key in result for key in CONTRAST_KEYS]
    made = [load(result[key]) * 2 - 1 if key in result else real[:, k] for k, key in enumerate(CONTRAST_KEYS)]
    kept = (real > -1).flatten(1).any(dim=1)
    real, images = real[kept], torch.stack(made, dim=1)[kept]
    available = ~torch.tensor(missing).expand(len(real), -1)
    scores: dict[str, float] = {}
    texts: dict[str, list[str]] = {key: [] for key in CONTRAST_KEYS if key in result}
    psnr: Any = PSNRMetric(max_val=1.0)
    ssim: Any = SSIMMetric(spatial_dims=2, data_range=1.0)
    for prefix, prediction in (
        ("", images),
        ("mean_of_available_", mean_of_available(real, available)),
        ("zero_filling_", zero_filling(real, available)),
    ):
        prediction = (fill_background(prediction, real, available) + 1) / 2
        for key, text in texts.items():
            k = CONTRAST_KEYS.index(key)
            pair = prediction[:, k : k + 1].clamp(0, 1), (real[:, k : k + 1] + 1) / 2
            scores[f"{prefix}{key}_psnr"] = float(psnr(*pair).clamp(max=MAX_PSNR).mean())
            scores[f"{prefix}{key}_ssim"] = float(ssim(*pair).mean())
            text.append(f"{scores[f'{prefix}{key}_psnr']:.2f} dB / {scores[f'{prefix}{key}_ssim']:.3f}")
    masks = [load(paths[MASK_KEY])[kept] if MASK_KEY in paths else None for paths in (target, result)]
    _study_figure(real, images, missing, masks, caption).savefig(path, dpi=110, facecolor="black")
    parts = [f"{key} PSNR / SSIM {a} (mean of available {b}, zero filling {c})" for key, (a, b, c) in texts.items()]
    print(f"{study}: " + "; ".join(parts) + f"; figure {path}")
    return scores


def _study_figure(
    target: torch.Tensor, images: torch.Tensor, missing: list[bool], masks: list[torch.Tensor | None], caption: str
) -> Figure:
    """Rows: target, result, absolute error; columns: contrasts and mask; the slice with the largest tumor."""
    guide = masks[0] if masks[0] is not None else masks[1]
    z = int((guide > 0).sum(dim=(1, 2)).argmax()) if guide is not None and guide.any() else len(target) // 2
    box = _brain(target[z])
    real, made = target[z][:, *box], images[z][:, *box]
    figure = Figure(figsize=(11, 8), facecolor="black", layout="tight")
    axes = figure.subplots(3, 5)
    for axis in axes[2]:
        axis.axis("off")
    for k, name in enumerate(CONTRASTS):
        show_slice(axes[0, k], real[k], f"{name}, target")
        show_slice(axes[1, k], made[k], f"{name}, {'SYNTHETIC' if missing[k] else 'input'}")
        if missing[k]:
            error = (made[k] - real[k]).abs() / 2
            show_slice(axes[2, k], error, "absolute error, 0 to 0.5", cmap="magma", vmin=0, vmax=0.5)
    # BraTS labels on file: 1 NET, 2 ED, 4 (or 3) ET
    order = torch.tensor([0, 3, 1, 2, 2])
    for row, (mask, title) in enumerate(zip(masks, ("mask, annotated", "mask, predicted"), strict=True)):
        shown = None if mask is None else order[mask[z][box].long().clamp(0, 4)]
        title = title if mask is not None else "no mask annotated"
        show_slice(axes[row, 4], real[missing.index(False)], title, shown)
    legend = f"green: edema\nyellow: enhancing\nred: non-enhancing core\n\n{caption}"
    axes[2, 4].text(0.05, 0.5, legend, color="white", fontsize=9, verticalalignment="center")
    return figure
