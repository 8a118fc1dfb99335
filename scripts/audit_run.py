"""Did a run keep its promises? Checks offline, from what lies in the run's folder alone.

1. Every ticket is committed at most once per lineage, without holes. 2. Checkpoints that count
verify, and every start continued from the newest of them. 3. Decisions about the mixture are
ordered, lead by what was promised and stay within their bounds. 4. One writer: epochs of the lease
never fall. 5. Tokens trained are the sum over the rows. 8. Every attempt says how it ended, and why
if it failed; one that was killed could not. 9. No secret of this environment is in any text. (The
numbers are those of the invariants in the design.) Exit status 1 if any is broken or something
cannot be read, with a sentence for each place; 2 where there is no run.
"""

import argparse
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bitray import checkpoint, lease, storage
from bitray.data.manifest import read_manifest
from bitray.data.mixture import PHASE, Mixture
from bitray.data.shards import Shards
from bitray.data.weights import UNIT
from bitray.events import FOLDER, read_events
from bitray.pipeline.report import read_metrics
from bitray.settings import UserError

SECRET = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|API_KEY|ACCESS_KEY|CREDENTIALS?)(_|$)")
LEAST_SECRET = 8
"""Shorter values would be found everywhere."""
BINARY = (".distcp", ".gguf", ".safetensors", ".arrow", ".metadata", ".wandb", ".png", ".pt")
CHUNK = 4096
CLOCKS_S = 2.0
"""How far clocks of two machines may lie apart before an event counts as late."""
ENDINGS = ("end", "stop", "failed")
Event = dict[str, Any]


def audit(run_dir: str, rows: bool = True) -> list[str]:
    """A sentence for every violation that is found; `rows` reads the prepared rows again.
    `UserError` where there is no run."""
    if not storage.exists(storage.join(run_dir, FOLDER)):
        raise UserError(_no_run(run_dir))
    found = list(_secrets(run_dir))
    try:
        events = read_events(run_dir)
    except UserError as error:
        return [*found, f"{error}; so nothing else was checked"]
    found += _told(run_dir, _writers(run_dir, events))
    found += _told(run_dir, _endings(run_dir, events))
    for folder in _stages(run_dir):
        stage = folder.rpartition("/")[2].removesuffix("_checkpoint")
        root, uri = (
            storage.join(folder, "checkpoints"),
            storage.join(run_dir, "mixture", f"{stage}.json"),
        )
        mine = [event for event in events if event.get("stage") == stage]
        states = dict(_states(root))
        found += _told(root, _checkpoints(root, mine))
        found += _told(root, _starts(stage, root, mine, _lineages(events)))
        found += _told(run_dir, _tickets(run_dir, stage, states, mine))
        found += _told(
            uri, _mixture(uri, lease.newest_epoch(run_dir), states, mine if rows else [])
        )
    return found


def _no_run(run_dir: str) -> str:
    below = storage.list_dirs(run_dir) if storage.exists(run_dir) else []
    runs = [one for one in below if storage.exists(storage.join(one, FOLDER))]
    hint = f"; there are {', '.join(runs)}" if runs else ""
    return f"{run_dir}: there is no run, for it has no {FOLDER}/{hint}"


def _told(where: str, check: Iterable[str]) -> Iterator[str]:
    """What a check finds. What it cannot read is a violation, too."""
    try:
        yield from check
    except UserError as error:
        yield str(error)
    except (KeyError, TypeError, ValueError) as error:
        yield f"{where}: holds what no run writes: {error!r}"


def _stages(run_dir: str) -> list[str]:
    return [one for one in storage.list_dirs(run_dir) if one.endswith("_checkpoint")]


def _states(root: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The JSON of every checkpoint that can be read, in the order of their steps."""
    readable = {}
    for directory in storage.list_dirs(root):
        if checkpoint.is_complete(directory):
            try:
                readable[directory] = checkpoint.load_state(directory)
            except UserError:
                continue  # `_checkpoints` tells
    yield from sorted(readable.items(), key=lambda one: one[1]["position"]["step"])


def _lineages(events: list[Event]) -> list[float]:
    """When another lineage began: a fork, or a start afresh."""
    turns, last = [], 1
    for event in events:
        if event["kind"] == "fresh" or event.get("lineage", last) != last:
            turns.append(event["time"])
        last = event.get("lineage", last)
    return turns


# ------------------------------------------------------------------------------------- one writer


def _writers(run_dir: str, events: list[Event]) -> Iterator[str]:
    """Invariant 4, as far as events tell it."""
    newest, begins = lease.newest_epoch(run_dir), dict[int, float]()
    for event in events:
        epoch = event["epoch"]
        if epoch > newest:
            yield f"{event['file']}: epoch {epoch} was never leased; the newest is {newest}"
        if event["kind"] == "lease":
            if event["epoch"] in begins:
                yield f"{event['file']}: epoch {event['epoch']} has two drivers"
            begins[event["epoch"]] = event["time"]
    for event in events:
        if event["kind"] not in ("checkpoint", "removed", "decision"):
            continue
        taken = [epoch for epoch, at in begins.items() if event["time"] > at + CLOCKS_S]
        if taken and max(taken) > event["epoch"]:
            yield (
                f"{event['file']}: a {event['kind']} of epoch {event['epoch']} was written after "
                f"epoch {max(taken)} had begun"
            )


# --------------------------------------------------------------------------------------- endings


def _endings(run_dir: str, events: list[Event]) -> Iterator[str]:
    """Invariant 8, as far as a driver can tell: nobody writes that he was killed."""
    ended = {event["epoch"]: event for event in events if event["kind"] in ENDINGS}
    for event in events:
        epoch = event["epoch"]
        if event["kind"] == "failed" and not event.get("reason"):
            yield f"{event['file']}: epoch {epoch} failed, and does not say why"
        if event["kind"] != "lease" or epoch in ended:
            continue
        if lease.released(run_dir, epoch):
            yield f"{event['file']}: epoch {epoch} is over, and does not say how it ended"
        else:
            print(f"note: the driver of epoch {epoch} goes on, or was killed")


# ------------------------------------------------------------------------------- checkpoints


def _checkpoints(root: str, events: list[Event]) -> Iterator[str]:
    """Invariant 2: what counts is whole, and nothing went before a newer one was there."""
    known_bad = {event["directory"] for event in events if event["kind"] == "passed_over"}
    for directory in storage.list_dirs(root):
        counts = checkpoint.is_complete(directory) and directory not in known_bad
        if counts and (problem := checkpoint.verify(directory)):
            yield problem
    saved = {event["directory"] for event in events if event["kind"] == "checkpoint"}
    for event in events:
        if event["kind"] == "removed" and event["newest"] not in saved:
            yield f"{event['file']}: checkpoints went for {event['newest']}, which was never saved"


def _starts(stage: str, root: str, events: list[Event], turns: list[float]) -> Iterator[str]:
    """Invariants 1 and 2: every start continues from the newest checkpoint that counts."""
    newest, bad, turn = 0, set[str](), 0
    for event in events:
        while turn < len(turns) and event["time"] >= turns[turn]:
            newest, bad, turn = 0, set(), turn + 1
        at = event.get("step", 0)
        if event["kind"] == "passed_over":
            bad.add(event["directory"])
        elif event["kind"] == "resume":
            directory = event["directory"]
            own = directory is not None and directory.startswith(root)
            if own and at and directory != checkpoint.step_directory(root, at):
                yield f"{event['file']}: '{stage}' started at step {at} from {directory}"
            lost = [d for d in bad if d > (directory or "")]
            if at < newest and not lost and (own or directory is None):
                yield (
                    f"{event['file']}: '{stage}' started at step {at}, though a checkpoint of step "
                    f"{newest} was saved before: its tickets were taken twice"
                )
            newest = at if own or directory is None else newest
        elif event["kind"] == "checkpoint":
            if at < newest:
                yield f"{event['file']}: '{stage}' saved step {at} after step {newest}"
            if event["directory"].startswith(f"{root}/step_"):
                newest = at


# ------------------------------------------------------------------------------------ tickets


def _tickets(
    run_dir: str, stage: str, states: Mapping[str, Any], events: list[Event]
) -> Iterator[str]:
    """Invariant 1: each step stands once in the metrics, none is left out, tokens only grow and
    are those of the checkpoints."""
    uri = storage.join(run_dir, "metrics.jsonl")
    lines = [line for line in read_metrics(run_dir) if line["stage"] == stage]
    trained = [line for line in lines if "train/tokens" in line]
    starts = [event for event in events if event["kind"] == "resume"]
    if not trained or not starts:
        return
    every = max(event["log_every"] for event in starts)
    first = starts[0]["step"]  # above 0 where another run's checkpoint was taken
    steps, tokens = [first], {}
    for line in trained:
        step, before = line["step"], steps[-1]
        if step <= before:
            yield f"{uri}: '{stage}' has step {step} after step {before}: it was trained twice"
        elif step - before > every:
            yield f"{uri}: '{stage}' has no step between {before} and {step}, at one in {every}"
        if tokens and line["train/tokens"] < tokens[before]:
            yield f"{uri}: '{stage}' has fewer tokens at step {step} than at step {before}"
        steps.append(step)
        tokens[step] = line["train/tokens"]
    for directory, state in states.items():
        position = state["position"]
        there = tokens.get(position["step"], position["tokens"])
        if there != position["tokens"]:
            yield f"{directory}: holds {position['tokens']} tokens, metrics say {there:.0f}"
        if position["step"] > steps[-1]:
            yield f"{directory}: is of step {position['step']}, metrics end at step {steps[-1]}"


def _states_follow(states: Mapping[str, Any], mixture: Mapping[str, Any]) -> Iterator[str]:
    """Invariants 1 and 4: places in the data agree with steps, and epochs never fall."""
    last = 0
    journal = [{**entry, "notes": 0, "epoch": 0} for entry in mixture["journal"]]
    for directory, state in states.items():
        data, epoch = state["data"], state.get("epoch", 0)
        if epoch < last:
            yield f"{directory}: was written under epoch {epoch}, after one of epoch {last}"
        last = max(last, epoch)
        if data is None:
            continue
        if data["next_row"] != data["step"] * data["rows_per_step"]:
            yield f"{directory}: goes on at row {data['next_row']}, which is not its step's"
        held = [{**entry, "notes": 0, "epoch": 0} for entry in data["journal"]]
        if held != journal[: len(held)]:
            yield f"{directory}: its journal is no beginning of the run's"


# ------------------------------------------------------------------------------------ the mixture


def _mixture(
    uri: str, newest: int, states: Mapping[str, Any], events: list[Event]
) -> Iterator[str]:
    """What the journal of a stage says, and what follows from it."""
    if not storage.exists(uri):
        return
    values = storage.read_json(uri)
    yield from _journal(uri, values, newest)
    yield from _states_follow(states, values)
    if states:
        yield from _tokens(Mixture.from_json(values), states, events)


def _journal(uri: str, values: Mapping[str, Any], newest: int) -> Iterator[str]:
    """Invariants 3 and 4."""
    stage, journal = values["stage"], values["journal"]
    size = stage["rows_per_ticket"] * stage["tickets_per_step"]
    low, high = stage["bounds"]
    for number, entry in enumerate(journal):
        where = f"{uri}, entry {number}"
        if sum(entry["weights"]) != UNIT:
            yield f"{where}: the weights sum to {sum(entry['weights'])} of {UNIT}"
        if entry["epoch"] > newest:
            yield f"{where}: epoch {entry['epoch']} was never leased; the newest is {newest}"
        if number == 0:
            continue
        before = journal[number - 1]
        for name in ("step", "first_row", "version", "epoch"):
            if entry[name] < before[name]:
                yield f"{where}: {name} {entry[name]} comes after {before[name]}"
        if PHASE in entry["notes"]:
            continue
        least = (entry["step"] + stage["lead"]) * size
        if entry["first_row"] < least:
            yield (
                f"{where}: decided at step {entry['step']}, it holds from row "
                f"{entry['first_row']}, before row {least}: tickets may have been issued"
            )
        shares = np.array(entry["weights"]) / UNIT
        changed = entry["version"] > before["version"]
        if changed and (shares.min() < low - 1e-6 or shares.max() > high + 1e-6):
            yield f"{where}: weights {shares.round(4).tolist()} are not within {low} and {high}"


def _tokens(mixture: Mixture, states: Mapping[str, Any], events: list[Event]) -> Iterator[str]:
    """Invariant 5: the tokens of every checkpoint are those of the rows that the plan gives."""
    starts = [event for event in events if event["kind"] == "resume"]
    if not starts or starts[0]["step"] or any(e["step"] != e["data_step"] for e in starts):
        return  # begun elsewhere, or told to count afresh
    manifest = read_manifest(starts[-1]["prepared"])
    if manifest is None:
        print(f"note: {starts[-1]['prepared']} is not there, so tokens are not summed")
        return
    shards, plan = Shards(starts[-1]["prepared"], manifest), mixture.plan
    size, total, done = mixture.stage.rows_per_step, 0, 0
    for directory, state in states.items():
        until = state["position"]["step"] * size
        for first in range(done, until, CHUNK):
            total += _tokens_of(shards, plan, first, min(CHUNK, until - first))
        done = max(done, until)
        if total != state["position"]["tokens"]:
            yield (
                f"{directory}: counts {state['position']['tokens']} tokens, and its rows have "
                f"{total}"
            )


def _tokens_of(shards: Shards, plan: Any, first: int, count: int) -> int:
    rows, total = plan.rows(first, count), 0
    for number, name in enumerate(plan.sources):
        mine = rows.row[rows.source == number]
        total += sum(sum(lengths) for lengths in shards.read(name, "train", mine).lengths)
    return total


# ------------------------------------------------------------------------------------ secrets


def _secrets(run_dir: str) -> Iterator[str]:
    """Invariant 9: values of variables that are secret by their names, in any text of the run."""
    secrets = {
        name: value.encode()
        for name, value in os.environ.items()
        if SECRET.search(name) and len(value) >= LEAST_SECRET and not Path(value).exists()
    }
    for found in storage.list_files(run_dir) if secrets else ():
        if found.uri.endswith(BINARY):
            continue
        content = storage.read_bytes(found.uri)
        for name, value in secrets.items():
            if value in content:
                yield f"{found.uri}: holds the value of {name}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir")
    parser.add_argument("--no-rows", action="store_true", help="do not sum the tokens of all rows")
    said = parser.parse_args()
    run_dir = storage.absolute(said.run_dir)
    try:
        found = audit(run_dir, rows=not said.no_rows)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    for sentence in found:
        print(f"violation: {sentence}")
    print(f"{run_dir}: {len(_stages(run_dir))} stages, {len(found)} violations")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
