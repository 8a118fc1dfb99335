"""`MixtureActor`: the one holder of a run's mixtures, which says what each stage trains on.

Its whole state lies in storage, written before anybody is told of it, so a restarted actor answers
as the lost one would have. A change is made to a copy, which counts once a thread has written it:
while storage does not answer, whoever asks for what is known is answered as before.
"""

import asyncio
import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from bitray import storage
from bitray.data.mixture import Fenced, Mixture, StageMixture
from bitray.data.plan import SourceSize
from bitray.lease import Claim
from bitray.retries import PATIENCE_S as STORAGE_S
from bitray.retries import patient
from bitray.settings import UserError, nearest

PATIENCE_S = 30.0
"""How long one call waits for a decision; whoever still needs the answer asks again."""
PREPARED = "prepared"
"""File beside the stages' that says what may be planned of the data."""


def mixture_actor(
    name: str, directory: str, claim: Claim | None = None, patience: float = STORAGE_S
) -> Any:
    """Handle of the run's `MixtureActor`, started if need be; it lives while a driver holds it.

    A name may still belong to an actor that is going, if its last handle was dropped just now; then
    another is started as soon as the name is free.
    """
    node = ray.get_runtime_context().get_node_id()
    options = {
        "num_cpus": 0,
        # where the driver is: nodes that come and go do not take it with them
        "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False),
        "max_restarts": -1,
        "max_task_retries": -1,
        "max_concurrency": 1000,  # calls wait side by side, one for each reader of each stage
    }
    actor: Any = ray.remote(MixtureActor).options(name=name, get_if_exists=True, **options)
    deadline = time.monotonic() + PATIENCE_S
    while True:
        handle = actor.remote(directory, claim, patience)
        try:
            ray.get(handle.ready.remote())
            return handle
        except RayActorError as error:
            if error.actor_init_failed or time.monotonic() > deadline:
                raise
            time.sleep(0.1)


class MixtureActor:
    """The mixtures of a run's stages, by name, kept at `directory/{stage}.json`.

    Streams ask it to `plan`; the training loop tells it decisions and asks it for the state of
    checkpoints; whoever prepares the data tells it how far that has come. It writes under the lease
    that `claim` is of, and no more once that is taken over; it waits `patience` seconds for storage
    that does not answer.
    """

    def __init__(
        self, directory: str, claim: Claim | None = None, patience: float = STORAGE_S
    ) -> None:
        self._directory, self._claim, self._patience = directory, claim, patience
        self._mixtures: dict[str, Mixture] = {}
        self._awaiting: dict[str, tuple[StageMixture, int]] = {}
        """Stage and generation, where the cursors are those at the end of another stage."""
        self._sizes: dict[str, dict[str, SourceSize]] = {}
        """Of the sources of manifests that are being prepared, as far as they have come."""
        self._ended = False
        """Whether preparing has stopped, so that no more rows will come."""
        self._changed = asyncio.Condition()
        self._changing = asyncio.Lock()
        """Held from the copy of what is changed until that is written."""
        with patient(patience):
            if storage.exists(storage.join(directory, PREPARED)):
                self._load_sizes()
            there = storage.list_files(directory, (".json",)) if storage.exists(directory) else ()
            for info in there:
                self._load(info.uri)

    async def ready(self) -> None:
        """Answers once the journals are read."""

    async def open(
        self, name: str, stage: StageMixture, state: Mapping[str, Any] | None = None
    ) -> int:
        """Begin a generation of a stage's stream: from a checkpoint's state, else from its start.

        Whoever belongs to an earlier generation is turned away from now on. After a stage of which
        nothing is known here, because it was trained elsewhere, rows begin at `stage.cursors`.
        """
        async with self._changing:
            generation = self._generation(name) + 1
            stage = self._grown(stage)
            known = {*self._mixtures, *self._awaiting}
            if state is None and stage.after in known:
                values = {"stage": stage.to_json(), "generation": generation, "journal": []}
                await self._write(f"{name}.json", values)
                self._awaiting[name] = (stage, generation)
                self._mixtures.pop(name, None)
                await self._notify()
            elif state is None and stage.after is not None and not stage.cursors:
                raise UserError(
                    f"'{name}' is to begin where '{stage.after}' ends, of which nothing is known "
                    f"at {self._directory}{nearest(stage.after, known)}"
                )
            else:
                earlier = self._mixtures.get(name)
                await self._keep(
                    name,
                    Mixture.opened(stage, generation, state, earlier=earlier, epoch=self._epoch),
                )
            return generation

    async def prepared(self, sizes: Mapping[str, Mapping[str, SourceSize]]) -> None:
        """What there is of the sources of every manifest, by its identity, from now on.

        `UserError` if that is all of them and some stage needs more.
        """
        async with self._changing:
            await self._keep_sizes({key: dict(found) for key, found in sizes.items()}, False)
            for name, mixture in list(self._mixtures.items()):
                if mixture.stage.manifest in sizes:
                    grown = copy.copy(mixture)
                    grown.grow(sizes[mixture.stage.manifest])
                    await self._keep(name, grown)

    async def ended(self) -> None:
        """Preparing has stopped: who waits for more rows is told that there are none."""
        async with self._changing:
            await self._keep_sizes(self._sizes, True)

    async def plan(
        self,
        name: str,
        generation: int,
        tickets: Sequence[int],
        timeout: float = PATIENCE_S,
        until: int | None = None,
    ) -> dict[str, np.ndarray] | None:
        """Source number, epoch and row of every row of these tickets, each `[tickets, rows]`.

        Waits until every step is settled that these tickets, or those before `until`, belong to;
        None if after `timeout` seconds one is not. Where no more rows will come, tickets are left
        out from a step on, which is the same for all that ask, and `end` is its first ticket.
        Raises `Fenced` for a generation that has been replaced.
        """
        size = self._stage(name).rows_per_ticket
        until = (max(tickets) + 1 if until is None else until) * size
        while name in self._awaiting:
            if not await self._wait(lambda: self._resolvable(name, generation), timeout):
                return None
            await self._resolve(name)
        if not await self._wait(lambda: self._settled(name, generation, until), timeout):
            return None
        if not self._mixtures[name].promised(until):
            async with self._changing:
                if not self._settled(name, generation, until):
                    return None
                mixture = copy.copy(self._mixtures[name])
                mixture.reserve(until)
                await self._keep(name, mixture)
        mixture = self._mixtures[name]
        end = until if mixture.ready(until) else mixture.covered()
        firsts = [ticket * size for ticket in tickets if (ticket + 1) * size <= end]
        rows = mixture.plan.pick(firsts, size)
        planned = {key: part.reshape(len(firsts), size) for key, part in rows._asdict().items()}
        return planned if end >= until else planned | {"end": np.array(end // size)}

    async def set_weights(
        self,
        name: str,
        step: int,
        weights: Mapping[str, float] | None,
        notes: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Record a decision taken when `step` steps are done (None: no change); its journal entry.

        It takes effect `lead` steps later; without gates, not before rows that are handed out.
        Where sources may end, it waits until it is known whether they do so before.
        """
        await self._decidable(name, step)
        async with self._changing:
            mixture = copy.copy(self._mixtures[name])
            entry = mixture.decide(step, weights, notes)
            await self._keep(name, mixture)
            return entry.to_json()

    async def current(self, name: str, step: int) -> dict[str, float]:
        """Token shares of the sources that a decision of a step goes on from: those decided last,
        or of a phase that begins before it holds. Waits like `set_weights`, for until then it is
        not known whether a phase has begun."""
        return (await self._decidable(name, step)).current

    async def journal(self, name: str) -> list[dict[str, Any]]:
        """All entries of a stage."""
        return [entry.to_json() for entry in (await self._mixture(name)).plan.journal]

    async def sources(self, name: str, step: int) -> dict[str, dict[str, float]]:
        """Of the sources after `step` steps: the `weight` of each in the last one, and as `epoch`
        how often it has been gone through, where that is known."""
        mixture = await self._mixture(name)
        plan, end = mixture.plan, step * mixture.stage.rows_per_step
        pairs = zip(plan.sizes.items(), plan.cursors(end), strict=True)
        epochs = {
            source: rows / size.rows for (source, size), rows in pairs if size.done and size.rows
        }
        return {"weight": plan.weights(end - 1), "epoch": epochs}

    async def state(self, name: str, step: int) -> dict[str, Any]:
        """What a checkpoint of a stage after `step` steps holds; `open` takes it back."""
        return (await self._mixture(name)).state(step)

    # ------------------------------------------------------------------------------- keeping

    @property
    def _epoch(self) -> int:
        return self._claim.epoch if self._claim else 0

    def _generation(self, name: str) -> int:
        if name in self._mixtures:
            return self._mixtures[name].generation
        return self._awaiting[name][1] if name in self._awaiting else 0

    async def _decidable(self, name: str, step: int) -> Mixture:
        """The mixture of a stage, once a decision of this step may be recorded."""
        await self._mixture(name)
        await self._wait(lambda: self._ended or self._mixtures[name].decidable(step))
        if not self._mixtures[name].decidable(step):
            raise UserError(f"{name}: no more rows are prepared after step {step}")
        return self._mixtures[name]

    def _stage(self, name: str) -> StageMixture:
        known = {*self._mixtures, *self._awaiting}
        if name not in known:
            raise UserError(f"no stage '{name}' has been opened{nearest(name, known)}")
        return self._awaiting[name][0] if name in self._awaiting else self._mixtures[name].stage

    async def _mixture(self, name: str) -> Mixture:
        self._stage(name)
        await self._resolve(name)
        assert name in self._mixtures, f"{name} begins where a stage ends that is not decided yet"
        return self._mixtures[name]

    async def _wait(self, until: Callable[[], bool], seconds: float | None = None) -> bool:
        """Whether something is so before the time is over."""
        async with self._changed:
            try:
                await asyncio.wait_for(self._changed.wait_for(until), seconds)
            except TimeoutError:
                return False
        return True

    def _check(self, name: str, generation: int) -> None:
        current = self._generation(name)
        if generation != current:
            raise Fenced(f"{name}: generation {generation} has been replaced by {current}")

    def _settled(self, name: str, generation: int, until: int) -> bool:
        self._check(name, generation)
        mixture = self._mixtures.get(name)
        if mixture is None:
            return False
        return mixture.ready(until) or (self._ended and mixture.starved(until))

    def _resolvable(self, name: str, generation: int) -> bool:
        self._check(name, generation)
        while name in self._awaiting:
            after = self._awaiting[name][0].after
            assert after is not None
            if after in self._mixtures:
                before = self._mixtures[after]
                return before.ready(before.stage.end)
            name = after
        return True

    async def _resolve(self, name: str) -> None:
        """Begin a stage where the one before it ends, if that is known by now."""
        if name not in self._awaiting:
            return
        after = self._awaiting[name][0].after
        assert after is not None
        await self._resolve(after)
        async with self._changing:
            before = copy.copy(self._mixtures.get(after))
            if name not in self._awaiting or before is None or not before.ready(before.stage.end):
                return
            stage, generation = self._awaiting[name]
            # From here on nothing may move that end any more.
            before.reserve(before.stage.end)
            await self._keep(after, before)
            stage, cursors = self._grown(stage), before.continued(stage)
            await self._keep(
                name, Mixture.opened(stage, generation, None, cursors, epoch=self._epoch)
            )

    async def _keep(self, name: str, mixture: Mixture) -> None:
        """The mixture of a stage from now on, where that is written."""
        await self._write(f"{name}.json", mixture.to_json())
        self._mixtures[name] = mixture
        self._awaiting.pop(name, None)
        await self._notify()

    async def _keep_sizes(self, sizes: dict[str, dict[str, SourceSize]], ended: bool) -> None:
        await self._write(PREPARED, {"sizes": sizes, "ended": ended})
        self._sizes, self._ended = sizes, ended
        await self._notify()

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _write(self, file: str, values: Mapping[str, Any]) -> None:
        """In a thread, for it may take as long as the patience with storage."""

        def write() -> None:
            with patient(self._patience):
                if self._claim:
                    self._claim.check()
                uri = storage.join(self._directory, file)
                storage.write_json(uri, {**values, "epoch": self._epoch})

        await asyncio.to_thread(write)

    def _load(self, uri: str) -> None:
        name = uri.rsplit("/", 1)[-1].removesuffix(".json")
        values = storage.read_json(uri)
        stage = self._grown(StageMixture.from_json(values["stage"]))
        if values["journal"]:
            here = {"stage": stage.to_json(), "epoch": self._epoch}
            self._mixtures[name] = Mixture.from_json(values | here)
        else:
            self._awaiting[name] = (stage, values["generation"])

    def _grown(self, stage: StageMixture) -> StageMixture:
        """The stage with what is known of its sources by now."""
        return replace(stage, sizes=self._sizes.get(stage.manifest, stage.sizes))

    def _load_sizes(self) -> None:
        values = storage.read_json(storage.join(self._directory, PREPARED))
        self._ended = values["ended"]
        self._sizes = {
            manifest: {name: SourceSize(*size) for name, size in sizes.items()}
            for manifest, sizes in values["sizes"].items()
        }
