"""train.py with Accelerate's own FSDP2 on CPUs, where it would run DDP: PyTorch has FSDP2 there, over gloo."""

import os
import sys

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from unetgn.training.train import main

original = AcceleratorState.__init__


def with_fsdp(self: AcceleratorState, *arguments: object, **more: object) -> None:
    original(self, *arguments, **more)
    if self.distributed_type == DistributedType.MULTI_CPU and "fsdp_plugin" in more:
        self.distributed_type = DistributedType.FSDP
        self.fsdp_plugin = more["fsdp_plugin"]  # the first call has it; later ones find what it left


AcceleratorState.__init__ = with_fsdp
if "FAILS_AT" in os.environ:
    import tests.training.train_with_a_failure  # noqa: F401 (which runs train.py, and ends)
sys.exit(main())
