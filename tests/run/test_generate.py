# SPDX-License-Identifier: Apache-2.0
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opsd_jax.data.contexts import ContextConfig
from opsd_jax.main import main
from opsd_jax.model.decoder import Decoder
from opsd_jax.run import finished_run, generate
from opsd_jax.run.generate import texts
from opsd_jax.sampling.config import RolloutConfig
from tests.tiny import VOCAB, WordTokenizer, tiny_config, tiny_variables


class Bytes:
    """Every byte is a token, so that a character may come in halves."""

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


@settings(max_examples=60, deadline=None)
@given(text=st.text("abé🙂", max_size=12), stop=st.lists(st.text("abé", min_size=1, max_size=3)))
def test_a_text_ends_before_its_first_stop(text, stop):
    pieces = list(texts(list(text.encode()), Bytes(), stop))
    found = [at for at in map(text.find, stop) if at >= 0]
    # The first stop to be complete ends it; of those, the one that begins first.
    complete = min((text.find(s) + len(s) for s in stop if s in text), default=None)
    if complete is None:
        assert "".join(pieces) == text
    else:
        seen = text[:complete]
        assert "".join(pieces) == seen[: min(at for at in map(seen.find, stop) if at >= 0)]
    assert not found or complete is not None
    assert all("\ufffd" not in piece for piece in pieces)


def test_nothing_that_may_begin_a_stop_is_shown_early():
    came = []

    def tokens():
        for byte in b"one END? no. END. more":
            came.append(byte)
            yield byte

    shown = []
    for piece in texts(tokens(), Bytes(), ["END."]):
        shown.append((piece, len(came)))
    assert "".join(piece for piece, _ in shown) == "one END? no. "
    assert shown[-1][1] <= len("one END? no. END.")
    assert ("END?", 8) in shown  # Held back until the question mark.


def test_half_a_character_at_the_end_is_shown_as_such():
    assert "".join(texts("é".encode()[:1], Bytes())) == "\ufffd"


def test_a_run_ends_where_its_rollouts_ended(monkeypatch, capsys):
    """At its own stop ids, too, and not at the tokenizer's alone."""

    tokenizer = WordTokenizer()
    monkeypatch.setattr(tokenizer, "render", lambda *_, **__: [4, 5, 6])
    contexts = ContextConfig(student="{question}", evaluation="{question}", teacher="{question}")

    def answer(own_stop_ids):
        run = SimpleNamespace(
            parts=SimpleNamespace(model=Decoder(tiny_config())),
            tokenizer=tokenizer,
            student=tiny_variables(tiny_config()),
            experiment=SimpleNamespace(
                contexts=contexts, rollout=RolloutConfig(1, stop_ids=own_stop_ids)
            ),
        )
        monkeypatch.setattr(finished_run, "restore_run", lambda *_, **__: run)
        settings = RolloutConfig(12, temperature=0.0)
        generate.generate_command("run", None, None, "say one", settings, seed=0)
        return capsys.readouterr().out

    assert len(answer(tuple(range(2, VOCAB))).split()) <= 1 < len(answer(()).split())


@pytest.mark.parametrize("flag", ["--top_p=0", "--max_tokens=0", "--top_k=-1", "--temperature=-1"])
def test_a_bad_flag_is_named_before_anything_is_loaded(flag, capsys):
    assert main(["generate", "--model=no_such_model", "--prompt=x", flag]) == 2
    name, value = flag.split("=")
    told = capsys.readouterr().err
    assert f"opsd generate: {name} must be" in told and f"not {value}" in told


@pytest.mark.parametrize("seed", [-1, 2**32, 10**30])
@pytest.mark.parametrize("which", [["generate", "--prompt=x"], ["tokens"]])
def test_a_seed_beyond_32_bits_is_refused_before_anything_is_loaded(which, seed, capsys):
    assert main([*which, "--workdir=no_such_run", f"--seed={seed}"]) == 2
    told = capsys.readouterr().err
    wanted = "an integer >= 0 and <= 4294967295"
    assert told.startswith(f"opsd {which[0]}: --seed must be {wanted}, not {seed}")
