"""A run on a simulated clock: it leaves the events behind that a real one would, at times that are known exactly."""

from dataclasses import dataclass, field
from typing import Any

from mvit.ledger import Account, account

Event = dict[str, Any]


@dataclass
class Simulation:
    """Plays a run on a clock of its own and keeps the events that a real one would leave behind."""

    step_s: float = 2.0
    save_every: int = 50
    stall_s: float = 5.0
    start_up_s: float = 120.0
    queue_s: float = 60.0
    hosts: int = 2
    gpus: int = 16
    report_every: int = 5
    clock: float = 1_000_000.0
    step: int = 0
    saved: int = 0
    attempt: int = 0
    events: list[Event] = field(default_factory=list)

    def tell(self, event: str, **facts: Any) -> None:
        self.events.append({"event": event, "attempt": self.attempt, "time": self.clock, **facts})

    def submit(self) -> None:
        """Submit the next life (a person does)."""
        self.attempt += 1
        self.tell("submit", executor="slurm", job_id="7", world_size=self.gpus)
        self.attempt -= 1

    def live(self, steps: int) -> None:
        """Start a life and let it train `steps` steps; it saves every `save_every` and does not end."""
        self.attempt += 1
        self.clock += self.queue_s
        hosts = [f"n{number}" for number in range(self.hosts)]
        self.tell(
            "start", executor="slurm", world_size=self.gpus, hosts=hosts, gpus=self.gpus, checkpoint_step=self.saved
        )
        self.clock += self.start_up_s / 2
        self.step = self.saved
        self.tell("restored", step=self.saved, seconds=self.start_up_s / 4)
        self.clock += self.start_up_s / 2
        train_s = stall_s = 0.0
        for number in range(1, steps + 1):
            self.clock += self.step_s
            self.step, train_s = self.step + 1, train_s + self.step_s
            if number == 1:
                self.tell("first_step", step=self.step)
            if self.step % self.save_every == 0:
                self.clock, stall_s, self.saved = self.clock + self.stall_s, stall_s + self.stall_s, self.step
                self.tell("saved", step=self.step, seconds=self.stall_s, stall_s=self.stall_s, bytes=1)
            if number % self.report_every == 0 or number == steps or self.step == self.saved:
                self.tell("progress", step=self.step, train_s=train_s, stall_s=stall_s, evaluate_s=0.0, data_wait_s=1.0)

    def end(self, kind: str, *, requeued: bool = False, dying_s: float = 0.0) -> None:
        self.clock += dying_s
        cause = {"finished": "finished", "user_stop": "stopped", "signalled": "stopped"}.get(kind, "failed")
        if cause == "stopped":
            self.saved = self.step
        self.tell("end", cause=cause, kind=kind, detail="told", requeued=requeued, checkpoint_step=self.saved)

    def account(self) -> Account:
        return account(self.events, self.clock)
