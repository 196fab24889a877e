# SPDX-License-Identifier: Apache-2.0
"""Files of the Hugging Face Hub by name: `owner/name`, or `owner/name@revision`.

Whatever lies on disk under a name comes first. Files go to the cache that everybody's tools share
(HF_HOME), where one process of a host downloads while the others wait. A revision becomes a commit
before anything is taken (`commit_of`), so that all files are of one; the list of a commit's files
with their sizes is kept beside them, so that what is whole is used without a request and what was
cut short is seen. Of a model text, JSON and safetensors alone are asked for: no pickle and no code.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

from opsd_jax.errors import UserError
from opsd_jax.host.files import read_json, read_text, write_whole
from opsd_jax.host.foreign_values import ForeignValues

Kind = Literal["model", "dataset"]

_NAME = re.compile(r"([A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?:@(\w[\w./-]{0,199}))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
# A local file that is missing: `data/rows.jsonl` is nobody's data set.
_IS_FILE = re.compile(r"\.(jsonl?|parquet|gguf|safetensors|gz|zst|csv|tsv|txt|gin)$", re.I)
_SHARD = re.compile(r"(.*-)(\d{5})(-of-)(\d{5})(\..*)")

_INDEX = "model.safetensors.index.json"
_MODEL_FILES = re.compile(
    r"(generation_|tokenizer_|adapter_)?config\.json|tokenizer\.(json|model)|vocab\.(json|txt)"
    r"|merges\.txt|(special_tokens_map|added_tokens)\.json|chat_template\.(jinja|json)"
    r"|additional_chat_templates/[^/]+\.jinja|model\.safetensors\.index\.json"
)


class Listing(NamedTuple):
    """All files of a commit: name -> bytes, and what a data set's card says of its splits."""

    sizes: Mapping[str, int]
    configs: Sequence[Mapping[str, Any]] = ()


Choose = Callable[[Listing], Sequence[str]]


def is_hub_name(value: object) -> bool:
    """Whether it can only be the name of something on the Hub: `owner/name[@revision]`.

    Not what is on disk or looks like a path: with `.`, `/` or `~` first, or more than one slash.
    """
    found = _NAME.fullmatch(value) if isinstance(value, str) else None
    if found is None or ".." in str(value) or _IS_FILE.search(found[1]):
        return False
    return not os.path.exists(str(value))


def is_pinned(name: str) -> bool:
    """Whether a Hub name ends with a commit, of which there is only one."""
    return bool(_COMMIT.fullmatch(name.partition("@")[2]))


def commit_of(kind: Kind, name: str) -> str:
    """The commit that a Hub name stands for now: 40 hexadecimal digits.

    Without the network it is what the cache has of the branch, and that is told.

    Raises:
      UserError: not to be had; one sentence.
    """
    if is_pinned(name):
        return name.partition("@")[2]
    repo, revision = _parts(name)
    refs = _folder(kind, repo) / "refs" / revision
    try:
        with _told(kind, name):
            commit = str(_api().repo_info(repo, revision=revision, repo_type=kind).sha)
    except UserError as error:
        known = read_text(refs).strip() if refs.is_file() else ""
        if not isinstance(error, Unreachable) or not _COMMIT.fullmatch(known):
            raise
        _say(f"{error.why}: commit {known} of {name} is taken, which the cache has")
        return known
    with contextlib.suppress(UserError):  # A cache that cannot be written may have the files.
        write_whole(refs, commit)  # as the Hub's own tools keep it
    return commit


def fetch(kind: Kind, name: str, choose: Choose) -> Path:
    """The folder of a commit's files in the cache, with those that `choose` names in it, whole.

    Args:
      kind: "model" or "dataset".
      name: on the Hub.
      choose: all files of the commit -> those that are wanted; may raise a UserError.

    Raises:
      UserError: not to be had, or cut short; one sentence.
    """
    commit = commit_of(kind, name)
    repo, _ = _parts(name)
    folder = _folder(kind, repo) / "snapshots" / commit
    with _only_process(kind, repo):
        try:
            listing = _listing(kind, repo, commit, name)
        except Unreachable as error:
            return _as_cached(folder, choose, error)
        files = choose(listing)
        if absent := [file for file in files if not (folder / file).exists()]:
            total = sum(listing.sizes[file] for file in absent)
            _say(f"Fetching {name}, {len(absent)} files ({total / 1e6:,.1f} MB), into {folder}.")
            _download(kind, name, commit, absent)
    for file in files:
        size = (folder / file).stat().st_size
        if size != listing.sizes[file]:
            raise UserError(
                f"{(folder / file).resolve()} has {size:,} bytes and not the "
                f"{listing.sizes[file]:,} that the Hub has of {name}: it was cut short or changed; "
                "remove it, and it is fetched again"
            )
    return folder


def model_folder(path: str, field: str, weights: bool = True) -> str:
    """Where a model lies: the path itself, or the folder of a Hub model, fetched if need be.

    Args:
      path: local, or a name on the Hub.
      field: what the user calls it.
      weights: False leaves out the tensors.
    """
    if not is_hub_name(path):
        return path
    folder = _model_files(path, weights)
    if weights and _INDEX in os.listdir(folder) and "model.safetensors" not in os.listdir(folder):
        index = str(folder / _INDEX)
        named = ForeignValues(index, read_json(index)).object("weight_map")
        shards = sorted({named.text(tensor) for tensor in named.values})
        place = f"{field} = {path!r}: {_INDEX}"
        pinned = f"{_parts(path)[0]}@{folder.name}"
        fetch("model", pinned, lambda listing: _all(listing, shards, place))
    return str(folder)


def _model_files(name: str, weights: bool) -> Path:
    def choose(listing: Listing) -> list[str]:
        files = [file for file in listing.sizes if _MODEL_FILES.fullmatch(file)]
        if "model.safetensors" in listing.sizes:
            return files + ["model.safetensors"] * weights
        if weights and _INDEX not in listing.sizes:
            pickles = sorted(f for f in listing.sizes if f.endswith((".bin", ".pt", ".pth")))
            only = f"only pickled weights ({pickles[0]}), which can run code" if pickles else ""
            raise UserError(
                f"the Hub model {name} has {only or 'no model.safetensors'}; name a model with "
                "safetensors"
            )
        return files

    return fetch("model", name, choose)


def _all(listing: Listing, files: list[str], place: str) -> list[str]:
    if missing := [file for file in files if file not in listing.sizes]:
        raise UserError(f"{place} names {ascii(missing[0])}, which the Hub does not have")
    return files


# ------------------------------------------------------------------------- the Hub's own library


class Unreachable(UserError):
    """The Hub could not be asked; `why` is the reason alone."""

    def __init__(self, why: str, name: str):
        super().__init__(
            f"{name} is not on this disk and cannot be fetched from the Hub: {why}; name a local "
            f"path, or run `hf download {name.partition('@')[0]}` where there is a network and "
            "copy HF_HOME"
        )
        self.why = why


@contextlib.contextmanager
def _told(kind: Kind, name: str) -> Iterator[None]:
    """Makes one sentence of whatever the library raises."""
    from huggingface_hub import errors

    repo, revision = _parts(name)
    page = f"https://huggingface.co/{'datasets/' * (kind == 'dataset')}{repo}"
    neither = f"{name}: no such local path, and"
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of several libraries, without a common ancestor
        status = getattr(getattr(error, "response", None), "status_code", None)
        reason = " ".join((str(error) or type(error).__name__).split())[:200]
        if isinstance(error, errors.RevisionNotFoundError):
            raise UserError(f"the Hub {kind} {repo} has no revision {revision!r}") from None
        if isinstance(error, errors.GatedRepoError):
            raise UserError(
                f"{neither} the Hub {kind} is gated: ask for access at {page}, then log in with "
                "`hf auth login` or set HF_TOKEN"
            ) from None
        if status in (401, 403):
            raise UserError(
                f"{neither} the Hub answers {status}: no {kind} of that name, or a private one, "
                "for which log in with `hf auth login` or set HF_TOKEN"
            ) from None
        if status == 404:
            raise UserError(
                f"{neither} the Hub has no {kind} of that name or lacks the file; see {page}"
            ) from None
        if isinstance(error, errors.OfflineModeIsEnabled):
            raise Unreachable("HF_HUB_OFFLINE is set", name) from None
        if isinstance(error, OSError) and error.errno is not None and error.filename:
            raise UserError(f"cannot write {error.filename}: {error.strerror}") from None
        if "Consistency check" in reason or "peer closed" in reason:
            raise UserError(
                f"{name} was cut short while it was fetched ({reason.split('.')[0]}); the same "
                "command tries again and keeps what is whole"
            ) from None
        raise Unreachable(reason, name) from None


def _api() -> Any:
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        from huggingface_hub.errors import OfflineModeIsEnabled

        raise OfflineModeIsEnabled("offline")
    return HfApi(endpoint=constants.ENDPOINT, library_name="opsd_jax")


def _listing(kind: Kind, repo: str, commit: str, name: str) -> Listing:
    """Kept in the cache: a commit never changes."""
    kept = _folder(kind, repo) / "opsd_jax" / f"{commit}.json"
    if kept.is_file():
        found = read_json(str(kept))
        return Listing(found["sizes"], found["configs"])
    with _told(kind, name):
        api = _api()
        tree = api.list_repo_tree(repo, recursive=True, revision=commit, repo_type=kind)
        sizes = {
            e.path: int(e.size)
            for e in tree
            if getattr(e, "size", None) is not None and ".." not in e.path and e.path[0] != "/"
        }
        configs: Any = []
        if kind == "dataset":
            card = api.repo_info(repo, revision=commit, repo_type=kind).card_data
            configs = (card.to_dict().get("configs") if card else None) or []
    with contextlib.suppress(UserError):
        write_whole(kept, json.dumps({"sizes": sizes, "configs": configs}))
    return Listing(sizes, configs)


def _download(kind: Kind, name: str, commit: str, files: Sequence[str]) -> None:
    from huggingface_hub import constants, hf_hub_download

    def one(file: str) -> None:
        with _told(kind, name):
            _api()
            hf_hub_download(
                _parts(name)[0],
                file,
                repo_type=kind,
                revision=commit,
                cache_dir=constants.HF_HUB_CACHE,
                endpoint=constants.ENDPOINT,
            )

    with ThreadPoolExecutor(max_workers=8) as pool:
        list(pool.map(one, files))


def _as_cached(folder: Path, choose: Choose, error: Unreachable) -> Path:
    """What another tool has left of a commit; its list of files is not there to compare with.

    Raises:
      UserError: nothing of it is there, or not what is wanted, or a shard is not.
    """
    found = {
        str(path.relative_to(folder)): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    if not found:
        raise error
    try:
        files = choose(Listing(found))
    except UserError as refusal:
        raise UserError(
            f"{folder} has not all that is wanted, and {error.why}: fetch the rest where there is "
            f"a network (by the files that are there, {refusal})"
        ) from None
    for file in files:
        if shard := _SHARD.fullmatch(file):
            start, _, of, total, end = shard.groups()
            names = [f"{start}{n:05d}{of}{total}{end}" for n in range(int(total) + 1)]
            if len([name for name in names if name in found]) < int(total):
                raise UserError(
                    f"{folder} has not all of {total} shards, and {error.why}: fetch the rest "
                    "where there is a network"
                )
    _say(f"{error.why}: the files in {folder} are taken as they are")
    return folder


@contextlib.contextmanager
def _only_process(kind: Kind, repo: str) -> Iterator[None]:
    """One process of a host at a time, where the file system knows locks."""
    path = _cache() / ".locks" / _folder(kind, repo).name / "opsd_jax.lock"
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # A cache that cannot be written may have the files.
            path.parent.mkdir(parents=True, exist_ok=True)
            fcntl.flock(stack.enter_context(path.open("a")), fcntl.LOCK_EX)
        yield


def _parts(name: str) -> tuple[str, str]:
    repo, _, revision = name.partition("@")
    return repo, revision or "main"


def _cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser()


def _folder(kind: Kind, repo: str) -> Path:
    """Where the Hub's own tools keep a repository."""
    return _cache() / f"{kind}s--{repo.replace('/', '--')}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
