# SPDX-License-Identifier: Apache-2.0
"""Gin at the edge: files and bindings in, one frozen `Experiment` out.

This is the only module that knows gin. It fills the dataclasses of the other modules and is done:
nothing is bound inside jit, where it would keep its first value for ever. A function that is called
later, @function without parentheses, takes its bindings with it (`Bound`).
"""

from __future__ import annotations

import copy
import functools
import importlib.util  # noqa: F401  gin 0.5.0 uses importlib.util without importing it
import inspect
import logging
import os
import re
import tokenize
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import gin

from opsd_jax.data import benchmarks, problems, tfds
from opsd_jax.data import reasoning_gym as reasoning
from opsd_jax.data.contexts import ContextConfig
from opsd_jax.divergence import token_weights
from opsd_jax.divergence.losses import DivergenceConfig
from opsd_jax.errors import UserError
from opsd_jax.evaluation.evaluate import EvaluateConfig
from opsd_jax.fields import check_fields
from opsd_jax.host.guard import GuardConfig
from opsd_jax.method import completions, objective, policy_gradient, reason_first
from opsd_jax.method.optimizer import OptimizerConfig
from opsd_jax.method.teacher import LoadsModel, TeacherConfig
from opsd_jax.model.config import LoraConfig, ModelConfig
from opsd_jax.model.sharding import MeshConfig
from opsd_jax.run import base_model
from opsd_jax.run.experiment import BaseSource, Experiment, TrainConfig
from opsd_jax.run.finished_base import FinishedRun
from opsd_jax.run.gin_files import GinFiles
from opsd_jax.sampling.config import RolloutConfig
from opsd_jax.testbed import probe
from opsd_jax.testbed import problems as testbed_builder
from opsd_jax.testbed import world as testbed
from opsd_jax.testbed.corpus import CorpusConfig
from opsd_jax.testbed.warm_start import WarmStartConfig


def finished_run(workdir: str, step: int | None = None) -> FinishedRun:
    """@FinishedRun(): the student of a run as a model (`finished_base.FinishedRun`)."""
    return FinishedRun(workdir, _load_beside, step)


# The areas of a gin file, `area.field = value`, in the order in which an Experiment holds them.
AREAS: dict[str, type] = {
    "train": TrainConfig,
    "contexts": ContextConfig,
    "rollout": RolloutConfig,
    "divergence": DivergenceConfig,
    "teacher": TeacherConfig,
    "optimizer": OptimizerConfig,
    "mesh": MeshConfig,
    "evaluate": EvaluateConfig,
    "guard": GuardConfig,
}
# What the values of train.model, train.problems, train.heldout, train.lora, train.probes,
# train.completions, train.objective, teacher.model and teacher.reasons may be, written @Name().
SOURCES: dict[str, Callable[..., Any]] = {
    "lora": LoraConfig,
    "ModelConfig": ModelConfig,
    "WarmStart": WarmStartConfig,
    "WarmStartCorpus": CorpusConfig,
    "PretrainedModel": base_model.PretrainedModel,
    "FinishedRun": finished_run,
    "RandomModel": base_model.RandomModel,
    "TestbedBase": base_model.TestbedBase,
    "StudentRollouts": completions.StudentRollouts,
    "TeacherRollouts": completions.TeacherRollouts,
    "MixedRollouts": completions.MixedRollouts,
    "References": completions.References,
    "ReasonFirst": reason_first.ReasonFirst,
    "Distillation": objective.Distillation,
    "Likelihood": objective.Likelihood,
    "PolicyGradient": policy_gradient.PolicyGradient,
    "RewardMix": policy_gradient.RewardMix,
    "JsonlProblems": problems.JsonlProblems,
    "ParquetProblems": problems.ParquetProblems,
    "TfdsProblems": tfds.TfdsProblems,
    "Benchmark": benchmarks.Benchmark,
    "OtherReferences": problems.OtherReferences,
    "ReasoningGym": reasoning.ReasoningGym,
    "ChainArithmetic": testbed_builder.ChainArithmetic,
}
# What a function in a gin file may be, written @name, besides those of the user's own.
FUNCTIONS = {
    "own_solution": testbed.own_solution,
    "wrong_prefix_probe": probe.wrong_prefix_probe,
    "position_sigmoid": token_weights.position_sigmoid,
    "top_student_entropy": token_weights.top_student_entropy,
    "confident_teacher": token_weights.confident_teacher,
    "uncertain_teacher": token_weights.uncertain_teacher,
    "gap_sigmoid": token_weights.gap_sigmoid,
    "positive_gap": token_weights.positive_gap,
    "skip_first": token_weights.skip_first,
}
# Words for what the areas' fields may be.
_NAMES: dict[Any, str] = {of: f"@{name}()" for name, of in SOURCES.items()} | {
    BaseSource: "a model such as @PretrainedModel()",
    LoadsModel: "a model such as @PretrainedModel()",
    problems.ProblemSource: "problems such as @JsonlProblems()",
    completions.CompletionSource: "completions such as @References()",
    objective.Objective: "an objective such as @PolicyGradient()",
}


def _checked(name: str, of: Callable[..., Any]) -> Callable[..., Any]:
    """`of` behind a check of what gin gives it."""
    signature = inspect.signature(of)

    def build(**values: Any) -> Any:
        parameters = signature.parameters.values()
        required = [p.name for p in parameters if p.default is p.empty and p.name not in values]
        if required:
            raise UserError(" and ".join(f"{name}.{r}" for r in required) + " must be bound")
        check_fields(name, of, values, _NAMES)
        return of(**values)

    build.__name__, build.__doc__ = name, of.__doc__
    build.__signature__ = signature  # type: ignore[attr-defined]  # Gin reads it.
    return build


_CONFIGURABLE = {
    name: gin.external_configurable(_checked(name, of), name=name, module="opsd_jax")
    for name, of in (AREAS | SOURCES).items()
}
for _name, _function in FUNCTIONS.items():
    gin.external_configurable(_function, name=_name, module="opsd_jax")


def load_experiment(
    gin_files: Sequence[str], bindings: Sequence[str] = (), defaults: Sequence[str] = ()
) -> tuple[Experiment, str]:
    """Parses gin files and bindings, later ones winning.

    Args:
      gin_files: paths; what they include and import is looked up beside them (`GinFiles`).
      bindings: lines such as "train.num_steps = 3".
      defaults: lines that files and bindings may override.

    Returns:
      The experiment and its operative config: every binding that took part, defaults included,
      itself a gin file that gives the same experiment.

    Raises:
      UserError: what is wrong, with the file, line or binding.
    """
    for path in gin_files:
        if not os.path.isfile(path):
            raise UserError(f"--gin_file={path}: no such file")
    gin.clear_config()
    files = GinFiles()
    with _gin_errors_told(), _quiet_gin(), _reading(files):
        gin.parse_config(list(defaults))
        gin.parse_config_files_and_bindings(
            list(gin_files), list(bindings), finalize_config=False, skip_unknown=False
        )
        _check_scopes("\n".join((files.text, *defaults, *bindings)))
        _bind_functions()
        gin.finalize()
        experiment = Experiment(**{name: _CONFIGURABLE[name]() for name in AREAS})
        _record_later_calls()
        modules = [statement.module for statement in gin.config._IMPORTS]
        return experiment, files.header(modules) + gin.operative_config_str(max_line_length=96)


def load_run(
    config: str, gin_files: Sequence[str] = (), bindings: Sequence[str] = ()
) -> Experiment:
    """The experiment that a run keeps in its config.gin, with further files and bindings.

    Raises:
      UserError: naming the config where it is at fault by itself.
    """
    try:
        return load_experiment([config, *gin_files], bindings)[0]
    except UserError as error:
        if gin_files or bindings:
            load_run(config)
            raise
        raise UserError(f"{config}: {error}") from None


@contextmanager
def _reading(files: GinFiles) -> Iterator[None]:
    """Has gin open files there: its own search knows neither the including file nor circles."""
    readers = gin.config._FILE_READERS
    theirs = list(readers)
    readers[:] = [(files.read, lambda path: True)]
    try:
        yield
    finally:
        readers[:] = theirs


def _load_beside(config: str) -> Experiment:
    """`load_run` amid another run, whose functions may themselves call configurables."""
    outer = gin.config_str()
    try:
        return load_run(config)
    finally:
        gin.clear_config()
        gin.parse_config(outer)


class Bound(functools.partial):
    """A function with its bindings, equal to another of the same: settings compare and hash."""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Bound):
            return NotImplemented
        return (self.func, self.args, self.keywords) == (other.func, other.args, other.keywords)

    def __hash__(self) -> int:
        return hash((self.func, *sorted(self.keywords)))

    def __reduce__(self) -> Any:
        # A plain partial: a grader's worker must not import this module, and jax with it.
        plain = functools.partial(self.func, *self.args, **self.keywords)
        plain.__dict__.update(self.__dict__)
        return plain.__reduce__()


class _Function(gin.config.ConfigurableReference):
    """@function, which stands for the function with the bindings it has now.

    Gin's own looks them up at each call: a worker process has none, and another config may have
    been read by then.
    """

    def __eq__(self, other: object) -> bool:
        return isinstance(other, gin.config.ConfigurableReference) and repr(self) == repr(other)

    __hash__ = gin.config.ConfigurableReference.__hash__

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        scope, function = self.scopes or gin.current_scope(), self.configurable.wrapper
        with gin.config_scope(scope):
            bindings = gin.get_bindings(self.selector)
            check_fields(self.selector, self.configurable.wrapped, bindings, _NAMES)
            raw = gin.get_bindings(self.selector, resolve_references=False)
        parameters = inspect.signature(self.configurable.wrapped).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        _record("/".join(scope), self.configurable.selector, defaults | raw)
        if not bindings:
            return function
        return functools.update_wrapper(Bound(function, **bindings), function)


def _check_scopes(text: str) -> None:
    """Refuses bindings in scopes that no reference of the files names: nothing would read them."""
    scopes = {name for found in re.findall(r"@([\w./]+)/", text) for name in found.split("/")}
    for (scope, selector), values in gin.config._CONFIG.items():
        module, _, name = selector.rpartition(".")
        binding = f"{scope}/{name}.{next(iter(values), '')}"
        if module != "opsd_jax" or not scope:  # what the user's own code calls is not known
            continue
        if name in AREAS:
            raise UserError(f"{binding} would be ignored: there is one {name}; leave out {scope}/")
        if not scopes.issuperset(scope.split("/")):
            raise UserError(
                f"{binding} would be ignored: nothing is written @{scope}/{name}(); the scopes in "
                f"use are {', '.join(sorted(scopes)) or 'none'}"
            )


def _bind_functions() -> None:
    """Makes a `_Function` of every @function that is not called by gin itself."""

    def bound(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: bound(inner) for name, inner in value.items()}
        if isinstance(value, (tuple, list)):
            return type(value)(map(bound, value))
        if not isinstance(value, gin.config.ConfigurableReference) or value.evaluate:
            return value
        configurable = value.configurable
        if configurable.wrapper in _CONFIGURABLE.values() or inspect.isclass(configurable.wrapped):
            return value  # Its parentheses are missing, which the check of the field tells.
        return _Function(value.scoped_selector, evaluate=False)

    for values in gin.config._CONFIG.values():
        values.update(bound(values))


def _record_later_calls() -> None:
    """Records what is bound of the user's own code, which may be called, and ask gin, later."""
    for (scope, selector), values in gin.config._CONFIG.items():
        if not selector.startswith(("gin.", "opsd_jax.")):
            copy.deepcopy(values)  # Gin records the macros that are looked up.
            _record(scope, selector, values)


def _record(scope: str, selector: str, values: dict[str, Any]) -> None:
    """Makes values part of the operative config, as gin does when it calls something."""
    gin.config._OPERATIVE_CONFIG.setdefault((scope, selector), {}).update(values)


@contextmanager
def _gin_errors_told() -> Iterator[None]:
    """Gin's and the dataclasses' complaints as a UserError of one line."""
    try:
        yield
    except UserError as error:
        # Gin appends where the configurable was called; the first line is ours.
        raise UserError(str(error).splitlines()[0]) from None
    except tokenize.TokenError as error:
        raise UserError(f"gin: --gin_bindings: {error.args[0]}") from None
    except (ValueError, TypeError, RuntimeError, SyntaxError, ImportError, OSError) as error:
        raise UserError("gin: " + _one_line(error)) from error


def _one_line(error: BaseException) -> str:
    if isinstance(error, SyntaxError):
        place = f"{error.filename or '--gin_bindings'}, line {error.lineno}"
        reason = error.msg.splitlines()[-1].strip().rstrip(".")
        return f"{place}: {reason}: {(error.text or '').strip()!r}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, ModuleNotFoundError):
        lines.append("(looked for beside the gin files and among the installed packages)")
    text = " ".join(lines)
    if macro := re.match(r"No bindings specified for '(\S+)/gin.macro'", text):
        return f"the macro %{macro.group(1)} is used but never defined"
    if missing := re.search(r"required positional arguments?: (.*)", lines[0] if lines else ""):
        return f"{missing.group(1)} must be bound: {text}"
    return text


@contextmanager
def _quiet_gin() -> Iterator[None]:
    """Gin logs an error for every search path that it merely probes."""
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
