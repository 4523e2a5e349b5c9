# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Inference: from incomplete studies on disk to the missing contrasts and the tumor mask on disk."""

from __future__ import annotations

import json
import logging
import os
import shutil
import uuid
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from monai.config import KeysCollection
from monai.data import Dataset, MetaTensor
from monai.engines import Evaluator
from monai.engines.utils import IterationEvents
from monai.inferers import Inferer, SliceInferer
from monai.networks import eval_mode
from monai.transforms import Invertd, MapTransform
from monai.utils import convert_to_dst_type
from torch import nn

from ..contrasts import CONTRAST_KEYS, CONTRASTS, MASK_KEY, NUM_CONTRASTS, TUMOR_CLASSES, StudyError, label_map
from ..data.datalist import find_studies, single_study
from ..data.randomness import stable_hash
from ..data.transforms import AddAvailabilityd, BrainMaskd, LoadStudyd, StudyCompose, find_study_error, study_transforms
from ..networks.weights import load_weights, network_from_weights, read_settings

#: Volumes of a finished prediction in channel order, as keys of written files.
OUTPUT_KEYS = (*CONTRAST_KEYS, MASK_KEY)
#: Label values of BraTS to 2021; ET is 3 from 2023 on.
BRATS_MASK_LABELS = {"NET": 1, "ED": 2, "ET": 4}
#: Key of a dataset item that says in one sentence why the study could not be preprocessed.
FAILURE_KEY = "failure"
#: Key of the union of the available brains on the grid on file.
FILE_BRAIN_KEY = "brain_on_file"

_BUNDLE_ROOT = Path(__file__).resolve().parents[2]
#: Header fields that place a volume in space; no others are taken over, because some may name the patient.
_GEOMETRY_FIELDS = (
    *("pixdim", "xyzt_units", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d"),
    *("qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z"),
)
#: What of an item is not needed once its prediction is on the grid on file.
_PREPROCESSED_KEYS = ("image", "label", "brain", FILE_BRAIN_KEY)
_NOTICE = "Synthetic volumes and masks for research only, not for clinical use."


logger = logging.getLogger(__name__)


class BrainSliceInferer(SliceInferer):
    """Slice-by-slice inference that leaves out axial slices without brain and pads as the network needs.

    Takes B x 8 x X x Y x Z (four contrasts in [-1, 1] with background -1, four planes of 0/1 availability) and gives
    B x 7 x X x Y x Z (four contrasts in [-1, 1], three probabilities). A slice in which every contrast is -1 is not
    shown to the network: its contrasts are -1 and its probabilities 0.

    A volume has one scenario. It is read once for each volume, and a network that has ``for_scenario`` (``SSCFNet``) is
    asked for a module that computes for this scenario alone; any other network is called as it is.

    Args:
        roi_size: size of the window in x and y; -1 is the whole slice.
        sw_batch_size: number of slices in one call of the network.
        divisor: windows are padded to multiples of this.
        compile: call the network through ``torch.compile``, once for each scenario. The last batch of a volume is then
            filled up with copies of its last slice, so that its shape is known already.
        kwargs: other arguments of ``monai.inferers.SlidingWindowInferer``.

    Raises:
        ValueError: when ``roi_size`` is neither -1 nor a multiple of ``divisor``.
    """

    def __init__(
        self,
        roi_size: Sequence[int] = (-1, -1),
        sw_batch_size: int = 8,
        divisor: int = 16,
        compile: bool = False,
        **kwargs: Any,
    ) -> None:
        if any(size > 0 and size % divisor for size in roi_size):
            raise ValueError(f"roi_size must be -1 or a multiple of {divisor}, got {tuple(roi_size)}.")
        super().__init__(spatial_dim=2, roi_size=tuple(roi_size), sw_batch_size=sw_batch_size, **kwargs)
        self.divisor = divisor
        self.compile = compile
        self._network: Callable[..., torch.Tensor] | None = None
        self._modules: dict[tuple[bool, ...], Callable[..., torch.Tensor]] = {}

    def __call__(
        self, inputs: torch.Tensor, network: Callable[..., torch.Tensor], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Run the network over all slices with brain.

        Args:
            inputs: B x 8 x X x Y x Z.
            network: B x 8 x X x Y to B x 7 x X x Y.
            args: ignored, as ``SliceInferer`` ignores them.
            kwargs: ignored too.

        Returns:
            B x 7 x X x Y x Z float32, a ``MetaTensor`` if ``inputs`` is one.
        """
        volume = inputs.as_tensor() if isinstance(inputs, MetaTensor) else inputs
        out = volume.new_zeros(volume.shape[0], NUM_CONTRASTS + len(TUMOR_CLASSES), *volume.shape[2:])
        out[:, :NUM_CONTRASTS] = -1
        for sample, result in zip(volume, out, strict=True):
            # one reduction at a time is several times faster than all at once
            highest = sample[:NUM_CONTRASTS].amax(dim=0).amax(dim=0).amax(dim=0)
            available = sample[NUM_CONTRASTS:].flatten(1).amax(dim=1) > 0.5
            # the one synchronization of a volume; NaN counts as brain, and so comes to light
            *has_brain, flair, t1, t1ce, t2 = torch.cat([~(highest <= -1), available]).tolist()
            slices = [z for z, kept in enumerate(has_brain) if kept]
            if not slices:
                continue
            module = self._module(network, (flair, t1, t1ce, t2))
            index = torch.tensor(slices, device=volume.device)
            if max(self.orig_roi_size) <= 0:
                self._whole_slices(sample, result, index, module)
            else:
                result[..., index] = self._windows(sample[..., index], module)
        return convert_to_dst_type(out, inputs)[0] if isinstance(inputs, MetaTensor) else out

    def _module(self, network: Callable[..., torch.Tensor], available: tuple[bool, ...]) -> Callable[..., torch.Tensor]:
        """What to call for a scenario."""
        specialize = getattr(network, "for_scenario", None) if any(available) else None
        if not self.compile:
            return network if specialize is None else specialize(available)
        if network is not self._network:
            self._network, self._modules = network, {}
        if available not in self._modules:
            module = network if specialize is None else specialize(available)
            self._modules[available] = torch.compile(module, dynamic=False)
        return self._modules[available]

    def _whole_slices(
        self, sample: torch.Tensor, result: torch.Tensor, index: torch.Tensor, module: Callable[..., torch.Tensor]
    ) -> None:
        """Write the prediction for some slices of a volume (8 x X x Y x Z) to ``result`` (7 x X x Y x Z).

        The base class would do the same at four times the cost, since it weighs windows that do not overlap.
        """
        padding = self._padding(sample.shape[1:3])
        left, top = padding[2], padding[0]
        axial, axial_result = sample.permute(3, 0, 1, 2), result.permute(3, 0, 1, 2)
        for part in index.split(self.sw_batch_size):
            fill = self.sw_batch_size - len(part) if self.compile else 0
            batch = _pad_slices(axial[torch.cat([part, part[-1:].expand(fill)])], padding)
            pred = module(batch)[: len(part), :, left : left + sample.shape[1], top : top + sample.shape[2]]
            axial_result[part] = pred.to(result.dtype)

    def _windows(self, kept: torch.Tensor, module: Callable[..., torch.Tensor]) -> torch.Tensor:
        """Prediction for the slices with brain (8 x X x Y x Z) by the sliding window of the base class."""
        padding = self._padding(kept.shape[1:3])
        left, top = padding[2], padding[0]
        axial = _pad_slices(kept.permute(3, 0, 1, 2), padding).permute(1, 2, 3, 0)
        pred = super().__call__(axial[None], module)[0]
        return pred[:, left : left + kept.shape[1], top : top + kept.shape[2]]

    def _padding(self, size: Sequence[int]) -> list[int]:
        """Padding of x and y up to the window and to the divisor, in the order of ``torch.nn.functional.pad``."""
        padding: list[int] = []
        for extent, window in reversed(list(zip(size, self.orig_roi_size, strict=True))):
            wanted = max(-(-extent // self.divisor) * self.divisor, window)
            before = (wanted - extent) // 2
            padding += [before, wanted - extent - before]
        return padding


class FindStudyd(MapTransform):
    """Let ``image`` name a study where no contrast is named: its folder, or any one of its files.

    This is how MONAI Label names what it wants to be inferred. Items with a path of a contrast stay as they are.

    Args:
        keys: key of the path.

    Raises:
        StudyError: from the call, when the path leads to no study or to several.
    """

    def __init__(self, keys: KeysCollection = "image") -> None:
        super().__init__(keys, allow_missing_keys=True)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        if any(d.get(key) for key in CONTRAST_KEYS):
            return d
        for key in self.key_iterator(d):
            path = Path(d[key])
            items = find_studies(path if path.is_dir() else path.parent)
            if not path.is_dir():
                items = [item for item in items if str(path) in item.values()]
            if len(items) != 1:
                raise StudyError(
                    f"{path} leads to {len(items)} studies: name the folder or a file of one study, or the files as "
                    f"{', '.join(CONTRAST_KEYS)}."
                )
            d.update({k: v for k, v in items[0].items() if k in (*CONTRAST_KEYS, "study", "patient")})
        return d


class ForgetFileNamed(MapTransform):
    """Take the file name out of the metadata of a stack of several files.

    Where it is there, ``Spacingd`` takes every entry ``image_...`` of the item for metadata, and fails at the
    ``image_path`` of MONAI Label.

    Args:
        keys: keys of ``MetaTensor``.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            d[key].meta.pop("filename_or_obj", None)
        return d


class SelectOutputsd(MapTransform):
    """Keep of a prediction only the channels that are wanted, with the contrasts in [0, 1] instead of [-1, 1].

    Wanted are the contrasts that are missing and the mask, or, where the item has ``"target"``, only that one of
    ``OUTPUT_KEYS``: MONAI Label serves one volume at a time. ``"output_keys"`` becomes the tuple of what is wanted, in
    the order of ``OUTPUT_KEYS``. The result has one channel for each contrast in there, then, if the mask is wanted,
    the probabilities of the three tumor classes.

    It comes before ``Invertd``, which takes its time for each channel and fills with 0 what the network did not see:
    -1 there, but background here.

    Args:
        keys: key of the prediction, 7 x X x Y x Z.
        has_contrast_key: key of the bool tensor of 4 that says what is available.

    Raises:
        StudyError: from the call, when ``"target"`` is unknown.
    """

    def __init__(self, keys: KeysCollection = "pred", has_contrast_key: str = "has_contrast") -> None:
        super().__init__(keys)
        self.has_contrast_key = has_contrast_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        target = d.get("target")
        if target is None:
            available = torch.as_tensor(d[self.has_contrast_key]).tolist()
            missing = [key for key, given in zip(CONTRAST_KEYS, available, strict=True) if not given]
            wanted = (*missing, MASK_KEY)
        elif target in OUTPUT_KEYS:
            wanted = (target,)
        else:
            raise StudyError(f"The target {target} is unknown: give one of {', '.join(OUTPUT_KEYS)}.")
        contrasts = [CONTRAST_KEYS.index(key) for key in wanted if key != MASK_KEY]
        classes = range(NUM_CONTRASTS, NUM_CONTRASTS + len(TUMOR_CLASSES)) if MASK_KEY in wanted else ()
        for key in self.key_iterator(d):
            meta = d[key].meta if isinstance(d[key], MetaTensor) else None
            kept = torch.as_tensor(d[key])[[*contrasts, *classes]]
            kept[: len(contrasts)].add_(1).div_(2)
            d[key] = MetaTensor(kept, meta=meta)
        d["output_keys"] = wanted
        return d


class FinishPredictiond(MapTransform):
    """Make the volumes to write from a prediction on the grid on file.

    The result is a float32 ``MetaTensor`` on the CPU with one X x Y x Z volume for each of ``"output_keys"``: contrasts
    in [0, ``output_scale``], and the label map; all are 0 outside the union of the available brains.

    Args:
        keys: key of the prediction as ``SelectOutputsd`` leaves it, on the grid on file and on any device.
        output_scale: intensity of what the network knows as 1.
        mask_labels: tumor class to label value, 1 to 255.
        brain_key: key of the mask of the brain on the same grid, 1 x X x Y x Z.

    Raises:
        ValueError: when ``mask_labels`` does not give every tumor class a label value, or ``output_scale`` is not > 0.
    """

    def __init__(
        self,
        keys: KeysCollection = "pred",
        output_scale: float = 1.0,
        mask_labels: Mapping[str, int] | None = None,
        brain_key: str = FILE_BRAIN_KEY,
    ) -> None:
        super().__init__(keys)
        labels = BRATS_MASK_LABELS if mask_labels is None else mask_labels
        if set(labels) != set(TUMOR_CLASSES) or not all(0 < value < 256 for value in labels.values()):
            raise ValueError(f"mask_labels must map {', '.join(TUMOR_CLASSES)} to 1 to 255, got {dict(labels)}.")
        if not output_scale > 0:
            raise ValueError(f"output_scale must be greater than 0, got {output_scale}.")
        self.output_scale = output_scale
        self.values = torch.tensor([0, *(labels[name] for name in TUMOR_CLASSES)], dtype=torch.float32)
        self.brain_key = brain_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        wanted = d["output_keys"]
        num_contrasts = sum(key != MASK_KEY for key in wanted)
        brain = torch.as_tensor(d[self.brain_key])[0].bool().cpu()
        for key in self.key_iterator(d):
            pred = torch.as_tensor(d[key])
            # a fifth of the voxels are brain; only these are computed and leave the device
            voxels = pred[:, brain.to(pred.device)]
            values = voxels[:num_contrasts].clamp_(0, 1).mul_(self.output_scale)
            if MASK_KEY in wanted:
                classes = label_map(voxels[None, num_contrasts:])[0]
                values = torch.cat([values, self.values.to(pred.device)[classes.long()]])
            # pages of numpy.zeros that stay 0 cost nothing
            finished = torch.from_numpy(np.zeros((len(wanted), *brain.shape), np.float32))
            finished[:, brain] = values.cpu()
            meta = d[key].meta if isinstance(d[key], MetaTensor) else None
            d[key] = MetaTensor(finished, meta=meta)
        return d


def inference_transforms(
    image_size: Sequence[int] | int = 192,
    scaling: str = "brain",
    spacing: float | None = 1.0,
    percentile: float = 99.5,
    reader: str | None = None,
) -> StudyCompose:
    """The preprocessing of inference: that of training, and what only inference needs.

    Args:
        image_size: see ``study_transforms``, like all of these; they must be those of the training.
        scaling: see ``study_transforms``.
        spacing: see ``study_transforms``.
        percentile: see ``study_transforms``.
        reader: see ``study_transforms``.

    Returns:
        An invertible composition of transforms for one datalist item. Afterwards ``image`` is the network's
        8 x X x Y x Z input and ``brain_on_file`` (1 x X x Y x Z uint8) the union of the available brains on the grid
        on file.
    """
    steps = []
    for step in study_transforms(image_size, scaling, spacing, percentile, reader=reader).transforms:
        steps.append(step)
        if isinstance(step, LoadStudyd):
            # the mask is taken before resampling, so that no written voxel outside the brain is other than 0
            steps += [ForgetFileNamed("image"), BrainMaskd("image", FILE_BRAIN_KEY)]
    return StudyCompose([FindStudyd("image"), *steps, AddAvailabilityd("image")])


def prediction_transforms(
    preprocessing: StudyCompose, output_scale: float = 1.0, mask_labels: Mapping[str, int] | None = None
) -> StudyCompose:
    """The postprocessing: a prediction on the network's grid becomes volumes on the grid on file.

    Probabilities are taken back by linear interpolation and turned into a label map there. For a study that was not
    resampled this equals taking back the labels; for others it gives a smooth boundary instead of the network's steps.

    Args:
        preprocessing: the transforms that made ``image``.
        output_scale: see ``FinishPredictiond``.
        mask_labels: see ``FinishPredictiond``.

    Returns:
        Transforms for an item with ``image``, ``has_contrast``, ``brain_on_file`` and ``pred`` (7 x X x Y x Z), which
        ``pred`` leaves as ``FinishPredictiond`` gives it. They compute on the device of ``pred``.
    """
    return StudyCompose(
        [
            SelectOutputsd("pred"),
            Invertd("pred", preprocessing, orig_keys="image", nearest_interp=False),
            FinishPredictiond("pred", output_scale, mask_labels),
        ]
    )


class StudyWriter:
    """Write what was missing of a study, each study into a folder of its own.

    ``<output_dir>/<study>/`` gets ``<study>_<key>_synthetic.nii.gz`` (float32) for each missing contrast,
    ``<study>_seg.nii.gz`` (uint8) and ``<study>_synthesis.json``, which says what was made from what. Shape, affine,
    qform, sform and units are those of the first available contrast on file; nothing else of its header is taken over.
    The folder appears complete or not at all. If there is one, its files of these names are replaced; others stay.

    Args:
        output_dir: folder for all studies; made if needed.

    Raises:
        StudyError: from the call, when the folder of the study holds its input, or the study's name is no folder name.
    """

    def __init__(self, output_dir: str | os.PathLike[str]) -> None:
        self.output_dir = Path(str(output_dir)).expanduser()

    def prepare(self) -> None:
        """Make the output folder, so that a wrong one shows before anything is computed.

        Raises:
            StudyError: when it cannot be made.
        """
        try:
            self.output_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StudyError(
                f"The folder {self.output_dir} cannot be made ({error.strerror}): choose another output_dir."
            ) from error

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[str, Path]:
        """Write one study.

        Args:
            data: item after ``prediction_transforms``: ``study``, the paths of its contrasts, ``has_contrast``,
                ``output_keys``, ``pred`` (one X x Y x Z volume for each), and what the evaluator adds for the record.

        Returns:
            Path of each written volume, by its key (one of ``OUTPUT_KEYS``).
        """
        study = str(data["study"])
        folder = self.output_dir / study
        available = [bool(kept) for kept in data["has_contrast"]]
        inputs = {key: str(data[key]) for key, kept in zip(CONTRAST_KEYS, available, strict=True) if kept}
        if study != Path(study).name or study.startswith("."):
            raise StudyError(f"The study name {study!r} cannot name a folder: give another name.")
        if any(Path(path).resolve().parent == folder.resolve() for path in inputs.values()):
            raise StudyError(f"{folder} holds the input of the study: choose another output_dir.")

        names = {key: f"{study}_{key}_synthetic.nii.gz" for key in CONTRAST_KEYS} | {
            MASK_KEY: f"{study}_{MASK_KEY}.nii.gz"
        }
        record_name = f"{study}_synthesis.json"
        made = data["output_keys"]
        self.prepare()
        # hidden, so that find_studies never sees it; in the same folder, so that renaming is one step
        new = self.output_dir / f".{study}.{uuid.uuid4().hex}.new"
        try:
            new.mkdir()
            geometry = _read_geometry(next(iter(inputs.values())))
            for key, volume in zip(made, data["pred"].as_tensor(), strict=True):
                _save_volume(volume, data["pred"].affine, geometry, new / names[key], is_mask=key == MASK_KEY)
            record = self._record(data, inputs, {key: names[key] for key in made})
            (new / record_name).write_text(json.dumps(record, indent=2) + "\n")
            _replace_folder(new, folder, {*names.values(), record_name})
        finally:
            shutil.rmtree(new, ignore_errors=True)
        return {key: folder / names[key] for key in made}

    def _record(
        self, data: Mapping[Hashable, Any], inputs: Mapping[str, str], outputs: Mapping[str, str]
    ) -> dict[str, Any]:
        """What was made from what, for the JSON file beside the volumes."""
        metadata = json.loads((_BUNDLE_ROOT / "configs" / "metadata.json").read_text())
        named = dict(zip(CONTRAST_KEYS, CONTRASTS, strict=True))
        return {
            "notice": _NOTICE,
            "study": data["study"],
            "available": [named[key] for key in inputs],
            "synthesized": [named[key] for key in outputs if key in named],
            "inputs": {key: Path(path).name for key, path in inputs.items()},
            "inputs_synthesized_by_others": [key for key in data.get("synthesized", ()) if key in inputs],
            "outputs": dict(outputs),
            "intensity_scale": {
                key: float(value)
                for key, value in zip(CONTRAST_KEYS, data.get("intensity_scale", ()), strict=False)
                if key in inputs
            },
            "patient_in_bank": data.get("patient_in_bank"),
            "weights_sha256": data.get("weights_sha256"),
            "bundle": metadata["name"],
            "bundle_version": metadata["version"],
        }


class StudyDataset(Dataset):
    """``monai.data.Dataset`` of studies that gives a failed study as data, so that the others still come.

    An item that cannot be preprocessed has its datalist entries and ``"failure"``, one sentence.

    Args:
        data: datalist items.
        transform: preprocessing of one item.
    """

    def __init__(self, data: Sequence[Mapping[str, Any]], transform: Callable[[Any], Any]) -> None:
        super().__init__(data, transform)

    def _transform(self, index: int) -> dict[Hashable, Any]:
        try:
            return super()._transform(index)
        except Exception as error:
            item = dict(self.data[index])
            return {**item, FAILURE_KEY: _reason(error, item["study"])}


class StudyEvaluator(Evaluator):
    """Fill in one study after the other; a study that fails is noted and never stops the others.

    Studies are written by threads in the background while the next ones are computed. After ``run``, which returns
    when all is written, ``written`` maps each finished study to the paths that the writer gave, and ``failures`` is a
    list of ``{"study": ..., "reason": ...}``, which is also written as ``failures.json`` into the writer's folder. Both
    are in the order of the data loader. Handlers find the prediction at ``IterationEvents.MODEL_COMPLETED`` and no
    longer after it.

    Args:
        device: of the network.
        val_data_loader: gives lists of one item, ``DataLoader(StudyDataset(...), 1, collate_fn=no_collation)``.
        network: one tensor to one tensor, as ``SSCFNet``, on ``device``.
        inferer: how the network is called.
        postprocessing: see ``prediction_transforms``.
        writer: called with each finished item.
        ckpt_path: ``state_dict`` to load when the run starts; ``None`` takes the network as it is.
        val_handlers: Ignite handlers.
        amp: run the network with autocast.
        amp_dtype: dtype of autocast.
        num_writers: number of threads that write. No more than this many finished studies are in memory beside the one
            that is being computed. 0 writes each study before the next is computed.

    Raises:
        ValueError: when ``num_writers`` is negative.
    """

    def __init__(
        self,
        device: torch.device | str,
        val_data_loader: Any,
        network: nn.Module,
        inferer: Inferer,
        postprocessing: Callable[[Any], Any],
        writer: StudyWriter,
        ckpt_path: str | os.PathLike[str] | None = None,
        val_handlers: Sequence | None = None,
        amp: bool = False,
        amp_dtype: torch.dtype = torch.bfloat16,
        num_writers: int = 1,
    ) -> None:
        if num_writers < 0:
            raise ValueError(f"num_writers must not be negative, got {num_writers}.")
        super().__init__(
            device=device,
            val_data_loader=val_data_loader,
            postprocessing=postprocessing,
            val_handlers=val_handlers,
            amp=amp,
            decollate=False,
        )
        self.network, self.inferer, self.writer = network, inferer, writer
        self.ckpt_path, self.amp_dtype, self.num_writers = ckpt_path, amp_dtype, num_writers
        self.weights_sha256: str | None = None
        self.failures: list[dict[str, str]] = []
        self.written: dict[str, dict[str, Path]] = {}
        self._threads: ThreadPoolExecutor | None = None
        self._pending: deque[tuple[str, Future[dict[str, Path]]]] = deque()

    def run(self, global_epoch: int = 1) -> None:
        """Fill in all studies.

        Args:
            global_epoch: see ``monai.engines.Evaluator``.

        Raises:
            StudyError: when the weights or the output folder cannot be used, or, after all others are done, when a
                study failed.
        """
        if self.ckpt_path is not None:
            self.weights_sha256 = load_weights(self.network, str(self.ckpt_path))
        self.writer.prepare()
        self.failures, self.written = [], {}
        self._threads = ThreadPoolExecutor(self.num_writers, "writer") if self.num_writers else None
        try:
            super().run(global_epoch)
            self._collect(0)
        finally:
            # after an interruption, what is being written is completed and what waits is dropped
            if self._threads is not None:
                self._threads.shutdown(cancel_futures=True)
            self._threads = None
            self._pending.clear()
        report = self.writer.output_dir / "failures.json"
        if not self.failures:
            report.unlink(missing_ok=True)
            return
        report.write_text(json.dumps(self.failures, indent=2) + "\n")
        total = len(self.failures) + len(self.written)
        names = [failure["study"] for failure in self.failures]
        shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        raise StudyError(f"{len(names)} of {total} studies failed: {shown}; {report} gives the reasons.")

    def _iteration(self, engine: StudyEvaluator, batchdata: list[dict]) -> list[dict]:  # type: ignore[override]
        item = batchdata[0]
        study = str(item["study"])
        done: Future[dict[str, Path]] = Future()
        # before the network runs, because from then on one study more is in memory
        self._collect(self.num_writers)
        engine.state.output = [{}]
        try:
            if FAILURE_KEY in item:
                raise StudyError(item[FAILURE_KEY])
            amp_dtype = self.amp_dtype if self.amp else None
            pred = predict(item["image"], self.network, self.inferer, engine.state.device, amp_dtype)
            record = provenance(self.network, item.get("patient", study), self.weights_sha256)
            engine.state.output = [{**record, "pred": pred}]
            del pred
            engine.fire_event(IterationEvents.FORWARD_COMPLETED)
            engine.fire_event(IterationEvents.MODEL_COMPLETED)
            # the network's input would only fill the memory
            finished = {k: v for k, v in {**item, **engine.state.output[0]}.items() if k not in _PREPROCESSED_KEYS}
            if self._threads is None:
                done.set_result(self.writer(finished))
            else:
                done = self._threads.submit(self.writer, finished)
        except Exception as error:
            done.set_exception(error)
        # the engine would hold them until the next study is there
        engine.state.batch, engine.state.output = [], [{}]
        self._pending.append((study, done))
        return engine.state.output

    def _collect(self, remaining: int) -> None:
        """Note how the oldest studies went, and wait for them, until only so many are unfinished."""
        while len(self._pending) > remaining or (self._pending and self._pending[0][1].done()):
            study, done = self._pending.popleft()
            error = done.exception()
            if error is None:
                self.written[study] = done.result()
                logger.info("Study %s: %s written.", study, ", ".join(self.written[study]))
            else:
                reason = _reason(error, study)
                logger.error("Study %s failed: %s", study, reason)
                self.failures.append({"study": study, "reason": reason})


def predict(
    image: torch.Tensor,
    network: nn.Module,
    inferer: Inferer,
    device: torch.device | str,
    amp_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Run the network over one study.

    Args:
        image: 8 x X x Y x Z, after ``inference_transforms``.
        network: on ``device``.
        inferer: how the network is called.
        device: where to compute.
        amp_dtype: dtype of autocast; ``None`` computes in float32.

    Returns:
        7 x X x Y x Z float32: contrasts in [-1, 1], probabilities.

    Raises:
        StudyError: when the prediction is not finite.
    """
    device = torch.device(device)
    autocast = torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype is not None)
    with eval_mode(network), torch.inference_mode(), autocast:
        pred = inferer(image[None].to(device, non_blocking=True), network)[0].float()
    # NaN passes through both extrema
    if not torch.isfinite(torch.stack(torch.as_tensor(pred).aminmax())).all():
        raise StudyError("The prediction holds NaN or infinite values: run without amp, or check the weights.")
    return pred


def provenance(network: nn.Module, patient: str, weights_sha256: str | None) -> dict[str, Any]:
    """What a written study must tell about its making.

    Args:
        network: a network; if it has a bank, the patient is looked up there.
        patient: name of the patient.
        weights_sha256: SHA-256 of the file of the weights.

    Returns:
        ``weights_sha256``, and ``patient_in_bank``: whether the network retrieves from the patient's own slices, which
        makes the result better than it can be for a new patient.
    """
    in_bank = False
    if hasattr(network, "bank_patient"):
        used = network.bank_patient[network.bank_present.any(dim=1)]
        in_bank = bool((used == stable_hash(patient)).any())
    if in_bank:
        logger.warning("Patient %s is in the memory bank of the network: its result is no test of it.", patient)
    return {"weights_sha256": weights_sha256, "patient_in_bank": in_bank}


def list_studies(
    dataset_dir: str | os.PathLike[str] | None = None,
    flair: str | os.PathLike[str] | None = None,
    t1: str | os.PathLike[str] | None = None,
    t1ce: str | os.PathLike[str] | None = None,
    t2: str | os.PathLike[str] | None = None,
    study: str | None = None,
    pattern: Mapping[str, str] | None = None,
    output_dir: str | os.PathLike[str] | None = None,
) -> list[dict[str, Any]]:
    """Datalist for inference: one study from loose files, or all studies below a folder. Masks are left out.

    Args:
        dataset_dir: folder of studies, see ``find_studies``; ignored where a file is given.
        flair: path of the FLAIR volume; likewise ``t1``, ``t1ce`` and ``t2``.
        t1: see ``flair``.
        t1ce: see ``flair``.
        t2: see ``flair``.
        study: name of the single study.
        pattern: see ``find_studies``.
        output_dir: where results go; must not lie in ``dataset_dir``.

    Returns:
        Datalist items.

    Raises:
        StudyError: when there is no study, or ``output_dir`` lies in ``dataset_dir``.
    """
    files = {key: path for key, path in zip(CONTRAST_KEYS, (flair, t1, t1ce, t2), strict=True) if path}
    if files:
        return single_study(**files, name=None if study is None else str(study))
    if not dataset_dir:
        raise StudyError(
            f"No input is given: set dataset_dir, or the files of one study as {', '.join(CONTRAST_KEYS)}."
        )
    root = Path(str(dataset_dir)).expanduser()
    if output_dir is not None and Path(str(output_dir)).expanduser().resolve().is_relative_to(root.resolve()):
        raise StudyError(
            f"output_dir {output_dir} lies in dataset_dir {root}, where the next run would take synthetic volumes for "
            "input: choose another output_dir."
        )
    # a mask on file is not needed, and a damaged one must not stop a study
    return [{k: v for k, v in item.items() if k != MASK_KEY} for item in find_studies(root, pattern)]


def synthesize_study(
    flair: str | os.PathLike[str] | None = None,
    t1: str | os.PathLike[str] | None = None,
    t1ce: str | os.PathLike[str] | None = None,
    t2: str | os.PathLike[str] | None = None,
    output_dir: str | os.PathLike[str] = "eval",
    study: str | None = None,
    ckpt_path: str | os.PathLike[str] | None = None,
    device: torch.device | str | None = None,
    amp: bool | None = None,
    sw_batch_size: int = 8,
    output_scale: float = 1.0,
    mask_labels: Mapping[str, int] | None = None,
    preprocessing: StudyCompose | None = None,
    network: nn.Module | None = None,
) -> dict[str, Path]:
    """Fill in one study.

    Example::

        paths = synthesize_study(flair="a_flair.nii.gz", t2="a_t2.nii.gz", output_dir="filled")
        paths["t1ce"]  # filled/a/a_t1ce_synthetic.nii.gz

    Args:
        flair: path of the FLAIR volume, ``None`` if it is missing; likewise ``t1``, ``t1ce`` and ``t2``.
        t1: see ``flair``.
        t1ce: see ``flair``.
        t2: see ``flair``.
        output_dir: the study gets a folder in here, see ``StudyWriter``.
        study: name of the study; by default what the file names have in common.
        ckpt_path: weights; by default ``models/model.pt`` of this bundle.
        device: where to compute; by default a GPU if there is one.
        amp: compute with autocast; by default on a GPU only.
        sw_batch_size: number of slices in one call of the network.
        output_scale: see ``FinishPredictiond``.
        mask_labels: see ``FinishPredictiond``.
        preprocessing: by default ``inference_transforms`` with the settings in the weights.
        network: by default the one that the weights are of; if one is given and ``ckpt_path`` is ``None``, it keeps its
            weights, and ``preprocessing`` has to be given too.

    Returns:
        Path of each written volume, by its key: the missing ones of ``flair``, ``t1``, ``t1ce`` and ``t2``, and
        ``seg``.

    Raises:
        StudyError: when the study or the weights cannot be used.
    """
    item = list_studies(None, flair, t1, t1ce, t2, study)[0]
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    amp = device.type == "cuda" if amp is None else amp
    sha256 = None
    if network is None and ckpt_path is None:
        ckpt_path = _BUNDLE_ROOT / "models" / "model.pt"
    if network is None:
        network = network_from_weights(ckpt_path)
    if ckpt_path is not None:
        sha256 = load_weights(network, ckpt_path)
    if preprocessing is None:
        preprocessing = inference_transforms(**read_settings(ckpt_path))
    data = preprocessing(item)
    data.update(provenance(network, item["patient"], sha256))
    inferer = BrainSliceInferer(sw_batch_size=sw_batch_size)
    data["pred"] = predict(data["image"], network.to(device), inferer, device, torch.bfloat16 if amp else None)
    return StudyWriter(output_dir)(prediction_transforms(preprocessing, output_scale, mask_labels)(data))


def _pad_slices(images: torch.Tensor, padding: Sequence[int]) -> torch.Tensor:
    """Pad N x 8 x X x Y: contrasts with background, planes of availability with 0."""
    if not any(padding):
        return images
    # SlidingWindowInferer would pad contrasts and planes alike
    contrasts, planes = images[:, :NUM_CONTRASTS], images[:, NUM_CONTRASTS:]
    return torch.cat([F.pad(contrasts, padding, value=-1.0), F.pad(planes, padding)], dim=1)


def _reason(error: BaseException, study: Hashable) -> str:
    """One sentence for a failure; the traceback of one that nobody foresaw goes to the log."""
    known = find_study_error(error)
    if known is not None:
        return str(known)
    logger.error("Study %s raised an unexpected error.", study, exc_info=error)
    while error.__cause__ is not None:
        error = error.__cause__
    line = (str(error).strip().splitlines() or ["no message"])[0].rstrip(".")
    return f"Unexpected {type(error).__name__}: {line}; the log has the traceback."


def _read_geometry(path: str) -> nib.Nifti1Header | None:
    """The fields of a NIfTI header that place the volume in space; ``None`` for other formats."""
    try:
        source = nib.load(path).header
    except (OSError, nib.filebasedimages.ImageFileError):
        # another reader of MONAI took it, for example of a DICOM folder
        return None
    if not isinstance(source, nib.Nifti1Header):
        return None
    header = nib.Nifti1Header()
    for field in _GEOMETRY_FIELDS:
        header[field] = source[field]
    return header


def _save_volume(
    volume: torch.Tensor, affine: torch.Tensor, geometry: nib.Nifti1Header | None, path: Path, is_mask: bool
) -> None:
    """Write one X x Y x Z volume as NIfTI."""
    array = volume.numpy().astype(np.uint8 if is_mask else np.float32, copy=False)
    if geometry is None:
        image = nib.Nifti1Image(array, affine.numpy())
        image.set_qform(image.affine, code="scanner")
        image.header.set_xyzt_units("mm")
    else:
        header = geometry.copy()
        header.set_data_dtype(array.dtype)
        header.set_data_shape(array.shape)
        image = nib.Nifti1Image(array, header.get_best_affine(), header)
    image.header["descrip"] = b"SSCF predicted mask" if is_mask else b"SSCF synthetic, not for clinical use"
    nib.save(image, path)


def _replace_folder(new: Path, folder: Path, ours: set[str]) -> None:
    """Put ``new`` in the place of ``folder``, whose files other than ``ours`` move over."""
    if not folder.exists():
        new.rename(folder)
        return
    old = new.with_suffix(".old")
    folder.rename(old)
    try:
        new.rename(folder)
    except BaseException:
        old.rename(folder)
        raise
    for path in old.iterdir():
        if path.name not in ours:
            path.rename(folder / path.name)
    shutil.rmtree(old)
