"""Puts the fused group norm + SiLU into models that we did not write: `unetgn.fuse`.

Each module of `unetgn.fusion.libraries` registers what `fuse` knows of one library.
"""

import unetgn.fusion.libraries.diffusers
import unetgn.fusion.libraries.guided_diffusion
import unetgn.fusion.libraries.monai
import unetgn.fusion.libraries.physicsnemo
import unetgn.fusion.libraries.sequential  # noqa: F401  each registers its rules
from unetgn.fusion.norm_silu import norm_silu
from unetgn.fusion.report import FusedPlace, LeftPlace, Report
from unetgn.fusion.walk import fuse, unfuse

__all__ = ["FusedPlace", "LeftPlace", "Report", "fuse", "norm_silu", "unfuse"]
