# SPDX-License-Identifier: Apache-2.0
"""How good is a policy: sampled and greedy accuracy on held-out problems, with an error bar.

The same harness reads the student (problem only) and, as a diagnosis, the teacher (its weights
and its privileged context), each with or without thinking. Sample s of problem i always has the
same key, so two evaluations differ by the weights alone, and one that was interrupted goes on.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from opsd_jax.data.contexts import ContextConfig
from opsd_jax.data.grader_pool import Grade, GraderPool
from opsd_jax.data.grading import group_answers
from opsd_jax.data.problems import AnswerGrader, Problem, ProblemSet
from opsd_jax.data.rendering import render
from opsd_jax.data.tokenizer import Tokenizer
from opsd_jax.errors import UserError
from opsd_jax.evaluation import statistics
from opsd_jax.evaluation.generations import Generation, GenerationLog, Place, generation_of
from opsd_jax.fields import Count, Natural, Positive, Seed, require
from opsd_jax.sampling.config import RolloutConfig
from opsd_jax.sampling.random_keys import Use, key_for
from opsd_jax.sampling.slots import Sampler

log = logging.getLogger(__name__)

# A role is a context and, if named, a thinking switch in place of contexts.*_thinking.
ROLES = {
    f"{who}{mode}": (context, thinking)
    for who, context in (("student", "evaluation"), ("teacher", "teacher"))
    for mode, thinking in (("", None), ("_thinking", True), ("_no_thinking", False))
}


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """What is evaluated and how.

    Args:
      roles: whose answers, of `ROLES`: "student" has the student's weights and the `evaluation`
        context, "teacher" the teacher's weights and context; behind either "_thinking" or
        "_no_thinking" overrides the thinking switch of contexts.
      num_problems: the first so many held-out problems that fit their budgets; 0 = all.
      num_samples: n, completions per problem at `temperature`.
      batch_size: rows per rollout, over all processes.
      temperature, top_k, top_p, max_new_tokens: of the sampled pass; max_new_tokens 0 takes
        `rollout.max_new_tokens`.
      greedy: also one greedy completion per problem.
      seed: of the sampled pass.
    """

    roles: tuple[Annotated[str, tuple(ROLES)], ...] = ("student", "teacher")
    num_problems: Natural = 512
    num_samples: Count = 1
    batch_size: Count = 128
    temperature: Positive = 1.0
    top_k: Natural = 0
    top_p: Annotated[float, "> 0", "<= 1"] = 1.0
    max_new_tokens: Natural = 0
    greedy: bool = True
    seed: Seed = 0

    def __post_init__(self):
        require("evaluate", self)
        if not self.roles:
            raise UserError("evaluate.roles must name a role, not ()")
        if len(set(self.roles)) < len(self.roles):
            raise UserError(f"evaluate.roles must name each role once, not {self.roles!r}")


class Prompt(NamedTuple):
    """A held-out problem and its rendered prompt."""

    problem: Problem
    ids: list[int]


def held_out_prompts(
    config: EvaluateConfig,
    contexts: ContextConfig,
    tokenizer: Tokenizer,
    problems: ProblemSet,
    role: str,
) -> tuple[list[Prompt], int]:
    """Rendered prompts of the problems that fit their budget, in order, and how many do not.

    Raises:
      UserError: no problem fits, or one does not and `contexts.too_long` is "error", or one lacks
        the answer that its grader compares with.
    """
    prompts: list[Prompt] = []
    num_dropped = 0
    needs_answers = isinstance(problems.grade, AnswerGrader)
    for i in range(len(problems)):
        problem = problems[i]
        if needs_answers and not problem.answer:
            raise UserError(
                f"held-out problem {problem.id!r} has no answer to be graded by: give it one, or "
                "set train.heldout = None"
            )
        ids = render(contexts, tokenizer, problem, role)
        if ids is None:
            num_dropped += 1
        else:
            prompts.append(Prompt(problem, ids))
        if config.num_problems and len(prompts) == config.num_problems:
            break
    if not prompts:
        raise UserError(
            f"no held-out problem fits the {role} budget of {contexts.budget(role)} tokens; raise "
            "contexts.student_max_tokens / contexts.teacher_max_tokens"
        )
    return prompts, num_dropped


def sample_keys(key: jax.Array, num_prompts: int, num_samples: int) -> jax.Array:
    """[num_prompts * num_samples] keys: sample s of prompt i has fold_in(fold_in(key, i), s)."""
    fold = jax.vmap(jax.random.fold_in, (None, 0))
    keys = jax.vmap(fold, (0, None))(fold(key, jnp.arange(num_prompts)), jnp.arange(num_samples))
    return keys.reshape(-1)


class Evaluator:
    """Evaluates roles on a fixed set of prompts.

    Args:
      config: see `EvaluateConfig`.
      contexts: prompts of the roles.
      settings: rollout settings of training, of which stop ids and numerics are taken; their
        filters and penalties are not.
      sampler: compiled rollouts.
      tokenizer: writes the prompts and reads the completions.
      problems: held-out problems.
      pool: grades completions and compares answers.
    """

    def __init__(
        self,
        config: EvaluateConfig,
        contexts: ContextConfig,
        settings: RolloutConfig,
        sampler: Sampler,
        tokenizer: Tokenizer,
        problems: ProblemSet,
        pool: GraderPool,
    ):
        self.config, self.sampler, self.tokenizer, self.pool = config, sampler, tokenizer, pool
        self.problems = problems
        self.settings = settings.sampling(
            max_new_tokens=config.max_new_tokens or settings.max_new_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
        )
        if all(contexts.evaluated(ROLES[role][0]) is None for role in config.roles):
            raise UserError(
                f"evaluate.roles = {config.roles!r} can be asked nothing: contexts.teacher shows "
                "what a rollout gives; add 'student', or set contexts.teacher_fallback"
            )
        self.prompts: dict[str, list[Prompt]] = {}
        self.num_dropped: dict[str, int] = {}
        for role in config.roles:
            context, thinking = ROLES[role]
            asked = contexts.evaluated(context)
            if asked is None:  # `notices.asked_after` tells
                continue
            switch: Any = {} if thinking is None else {f"{context}_thinking": thinking}
            self.prompts[role], self.num_dropped[role] = held_out_prompts(
                config,
                dataclasses.replace(contexts, **switch),
                tokenizer,
                problems,
                asked,
            )
            if self.num_dropped[role]:
                log.warning(
                    "%d held-out problems are over the %s budget of %d tokens: eval/%s leaves "
                    "them out, other roles may not.",
                    self.num_dropped[role],
                    context,
                    contexts.budget(context),
                    role,
                )

    def __call__(
        self, student: dict, teacher: dict | None = None, log: GenerationLog | None = None
    ) -> Evaluation:
        """Samples, grades and counts.

        Args:
          student: the student's variables.
          teacher: the teacher's variables; None leaves its roles out.
          log: takes every generation as it comes, and gives those that it has.
        """
        metrics: dict[str, float] = {}
        generations: dict[str, list[Generation]] = {}
        by_problem: list[dict[str, Any]] = []
        for role, prompts in self.prompts.items():
            variables = student if role.startswith("student") else teacher
            if variables is None:
                continue
            n = self.config.num_samples
            sampled = self._generations(role, "sampled", variables, prompts, n, log)
            greedy = []
            if self.config.greedy:
                greedy = self._generations(role, "greedy", variables, prompts, 1, log)
            if self.pool.can_vote and n > 1:
                sampled = self._voted(sampled)
            rows = statistics.by_problem(sampled, greedy, n, self.pool.can_vote)
            by_problem += [{"role": role} | row for row in rows]
            found = statistics.metrics_of(rows, sampled) | {
                "num_dropped": float(self.num_dropped[role])
            }
            metrics |= {f"eval/{role}/{name}": value for name, value in found.items()}
            generations[role] = sampled
        return Evaluation(of_first_process(metrics), generations, by_problem)

    def _generations(
        self,
        role: str,
        sampling: str,
        variables: dict,
        prompts: list[Prompt],
        num_samples: int,
        log: GenerationLog | None,
    ) -> list[Generation]:
        """Graded completions, samples of a problem adjacent; grading overlaps with sampling.

        A completion that ran into the length limit is graded like any other.
        """
        settings = self.settings
        if sampling == "greedy":
            settings = dataclasses.replace(settings, temperature=0.0)
        places = [
            Place(role, sampling, p.problem.id, s) for p in prompts for s in range(num_samples)
        ]
        asked = [prompt for prompt in prompts for _ in range(num_samples)]
        finished: dict[int, Generation] = {}
        if log is not None:
            for i, place in enumerate(places):
                if place in log.found:
                    fields = log.found[place]
                    finished[i] = generation_of(asked[i].problem, place.sample, fields)
        missing = [i for i in range(len(places)) if i not in finished]
        key = key_for(Use.EVALUATION, jax.random.key(self.config.seed))
        keys = sample_keys(key, len(prompts), num_samples)

        def finish(i: int, ungraded: Generation, grade: Future[Grade]) -> None:
            found = grade.result()
            finished[i] = ungraded._replace(
                reward=found.value, outcome=found.outcome, answer=found.answer
            )
            if log is not None:
                log.append(places[i], finished[i])

        waiting: deque[Future[None]] = deque()
        ids = [asked[i].ids for i in missing]
        with ThreadPoolExecutor(1, "generations") as writer:
            sampled = self.sampler(variables, ids, settings, keys[np.array(missing)]) if ids else ()
            for found in sampled:
                i = missing[found.prompt]
                problem = asked[i].problem
                # The stop token, which may be the run's own, is no part of the answer.
                text = self.tokenizer.decode(found.ids[:-1] if found.stopped else found.ids)
                ungraded = Generation(
                    problem, text, len(found.ids), found.stopped, 0.0, places[i].sample
                )
                grade = self.pool.submit(problem, text)
                waiting.append(writer.submit(finish, i, ungraded, grade))
                while waiting and waiting[0].done():
                    waiting.popleft().result()  # A full disk is told now and not at the end.
        for future in waiting:
            future.result()
        return [finished[i] for i in range(len(places))]

    def _voted(self, sampled: list[Generation]) -> list[Generation]:
        """The same generations with the groups that their answers vote for."""
        n = self.config.num_samples

        def vote(at: int) -> list[Generation]:
            samples = sampled[at : at + n]
            groups = group_answers([g.answer for g in samples], self.pool.same)
            return [g._replace(group=group) for g, group in zip(samples, groups, strict=True)]

        with ThreadPoolExecutor(self.pool.num_workers or 1, "votes") as threads:
            return sum(threads.map(vote, range(0, len(sampled), n)), [])


class Evaluation(NamedTuple):
    """Metrics `eval/<role>/<name>`, the sampled generations of each role, rows by problem."""

    metrics: dict[str, float]
    generations: dict[str, list[Generation]]
    by_problem: list[dict[str, Any]]


def of_first_process(metrics: dict[str, float]) -> dict[str, float]:
    """The numbers of process 0, bit for bit, on every process.

    Every process grades every completion, and a grade may time out on one of them alone; what
    follows from the numbers, as saving a checkpoint does, must be the same on all.
    """
    if jax.process_count() == 1:
        return metrics
    halves = np.array([*metrics.values()], np.float64).view(np.uint32)  # jax would round float64
    values = np.asarray(multihost_utils.broadcast_one_to_all(halves)).view(np.float64)
    return dict(zip(metrics, values.tolist(), strict=True))
