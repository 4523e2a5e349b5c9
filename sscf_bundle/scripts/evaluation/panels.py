# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""What a run writes for a person to look at: the log of validation scores and TensorBoard panels."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from ignite.engine import Engine, Events
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter

from ..contrasts import CONTRASTS, NUM_CONTRASTS, SCENARIOS, label_map, scenario_name
from .metrics import fill_background

#: RGBA of the classes 1 ED, 2 ET, 3 NET over a gray image.
_CLASS_COLORS = np.array([[0, 0, 0, 0], [0.2, 0.8, 0.3, 0.45], [1.0, 0.8, 0.1, 0.6], [0.9, 0.15, 0.15, 0.6]])


def scenario_panel(output: Mapping[str, torch.Tensor]) -> Figure:
    """One row for each sample: the four target contrasts with the mask, then what the network gives.

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
            show_slice(axes[r, k], output["target"][r, k], name)
            state = "input" if available[k] else "synthetic"
            show_slice(axes[r, 5 + k], output["target"][r, k] if available[k] else images[r, k], f"{name} ({state})")
        show_slice(axes[r, 4], output["target"][r, 0], "true mask", output["label"][r, 0])
        show_slice(
            axes[r, 9], output["target"][r, 0], scenario_name(SCENARIOS[int(output["scenario"][r])]), classes[r, 0]
        )
    return figure


def show_slice(
    axis: Axes,
    image: torch.Tensor | np.ndarray,
    title: str,
    classes: torch.Tensor | np.ndarray | None = None,
    **options: Any,
) -> None:
    """A slice as radiologists see it (first array axis to the right), with an optional class map over it."""
    axis.imshow(np.asarray(image).T, origin="lower", **{"cmap": "gray", "vmin": -1, "vmax": 1, **options})
    if classes is not None:
        axis.imshow(_CLASS_COLORS[np.asarray(classes).astype(int)].transpose(1, 0, 2), origin="lower")
    axis.set_title(title, color="white", fontsize=8)
    axis.axis("off")


@functools.cache
def board(log_dir: str | Path) -> SummaryWriter:
    """The one TensorBoard writer of a process for a folder, given by name; each use flushes it."""
    return SummaryWriter(str(log_dir))


class ScoreLog:
    """Writes the scalar scores of every run of an evaluator to the log, a CSV file and TensorBoard (``log_dir``).

    The file has one row for each epoch; rows from this one on, of an earlier run, go.
    """

    def __init__(self, path: str | Path, log_dir: str | Path | None = None) -> None:
        self.path, self.log_dir = Path(path), log_dir

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        epoch = engine.state.epoch
        scores = {
            k: float(v)
            for k, v in engine.state.metrics.items()
            if not isinstance(v, Mapping) and not k.startswith("key_")
        }
        table = pd.DataFrame(scores, index=pd.Index([epoch], name="epoch"))
        if self.path.is_file():
            earlier = pd.read_csv(self.path, index_col="epoch", float_precision="round_trip")
            table = pd.concat([earlier[earlier.index < epoch], table])[list(scores)]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        table.to_csv(self.path)
        engine.logger.info(f"epoch {epoch}: " + ", ".join(f"{name} {value:.3f}" for name, value in scores.items()))
        if self.log_dir is not None:
            writer = board(log_dir=self.log_dir)
            for name, value in scores.items():
                writer.add_scalar(f"validation/{name}", value, epoch)
            writer.flush()


class ScenarioPanels:
    """Shows ``rows`` samples of the first batch of every evaluation in TensorBoard, see ``scenario_panel``."""

    def __init__(self, log_dir: str | Path, rows: int = 6) -> None:
        self.log_dir, self.rows = log_dir, rows

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        length = engine.state.epoch_length or 1
        if engine.state.iteration % length != 1 % length:
            return
        output: Any = engine.state.output
        picked = torch.linspace(0, output["pred"].shape[0] - 1, min(self.rows, output["pred"].shape[0])).long().tolist()
        figure = scenario_panel(
            {k: output[k][picked].cpu() for k in ("pred", "target", "label", "available", "scenario")}
        )
        board(log_dir=self.log_dir).add_figure("validation/panel", figure, engine.state.epoch)
        board(log_dir=self.log_dir).flush()
