# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""What a memory bank tells of the slices in it: a ridge regression from its entries to the slices.

``python -m benchmarks.inversion WEIGHTS SLICES DATA`` in the root, with ``sscf_bundle`` on ``PYTHONPATH``: a file of
weights, the ``bank_slices.json`` that was written with it, and the folder of the studies. The regression knows entries
and slices of all patients but one, and is asked for the slices of that one.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from scripts.contrasts import CONTRASTS
from scripts.data.datalist import find_studies
from scripts.data.randomness import stable_hash
from scripts.data.slices import prepare_slices
from scripts.data.transforms import study_transforms
from scripts.networks.memory_bank import CompiledBank
from scripts.networks.weights import read_state

#: Of the regression, relative to the mean eigenvalue. The best is reported: it favors who inverts.
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)


def read_entries(state: dict[str, torch.Tensor], used: int) -> np.ndarray:
    """All that the bank holds of each slice, standardized: used x features. Prints what that is."""
    features = []
    for name in CompiledBank._fields:
        tensor = state[f"bank_{name}"]
        size = tensor[0].numel() * tensor.element_size()
        print(f"bank_{name}: {len(tensor)} x {list(tensor.shape[1:])} {tensor.dtype}, {size} bytes each")
        if tensor.is_floating_point():
            features.append(tensor[:used].float().flatten(1).numpy())
    entries = np.concatenate(features, axis=1)
    return (entries - entries.mean(axis=0)) / (entries.std(axis=0) + 1e-6)


def read_slices(listed: list[dict], items: dict[str, dict], cache: str, settings: dict) -> np.ndarray:
    """The slices of the bank, in [-1, 1]: entries x contrasts x rows x columns."""
    wanted = [items[name] for name in sorted({entry["study"] for entry in listed})]
    prepared = prepare_slices(wanted, study_transforms(**settings["preprocessing"]), cache, 0)
    studies = {
        study.study: (list(study.info["z"]), np.load(study.directory / "image.npy", mmap_mode="r"))
        for study in prepared.studies
    }
    slices = [studies[e["study"]][1][studies[e["study"]][0].index(e["slice"])] for e in listed]
    return np.stack(slices).astype(np.float32)


def predict(known: np.ndarray, images: np.ndarray, asked: np.ndarray, penalty: float) -> np.ndarray:
    """Ridge regression in its dual form: known and asked are entries x features, images are entries x pixels."""
    middle, mean = known.mean(axis=0), images.mean(axis=0)
    gram = (known - middle) @ (known - middle).T
    gram[np.diag_indices(len(gram))] += penalty * np.trace(gram) / len(gram)
    return mean + (asked - middle) @ (known - middle).T @ np.linalg.solve(gram, images - mean)


def main() -> None:
    """Prints the bank's content, and R2 against the other patients' mean image and PSNR of each contrast."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("weights", "slices", "data"):
        parser.add_argument(name)
    parser.add_argument("--cache", default="build/slice_cache")
    chosen = parser.parse_args()
    state, settings, _ = read_state(chosen.weights)
    patients = state["bank_patient"][state["bank_present"].any(dim=1)].numpy()
    listed = json.loads(Path(chosen.slices).read_text())[: len(patients)]
    items = {item["study"]: item for item in find_studies(chosen.data)}
    if [stable_hash(items[entry["study"]]["patient"]) for entry in listed] != patients.tolist():
        raise SystemExit(f"{chosen.slices} is not the list of the slices in {chosen.weights}.")
    entries = read_entries(state, len(listed))
    images = read_slices(listed, items, chosen.cache, settings)
    # the control: what the means of 3 x 3 fields of the images themselves would tell
    fields = (
        images.reshape(*images.shape[:2], 3, images.shape[2] // 3, 3, -1).mean(axis=(3, 5)).reshape(len(images), -1)
    )
    sources = {"entry": entries, "3 x 3 fields": fields / fields.std()}
    brains = (images > -1).any(axis=1).reshape(len(images), -1)
    print(f"{len(listed)} entries of {entries.shape[1]} numbers, of {len(set(patients))} patients")
    for k, contrast in enumerate(CONTRASTS):
        flat = images[:, k].reshape(len(images), -1)
        squares = {name: np.empty_like(flat) for name in ("mean", *((s, p) for s in sources for p in PENALTIES))}
        for patient in np.unique(patients):
            rest, own = patients != patient, patients == patient
            squares["mean"][own] = (flat[rest].mean(axis=0) - flat[own]) ** 2
            for source, penalty in squares.keys() - {"mean"}:
                known, asked = sources[source][rest], sources[source][own]
                squares[source, penalty][own] = (
                    predict(known, flat[rest], asked, penalty).clip(-1, 1) - flat[own]
                ) ** 2
        for source in sources:
            best = min(PENALTIES, key=lambda p: squares[source, p].sum())
            for area, inside in (("slice", np.ones_like(brains)), ("brain", brains)):
                mean, ours = (np.where(inside, squares[name], 0) for name in ("mean", (source, best)))
                psnr = [(10 * np.log10(4 * inside.sum(axis=1) / one.sum(axis=1))).mean() for one in (ours, mean)]
                print(
                    f"{contrast}, {area}, from {source}: R2 {1 - ours.sum() / mean.sum():.2f} (penalty {best:g}), "
                    f"PSNR {psnr[0]:.2f}, of the mean image {psnr[1]:.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
