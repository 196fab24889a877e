# SPDX-License-Identifier: Apache-2.0
"""What a run is made of, as digests: a resumed run is refused inputs that have changed.

A config says where a model and its problems lie; this says what they are. Every checkpoint's
record holds the parts of every input, and whoever goes on from it compares them:

    {"train.model": {"weights": "5f0c…", "config": {"num_layers": 28, …}, "tokenizer": "91ab…"},
     "train.problems": {"problems": "77d1…", "prompts": "c0de…"}, "import own": {"own": "b2a4…"}}

What is guaranteed: text (problems, prompts, references, tokenizer, chat template, source code) is
covered by SHA-256, byte for byte and in order. Weights are covered by `leaf_checksum` of every
array as it lies on the devices, so nothing is read a second time: one changed element always shows,
other changes of an array with probability 1 - 2**-32. What a user's function reads by itself (a
table, a web page) is not covered.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import importlib.machinery
import json
import sys
import sysconfig
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from opsd_jax.errors import UserError
from opsd_jax.host.checkpoint_record import checksums
from opsd_jax.host.pod import time_of_first_process

Parts = Mapping[str, Any]  # name -> digest, or name -> value for a part that is small
Say = Callable[[str], None]
OWN_CODE = "the code that the config imports"
_APART = " (a module for each method keeps the runs of the others resumable when one changes)"
_READ: dict[str, str] = {}  # module -> digest of its source when a config last named it
_VERSIONS = ("jax", "jaxlib", "flax", "optax")


class HasRows(Protocol):
    """Problems: dataclasses with an order (`problems.ProblemSet`)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclasses.dataclass
class Identity:
    """What a run began with: empty at its start, then its checkpoints' record of it.

    Attributes:
      workdir: of the run, for messages.
      inputs: field -> parts.
      clock: when the run began, ISO 8601 in UTC; what a chat template takes for the present.
      versions: of the packages that compute.
      resumed: whether these come from a checkpoint, so that others are refused.
    """

    workdir: Path
    inputs: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    clock: str = dataclasses.field(default_factory=lambda: time_of_first_process().isoformat())
    versions: dict[str, str] = dataclasses.field(default_factory=lambda: versions())
    resumed: bool = False

    def check(self, field: str, parts: Parts) -> None:
        """Records the parts of an input; on a resumed run, refuses others.

        Args:
          field: what the user calls the input, such as "train.problems".
          parts: see the module; recorded parts that are not among these are not compared.

        Raises:
          UserError: the field and the part that has changed since the run began.
        """
        now = json.loads(json.dumps(parts))
        began = self.inputs.setdefault(field, {})
        before = {name: began[name] for name in now if name in began}
        if self.resumed and (change := _first_change(before, now)):
            raise UserError(
                f"{field} is not what the run in {self.workdir} began with: {change}; put the old "
                "one back, or begin another workdir" + (_APART if field == OWN_CODE else "")
            )
        began |= now

    def tell_code(self, parts: Parts, say: Say) -> None:
        """Says which of the user's modules have changed, where that is no reason to refuse.

        Who evaluates or exports a run may well have mended a grader since; an evaluation records
        the code that it was made with, and is not gone on with by another.
        """
        began = self.inputs.get(OWN_CODE, {})
        changed = [name for name in began if parts.get(name) != began[name]]
        if self.resumed and changed:
            say(f"{', '.join(changed)}: changed since the run began; the code of now is used")

    def part(self, field: str, name: str) -> Any:
        """A recorded part, None where there is none."""
        return self.inputs.get(field, {}).get(name)

    def tell_versions(self, say: Say) -> None:
        """Says once which packages have changed: bits may differ from the uninterrupted run's."""
        now = versions()
        changed = [n for n in now if self.resumed and self.versions.get(n) != now[n]]
        if changed:
            told = ", ".join(f"{n} {self.versions.get(n)} (now {now[n]})" for n in changed)
            say(f"this run was last saved under {told}: its numbers may differ in their last bits")
        self.versions = now

    def meta(self) -> dict[str, Any]:
        """What a checkpoint's record keeps of it."""
        return {"inputs": self.inputs, "clock": self.clock, "versions": self.versions}


def identity_of(workdir: Path, meta: Mapping[str, Any]) -> Identity:
    """The identity in the meta of a run's checkpoint; a new one where there is no checkpoint."""
    if not meta:
        return Identity(workdir)
    try:
        return Identity(workdir, meta["inputs"], meta["clock"], meta["versions"], resumed=True)
    except KeyError as error:
        raise UserError(
            f"the checkpoints of {workdir} do not say what the run began with ({error}): they are "
            "of an earlier version; begin another workdir"
        ) from None


def versions() -> dict[str, str]:
    """Installed versions of the packages that compute."""
    return {name: metadata.version(name) for name in _VERSIONS}


def _first_change(before: Parts, now: Parts) -> str | None:
    """The first part that differs, in words."""
    for name in (*now, *(n for n in before if n not in now)):
        was, is_now = before.get(name), now.get(name)
        if was == is_now and (name in before) == (name in now):
            continue
        if isinstance(was, dict) and isinstance(is_now, dict):
            return f"{name}: {_first_change(was, is_now)}"
        if name not in before or name not in now:
            return f"{name} " + ("came in" if name in now else "is gone")
        return f"{name} was {was} and is now {is_now}"
    return None


# ------------------------------------------------------------------------------- digests


def digest(*chunks: bytes | str) -> str:
    """16 hex digits of the SHA-256 of the chunks, ends of chunks included."""
    found = hashlib.sha256()
    for chunk in chunks:
        data = chunk.encode(errors="surrogatepass") if isinstance(chunk, str) else chunk
        found.update(len(data).to_bytes(8, "little") + data)
    return found.hexdigest()[:16]


def weights_digest(variables: Any) -> str:
    """Of every array by its path: bits, shape and dtype, whatever the sharding.

    One pass over the arrays on their devices; collective on a pod.
    """
    return digest(json.dumps(sorted(checksums(variables).items())))


def model_parts(config: Any, params: Any, tokenizer: Any) -> dict[str, Any]:
    """What makes a model: its shape and switches, weights, tokenizer and chat template.

    Args:
      config: a dataclass (`ModelConfig`).
      params: its arrays.
      tokenizer: a `Tokenizer`; of a `transformers` tokenizer, `.inner` is looked at.
    """
    described = json.loads(json.dumps(dataclasses.asdict(config), default=repr))
    inner = getattr(tokenizer, "inner", None)
    return {
        "config": described,
        "tokenizer": tokenizer_digest(tokenizer),
        "chat template": digest(json.dumps(getattr(inner, "chat_template", None))),
        "weights": weights_digest(params),
    }


def tokenizer_digest(tokenizer: Any) -> str:
    """Of what it reads and writes: the whole of a fast tokenizer, else the text of every id.

    And of the names of its special tokens, which chat templates write.
    """
    inner = getattr(tokenizer, "inner", None)
    backend: Any = getattr(inner, "backend_tokenizer", None)
    if backend is not None:
        pieces = [backend.to_str()]
    else:
        pieces = [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]
    named = getattr(inner, "special_tokens_map", {})
    ids = (tokenizer.vocab_size, tokenizer.pad_id, tokenizer.stop_ids)
    return digest(*pieces, repr(ids), json.dumps(named, default=str, sort_keys=True))


def problems_digest(problems: HasRows) -> str:
    """Of all fields of all problems, in order; further columns and answers count where
    there are some."""
    rows = (dataclasses.asdict(problems[i]) for i in range(len(problems)))
    often_empty = ("columns", "other_answers")
    said = ({k: row[k] for k in row if k not in often_empty or row[k]} for row in rows)
    return digest(*(json.dumps(row, sort_keys=True) for row in said))


class RowsDigest:
    """A render of `pipeline.make_batches` that takes the digest of what it renders, in order.

    Args:
      render: problem -> arrays by name, or None where the problem is left out.

    Attributes:
      value: of all rows so far.
    """

    def __init__(self, render: Callable[[Any], Mapping[str, np.ndarray] | None]):
        self._render, self._hash = render, hashlib.sha256()
        self._open = True

    def __call__(self, problem: Any) -> Any:
        row = self._render(problem)
        if self._open:
            for name, array in (row or {"left out": np.zeros(0)}).items():
                self._hash.update(f"{name}{array.dtype}{array.shape}".encode())
                self._hash.update(np.ascontiguousarray(array).data)
        return row

    def close(self) -> str:
        """The digest; what is rendered from now on does not count."""
        self._open = False
        return self._hash.hexdigest()[:16]


# --------------------------------------------------------------------- the user's own code


def own_code_parts(modules: Iterable[str]) -> dict[str, str]:
    """Module -> digest of its source, for what a config imports and what that imports in turn.

    Followed as far as the code is the user's: not into opsd_jax, the standard library or what is
    installed. Nothing is imported to find out.
    """
    found: dict[str, str] = {}
    named = set(modules)
    waiting = sorted(named)
    while waiting:
        name = waiting.pop()
        path = None if name in found else _source(name)
        if path is None or (name not in named and not _is_own(name, path)):
            continue
        source = path.read_bytes()
        found[name] = digest(source)
        waiting += [part for part in _imports(name, path, source) if part not in found]
    return dict(sorted(found.items()))


def changed_modules(modules: Iterable[str]) -> set[str]:
    """Modules of `own_code_parts` to import again, as one of them changed since the last config.

    All of them then, for one may hold what another has defined. A process that reads one config
    never sees a change; a notebook does, whose cell wrote a module again.
    """
    parts = own_code_parts(modules)
    imported = parts.keys() & sys.modules.keys()
    changed = any(_READ.get(name, parts[name]) != parts[name] for name in imported)
    _READ.update(parts)
    return set(imported) if changed else set()


def _source(name: str) -> Path | None:
    """The file of a module, None for what has none (built in, or not to be found)."""
    if name.partition(".")[0] == "opsd_jax":
        return None
    loaded = getattr(sys.modules.get(name), "__file__", None)
    if loaded is None:
        places, spec = None, None
        for end in range(1, name.count(".") + 2):
            part = ".".join(name.split(".")[:end])
            spec = importlib.machinery.PathFinder.find_spec(part, places)
            if spec is None:
                return None
            places = spec.submodule_search_locations
        loaded = spec.origin if spec else None
    path = Path(loaded) if loaded else None
    return path if path is not None and path.suffix == ".py" and path.is_file() else None


def _is_own(name: str, path: Path) -> bool:
    """Whether a module is neither of Python nor installed."""
    installed = [sysconfig.get_path(key) for key in ("stdlib", "purelib", "platlib")]
    if {"site-packages", "dist-packages"} & set(path.parts):
        return False  # also of another environment that this one sees
    is_python = name.partition(".")[0] in sys.stdlib_module_names
    return not is_python and not any(path.is_relative_to(place) for place in installed)


def _imports(name: str, path: Path, source: bytes) -> set[str]:
    """Names that a file may import as modules, packages on the way included."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return set()
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: 1 - node.level or None] if node.level else []
            base = ".".join([*parents, *filter(None, [node.module])])
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    names = [name.split(".") for name in found if name]
    return {".".join(parts[:end]) for parts in names for end in range(1, len(parts) + 1)}
