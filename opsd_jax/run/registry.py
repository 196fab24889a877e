# SPDX-License-Identifier: Apache-2.0
"""What a gin file may name, as text: imported only where a config names it (`config.py`).

A place is "module:name". Add a source, a function or an area here and its defaults to
experiments/base.gin.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

# The areas of a gin file, `area.field = value`, in the order in which an Experiment holds them.
AREAS = {
    "train": "opsd_jax.run.experiment:TrainConfig",
    "contexts": "opsd_jax.data.contexts:ContextConfig",
    "rollout": "opsd_jax.sampling.config:RolloutConfig",
    "divergence": "opsd_jax.divergence.config:DivergenceConfig",
    "teacher": "opsd_jax.method.teacher:TeacherConfig",
    "optimizer": "opsd_jax.method.optimizer:OptimizerConfig",
    "mesh": "opsd_jax.model.sharding:MeshConfig",
    "evaluate": "opsd_jax.evaluation.evaluate:EvaluateConfig",
    "guard": "opsd_jax.host.guard:GuardConfig",
}
# What the values of train.model, train.problems, train.heldout, train.lora, train.probes,
# train.completions, train.objective, teacher.model and teacher.reasons may be, written @Name().
SOURCES = {
    "lora": "opsd_jax.model.config:LoraConfig",
    "ModelConfig": "opsd_jax.model.config:ModelConfig",
    "WarmStart": "opsd_jax.testbed.warm_start:WarmStartConfig",
    "WarmStartCorpus": "opsd_jax.testbed.corpus:CorpusConfig",
    "PretrainedModel": "opsd_jax.run.base_model:PretrainedModel",
    "FinishedRun": "opsd_jax.run.config:finished_run",
    "RandomModel": "opsd_jax.run.base_model:RandomModel",
    "TestbedBase": "opsd_jax.run.testbed_base:TestbedBase",
    "StudentRollouts": "opsd_jax.method.completions:StudentRollouts",
    "TeacherRollouts": "opsd_jax.method.completions:TeacherRollouts",
    "MixedRollouts": "opsd_jax.method.completions:MixedRollouts",
    "References": "opsd_jax.method.completions:References",
    "ReasonFirst": "opsd_jax.method.reason_first:ReasonFirst",
    "Distillation": "opsd_jax.method.mix:Distillation",
    "Likelihood": "opsd_jax.method.mix:Likelihood",
    "Anchor": "opsd_jax.method.mix:Anchor",
    "PolicyGradient": "opsd_jax.method.policy_gradient:PolicyGradient",
    "Mix": "opsd_jax.method.mix:Mix",
    "JsonlProblems": "opsd_jax.data.files:JsonlProblems",
    "ParquetProblems": "opsd_jax.data.files:ParquetProblems",
    "TfdsProblems": "opsd_jax.data.tfds:TfdsProblems",
    "Benchmark": "opsd_jax.data.benchmarks:Benchmark",
    "OtherReferences": "opsd_jax.data.problems:OtherReferences",
    "ReasoningGym": "opsd_jax.data.reasoning_gym:ReasoningGym",
    "ChainArithmetic": "opsd_jax.testbed.problems:ChainArithmetic",
}
# What a function in a gin file may be, written @name, besides those of the user's own.
FUNCTIONS = {
    "own_solution": "opsd_jax.testbed.world:own_solution",
    "wrong_prefix_probe": "opsd_jax.testbed.probe:wrong_prefix_probe",
    "position_sigmoid": "opsd_jax.divergence.token_weights:position_sigmoid",
    "top_student_entropy": "opsd_jax.divergence.token_weights:top_student_entropy",
    "confident_teacher": "opsd_jax.divergence.token_weights:confident_teacher",
    "uncertain_teacher": "opsd_jax.divergence.token_weights:uncertain_teacher",
    "gap_sigmoid": "opsd_jax.divergence.token_weights:gap_sigmoid",
    "evidence": "opsd_jax.divergence.token_weights:evidence",
    "positive_gap": "opsd_jax.divergence.token_weights:positive_gap",
    "skip_first": "opsd_jax.divergence.token_weights:skip_first",
    "linear": "opsd_jax.method.mix:linear",
    "add_gap": "opsd_jax.method.advantage_shapes:add_gap",
    "rlsd": "opsd_jax.method.advantage_shapes:rlsd",
    "antisd": "opsd_jax.method.advantage_shapes:antisd",
    "rlcsd": "opsd_jax.method.advantage_shapes:rlcsd",
    "gap": "opsd_jax.method.advantage_shapes:gap",
    "reopold": "opsd_jax.method.advantage_shapes:reopold",
    "opsa": "opsd_jax.method.advantage_shapes:opsa",
    "target_mean": "opsd_jax.divergence.targets:mean",
    "target_contrast": "opsd_jax.divergence.targets:contrast",
    "target_barycentre": "opsd_jax.divergence.targets:barycentre",
    "target_cautious_barycentre": "opsd_jax.divergence.targets:cautious_barycentre",
}
PLACES = AREAS | SOURCES | FUNCTIONS


class TypeWords(dict[str, str]):
    """Words for types, kept by place, so that a word for a type does not import it."""

    def get(self, of: Any, default: Any = None) -> Any:  # type: ignore[override]
        place = f"{getattr(of, '__module__', '')}:{getattr(of, '__qualname__', '')}"
        return super().get(place, default)


# What the areas' fields may be.
TYPE_WORDS = TypeWords(
    {place: f"@{name}()" for name, place in SOURCES.items()}
    | {
        "opsd_jax.run.experiment:BaseSource": "a model such as @PretrainedModel()",
        "opsd_jax.method.teacher:LoadsModel": "a model such as @PretrainedModel()",
        "opsd_jax.data.problems:ProblemSource": "problems such as @JsonlProblems()",
        "opsd_jax.method.completions:CompletionSource": "completions such as @References()",
        "opsd_jax.method.objective:Objective": "an objective such as @PolicyGradient()",
    }
)


def resolve(name: str) -> Callable[..., Any]:
    """The dataclass or function behind a name of `PLACES`, imported now."""
    module, _, attribute = PLACES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
