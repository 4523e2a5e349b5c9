# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Puts the bundle root on ``sys.path`` (as ``monai.bundle run`` does) and names the shared fixtures."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# tensors this small are slower on several threads, and far slower on a busy machine; equal bits need equal threads
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[1]
BUNDLE_ROOT = REPOSITORY / "sscf_bundle"
sys.path.insert(0, str(BUNDLE_ROOT))
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def phantom_cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five complete phantom studies of 4 mm voxels, made once for all tests."""
    from scripts.demo.phantom import write_phantom_cohort

    directory = tmp_path_factory.getbasetemp() / "phantom_cohort"
    write_phantom_cohort(directory, 5, seed=0, shape=(60, 60, 40), num_workers=2)
    return directory
