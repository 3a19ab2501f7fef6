"""What a run prints is one line a record where there is no terminal, and never ends the run."""

import io

from rich.console import Console

from mvit.progress import ProgressDisplay

RECORD = {"kind": "train", "step": 3, "total_steps": 9, "loss": 0.5, "lr": 1e-3, "samples_per_s": 10.0, "eta_s": 61}


class _Gone(io.StringIO):
    """A pipe whose reader has ended."""

    def write(self, text: str) -> int:
        raise BrokenPipeError


def test_a_record_is_one_plain_line_without_a_terminal() -> None:
    output = io.StringIO()
    with ProgressDisplay(console=Console(file=output, width=20)) as display:
        display.update(RECORD)
        display.update({"kind": "evaluate", "step": 3, "total_steps": 9, "top1": 0.25})
    assert output.getvalue().splitlines() == [
        "step 3/9  loss 0.5000  lr 1.00e-03  10.0 samples/s  ETA 1:01",
        "evaluate at step 3: top1 0.25",
    ]


def test_a_reader_that_is_gone_does_not_end_the_run() -> None:
    gone = _Gone()
    with ProgressDisplay(console=Console(file=gone)) as display:
        for _ in range(3):
            display.update(RECORD)
    assert gone.getvalue() == ""
