# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Weights on disk: a plain state_dict that holds the settings which it was trained with."""

from __future__ import annotations

import functools
import hashlib
import importlib
import io
import json
import logging
import textwrap
import uuid
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from torch import nn

from ..contrasts import StudyError
from .settings import SETTINGS_KEY, ConfiguredNetwork, decode_settings, differences, encode_settings

#: What ``settings["preprocessing"]`` holds: arguments of ``study_transforms``.
PREPROCESSING_SETTINGS = ("image_size", "spacing", "scaling")
#: Networks that weights may name and the modules that hold them, imported when asked for: nothing else of what a file
#: says is imported.
NETWORKS = {"SSCFNet": "..networks.sscf", "PlainUNet": "..networks.plain_unet", "MMGANGenerator": "..networks.mmgan"}

#: What settings hold that was measured with the network and its bank, and the run that measures it anew.
MEASURED = {"correction": "correcting", "trust": "calibrating"}

#: Tensors of fewer values are never kept in half precision.
_SMALL = 1024

_BUNDLE_ROOT = Path(__file__).resolve().parents[2]

logger = logging.getLogger(__name__)


def write_tensors(path: Path, content: Mapping[str, Any], compressed: bool = False) -> None:
    """Writes what ``torch.load`` reads, complete or not at all; on the first process only.

    Args:
        path: of the file; its folder is made if needed.
        content: tensors and plain values.
        compressed: deflate the records, which torch reads as it does others.
    """
    if idist.get_rank() != 0:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # a name of its own: others may be writing to the same folder
    new = path.with_name(f".{path.name}.{uuid.uuid4().hex}.new")
    try:
        with new.open("wb") as file:
            if compressed:
                stream = io.BytesIO()
                torch.save(content, stream)
                options: dict[str, Any] = {"compression": zipfile.ZIP_DEFLATED, "compresslevel": 9}
                with zipfile.ZipFile(stream) as plain, zipfile.ZipFile(file, "w", **options) as deflated:
                    for record in plain.infolist():
                        deflated.writestr(record.filename, plain.read(record))
            else:
                torch.save(content, file)
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def remove_leftovers(path: Path) -> None:
    """Removes what a killed process left of ``write_tensors`` to a path, whose name may be a pattern."""
    if idist.get_rank() == 0:
        for left in path.parent.glob(f".{path.name}.*.new"):
            left.unlink(missing_ok=True)


def save_weights(
    path: str | Path, network: nn.Module, settings: Mapping[str, Any] | None = None, half: bool = False
) -> None:
    """Writes the state_dict of a network with its settings inside, complete or not at all.

    Args:
        path: of the state_dict, for example ``models/model.pt``.
        network: its tensors are written. A ``ConfiguredNetwork`` adds its class and arguments to the settings, and
            keeps the settings itself from then on, so that its exports have them too.
        settings: ``preprocessing``, the arguments of ``study_transforms`` named in ``PREPROCESSING_SETTINGS``; another
            network than a ``ConfiguredNetwork`` adds whatever is needed to build it.
        half: keep large tensors as float16 and the file compressed, for weights that are handed on; they are float32
            again when loaded.

    Raises:
        StudyError: for more settings than the buffer of a ``ConfiguredNetwork`` holds, and for values that ``half``
            cannot hold.
    """
    path = Path(path)
    settings = dict(settings or {})
    if isinstance(network, ConfiguredNetwork):
        settings = network.read_settings() | settings
        encoded, buffer = encode_settings(settings), network.get_buffer(SETTINGS_KEY)
        if encoded.shape != buffer.shape:
            longest = max(settings, key=lambda name: len(json.dumps(settings[name])))
            raise StudyError(
                f"The settings for {path} take {len(encoded)} bytes, more than the {len(buffer)} that weights hold: "
                f"leave something out, {longest} is the longest."
            )
        buffer.copy_(encoded)
    state = network.state_dict()
    if half:
        state = _halved(state, path)
    write_tensors(path, {**state, SETTINGS_KEY: encode_settings(settings)}, compressed=half)


def _halved(state: Mapping[str, torch.Tensor], path: Path) -> dict[str, torch.Tensor]:
    """Large tensors of a state_dict as float16; the squares of the keys stay float32, those of the rounded keys."""
    halved = {
        name: value.half() if value.is_floating_point() and value.numel() > _SMALL else value
        for name, value in state.items()
    }
    if "bank_key" in state:
        halved["bank_key_square"] = halved["bank_key"].float().square().sum(dim=-1)
    large = [name for name, value in halved.items() if not value.isfinite().all()]
    if large:
        raise StudyError(f"{large[0]} is too large for half precision, so {path} is not written: use --half False.")
    return halved


def find_weights(path: str | Path) -> Path:
    """The file that a path names; a relative path that leads nowhere is looked up in the folder of the bundle.

    Raises:
        StudyError: when there is no such file.
    """
    given = Path(str(path)).expanduser()
    for file in (given, _BUNDLE_ROOT / given):
        if file.is_file():
            return file
    raise StudyError(f"There are no weights at {given}: train first, or correct the path.")


def is_intact(file: str | Path | io.BytesIO) -> bool:
    """Whether a file of ``torch.save`` holds what was written: torch reads changed bytes without a word."""
    return not zipfile.is_zipfile(file) or zipfile.ZipFile(file).testzip() is None


def read_state(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any], str]:
    """Tensors and settings of a file of weights: a state_dict, or a TorchScript module.

    Args:
        path: see ``find_weights``.

    Returns:
        The state_dict without settings; ``network``, ``arguments``, ``preprocessing`` and whatever else was saved with
        it; SHA-256 of the file.

    Raises:
        StudyError: when the file is missing or damaged, is no state_dict or has no settings.
    """
    path = find_weights(path)
    # read once, so that the hash is of what is loaded
    content = path.read_bytes()
    if content.startswith(b"version https://git-lfs"):
        raise StudyError(f"{path} only points to the weights in Git LFS: fetch them with git lfs pull.")
    intact = True
    try:
        intact = is_intact(io.BytesIO(content))
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever the unpickler and the zip reader do
        try:
            state = dict(torch.jit.load(io.BytesIO(content), map_location="cpu").state_dict())
        except Exception:  # and so does torch.jit.load
            raise StudyError(
                f"{path} cannot be read as weights: it is damaged, so copy it again or train anew."
            ) from error
    if not intact:
        raise StudyError(f"{path} is damaged (its checksums do not fit): copy it again or train anew.")
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise StudyError(f"{path} holds no plain state_dict: give the model.pt that training writes.")
    if not all(value.isfinite().all() for value in state.values()):
        raise StudyError(f"{path} holds NaN or infinite values: copy it again or train anew.")
    state = dict(state)
    if SETTINGS_KEY in state:
        settings = decode_settings(state.pop(SETTINGS_KEY))
    else:
        raise StudyError(
            f"{path} holds no settings, so nobody can tell which network and preprocessing it belongs to: train anew."
        )
    sha256 = hashlib.sha256(content).hexdigest()
    _compare_with_metadata(path.resolve(), sha256)
    return state, settings, sha256


@functools.cache
def _compare_with_metadata(path: Path, sha256: str) -> None:
    """Says, once, if the weights in the bundle are not those that its metadata names: whoever trains replaces them."""
    metadata = json.loads((_BUNDLE_ROOT / "configs" / "metadata.json").read_text())
    if path == _BUNDLE_ROOT / "models" / "model.pt" and sha256 != metadata.get("weights_sha256", sha256):
        logger.warning("%s is not what came with version %s: trained here, or changed.", path, metadata["version"])


def read_settings(path: str | Path) -> dict[str, Any]:
    """Preprocessing of a file of weights, for configs.

    Returns:
        ``image_size``, ``spacing`` and ``scaling``.

    Raises:
        StudyError: as ``read_state``, or if the weights do not tell how their input was preprocessed.
    """
    settings = read_state(path)[1].get("preprocessing", {})
    if set(PREPROCESSING_SETTINGS) - set(settings):
        raise StudyError(
            f"{path} does not tell how its input was preprocessed: give the model.pt that training writes."
        )
    return settings


def network_from_weights(
    path: str | Path, bank_size: int | None = None, preprocessing: Mapping[str, Any] | None = None
) -> ConfiguredNetwork:
    """The network that a file of weights is of, with these weights.

    Args:
        path: see ``find_weights``.
        bank_size: of a new, empty bank in the place of that of the weights, without what was measured with theirs, see
            ``leave_out_measured``; None keeps theirs.
        preprocessing: see ``load_weights``; of no effect with a new bank.

    Raises:
        StudyError: as ``read_state``, or if the file names an unknown network or does not fit ``preprocessing``.
    """
    content = read_state(path)
    state, settings, _ = content
    name = settings.get("network")
    if name not in NETWORKS:
        raise StudyError(f"{path} holds weights of the unknown network {name}: known are {', '.join(NETWORKS)}.")
    module = importlib.import_module(NETWORKS[name], __package__)
    changes = {} if bank_size is None else {"bank_size": bank_size}
    try:
        network = getattr(module, name)(**settings.get("arguments", {}) | changes)
        if bank_size is not None:
            network.load_state_dict({name: state[name] for name, _ in network.named_parameters()}, strict=False)
    except (TypeError, ValueError, RuntimeError, KeyError) as error:
        if bank_size is not None:
            raise StudyError(f"{path} cannot have a bank of another size ({first_reason(error)}).") from error
        raise StudyError(f"{path} names settings that build no {name} ({error}): update the bundle.") from error
    if bank_size is None:
        _load(network, path, content, preprocessing)
    else:
        leave_out_measured(network, settings, path)
    return network.eval()


def network_to_train(path: str | Path, preprocessing: Mapping[str, Any] | None = None) -> ConfiguredNetwork:
    """``network_from_weights`` without what was measured with it, for more training.

    Arguments and errors are those of ``network_from_weights``.
    """
    network = network_from_weights(path, preprocessing=preprocessing)
    leave_out_measured(network, network.read_settings(), path)
    return network


def leave_out_measured(
    network: ConfiguredNetwork, settings: Mapping[str, Any], path: str | Path, measured: Mapping[str, str] = MEASURED
) -> None:
    """Drops what was measured from a network that is going to give other images, which the log says.

    Args:
        network: loses them from its settings.
        settings: of its weights.
        path: of its weights.
        measured: what depends on what changes, and the run that measures it anew.
    """
    lost = [name for name in measured if name in settings]
    if lost:
        kept = {name: value for name, value in network.read_settings().items() if name not in measured}
        network.get_buffer(SETTINGS_KEY).copy_(encode_settings(kept))
        logger.warning(
            "Left out, as measured with the network and bank of %s: %s; run %s with the new weights.",
            path,
            " and ".join(lost),
            " and ".join(measured[name] for name in lost),
        )


def first_reason(error: BaseException) -> str:
    """The first thing that the error of a ``load_state_dict`` names; torch's first line names the class alone."""
    reason = str(error).strip().split("\n")[:2][-1].strip(" \t.") or type(error).__name__
    return textwrap.shorten(reason, 300, placeholder=" ...")  # of missing keys there may be hundreds


def load_weights(network: nn.Module, path: str | Path, preprocessing: Mapping[str, Any] | None = None) -> str:
    """Loads a ``state_dict`` (weights and frozen bank) from a file.

    Args:
        network: takes all of it.
        path: see ``find_weights``.
        preprocessing: ``image_size``, ``spacing`` and ``scaling`` that the network is going to be used with; None
            compares nothing.

    Returns:
        SHA-256 of the file.

    Raises:
        StudyError: when there is no such file, or it cannot be read or fits neither network nor preprocessing.
    """
    return _load(network, path, read_state(path), preprocessing)


def _load(
    network: nn.Module,
    path: str | Path,
    content: tuple[dict[str, torch.Tensor], dict[str, Any], str],
    preprocessing: Mapping[str, Any] | None,
) -> str:
    """``load_weights`` of what ``read_state`` gave."""
    state, settings, sha256 = content
    reason = network.refusal(settings) if isinstance(network, ConfiguredNetwork) else None
    reason = reason or differences(preprocessing or {}, settings.get("preprocessing", {}))
    if not reason:
        try:
            network.load_state_dict(state)
        except RuntimeError as error:
            reason = first_reason(error)
    if reason:
        raise StudyError(f"{path} does not fit ({reason}): use the config files and settings of its training.")
    if isinstance(network, ConfiguredNetwork):
        own = network.read_settings()
        settings = own | settings | {"arguments": own["arguments"] | settings.get("arguments", {})}
        network.get_buffer(SETTINGS_KEY).copy_(encode_settings(settings))
    if not dict(network.named_buffers()).get("bank_present", torch.ones(1)).any():
        logger.warning("The memory bank in %s is empty: the network retrieves nothing.", path)
    return sha256


def with_shared_weights(network: nn.Module, path: str | Path | None) -> nn.Module:
    """The network with those tensors of a file that it has too; its bank and whatever is new stay as they are.

    Args:
        network: of the second phase of a training.
        path: state_dict of the first phase, which may lack parts of the network.

    Raises:
        StudyError: without a path, or if the file cannot be read or shares nothing with the network.
    """
    if path is None:
        raise StudyError("This phase goes on from the one before: give its model_last.pt as pretrained_path.")
    state = read_state(path)[0]
    ours = dict(network.named_parameters())
    shared = {name: value for name, value in state.items() if name in ours and value.shape == ours[name].shape}
    if not shared:
        raise StudyError(f"{path} has no tensor of this network: give the weights of its first phase.")
    network.load_state_dict(shared, strict=False)
    logger.info("%d of %d tensors are those of %s", len(shared), len(ours), path)
    return network


def with_companion(
    network: ConfiguredNetwork, path: str | Path | None, preprocessing: Mapping[str, Any] | None = None
) -> ConfiguredNetwork:
    """An ``SSCFNet`` with a trained plain U-Net as its companion, in the place of one that it has, for configs.

    A correction, which is of the images, is left out; the scores of trust do not look at a companion.

    Args:
        network: gives its tensors, bank and settings.
        path: of the weights of a ``PlainUNet``.
        preprocessing: see ``load_weights``; that of the network.

    Raises:
        StudyError: without a path, if its weights are of another network or another preprocessing, or if ``network``
            is no ``SSCFNet``.
    """
    if path is None:
        raise StudyError("No companion is given: give the weights of a plain U-Net as companion_path.")
    companion = network_from_weights(path, preprocessing=preprocessing)
    settings, theirs = network.read_settings(), companion.read_settings()
    if theirs["network"] != "PlainUNet":
        raise StudyError(f"{path} is no plain U-Net: train one with configs/baselines/unet.json.")
    if "companion" not in settings["arguments"]:
        raise StudyError(f"{settings['network']} takes no companion: give the weights of an SSCFNet as source_path.")
    settings["arguments"]["companion"] = theirs["arguments"]["channels"]
    joined = type(network)(**settings["arguments"])
    state = {**network.state_dict(), **companion.state_dict(prefix="companion.")}
    joined.load_state_dict(state | {SETTINGS_KEY: encode_settings(settings)})
    leave_out_measured(joined, settings, "the weights without a companion", {"correction": MEASURED["correction"]})
    return joined.train(network.training)


def with_weights(network: nn.Module, path: str | Path, preprocessing: Mapping[str, Any] | None = None) -> nn.Module:
    """The network after ``load_weights``, for configs."""
    load_weights(network, path, preprocessing)
    return network
