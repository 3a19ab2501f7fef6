"""A training loop of nothing but steps, run as a process of its own to see what faults do to it.

python -m tests.faults RUN_DIR RANK FIRST_STEP LAST_STEP STEPS_FILE
"""

import signal
import sys
from pathlib import Path

from launcher.faults import observer_from_environment


def main(run_dir: Path, rank: int, first: int, last: int, steps_file: Path) -> None:
    """Write down each step that is done, in two accumulations, and each stop signal."""
    with steps_file.open("a") as file:
        for signum in (signal.SIGUSR2, signal.SIGTERM):
            signal.signal(signum, lambda number, frame: print(signal.Signals(number).name, file=file, flush=True))
        observer = observer_from_environment(run_dir, rank)
        for step in range(first, last + 1):
            for accumulation in range(2):
                if observer is not None:
                    observer.read(step, accumulation, None)
            print(step, file=file, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5]))
