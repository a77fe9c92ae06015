"""How fast does one request decode whose K and V are larger than the GPU's share of memory, and against what?"""

from __future__ import annotations

NAME = "long_context"
