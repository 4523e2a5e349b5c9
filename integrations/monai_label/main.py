# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""MONAI Label app that serves the tumor mask and the synthetic contrasts of the bundle."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastapi import HTTPException
from monai.bundle import ConfigParser
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.tasks.infer_v2 import InferTask, InferType
from monailabel.tasks.infer.bundle import BundleInferTask

#: 3D Slicer takes the value of a label for its place in this list, so there must be no gap as in the coding of BraTS
#: to 2021, where ET is 4.
LABELS = {"NET": 1, "ED": 2, "ET": 3}
#: The first is what is served where a request names none.
CONTRASTS = ("t1ce", "flair", "t1", "t2")


class SSCFInferTask(BundleInferTask):
    """The mask, or one synthetic contrast, of the study that a request names.

    Beside what every MONAI Label model takes, a request may have the parameters ``flair``, ``t1``, ``t1ce`` and ``t2``
    (paths on the server, instead of the image), and ``contrast``, which says what an uploaded file is, because the
    server does not keep its name.

    Args:
        bundle: folder of the bundle, with ``models/model.pt``.
        conf: of the app.
        targets: what a request may ask for as ``target``: keys of contrasts, or ``("seg",)``.
    """

    def __init__(self, bundle: Path, conf: dict[str, str], targets: Sequence[str]) -> None:
        self.is_mask = "seg" in targets
        super().__init__(
            str(bundle), conf, type=InferType.SEGMENTATION if self.is_mask else InferType.OTHERS, load_strict=True
        )
        if not self.is_valid():
            raise FileNotFoundError(f"{bundle} holds no models/model.pt: train first, or copy the weights there.")
        self.targets = tuple(targets)
        self.labels = LABELS if self.is_mask else {}
        self._config["target"] = list(targets)
        del self._config["model_filename"]  # beside the weights there may be a training's checkpoint

    def _load_bundle_config(self, path: str, config: str) -> ConfigParser:
        parser = super()._load_bundle_config(path, config)
        parser.config.update({"mask_labels": LABELS})
        return parser

    def pre_transforms(self, data: dict[str, Any] | None = None) -> Sequence[Callable]:
        return [*super().pre_transforms(data), self._refuse_given]

    def __call__(self, request: Mapping[str, Any], callbacks: Any = None) -> tuple[str | None, dict]:
        request = {
            **request,
            "result_extension": request.get("result_extension") or ".nii.gz",
            "result_dtype": "uint8" if self.is_mask else "float32",
        }
        target = request.get("target") or self.targets[0]
        request["target"] = target[0] if isinstance(target, list) else target
        if request["target"] not in self.targets:
            raise HTTPException(400, f"The target {target} is not served: give one of {', '.join(self.targets)}.")
        contrast, image = request.get("contrast"), Path(request["image"])
        if not contrast and image.is_file() and image.parent == Path(tempfile.gettempdir()):
            raise HTTPException(400, f"The file has no name here: say what it is, contrast as {', '.join(CONTRASTS)}.")
        if contrast:
            if contrast not in CONTRASTS:
                raise HTTPException(400, f"The contrast {contrast} is unknown: give one of {', '.join(CONTRASTS)}.")
            request[contrast] = request["image"]
        try:
            return super().__call__(request, callbacks)
        except ValueError as error:
            # by name, because the server imports the modules of the bundle anew for each request
            if type(error).__name__ != "StudyError":
                raise
            raise HTTPException(400, str(error)) from error

    def _refuse_given(self, data: dict[str, Any]) -> dict[str, Any]:
        """Last transform: what is on file is not synthesized."""
        if data.get(data["target"]):
            raise HTTPException(400, f"{data['target']} is in the study: give another target.")
        return data


class SSCFApp(MONAILabelApp):
    """Models ``sscf_tumor`` and ``sscf_contrast``; the setting ``bundle`` is the folder of the bundle.

    Args:
        app_dir: this folder.
        studies: folder of the studies.
        conf: settings of the command line.
    """

    def __init__(self, app_dir: str, studies: str, conf: dict[str, str]) -> None:
        self.bundle = Path(conf.get("bundle") or Path(__file__).resolve().parents[2] / "sscf_bundle").resolve()
        super().__init__(
            app_dir=app_dir,
            studies=studies,
            conf=conf,
            name="SSCF",
            description="Missing contrasts and tumor mask of brain MRI; for research, not for diagnosis",
        )

    def init_infers(self) -> dict[str, InferTask]:
        return {
            "sscf_tumor": SSCFInferTask(self.bundle, self.conf, ("seg",)),
            "sscf_contrast": SSCFInferTask(self.bundle, self.conf, CONTRASTS),
        }
