# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The sub-packages of ``scripts`` import one way only, and none imports the tests or the benchmarks."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import BUNDLE_ROOT

SCRIPTS = BUNDLE_ROOT / "scripts"
#: What each room may import besides itself; ``contrasts`` and the settings' check are the ground.
ALLOWED = {
    "contrasts": set(),
    "checked_settings": {"contrasts"},
    "command_line": {"contrasts", "checked_settings"},
    "ssim": set(),
    "networks": {"contrasts"},
    "data": {"contrasts"},
    "training": {"contrasts", "ssim", "networks", "data"},
    "inference": {"contrasts", "checked_settings", "networks", "data"},
    "evaluation": {"contrasts", "checked_settings", "ssim", "networks", "data", "inference"},
    "research": {"contrasts", "checked_settings", "networks", "data", "training", "inference", "evaluation"},
    "demo": {"contrasts", "data", "evaluation", "inference"},
}
FILES = sorted(path for path in SCRIPTS.rglob("*.py") if path != SCRIPTS / "__init__.py")


def room(path: Path) -> str:
    """Name of the sub-package, or of the module at the top."""
    return path.relative_to(SCRIPTS).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """Rooms that a file imports from, at any depth of its code."""
    package = ("scripts", *path.relative_to(SCRIPTS).parent.parts)
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            names = [".".join((*base, *filter(None, [node.module])))]
        found |= {name.split(".")[1] for name in names if name.startswith("scripts.")}
        assert not any(name.split(".")[0] in ("tests", "benchmarks", "conftest", "builders") for name in names)
    return found - {room(path)}


def test_every_room_is_known() -> None:
    assert {room(path) for path in FILES} == set(ALLOWED)


def test_inference_needs_what_its_requirements_name() -> None:
    lines = (BUNDLE_ROOT.parent / "requirements-inference.txt").read_text().splitlines()
    named = {
        re.split(r"[<>=]", line)[0].removeprefix("pytorch-").replace("pillow", "PIL")
        for line in lines
        if not line.startswith("#")
    }
    found = set()
    for path in FILES:
        if room(path) in {"inference", *ALLOWED["inference"], "command_line"}:
            for node in ast.parse(path.read_text()).body:  # at the top: an export imports its own packages when called
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and node.level == 0:
                    names = [str(node.module)]
                found |= {name.split(".")[0] for name in names} - sys.stdlib_module_names
    assert {"torch", "monai"} <= found <= named


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(SCRIPTS).as_posix())
def test_imports_run_one_way(path: Path) -> None:
    assert imported_rooms(path) <= ALLOWED[room(path)]


def test_no_images_but_the_example_and_nothing_too_large_for_the_zoo_are_in_git() -> None:
    root = Path(__file__).resolve().parents[1]
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("this copy is no git checkout")
    files = [root / name for name in listed.stdout.split("\0") if name and (root / name).is_file()]
    volumes = {f for f in files if f.name.endswith((".npy", ".npz", ".nii", ".nii.gz", ".dcm", ".mha", ".nrrd"))}
    example = root / "sscf_bundle" / "example"
    assert files and not [f for f in volumes if example not in f.parents]
    assert not [f for f in files if f.stat().st_size > 25_000_000]
