"""The Ray job: the same bytes as in one process, done once, and errors in one sentence."""

import json
import time
from pathlib import Path

import pytest

from bitray.data import DataSettings, train_tokenizer
from bitray.data.job import TOKENIZER, plan_job
from bitray.data.preparation import run_job
from bitray.data.prepare import on_ray, prepare
from bitray.data.units import in_process
from bitray.settings import UserError

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

TEXTS = [f"document {k} of many, {k * k} " + "word " * (k % 40) for k in range(400)]
TOKENIZER_OF_TEXTS = train_tokenizer(TEXTS, 265)


@pytest.fixture
def tokenizer(tmp_path) -> str:
    folder = tmp_path / "tokenizer"
    TOKENIZER_OF_TEXTS.save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')  # a model's folder
    return str(folder)


@pytest.fixture
def data(tmp_path) -> DataSettings:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for k in range(4):
        rows = [json.dumps({"text": text}) + "\n" for text in TEXTS[k::4]]
        (folder / f"{k}.jsonl").write_text("".join(rows))
    sources = {
        "files": {"path": str(folder)},
        "sums": {"type": "embedded", "domain": "arithmetic", "max_documents": 200},
    }
    return DataSettings(sources=sources, unit_bytes=8_000)


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_it_does_its_work_once_and_as_one_process_would(data, tokenizer, tmp_path, capsys):
    root, alone = tmp_path / "root", tmp_path / "alone"
    manifest = prepare(data, tokenizer, 64, str(root))
    assert "tokens/s" in capsys.readouterr().out
    run_job(plan_job(data, TOKENIZER_OF_TEXTS, 64, str(alone)), in_process)
    assert contents(root) == contents(alone)
    assert len(list(root.glob("files/unit-*.json"))) > 2

    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert prepare(data, tokenizer, 64, str(root)) == manifest
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before
    assert plan_job(data, TOKENIZER_OF_TEXTS, 64, "").identity == manifest.identity()
    with pytest.raises(UserError, match="length differs"):
        prepare(data, tokenizer, 32, str(root))


def test_a_damaged_file_stops_it_with_one_sentence_and_loses_nothing(data, tokenizer, tmp_path):
    broken = tmp_path / "corpus" / "9.parquet"
    broken.write_bytes(b"PAR1 but not really")
    with pytest.raises(UserError, match=r"9\.parquet: .*damaged") as error:
        prepare(data, tokenizer, 64, str(tmp_path / "root"))
    assert "\n" not in str(error.value)
    broken.unlink()
    manifest = prepare(data, tokenizer, 64, str(tmp_path / "root"))
    assert manifest.sources["files"].input_rows == len(TEXTS)


@pytest.mark.parametrize(("reserved", "used"), [(1.5, 0.5), (2.0, 0.0)])
def test_beside_training_it_takes_what_is_left_and_ends_when_told(data, tmp_path, reserved, used):
    import ray

    job = plan_job(data, TOKENIZER_OF_TEXTS, 64, str(tmp_path / "root"))
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / TOKENIZER).write_text(job.backend)
    units = on_ray(job, job.units, reserved)
    next(units)
    assert 2 - ray.available_resources().get("CPU", 0.0) <= used
    units.close()
    patience = time.monotonic() + 60
    while ray.available_resources().get("CPU") != 2:
        assert time.monotonic() < patience, "its actors are still there"
        time.sleep(0.1)
