# SPDX-License-Identifier: Apache-2.0
"""A run's student as the model of another: all that is asked for is the workdir."""

import jax
import numpy as np
import pytest

from opsd_jax.errors import UserError
from opsd_jax.main import main
from opsd_jax.model.projection import merge_lora
from opsd_jax.model.sharding import FULLY_SHARDED, MeshConfig, make_mesh
from opsd_jax.run.config import finished_run, load_run
from opsd_jax.run.finished_run import restore_run
from tests.run.test_train import command


@pytest.mark.slow
def test_its_adapters_are_merged_and_its_step_is_the_guards(tmp_path):
    adapters = ("train.lora = @lora()", "lora.rank = 2", "train.learning_rate = 0.1")
    often = (
        "train.checkpoint_every_steps = 1",
        "train.eval_every_steps = 0",
        "train.heldout = None",
    )
    assert main(command(tmp_path / "run", "train.num_steps = 2", *adapters, *often)) == 0
    mesh, said = make_mesh(MeshConfig()), []
    found = {}
    for step in (1, 2):
        expected = restore_run(tmp_path / "run", step, load_run)
        config, variables = expected.parts.model.config, expected.student
        assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(variables["lora"]))
        found[step] = merge_lora(config, variables)
    for step, verdict, right in ((None, None, 2), (1, None, 1), (None, 1, 1)):
        if verdict:
            (tmp_path / "run" / "guard.json").write_text(f'{{"restore_step": {verdict}}}')
        base = finished_run(str(tmp_path / "run"), step).load(mesh, FULLY_SHARDED, "", said.append)
        assert base.config.lora is None and f"after step {right}" in said[-1]
        jax.tree.map(np.testing.assert_array_equal, base.params, found[right])


def test_what_is_no_run_is_named(tmp_path):
    with pytest.raises(UserError, match="FinishedRun.workdir = .*no config.gin there"):
        finished_run(str(tmp_path)).load(make_mesh(MeshConfig()), FULLY_SHARDED, "", print)
