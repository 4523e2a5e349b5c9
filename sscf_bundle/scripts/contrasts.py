# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""The vocabulary: contrasts, tumor classes, regions, availability scenarios and a user's error, each defined once."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

#: The four contrasts in the one order that every tensor of this bundle uses (K = 4).
CONTRASTS = ("FLAIR", "T1", "T1ce", "T2")
#: The same, as keys of a datalist item, of a config and of file names.
CONTRAST_KEYS = ("flair", "t1", "t1ce", "t2")
#: Name of each by its key.
CONTRAST_NAMES = dict(zip(CONTRAST_KEYS, CONTRASTS, strict=True))
#: What follows the name of a contrast in scores whose target is synthesized itself, as T2 of UCSF-BMSR is.
SYNTHESIZED = " (synthesized)"
#: Key of the tumor mask file in a datalist item.
MASK_KEY = "seg"
#: Key of a datalist item that says in one sentence why the study cannot be used.
FAILURE_KEY = "failure"
#: Tumor classes in channel order (c = 3). In a label map class k + 1 is ``TUMOR_CLASSES[k]``; 0 is background.
TUMOR_CLASSES = ("ED", "ET", "NET")
#: Evaluated regions as unions of tumor classes.
REGIONS = {"WT": ("ED", "ET", "NET"), "TC": ("ET", "NET"), "ET": ("ET",)}

NUM_CONTRASTS = len(CONTRASTS)
NUM_TUMOR_CLASSES = len(TUMOR_CLASSES)

#: The 14 scenarios as 0/1 rows over ``CONTRASTS``: 1, then 2, then 3 available contrasts, each in contrast order.
SCENARIOS: tuple[tuple[int, ...], ...] = tuple(
    tuple(int(i in kept) for i in range(NUM_CONTRASTS))
    for size in range(1, NUM_CONTRASTS)
    for kept in itertools.combinations(range(NUM_CONTRASTS), size)
)


class StudyError(ValueError):
    """A study, file or setting that cannot be used; the message is one sentence that names it and a fix."""

    def __init__(self, message: str) -> None:
        # a line break in a name must not break the sentence
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))


def find_study_error(error: BaseException) -> StudyError | None:
    """The first ``StudyError`` among an exception and its causes, None if there is none.

    MONAI's ``Compose`` wraps whatever a transform raises in a ``RuntimeError`` that does not give the reason.
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, StudyError):
        cause = cause.__cause__
    return cause


def scenario_name(scenario: Sequence[int]) -> str:
    """Name of a scenario (0/1 over ``CONTRASTS``) by its available contrasts, for example ``"FLAIR+T2"``."""
    return "+".join(name for name, kept in zip(CONTRASTS, scenario, strict=True) if kept)


def scenario_table(device: torch.device | str | None = None) -> torch.Tensor:
    """All scenarios as a 14 x 4 boolean tensor, in the order of ``SCENARIOS``."""
    return torch.tensor(SCENARIOS, dtype=torch.bool, device=device)


def class_masks(classes: torch.Tensor) -> torch.Tensor:
    """Masks of ED, ET, NET (B x 3 x spatial boolean) of a B x 1 x spatial label map."""
    return torch.cat([classes == k + 1 for k in range(NUM_TUMOR_CLASSES)], dim=1)


def region_masks(classes: torch.Tensor) -> torch.Tensor:
    """Masks of WT, TC, ET from those of ED, ET, NET; both B x 3 x spatial boolean."""
    index = {name: k for k, name in enumerate(TUMOR_CLASSES)}
    return torch.stack([classes[:, [index[n] for n in names]].any(dim=1) for names in REGIONS.values()], dim=1)


def label_map(probabilities: torch.Tensor) -> torch.Tensor:
    """Class of each voxel: background if the largest probability is below 0.5, else the largest.

    Args:
        probabilities: B x 3 x spatial of ED, ET, NET.

    Returns:
        B x 1 x spatial uint8: 0 background, k + 1 is ``TUMOR_CLASSES[k]``.
    """
    value, index = probabilities.max(dim=1, keepdim=True)
    return torch.where(value < 0.5, 0, index + 1).to(torch.uint8)
