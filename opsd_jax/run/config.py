# SPDX-License-Identifier: Apache-2.0
"""Gin at the edge: files and bindings in, one frozen `Experiment` out.

With `unused_bindings.py` this is all that knows gin. It fills the dataclasses of the other modules
and is done: nothing is bound inside jit, where it would keep its first value for ever. A function
that is called later, @function without parentheses, takes its bindings with it (`Bound`).
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib.util  # noqa: F401  gin 0.5.0 uses importlib.util without importing it
import inspect
import logging
import os
import sys
import tokenize
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gin
from gin.config_parser import (
    BindingStatement,
    ConfigParser,
    ImportStatement,
    IncludeStatement,
    ParserDelegate,
)

from opsd_jax.errors import UserError, as_named
from opsd_jax.fields import check_fields
from opsd_jax.host.identity import changed_modules
from opsd_jax.run.experiment import Experiment
from opsd_jax.run.gin_errors import gin_errors_told
from opsd_jax.run.gin_files import GinFiles, make_absolute
from opsd_jax.run.registry import AREAS, FUNCTIONS, PLACES, TYPE_WORDS, resolve
from opsd_jax.run.unread_settings import unread
from opsd_jax.run.unused_bindings import MODULE, Key, check_scopes, hidden, unused

log = logging.getLogger(__name__)


def finished_run(workdir: str, step: int | None = None) -> Any:
    """@FinishedRun(): the student of a run as a model (`finished_run.FinishedRun`)."""
    from opsd_jax.run.finished_run import FinishedRun

    return FinishedRun(workdir, _load_beside, step)


def _checked(name: str, of: Callable[..., Any]) -> Callable[..., Any]:
    """`of` behind a check of what gin gives it."""
    signature = inspect.signature(of)

    def build(**values: Any) -> Any:
        parameters = signature.parameters.values()
        required = [p.name for p in parameters if p.default is p.empty and p.name not in values]
        if required:
            raise UserError(" and ".join(f"{name}.{r}" for r in required) + " must be bound")
        check_fields(name, of, values, TYPE_WORDS)
        return of(**values)

    build.__name__, build.__doc__ = name, of.__doc__
    build.__signature__ = signature  # type: ignore[attr-defined]  # Gin reads it.
    return build


_BUILDERS: dict[str, Callable[..., Any]] = {}  # gin's, of the areas and sources imported so far


def _hold(name: str) -> None:
    """Lets gin keep the bindings of a name that is not imported, as base.gin has of every one."""

    def placeholder(**values: Any) -> Any:  # called if a function of the user's asks gin for it
        of = resolve(name)
        return (of if name in FUNCTIONS else _checked(name, of))(**values)

    gin.external_configurable(placeholder, name=name, module=MODULE)


def _register(name: str) -> None:
    """Imports what a name stands for and tells gin, in place of its placeholder."""
    if name in _held:
        of = resolve(name)
        _held.remove(name)
        gin.config._REGISTRY.pop(f"{MODULE}.{name}")
        if name in FUNCTIONS:
            gin.external_configurable(of, name=name, module=MODULE)
        else:
            build = _checked(name, of)
            _BUILDERS[name] = gin.external_configurable(build, name=name, module=MODULE)


def _forget(modules: set[str]) -> None:
    """Has gin import these modules again, and register anew what they define."""
    for selector, found in list(gin.config._REGISTRY.items()):
        if found.wrapped.__module__ in modules:
            gin.config._REGISTRY.pop(selector)
    for name in modules:
        spec = sys.modules.pop(name).__spec__
        if spec and spec.cached:  # which Python would take for a file of the same second and size
            Path(spec.cached).unlink(missing_ok=True)


_held = set(PLACES)
for _name in PLACES:
    _hold(_name)


@dataclasses.dataclass
class _Written(ParserDelegate):
    """What a config says, read before gin is told any of it.

    Attributes:
      references: all that is written @scope/Name or @scope/Name(), includes and all.
      macros: all that is written %name.
      imports: modules of the user's own.
    """

    references: set[str] = dataclasses.field(default_factory=set)
    imports: set[str] = dataclasses.field(default_factory=set)
    macros: set[str] = dataclasses.field(default_factory=set)

    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> None:
        self.references.add(scoped_configurable_name)

    def macro(self, macro_name: str) -> None:
        self.macros.add(macro_name)

    def read(self, text: Any, files: GinFiles) -> list[Key]:
        """Takes in a text and what it includes; gives what its own lines bind.

        What is wrong with the text is told when gin itself comes to it.
        """
        bound: list[Key] = []
        try:
            for statement in ConfigParser(text, self):
                if isinstance(statement, BindingStatement):
                    bound.append((statement.scope, statement.selector, statement.arg_name))
                elif isinstance(statement, ImportStatement):
                    self.imports.add(statement.module)
                elif isinstance(statement, IncludeStatement):
                    with files.read(statement.filename) as included:
                        self.read(included, files)
        except (SyntaxError, tokenize.TokenError):
            pass
        return bound

    @property
    def scopes(self) -> set[str]:
        return {scope for name in self.references for scope in name.split("/")[:-1]}

    @property
    def names(self) -> set[str]:
        """The names of `PLACES` among the references."""
        bare = {name.split("/")[-1].removeprefix(f"{MODULE}.") for name in self.references}
        return bare & set(PLACES)


def load_experiment(
    gin_files: str | Sequence[str], bindings: Sequence[str] = (), defaults: Sequence[str] = ()
) -> tuple[Experiment, str]:
    """Parses gin files and bindings, later ones winning.

    Args:
      gin_files: path or paths; what they include and import is looked up beside them (`GinFiles`).
      bindings: lines such as "train.num_steps = 3".
      defaults: lines that files and bindings may override.

    Returns:
      The experiment and its operative config: every binding that took part, defaults included,
      itself a gin file that gives the same experiment.

    Raises:
      UserError: what is wrong, with the file, line or binding; also a binding of something that
        the config does not name. Where the last file has such a line, or a binding is of something
        that another one has replaced, a warning says so.
    """
    gin_files = [gin_files] if isinstance(gin_files, str) else gin_files
    for path in gin_files:
        if not os.path.isfile(path):
            what = "not a file" if os.path.exists(path) else "no such file"
            raise UserError(f"gin file {path}: {what}")
    files, written = GinFiles(), _Written()
    of_last_file: list[Key] = []
    with gin_errors_told(_known, _macros), _quiet_gin():
        for path in gin_files:
            with files.read(path) as lines:
                of_last_file = written.read(lines, files)
        own = written.read("\n".join(bindings), files)
        written.read("\n".join(defaults), files)
        _tell_gin(gin_files, bindings, defaults, files, written)
        areas = {name: _BUILDERS[name]() for name in AREAS}
        called = set(gin.config._OPERATIVE_CONFIG)
        _record_later_calls()
        replaced, in_vain = _ignored(own, of_last_file, called, written)
        modules = sorted(statement.module for statement in gin.config._IMPORTS)  # a set
        experiment = Experiment(**areas, imports=tuple(modules))
        text = files.header(modules) + gin.operative_config_str(max_line_length=96)
    mine, of_file = ({key[1:] for key in keys} for keys in (own, of_last_file))
    replaced += unread(experiment, mine)
    in_vain += unread(experiment, of_file - mine)
    for sentence in (*replaced, *(f"{gin_files[-1]}: {told}" for told in in_vain)):
        log.warning("%s", as_named(sentence))
    return experiment, text


def _tell_gin(
    gin_files: Sequence[str],
    bindings: Sequence[str],
    defaults: Sequence[str],
    files: GinFiles,
    written: _Written,
) -> None:
    """Has gin read a config anew, such that what it names can be called.

    Args:
      gin_files, bindings, defaults: as in `load_experiment`.
      files: where includes are looked up.
      written: what all of these say.
    """
    gin.clear_config()
    for name in (*AREAS, *written.names):
        _register(name)
    _forget(changed_modules(written.imports))
    files.check_modules(written.imports)
    with _reading(files):
        gin.parse_config(list(defaults))
        gin.parse_config_files_and_bindings(
            list(gin_files), list(bindings), finalize_config=False, skip_unknown=False
        )
    check_scopes(written.scopes)
    make_absolute(gin.config._CONFIG)
    _bind_functions()
    gin.finalize()


def _ignored(
    own: Sequence[Key],
    of_last_file: Sequence[Key],
    called: set[tuple[str, str]],
    written: _Written,
) -> tuple[list[str], list[str]]:
    """Sentences on what is bound and changes nothing: (of the bindings, of the last file).

    Args:
      own: what the bindings bind.
      of_last_file: what the last file binds itself.
      called: scope and name of all that gin has called.
      written: what the config says.

    Raises:
      UserError: a binding that cannot be meant; what another one replaced is only told.
    """
    refused, replaced = unused(own, written.names, written.macros)
    refused += hidden(own, called)
    if refused:
        raise UserError(f"gin bindings: {refused[0]}")
    in_vain, _ = unused(of_last_file, written.names, written.macros)
    return replaced, in_vain + hidden(of_last_file, called, own)


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
            check_fields(self.selector, self.configurable.wrapped, bindings, TYPE_WORDS)
            raw = gin.get_bindings(self.selector, resolve_references=False)
        parameters = inspect.signature(self.configurable.wrapped).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        _record("/".join(scope), self.configurable.selector, defaults | raw)
        if not bindings:
            return function
        return functools.update_wrapper(Bound(function, **bindings), function)


def _known() -> dict[str, Callable[..., Any]]:
    """What a config may name, the user's own code included."""
    found = {of.rpartition(".")[2]: value.wrapped for of, value in gin.config._REGISTRY.items()}
    return {name: of for name, of in found.items() if not hasattr(gin, name)}


def _macros() -> list[str]:
    return [f"%{name}" for name, selector in gin.config._CONFIG if selector == "gin.macro"]


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
        if configurable.wrapper in _BUILDERS.values() or inspect.isclass(configurable.wrapped):
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
def _quiet_gin() -> Iterator[None]:
    """Gin logs an error for every search path that it merely probes."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)
