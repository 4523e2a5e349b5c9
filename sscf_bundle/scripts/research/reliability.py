# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Evidence that uncertainty, scores and verdicts mean something: on patients that the network has never seen."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from monai.inferers import Inferer
from monai.metrics import compute_roc_auc
from monai.transforms import Affine, RandBiasField, RandGibbsNoise, RandKSpaceSpikeNoise
from scipy import ndimage, stats
from torch import nn

from ..contrasts import CONTRASTS, NUM_CONTRASTS, SCENARIOS, scenario_name
from ..data.transforms import AddAvailabilityd, LoadStudyd, StudyCompose
from ..inference.inferer import predict
from ..inference.trust import TrustAssessor
from ..inference.uncertainty import UncertaintyMap

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


def show(loaded: Mapping[str, Any], scenario: Sequence[int], image: torch.Tensor) -> dict[str, Any]:
    """A loaded study with other intensities, and as if only the contrasts of a scenario were there."""
    kept = torch.tensor(scenario, dtype=torch.bool)
    intensities = loaded["image"].clone()
    intensities[:] = torch.where(kept[:, None, None, None], torch.as_tensor(image), 0.0)
    return {**loaded, "image": intensities, "has_contrast": kept}


def risk_coverage(doubt: np.ndarray, error: np.ndarray, points: int = 20) -> np.ndarray:
    """Mean error of the share of voxels that are least in doubt, for ``points`` growing shares."""
    ordered = np.cumsum(error[np.argsort(doubt, kind="stable")]) / np.arange(1, len(error) + 1)
    return ordered[np.linspace(len(error) / points, len(error), points).astype(int) - 1]


def reliability(
    items: Sequence[Mapping[str, Any]],
    preprocessing: StudyCompose,
    network: nn.Module,
    inferer: Inferer,
    assessor: TrustAssessor,
    scenarios: Sequence[str],
    members: Sequence[str],
    severities: Sequence[float],
    slices: int,
    output_dir: str | Path,
    device: torch.device | str = "cpu",
) -> None:
    """Writes ``uncertainty.csv``, ``corruptions.csv``, ``reliability.json`` and ``reliability.png``.

    Args:
        items: complete studies of patients that the network has never seen.
        preprocessing: ``inference_transforms`` with checks.
        network: on ``device``.
        inferer: how it is called.
        assessor: gives scores and verdicts.
        scenarios: names as ``scenario_name`` gives them; corruptions are shown in the first one.
        members: of ``UncertaintyMap``; each is measured alone, and all together.
        severities: of ``corruptions``, in (0, 1].
        slices: number of slices of a study that uncertainty is measured on.
        output_dir: made if needed.
        device: where to compute.
    """
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    named = {scenario_name(s): s for s in SCENARIOS}
    chosen = [named[name] for name in scenarios]
    place = next(i for i, step in enumerate(preprocessing.transforms) if isinstance(step, LoadStudyd)) + 1
    load, rest = (StudyCompose(part) for part in (preprocessing.transforms[:place], preprocessing.transforms[place:]))
    without_planes = StudyCompose([s for s in rest.transforms if not isinstance(s, AddAvailabilityd)])
    doubts: list[dict[str, Any]] = []
    verdicts: list[dict[str, Any]] = []
    curves: dict[str, list[np.ndarray]] = {}
    network.eval()
    for number, item in enumerate(items):
        logger.info("reliability: study %d of %d", number + 1, len(items))
        loaded = load({k: v for k, v in item.items() if k != "seg"})
        truth = torch.as_tensor(without_planes(show(loaded, [1] * NUM_CONTRASTS, loaded["image"]))["image"])
        for scenario in chosen:
            shown = rest(show(loaded, scenario, loaded["image"]))
            image = torch.as_tensor(shown["image"]).clone()
            if image.shape[1:] != truth.shape[1:]:
                raise ValueError(f"Study {item['study']}: the brains of its contrasts differ too much to compare.")
            z = (image[:NUM_CONTRASTS] > -1).flatten(0, 2).any(dim=0).nonzero().flatten()
            keep = z[torch.linspace(0.2, 0.8, slices).mul(len(z) - 1).round().long().unique()]
            image, real = image[..., keep], truth[..., keep]

            def run(given: torch.Tensor) -> torch.Tensor:
                return predict(given, network, inferer, device)

            started = time.perf_counter()
            pred = run(image).cpu()
            once = time.perf_counter() - started
            brain = (image[:NUM_CONTRASTS] > -1).any(dim=0)
            for method in (*members, "+".join(members)):
                started = time.perf_counter()
                doubt = UncertaintyMap(method.split("+"), preprocessing).spread(image, pred, network, run)
                cost = (time.perf_counter() - started) / once
                for i in (i for i, given in enumerate(scenario) if not given):
                    error = ((pred[i] - real[i]).abs() / 2)[brain].numpy()
                    values = doubt[i][brain].numpy()
                    rho = float(stats.spearmanr(values, error).statistic) if np.ptp(values) > 0 else float("nan")
                    where = {"study": item["study"], "scenario": scenario_name(scenario), "contrast": CONTRASTS[i]}
                    doubts.append({**where, "method": method, "spearman": rho, "mae": error.mean(), "cost": cost})
                    curves.setdefault(method, []).append(risk_coverage(values, error) / max(error.mean(), 1e-9))
        cases = [("none", 0.0, lambda image, severity, seed: image)]
        cases += [(name, s, change) for name, change in corruptions().items() for s in severities]
        for name, severity, change in cases:
            seen = torch.as_tensor(loaded["image"]) * torch.tensor(chosen[0])[:, None, None, None]
            # one exchange of names needs no contrast that is missing
            case = rest(show(loaded, chosen[0], change(seen.clone(), severity, number)))
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
                    "checks": " ".join(sorted({found["code"] for found in case.get("checks", ())})),
                    "check_seconds": case.get("check_seconds", 0.0),
                    "verdict": result["verdict"],
                }
            )
    table, judged = pd.DataFrame(doubts), pd.DataFrame(verdicts)
    table.to_csv(folder / "uncertainty.csv", index=False)
    judged.to_csv(folder / "corruptions.csv", index=False)
    sound = judged[judged["kind"] == "none"]
    rows = []
    for (kind, severity), bad in judged[judged["kind"] != "none"].groupby(["kind", "severity"]):
        both = pd.concat([sound, bad])
        row = {"kind": kind, "severity": severity}
        for score in ("out_of_distribution", "consistency"):
            known = both[both[score].notna()]
            row[f"auc_{score}"] = _auc(known[score].to_numpy(), (known["kind"] != "none").to_numpy())
        flagged = (bad["checks"] != "") | bad["verdict"].isin(["review", "reject"])
        rows.append({**row, "flagged": float(flagged.mean()), "checked": float((bad["checks"] != "").mean())})
    by_method = table.groupby("method").agg({"spearman": "mean", "cost": "mean"})
    summary = {
        "patients": len(items),
        "uncertainty": by_method.reset_index().to_dict("records"),
        "corruptions": rows,
        "sound_studies_that_pass": float((sound["verdict"] == "pass").mean()),
        "seconds_of_checks": float(judged["check_seconds"].mean()),
        "risk_coverage": {name: np.mean(parts, axis=0).tolist() for name, parts in curves.items()},
    }
    # NaN is no JSON
    text = json.dumps(summary, indent=1).replace("NaN", "null")
    (folder / "reliability.json").write_text(text + "\n")
    _draw(folder / "reliability.png", summary)
    logger.info("reliability written to %s", folder)


def _auc(score: np.ndarray, positive: np.ndarray) -> float | None:
    """Area under the curve of ROC; None where one side is empty."""
    if positive.all() or not positive.any():
        return None
    area: Any = compute_roc_auc(torch.from_numpy(score), torch.from_numpy(positive.astype(np.int64)))
    return float(area)


def _draw(path: Path, summary: Mapping[str, Any]) -> None:
    """Risk-coverage curves, and the area under the curve of each corruption."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, curve in summary["risk_coverage"].items():
        left.plot(np.linspace(1 / len(curve), 1, len(curve)), curve, label=name)
    left.set(xlabel="coverage", ylabel="error relative to that of all voxels")
    left.legend()
    table = pd.DataFrame(summary["corruptions"]).pivot(
        index="kind", columns="severity", values="auc_out_of_distribution"
    )
    table.astype(float).plot.barh(ax=right)
    right.axvline(0.5, color="gray", linewidth=0.5)
    right.set(xlabel="AUC, out of distribution", ylabel="", xlim=(0, 1))
    figure.savefig(path, dpi=120)
