# SPDX-License-Identifier: Apache-2.0
"""Every field of every config: what cannot be meant is refused by its name."""

import dataclasses
import math
import typing

import pytest

from opsd_jax.data.contexts import ContextConfig
from opsd_jax.data.files import JsonlProblems
from opsd_jax.data.reasoning_gym import ReasoningGym
from opsd_jax.divergence.config import DivergenceConfig
from opsd_jax.errors import UserError
from opsd_jax.evaluation.evaluate import EvaluateConfig
from opsd_jax.fields import Count, Natural, check, fits, hints_of
from opsd_jax.host.guard import GuardConfig
from opsd_jax.method.completions import MixedRollouts
from opsd_jax.method.mix import Anchor, Distillation, Likelihood
from opsd_jax.method.optimizer import OptimizerConfig
from opsd_jax.method.policy_gradient import PolicyGradient
from opsd_jax.method.reason_first import ReasonFirst
from opsd_jax.method.teacher import TeacherConfig
from opsd_jax.model.config import LoraConfig
from opsd_jax.model.rope import RopeScaling
from opsd_jax.model.sharding import MeshConfig
from opsd_jax.run.base_model import RandomModel
from opsd_jax.run.experiment import TrainConfig
from opsd_jax.sampling.config import RolloutConfig
from opsd_jax.testbed.corpus import CorpusConfig
from opsd_jax.testbed.problems import ChainArithmetic
from opsd_jax.testbed.warm_start import WarmStartConfig
from opsd_jax.testbed.world import ChainTask
from tests.tiny import tiny_config

CONFIGS = [
    TrainConfig(RandomModel(), ChainArithmetic(), num_steps=4, batch_size=4, learning_rate=0.1),
    ContextConfig(),
    RolloutConfig(8, min_new_tokens=2, stop_ids=(1,)),
    DivergenceConfig(),
    TeacherConfig(),
    OptimizerConfig(),
    MeshConfig(),
    EvaluateConfig(),
    GuardConfig(),
    LoraConfig(4, 8),
    RopeScaling("yarn", 2.0, 64),
    tiny_config(window=4, window_layers=(0,), num_experts=4, experts_per_token=2),
    MixedRollouts(),
    PolicyGradient(),
    Anchor(),
    Distillation(),
    Likelihood(),
    ReasonFirst(),
    RandomModel(),
    ChainArithmetic(),
    ChainTask(),
    CorpusConfig(),
    WarmStartConfig(),
    JsonlProblems("x.jsonl"),
    ReasoningGym("chain_sum"),
]
# Where 0 and -1 say something, written down apart from the annotations.
ZERO = set(
    """train.seed train.eval_every_steps train.checkpoint_every_steps train.num_samples_logged
    train.checkpoint_every_minutes train.hang_minutes
    train.grader_workers rollout.temperature rollout.top_k rollout.min_p rollout.presence_penalty
    rollout.min_new_tokens rollout.pad_id rollout.unroll_layers teacher.ema_decay
    optimizer.warmup_steps optimizer.decay_steps optimizer.b1 optimizer.b2 optimizer.weight_decay
    optimizer.max_grad_norm evaluate.num_problems evaluate.top_k evaluate.max_new_tokens
    evaluate.seed lora.dropout model.norm_offset model.query_scale
    model.embed_scale model.residual_scale model.output_scale model.num_experts
    policygradient.weight anchor.weight distillation.weight likelihood.weight
    reasonfirst.temperature reasonfirst.top_k randommodel.seed chainarithmetic.seed chaintask.seed
    chaintask.weak_fraction chaintask.weak_right chaintask.weak_misconception
    corpus.counterfactual corpus.drop corpus.near corpus.wrong_prefix warmstart.answer_rows
    warmstart.feedback_rows warmstart.seed warmstart.warmup_steps jsonlproblems.hash_start
    jsonlproblems.start reasoninggym.seed""".split()
)
MINUS_ONE = set(
    """rollout.presence_penalty mesh.data model.norm_offset model.query_scale model.embed_scale
    model.residual_scale model.output_scale""".split()
)


def numeric_fields():
    for config in CONFIGS:
        hints = hints_of(type(config))
        assert set(hints) >= {field.name for field in dataclasses.fields(config)}
        area = type(config).__name__.removesuffix("Config").lower()
        for field in dataclasses.fields(config):
            fitting = {kind for kind in (int, float) if fits(kind(3), _loose(hints[field.name]))}
            if fitting and not isinstance(getattr(config, field.name), bool):
                yield pytest.param(config, field.name, fitting, id=f"{area}.{field.name}")


def _loose(hint):
    """The annotation without its bounds."""
    if typing.get_origin(hint) is typing.Annotated:
        return hint.__origin__
    if typing.get_origin(hint) in (typing.Union, type(int | None)):
        loose = [_loose(part) for part in typing.get_args(hint) if part is not typing.Any]
        return typing.Union[tuple(loose)]  # noqa: UP007
    return hint if hint in (int, float) else str


@pytest.mark.parametrize("config, name, kinds", list(numeric_fields()))
def test_no_number_without_meaning_is_accepted(config, name, kinds, request):
    full = request.node.callspec.id
    is_float = float in kinds
    never = [math.nan, math.inf, -math.inf, "3", True, [3], 1e300, 1e-300, 10**12, -(10**12)]
    never += [] if is_float else [2.5, 3.0]
    never += [] if full in ZERO else [0] + [0.0] * is_float
    never += [] if full in MINUS_ONE else [-1]
    for value in never:
        if is_float and value in (10**12, -(10**12)) and _unbounded(config, name):
            continue
        with pytest.raises(UserError, match=rf"\.{name} must be|needs original_max_position"):
            dataclasses.replace(config, **{name: value})
    for value in [0] * (full in ZERO) + [-1] * (full in MINUS_ONE):
        dataclasses.replace(config, **{name: value})


def _unbounded(config, name) -> bool:
    """Whether a float may be as large as one likes, as rope_theta may; then 10^12 is no fault."""
    return fits(1e30, hints_of(type(config))[name])


@pytest.mark.parametrize(
    "value, hint, words",
    [
        (0, Count, "a.b must be an integer >= 1, not 0"),
        (
            2**31,
            Natural,
            "integer >= 0, not 2147483648, which has more than 32 bits",
        ),
        (1e-50, float, "a.b must be a number, not 1e-50, which is no number in float32"),
        ("y", typing.Annotated[str, ("n", "m", "x")] | None, "'n', 'm' or 'x' or None, not 'y'"),
        ((1, -1), tuple[Natural, ...], r"a.b must be a tuple \(an integer >= 0, ...\), not \(1, -"),
    ],
)
def test_the_sentence_says_what_is_wanted(value, hint, words):
    with pytest.raises(UserError, match=words):
        check("a.b", value, hint)
