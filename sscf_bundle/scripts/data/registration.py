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

from typing import cast

import numpy as np
import torch
from monai.data import MetaTensor
from monai.data.itk_torch_bridge import metatensor_to_itk_image

#: World axes of ITK (left, posterior, superior) from those of NIfTI (right, anterior, superior).
_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def registered_affine(fixed: MetaTensor, moving: MetaTensor, sampling: float = 0.1, iterations: int = 60) -> np.ndarray:
    """The affine of ``moving`` after the rotation and shift that lay it on ``fixed``; no voxel is interpolated.

    The Mattes mutual information (50 bins) of ``fixed`` and ``moving`` is maximized over the six parameters of a rigid
    transform about the center of the brain, at 4, 2 and 1 times the voxel size, by regular steps of gradient descent.

    Args:
        fixed: X x Y x Z volume that stays where it is.
        moving: volume of the same patient in another contrast; its grid may differ.
        sampling: share of the voxels of ``fixed`` that each step looks at.
        iterations: greatest number of steps at each of the three resolutions.

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
    metric = itk.MattesMutualInformationImageToImageMetricv4[kind, kind].New(NumberOfHistogramBins=50)
    scales = itk.RegistrationParameterScalesFromPhysicalShift[type(metric)].New(Metric=metric)
    optimizer = itk.RegularStepGradientDescentOptimizerv4[itk.D].New(
        LearningRate=1.0, MinimumStepLength=1e-3, RelaxationFactor=0.6, NumberOfIterations=iterations
    )
    optimizer.SetScalesEstimator(scales)
    method = itk.ImageRegistrationMethodv4[kind, kind].New(
        FixedImage=still, MovingImage=moved, Metric=metric, Optimizer=optimizer, InitialTransform=transform
    )
    method.SetNumberOfLevels(3)
    method.SetShrinkFactorsPerLevel([4, 2, 1])
    method.SetSmoothingSigmasPerLevel([2.0, 1.0, 0.0])
    strategy = itk.ImageRegistrationMethodv4Enums
    method.SetMetricSamplingStrategy(strategy.MetricSamplingStrategy_REGULAR)
    method.SetMetricSamplingPercentage(sampling)
    method.MetricSamplingReinitializeSeed(0)
    method.InPlaceOn()
    method.Update()
    matrix = np.eye(4)
    matrix[:3, :3] = itk.array_from_matrix(transform.GetMatrix())
    matrix[:3, 3] = np.asarray(transform.GetOffset())
    # ITK's transform leads from the fixed to the moving world
    return np.linalg.inv(_LPS @ matrix @ _LPS) @ torch.as_tensor(moving.affine).double().numpy()
