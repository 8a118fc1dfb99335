"""Submit a job of bitray to a Ray cluster, under a name that tells the run and the attempt.

    python scripts/submit.py [--address http://127.0.0.1:8265] [--env NAME=VALUE] [--python PATH]
                             [--no-wait] jobs/pretrain.py scaling=fsdp_multi output_dir=s3://b/runs

It is `ray job submit --working-dir . --submission-id RUN-ATTEMPT --metadata-json '{"run": RUN}'
--runtime-env-json ... -- python jobs/pretrain.py ...`: Ray refuses a submission id that was used
before, so every attempt counts on. A second job for the same run or sweep is refused while the
first goes on. What `.gitignore` and `.rayignore` name is not uploaded.
`python` is the one on the PATH of the cluster's head, unless `--python` names another, for driver
and workers. The token of a cluster is taken from RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or
~/.ray/auth_token, with RAY_AUTH_MODE=token.
"""

import argparse
import asyncio
import re
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ray.job_submission import JobStatus, JobSubmissionClient

from bitray import Config
from bitray.pipeline.cli import parsed
from bitray.pipeline.smoke import Smoke
from bitray.settings import UserError
from bitray.tuning import SearchSpace

STOP_SECONDS = "300"
"""What `ray job stop` leaves a run for its last checkpoint; Ray's own: 3."""
START_SECONDS = 300.0


class Name(NamedTuple):
    """Of a job."""

    text: str
    alone: bool
    """Whether it writes a folder in which nobody else may write meanwhile."""


def name_of(job: str, words: Sequence[str]) -> Name:
    """The folder's name of a run or a sweep; what holds neither goes by what it does."""
    stem = Path(job).stem
    if stem not in ("pretrain", "prepare", "smoke", "tune"):
        return Name(stem, alone=False)
    said = parsed(words, dry_run=True, preview=True, analyze_only=True)
    if said.analyze_only:
        return Name(f"analyze_{Path(said.analyze_only).name}", alone=False)
    if stem == "tune":
        path, *own = said.words or [""]
        folder = SearchSpace.load(path or None, own).config().experiment or Path(path).stem
    else:
        kind = Smoke if stem == "smoke" else Config
        folder = kind.load(said.config, said.words).run_dir.rpartition("/")[2]
    if stem == "prepare" or said.dry_run:
        return Name(f"{'dry_run' if said.dry_run else stem}_{folder}", alone=False)
    return Name(folder, alone=True)


def attempt_of(client: JobSubmissionClient, name: Name) -> int:
    """The number of the next attempt; `UserError` if one goes on that is to be alone."""
    pattern, attempts = re.compile(re.escape(name.text) + r"-(\d+)$"), [0]
    for job in client.list_jobs():
        if found := pattern.match(job.submission_id or ""):
            attempts.append(int(found[1]))
            if name.alone and not job.status.is_terminal():
                raise UserError(
                    f"{name.text} is being driven by job {job.submission_id} ({job.status}); "
                    f"`ray job stop {job.submission_id}` ends it with a checkpoint"
                )
    return max(attempts) + 1


def submitted(client: JobSubmissionClient, **job: Any) -> str:
    """Submit a job; its id. A cluster that has just started has nobody yet who takes it."""
    end, told = time.monotonic() + START_SECONDS, False
    while True:
        try:
            return str(client.submit_job(**job))
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > end:
                raise
            if not told:
                print(f"waiting up to {START_SECONDS:g} s for the head to take jobs", flush=True)
                told = True
            time.sleep(1)


async def follow(client: JobSubmissionClient, submission: str) -> int:
    """Print what the job prints; its exit code."""
    async for lines in client.tail_job_logs(submission):
        print(lines, end="", flush=True)
    info = client.get_job_info(submission)
    if info.status == JobStatus.SUCCEEDED:
        return 0
    return info.driver_exit_code or 1


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--address", help="of the dashboard; else as `ray job submit` finds it")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--python", metavar="PATH", help="the cluster's interpreter")
    parser.add_argument("--no-wait", action="store_true", help="do not follow the job")
    parser.add_argument("job", help="jobs/NAME.py")
    parser.add_argument("words", nargs=argparse.REMAINDER, help="the job's own arguments")
    said = parser.parse_args()
    name = name_of(said.job, said.words)
    client = JobSubmissionClient(said.address)
    attempt = attempt_of(client, name)
    variables = dict(pair.split("=", 1) for pair in said.env)
    runtime = {
        "working_dir": str(Path(__file__).parent.parent),
        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": STOP_SECONDS, "PYTHONUNBUFFERED": "1"} | variables,
        **({"py_executable": said.python} if said.python else {}),
    }
    submission = submitted(
        client,
        entrypoint=shlex.join([said.python or "python", said.job, *said.words]),
        submission_id=f"{name.text}-{attempt}",
        runtime_env=runtime,
        metadata={"run": name.text, "attempt": str(attempt)},
    )
    print(f"submitted {submission}", flush=True)
    return 0 if said.no_wait else asyncio.run(follow(client, submission))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (UserError, ConnectionError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
