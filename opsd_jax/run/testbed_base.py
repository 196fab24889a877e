# SPDX-License-Identifier: Apache-2.0
"""@TestbedBase(): the testbed's warm-started model as the base of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from jax.sharding import Mesh

from opsd_jax.host.files import require_mounted
from opsd_jax.host.pod import first_process_first
from opsd_jax.host.stage import fetch, upload
from opsd_jax.model.sharding import Rules
from opsd_jax.run.experiment import Base
from opsd_jax.testbed.warm_start import (
    TESTBED_MODEL,
    WarmStartConfig,
    WarmStarted,
    load_or_train,
)
from opsd_jax.testbed.world import ChainTokenizer


@dataclasses.dataclass(frozen=True)
class TestbedBase:
    """The testbed's warm-started base, trained on first use and kept below the cache directory.

    On a pod process 0 trains it and the others read it: all start from the same bits.

    Args:
      warm_start: the recipe.
      cache_dir: where bases are kept, to share one between runs; None is the run's workdir. All
        hosts of a pod must see it.
    """

    __test__ = False  # Not a test class, whatever pytest makes of its name.

    warm_start: WarmStartConfig = WarmStartConfig()
    cache_dir: str | None = None

    def load_tokenizer(self) -> ChainTokenizer:
        return ChainTokenizer()

    def load(self, mesh: Mesh, rules: Rules, cache_dir: str, say: Callable[[str], None]) -> Base:
        del mesh, rules
        require_mounted(self.cache_dir or "", "TestbedBase.cache_dir")
        folder = self.cache_dir or cache_dir

        def load_or_upload() -> WarmStarted:
            fetch(folder)
            base = load_or_train(self.warm_start, TESTBED_MODEL, folder, say)
            upload(folder)
            return base

        base = first_process_first(load_or_upload, f"the testbed's base below {folder}")
        return Base(TESTBED_MODEL, base.params, ChainTokenizer())
