"""What preparing makes of documents, without Ray: splits, counts, limits, resuming, identity."""

import gzip
import itertools
import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bitray.data import DataSettings, Manifest, Shards, documents, formats, train_tokenizer
from bitray.data.job import Job, check_same, finished, plan_job
from bitray.data.manifest import SPLITS, read_manifest
from bitray.data.preparation import run_job
from bitray.data.settings import HeldOut
from bitray.data.tokenizer import Encoder
from bitray.data.units import in_process, run_unit, split_of
from bitray.settings import UserError

LENGTH = 64
TOKENIZER = train_tokenizer([f"document {k} of many, {k * k}" for k in range(500)], 265)


@pytest.fixture
def corpus(tmp_path) -> Path:
    """300 different documents in 6 files; every 50th is longer than a row."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for file in range(6):
        texts = [
            f"document {file * 50 + k} " + "word " * (40 if k == 0 else k % 9) for k in range(50)
        ]
        write(folder / f"{file}.jsonl", texts)
    return folder


def write(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def job_of(corpus: Path, root: Path, **settings: object) -> Job:
    data = DataSettings(
        **{
            "sources": {"docs": {"path": str(corpus)}},
            "split": {"probe": 0.1, "validation": 0.1},
            "unit_bytes": 6_000,
            **settings,
        }
    )
    return plan_job(data, TOKENIZER, LENGTH, str(root))


def prepared(corpus: Path, root: Path, **settings: object) -> Manifest:
    return run_job(job_of(corpus, root, **settings), in_process)


def texts_of(root: Path, manifest: Manifest, split: str) -> set[str]:
    """Documents (or pieces of long ones) of a split, as text, read back from its rows."""
    shards = Shards(str(root), manifest)
    ids, lengths, _ = shards.read("docs", split, range(manifest.num_rows("docs", split)))
    found = set()
    for row, counts in zip(ids, lengths, strict=True):
        ends = itertools.accumulate(counts, initial=0)
        for start, end in itertools.pairwise(ends):
            found.add(TOKENIZER.decode(row[start:end]).removesuffix(TOKENIZER.eos_token))
    return found


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_everything_is_counted_and_no_held_out_document_is_trained_on(corpus, tmp_path):
    root = tmp_path / "out"
    manifest = prepared(corpus, root)
    texts = [json.loads(line)["text"] for f in corpus.glob("*") for line in f.open()]
    found = manifest.sources["docs"]
    assert found.input_rows == 300
    assert sum(found.splits[split].documents for split in SPLITS) == 300
    assert sum(found.splits[split].truncated for split in SPLITS) == sum(
        len(TOKENIZER(text).input_ids) + 1 > LENGTH for text in texts
    )
    assert sum(found.splits[split].tokens for split in SPLITS) == sum(
        len(TOKENIZER(text).input_ids) + 1 for text in texts
    )
    rows = {split: texts_of(root, manifest, split) for split in SPLITS}
    for split in SPLITS:
        whole = {t for t in texts if len(TOKENIZER(t).input_ids) < LENGTH}
        wanted = {t for t in whole if split_of(t, HeldOut(probe=0.1, validation=0.1)) == split}
        assert wanted == rows[split] & whole
        assert len(wanted) > 10
        assert found.splits[split].documents >= len(wanted)


def test_the_same_text_is_always_on_the_same_side():
    held_out = HeldOut(probe=0.3, validation=0.2)
    sides = [split_of(f"{k}", held_out) for k in range(2000)]
    assert [split_of(f"{k}", held_out) for k in range(2000)] == sides
    assert abs(sides.count("probe") / 2000 - 0.3) < 0.04
    assert abs(sides.count("validation") / 2000 - 0.2) < 0.04
    more = HeldOut(probe=0.3, validation=0.4)
    assert all(split_of(f"{k}", more) == "probe" for k, s in enumerate(sides) if s == "probe")


def test_the_order_of_the_work_changes_no_byte(corpus, tmp_path):
    def backwards(job, units):
        return in_process(job, units[::-1])

    first, second = tmp_path / "first", tmp_path / "second"
    prepared(corpus, first)
    run_job(job_of(corpus, second), backwards)
    assert contents(first) == contents(second)
    assert len(list(first.glob("docs/train-*.arrow"))) > 2, "several units"


def test_an_interrupted_run_continues_with_what_is_missing(corpus, tmp_path):
    whole, root = tmp_path / "whole", tmp_path / "root"
    prepared(corpus, whole)

    def dies(job, units):
        yield from in_process(job, units[:2])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_job(job_of(corpus, root), dies)
    assert read_manifest(str(root)) is None
    job = job_of(corpus, root)
    assert [result.number for result in finished(job)] == [0, 1]
    next(root.glob("docs/train-000001.arrow")).write_bytes(b"torn")
    redone = []

    def watched(job, units):
        redone.extend(unit.number for unit in units)
        return in_process(job, units)

    run_job(job, watched)
    assert redone == [unit.number for unit in job.units if unit.number != 0]
    assert contents(root) == contents(whole)


def test_results_of_another_job_are_not_taken(corpus, tmp_path):
    root = tmp_path / "root"
    prepared(corpus, root, open_bins=8)
    assert list(finished(job_of(corpus, root, open_bins=9))) == []


def test_identity_is_of_inputs_not_of_weights(corpus, tmp_path):
    job = job_of(corpus, tmp_path / "x")
    same = {"docs": {"path": str(corpus), "weight": 0.3, "licence": "MIT"}}
    assert job_of(corpus, tmp_path / "y", seed=3, sources=same).identity == job.identity
    other = job_of(corpus, tmp_path / "x", split={"probe": 0.2, "validation": 0.1})
    assert other.identity != job.identity
    write(corpus / "0.jsonl", ["changed"])
    assert job_of(corpus, tmp_path / "x").identity != job.identity


def test_a_folder_prepared_from_something_else_is_refused(corpus, tmp_path):
    manifest = prepared(corpus, tmp_path / "out")
    assert read_manifest(str(tmp_path / "out")) == manifest
    check_same(job_of(corpus, tmp_path / "out"), manifest)
    write(corpus / "0.jsonl", ["changed"])
    with pytest.raises(UserError, match=r"something else \(open_bins, source 'docs' differs\)"):
        check_same(job_of(corpus, tmp_path / "out", open_bins=8), manifest)


def test_empty_and_bad_rows_are_counted_with_their_place(corpus, tmp_path):
    with (corpus / "0.jsonl").open("a") as file:
        file.write('{"text": " \\n"}\n{"text": ""}\n{"text": null}\nnot json\n')
    found = prepared(corpus, tmp_path / "out").sources["docs"]
    assert (found.input_rows, found.empty, found.skipped.count) == (304, 3, 1)
    assert found.skipped.places == (f"{corpus}/0.jsonl:54 (not JSON: Expecting value)",)


def test_too_many_bad_rows_stop_the_job(corpus, tmp_path):
    with (corpus / "0.jsonl").open("a") as file:
        file.write("not json\n" * 4)
    with pytest.raises(UserError, match=r"'docs': 4 of 304 rows .*=0\.001 .*0\.jsonl:51"):
        prepared(corpus, tmp_path / "out")
    assert prepared(corpus, tmp_path / "out", max_bad_rows=0.02).sources["docs"].skipped.count == 4


def test_where_no_bad_row_may_be_one_stops_the_job(corpus, tmp_path):
    with (corpus / "0.jsonl").open("a") as file:
        file.write("not json\n")
    with pytest.raises(UserError, match=r"'docs': 1 of 301 rows .*max_bad_rows=0 .*0\.jsonl:51"):
        prepared(corpus, tmp_path / "out", max_bad_rows=0)
    assert prepared(corpus, tmp_path / "out").sources["docs"].skipped.count == 1


def test_files_that_are_damaged_or_gone_are_skipped_up_to_a_limit(
    corpus, tmp_path, capsys, monkeypatch
):
    """What came before the damage counts. Of the file that is gone all parts are one file."""
    monkeypatch.setattr(formats, "_CHUNK", 1000)
    rows = "".join(json.dumps({"text": f"more {k} {k * k}"}) + "\n" for k in range(5000))
    data = gzip.compress(rows.encode())
    (corpus / "cut.jsonl.gz").write_bytes(data[: len(data) // 2])
    (corpus / "gone.jsonl").write_text(rows)
    job = job_of(corpus, tmp_path / "out", max_bad_files=2, unit_bytes=10_000)
    (corpus / "gone.jsonl").unlink()
    assert sum(p.uri.endswith("gone.jsonl") for unit in job.units for p in unit.parts) > 5
    found = run_job(job, in_process).sources["docs"]
    assert {Path(file).name for file in found.skipped.files} == {"cut.jsonl.gz", "gone.jsonl"}
    assert found.skipped.count == 0
    assert 300 + 1000 < found.input_rows < 300 + 4000
    said = capsys.readouterr().out
    assert said.count(f"skipped {corpus}/gone.jsonl: no such file") == 1
    assert f"skipped {corpus}/cut.jsonl.gz: cannot be read, it may be damaged" in said
    assert "2 files unreadable" in said
    for most, sentence in ((0, r"=0 allows no such files"), (1, r"=1 allows no more files")):
        fewer = replace(job, root_uri=str(tmp_path / f"out{most}"), settings=(
            job.settings.model_copy(update={"max_bad_files": most})))  # fmt: skip
        assert fewer.identity == job.identity
        with pytest.raises(UserError, match=rf"^source 'docs': .*{sentence}$"):
            run_job(fewer, in_process)


def test_a_hopeless_unit_is_not_read_to_its_end(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    write(folder / "a.jsonl", ["good"])
    (folder / "b.jsonl").write_text('{"body": "wrong column"}\n' * 10_000)
    job = job_of(folder, tmp_path / "out", unit_bytes=1 << 20)
    encoder = Encoder(job.backend, job.end)
    with pytest.raises(UserError, match=r"101 of 10\d rows .*no column 'text', it has: body"):
        for unit in job.units:
            run_unit(job.task, unit, encoder)


def test_empty_sources_and_lost_training_data_are_named(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    write(folder / "a.jsonl", ["", " "])
    with pytest.raises(
        UserError,
        match=r"'docs' holds no document \(2 rows, 2 empty, 0 left out by its filters, 0 un",
    ):
        prepared(folder, tmp_path / "out")
    write(folder / "a.jsonl", ["one document"])
    with pytest.raises(UserError, match="holds out all of its 1 documents"):
        prepared(folder, tmp_path / "out2", split={"probe": 0.999, "validation": 0})
    assert (
        prepared(folder, tmp_path / "out3", split={"probe": 0, "validation": 0}).num_rows("docs")
        == 1
    )


def test_a_missing_source_is_named_before_anything_is_done(tmp_path):
    with pytest.raises(UserError, match=r"source 'docs': .*nope"):
        job_of(tmp_path / "nope", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tokenizers_are_trained_on_training_documents_only(corpus):
    settings = job_of(corpus, corpus).settings
    train, probe = set(documents(settings)), set(documents(settings, "probe"))
    assert len(train) > 200
    assert len(probe) > 10
    assert not train & probe
    few = list(documents(settings, max_bytes=2000))
    assert 0 < sum(map(len, few)) <= 2000


# ---------------------------------------------------------------------------- filters and limits


def source_of(corpus: Path, **settings: object) -> dict[str, dict]:
    return {"docs": {"path": str(corpus), **settings}}


def test_rows_left_out_by_filters_are_counted(corpus, tmp_path):
    filters = {"text": {"max_length": 30}}
    found = prepared(corpus, tmp_path / "out", sources=source_of(corpus, filters=filters))
    texts = [json.loads(line)["text"] for f in corpus.glob("*") for line in f.open()]
    kept = sum(len(text) <= 30 for text in texts)
    entry = found.sources["docs"]
    assert 50 < kept < 250
    assert (entry.filtered, entry.input_rows) == (300 - kept, 300)
    assert sum(entry.splits[split].documents for split in SPLITS) == kept
    assert f"{300 - kept} filtered out" in entry.sentence("docs")


def test_filters_that_leave_nothing_are_named(corpus, tmp_path):
    sources = source_of(corpus, filters={"text": {"equals": "no such text"}})
    with pytest.raises(UserError, match=r"'docs' holds no document .*300 left out by its filters"):
        prepared(corpus, tmp_path / "out", sources=sources)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"columns": ["body"]}, r"no column 'body'"),
        ({"columns": ["label"]}, r"column 'label' holds int, not text"),
        ({"columns": ["list"]}, r"column 'list' holds list, not text"),
        ({"prompt": "{txt}", "completion": "label"}, r"no column 'txt' \(nearest: 'text'\)"),
        ({"filters": {"lable": {"equals": 1}}}, r"no column 'lable' \(nearest: 'label'\)"),
        ({"filters": {"text": {"at_least": 1}}}, r"column 'text' holds str, not a number"),
        ({"filters": {"label": {"at_least": 2}}}, r"40 left out by its filters"),
        ({"prompt": "{text}", "completion": "label", "labels": ["no"]}, r"'label' holds 1, but la"),
    ],
)
def test_columns_that_do_not_fit_are_told(tmp_path, kind, settings, sentence):
    path, root = tmp_path / f"a.{kind}", tmp_path / "out"
    rows = [{"text": f"text {k}", "label": k % 2, "list": [k]} for k in range(40)]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match=sentence) as error:
        prepared(path, root, sources=source_of(path, **settings))
    assert str(path) in str(error.value) or "filters" in str(error.value)
    assert "\n" not in str(error.value)


def reading_order(corpus: Path) -> list[int]:
    """Tokens of each document, in the order in which units read them."""
    job = job_of(corpus, corpus)
    source = job.settings.sources["docs"]
    found = [one for unit in job.units for part in unit.parts for one in source.read(part)]
    return [len(TOKENIZER(one.text).input_ids) + 1 for one in found]


@pytest.mark.parametrize("documents", [5, 50, 77, 299, 300, 1000])
def test_a_limit_of_documents_is_kept_exactly(corpus, tmp_path, documents):
    sources = source_of(corpus, max_documents=documents)
    found = prepared(corpus, tmp_path / "out", sources=sources).sources["docs"]
    sizes = reading_order(corpus)[:documents]
    assert sum(found.splits[split].documents for split in SPLITS) == len(sizes)
    assert sum(found.splits[split].tokens for split in SPLITS) == sum(sizes)
    assert found.input_rows == len(sizes)
    assert found.limited == (documents < 300)


def test_a_limit_of_tokens_is_kept_exactly_in_whatever_order_units_are_done(corpus, tmp_path):
    def backwards(job, units):
        return in_process(job, units[::-1])

    sizes = list(itertools.accumulate(reading_order(corpus)))
    for limit in (sizes[120], sizes[200] - 1):
        sources = source_of(corpus, max_tokens=limit)
        first, second = tmp_path / f"{limit}", tmp_path / f"{limit} again"
        found = prepared(corpus, first, sources=sources)
        again = run_job(job_of(corpus, second, sources=sources), backwards)
        assert again == found
        shards = [s.name for c in found.sources["docs"].splits.values() for s in c.shards]
        assert all((first / s).read_bytes() == (second / s).read_bytes() for s in shards)
        counts = found.sources["docs"].splits.values()
        assert sum(c.documents for c in counts) == sum(size <= limit for size in sizes)
        assert sum(c.tokens for c in counts) == max(size for size in sizes if size <= limit)


def test_an_interrupted_limit_ends_as_an_uninterrupted_one(corpus, tmp_path):
    sources = source_of(corpus, max_documents=130)
    whole, root = tmp_path / "whole", tmp_path / "root"
    manifest = prepared(corpus, whole, sources=sources)

    def dies(job, units):
        yield from in_process(job, units[-1:])
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run_job(job_of(corpus, root, sources=sources), dies)
    assert run_job(job_of(corpus, root, sources=sources), in_process) == manifest


# ---------------------------------------------------------------------------------------- prompts


def test_prompts_are_packed_before_what_is_learnt(tmp_path):
    """Of a prompt that is too long the end is kept, and no completion is lost."""
    folder, root = tmp_path / "corpus", tmp_path / "out"
    folder.mkdir()
    rows = [{"q": "word " * (k % 70), "label": k % 2} for k in range(120)]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = source_of(folder, prompt="{q}?", completion=" {label}", labels=["no", "yes"])
    manifest = prepared(folder, root, sources=sources, split={"probe": 0, "validation": 0})
    shards = Shards(str(root), manifest)
    found = shards.read("docs", "train", range(manifest.num_rows("docs")))
    completions, prompts = [], []
    for row, lengths, given in zip(*found, strict=True):
        ends = itertools.accumulate(lengths, initial=0)
        for (start, end), prompt in zip(itertools.pairwise(ends), given, strict=True):
            prompts.append(TOKENIZER.decode(row[start : start + prompt]))
            completions.append(TOKENIZER.decode(row[start + prompt : end]))
    assert sorted(completions) == sorted([" no<|endoftext|>", " yes<|endoftext|>"] * 60)
    assert all(prompt.endswith("?") for prompt in prompts)
    whole = [f"{row['q']}?" for row in rows]
    assert all(any(text.endswith(prompt) for text in whole) for prompt in prompts)
    cut = sum(len(TOKENIZER(text).input_ids) + 5 > LENGTH for text in whole)
    assert abs(manifest.sources["docs"].splits["train"].truncated - cut) < 5 < cut


# ----------------------------------------------------------------------------- a source that goes


def test_a_file_that_goes_after_planning_is_named(corpus, tmp_path):
    job = job_of(corpus, tmp_path / "out")
    (corpus / "3.jsonl").unlink()
    with pytest.raises(UserError, match=r"corpus/3\.jsonl: no such file or folder") as error:
        run_job(job, in_process)
    assert "\n" not in str(error.value)


def test_the_tokenizer_sees_prompts_and_keeps_to_the_limit(corpus):
    few = {"prompt": "Say: ", "completion": "{text}", "max_documents": 20}
    settings = job_of(corpus, corpus, sources=source_of(corpus, **few)).settings
    texts = list(documents(settings)) + list(documents(settings, "probe"))
    texts += documents(settings, "validation")
    assert len(texts) == 20 and all(text.startswith("Say: document") for text in texts)
