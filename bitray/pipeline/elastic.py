"""How many workers there are where their number may vary: as many as can be placed.

Ray Train's own policy counts what is free on any node, also on those without the labels that
workers ask for and on those about to go, and would wait for such workers for ever.
"""

from typing import Any

from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    NoopDecision,
    ScalingDecision,
    ScalingPolicy,
    create_scaling_policy,
)
from ray.train.v2.api import data_parallel_trainer
from ray.train.v2.api.config import ScalingConfig

from bitray.pipeline.cluster import room


class Elastic(ElasticScalingPolicy):
    """Decides when workers have to be started, in Ray Train's controller."""

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """As many as can be placed; where that is too few, the fewest are waited for."""
        self._maybe_send_resource_request()  # an autoscaler is asked for the most
        said = self.scaling_config
        labels, strategy = said.label_selector or {}, said.placement_strategy
        assert isinstance(labels, dict) and isinstance(strategy, str), "what `fit` gives"
        bundle = said._resources_per_worker_not_none
        return self._get_resize_decision(
            room(bundle, said.min_workers, said.max_workers, strategy, labels)
        )

    def make_decision_for_running_worker_group(self, *_: Any, **__: Any) -> ScalingDecision:
        """Workers go by themselves, at a checkpoint, where there is room for more of them."""
        self._maybe_send_resource_request()
        return NoopDecision()


def policy(scaling_config: ScalingConfig) -> ScalingPolicy:
    """Ours where the number of workers may vary, else Ray Train's."""
    if scaling_config.elasticity_enabled:
        return Elastic(scaling_config)
    return create_scaling_policy(scaling_config)


def use_policy() -> None:
    """Have trainers of this process take `policy`; Ray Train has no setting for it."""
    data_parallel_trainer.create_scaling_policy = policy
