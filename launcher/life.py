"""The life of a run as its ranks see it: signs of life to the guard, the claim, the ledger."""

import time
from collections.abc import Mapping

from launcher.claims import check_claim
from launcher.heartbeat import own_heartbeat
from launcher.run_folder import RunFolder
from launcher.say import say
from mvit.life import Phase


class RunLife:
    """One life of a run under the launcher; implements mvit.life.Life."""

    def __init__(self, run: RunFolder, attempt: int) -> None:
        self._run, self._attempt, self._heartbeat = run, attempt, own_heartbeat()

    def beat(self, step: int, phase: Phase) -> None:
        """Tell this rank's guard what begins now."""
        if self._heartbeat is not None:
            self._heartbeat.beat(step, phase)

    def check_owner(self) -> None:
        """Raise Superseded if a later life has claimed the run."""
        check_claim(self._run.path, self._attempt)

    def record(self, event: str, facts: Mapping[str, object]) -> None:
        """Append an event of this life to the ledger."""
        try:
            self._run.append_event(event, self._attempt, **facts)
        except OSError as error:  # a full disk: training is worth more than its ledger
            say(f"the ledger lacks an event ({event}): {error}")

    def goodput(self) -> Mapping[str, float]:
        """Return the account over all lives so far as TensorBoard shows it."""
        from mvit.ledger import account

        return account(self._run.events(), time.time()).figures()
