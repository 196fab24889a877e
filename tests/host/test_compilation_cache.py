# SPDX-License-Identifier: Apache-2.0
"""Where compiled programs are kept, and that a second process reads what the first compiled."""

import os

import jax
import jax.numpy as jnp
import pytest

from opsd_jax.errors import UserError
from opsd_jax.host.chips import compile_clock
from opsd_jax.host.compilation_cache import folder_of, kept_programs, process_programs


def test_accelerators_keep_programs_in_the_workdir_unless_told_otherwise(tmp_path, monkeypatch):
    assert folder_of("auto", tmp_path) is None  # a CPU
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert folder_of("auto", tmp_path) is None  # conftest.py has set JAX_COMPILATION_CACHE_DIR
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        assert folder_of("auto", tmp_path) == tmp_path / "compiled"
        with process_programs():
            assert folder_of("auto", tmp_path) == tmp_path / "compiled"
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert folder_of("/some/where", tmp_path).as_posix() == "/some/where"
    assert folder_of(None, tmp_path) is folder_of("", tmp_path) is None
    with pytest.raises(UserError, match="train.compilation_cache must be a path on a file system"):
        folder_of("gs://bucket/programs", tmp_path)


def test_what_was_compiled_is_read_and_the_setting_comes_back(tmp_path):
    jax.jit(lambda x: x + 1)(jnp.ones(3))  # JAX has opened its folder
    before, counts = jax.config.jax_compilation_cache_dir, []
    for _ in range(2):
        jax.clear_caches()
        with kept_programs(str(tmp_path / "a"), tmp_path) as folder, compile_clock() as clock:
            jax.jit(lambda x: jnp.sin(x) * 2)(jnp.ones(5))
        counts.append((clock.programs, clock.read))
    assert folder == tmp_path / "a" and os.listdir(folder)
    (first, nothing), (again, read) = counts
    assert nothing == 0 and first == again == read > 0
    assert jax.config.jax_compilation_cache_dir == before


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="train.compilation_cache: cannot make"):
        with kept_programs(str(tmp_path / "file" / "a"), tmp_path):
            pass


def test_a_process_compiles_nothing_twice_where_no_folder_is_named():
    before, counts = jax.config.jax_compilation_cache_dir, []
    least = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        for _ in range(2):
            jax.clear_caches()
            with process_programs(), compile_clock() as clock:
                jax.jit(lambda x: jnp.cos(x) * 3)(jnp.ones(7))
                assert os.listdir(jax.config.jax_compilation_cache_dir)
            counts.append((clock.programs, clock.read))
            assert jax.config.jax_compilation_cache_dir is None
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    (first, nothing), (again, read) = counts
    assert nothing == 0 and first == again == read > 0
    assert jax.config.jax_persistent_cache_min_compile_time_secs == least
    with process_programs():  # a named folder stays
        assert jax.config.jax_compilation_cache_dir == before
