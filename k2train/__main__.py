"""``python -m k2train``, which is also what torchrun starts."""

import sys

from k2train.cli import main

if __name__ == "__main__":
    sys.exit(main())
