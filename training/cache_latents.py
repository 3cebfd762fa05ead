"""Encodes images once, to train on their latents: the program is unetgn/training/cache_latents.py."""

import sys

from unetgn.training.cache_latents import main

if __name__ == "__main__":
    sys.exit(main())
