"""The model that a stage begins with, made on every worker."""

from dataclasses import dataclass
from functools import partial

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bitray import checkpoint
from bitray.data.packing import PackedRows
from bitray.data.shards import Shards, held_out
from bitray.inference.evaluation import evaluate
from bitray.models.batch import Batch
from bitray.models.convert import is_bitnet, to_bitnet
from bitray.models.loading import build_model, load_model
from bitray.models.losses import LossModel
from bitray.models.low_rank import (
    add_corrections,
    corrected_layers,
    init_corrections,
    train_corrections_only,
)
from bitray.models.mask_token import add_mask_token, mask_token_id
from bitray.nn import LowRank
from bitray.pipeline.config import Config
from bitray.pipeline.console import Say
from bitray.pipeline.evaluations import CONVERTED, ORIGINAL, HeldOut
from bitray.pipeline.folders import original, predecessor, resume_point
from bitray.training.parallel import from_rank_zero, world

CALIBRATION_ROWS = 4
"""Training rows of every source that SubLN gains are fitted to."""


@dataclass(frozen=True)
class Student:
    """How one worker makes it."""

    config: Config
    name: str
    """Of the stage."""
    shards: Shards
    held_out: HeldOut
    device: torch.device
    autocast: torch.autocast
    say: Say

    def make(self, tokenizer: PreTrainedTokenizerBase) -> tuple[PreTrainedModel, float]:
        """With all that the stage adds to it, and the strength at which its predecessor ended; the
        tokenizer gets the mask token if there is one."""
        settings = self.config.stages[self.name]
        model, strength = self._begun()
        block_diffusion = settings.objectives.dlm
        if settings.needs_mask_token or mask_token_id(model.config) is not None:
            add_mask_token(model, tokenizer, self.config.model.mask_token)
        if settings.needs_mask_token and block_diffusion and block_diffusion.mode == "block":
            model.config.diffusion_block = block_diffusion.block
        if settings.lrc is not None:
            self._correct(model, settings.lrc)
        return model, strength

    def _begun(self) -> tuple[PreTrainedModel, float]:
        """From the stage before; made ternary where that was not."""
        source = predecessor(self.config, self.name)
        if source is None:
            assert self.config.model.config is not None
            model = build_model(self.config.model.config)
        else:
            model = load_model(source, self.config.model.revision_of(source))
        if self.config.stages[self.name].dense:
            return model, 0.0
        assert source is not None, "a ternary stage starts from a dense model"
        if is_bitnet(model):
            held = checkpoint.load_state(source) if checkpoint.is_complete(source) else {}
            return model, held.get("position", {}).get("strength", 1.0)
        model.to(self.device)  # type: ignore[arg-type]  # transformers types `to` away
        return self._converted(model, source), 0.0

    def _converted(self, model: PreTrainedModel, source: str) -> PreTrainedModel:
        """The ternary model that a dense one becomes; both are evaluated, for the table."""
        if source == self.config.model.path:
            self.held_out.record(ORIGINAL, self.held_out.losses(LossModel(model)))
        wanted = self.config.model.quantization
        batch = self._calibration() if wanted.subln_init == "calibrated" else None
        model = to_bitnet(model, wanted.subln, batch)
        if not self.config.stages[self.name].convert_only:
            self.held_out.record(CONVERTED, self.held_out.losses(LossModel(model)))
        return model

    def _correct(self, model: PreTrainedModel, wanted: LowRank) -> None:
        """Add low-rank corrections unless they are there, and train nothing else."""
        model.to(self.device)  # type: ignore[arg-type]  # transformers types `to` away
        resumed = from_rank_zero(lambda: resume_point(self.config, self.name))
        if not corrected_layers(model):
            add_corrections(model, wanted.rank)
            if wanted.init != "kaiming" and not resumed:
                batch, origin = self._calibration(), original(self.config)
                assert origin is not None, "a ternary stage starts from a dense model"
                loss = partial(self._loss_on, model, batch)
                revision = self.config.model.revision_of(origin)
                weights = load_model(origin, revision).state_dict()
                notice = init_corrections(model, wanted, weights, batch, loss)
                if notice and world()[0] == 0:
                    self.say(f"{self.name:<9} {notice}")
        train_corrections_only(model)

    def _loss_on(self, model: PreTrainedModel, batch: Batch) -> float:
        """Cross-entropy on a batch, the same number on all workers."""
        losses = evaluate(LossModel(model), {"": [batch]}, self.device, self.autocast)
        return from_rank_zero(lambda: losses[""])

    def _calibration(self) -> Batch:
        """A few training rows of every source."""
        rows = held_out(self.shards, "train", CALIBRATION_ROWS)
        return PackedRows.joined(rows.values()).batch().to(self.device)
