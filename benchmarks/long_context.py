"""How fast does one request decode whose K and V are larger than the GPU's share of memory, and against what?

The same as `tiermem bench long-context`; see its --help.
"""

from __future__ import annotations

import sys

from tiermem.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "long-context", *sys.argv[1:]]))
