# SPDX-License-Identifier: Apache-2.0
"""What a gin file says, one frozen and validated value per area: `Experiment`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Annotated, NamedTuple, Protocol

from jax.sharding import Mesh

from opsd_jax.data.contexts import ContextConfig
from opsd_jax.data.problems import ProblemSource
from opsd_jax.data.tokenizer import Tokenizer
from opsd_jax.divergence.losses import DivergenceConfig
from opsd_jax.errors import UserError
from opsd_jax.evaluation.evaluate import EvaluateConfig
from opsd_jax.fields import Count, Natural, NotNegative, Positive, Seed, require
from opsd_jax.host.guard import GuardConfig
from opsd_jax.method.completions import CompletionSource, References, StudentRollouts
from opsd_jax.method.mix import Anchor, Distillation, Likelihood, terms_of
from opsd_jax.method.objective import Objective, check_ratio
from opsd_jax.method.optimizer import OptimizerConfig
from opsd_jax.method.policy_gradient import PolicyGradient
from opsd_jax.method.rows import parts_of
from opsd_jax.method.teacher import TeacherConfig
from opsd_jax.model.config import DTYPES, REMATS, TEXT_ATTENTION, LoraConfig, ModelConfig
from opsd_jax.model.sharding import MeshConfig, Rules
from opsd_jax.sampling.config import RolloutConfig


class Base(NamedTuple):
    """The model a run starts from: its shape, its parameters and its tokenizer."""

    config: ModelConfig
    params: dict
    tokenizer: Tokenizer
    step: int | None = None  # of the run whose student it is (@FinishedRun())


class BaseSource(Protocol):
    """Anything that config can name as the base model."""

    def load(self, mesh: Mesh, rules: Rules, cache_dir: str, say: Callable[[str], None]) -> Base:
        """Parameters on the mesh; `cache_dir` may keep what was costly to make."""


def tokenizer_of(source: BaseSource) -> Tokenizer:
    """The tokenizer of a model source; no weights are read.

    Raises:
      UserError: it has none by itself.
    """
    load = getattr(source, "load_tokenizer", None)
    if load is None:
        raise UserError(
            f"train.model = @{type(source).__name__}() has no method load_tokenizer(), which "
            "`opsd data` needs"
        )
    return load()


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One run.

    Args:
      model: where the base model comes from.
      problems: what is trained on.
      heldout: what is evaluated on; None evaluates nothing.
      num_steps: optimiser steps.
      batch_size: B, completions per step over all devices.
      group_size: G, completions of each problem, B / G problems a step. What they have in common is
        read once, where each device's rows of a micro-batch are whole groups.
      completions: where they come from: @StudentRollouts(), @TeacherRollouts(),
        @MixedRollouts() or @References().
      objective: what is learned from them: @Distillation(), @Likelihood(), @PolicyGradient(), or
        @Mix() of several.
      num_updates: optimiser passes over each batch of completions.
      learning_rate: peak of the schedule.
      seed: of rollouts, data order and adapter initialisation. On an NVIDIA GPU the same numbers
        come again only with XLA_FLAGS=--xla_gpu_deterministic_ops=true (slower: sums that threads
        add to as they come, such as an embedding's gradient, become sorts).
      num_micro_batches: A, the loss is computed on B / A rows at a time.
      num_widths: with 3, rows of like length share a micro-batch, which is scored no wider than
        max_new_tokens, its half or its quarter; each is compiled. A function of
        `divergence.weights` or a shape then sees such rows together.
      lora: train adapters only; None trains all parameters.
      dtype: compute dtype; trained parameters and moments are float32 whatever it is. Where it is
        "float32", JAX multiplies matrices in one bfloat16 pass on a TPU and in TF32 on a recent
        NVIDIA GPU, unless JAX_DEFAULT_MATMUL_PRECISION=highest is set: float32 sums, but not the
        1e-5 between rollout and scoring that a CPU keeps.
      attention: how whole texts are attended to: "xla", "splash" (TPU) or "cudnn" (NVIDIA GPU,
        bfloat16); None: the kernel of the device where it can, see `text_attention.py`.
      remat: what the backward pass computes again: True whole layers, "keep_projections" all but
        the outputs of projections, "offload_projections" likewise with these in the host's memory,
        False nothing.
      log_every_steps: a period, at least 1.
      eval_every_steps, checkpoint_every_steps: periods; 0 = never (a checkpoint is always
        written at the end).
      checkpoint_every_minutes: besides, so long after the last one, by the clock of process 0;
        0 = never.
      keep_checkpoints: the latest so many, and the best by eval/student/accuracy.
      profile_steps: (first, last) step of a profiler trace in WORKDIR/profile
        (`host/profile_window.py`).
      compilation_cache: where compiled programs are kept for the next start: "auto" is
        WORKDIR/compiled on accelerators, unless JAX_COMPILATION_CACHE_DIR is set, and nowhere on a
        CPU; a folder, on any device; None leaves it to JAX.
      hang_minutes: a process of a pod ends with status 75 if it waits so long for a step
        (`host/watchdog.py`); evaluations may take longer; 0 = never.
      num_samples_logged: graded completions kept in samples/ at each evaluation.
      probes: functions (model, student, teacher variables, tokenizer) -> metrics, called at
        each evaluation.
      grader_workers: processes that grade completions, each under a hard time limit; 0 grades in
        the training process, for graders that cannot hang.
      tensorboard, wandb: further writers, behind the extras of the same names.
    """

    model: BaseSource
    problems: ProblemSource
    num_steps: Count
    batch_size: Count
    learning_rate: Positive
    heldout: ProblemSource | None = None
    group_size: Count = 1
    completions: CompletionSource = StudentRollouts()
    objective: Objective = Distillation()
    num_updates: Count = 1
    seed: Seed = 0
    num_micro_batches: Count = 1
    num_widths: Count = 1
    lora: LoraConfig | None = None
    dtype: Annotated[str, DTYPES] = "float32"
    attention: Annotated[str, TEXT_ATTENTION] | None = None
    remat: bool | Annotated[str, REMATS] = True
    log_every_steps: Count = 1
    eval_every_steps: Natural = 20
    checkpoint_every_steps: Natural = 20
    checkpoint_every_minutes: NotNegative = 0
    keep_checkpoints: Count = 2
    profile_steps: tuple[Count, ...] | None = None
    compilation_cache: str | None = "auto"
    hang_minutes: NotNegative = 60
    num_samples_logged: Natural = 16
    probes: tuple[Callable[..., dict[str, float]], ...] = ()
    grader_workers: Natural = 2
    tensorboard: bool = False
    wandb: bool = False

    def __post_init__(self):
        require("train", self)
        if self.batch_size % self.group_size:
            raise UserError(
                f"train.batch_size = {self.batch_size} must be a multiple of train.group_size = "
                f"{self.group_size}"
            )
        if self.completions != self.references and isinstance(self.completions, References):
            raise UserError("Likelihood.of and train.completions must be the same @References()")
        if self.num_widths > 1 and self.references and not isinstance(self.completions, References):
            raise UserError(
                "train.num_widths must be 1 with Likelihood.of: references may be longer than the "
                "completions beside them"
            )
        if self.profile_steps is not None:
            object.__setattr__(self, "profile_steps", tuple(self.profile_steps))
            window = self.profile_steps
            if len(window) != 2 or not window[0] <= window[1] <= self.num_steps:
                raise UserError(
                    "train.profile_steps must be (first, last) with first <= last <= "
                    f"train.num_steps = {self.num_steps}, not {window}"
                )

    @property
    def references(self) -> References | None:
        """The data's own completions, where they are those of the step or a term's."""
        terms = terms_of(self.objective)
        found = [term.of for term in terms if isinstance(term, Likelihood) and term.of]
        found += [self.completions] if isinstance(self.completions, References) else []
        return found[0] if found else None


@dataclasses.dataclass(frozen=True)
class Experiment:
    """All that a gin file says, one validated value per area."""

    train: TrainConfig
    contexts: ContextConfig
    rollout: RolloutConfig
    divergence: DivergenceConfig
    teacher: TeacherConfig
    optimizer: OptimizerConfig
    mesh: MeshConfig
    evaluate: EvaluateConfig
    guard: GuardConfig = GuardConfig()
    imports: tuple[str, ...] = ()  # the user's modules that the gin files import

    @property
    def training_contexts(self) -> ContextConfig:
        """What student and teacher are asked in training."""
        return self.contexts.reasoning_first() if self.teacher.reasons else self.contexts

    @property
    def asks_teacher(self) -> bool:
        """Whether what is minimised, or who answers, looks at the teacher's context."""
        completions, terms = self.train.completions, terms_of(self.train.objective)
        # An objective of the user's own may look at anything.
        reads = any(getattr(term, "reads_teacher", True) for term in terms)
        return reads or (completions.generates and not completions.on_policy)

    def __post_init__(self):
        self._check_contexts()
        if self.teacher.reasons and not self.asks_teacher:
            raise UserError(
                "teacher.reasons is of no use: neither train.objective nor train.completions "
                "looks at the teacher's context; set it to None"
            )
        for term in terms_of(self.train.objective):
            if "varied" in parts_of(getattr(term, "rows", ())) and self.train.group_size == 1:
                raise UserError(
                    f"{type(term).__name__}.rows = 'varied' takes problems whose completions have "
                    "different grades: set train.group_size to 2 or more"
                )
            if isinstance(term, PolicyGradient):
                self._check_policy_gradient(term)
            elif isinstance(term, Anchor):
                self._check_anchor()
            elif not isinstance(term, Likelihood):
                self._check_sampled_token()

    def _check_contexts(self) -> None:
        """What contexts that show attempts, and several views, need of the other areas."""
        contexts, completions = self.contexts, self.train.completions
        shown = contexts.after_rollout
        if self.teacher.reasons and (shown or contexts.views):
            raise UserError(
                "teacher.reasons writes one analysis before the rollout: set it to None, or leave "
                "out contexts.views and what contexts.teacher shows of attempts"
            )
        if not shown:
            return
        name = f"{{{min(shown)}}}"
        if completions.generates and not completions.on_policy:
            raise UserError(
                f"contexts.teacher or a view shows {name}, which there is only after the rollout, "
                "but train.completions has the teacher answer in its context: set it to "
                "@StudentRollouts()"
            )
        if siblings := shown & {"sibling", "wrong_sibling"}:
            if self.train.group_size == 1:
                raise UserError(
                    f"contexts.teacher or a view shows {{{min(siblings)}}}, another answer to the "
                    "same problem: set train.group_size to 2 or more"
                )

    def _check_sampled_token(self) -> None:
        """The weight of a sampled token is pS(y) / q(y), and its mean is over all y."""
        if not self.divergence.weighs_importance:
            return
        one_token = self.divergence.name == "sampled_token"
        asks = "name 'sampled_token'" if one_token else "importance_clip"
        if not self.train.completions.generates:
            raise UserError(
                f"divergence.{asks} needs completions that were sampled: set train.completions to "
                "@StudentRollouts()"
            )
        if self.divergence.importance_clip is not None and not self.rollout.temperature:
            raise UserError(
                "divergence.importance_clip weighs by the probability with which a token was "
                "sampled, and a greedy rollout samples none: set rollout.temperature above 0"
            )
        if one_token and not self.rollout.covers_vocabulary:
            raise UserError(
                "divergence.name 'sampled_token' is biased where some tokens are never sampled: "
                "set rollout.temperature above 0, rollout.top_k = 0, rollout.top_p = 1.0, "
                "rollout.min_p = 0.0 and rollout.min_new_tokens = 0"
            )

    def _check_policy_gradient(self, objective: PolicyGradient) -> None:
        """What a policy gradient needs of the other areas."""
        if objective.baseline == "group" and self.train.group_size == 1:
            raise UserError(
                "PolicyGradient compares the completions of a problem: set train.group_size to 2 "
                "or more, or PolicyGradient.baseline = 'batch'"
            )
        if not self.train.completions.generates:
            raise UserError(
                "PolicyGradient needs completions that were sampled: set train.completions to "
                "@StudentRollouts()"
            )
        check_ratio(self.rollout)

    def _check_anchor(self) -> None:
        """The initial policy is kept as the teacher, or under the adapters."""
        kept = self.teacher.weights == "initial" and not self.teacher.model
        if not kept and self.train.lora is None:
            raise UserError(
                "Anchor needs the initial policy, which is not kept here: set teacher.weights "
                "= 'initial' and teacher.model = None, or train.lora = @lora()"
            )
