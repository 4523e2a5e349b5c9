# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Evidence that scores and verdicts mean something: on patients that the network has never seen."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from monai.metrics import compute_roc_auc
from monai.transforms import Affine, RandBiasField, RandGibbsNoise, RandKSpaceSpikeNoise
from scipy import ndimage
from torch import nn

from ..contrasts import SCENARIOS
from ..data.transforms import LoadStudyd, StudyCompose
from ..evaluation.evaluator import scenario_indices
from ..inference.trust import TrustAssessor

logger = logging.getLogger(__name__)


def corruptions() -> dict[str, Callable[[torch.Tensor, float, int], torch.Tensor]]:
    """What can be wrong with a study, by name; each takes 4 x X x Y x Z intensities, a severity in (0, 1] and a seed.

    All contrasts are corrupted, but of ``misregistration``, which moves all but the first that is there, and
    ``mislabelled``, which exchanges two: T1 and T2 below severity 0.75, T1 and FLAIR from there on.
    """

    def within(image: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Change each contrast that is there, within its brain alone."""
        return torch.stack([torch.where(v > 0, change(v[None])[0].clamp(min=1e-3), v) if v.any() else v for v in image])

    def noise(image: torch.Tensor, severity: float, seed: int) -> torch.Tensor:
        draw = torch.Generator().manual_seed(seed)
        return within(image, lambda v: v + 0.3 * severity * v[v > 0].mean() * torch.randn(v.shape, generator=draw))

    def monai(make: Callable[[float], Any]) -> Callable[[torch.Tensor, float, int], torch.Tensor]:
        def corrupt(image: torch.Tensor, severity: float, seed: int) -> torch.Tensor:
            transform = make(severity)
            transform.set_random_state(seed)
            return within(image, lambda v: torch.as_tensor(transform(v)))

        return corrupt

    def resolution(image: torch.Tensor, severity: float, seed: int) -> torch.Tensor:
        sigma = 3 * severity
        return within(image, lambda v: torch.from_numpy(ndimage.gaussian_filter(v[0].numpy(), sigma))[None])

    def misregistration(image: torch.Tensor, severity: float, seed: int) -> torch.Tensor:
        move = Affine(rotate_params=(0.0, 0.0, np.deg2rad(5 * severity)), padding_mode="zeros", image_only=True)
        given = [i for i, v in enumerate(image) if v.any()]
        return torch.stack([torch.as_tensor(move(v[None]))[0] if i in given[1:] else v for i, v in enumerate(image)])

    def skull(image: torch.Tensor, severity: float, seed: int) -> torch.Tensor:
        brain = (image > 0).any(dim=0).numpy()
        distance = ndimage.distance_transform_edt(~brain)
        scalp = torch.from_numpy((distance > 4) & (distance <= 4 + 8 * severity))
        return torch.stack([torch.where(scalp, 1.2 * v.max(), v) if v.any() else v for v in image])

    def mislabelled(image: torch.Tensor, severity: float, seed: int) -> torch.Tensor:
        order = [1, 0, 2, 3] if severity >= 0.75 else [0, 3, 2, 1]
        return image[order]

    return {
        "noise": noise,
        "motion": monai(lambda s: RandGibbsNoise(prob=1.0, alpha=(0.9 * s, 0.9 * s))),
        "spikes": monai(lambda s: RandKSpaceSpikeNoise(prob=1.0, intensity_range=(10 + 4 * s, 10 + 4 * s))),
        "bias_field": monai(lambda s: RandBiasField(prob=1.0, coeff_range=(0.8 * s, 0.8 * s))),
        "resolution": resolution,
        "misregistration": misregistration,
        "skull_left_on": skull,
        "mislabelled": mislabelled,
    }


def reliability(
    items: Sequence[Mapping[str, Any]],
    preprocessing: StudyCompose,
    network: nn.Module,
    assessor: TrustAssessor,
    scenario: str,
    severities: Sequence[float],
    output_dir: str | Path,
    device: torch.device | str = "cpu",
) -> None:
    """Writes ``corruptions.csv``, ``reliability.json`` and ``reliability.png``.

    Args:
        items: complete studies of patients that the network has never seen.
        preprocessing: ``inference_transforms`` with checks.
        network: on ``device``.
        assessor: gives scores and verdicts.
        scenario: name as ``scenario_name`` gives it; another one is a ``StudyError``.
        severities: of ``corruptions``, in (0, 1].
        output_dir: made if needed.
        device: where to compute.
    """
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    kept = torch.tensor(SCENARIOS[scenario_indices(scenario)[0]], dtype=torch.bool)
    place = next(i for i, step in enumerate(preprocessing.transforms) if isinstance(step, LoadStudyd)) + 1
    load, rest = (StudyCompose(part) for part in (preprocessing.transforms[:place], preprocessing.transforms[place:]))
    verdicts: list[dict[str, Any]] = []
    network.eval()
    for number, item in enumerate(items):
        logger.info("reliability: study %d of %d", number + 1, len(items))
        loaded = load({k: v for k, v in item.items() if k != "seg"})
        cases = [("none", 0.0, lambda image, severity, seed: image)]
        cases += [(name, s, change) for name, change in corruptions().items() for s in severities]
        for name, severity, change in cases:
            image = loaded["image"].clone()
            seen = torch.where(kept[:, None, None, None], torch.as_tensor(image), 0.0)
            # one exchange of names needs no contrast that is missing
            image[:] = torch.where(kept[:, None, None, None], change(seen, severity, number), 0.0)
            case = rest({**loaded, "image": image, "has_contrast": kept})
            result = assessor(case, network, device)
            scores = result["scores"]
            every = [of_contrast.get("features") for of_contrast in scores.get("contrasts", {}).values()]
            verdicts.append(
                {
                    "study": item["study"],
                    "kind": name,
                    "severity": severity,
                    "out_of_distribution": scores.get("out_of_distribution", max(every, default=float("nan"))),
                    "consistency": scores.get("consistency", float("nan")),
                    "doubt": scores.get("doubt", float("nan")),
                    **case.get("doubts", {}),
                    "checks": " ".join(sorted({found["code"] for found in case.get("checks", ())})),
                    "check_seconds": case.get("check_seconds", 0.0),
                    "verdict": result["verdict"],
                }
            )
    judged = pd.DataFrame(verdicts)
    judged.to_csv(folder / "corruptions.csv", index=False)
    sound = judged[judged["kind"] == "none"]
    rows = []
    for (kind, severity), bad in judged[judged["kind"] != "none"].groupby(["kind", "severity"]):
        both = pd.concat([sound, bad])
        row = {"kind": kind, "severity": severity}
        for score in ("doubt", "out_of_distribution", "consistency"):
            known = both[both[score].notna()]
            spoiled = torch.from_numpy((known["kind"] != "none").to_numpy(np.int64))
            area: Any = compute_roc_auc(torch.from_numpy(known[score].to_numpy()), spoiled)
            row[f"auc_{score}"] = float(area)
        flagged = (bad["checks"] != "") | bad["verdict"].isin(["review", "reject"])
        rows.append({**row, "flagged": float(flagged.mean()), "checked": float((bad["checks"] != "").mean())})
    summary = {
        "patients": len(items),
        "corruptions": rows,
        "sound_studies_that_pass": float((sound["verdict"] == "pass").mean()),
        "seconds_of_checks": float(judged["check_seconds"].mean()),
    }
    # NaN is no JSON
    text = json.dumps(summary, indent=1).replace("NaN", "null")
    (folder / "reliability.json").write_text(text + "\n")
    _draw(folder / "reliability.png", summary)
    logger.info("reliability written to %s", folder)


def _draw(path: Path, summary: Mapping[str, Any]) -> None:
    """The area under the curve of each corruption."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    table = pd.DataFrame(summary["corruptions"]).pivot(index="kind", columns="severity", values="auc_doubt")
    table.astype(float).plot.barh(ax=axes)
    axes.axvline(0.5, color="gray", linewidth=0.5)
    axes.set(xlabel="AUC of the doubt", ylabel="", xlim=(0, 1))
    figure.savefig(path, dpi=120)
