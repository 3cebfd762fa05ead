"""Makes averaged weights of any width of a run: the program is unetgn/training/average.py."""

import sys

from unetgn.training.average import main

if __name__ == "__main__":
    sys.exit(main())
