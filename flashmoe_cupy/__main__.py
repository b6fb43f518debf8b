"""`python -m flashmoe_cupy`."""

from __future__ import annotations

import sys

from flashmoe_cupy.cli import main

if __name__ == "__main__":
    sys.exit(main())
