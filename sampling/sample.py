"""Draws images with a trained network: the program is unetgn/sampling/sample.py."""

import sys

from unetgn.sampling.sample import main

if __name__ == "__main__":
    sys.exit(main())
