"""The mixture actor: gates that wait, generations that fence, a journal that outlives it."""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flaky_s3 import FlakyS3
from ray.exceptions import RayTaskError

from bitray.data.actor import MixtureActor, mixture_actor
from bitray.data.mixture import Fenced, Mixture, StageMixture
from bitray.data.plan import Entry, MixturePlan, SourceSize, opening
from bitray.pipeline.cli import told
from bitray.retries import StorageGone
from bitray.settings import UserError

SIZES = {"a": SourceSize(90, 900), "b": SourceSize(400, 3000)}
WEIGHTS = {"a": 0.25, "b": 0.75}


def stage(**changes: Any) -> StageMixture:
    values: dict[str, Any] = {
        "seed": 0,
        "manifest": "m",
        "sizes": SIZES,
        "weights": WEIGHTS,
        "length": 16,
        "steps": 50,
        "rows_per_ticket": 2,
        "tickets_per_step": 4,
        "bundle": 4,
        "lead": 4,
    }
    return StageMixture(**{**values, **changes})


def test_tickets_are_planned_as_the_plan_says(tmp_path: Path) -> None:
    async def story() -> None:
        actor = MixtureActor(str(tmp_path))
        generation = await actor.open("stage2", stage())
        found = await actor.plan("stage2", generation, [3, 5, 7])
        plan = MixturePlan(0, SIZES, [opening(SIZES, WEIGHTS)])
        for at, ticket in enumerate([3, 5, 7]):
            rows = plan.rows(ticket * 2, 2)
            assert found is not None and found["row"].shape == (3, 2)
            assert (found["row"][at] == rows.row).all()
            assert (found["source"][at] == rows.source).all()

    asyncio.run(story())


def test_planning_waits_for_the_decision_and_no_longer(tmp_path: Path) -> None:
    async def story() -> None:
        actor = MixtureActor(str(tmp_path))
        generation = await actor.open("s", stage(period=10))
        first_undecided = (10 + 4) * 4
        assert await actor.plan("s", generation, [first_undecided - 1]) is not None
        assert await actor.plan("s", generation, [first_undecided], timeout=0.05) is None
        waiting = asyncio.create_task(actor.plan("s", generation, [first_undecided]))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        await actor.set_weights("s", 10, {"a": 1.0})
        found = await asyncio.wait_for(waiting, 1)
        assert found is not None and (found["source"] == 0).all()

    asyncio.run(story())


def test_a_replaced_generation_is_turned_away_even_while_it_waits(tmp_path: Path) -> None:
    async def story() -> None:
        actor = MixtureActor(str(tmp_path))
        old = await actor.open("s", stage(period=10))
        waiting = asyncio.create_task(actor.plan("s", old, [199]))
        await asyncio.sleep(0.05)
        new = await actor.open("s", stage(period=10))
        assert new > old
        with pytest.raises(Fenced, match="generation 1 has been replaced by 2"):
            await waiting
        with pytest.raises(Fenced):
            await actor.plan("s", old, [0])

    asyncio.run(story())


def test_a_stage_begins_where_the_one_before_it_ends(tmp_path: Path) -> None:
    async def story() -> None:
        actor = MixtureActor(str(tmp_path))
        first = await actor.open("one", stage(period=40))
        second = await actor.open("two", stage(after="one", steps=10))
        assert await actor.plan("two", second, [0], timeout=0.05) is None
        waiting = asyncio.create_task(actor.plan("two", second, [0]))
        await actor.set_weights("one", 40, {"b": 1.0})
        assert await asyncio.wait_for(waiting, 1) is not None
        assert await actor.plan("one", first, [199]) is not None
        ends = MixturePlan(0, SIZES, _entries(await actor.journal("one"))).cursors(400)
        assert (await actor.journal("two"))[0]["cursors"] == ends

    asyncio.run(story())


def test_after_a_stage_that_was_trained_elsewhere_rows_begin_where_one_says(
    tmp_path: Path,
) -> None:
    async def story() -> None:
        actor = MixtureActor(str(tmp_path))
        await actor.open("two", stage(after="one", cursors={"b": 7}))
        assert (await actor.journal("two"))[0]["cursors"] == (0, 7)

    asyncio.run(story())


def test_an_unknown_stage_before_is_refused(tmp_path: Path) -> None:
    async def story() -> None:
        actor = MixtureActor(str(tmp_path))
        await actor.open("stage1_9", stage())
        with pytest.raises(UserError, match=r"where 'stage1_8' ends.*nearest: 'stage1_9'"):
            await actor.open("stage2", stage(after="stage1_8"))

    asyncio.run(story())


def test_weights_are_those_in_force_in_the_last_step(tmp_path: Path) -> None:
    """A phase begins with step 30; a decision of step 20 takes effect with step 36."""

    async def story() -> None:
        actor = MixtureActor(str(tmp_path))
        phases = ((30, {"a": 0.75, "b": 0.25}),)
        await actor.open("s", stage(period=20, lead=16, phases=phases))
        await actor.set_weights("s", 20, {"a": 1.0, "b": 1.0})
        weights = {step: (await actor.sources("s", step))["weight"] for step in (1, 30, 31, 36, 37)}
        assert weights[1] == weights[30] == WEIGHTS
        assert weights[31] == weights[36] == {"a": 0.75, "b": 0.25}
        assert weights[37] == {"a": 0.5, "b": 0.5}

    asyncio.run(story())


GROWING = {**SIZES, "b": SourceSize(106, 3000, 400, False)}


def test_planning_waits_for_rows_that_are_being_prepared(tmp_path: Path) -> None:
    async def story() -> None:
        actor = MixtureActor(str(tmp_path))
        await actor.prepared({"m": GROWING})
        generation = await actor.open("s", stage())
        assert await actor.plan("s", generation, [0]) is not None
        last = 199
        assert await actor.plan("s", generation, [last], timeout=0.05) is None
        # One that is started again knows what the lost one knew.
        actor = MixtureActor(str(tmp_path))
        waiting = asyncio.create_task(actor.plan("s", generation, [last]))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        await actor.prepared({"m": SIZES})
        found = await asyncio.wait_for(waiting, 1)
        plan = MixturePlan(0, SIZES, [opening(SIZES, WEIGHTS)])
        assert found is not None and (found["row"] == plan.rows(last * 2, 2).row).all()
        # Every start of the workers opens the stage as the driver knew it at first.
        generation = await actor.open("s", stage(sizes=GROWING))
        assert await actor.plan("s", generation, [last], timeout=0.05) is not None
        epochs = (await actor.sources("s", 50))["epoch"]
        assert epochs["b"] == pytest.approx(plan.cursors(400)[1] / 400)

    asyncio.run(story())


def test_where_preparing_stops_everybody_is_told_of_the_same_step(tmp_path: Path) -> None:
    async def story() -> None:
        actor = MixtureActor(str(tmp_path))
        await actor.prepared({"m": GROWING})
        generation = await actor.open("s", stage())
        # Rows of four tickets a step for three workers, the third of whom has nothing to do there.
        bundles = {0: [60, 63, 64, 67, 72], 1: [61, 65, 68, 73], 2: [62, 66, 70, 74], 3: []}
        asked = [
            asyncio.create_task(actor.plan("s", generation, bundles[k], until=(until + 1) * 4))
            for k, until in zip(bundles, (18, 18, 18, 30), strict=True)
        ]
        await asyncio.sleep(0.05)
        assert not any(task.done() for task in asked)
        await actor.ended()
        found = [await asyncio.wait_for(task, 1) for task in asked]
        ends = {int(each["end"]) for each in found if each is not None}
        (end,) = ends
        assert end % 4 == 0 and 60 < end <= 72
        for each, tickets in zip(found, bundles.values(), strict=True):
            assert each is not None and len(each["row"]) == sum(t < end for t in tickets)
        before = await actor.plan("s", generation, [end - 1])
        assert before is not None and "end" not in before, "steps before it are planned as ever"

    asyncio.run(story())


def test_a_decision_waits_where_a_source_may_end_before_it_holds(tmp_path: Path) -> None:
    async def story() -> None:
        actor = MixtureActor(str(tmp_path))
        await actor.prepared({"m": GROWING})
        await actor.open("s", stage(period=14, max_epochs=3))
        deciding = asyncio.create_task(actor.set_weights("s", 14, {"a": 1.0, "b": 1.0}))
        await asyncio.sleep(0.05)
        assert not deciding.done()
        await actor.prepared({"m": SIZES})
        assert (await asyncio.wait_for(deciding, 1))["first_row"] == 18 * 8

    asyncio.run(story())


def test_what_a_decision_goes_on_from_does_not_depend_on_how_fast_is_prepared(
    tmp_path: Path,
) -> None:
    """A phase begins before the decision holds, but it is recorded only once it is known whether a
    source has ended by then."""

    async def story() -> None:
        phased = stage(period=14, max_epochs=3, phases=((16, {"a": 0.5, "b": 0.5}),))
        fast = MixtureActor(str(tmp_path / "fast"))
        await fast.open("s", phased)
        assert await fast.current("s", 14) == {"a": 0.5, "b": 0.5}
        slow = MixtureActor(str(tmp_path / "slow"))
        await slow.prepared({"m": GROWING})
        await slow.open("s", phased)
        asking = asyncio.create_task(slow.current("s", 14))
        await asyncio.sleep(0.05)
        assert not asking.done()
        await slow.prepared({"m": SIZES})
        assert await asyncio.wait_for(asking, 1) == {"a": 0.5, "b": 0.5}

    asyncio.run(story())


def _entries(journal: list[dict[str, Any]]) -> list[Entry]:
    return [Entry.from_json(entry) for entry in journal]


def test_once_the_next_stage_has_begun_nothing_moves_the_end_of_the_one_before(
    tmp_path: Path,
) -> None:
    async def story() -> None:
        actor = MixtureActor(str(tmp_path))
        await actor.open("one", stage())
        second = await actor.open("two", stage(after="one"))
        await actor.plan("two", second, [0])
        entry = await actor.set_weights("one", 3, {"b": 1.0})
        assert entry["first_row"] >= 50 * 8

    asyncio.run(story())


def test_an_actor_started_again_goes_on(tmp_path: Path) -> None:
    async def story() -> None:
        actor = MixtureActor(str(tmp_path))
        generation = await actor.open("one", stage(period=10))
        await actor.open("two", stage(after="one"))
        await actor.set_weights("one", 10, {"a": 0.5, "b": 0.5}, {"score": 1.5})
        before = await actor.plan("one", generation, list(range(80)))
        again = MixtureActor(str(tmp_path))
        after = await again.plan("one", generation, list(range(80)))
        assert before is not None and after is not None
        assert all((before[key] == after[key]).all() for key in before)
        assert await again.journal("one") == await actor.journal("one")
        assert await again.open("two", stage(after="one")) == 2

    asyncio.run(story())


def test_a_lost_actor_never_changes_rows_it_has_handed_out(tmp_path: Path) -> None:
    """Without gates the promise is written down before rows are given."""

    async def story() -> None:
        actor = MixtureActor(str(tmp_path))
        generation = await actor.open("s", stage())
        before = await actor.plan("s", generation, list(range(100)))
        again = MixtureActor(str(tmp_path))
        await again.set_weights("s", 1, {"b": 1.0})
        after = await again.plan("s", generation, list(range(100)))
        assert before is not None and after is not None
        assert (before["row"] == after["row"]).all()

    asyncio.run(story())


def test_while_storage_is_gone_all_that_is_known_is_answered(s3: str, proxy: FlakyS3) -> None:
    """A decision counts once it is written: until then nobody hears of it, and nobody waits who
    asks for something else. If patience ends before, there was none."""

    async def story() -> None:
        actor = MixtureActor(f"{s3}/mixture", patience=120.0)
        generation = await actor.open("s", stage(period=10))
        before = await actor.journal("s")
        proxy.rate = 1.0
        deciding = asyncio.create_task(actor.set_weights("s", 10, {"a": 1.0}))
        await asyncio.sleep(0.5)
        async with asyncio.timeout(30):
            assert await actor.journal("s") == before
            assert (await actor.sources("s", 10))["epoch"]["a"] > 0
            assert (await actor.state("s", 9))["next_ticket"] == 36
            assert await actor.plan("s", generation, [0]) is not None
            assert await actor.plan("s", generation, [(10 + 4) * 4], timeout=0.05) is None
        assert not deciding.done()
        proxy.rate = 0.0
        entry = await deciding
        assert await actor.journal("s") == [*before, entry]
        hasty = MixtureActor(f"{s3}/mixture", patience=0.5)
        proxy.rate = 1.0
        with pytest.raises(StorageGone):
            await hasty.set_weights("s", 20, {"b": 1.0})
        assert await hasty.journal("s") == [*before, entry]

    asyncio.run(story())


def test_an_unknown_stage_is_named(tmp_path: Path) -> None:
    async def story() -> None:
        actor = MixtureActor(str(tmp_path))
        await actor.open("stage2", stage())
        with pytest.raises(UserError, match="no stage 'stage3' has been opened"):
            await actor.state("stage3", 0)

    asyncio.run(story())


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_killed_actor_comes_back_with_its_journal(tmp_path: Path) -> None:
    import ray

    actor = mixture_actor("mixture-test", str(tmp_path))
    generation = ray.get(actor.open.remote("s", stage(period=10)))
    ray.get(actor.set_weights.remote("s", 10, {"a": 1.0}))
    tickets = list(range(40, 72))
    before = ray.get(actor.plan.remote("s", generation, tickets))
    ray.kill(actor, no_restart=False)
    after = ray.get(ray.get_actor("mixture-test").plan.remote("s", generation, tickets), timeout=60)
    assert all((before[key] == after[key]).all() for key in before)
    with pytest.raises(UserError, match="step 17 is not a step of decision; the next is 20"):
        ray.get(actor.set_weights.remote("s", 17, None))
    assert np.unique(after["source"]).tolist() == [0, 1]


def test_what_a_user_can_put_right_is_told_as_it_was_raised(tmp_path: Path) -> None:
    """A resume on other data, found in the actor, as Ray hands it on: by itself, and through tasks
    that asked for it, whose errors are no `UserError`s any more."""
    state = Mixture.opened(stage(manifest="other"), 1, None).state(5)
    with pytest.raises(UserError) as refused:
        asyncio.run(MixtureActor(str(tmp_path)).open("s", stage(), state))
    error: Any = refused.value
    for name in ("open", "plan", "read", "get"):
        error = RayTaskError(name, f"ray::{name}()\nTraceback", error, ip="127.0.0.1")
        for each in (error, error.as_instanceof_cause()):
            said = told(each)
            assert said is not None and said.startswith("resume: the prepared data was other when")
            assert len(said.splitlines()) == 1


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_name_may_be_taken_again_at_once(tmp_path: Path) -> None:
    """As when a run follows a run in one driver: the actor of the first may still be going."""
    import ray

    for number in range(4):
        actor = mixture_actor("mixture-again", str(tmp_path), patience=7.5)
        assert ray.get(actor.open.remote("s", stage()), timeout=60) == number + 1
        assert ray.get(actor.__ray_call__.remote(lambda self: self._patience)) == 7.5
        del actor
