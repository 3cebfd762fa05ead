"""Draws and watches a run in the browser: the program is unetgn/sampling/app.py."""

import sys

from unetgn.sampling.app import main

if __name__ == "__main__":
    sys.exit(main())
