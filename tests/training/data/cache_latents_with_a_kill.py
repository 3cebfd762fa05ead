"""cache_latents.py that is killed in the middle of writing its third shard."""

import os
import signal
import sys

from unetgn.training.cache_latents import main
from unetgn.training.data import encoding

original = encoding.Cache._write_tensors
shards = []


def killed(cache: encoding.Cache, manifest: object, name: str, tensors: object) -> object:
    if name.startswith("latents"):
        shards.append(name)
        if len(shards) == 3:
            (cache.folder / f".tmp-{name}").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
    return original(cache, manifest, name, tensors)


encoding.Cache._write_tensors = killed
sys.exit(main())
