"""Run exports and print, as JSON, how far each made the memory of this process grow that no file backs.

python -m tests.mvit.export_memory CHECKPOINT FOLDER yes|no [FORMAT ...]     yes: verified exports
"""

import ctypes
import gc
import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SUFFIXES = {"safetensors": ".safetensors", "timm": ".safetensors", "facebook": ".pyth", "torch": ".pth"}


def anonymous() -> int:
    """Return the bytes of memory of this process that are no file's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("the kernel does not tell RssAnon")


def growth(function: Callable[[], object]) -> tuple[int, float]:
    """Return by how many bytes anonymous memory rose at most while `function` ran, and its seconds."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before, peak, running = anonymous(), 0, True

    def watch() -> None:
        nonlocal peak
        while running:
            peak = max(peak, anonymous())
            time.sleep(0.0005)

    thread = threading.Thread(target=watch)
    thread.start()
    began = time.monotonic()
    try:
        function()
    finally:
        seconds = time.monotonic() - began
        running = False
        thread.join()
    return max(peak, anonymous()) - before, seconds


def main(checkpoint: Path, folder: Path, verified: bool, formats: list[str]) -> dict[str, Any]:
    """Export in every format and return {format: [bytes, seconds]}."""
    import timm  # noqa: F401 - what is loaded only once is not what is measured

    from mvit.export import export_weights

    found = {}
    for format in formats or list(SUFFIXES):
        out = folder / f"{format}{SUFFIXES[format]}"
        found[format] = growth(
            lambda out=out, format=format: export_weights(checkpoint, out, format=format, verify=verified)
        )
        out.unlink()
    return found


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "yes", sys.argv[4:])))
