"""``python -m bitfold``: the command line."""

import sys

from bitfold.cli import main

if __name__ == "__main__":
    sys.exit(main())
