"""Runs the line of a saved pipeline's card where this package cannot be imported."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

WITHOUT = "import sys; sys.modules.update(unetgn=None, training=None, sampling=None)\n"


def draw_by_card(folder: Path, where: Path, seed: int) -> np.ndarray:
    """Draw the image of a seed by the README.md of `folder`, in a process that is started there; keep it in `where`."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [
            *(sys.executable, "-c"),
            WITHOUT + code.replace("range(8)", f"[{seed}]").replace('"image.png"', repr(str(where / "image.png"))),
        ],
        cwd=folder,
        env=environment | {"HF_MODULES_CACHE": str(where / "modules"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return np.asarray(Image.open(where / "image.png")).astype(int)
