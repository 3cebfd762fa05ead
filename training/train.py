"""Trains a diffusion U-Net: the program is unetgn/training/train.py."""

import sys

from unetgn.training.train import main

if __name__ == "__main__":
    sys.exit(main())
