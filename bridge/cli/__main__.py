"""`python -m bridge.cli` is `bridge-ckpt`."""

import sys

from bridge.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
