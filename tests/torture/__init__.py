"""The fault suite: what must hold when processes are killed, disks fail and bytes rot.

`make torture MINUTES=20` runs all kinds in rotation until the time is over; tests/test_torture.py runs each for
a few seconds. A *case* is one run of one kind from one seed, in a process of its own; what it saw is a `Tally`.
"""

from __future__ import annotations

import os

# Children are forked from a process without threads: numpy and torch start theirs when they are imported.
os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"
