"""Trains the classifier that judges samples of embedded data: the program is unetgn/sampling/train_classifier.py."""

import sys

from unetgn.sampling.train_classifier import main

if __name__ == "__main__":
    sys.exit(main())
