"""The root configuration: how stages inherit, and what is refused before anything runs."""

from collections.abc import Callable
from pathlib import Path

import pytest

from bitray import Config
from bitray.pipeline.plan import check_resources, needed
from bitray.settings import UserError


def test_the_default_is_the_demo() -> None:
    config = Config.load()
    assert list(config.stages) == ["stage0", "stage1", "stage1_9", "stage2"]
    assert config.run_dir == "runs/bitray_demo"
    assert config.stages["stage1"].total_steps == 0


def test_stage_preset_then_training_then_the_stage_itself() -> None:
    """field default < stage preset < training.* < stages.NAME.*, in whatever order said."""
    words = ["stages.stage2.optimizer.lr=3e-3", "training.optimizer.lr=2e-3"]
    stages = Config.load(overrides=words).stages
    assert stages["stage2"].optimizer.lr == 3e-3
    assert stages["stage1_9"].optimizer.lr == 2e-3
    assert Config.load().stages["stage1_9"].optimizer.lr == 1e-3


def test_another_optimizer_begins_with_its_own_defaults():
    muon = Config.load(overrides=["training.optimizer.type=muon"]).stages["stage2"].optimizer
    assert (muon.type, muon.lr, muon.weight_decay) == ("muon", 2.4e-3, 0.01)
    with pytest.raises(UserError, match=r"'moun' is not one of .*adamw.*\(nearest: 'muon'\)"):
        Config.load(overrides=["training.optimizer.type=moun"])
    with pytest.raises(UserError, match=r"optimizer\.tau: there is no such setting.*momentum"):
        Config.load(overrides=["training.optimizer.type=muon", "training.optimizer.tau=3"])


def test_a_later_voice_wins_over_a_saved_configuration(tmp_path: Path) -> None:
    """A saved configuration spells every stage out; the command line on top of it still counts."""
    saved = tmp_path / "config.yaml"
    saved.write_text(Config.load(overrides=["training.seed=5"]).dump())
    again = Config.load(str(saved))
    assert again.model_dump() == Config.load(overrides=["training.seed=5"]).model_dump()
    assert Config.load(str(saved), ["training.seed=6"]).stages["stage2"].seed == 6


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., str]:
    """The file of a configuration, as a run keeps it."""

    def save(*words: str) -> str:
        (tmp_path / "config.yaml").write_text(Config.load(overrides=words).dump())
        return str(tmp_path / "config.yaml")

    return save


def test_groups_after_a_saved_configuration_count(saved: Callable[..., str]) -> None:
    """Which spells everything out; what was said for all stages is also of other ones."""
    words = ["scaling=fsdp_multi", "model=smollm2_135m", "pipeline=standard"]
    found = Config.load(saved("training.seed=5", "data.seed=3"), words)
    fresh = Config.load(overrides=[*words, "training.seed=5"])
    assert list(found.stages) == ["stage1", "stage1_9", "stage2"]
    assert found.stages == fresh.stages
    assert (found.scaling, found.model) == (fresh.scaling, fresh.model)
    assert found.data.seed == 3


def test_micro_batches_and_coefficients_after_a_saved_configuration_count(
    saved: Callable[..., str],
) -> None:
    path = saved("pipeline=full", "model=qwen3_4b", "gpu=a100_80gb", "training.seed=5")
    found = Config.load(path, ["gpu=rtx4090", "distillation=summarization"]).stages
    assert (found["stage2"].batch_size, found["stage1_9"].batch_size) == (2, 1)
    logits = found["stage3"].objectives.logits_distill
    assert logits is not None and logits.weight == 1.0
    assert found["stage2"].seed == 5
    beside = Config.load(path, ["gpu=rtx4090", "stages.stage2.batch_size=7"]).stages["stage2"]
    assert (beside.batch_size, beside.gradient_accumulation_steps) == (7, 32)


def test_a_teacher_of_the_type_that_it_has_keeps_its_path(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("model: {teacher: {path: a/b}}")
    here, there = str(tmp_path / "mine.yaml"), ["model.teacher.type=offload"]
    same = Config.load(here, ["model.teacher.type=in_process"]).model.teacher
    assert getattr(same, "path", None) == "a/b"
    assert getattr(Config.load(here, there).model.teacher, "path", "") is None


def test_a_worker_may_take_a_share_of_a_gpu() -> None:
    words = ["scaling=single_gpu", "scaling.gpus_per_worker=0.25"]
    config, cpus = Config.load(overrides=words), {"CPU": 64.0}
    assert config.scaling.per_worker["GPU"] == 0.25
    assert needed(config, "stage2") == (4 + 2, 0.25)
    check_resources(config, {**cpus, "GPU": 0.25})
    with pytest.raises(UserError, match=r"needs 0\.25 GPUs, this machine has 0\.2"):
        check_resources(config, {**cpus, "GPU": 0.2})
    with pytest.raises(UserError, match="NCCL does not put two of 2 workers on the same GPU"):
        Config.load(overrides=[*words, "scaling.num_workers=2"])
    assert Config.load(overrides=["scaling=fsdp_multi"]).scaling.num_workers == 4


def test_a_sample_is_an_override() -> None:
    base = Config.load(overrides=["training.seed=1"])
    sample = base.override({"stages.stage1_9.optimizer.lr": 5e-3, "training.seed": 2})
    assert sample.stages["stage1_9"].optimizer.lr == 5e-3
    assert sample.stages["stage2"].seed == 2 and base.stages["stage2"].seed == 1


def test_training_runs_one_stage_and_replaces_the_pipeline() -> None:
    words = ["training=stage2_pretrain", "training.max_steps=7", "model=smollm2_135m"]
    config = Config.load(overrides=words)
    assert list(config.stages) == ["stage2"] and config.stages["stage2"].total_steps == 7


GPUS = {  # micro-batch and accumulation in Stage 1.9 and 2
    ("qwen3_4b", "a100_80gb"): (8, 8, 16, 4), ("qwen3_4b", "h100_80gb"): (8, 8, 16, 4),
    ("qwen3_4b", "a100_40gb"): (2, 32, 4, 16), ("qwen3_4b", "a40_48gb"): (4, 16, 8, 8),
    ("qwen3_4b", "a10g_24gb"): (1, 64, 2, 32), ("qwen3_4b", "rtx4090"): (1, 64, 2, 32),
    ("smollm2_135m", "a100_80gb"): (32, 2, 64, 1), ("smollm2_135m", "h100_80gb"): (32, 2, 64, 1),
    ("smollm2_135m", "a40_48gb"): (32, 1, 32, 1), ("smollm2_135m", "a10g_24gb"): (64, 2, 32, 4),
    ("smollm2_135m", "rtx4090"): (8, 8, 16, 4), ("qwen3_0.6b", "a100_80gb"): (8, 8, 8, 8),
}  # fmt: skip


@pytest.mark.parametrize(("model", "gpu"), GPUS)
def test_a_kind_of_gpu_cuts_batches_by_model_and_stage(model: str, gpu: str) -> None:
    words = ["pipeline=standard", f"model={model}", f"gpu={gpu}"]
    stages = Config.load(overrides=words).stages
    found = [
        number
        for stage in (stages["stage1_9"], stages["stage2"])
        for number in (stage.batch_size, stage.gradient_accumulation_steps)
    ]
    assert tuple(found) == GPUS[model, gpu]


def test_a_kind_of_gpu_comes_before_what_is_said(tmp_path: Path) -> None:
    words = ["pipeline=standard", "model=qwen3_4b", "gpu=rtx4090", "training.batch_size=4",
             "stages.stage2.gradient_accumulation_steps=5"]  # fmt: skip
    config = Config.load(overrides=words)
    assert [config.stages["stage2"].batch_size, config.stages["stage1_9"].batch_size] == [4, 4]
    assert config.stages["stage2"].gradient_accumulation_steps == 5
    assert config.stages["stage1_9"].gradient_accumulation_steps == 64
    saved = tmp_path / "config.yaml"
    saved.write_text(config.dump())
    assert Config.load(str(saved)).model_dump() == config.model_dump()
    with pytest.raises(UserError, match=r"gpu=a100_80: no such choice .nearest: 'a100_80gb'"):
        Config.load(overrides=["gpu=a100_80"])


@pytest.mark.parametrize(
    ("words", "coefficients"),
    [
        ([], (10.0, 5.0, "auto")),
        (["distillation=summarization"], (1.0, 5.0, "auto")),
        (["distillation.lambda_logits=3", "distillation.gamma_attention=2e-3"], (3.0, 5.0, 2e-3)),
        (["distillation=summarization", "distillation.lambda_logits=4"], (4.0, 5.0, "auto")),
        (["distillation.temperature=3", "training.objectives.logits_distill.temperature=4",
          "stages.stage3.objectives.logits_distill.weight=7"], (7.0, 4.0, "auto")),
    ],
)  # fmt: skip
def test_coefficients_of_bitdistill(
    words: list[str], coefficients: tuple[float, float, object]
) -> None:
    """Stage preset < distillation < training < the stage itself; a dump says the same again."""
    config = Config.load(overrides=["pipeline=full", *words])
    for each in (config, Config.load_text(config.dump(), "config.yaml")):
        found = each.stages["stage3"].objectives
        logits, attention = found.logits_distill, found.attention_distill
        assert logits is not None and attention is not None
        assert (logits.weight, logits.temperature, attention.gamma) == coefficients
        other = each.stages["stage2"].objectives.logits_distill
        assert other is not None and other.weight == 0.5 and other.temperature in (2.0, 4.0)
    again = config.override({"distillation.lambda_logits": 9.0}).stages["stage3"].objectives
    assert again.logits_distill is not None and again.logits_distill.weight == 9.0


def test_a_remote_teacher_is_asked_at_the_temperature_of_whoever_compares_with_it() -> None:
    words = ["training=dlm_distill", "model.teacher.type=actors", "model.teacher.top_k=100"]
    stage = Config.load(overrides=words).stages["dlm_distill"]
    assert stage.asked_at == 5.0 and list(stage.likeliest) == ["tcs_distill"]
    raised = "training.curriculum.phases=[{until: 1, weights: {logits_distill: 1}}]"
    both = "training.objectives.logits_distill={weight: 0, temperature: 5}"
    stage = Config.load(overrides=[*words, raised, both]).stages["dlm_distill"]
    assert stage.asked_at == 5.0 and list(stage.likeliest) == ["logits_distill", "tcs_distill"]


def test_the_part_of_layers_may_fall_where_there_is_one() -> None:
    words = ["stages.stage1_9.distillation_schedule.type=linear"]
    stage = Config.load(overrides=words).stages["stage1_9"]
    layers = [stage.weights(step)["hidden_distill"] for step in (0, stage.total_steps - 1)]
    assert layers[0] == 0.5 and layers[1] < 0.1


def test_tokens_become_steps() -> None:
    words = ["training=stage2_pretrain", "training.total_tokens=1_000_000"]
    stage = Config.load(overrides=words).stages["stage2"]
    assert stage.total_steps == 1_000_000 // (64 * 1024)


@pytest.mark.parametrize(
    ("words", "steps"),
    [
        (["training.total_tokens=20480"], 10),
        (["training.total_tokens=20480", "stages.stage2.max_steps=7"], 7),
        (["training.max_steps=7", "stages.stage2.total_tokens=20480"], 10),
        (["training.max_steps=7", "training.total_tokens=20480"], 7),
    ],
)
def test_tokens_go_before_the_steps_of_a_preset(words: list[str], steps: int) -> None:
    """A step of the demo has 8 rows of 256 tokens; of one voice that gives both, steps count."""
    config = Config.load(overrides=[*words, "training.lambda_warmup.warmup_steps=3"])
    assert config.stages["stage2"].total_steps == steps
    again = Config.load_text(config.dump(), "config.yaml")
    assert again.stages["stage2"].total_steps == steps
    assert again.override({"training.max_steps": 5}).stages["stage2"].total_steps == 5


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["stages.stage3.optimizer.lr=1"], r"stages\.stage3: .*such stage \(nearest: 'stage2'\)"),
        (["training.optimizer.lrr=1"], r"^training\.optimizer\.lrr: .*nearest: 'lr'\)"),
        (["model=smolm2"], r"model=smolm2: no such choice \(nearest: 'smollm2_135m'\)"),
        (["data=locall"], r"data=locall: no such choice \(nearest: 'local'\)"),
        (["training.max_steps=-1"], r"training\.max_steps: .*greater than or equal to 0"),
        (["model.path=x"], r"model: give either path .* or config"),
        (["data.sources.code.weight=-1"], r"data\.sources\.code\.weight"),
        (["data.sources.code.weight=0", "data.sources.prose.weight=0",
          "data.sources.arithmetic.weight=0"], r"data: the weights of all sources are 0"),
        (["stages.stage2.objectives.logits_distill.weight=0",
          "stages.stage2.objectives.continue_pretrain.weight=0"], r"no objective has a weight"),
        (["stages.stage2.curriculum.phases=[{until: 0.5, weights: {continue_pretrain: 0, "
          "logits_distill: 0}}, {until: 1.0}]"], r"stage2\.objectives: no objective.* at step 0"),
        (["stages.stage2.curriculum.interpolation=linear", "stages.stage2.curriculum.phases="
          "[{until: 0.5, weights: {logits_distill: 0}}, {until: 1, weights: {logits_distill: 1}}]",
          "stages.stage2.objectives.continue_pretrain.weight=0"], r"no objective.* at step 0: see"),
        (["stages.stage2.curriculum.phases=[{until: 1, weights: {hidden_distill: 1}}]"],
         r"stage2.curriculum.phases.0: hidden_distill is none of the stage's objectives"),
        (["stages.stage0.objectives.logits_distill.weight=1"], r"a dense stage has no teacher"),
        (["stages.stage1_9.lambda_warmup.warmup_steps=31"], r"31 is longer than the stage \(30"),
        (["stages.stage2.saliency_curriculum={enabled: true, warmup_steps: 91}"],
         r"stages\.stage2\.saliency_curriculum\.warmup_steps: 91 is longer .*\(90 steps\)"),
        (["stages.stage2.activation_sparsity={enabled: true, warmup: {warmup_steps: 91}}"],
         r"stage2\.activation_sparsity\.warmup\.warmup_steps: 91 is longer .*\(90 steps\)"),
        (["training=base", "training.objectives.dlm.weight=0.7"],
         r"stages\.stage2\.objectives\.dlm\.weight: 0\.7 changes nothing, .*\(0, 0\.3, 0\.5, 1\)"),
        (["training=base", "stages.stage2.objectives={dlm: {weight: 0}}"],
         r"stage2\.objectives\.dlm\.weight: 0 changes nothing, .* stages\.stage2\.curriculum\.ph"),
        (["stages.stage2.lambda_warmup.min=0.9", "stages.stage2.lambda_warmup.max=0.5"],
         r"stages\.stage2\.lambda_warmup: min \(0\.9\) is above max"),
        (["data=local"], r"data\.sources"),
        (["stages=5"], r"^stages: takes settings by name, not 5"),
        (["stages.stage2=5"], r"^stages\.stage2: takes settings by name, not 5"),
        (["training.optimizer=5"], r"^training\.optimizer: "),
        (["model.quantization.activation_bits=4"],
         r"^model\.quantization\.activation_bits: 4 is not one of 8$"),
        (["distillation=classification"], r"lambda_logits: no stage distils attention"),
        (["training=stage3_distill", "distillation.temperature=0"], r"distillation\.temperature"),
        (["training=stage3_distill", "training.objectives.continue_pretrain.weight=0"],
         r"attention_distill\.gamma: auto is measured by .* which is off; give a number"),
        (["training=lrc_calibration", "training.lrc.rank=2.5"],
         r"training\.lrc\.rank: 2\.5 is neither a share below 1 nor a whole number"),
        (["training=lrc_calibration", "export.gguf=[i2_s]"],
         r"export: no engine computes the low-rank corrections of stage lrc"),
        (["stages.stage0.lrc.rank=4", "export.gguf=[]", "export.huggingface=false"],
         r"stage0\.lrc: a dense stage has no ternary layer to correct"),
        (["model.teacher=x/y"], r"model\.teacher: .* say model\.teacher\.path=x/y"),
        (["model.teacher.type=actor"], r"model\.teacher.*nearest: 'actors'"),
        (["model.teacher.type=server"], r"model\.teacher\.url"),
        (["model.teacher.type=server", "model.teacher.url=host:80"],
         r"model\.teacher\.url: .*'host:80' is no address of a server; say http://"),
        (["model.teacher.type=actors"],
         r"stages\.stage1_9\.objectives\.hidden_distill: compares more than the likeliest tokens"),
        (["model.teacher.type=server", "model.teacher.url=http://host:80/v1",
          "stages.stage1_9.objectives.hidden_distill.weight=0",
          "stages.stage1_9.lm_loss_weight=null",
          "stages.stage1_9.objectives.logits_distill.temperature=1"],
         r"stages\.stage2\.objectives\.logits_distill\.temperature: 2, but a server tells"),
        (["model.teacher.type=actors", "model.teacher.top_k=8",
          "stages.stage1_9.objectives.hidden_distill.weight=0",
          "stages.stage2.objectives.logits_distill.top_k=9"],
         r"stages\.stage2\.objectives\.logits_distill\.top_k: 9 is more than the 8 tokens"),
        (["training=dlm_distill", "model.teacher.type=actors"],
         r"dlm_distill\.objectives\.tcs_distill\.top_k: 100 is more than the 64 tokens"),
        (["training=dlm_distill", "model.teacher.type=server", "model.teacher.url=http://host/v1",
          "model.teacher.top_k=100"],
         r"dlm_distill\.objectives\.tcs_distill\.temperature: 5, but a server tells"),
        (["training=dlm_distill", "model.teacher.type=actors", "model.teacher.top_k=100",
          "training.objectives.logits_distill={weight: 0}",
          "training.curriculum.phases=[{until: 1, weights: {logits_distill: 1}}]"],
         r"logits_distill and tcs_distill have temperatures 2 and 5, but actors are asked at one"),
        (["training=stage2_pretrain", "model.teacher.type=server",
          "model.teacher.url=http://host/v1", "training.objectives.logits_distill.weight=0",
          "training.curriculum.phases=[{until: 1, weights: {logits_distill: 1}}]"],
         r"stage2\.objectives\.logits_distill\.temperature: 2, but a server tells"),
        (["stages.stage2.distillation_schedule.type=linear"],
         r"stage2\.distillation_schedule\.type: linear .* give stages\.stage2\.lm_loss_weight"),
        (["training.fp8.recipe=tensorwise"], r"training\.fp8\.recipe"),
        (["export.gguf=[i3_s]"], r"'i3_s' is not one of .*nearest: 'i2_s'"),
    ],
)  # fmt: skip
def test_every_mistake_has_its_sentence(words: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        Config.load(overrides=words)
    assert len(str(caught.value).splitlines()) == 1, "one mistake, one sentence"


def test_a_warm_up_may_take_the_whole_stage_and_is_nothing_to_stages_without_it() -> None:
    """The embedded pipeline pretrains for 350 steps, distils for 30 and then for 90."""
    words = [
        "stages.stage2.saliency_curriculum={enabled: true, warmup_steps: 90}",
        "stages.stage2.activation_sparsity={enabled: true, warmup: {warmup_steps: 90}}",
        "stages.stage0.activation_sparsity={enabled: true, warmup: {warmup_steps: 351}}",
        "stages.stage1_9.saliency_curriculum.warmup_steps=31",
    ]
    assert Config.load(overrides=words).stages["stage2"].saliency_curriculum.enabled


def test_a_weight_is_heard_where_a_phase_leaves_it_or_its_voice_gives_the_phases() -> None:
    base, weight = ["training=base"], "training.objectives.dlm.weight=0.7"
    some = "training.curriculum.phases=[{until: 0.5, weights: {dlm: 0}}, {until: 1}]"
    whole = "training.curriculum.phases=[{until: 1, weights: {dlm: 0.2}}]"
    for phases, at_the_end in ((some, 0.7), ("training.curriculum.phases=[]", 0.7), (whole, 0.2)):
        stage = Config.load(overrides=[*base, weight, phases]).stages["stage2"]
        assert stage.weights(stage.total_steps - 1)["dlm"] == at_the_end
    saved = Config.load_text(Config.load(overrides=base).dump(), "config.yaml")
    assert saved.model_dump() == Config.load(overrides=base).model_dump()
    with pytest.raises(UserError, match=r"dlm\.weight: 0\.7 changes nothing"):
        saved.override({"training.objectives.dlm.weight": 0.7})
    without = saved.override({"training.curriculum.phases": []})
    assert without.override({"training.objectives.dlm.weight": 0.7})
    with pytest.raises(UserError, match=r"2 problems:\n.*max_steps.*\n.*changes nothing"):
        Config.load(overrides=[*base, weight, "training.max_steps=soon"])


@pytest.mark.parametrize(
    "words",
    [
        ["modle=demo", "training.seed=x"],
        ["model=demoo", "data=embeded"],
        ["model=demoo", "model.quantization.sublnn=all", "data=embeded", "pipeline=demmo"],
        ["stages.stage20.seed=3", "training.seed=x"],
        ["stages.stage2=5", "training.seed=x", "scaling.readers=0"],
        ["gpu=a100_80", "pretrain", "trainin.seed=1", "export.gguf=[i3_s]"],
    ],
)
def test_every_word_that_is_wrong_is_told_at_once(words: list[str]) -> None:
    """And nothing else that only follows."""
    with pytest.raises(UserError) as caught:
        Config.load(overrides=words)
    assert str(caught.value).startswith(f"{len(words)} problems:\n"), caught.value


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("stages: 5", r"stages \(mine.yaml, line 1\): takes settings by name, not 5"),
        ("stages: {stage2: 5}", r"stages\.stage2 \(mine.yaml, line 1\): takes settings by name"),
        ("training: 5", r"training \(mine.yaml, line 1\): takes settings by name, not 5"),
        ("distillation: 5", r"distillation \(mine.yaml, line 1\): takes settings by name, not 5"),
        ("gpu: 5", r"gpu \(mine.yaml, line 1\): takes settings by name, not 5"),
    ],
)
def test_a_file_without_settings_where_they_belong(text: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        Config.load_text(text, "mine.yaml")
    assert len(str(caught.value).splitlines()) == 1
