"""What a worker does so that nothing is lost: checkpoints beside training, audit events, and a look
now and then whether somebody asked to stop or has taken the run over."""

import threading
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from bitray import checkpoint, storage
from bitray.events import Events, read_events
from bitray.lease import Claim, TakenOver
from bitray.pipeline.console import Say
from bitray.pipeline.folders import StageFolder
from bitray.retries import failing
from bitray.settings import UserError
from bitray.training.loop import Loop
from bitray.training.metrics import Saving
from bitray.training.parallel import from_rank_zero, on_rank_zero, world
from bitray.training.spikes import Spike
from bitray.training.state import tensors_of

STOP = "STOP"
"""File in the run's folder whose presence asks the workers to stop after the step."""
LOOK_S, LOOK_REMOTE_S = 0.5, 5.0


class Rewind(UserError):
    """The workers are to start again from the last checkpoint."""


class Watch:
    """Looks from a thread of rank 0, so that storage which is slow or gone costs no step."""

    def __init__(self, claim: Claim) -> None:
        self.stop = False
        self.problem: str | None = None
        self._claim = claim
        self._over = threading.Event()
        if world()[0] == 0:
            threading.Thread(target=self._look, name="watch", daemon=True).start()

    def _look(self) -> None:
        flag = storage.join(self._claim.run_dir, STOP)
        period = LOOK_REMOTE_S if storage.is_remote(flag) else LOOK_S
        while not self._over.wait(period):
            try:
                self.stop = storage.exists(flag)
                self._claim.check()
            except TakenOver as error:
                self.problem = str(error)
            except (OSError, UserError):
                continue  # whoever writes next will tell

    def close(self) -> None:
        """Look no more."""
        self._over.set()


class Checkpoints:
    """Those of one stage, on one worker."""

    def __init__(self, folder: StageFolder, claim: Claim, keep_last: int, say: Say) -> None:
        self.folder, self.keep_last = folder, keep_last
        self._claim, self._say = claim, say
        self._saver = checkpoint.Saver(claim.check)
        self._events = Events(claim, folder.stage)

    def save(
        self, loop: Loop, directory: str, state: Mapping[str, Any], files: Mapping[str, bytes]
    ) -> None:
        """Begin a checkpoint of the loop as it stands; its error is raised by the next call."""
        position = loop.position
        facts = {"step": position.step, "tokens": position.tokens, "directory": directory}
        resumable = directory != self.folder.best
        told = [s.saving() for s in loop.sinks if resumable and isinstance(s, Saving)]

        def flush() -> None:
            for sink in loop.sinks:
                sink.flush()

        def note() -> None:
            for saved in told:
                saved()
            self.note("checkpoint", **facts)
            if directory == self.folder.step(position.step):
                gone = checkpoint.retain(self.folder.root, self.keep_last)
                if gone:
                    self.note("removed", directories=gone, newest=directory)

        held = {**state, "epoch": self._claim.epoch}
        tensors = tensors_of(loop.model, loop.optimizer)
        self._saver.save(directory, tensors, held, files, before=flush, after=note)

    def possible(self, loop: Loop) -> bool:
        """Whether a save can begin. While storage fails, the one before it is still on its way, and
        training goes on without another."""
        if self._saver.ready():
            return True

        def tell() -> None:
            self.note("warning", step=loop.position.step, reason=f"no checkpoint: {failing()}")
            self._say(
                f"{self.folder.stage:<9} step {loop.position.step}: storage fails, the checkpoint "
                "before this one is still on its way; training goes on without one here"
            )

        on_rank_zero(tell)
        return False

    def wait(self) -> None:
        """Until nothing is under way; raises what went wrong."""
        self._saver.wait()

    def note(self, kind: str, **facts: Any) -> None:
        """Record an event of this stage; rank 0 calls it."""
        self._events.write(kind, stage=self.folder.stage, **facts)

    def pass_over(self, directory: str, reason: str) -> None:
        """Tell of a newer checkpoint that cannot be used."""
        self._say(f"{self.folder.stage:<9} {reason}; looking for an earlier checkpoint")
        self.note("passed_over", directory=directory, reason=reason)

    def once_more(self, loop: Loop, error: FloatingPointError) -> None:
        """Have the group start again from the last checkpoint, for a fault of a machine would not
        come back; what comes back at the same place is raised."""

        def again() -> bool:
            step, before = loop.position.step, read_events(self._claim.run_dir)
            rewound = [one for one in before if one["kind"] == "rewind"]
            mine = [one["step"] for one in rewound if one["stage"] == self.folder.stage]
            self.note("rewind", step=step, reason=str(error))
            return any(at >= step for at in mine)

        if from_rank_zero(again):
            raise error
        if world()[0] == 0:
            self._say(f"{self.folder.stage:<9} {error}; once more from the last checkpoint")
        raise Rewind(str(error)) from error

    def spiked(self, spike: Spike, rewind: bool) -> None:
        """Tell of a spike of the loss; `rewind`: and have the group start again from the last
        checkpoint, to leave out all steps from there to here. What leads to a spike may lie before
        it (PaLM, arXiv 2204.02311, section 5.1), and the step alone would come out the same."""
        if rewind:
            self.wait()

        def tell() -> None:
            left_out = range(0)
            if rewind:
                newest = checkpoint.newest_complete(self.folder.root)
                begins = checkpoint.load_state(newest)["position"]["step"] if newest else 0
                left_out = range(begins, spike.step + 1)
                self.folder.leave_out(left_out)
            self.note("loss_spike", **spike.facts(), left_out=list(left_out))
            after = f"; once more without steps {left_out.start} to {spike.step}" if rewind else ""
            self._say(f"{self.folder.stage:<9} {spike}{after}")

        on_rank_zero(tell)
        if rewind:
            raise Rewind(f"{self.folder.stage}, {spike}")

    def close(self) -> None:
        """Let go of what is under way."""
        self._saver.close()
        with suppress(OSError, UserError):
            self._events.close()
