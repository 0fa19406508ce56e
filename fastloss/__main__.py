"""``python -m fastloss``: the command line of :mod:`fastloss.cli`."""

import sys

from fastloss.cli import main

if __name__ == "__main__":
    sys.exit(main())
