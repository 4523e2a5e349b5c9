# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Weights on disk: a plain state_dict and, beside it, the settings that it was trained with."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.handlers import DiskSaver
from torch import nn

from ..contrasts import StudyError

#: Arguments of the network that its weights depend on.
NETWORK_SETTINGS = (
    *("spatial_dims", "channels", "bank_size", "key_size", "prototype", "aggregation"),
    *("segmentation", "synthesis", "prediction"),
)
#: Arguments of the preprocessing that the weights were trained with.
PREPROCESSING_SETTINGS = ("image_size", "spacing", "scaling")
#: Settings of weights without a settings file: the defaults of training.
DEFAULT_SETTINGS = {
    "spatial_dims": 2,
    "channels": "base",
    "bank_size": 300,
    "key_size": 3,
    "prototype": "sum",
    "aggregation": "attention",
    "segmentation": "citim",
    "synthesis": True,
    "prediction": "ccp",
    "image_size": 192,
    "spacing": 1.0,
    "scaling": "brain",
}

logger = logging.getLogger(__name__)

#: Names of what ``atomic_saver`` and ``save_weights`` are writing.
_TEMPORARY = re.compile(r"tmp[a-z0-9_]{8}|.+\.pt\.tmp")


def atomic_saver(directory: Path) -> DiskSaver:
    """Writes into a folder, each file to a temporary name first and then renamed; on the first process only."""
    return DiskSaver(directory, atomic=True, create_dir=True, require_empty=False)


def remove_leftovers(directory: Path) -> None:
    """Removes what a killed process was writing through ``atomic_saver`` in a folder; on the first process only."""
    if idist.get_rank() == 0 and directory.is_dir():
        for path in directory.iterdir():
            if _TEMPORARY.fullmatch(path.name):
                path.unlink(missing_ok=True)


def save_weights(path: str | Path, network: nn.Module, settings: Mapping[str, Any] | None = None) -> None:
    """Writes the state_dict of a network and ``<path>.json`` with its settings, each complete or not at all.

    Args:
        path: of the state_dict, for example ``models/model.pt``.
        network: its tensors are written, nothing else.
        settings: what inference must know, keys of ``DEFAULT_SETTINGS``, and ``network``, the class, where it is not
            ``SSCFNet``; None writes no file.
    """
    path = Path(path)
    saver = atomic_saver(path.parent)
    if settings is not None and idist.get_rank() == 0:
        temporary = settings_path(path).with_suffix(".tmp")
        temporary.write_text(json.dumps(dict(settings), indent=1) + "\n")
        temporary.replace(settings_path(path))
    saver(network.state_dict(), path.name)


def settings_path(path: str | Path) -> Path:
    """File of the settings that belong to a file of weights: ``model.pt`` has ``model.pt.json``."""
    path = Path(path)
    return path.with_name(path.name + ".json")


def read_settings(path: str | Path | None) -> dict[str, Any]:
    """Settings of a file of weights.

    Args:
        path: of the state_dict; None has no settings file.

    Returns:
        ``DEFAULT_SETTINGS``, replaced by what the settings file says, if there is one.
    """
    file = None if path is None else settings_path(Path(str(path)).expanduser())
    return DEFAULT_SETTINGS | (json.loads(file.read_text()) if file is not None and file.is_file() else {})


def load_weights(network: nn.Module, path: str | Path) -> str:
    """Loads a ``state_dict`` (weights and frozen bank) from a file.

    Args:
        network: takes all of it.
        path: file with a plain ``state_dict``, such as ``models/model.pt``.

    Returns:
        SHA-256 of the file.

    Raises:
        StudyError: when there is no such file, or it cannot be read or does not fit the network.
    """
    path = Path(str(path)).expanduser()
    if not path.is_file():
        raise StudyError(f"There are no weights at {path}: train first, or give the file of the weights as ckpt_path.")
    # read once, so that the hash is of what is loaded
    content = path.read_bytes()
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever the unpickler and the zip reader do
        raise StudyError(f"{path} cannot be read as weights: it is damaged, so copy it again or train anew.") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise StudyError(f"{path} holds no plain state_dict: give the model.pt that training writes.")
    expected, kind = network.state_dict(), type(network).__name__
    trained = read_settings(path).get("network", kind)
    if trained.split(".")[-1] != kind:
        raise StudyError(
            f"{path} holds weights of {trained}, not of {kind}: give the config files of that network, see "
            "docs/baselines.md."
        )
    for name in (*expected, *state):
        ours, theirs = (tuple(s[name].shape) if name in s else None for s in (expected, state))
        if ours != theirs:
            raise StudyError(
                f"{path} does not fit the network ({name} has shape {theirs}, not {ours}): set channels, bank_size, "
                "key_size, prototype, aggregation, segmentation, synthesis and prediction as in the training."
            )
    network.load_state_dict(state)
    if hasattr(network, "bank_present") and not network.bank_present.any():
        logger.warning("The memory bank in %s is empty: the network retrieves nothing.", path)
    return hashlib.sha256(content).hexdigest()


def with_weights(network: nn.Module, path: str | Path) -> nn.Module:
    """The network after ``load_weights``, for configs.

    Raises:
        SystemExit: with one sentence, where ``load_weights`` refuses.
    """
    try:
        load_weights(network, path)
    except StudyError as error:
        raise SystemExit(str(error)) from error
    return network
