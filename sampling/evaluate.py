"""Says what samples are worth: the program is unetgn/sampling/evaluate.py."""

import sys

from unetgn.sampling.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
