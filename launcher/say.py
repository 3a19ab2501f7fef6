"""Words for whoever reads a job's output, from processes that must live on when nobody can be told anything."""

import sys
from contextlib import suppress


def say(text: str) -> None:
    """Print a line to stderr; what cannot be written, because the disk behind it is full, is given up."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)
