"""`python -m jaxft` is the `jaxft` command."""

import sys

from jaxft.cli import main

if __name__ == "__main__":
    sys.exit(main())
