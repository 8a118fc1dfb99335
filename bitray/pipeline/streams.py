"""The streams of a run: what each stage is to train on, and where in it.

Ray Train's controller asks for the place; so nothing is imported here that only workers need.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from bitray import checkpoint
from bitray.data.manifest import Manifest
from bitray.data.mixture import Mixture, StageMixture
from bitray.data.plan import SourceSize
from bitray.data.stream import TicketStream
from bitray.data.tickets import least_lead
from bitray.pipeline.config import Config
from bitray.pipeline.folders import resume_point, skipped_by_name, taken_over
from bitray.pipeline.groups import RowKind
from bitray.retries import patient
from bitray.settings import UserError

BUNDLE = 32
"""Tickets that travel together to a worker, at most."""
LEAD = 16
"""Steps that a decision about the mixture leads by. Many workers get smaller bundles instead of
earlier decisions, so that the rows after a decision do not depend on how many workers there are;
only with more than LEAD / 2 workers to a ticket there is no such bundle."""


def stage_mixture(config: Config, stage: str, manifest: Manifest) -> StageMixture:
    """What a stage trains on; its sources continue where those of the stage before it end."""
    settings, scaling = config.stages[stage], config.scaling_of(stage)
    trained = [name for name, each in config.stages.items() if each.total_steps]
    before = trained[: trained.index(stage)]
    influence, interval = settings.influence, config.influence_interval(stage)
    bounds = (influence.min_weight, influence.max_weight)
    tickets, workers = settings.gradient_accumulation_steps, scaling.most
    # Training begins when the first bundle of every worker can be planned: well within a window.
    early = manifest.window // (4 * settings.batch_size * workers)
    bundle = max(1, min(BUNDLE, early, LEAD // 2 * tickets // workers))
    weights, *phases = _phases(config, stage)
    return StageMixture(
        seed=config.data.seed,
        manifest=manifest.identity(),
        sizes=manifest.sizes(),
        parts=manifest.parts,
        length=manifest.length,
        weights=weights[1],
        phases=tuple(phases),
        max_epochs=config.data.epochs() or None,
        steps=settings.total_steps,
        rows_per_ticket=settings.batch_size,
        tickets_per_step=tickets,
        bundle=bundle,
        max_workers=workers,
        lead=max(LEAD, least_lead(bundle, workers, tickets)),
        period=interval,
        first_decision=influence.first(interval) if interval else None,
        bounds=bounds if interval else (0.0, 1.0),
        after=before[-1] if before and before[-1] not in skipped_by_name(config) else None,
    )


def _phases(config: Config, stage: str) -> list[tuple[int, dict[str, float]]]:
    """First step and mixture of every phase of a stage that has another one than the last."""
    settings, shares = config.stages[stage], config.data.shares()
    phases, ends = settings.curriculum.phases, settings.curriculum.ends(settings.total_steps)
    found = [] if phases else [(0, shares)]
    for first, end, phase in zip([0, *ends], ends, phases, strict=False):
        mixture = shares if phase.mixture is None else phase.mixture
        if end > first and not (found and found[-1][1] == mixture):
            found.append((first, mixture))
    return found


def grown(
    flows: Mapping[str, TicketStream], sizes: Mapping[str, dict[str, SourceSize]]
) -> dict[str, TicketStream]:
    """The streams with what there is by now of the sources of each manifest."""
    mixtures = {
        name: replace(flow.mixture, sizes=sizes[flow.mixture.manifest])
        for name, flow in flows.items()
    }
    return {name: replace(flows[name], mixture=mixture) for name, mixture in mixtures.items()}


def check_enough(flows: Mapping[str, TicketStream]) -> None:
    """`UserError` if `max_epochs` leaves a stage too few rows, as far as can be known by now."""
    opened: dict[str, Mixture] = {}
    for name, flow in flows.items():
        stage = flow.mixture
        cursors = opened[stage.after].continued(stage) if stage.after in opened else None
        try:
            opened[name] = Mixture.opened(stage, 0, None, cursors)
        except UserError as error:
            raise UserError(f"stages.{name}: {error}") from None


def streams(
    config: Config,
    manifests: Mapping[RowKind, Manifest],
    prepared: Mapping[RowKind, str],
    actor: str,
) -> dict[str, TicketStream]:
    """The stream of every stage that takes steps."""
    return {
        name: TicketStream(
            name=name,
            mixture=stage_mixture(config, name, manifests[RowKind.of(stage)]),
            prepared=prepared[RowKind.of(stage)],
            actor=actor,
            readers=config.scaling_of(name).readers,
            reader_cpus=config.scaling_of(name).cpus_per_reader,
            labels=config.scaling_of(name).data_labels,
            patience=config.resume.storage_patience,
        )
        for name, stage in config.stages.items()
        if stage.total_steps
    }


def data_state(config: Config, stage: str, epoch: int) -> dict[str, Any] | None:
    """Where a stage's data is to continue; asked at every start of the workers of an epoch."""
    with patient(config.resume.storage_patience):
        found = resume_point(config, stage)
        if found is None or not taken_over(config, stage, found, epoch).continues_data:
            return None
        held: dict[str, Any] | None = checkpoint.load_state(found)["data"]
        return held
