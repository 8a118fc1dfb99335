"""What a stage's influence is measured on: held-out rows of the probe domains, rows of the sources.

The mathematics and the hook are in `bitray.training`.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from bitray.data.packing import PackedRows
from bitray.data.permutation import key_of, place
from bitray.data.shards import Shards, held_out
from bitray.models.batch import Batch
from bitray.pipeline.config import Config
from bitray.settings import UserError
from bitray.training.influence import Decide, Influence, Material

FEW = 10
"""Updates below which remixing hardly gets anywhere: weights go a fifth of the way in each."""


def remixing(
    config: Config,
    stage: str,
    shards: Shards,
    *,
    on_decision: Decide,
    current: Callable[[int], Mapping[str, float]],
    say: Callable[[str], None],
) -> Influence | None:
    """The hook of a stage, at its start; None where influence is off."""
    interval, shares = config.influence_interval(stage), config.data.shares()
    if interval is None:
        return None
    return Influence(
        settings=config.stages[stage].influence,
        interval=interval,
        material=Material(_probes(config, stage, shards), _groups(config, stage, shards)),
        weights={name: shares[name] for name in config.data.remixed()},
        on_decision=on_decision,
        current=current,
        say=say,
    )


def schedule_of_mixture(config: Config, stage: str) -> list[str]:
    """When the mixture of a stage changes, a line for each way."""
    settings, interval = config.stages[stage], config.influence_interval(stage)
    lines = []
    for phase in settings.curriculum.phases if settings.total_steps else ():
        said = [f"{name} {weight:g}" for name, weight in phase.weights.items()]
        said += [f"{name} {weight:g}" for name, weight in (phase.mixture or {}).items()]
        name = f" {phase.name}" if phase.name else ""
        lines.append(
            f"phase     {stage}{name} until {phase.until:.0%}: {', '.join(said) or 'as set'}"
        )
    if interval:
        given = settings.influence
        updates = given.updates(interval, settings.total_steps)
        lines.append(
            f"influence {stage}: {given.method}, {updates} decisions, the first at step "
            f"{given.first(interval)}, then every {interval}; probes: "
            f"{', '.join(config.probes(stage)) or 'none'}"
        )
    return lines


def few_updates(config: Config, stage: str) -> str | None:
    """A sentence where a stage is too short for its influence to get anywhere."""
    interval, settings = config.influence_interval(stage), config.stages[stage]
    if interval is None:
        return None
    first, count = settings.influence.first(interval), settings.influence.updates
    updates = count(interval, settings.total_steps)
    if updates >= FEW:
        return None
    return (
        f"influence: only {updates} updates fit into {settings.total_steps} steps (the first at "
        f"step {first}, then every {interval}); lower influence.warmup_steps or .update_interval"
    )


def _probes(config: Config, stage: str, shards: Shards) -> dict[str, Batch]:
    """Fixed held-out rows of each domain, as many of each of its sources."""
    probes = {}
    for domain, sources in config.probes(stage).items():
        rows = -(-config.stages[stage].influence.probe_rows // len(sources))
        found = [part for s, part in held_out(shards, "probe", rows).items() if s in sources]
        if not found:
            raise UserError(
                f"stages.{stage}.influence: the probe domain '{domain}' has no held-out document; "
                "raise data.split.probe, give more text, or leave it out of influence.probes"
            )
        probes[domain] = PackedRows.joined(found).batch()
    return probes


def _groups(config: Config, stage: str, shards: Shards) -> Callable[[str, int], Sequence[Batch]]:
    """Rows of a source for the n-th decision: its next ones in an order of their own."""
    settings = config.stages[stage].influence
    size = settings.groups * settings.group_rows

    def groups(source: str, number: int) -> list[Batch]:
        cursor = number * size + np.arange(size)
        # of the opening, so that they do not depend on how far preparing has come
        total = np.full(size, shards.manifest.sources[source].opened("train").rows)
        key = np.full(size, key_of(config.data.seed, "influence", stage, source))
        rows = shards.read(source, "train", place(cursor, total, key, shards.manifest.window)[1])
        each = settings.group_rows
        return [rows.part(at, at + each).batch() for at in range(0, size, each)]

    return groups
