"""Runs whose storage, numbers or owners fail: each ends as an undisturbed one does, or stops with a
sentence and is continued by the same command."""

import json
import math
import random
import re
import shutil
import string
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from audit_run import audit
from flaky_s3 import FlakyS3
from road import TRAINED, Road, differing, drive, weights

from bitray import Config, checkpoint, storage
from bitray.data.plan import MixturePlan, opening
from bitray.events import read_events
from bitray.models.loading import load_tokenizer
from bitray.pipeline.run import run
from bitray.retries import patient

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1800)]


def test_a_run_survives_storage_that_fails_and_storage_that_is_gone(
    road: Road, words: Callable[..., list[str]], proxy: FlakyS3, s3: str, tmp_path: Path
) -> None:
    """30 % of all requests fail throughout. After a checkpoint nobody answers: the run stops in
    good order, and the same command ends bit-equal to a run on a disk."""
    said = [f"output_dir={s3}/runs", "resume.storage_patience=20"]
    command = [*words("undisturbed"), *said]
    root = f"{s3}/runs/undisturbed/stage0_checkpoint/checkpoints"
    log = tmp_path / "log.txt"
    proxy.rate = 0.3
    driver = drive(command, log)
    try:
        end = time.monotonic() + 500
        while not checkpoint.is_complete(f"{root}/step_000008"):
            assert driver.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
            time.sleep(0.2)
        proxy.rate = 1.0
        assert driver.wait(300) == 2, log.read_text()[-3000:]
        text = log.read_text()
        assert "Traceback" not in text
        (told,) = re.findall(r"^error: .*", text, re.MULTILINE)
        assert "not answer" in told, told
        proxy.rate = 0.3
        driver = drive(command, log)
        assert driver.wait(600) == 0, log.read_text()[-3000:]
    finally:
        if driver.poll() is None:
            driver.kill()
    proxy.rate = 0.0
    starts = re.findall(r"stage0 +continues from .*, step (\d+)/20", log.read_text())
    assert starts and int(starts[0]) >= 8
    for stage in TRAINED:
        final = f"{s3}/runs/undisturbed/{stage}_checkpoint/checkpoints/final"
        assert not differing(weights(final), weights(road.final(stage)))
    assert audit(f"{s3}/runs/undisturbed") == []
    assert storage.read_json(f"{s3}/runs/undisturbed/evaluations.json") == road.json(
        "evaluations.json"
    )


def test_rows_that_vanish_in_mid_run_are_named_and_once_they_are_back_it_goes_on(
    words: Callable[..., list[str]], s3: str, tmp_path: Path
) -> None:
    """Prepared rows in object storage, of which a source goes while the first stage trains: what is
    known is trained on, and the stage that has to read anew says what is missing."""
    said = words("vanishing", f"data.prepared_dir={s3}/prepared", "scaling.num_workers=1")
    folder = Path(said[0].removeprefix("output_dir=")) / "vanishing"
    log, gone = tmp_path / "log.txt", {}
    (tmp_path / "cache").mkdir()
    driver = drive(said, log, TMPDIR=str(tmp_path / "cache"), RAY_TMPDIR="/tmp")
    try:
        end = time.monotonic() + 300
        while not list(folder.glob("stage0_checkpoint/checkpoints/step_*/COMPLETE")):
            assert driver.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
            time.sleep(0.05)
        for file in storage.list_files(f"{s3}/prepared"):
            if "/prose/" in file.uri:
                gone[file.uri] = storage.read_bytes(file.uri)
                storage.remove(file.uri)
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        assert gone and driver.wait(300) == 2, log.read_text()[-3000:]
        text = log.read_text()
        assert "Traceback" not in text
        (told,) = re.findall(r"^error: .*", text, re.MULTILINE)
        assert any(uri in told for uri in gone), told
        for uri, content in gone.items():
            storage.write_bytes(uri, content)
        driver = drive(said, log)
        assert driver.wait(600) == 0, log.read_text()[-3000:]
    finally:
        if driver.poll() is None:
            driver.kill()
    assert audit(str(folder)) == []


def test_gradients_that_stay_infinite_stop_a_run_after_a_second_try(
    words: Callable[..., list[str]], tmp_path: Path
) -> None:
    """A learning rate that no model survives: back to the last checkpoint once, then a sentence."""
    log = tmp_path / "log.txt"
    more = ["training.max_skipped_steps=2", "stages.stage0.optimizer.lr=1e30",
            "training.max_grad_norm=null", "stages.stage0.max_steps=20"]  # fmt: skip
    driver = drive([*words("infinite", *more)], log)
    try:
        assert driver.wait(600) == 2, log.read_text()[-3000:]
    finally:
        if driver.poll() is None:
            driver.kill()
    text = log.read_text()
    assert "once more from the last checkpoint" in text and "Traceback" not in text
    assert re.search(r"^error: stage0, step \d+: the gradient was not finite for 2", text, re.M)


def test_a_spike_of_the_loss_is_gone_back_before_and_what_led_to_it_is_left_out(
    words: Callable[..., list[str]], ray_cluster: None, tmp_path: Path
) -> None:
    """One document of noise among copies of another: both workers start again from the checkpoint
    before it, and the steps from there to it are drawn and not trained on."""
    draw = random.Random(1)
    noise = " ".join("".join(draw.choices(string.ascii_letters, k=9)) for _ in range(4))
    texts = [f"{n} " + "one two three four five six seven eight nine ten " * 6 for n in range(600)]
    texts[100] = noise
    lines = [json.dumps({"text": text}) for text in texts]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    other = ("stages.", "export.", "data.sources.")
    config = Config.load(
        overrides=[
            "training=stage0_pretrain", "data=local", f"data.sources.text.path={tmp_path}",
            *(word for word in words("spiked") if not word.startswith(other)),
            "training.max_steps=80", "training.optimizer.lr=3e-3",
            "training.loss_spike.rewind=true", "training.loss_spike.warmup_steps=8",
            "training.loss_spike.ema=0.7",
        ]
    )  # fmt: skip
    found = Road(config, run(config))
    (spike,) = [each for each in read_events(config.run_dir) if each["kind"] == "loss_spike"]
    first, last = spike["tickets"]
    plan = MixturePlan(config.data.seed, found.sizes, [opening(found.sizes, {"text": 1.0}, {})])
    size = config.stages["stage0"].batch_size
    rows = plan.rows(first * size, (last + 1 - first) * size).row
    tokenizer = load_tokenizer(found.final("stage0"))
    ids = found.shards.read("text", "train", rows).input_ids
    assert noise in " ".join(tokenizer.batch_decode(ids)), "the step had the noise in it"
    left_out = spike["left_out"]
    assert left_out[0] % 4 == 0 and left_out[-1] == spike["step"]
    losses = [float(loss) for loss in found.metrics("stage0")]
    assert [step for step in range(80) if math.isnan(losses[step])] == left_out
    assert max(losses[left_out[-1] + 1 :]) < spike["loss"] / 2
    assert audit(config.run_dir) == []


def test_a_second_driver_is_refused_while_the_first_goes_on(
    words: Callable[..., list[str]], tmp_path: Path
) -> None:
    """It names the holder; the first notices nothing."""
    folder = Path(words("held")[0].removeprefix("output_dir=")) / "held"
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    said = words("held", "scaling.num_workers=1", "stages.stage0.max_steps=60")
    first = drive(said, one)
    try:
        end = time.monotonic() + 300
        while not list(folder.glob("stage0_checkpoint/checkpoints/step_*/COMPLETE")):
            assert first.poll() is None and time.monotonic() < end, one.read_text()[-3000:]
            time.sleep(0.05)
        second = drive(said, two)
        assert second.wait(120) == 2
        told = rf"error: {folder}: is being written by process {first.pid} on .* heartbeat is \d+ s"
        assert re.search(told, two.read_text())
        assert first.wait(600) == 0, one.read_text()[-3000:]
    finally:
        for each in (first,):
            if each.poll() is None:
                each.kill()
    with patient(5.0):
        assert audit(str(folder)) == []
