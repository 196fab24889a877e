# SPDX-License-Identifier: Apache-2.0
"""Digests see every change of what they are of, and nothing else."""

import dataclasses
import hashlib
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from opsd_jax.data.problems import LoadedProblems, Problem
from opsd_jax.data.tokenizer import HFTokenizer
from opsd_jax.errors import UserError
from opsd_jax.host.identity import (
    Identity,
    RowsDigest,
    digest,
    identity_of,
    model_parts,
    own_code_parts,
    problems_digest,
    weights_digest,
)
from opsd_jax.model.sharding import MeshConfig, make_mesh
from tests.data.test_tokenizer import byte_tokenizer
from tests.tiny import WordTokenizer, tiny_config

PARTS = {"weights": "a", "config": {"num_layers": 2, "rope_theta": 1.0}}


def resumed(parts=PARTS) -> Identity:
    first = Identity(Path("run"))
    first.check("train.model", parts)
    return identity_of(Path("run"), json.loads(json.dumps(first.meta())))


def test_the_same_parts_pass_and_the_first_other_one_is_named():
    resumed().check("train.model", PARTS)
    resumed().check("train.model", {"weights": "a"})
    for parts, told in (
        (PARTS | {"weights": "b"}, "weights was a and is now b"),
        (PARTS | {"config": PARTS["config"] | {"num_layers": 3}}, "num_layers was 2 and is now 3"),
        (PARTS | {"config": {"num_layers": 2}}, "config: rope_theta is gone"),
        (PARTS | {"step": 4}, "step came in"),
    ):
        with pytest.raises(UserError, match=f"train.model is not what the run in run .*{told}"):
            resumed().check("train.model", parts)


def test_a_run_that_begins_is_refused_nothing_and_a_record_without_inputs_is_told():
    first = identity_of(Path("run"), {})
    first.check("train.model", PARTS)
    first.check("train.model", PARTS | {"weights": "b"})
    with pytest.raises(UserError, match="of an earlier version"):
        identity_of(Path("run"), {"config": ""})


def test_other_packages_are_told_once_and_then_are_the_runs_own(monkeypatch):
    found, said = resumed(), []
    found.tell_versions(said.append)
    assert said == []
    monkeypatch.setattr("opsd_jax.host.identity.versions", lambda: found.versions | {"jax": "9.9"})
    found.tell_versions(said.append)
    assert len(said) == 1 and "jax" in said[0] and "(now 9.9)" in said[0] and "flax" not in said[0]
    found.tell_versions(said.append)
    assert len(said) == 1 and found.meta()["versions"]["jax"] == "9.9"


@given(st.lists(st.binary(max_size=3), max_size=4), st.lists(st.binary(max_size=3), max_size=4))
def test_chunks_are_equal_or_have_other_digests(one, other):
    assert (digest(*one) == digest(*other)) == (one == other)


def test_weights_have_one_digest_however_they_lie_and_another_once_a_bit_changes():
    rng = np.random.default_rng(0)
    params = {"a": rng.normal(size=(8, 16)).astype(np.float32), "b": np.arange(8, dtype=np.int8)}
    mesh = make_mesh(MeshConfig(data=4, model=2))
    split = NamedSharding(mesh, PartitionSpec("data", "model"))
    placed = {"a": jax.device_put(params["a"], split), "b": params["b"]}
    assert weights_digest(placed) == weights_digest(params)
    found = {weights_digest(params)}
    for name, at in (("a", (0, 0)), ("a", (7, 15)), ("b", 3)):
        other = {k: v.copy() for k, v in params.items()}
        other[name].view(np.uint8).reshape(-1)[
            np.ravel_multi_index(np.atleast_1d(at), params[name].shape) * params[name].itemsize
        ] ^= 1
        found.add(weights_digest(other))
    found.add(weights_digest({"a": params["a"], "c": params["b"]}))
    swapped = params["a"].copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    found.add(weights_digest(params | {"a": swapped}))
    assert len(found) == 6


def test_every_part_of_a_model_shows_under_its_name():
    config, params = tiny_config(), {"a": np.ones(3, np.float32)}
    plain = model_parts(config, params, HFTokenizer(byte_tokenizer()))
    assert plain == model_parts(config, params, HFTokenizer(byte_tokenizer()))
    extra = byte_tokenizer()
    extra.add_tokens(["<more>"])
    others = {
        "weights": (config, {"a": np.zeros(3, np.float32)}, HFTokenizer(byte_tokenizer())),
        "config": (
            dataclasses.replace(config, rope_theta=7.0),
            params,
            HFTokenizer(byte_tokenizer()),
        ),
        "chat template": (config, params, HFTokenizer(byte_tokenizer("{{ messages }}"))),
        "tokenizer": (config, params, HFTokenizer(extra)),
        "tokenizer ": (config, params, HFTokenizer(byte_tokenizer(bos_token="<|endoftext|>"))),
    }
    for name, arguments in others.items():
        name, found = name.strip(), model_parts(*arguments)
        assert {n for n in plain if found[n] != plain[n]} == {name}
    stops = model_parts(config, params, HFTokenizer(byte_tokenizer(), (5,)))
    assert stops["tokenizer"] != plain["tokenizer"]
    words = model_parts(config, params, WordTokenizer())
    assert words == model_parts(config, params, WordTokenizer())


@given(st.permutations(range(4)), st.sampled_from(["id", "question", "solution", "answer"]))
def test_problems_are_known_by_every_field_and_their_order(order, field):
    problems = [Problem(f"{i}", f"q{i}", "s", "a") for i in range(4)]
    found = problems_digest(LoadedProblems(tuple(problems), None))
    moved = problems_digest(LoadedProblems(tuple(problems[i] for i in order), None))
    assert (found == moved) == (list(order) == [0, 1, 2, 3])
    problems[order[0]] = dataclasses.replace(problems[order[0]], **{field: "else"})
    assert problems_digest(LoadedProblems(tuple(problems), None)) != found


def test_rows_are_given_through_and_counted_until_closed():
    def rows(width):
        return RowsDigest(lambda n: None if n == 2 else {"ids": np.full(width, n, np.int32)})

    one, other = rows(3), rows(3)
    for n in (1, 2, 3):
        assert (row := one(n)) is None or row["ids"].tolist() == [n] * 3
    for n in (1, 3, 2):
        other(n)
    assert other.close() != (found := one.close()) == one.close()
    one(5)
    assert one.close() == found
    wide = rows(4)
    wide(1)
    assert wide.close() != found


def test_own_code_is_followed_as_far_as_it_is_the_users(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "box" / "deep").mkdir(parents=True)
    files = {
        "named_one.py": "import json, numpy, opsd_jax.errors, gone\nfrom box.deep import last",
        "box/__init__.py": "raise RuntimeError('nothing is imported to find out')",
        "box/deep/__init__.py": "",
        "box/deep/last.py": "def f():\n    from .. import near\n    from . import deeper",
        "box/near.py": "import named_one",
        "box/deep/deeper.py": "this is no Python",
        "beside.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    found = own_code_parts(["named_one"])
    reached = "box box.deep box.deep.deeper box.deep.last box.near named_one".split()
    assert list(found) == reached
    assert found["box.near"] == digest(b"import named_one")
    # What a config names counts wherever it lies, but for this package and the built-in ones.
    assert list(own_code_parts(["hashlib", "sys", "opsd_jax.errors"])) == ["hashlib"]
    assert found["named_one"] != hashlib.sha256(b"").hexdigest()
