"""Every preset of data reads a stand-in of the Hub that is laid out like the real datasets."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hub_server import Hub

from bitray import Config
from bitray.data import DataSettings, Manifest, Shards, train_tokenizer
from bitray.data.job import plan_job
from bitray.data.preparation import run_job
from bitray.data.units import in_process
from bitray.models.batch import IGNORED

TOKENIZER = train_tokenizer([f"document {k} of many, {k * k}" for k in range(500)], 265)

WEB = {"text": "text {k}", "url": "u", "score": 3.5}
GLUE = {"label": 0, "idx": 7}
HUB: dict[str, dict[str, dict]] = {
    "mlfoundations/dclm-baseline-1.0-parquet": {
        "filtered/global-shard_01_of_10/local-shard_0_of_10/shard_00000000_processed.parquet": WEB
    },
    "HuggingFaceFW/fineweb-edu": {
        "sample/10BT/000_00000.parquet": WEB,
        "data/CC-MAIN-2013-20/train-00000-of-00014.parquet": {"text": "not of the sample"},
    },
    "HuggingFaceFW/fineweb": {"sample/10BT/000_00000.parquet": WEB},
    "nick007x/github-code-2025": {
        "above-2-stars/train_000.parquet": {"repo_id": "a/b", "content": "code {k}", "size": 6}
    },
    "HuggingFaceTB/finemath": {
        "finemath-3plus/train-00000-of-00128.parquet": WEB,
        "infiwebmath-3plus/train-00000-of-00111.parquet": {"text": "not of finemath"},
    },
    "cerebras/SlimPajama-627B": {
        "train/chunk1/example_train_0.jsonl.zst": {"text": "pajama {k}", "meta": {"set": "Book"}},
        "validation/chunk1/example_holdout_0.jsonl.zst": {"text": "not for training"},
    },
    "PleIAs/SYNTH": {
        "synth_001.parquet": {
            "query": "why {k}", "synthetic_reasoning": "so", "synthetic_answer": "thus", "words": 3
        }
    },
    "tiiuae/falcon-refinedweb": {
        "data/train-00000-of-05534.parquet": {"content": "falcon {k}", "url": "u"}
    },
    "allenai/c4": {
        "en/c4-validation.00000-of-00008.json.gz": {"text": "clean {k}", "timestamp": "t"},
        "en/c4-train.00000-of-01024.json.gz": {"text": "not for validation"},
    },
    "nyu-mll/glue": {
        "sst2/train-00000-of-00001.parquet": {"sentence": "fine {k}", **GLUE},
        "mnli/train-00000-of-00001.parquet": {"premise": "a {k}", "hypothesis": "b", **GLUE},
        "qnli/train-00000-of-00001.parquet": {"question": "c {k}?", "sentence": "d", **GLUE},
        "sst2/test-00000-of-00001.parquet": {"sentence": "not labelled", "label": -1, "idx": 0},
    },
    "abisee/cnn_dailymail": {
        "3.0.0/train-00000-of-00003.parquet": {"article": "long {k}", "highlights": "h", "id": "i"}
    },
}  # fmt: skip
"""Per dataset, files and what a row of them looks like."""
LEARNT = {"sst2": " negative", "mnli": " entailment", "qnli": " yes", "cnn_dailymail": " h"}


@pytest.fixture
def filled(hub: Hub, tmp_path: Path) -> Hub:
    for dataset, files in HUB.items():
        for name, row in files.items():
            path = tmp_path / dataset / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path, [numbered(row, k) for k in range(60)])
        hub.push(dataset, tmp_path / dataset)
    return hub


def numbered(row: dict, number: int) -> dict:
    return {
        key: value.replace("{k}", str(number)) if isinstance(value, str) else value
        for key, value in row.items()
    }


def write(path: Path, rows: list[dict]) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        pack = gzip.compress if path.suffix == ".gz" else zstandard.compress
        path.write_bytes(pack(lines))


def preset(name: str, **changes: object) -> DataSettings:
    return DataSettings(**{**Config.document(f"data/{name}")["data"], **changes})


def prepared(name: str, root: Path) -> Manifest:
    return run_job(plan_job(preset(name), TOKENIZER, 32, str(root)), in_process)


@pytest.mark.parametrize("name", sorted(Config.groups()["data"]))
def test_every_preset_is_valid(name: str) -> None:
    if name == "local":
        assert Config.document("data/local") == {"data": {"sources": {}}}, "the user names them"
    else:
        assert sum(preset(name).shares().values()) == pytest.approx(1)


@pytest.mark.parametrize("name", ["mixed_pretrain", "fineweb", "falcon", "c4_validation"])
def test_presets_of_text_read_what_they_name(filled: Hub, tmp_path: Path, name: str) -> None:
    manifest = prepared(name, tmp_path / "out")
    for source, entry in manifest.sources.items():
        assert entry.input_rows == 60, source
        assert entry.skipped.count == entry.empty == entry.filtered == 0
        assert entry.licence != "unknown"
        inputs = manifest.made_from["sources"][source]["inputs"]
        assert all("@" in uri for uri, _, _ in inputs), "the commit is recorded"


def test_the_mixture_names_its_probes() -> None:
    mixture = preset("mixed_pretrain")
    probes = {name: source.probe for name, source in mixture.sources.items()}
    assert probes == {
        "dclm": "dclm", "fineweb_edu": "web_edu", "github_code": "code", "finemath": "math",
        "slimpajama": "diverse", "synth": "reasoning",
    }  # fmt: skip
    assert mixture.shares()["fineweb_edu"] == pytest.approx(0.27)


def test_tasks_are_learnt_without_their_prompts(filled: Hub, tmp_path: Path) -> None:
    manifest = prepared("downstream", tmp_path / "out")
    shards = Shards(str(tmp_path / "out"), manifest)
    assert list(manifest.sources) == list(LEARNT)
    for source, completion in LEARNT.items():
        rows = shards.read(source, "train", range(manifest.num_rows(source)))
        labels = rows.batch().labels
        learnt = TOKENIZER.decode(labels[labels != IGNORED])
        documents = manifest.counts(source, "train").documents
        assert learnt == f"{completion}{TOKENIZER.eos_token}" * documents
