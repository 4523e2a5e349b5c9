# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""What a person looks at: validation log, TensorBoard panels, and a picture of one filled-in study."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import nibabel as nib
import numpy as np
import torch
from ignite.engine import Engine, Events
from matplotlib.figure import Figure
from monai.metrics import PSNRMetric, SSIMMetric
from torch.utils.tensorboard import SummaryWriter

from .contrasts import CONTRAST_KEYS, CONTRASTS, MASK_KEY, NUM_CONTRASTS, SCENARIOS, scenario_name
from .datalist import find_studies
from .metrics import ScenarioScores, fill_background, label_map, mean_of_available, zero_filling

#: RGBA of the classes 1 ED, 2 ET, 3 NET over a gray image.
_CLASS_COLORS = np.array([[0, 0, 0, 0], [0.2, 0.8, 0.3, 0.45], [1.0, 0.8, 0.1, 0.6], [0.9, 0.15, 0.15, 0.6]])


class ScoreLog:
    """Writes the scalar scores of every run of an evaluator to the log, a CSV file and TensorBoard.

    Args:
        path: CSV file, one row for each epoch; a row of the same epoch is replaced.
        log_dir: of TensorBoard; None writes none.
    """

    def __init__(self, path: str | Path, log_dir: str | Path | None = None) -> None:
        self.path, self.log_dir = Path(path), log_dir

    def attach(self, engine: Engine) -> None:
        """Writes at ``COMPLETED``."""
        engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        epoch = engine.state.epoch
        scores = {
            k: float(v)
            for k, v in engine.state.metrics.items()
            if not isinstance(v, Mapping) and not k.startswith("key_")
        }
        rows: dict[int, dict[str, str | float]] = {}
        if self.path.is_file():
            with self.path.open(newline="") as file:
                rows = {int(row["epoch"]): row for row in csv.DictReader(file)}
        rows[epoch] = {"epoch": epoch, **scores}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=["epoch", *scores], extrasaction="ignore", restval="")
            writer.writeheader()
            writer.writerows(rows[k] for k in sorted(rows))
        engine.logger.info(f"epoch {epoch}: " + ", ".join(f"{name} {value:.3f}" for name, value in scores.items()))
        if self.log_dir is not None:
            with SummaryWriter(str(self.log_dir)) as board:
                for name, value in scores.items():
                    board.add_scalar(f"validation/{name}", value, epoch)


class EvaluationReport:
    """Writes ``metrics.json`` (means and the facts of the run) and ``scores.csv`` (every study and scenario).

    Args:
        scores: the metrics, first the network's, then the floors.
        directory: where to write.
        facts: protocol of the run, written as it is; the hash of the weights file ``facts["weights"]`` is added.
    """

    def __init__(self, scores: Sequence[ScenarioScores], directory: str | Path, facts: Mapping[str, Any]) -> None:
        self.scores, self.directory, self.facts = list(scores), Path(directory), dict(facts)

    def attach(self, engine: Engine) -> None:
        """Writes at ``COMPLETED``."""
        engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        means: dict[str, float] = {}
        rows: list[dict[str, str | float]] = []
        for metric in self.scores:
            means |= metric.compute()
            rows += metric.rows()
        if idist.get_rank() > 0:
            return
        facts = self.facts | {
            "studies": self.scores[0].studies,
            "sha256": hashlib.sha256(Path(self.facts["weights"]).read_bytes()).hexdigest(),
            "convention": "slices in [0, 1] by the volume's scaling, data range 1, background outside the available "
            "brains; mean over slices, studies, targets of a scenario, scenarios",
        }
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / "metrics.json").write_text(json.dumps({"means": means, "facts": facts}, indent=1) + "\n")
        with (self.directory / "scores.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        engine.logger.info(", ".join(f"{name} {value:.3f}" for name, value in means.items()))
        engine.logger.info(f"wrote {self.directory / 'metrics.json'} and scores.csv")


class ScenarioPanels:
    """Shows the first batch of every evaluation in TensorBoard: truth, prediction and mask under its scenarios.

    Args:
        log_dir: of TensorBoard.
        rows: how many samples.
    """

    def __init__(self, log_dir: str | Path, rows: int = 6) -> None:
        self.log_dir, self.rows = log_dir, rows

    def attach(self, engine: Engine) -> None:
        """Draws after the first iteration."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        if engine.state.iteration % engine.state.epoch_length != 1 % engine.state.epoch_length:
            return
        output = engine.state.output
        picked = torch.linspace(0, output["pred"].shape[0] - 1, min(self.rows, output["pred"].shape[0])).long().tolist()
        figure = scenario_panel(
            {k: output[k][picked].cpu() for k in ("pred", "target", "label", "available", "scenario")}
        )
        with SummaryWriter(str(self.log_dir)) as board:
            board.add_figure("validation/panel", figure, engine.state.epoch)


def scenario_panel(output: Mapping[str, torch.Tensor]) -> Figure:
    """One row for each sample: the four true contrasts with the mask, then what the network gives.

    Args:
        output: ``pred`` R x 7 x H x W, ``target`` R x 4 x H x W, ``label`` R x 1 x H x W, ``available`` R x 4,
            ``scenario`` R.
    """
    images = fill_background(output["pred"][:, :NUM_CONTRASTS], output["target"], output["available"])
    classes = label_map(output["pred"][:, NUM_CONTRASTS:])
    count = images.shape[0]
    figure = Figure(figsize=(15, 1.6 * count), facecolor="black", layout="tight")
    axes = figure.subplots(count, 10, squeeze=False)
    for r in range(count):
        available = output["available"][r].tolist()
        for k, name in enumerate(CONTRASTS):
            _show(axes[r, k], output["target"][r, k], name)
            state = "input" if available[k] else "synthetic"
            _show(axes[r, 5 + k], output["target"][r, k] if available[k] else images[r, k], f"{name} ({state})")
        _show(axes[r, 4], output["target"][r, 0], "true mask", output["label"][r, 0])
        _show(axes[r, 9], output["target"][r, 0], scenario_name(SCENARIOS[int(output["scenario"][r])]), classes[r, 0])
    return figure


def _show(
    axis, image: torch.Tensor | np.ndarray, title: str, classes: torch.Tensor | np.ndarray | None = None, **options
) -> None:
    """A slice as radiologists see it (first array axis to the right), with an optional class map over it."""
    options = {"cmap": "gray", "vmin": -1, "vmax": 1} | options
    axis.imshow(np.asarray(image).T, origin="lower", **options)
    if classes is not None:
        axis.imshow(_CLASS_COLORS[np.asarray(classes).astype(int)].transpose(1, 0, 2), origin="lower")
    axis.set_title(title, color="white", fontsize=8)
    axis.axis("off")


def compare_study(
    truth: Mapping[str, str],
    result: Mapping[str, str | Path],
    picture: str | Path,
    scale: float = 1.0,
) -> dict[str, float]:
    """Draws a filled-in study beside the truth and scores it, with the floors of the same input.

    Scores are of the 3-D study in [0, 1] (brain's 99.5th percentile = 1, as the network sees it), over all axial slices
    with brain, outside the brain all the same: PSNR and SSIM are means over slices.

    Args:
        truth: datalist item of the complete study, with a path for each contrast (and ``seg``).
        result: path of each synthesized contrast by its key (and ``seg``), as ``fill_in`` returns.
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
    for prefix, guess in (
        ("", images),
        ("mean_of_available_", mean_of_available(target, available)),
        ("zero_filling_", zero_filling(target, available)),
    ):
        guess = (fill_background(guess, target, available) + 1) / 2
        for k, key in enumerate(CONTRAST_KEYS):
            if missing[k]:
                pair = guess[:, k : k + 1].clamp(0, 1), (target[:, k : k + 1] + 1) / 2
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
        _show(axes[0, k], truth[k], f"{name}, truth")
        _show(axes[1, k], made[k], f"{name}, {'SYNTHETIC' if missing[k] else 'input'}")
        if missing[k]:
            _show(
                axes[2, k], (made[k] - truth[k]).abs() / 2, "absolute error, 0 to 0.5", cmap="magma", vmin=0, vmax=0.5
            )
        else:
            axes[2, k].axis("off")
    # BraTS labels on file: 1 NET, 2 ED, 4 (or 3) ET
    order = np.array([0, 3, 1, 2, 2])
    given = missing.index(False)
    for row, (mask, title) in enumerate(zip(masks, ("mask, annotated", "mask, predicted"), strict=True)):
        shown = None if mask is None else order[mask[z][box].astype(int).clip(0, 4)]
        _show(axes[row, 4], truth[given], title, shown)
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
                f"{scores[f'{floor}{key}_psnr']:.2f} dB / {scores[f'{floor}{key}_ssim']:.3f}"
                for floor in ("", "mean_of_available_", "zero_filling_")
            )
            parts.append(f"{key} PSNR / SSIM {ours} (mean of available {mean}, zero filling {zero})")
    print(f"{study}: " + "; ".join(parts) + f"; picture {picture}")
    return scores
