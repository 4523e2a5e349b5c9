# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""One study from Python."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from ..checked_settings import checked_settings
from ..contrasts import StudyError, find_study_error
from ..data.datalist import only_one

_BUNDLE_ROOT = Path(__file__).resolve().parents[2]


def synthesize_study(
    flair: str | os.PathLike[str] | None = None,
    t1: str | os.PathLike[str] | None = None,
    t1ce: str | os.PathLike[str] | None = None,
    t2: str | os.PathLike[str] | None = None,
    output_dir: str | os.PathLike[str] = "eval",
    **settings: Any,
) -> dict[str, Path]:
    """Fill in one study as the run ``inference`` of the bundle does, with its checks, scores, verdict and record.

    Only the page and the panel are left out (``page=True`` has them), and what is finished is done again
    (``overwrite=False`` skips it and returns nothing).

    Example::

        paths = synthesize_study(flair="a_flair.nii.gz", t2="a_t2.nii.gz", output_dir="filled")
        paths["t1ce"]  # filled/a/a_t1ce_synthetic.nii.gz
        json.loads((paths["t1ce"].parent / "a_synthesis.json").read_text())["verdict"]

    Args:
        flair, t1, t1ce, t2: paths of the volumes, ``None`` of those that are missing.
        output_dir: the study gets a folder in here, see ``StudyWriter``.
        settings: any ids of ``configs/inference.json`` with their values, for example ``study`` (a name), ``ckpt_path``
            (by default the weights of the bundle), ``device``, ``amp``, ``intensities`` or ``rejecting_checks``.

    Returns:
        Path of each written volume, by its key: the missing ones of ``flair``, ``t1``, ``t1ce`` and ``t2``, and
        ``seg``.

    Raises:
        StudyError: when the study, the weights or a setting cannot be used.
    """
    files = {"flair": flair, "t1": t1, "t1ce": t1ce, "t2": t2, "output_dir": output_dir}
    paths = {key: None if path is None else only_one(key, path) for key, path in files.items()}
    quiet = {"overwrite": True, "page": False, "handlers": [], "num_workers": 0, "num_writers": 0}
    config = str(_BUNDLE_ROOT / "configs" / "inference.json")
    settings |= checked_settings(config, settings)
    parser = ConfigParser()
    parser.read_config(config)
    parser.update({"bundle_root": str(_BUNDLE_ROOT), **quiet, **paths, **settings})
    try:
        evaluator = parser.get_parsed_content("evaluator")
    except Exception as error:
        known = find_study_error(error)
        if known is None:
            raise
        raise known from error
    try:
        evaluator.run()
    except StudyError as error:
        if not evaluator.failures:
            raise
        raise StudyError(evaluator.failures[0]["reason"]) from error
    return next(iter(evaluator.written.values()), {})
