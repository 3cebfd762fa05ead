"""`unetgn.fuse`: the fused core in modules that we did not write."""

import unetgn.fusion.libraries.diffusers
import unetgn.fusion.libraries.guided_diffusion
import unetgn.fusion.libraries.monai
import unetgn.fusion.libraries.sequential  # noqa: F401  each registers its rules
from unetgn.fusion.fusing import fuse, unfuse
from unetgn.fusion.joined import norm_silu
from unetgn.fusion.report import FusedPlace, LeftPlace, Report

__all__ = ["FusedPlace", "LeftPlace", "Report", "fuse", "norm_silu", "unfuse"]
