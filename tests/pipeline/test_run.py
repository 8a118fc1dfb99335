"""The whole road on Ray: what a run leaves, that its order and its numbers are those of one worker
without Ray, and that neither interrupts nor kills change a bit of the result.

The reference is the same training done in process, from the plan of rows that settings and manifest
give. Every start of Ray Train costs 15-25 s, so runs are few and are looked at by many tests.
"""

import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from road import TRAINED, Road, alone, differing, wait_for, weights
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from bitray import Config, checkpoint
from bitray.data.shards import held_out
from bitray.export.reader import read_gguf
from bitray.models.loading import load_model
from bitray.nn import BitLinear, set_strength
from bitray.pipeline import run as pipeline
from bitray.pipeline.inspect import evaluate_checkpoint, export_checkpoint, generate_text
from bitray.pipeline.requests import Evaluation, Export, Generation
from bitray.pipeline.run import run
from bitray.settings import UserError

pytestmark = pytest.mark.ray


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    """Stock transformers compiles its unpacking, which takes longer than everything here."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


# ------------------------------------------------------------------------------ what a run leaves


def test_every_stage_ends_with_a_checkpoint_that_verifies(road: Road) -> None:
    for stage in road.config.stages:
        assert checkpoint.verify(road.final(stage)) is None
    assert not road.result.stopped
    assert set(road.json("evaluations.json")) == {"stage0", "stage1", "stage1_9", "stage2"}
    for found in road.json("evaluations.json").values():
        assert found.keys() == {"code", "prose", "arithmetic"}
    # an untrained model of 320 tokens has ln 320 = 5.8 nats
    assert np.mean(list(road.json("evaluations.json")["stage2"].values())) < 5.0


def test_metrics_have_every_step_once_and_curves_have_files(road: Road) -> None:
    for stage in TRAINED:
        steps = [line["step"] for line in road.lines(stage) if "train/loss" in line]
        assert steps == list(range(1, road.config.stages[stage].total_steps + 1))
        events = list((road.folder / "tensorboard" / stage).glob("events.out.tfevents.*"))
        assert events and all(file.stat().st_size > 500 for file in events)
    strengths = road.metrics("stage1_9", "schedule/strength")
    assert strengths == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    assert set(road.metrics("stage2", "schedule/strength")) == {1.0}


def test_the_report_needs_nothing_from_outside(road: Road) -> None:
    page = (road.folder / "report.html").read_text()
    assert page.count("<svg") >= 7 and "Held-out loss" in page and "stage1_9" in page
    loads = re.findall(r"""(?:src|href|xlink:href)\s*=\s*["']([^"']*)""", page)
    assert all(link.startswith(("#", "data:")) for link in loads), loads
    assert "<script" not in page and "@import" not in page
    assert all(url.startswith("#") for url in re.findall(r"url\(([^)]*)\)", page))


def test_last_checkpoints_best_and_final_are_kept(road: Road) -> None:
    """save_every 4, keep_last 2, eval_every 5; the last step is one of those that are kept."""
    for stage, kept in (
        ("stage0", {"step_000016", "step_000020"}),
        ("stage1_9", {"step_000004", "step_000006"}),
        ("stage2", {"step_000008", "step_000012"}),
    ):
        assert {p.name for p in road.checkpoints(stage).iterdir()} == {*kept, "best", "final"}
        middle = {
            line["step"]: np.mean([v for k, v in line.items() if k.startswith("eval/")])
            for line in road.lines(stage)
            if "eval/code_loss" in line and line["step"] < road.config.stages[stage].total_steps
        }
        best = checkpoint.load_state(str(road.checkpoints(stage) / "best"))["position"]
        assert best["step"] == min(middle, key=lambda step: middle[step])


# ---------------------------------------------------------------------------------------- exactness


def layers(model: torch.nn.Module) -> dict[str, BitLinear]:
    return {name: part for name, part in model.named_modules() if isinstance(part, BitLinear)}


def i2_s(data: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray, np.float32]:
    """bitnet.cpp's: 128 weights in 32 bytes, the first of each four in the high bits."""
    count = int(np.prod(shape))
    block = data[: count // 4].reshape(-1, 32)
    codes = np.stack([block >> shift & 3 for shift in (6, 4, 2, 0)], 1).astype(np.int8) - 1
    return codes.reshape(shape), data[count // 4 : count // 4 + 4].view("<f4")[0]


def tq2_0(data: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """By ggml's own Python package: values are code times the f16 scale of a block."""
    import gguf

    values = gguf.quants.dequantize(data.reshape(-1, 66), gguf.GGMLQuantizationType.TQ2_0)
    codes = np.sign(values).astype(np.int8)
    return codes.reshape(shape), np.abs(values[values != 0])


def test_codes_of_training_evaluation_and_every_export_are_the_same(road: Road) -> None:
    """Against codes computed in NumPy from the masters in the checkpoint: no code differs, over
    all tensors, and all scales are equal."""
    model = load_model(road.final("stage2"))
    stock = load_file(f"{road.result.files['huggingface']}/model.safetensors")
    files = {kind: read_gguf(road.result.files[kind]) for kind in ("i2_s", "tq2_0")}
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
             "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
             "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
             "mlp.down_proj": "ffn_down"}  # fmt: skip
    compared = 0
    for path, layer in layers(model).items():
        master = layer.weight.detach().numpy()
        scale = np.float32(np.abs(master.astype(np.float64)).mean())
        codes = np.clip(np.rint(master / scale), -1, 1).astype(np.int8)
        training, training_scale = layer.quantized()
        assert np.array_equal(training.numpy(), codes)
        assert training_scale.item() == pytest.approx(scale, rel=1e-6)

        packed = stock[f"{path}.weight"].numpy()
        unpacked = np.concatenate([packed >> shift & 3 for shift in (0, 2, 4, 6)])
        assert np.array_equal(unpacked.astype(np.int8) - 1, codes)
        assert stock[f"{path}.weight_scale"].item() == training_scale.item()

        _, _, number, module = path.split(".", 3)
        tensor = f"blk.{number}.{names[module]}"
        found, found_scale = i2_s(files["i2_s"].raw(f"{tensor}.weight"), codes.shape)
        assert np.array_equal(found, codes) and found_scale == training_scale.item()

        found, values = tq2_0(files["tq2_0"].raw(f"{tensor}.weight"), codes.shape)
        assert np.array_equal(found, codes)
        if f"{tensor}.scale" in files["tq2_0"].tensors:
            assert set(values) == {1.0}
            assert files["tq2_0"].floats(f"{tensor}.scale").item() == training_scale.item()
        else:
            assert set(values) == {float(np.float16(training_scale.item()))}
        compared += codes.size
    assert compared == 2 * (2 * 256 * 256 + 2 * 128 * 256 + 3 * 256 * 256)


def reference_losses(road: Road, folder: str, rows: int) -> dict[str, float]:
    """Mean cross-entropy by stock transformers: each document alone, no packing, no masks of ours,
    no chunks."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    losses = {}
    for domain, (ids, lengths, _) in held_out(road.shards, "validation", rows).items():
        total, count = 0.0, 0
        for row, documents in zip(torch.from_numpy(ids).long(), lengths, strict=True):
            for part in row[: sum(documents)].split(documents):
                with torch.no_grad():
                    logits = model(part[None]).logits[0, :-1].double()
                total += F.cross_entropy(logits, part[1:], reduction="sum").item()
                count += len(part) - 1
        losses[domain] = total / count
    return losses


def test_held_out_losses_are_those_of_stock_transformers(road: Road) -> None:
    """The table of the run and the evaluation job, per domain, on the exported model."""
    expected = reference_losses(road, road.result.files["huggingface"], 8)
    found = road.json("evaluations.json")["stage2"]
    for domain, loss in expected.items():
        assert found[domain] == pytest.approx(loss, rel=1e-5)
    (table,) = evaluate_checkpoint(Evaluation(checkpoint=str(road.folder), rows=8))
    shown = {row[0]: float(row[2]) for row in table.rows}
    for domain, loss in expected.items():
        assert shown[domain] == pytest.approx(loss, abs=1e-4)
    assert shown["mean"] == pytest.approx(np.mean(list(expected.values())), abs=1e-4)


def test_the_jobs_find_the_checkpoint_of_a_run(road: Road, tmp_path: Path) -> None:
    report = export_checkpoint(
        Export(
            checkpoint=str(road.folder), format="gguf", type="i2_s", output=str(tmp_path / "a.gguf")
        )
    )
    assert report.mismatches == 0
    ours, theirs = read_gguf(tmp_path / "a.gguf"), read_gguf(road.result.files["i2_s"])
    assert ours.tensors == theirs.tensors and np.array_equal(ours.data, theirs.data)
    said = {"temperature": 0.0, "max_new_tokens": 12}
    text = generate_text(
        Generation.model_validate(
            {"checkpoint": str(road.folder), "prompt": "def ", "sampling": said}
        )
    )
    assert text.startswith("def ")
    dense = Evaluation(checkpoint=str(road.folder / "stage0_checkpoint"), rows=8)
    shown = {row[0]: float(row[2]) for row in evaluate_checkpoint(dense)[0].rows}
    for domain, loss in road.json("evaluations.json")["stage0"].items():
        assert shown[domain] == pytest.approx(loss, abs=1e-4)


# ------------------------------------------------------------------------- order and world size


def check_rows(road: Road, stage: str) -> None:
    """Tokens and shares of every step are those of the rows that the plan puts there."""
    plan, settings = road.plans()[stage], road.config.stages[stage]
    total = 0
    for step in range(settings.total_steps):
        rows = plan.rows(step * settings.rows_per_step, settings.rows_per_step)
        tokens = dict.fromkeys(plan.sources, 0)
        for source, row in zip(rows.source, rows.row, strict=True):
            name = plan.sources[source]
            tokens[name] += sum(road.shards.read(name, "train", [int(row)])[1][0])
        total += sum(tokens.values())
        assert road.metrics(stage, "train/tokens")[step] == total
        for name, count in tokens.items():
            share = road.metrics(stage, f"mixture/share_{name}")[step]
            assert share == pytest.approx(count / sum(tokens.values()), abs=1e-12)


@pytest.mark.parametrize("stage", TRAINED)
def test_rows_are_those_of_the_plan_in_its_order(road: Road, stage: str) -> None:
    """Two workers, three tickets a step; stages go on in the sources where the one before ended."""
    check_rows(road, stage)


def test_over_many_rows_token_shares_are_the_weights(road: Road) -> None:
    """Of real tokens, as the rows hold them, within 1 % of each weight; every epoch of a source
    takes each of its rows once."""
    plan, total = road.plans()["stage0"], 20_000
    order = plan.rows(0, total)
    tokens = {}
    for number, name in enumerate(plan.sources):
        count = road.shards.num_rows(name, "train")
        lengths = road.shards.read(name, "train", np.arange(count)).lengths
        mine = order.row[order.source == number]
        tokens[name] = sum(sum(lengths[row]) for row in mine)
        for first in range(0, len(mine) - count, count):
            assert np.array_equal(np.sort(mine[first : first + count]), np.arange(count))
    given = {name: source.weight for name, source in road.config.data.sources.items()}
    for name, weight in given.items():
        share = tokens[name] / sum(tokens.values())
        assert share == pytest.approx(weight / sum(given.values()), rel=0.01)


@pytest.mark.parametrize("stage", TRAINED)
def test_two_workers_give_the_losses_of_one(road: Road, stage: str) -> None:
    """The same global batches in process, one worker, no Ray, in fp32: dense, growing strength,
    and full strength, where rounding may turn the last bits into a code."""
    losses, _ = alone(road, stage)
    np.testing.assert_allclose(road.metrics(stage), losses, rtol=1e-5)


# ----------------------------------------------------------------------- the same command again


def test_the_same_command_again_skips_what_is_complete(
    road: Road, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {p: p.stat().st_mtime_ns for p in road.folder.rglob("COMPLETE")}
    metrics = (road.folder / "metrics.jsonl").read_text()
    again = run(road.config)
    said = capsys.readouterr().out
    for stage in road.config.stages:
        assert re.search(rf"^{stage} +is complete: {road.final(stage)}$", said, re.MULTILINE)
    assert {p: p.stat().st_mtime_ns for p in road.folder.rglob("COMPLETE")} == before
    assert (road.folder / "metrics.jsonl").read_text() == metrics
    assert again.losses == road.result.losses and again.files == road.result.files
    assert again.report is not None and again.report in str(again)


def test_another_run_in_the_same_folder_is_refused_field_by_field(
    road: Road, configured: Callable[..., Config]
) -> None:
    changes = ("stages.stage2.optimizer.lr=5e-4", "data.sources.code.weight=0.7")
    other = configured("undisturbed", *changes)
    folder = road.folder.parent / "prepared"
    tokenizers = set(folder.glob("tokenizer*"))
    with pytest.raises(UserError) as caught:
        run(other)
    said = str(caught.value)
    assert "stages.stage2.optimizer.lr: 0.0002 there, 0.0005 now" in said
    assert "data.sources.code.weight: 0.4 there, 0.7 now" in said
    assert len(said.splitlines()) == 3, "what differs, and nothing else"
    assert set(folder.glob("tokenizer*")) == tokenizers, (
        "another weight does not change the text that a tokenizer is trained on"
    )
    assert "resume.fork=true" in said and "resume.fresh=true" in said
    # where things go and who computes them does not matter
    elsewhere = ("scaling.num_workers=1", "training.save_every=7", "logging.tensorboard=false")
    run(configured("undisturbed", *elsewhere))
    run(road.config)


def test_fork_continues_and_fresh_starts_over(
    road: Road, configured: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the training itself, which `test_a_forked_run_...` adds."""
    copy = road.folder.parent / "copied"
    shutil.copytree(road.folder, copy)
    pending: list[list[str]] = []

    def train(config: Config, *_: object) -> str:
        folder = Path(config.run_dir)
        pending.append(
            [
                s
                for s in config.stages
                if not (folder / f"{s}_checkpoint/checkpoints/final").exists()
            ]
        )
        return "stage2"

    monkeypatch.setattr(pipeline, "train", train)
    change = "stages.stage2.optimizer.lr=5e-4"
    with pytest.raises(UserError, match="holds a run with other settings"):
        run(configured("copied", change))
    assert run(configured("copied", change, "resume.fork=true")).stopped
    assert run(configured("copied", change)).stopped, "the folder is the forked run's from now on"
    run(configured("copied", "resume.fresh=true"))
    assert pending == [[], [], ["stage0", "stage1", "stage1_9", "stage2"]]
    shutil.rmtree(copy)


@pytest.mark.slow
def test_a_forked_run_trains_on_and_a_fresh_one_from_the_start(
    road: Road, configured: Callable[..., Config]
) -> None:
    copy = Road(configured("forked"))
    shutil.copytree(road.folder, copy.folder)
    for left in (copy.final("stage2"), copy.checkpoints("stage2") / "step_000012"):
        shutil.rmtree(left)
    change = "stages.stage2.optimizer.lr=5e-4"
    run(configured("forked", change, "resume.fork=true"))
    assert copy.metrics("stage2")[:8] == road.metrics("stage2")[:8]
    rates = np.array([r.metrics("stage2", "schedule/lr_decay") for r in (copy, road)])
    np.testing.assert_allclose(rates[0, 8:], 2.5 * rates[1, 8:])
    np.testing.assert_array_equal(rates[0, :8], rates[1, :8])
    assert differing(weights(copy.final("stage2")), weights(road.final("stage2")))
    run(configured("forked", "resume.fresh=true"))
    assert not differing(weights(copy.final("stage2")), weights(road.final("stage2")))


# ------------------------------------------------------------------------- interrupts and kills


def workers() -> list[psutil.Process]:
    """The Ray Train workers of this process's own cluster."""
    found = []
    for child in psutil.Process().children(recursive=True):
        try:
            if "ray::RayTrainWorker" in " ".join(child.cmdline()):
                found.append(child)
        except psutil.Error:
            continue
    return found


def test_a_killed_worker_costs_only_time(road: Road, configured: Callable[..., Config]) -> None:
    """SIGKILL in mid-stage: the group starts again from the last whole checkpoint and ends
    bit-equal to the undisturbed run; no step is there twice."""
    config = configured("killed")
    disturbed = Road(config)
    killed: list[str] = []

    def kill() -> None:
        wait_for(disturbed.checkpoints("stage2") / "step_000004" / "COMPLETE")
        victim = workers()[-1]
        victim.send_signal(signal.SIGKILL)
        killed.append(str(victim.pid))
        assert not Path(disturbed.final("stage2")).exists(), "it came too late"

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    run(config)
    killer.join()
    assert killed and not Path(disturbed.folder, "STOP").exists()
    assert disturbed.json("mixture/stage2.json")["generation"] == 2, "nothing was started again"
    for stage in TRAINED:
        assert not differing(weights(disturbed.final(stage)), weights(road.final(stage)))
        assert disturbed.metrics(stage) == road.metrics(stage)
    assert disturbed.json("evaluations.json") == road.json("evaluations.json")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("ray_cluster")
def test_the_same_command_with_other_workers_goes_on(
    configured: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    """One, two, three, four workers in the same folder, with other micro-batches each time, asked
    to stop in between, one of the third group killed: the rows are those of the plan and the losses
    those of one worker."""

    def disturb(run: Road, size: int) -> None:
        before = {path.parent for path in run.checkpoints("stage0").glob("step_*/COMPLETE")}
        while not {p.parent for p in run.checkpoints("stage0").glob("step_*/COMPLETE")} - before:
            time.sleep(0.01)
        if size == 3:
            workers()[-1].send_signal(signal.SIGKILL)
            generation = run.json("mixture/stage0.json")["generation"]
            while run.json("mixture/stage0.json")["generation"] == generation:
                time.sleep(0.1)
        (run.folder / "STOP").touch()

    said = []
    for size, (rows, tickets) in zip((1, 2, 3, 4), ((2, 3), (3, 2), (1, 6), (2, 3)), strict=True):
        config = configured(
            "elastic", f"training.batch_size={rows}",
            f"training.gradient_accumulation_steps={tickets}",
            f"scaling.num_workers={size}", "scaling.cpus_per_worker=0.25",
            "stages.stage0.max_steps=120", "stages.stage0.optimizer.lr=1e-3",
        )  # fmt: skip
        elastic = Road(config)
        if size < 4:
            threading.Thread(target=disturb, args=(elastic, size), daemon=True).start()
        assert run(config).stopped == (size < 4)
        said += re.findall(
            r"stage0 +(?:begins|continues).* step (\d+)/120", capsys.readouterr().out
        )
    starts = [int(step) for step in said]
    assert len(starts) == 5 and starts == sorted(starts) and starts[0] == 0 < starts[-1], starts
    steps = [line["step"] for line in elastic.lines("stage0") if "train/loss" in line]
    assert steps == list(range(1, 121))
    check_rows(elastic, "stage0")
    losses, _ = alone(elastic, "stage0")
    np.testing.assert_allclose(elastic.metrics("stage0"), losses, rtol=1e-2)
    np.testing.assert_allclose(elastic.metrics("stage0")[:20], losses[:20], rtol=1e-5)


# -------------------------------------------------------------------- another run's checkpoint


def test_a_stage_starts_from_a_named_checkpoint_with_flags(
    road: Road, configured: Callable[..., Config]
) -> None:
    """Two workers wrote it, one goes on from it: with its place in the data and the schedules, but
    not the moments of its optimizer, and the same rows cut into other micro-batches. Stages before
    it are not fetched."""
    source = str(road.checkpoints("stage2") / "step_000008")
    flags = (
        f"stages.stage2.resume.checkpoint_path={source}",
        "stages.stage2.resume.load_optimizer_state=false",
        f"model.teacher.path={road.final('stage0')}",
        "scaling.num_workers=1", "training.batch_size=3", "training.gradient_accumulation_steps=2",
    )  # fmt: skip
    config = configured("elsewhere", *flags)
    run(config)
    made = Road(config)
    assert {p.name for p in made.folder.glob("*_checkpoint")} == {"stage2_checkpoint"}
    start = load_model(source)
    set_strength(start, 1.0)
    # `alone` takes teacher and rows of the first run and the flags of this one
    reference = Road(config)
    reference.final = road.final  # type: ignore[method-assign]
    losses, expected = alone(reference, "stage2", start, resumed=source)
    assert len(losses) == 4
    assert not differing(weights(made.final("stage2")), expected)
    assert made.metrics("stage2") == losses
    assert losses[0] == pytest.approx(road.metrics("stage2")[8], rel=1e-5)
    assert losses[-1] != road.metrics("stage2")[-1]
