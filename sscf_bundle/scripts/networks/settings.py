# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Settings inside the state of a network: what builds it and what its input was preprocessed with.

They are a uint8 buffer with JSON text, so that a state_dict, a TorchScript module and a checkpoint all carry them.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import nn

from ..contrasts import CONTRAST_KEYS, NUM_CONTRASTS, SCENARIOS, StudyError, scenario_name
from .blocks import expand_dims_like

#: Name of the buffer.
SETTINGS_KEY = "settings"
#: Least length of the buffer. Equal lengths matter to platforms that copy only tensors of equal shape: with another
#: length, weights of another network would be left out in silence instead of being refused.
SETTINGS_LENGTH = 4096
#: Key of the settings that holds the correction of a site, see ``inference.calibration.fit_correction``.
CORRECTION_KEY = "correction"


def encode_settings(settings: Mapping[str, Any]) -> torch.Tensor:
    """Settings (what JSON can hold) as text in uint8, filled up with zeros to ``SETTINGS_LENGTH``."""
    text = json.dumps(settings, sort_keys=True, separators=(",", ":")).encode().ljust(SETTINGS_LENGTH, b"\0")
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def decode_settings(buffer: torch.Tensor) -> dict[str, Any]:
    """Settings from a tensor of ``encode_settings``; a ``StudyError`` if it holds none."""
    try:
        return dict(json.loads(bytes(buffer.cpu().tolist()).rstrip(b"\0")))
    except (ValueError, TypeError) as error:
        raise StudyError("The settings in the weights are damaged: copy the file again or train anew.") from error


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str | None:
    """Settings that both have with different values, each as ``name is A, not B`` (B is ours); None if all agree."""
    found = [
        f"{name} is {value!r}, not {ours[name]!r}"
        for name, value in theirs.items()
        if name in ours and json.dumps(ours[name]) != json.dumps(value)
    ]
    return "; ".join(found) or None


def for_network_range(slope: float, offset: float) -> tuple[float, float]:
    """Slope and offset for intensities in [-1, 1] from those for [0, 1]."""
    return slope, slope - 1 + 2 * offset


def correction_table(scenarios: Mapping[str, Mapping[str, Sequence[float]]]) -> torch.Tensor:
    """Slope and offset in [-1, 1] of every contrast under every availability, 16 x 4 x 2.

    Args:
        scenarios: of ``fit_correction``; what it does not name keeps slope 1 and offset 0.

    Returns:
        The number of a row is the availability over ``CONTRASTS`` in binary: FLAIR alone is 8.
    """
    table = torch.tensor([1.0, 0.0]).repeat(2**NUM_CONTRASTS, NUM_CONTRASTS, 1)
    for scenario in SCENARIOS:
        row = int("".join(map(str, scenario)), 2)
        for contrast, (slope, offset, *_) in scenarios.get(scenario_name(scenario), {}).items():
            table[row, CONTRAST_KEYS.index(contrast)] = torch.tensor(for_network_range(slope, offset))
    return table


def apply_table(pred: torch.Tensor, available: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """B x 7 x spatial predictions with corrected contrasts, still in [-1, 1]; for TorchScript and ONNX too.

    Args:
        pred: of a network.
        available: B x 4 boolean.
        table: of ``correction_table``.
    """
    k = available.shape[1]
    row = available[:, 0].long()
    for i in range(1, k):
        row = 2 * row + available[:, i].long()
    slope, offset = table.to(pred.device)[row].unbind(2)
    images = pred[:, :k] * expand_dims_like(slope, pred) + expand_dims_like(offset, pred)
    return torch.cat([images.clamp(-1.0, 1.0), pred[:, k:]], dim=1)


class ConfiguredNetwork(nn.Module):
    """A network whose state tells the class and the arguments that build it, and how its input is preprocessed.

    A subclass calls ``keep_arguments(locals())`` once in its ``__init__``. Loading a state of another class or of other
    arguments fails with one sentence; a state without settings is taken as it is.
    """

    #: Arguments that may differ between training and use.
    FREE_ARGUMENTS: tuple[str, ...] = ()

    def keep_arguments(self, arguments: Mapping[str, Any]) -> None:
        """Stores the arguments of ``__init__``.

        Args:
            arguments: as ``locals()`` gives them; ``self`` and what begins with ``_`` are left out.
        """
        kept = {name: value for name, value in arguments.items() if name != "self" and not name.startswith("_")}
        settings = {"network": type(self).__name__, "arguments": json.loads(json.dumps(kept))}
        self.register_buffer(SETTINGS_KEY, encode_settings(settings))
        #: Of ``exported`` alone: where Python runs the network, ``CorrectPredictiond`` does it, and can be left out.
        self.correction_table: torch.Tensor | None = None

    def read_settings(self) -> dict[str, Any]:
        """``network`` (name of the class), ``arguments`` and, if the weights have been saved, ``preprocessing``."""
        return decode_settings(self.get_buffer(SETTINGS_KEY))

    def exported(self) -> Self:
        """What an export holds: this network, or one of its tensors that applies the correction of the settings."""
        scenarios = self.read_settings().get(CORRECTION_KEY, {}).get("scenarios")
        if not scenarios:
            return self
        network = copy.copy(self)
        network.correction_table = correction_table(scenarios)
        return network

    def __prepare_scriptable__(self) -> Self:
        """What ``torch.jit.script`` compiles in the place of this network."""
        return self.exported()

    def corrected(self, pred: torch.Tensor, available: torch.Tensor) -> torch.Tensor:
        """The result of ``forward``: B x 7 x spatial of samples with B x 4 ``available``, see ``exported``."""
        if self.correction_table is not None:
            pred = apply_table(pred, available, self.correction_table)
        return pred

    def refusal(self, settings: Mapping[str, Any]) -> str | None:
        """Why weights with these settings are not weights of this network, in a few words; None if they are."""
        ours = self.read_settings()
        if settings.get("network", ours["network"]) != ours["network"]:
            return f"they are weights of {settings['network']}, not of {ours['network']}"
        theirs = {k: v for k, v in settings.get("arguments", {}).items() if k not in self.FREE_ARGUMENTS}
        return differences(ours["arguments"], theirs)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        own = self.get_buffer(SETTINGS_KEY)
        theirs = state_dict.setdefault(prefix + SETTINGS_KEY, own)
        reason = self.refusal(decode_settings(theirs)) if theirs is not own else None
        if reason:
            errors: list[str] = args[-1]
            errors.append(
                f"the weights do not fit this network: {reason}; build the network from the weights, as inference.json "
                "does (monai.bundle.load: workflow_type='inference')."
            )
        super()._load_from_state_dict(state_dict, prefix, *args)
