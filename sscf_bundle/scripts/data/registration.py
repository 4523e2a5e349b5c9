# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Rigid registration of one contrast to another, by ITK."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from monai.data import MetaTensor
from monai.data.itk_torch_bridge import metatensor_to_itk_image

from ..contrasts import StudyError

#: World axes of ITK (left, posterior, superior) from those of NIfTI (right, anterior, superior).
_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


class RigidRegistration:
    """The rotation and shift that lay one contrast on another; no voxel is interpolated.

    The Mattes mutual information of both is maximized over the six parameters of a rigid transform about the center of
    the brain, from coarse to fine, by regular steps of gradient descent. The result is the same on any number of cores.

    Args:
        sampling: share of the voxels that each step looks at, in (0, 1].
        iterations: greatest number of steps at each resolution.
        bins: of the histogram of each contrast.
        levels: resolutions, as multiples of the voxel size.

    Raises:
        StudyError: for a number that makes no sense.
    """

    def __init__(self, sampling: float, iterations: int, bins: int, levels: Sequence[int]) -> None:
        if not 0 < sampling <= 1:
            raise StudyError(f"register_sampling must be above 0 and at most 1, got {sampling!r}.")
        # cubic windows reach over two bins on either side
        if iterations < 1 or bins < 5:
            raise StudyError(
                f"register_iterations must be at least 1 and register_bins at least 5, got {iterations!r} and {bins!r}."
            )
        if not levels or not all(isinstance(level, int) and level > 0 for level in levels):
            raise StudyError(f"register_levels must be whole numbers from 1 on, got {levels!r}.")
        self.sampling, self.iterations, self.bins, self.levels = sampling, iterations, bins, tuple(levels)

    def __call__(self, fixed: MetaTensor, moving: MetaTensor) -> np.ndarray:
        """Registers ``moving`` to ``fixed``.

        Args:
            fixed: X x Y x Z volume that stays where it is.
            moving: volume of the same patient in another contrast; its grid may differ.

        Returns:
            4 x 4 matrix from voxels of ``moving`` to the RAS world of ``fixed``, in mm.
        """
        import itk  # takes seconds, which only registration needs

        volumes = [cast(MetaTensor, volume[None]) for volume in (fixed, moving)]
        still, moved = (metatensor_to_itk_image(volume, channel_dim=0) for volume in volumes)
        kind = type(still)
        transform = itk.VersorRigid3DTransform[itk.D].New()
        initializer = itk.CenteredTransformInitializer[itk.VersorRigid3DTransform[itk.D], kind, kind].New(
            Transform=transform, FixedImage=still, MovingImage=moved
        )
        initializer.MomentsOn()
        initializer.InitializeTransform()
        metric = itk.MattesMutualInformationImageToImageMetricv4[kind, kind].New(NumberOfHistogramBins=self.bins)
        # sums of several threads differ in the last bits from one number of cores to the next
        metric.SetMaximumNumberOfWorkUnits(1)
        scales = itk.RegistrationParameterScalesFromPhysicalShift[type(metric)].New(Metric=metric)
        optimizer = itk.RegularStepGradientDescentOptimizerv4[itk.D].New(
            LearningRate=1.0, MinimumStepLength=1e-3, RelaxationFactor=0.6, NumberOfIterations=self.iterations
        )
        optimizer.SetScalesEstimator(scales)
        method = itk.ImageRegistrationMethodv4[kind, kind].New(
            FixedImage=still, MovingImage=moved, Metric=metric, Optimizer=optimizer, InitialTransform=transform
        )
        method.SetNumberOfLevels(len(self.levels))
        method.SetShrinkFactorsPerLevel(list(self.levels))
        method.SetSmoothingSigmasPerLevel([level / 2 if level > 1 else 0.0 for level in self.levels])
        strategy = itk.ImageRegistrationMethodv4Enums
        method.SetMetricSamplingStrategy(strategy.MetricSamplingStrategy_REGULAR)
        method.SetMetricSamplingPercentage(self.sampling)
        method.MetricSamplingReinitializeSeed(0)
        method.InPlaceOn()
        method.Update()
        matrix = np.eye(4)
        matrix[:3, :3] = itk.array_from_matrix(transform.GetMatrix())
        matrix[:3, 3] = np.asarray(transform.GetOffset())
        # ITK's transform leads from the fixed to the moving world
        return np.linalg.inv(_LPS @ matrix @ _LPS) @ torch.as_tensor(moving.affine).double().numpy()
