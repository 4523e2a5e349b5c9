# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""What ``monai.bundle`` leaves to a bundle: settings that are checked, and errors of one sentence.

MONAI takes any id and any value, and wraps every error in others. Each config calls ``start`` in its ``initialize``.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from monai.bundle import ConfigParser, ConfigWorkflow, create_workflow
from monai.bundle.utils import DEFAULT_EXP_MGMT_SETTINGS

from .contrasts import StudyError
from .data.transforms import find_study_error

_SCRIPTS = Path(__file__).resolve().parent
#: Least value of settings that count something.
_LEAST = {"num_workers": 0, "num_writers": 0, "prepare_workers": 0, "sw_batch_size": 1, "batch_size": 1}
#: Texts that mean a truth value: Python knows ``True`` and ``False`` alone, and every other text counts as true.
_TRUTH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def start(output_dir: str | Path, debug: bool = False) -> None:
    """Checks what was given to ``create_workflow``, which ``monai.bundle run`` calls, and prepares for errors.

    ``run`` of the workflow raises a ``StudyError`` as it is. On the command line, an error becomes one sentence and the
    exit status 1; the traceback of one that nobody foresaw goes to ``traceback.log``.

    Args:
        output_dir: folder of ``traceback.log``.
        debug: leave tracebacks as they are.

    Raises:
        StudyError: for an unknown id, or a value of another type than the config has.
    """
    main = getattr(sys.modules["__main__"], "__spec__", None)
    if not debug and main is not None and main.name == "monai.bundle.__main__":
        sys.excepthook = functools.partial(_print_error, Path(output_dir) / "traceback.log")
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not create_workflow.__code__:
        frame = frame.f_back
    if frame is None:  # the workflow was built by its class
        return
    workflow, files, given = (frame.f_locals[name] for name in ("workflow_", "config_file", "_args"))
    for name, value in checked_settings(files, given).items():
        workflow.parser[name] = value
    _track(workflow.parser)
    workflow.run = functools.partial(_run, workflow)


def _track(parser: ConfigParser) -> None:
    """Fits the handlers that ``--tracking mlflow`` adds to the engines of this bundle."""
    training, validation = (
        [
            one
            for one in parser.get(f"{part}#handlers") or ()
            if isinstance(one, dict) and one.get("_target_") == "MLFlowHandler"
        ]
        for part in ("train", "validate")
    )
    for handler in training:  # MONAI's settings expect the output of a SupervisedTrainer
        handler["output_transform"] = "$lambda output: {'iteration_' + k: float(v) for k, v in output.items()}"
    if training and "evaluation::handlers" in parser:  # which MONAI does not know
        changes = {"artifacts": "@report_dir", "close_on_complete": True}
        parser["evaluation::handlers"].extend(handler | changes for handler in validation)
    if training:
        parser.ref_resolver.reset()


def checked_settings(files: str | Sequence[str], given: Mapping[str, Any]) -> dict[str, Any]:
    """Holds settings against the configs that they change.

    Args:
        files: of the configs.
        given: values by id.

    Returns:
        Those that were given as a text for a truth value, with the truth value.

    Raises:
        StudyError: for an id that neither the configs nor MONAI knows, or a value of another type than the config has.
    """
    parser = ConfigParser()
    parser.read_config(files)
    foreign = {*inspect.signature(ConfigWorkflow.__init__).parameters}
    tracking: Any = DEFAULT_EXP_MGMT_SETTINGS
    foreign |= {name for settings in tracking.values() for name in settings["configs"]}
    changed: dict[str, Any] = {}
    for given_name, value in given.items():
        name = given_name.lstrip("+").replace("#", "::")
        if name not in parser:
            if name not in foreign and not ("::" in name and name.rpartition("::")[0] in parser):
                near = difflib.get_close_matches(name, [*parser.get(), *foreign], n=1, cutoff=0)
                raise StudyError(f"There is no setting {given_name}: did you mean {near[0]}?")
            continue
        default: Any = parser[name]
        is_text = isinstance(value, str)
        by_expression = (isinstance(default, str) and default[:1] in "$@") or (
            isinstance(default, Mapping) and "_target_" in default
        )
        if is_text and value.lower() in _TRUTH and (isinstance(default, bool) or by_expression):
            changed[name] = value = _TRUTH[value.lower()]
        elif value is None or (is_text and value[:1] in ("$", "@", "%")):
            continue
        kind: type
        accepted: tuple[type, ...]
        for kind, accepted, words in (
            (bool, (bool,), "True or False"),
            (int, (int,), "a whole number"),
            (float, (int, float), "a number"),
            (list, (list, tuple, dict), 'a list, for example "[1,2]"'),
        ):
            if isinstance(default, kind):
                if not isinstance(value, accepted) or (kind is not bool and isinstance(value, bool)):
                    raise StudyError(f"{given_name} must be {words}, got {value!r}.")
                break
        if name in _LEAST and not isinstance(value, str) and not value >= _LEAST[name]:
            raise StudyError(f"{given_name} must be at least {_LEAST[name]}, got {value!r}.")
        if name == "device":
            try:
                device = torch.device(value)
            except (RuntimeError, TypeError) as error:
                raise StudyError(f"device must be cpu, cuda or cuda:<number>, got {value!r}.") from error
            if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
                raise StudyError(f"There is no device {value} here: {torch.cuda.device_count()} GPUs can be used.")
    return changed


def refuse_unknown(name: str, given: Sequence[str], known: Sequence[str]) -> None:
    """Refuses a choice that does not exist, for configs.

    Args:
        name: of the setting.
        given: what was chosen.
        known: what there is.

    Raises:
        StudyError: if something was chosen that does not exist.
    """
    unknown = [one for one in ([given] if isinstance(given, str) else given) if one not in known]
    if unknown:
        raise StudyError(f"{name} has no {unknown[0]}: choose from {', '.join(known)}.")


def _run(workflow: ConfigWorkflow) -> Any:
    """Runs a workflow, without the exceptions that MONAI wraps around a ``StudyError``.

    The config of a training, with all that was given, goes to ``config.json`` beside the checkpoints.
    """
    parser = workflow.parser
    try:
        if "trainer.run()" in str(parser.get(workflow.run_id)) and idist.get_rank() == 0:
            path = Path(parser.get_parsed_content("checkpoint#directory")) / "config.json"
            trainer = parser.get_parsed_content("train#trainer")
            # not before a checkpoint is there: a training that is refused changes nothing
            trainer.add_event_handler(Events.EPOCH_COMPLETED, _write_config, parser, path)
        return type(workflow).run(workflow)
    except Exception as error:
        known = find_study_error(error)
        if known is None:
            raise
        raise known from known.__cause__


def _write_config(engine: Engine, parser: ConfigParser, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    parser.export_config_file(parser.get(), path, indent=4, default=str)


def _print_error(path: Path, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """The ``sys.excepthook`` of the command line: one sentence on stderr."""
    if not isinstance(error, Exception):
        sys.__excepthook__(kind, error, trace)
        return
    root: BaseException = error
    while root.__cause__ is not None and not isinstance(root, StudyError):
        root = root.__cause__
    sentence = (str(root).strip().splitlines() or ["no message"])[-1]
    calls = traceback.extract_tb(root.__traceback__)
    # a ValueError of our own is a refusal too, and says what is wrong
    refused = isinstance(root, ValueError) and calls and _SCRIPTS in Path(calls[-1].filename).resolve().parents
    if not isinstance(root, StudyError) and not refused:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.writelines(traceback.format_exception(kind, error, trace))
        sentence = f"Unexpected {type(root).__name__}: {sentence.rstrip('.')}; {path} has the traceback."
    print(sentence, file=sys.stderr)
