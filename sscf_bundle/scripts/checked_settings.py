# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Settings held against the configs that they change: MONAI takes any id and any value."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from monai.bundle import ConfigParser, ReferenceResolver
from monai.utils import ensure_tuple

from .contrasts import StudyError

logger = logging.getLogger(__name__)

#: Texts that mean a truth value: Python knows ``True`` and ``False`` alone, and every other text counts as true.
TRUTH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
#: What is called for the type of a default: cheap, and writes nothing.
_CALLED = {"scripts.networks.precision.half_pays", "scripts.networks.weights.read_settings"}
#: What a setting of each type may be, and its words.
_ACCEPTED: dict[type, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "True or False"),
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    list: ((list, tuple, dict), 'a list, for example "[1,2]"'),
    dict: ((dict,), "a mapping, for example \"{'a': 1}\""),
}


def checked_settings(
    files: str | Sequence[str], given: Mapping[str, Any], foreign: Collection[str] = ()
) -> dict[str, Any]:
    """Holds settings against the configs that they change.

    A setting must be of the type that the configs give it, by a value or an expression; where an overlay gives another
    type than what lies below it, of either. What counts something must not be negative. An expression is taken as it
    is, as ``$None``, which gives none of a number, and so is what takes the place of an object. What is a text or
    nothing may become anything but a truth value, and is held against what it can be where it is used.

    Args:
        files: of the configs.
        given: values by id.
        foreign: ids that no config has and that are no mistake.

    Returns:
        Those that were given as a text for a truth value, with the truth value.

    Raises:
        StudyError: for an id that nobody knows, or a value of another type than the config has.
    """
    parser = ConfigParser()
    parser.read_config(files)
    changed: dict[str, Any] = {}
    for given_name, value in given.items():
        name = given_name.lstrip("+").replace("#", "::")
        if name not in parser:
            if name not in foreign and not ("::" in name and name.rpartition("::")[0] in parser):
                near = difflib.get_close_matches(name, [*parser.get(), *foreign], n=1, cutoff=0)
                raise StudyError(f"There is no setting {given_name}: did you mean {near[0]}?")
            continue
        if _is_made(value):
            continue
        default: Any = parser[name]
        if _is_made(default):
            reached = (parser[one] for one in _reached(parser, [name]))
            if {one["_target_"] for one in reached if isinstance(one, dict) and "_target_" in one} - _CALLED:
                continue  # building it may take long, or write something
            try:
                default = _made(files, name, given)
            except Exception:  # such as of weights that are not there, which the run names
                logger.warning("%s is taken without a check: what the configs give fails.", given_name)
                continue
        wanted = type(default)
        # resample is one or the other; deep inside there are arguments of others
        if isinstance(value, bool) and (wanted is str or default is None) and "::" not in name and name != "resample":
            # --name with nothing behind it is True to the command line
            raise StudyError(f"{given_name} needs a value, got {value}.")
        if wanted is bool and isinstance(value, str) and value.lower() in TRUTH:
            changed[name] = value = TRUTH[value.lower()]
        if wanted in _ACCEPTED:
            accepted, words = _ACCEPTED[wanted]
            fits = isinstance(value, accepted + _kinds(files, name))
            if not fits or (wanted is not bool and isinstance(value, bool)):
                raise StudyError(f"{given_name} must be {words}, got {value!r}.")
        if wanted in (int, float) and default >= 0 and isinstance(value, int | float):
            least = 1 if name.endswith(("_size", "_epochs")) else 0
            if value < least:
                raise StudyError(f"{given_name} must be at least {least}, got {value!r}.")
        if wanted is torch.device:
            try:
                device = torch.device(value)
            except (RuntimeError, TypeError) as error:
                raise StudyError(f"{given_name} must be cpu, cuda or cuda:<number>, got {value!r}.") from error
            if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
                raise StudyError(f"There is no device {value} here: {torch.cuda.device_count()} GPUs can be used.")
    return changed


def unused_settings(parser: ConfigParser, entries: Iterable[str], given: Iterable[str]) -> list[str]:
    """Settings that change nothing, since nothing that a run does refers to them.

    Args:
        parser: of the configs, with their macros resolved.
        entries: ids of what is run.
        given: ids that were given, of which those are returned.
    """
    reached = _reached(parser, entries)
    # a part of what is reached is used, and so is what only a part of is reached
    return [
        name
        for name in given
        if not any(f"{one}::".startswith(f"{name}::") or name.startswith(f"{one}::") for one in reached)
    ]


def _reached(parser: ConfigParser, entries: Iterable[str]) -> set[str]:
    """Ids that some ids refer to, themselves and what those refer to included."""
    reached: set[str] = set()
    remaining = list(entries)
    while remaining:
        name = remaining.pop()
        if name not in reached and name in parser:
            reached.add(name)
            remaining.extend(ReferenceResolver.find_refs_in_config(parser[name], name))
    return reached


def _is_made(value: Any) -> bool:
    """Whether a value of a config is an expression, a reference or an object to build."""
    if isinstance(value, str):
        return value.startswith(("$", "@", "%"))
    return isinstance(value, dict) and "_target_" in value


def _kinds(files: str | Sequence[str], name: str) -> tuple[type, ...]:
    """Types of the plain values that single configs give a setting."""
    parsers = [ConfigParser(ConfigParser.load_config_file(file)) for file in ensure_tuple(files)]
    values = [parser[name] for parser in parsers if name in parser]
    return tuple(type(value) for value in values if not _is_made(value))


def _made(files: str | Sequence[str], name: str, given: Mapping[str, Any]) -> Any:
    """What the configs make a setting of by themselves or, where that fails, with the other settings as given."""
    parser = ConfigParser()
    parser.read_config(files)
    content = parser[name]
    try:
        return parser.get_parsed_content(name)
    except Exception:
        parser.update({other: value for other, value in given.items() if other in parser})
        parser[name] = content
        return parser.get_parsed_content(name)


def refuse_unknown(name: str, given: Sequence[Any], known: Sequence[Any]) -> None:
    """Refuses choices that do not exist, for configs.

    Args:
        name: of the setting.
        given: what was chosen, ``[value]`` of a setting that is no list.
        known: what there is.

    Raises:
        StudyError: if something was chosen that does not exist.
    """
    unknown = [one for one in given if one not in known]
    if unknown:
        raise StudyError(f"{name} has no {unknown[0]}: choose from {', '.join(map(str, known))}.")
