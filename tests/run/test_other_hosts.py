# SPDX-License-Identifier: Apache-2.0
"""A run goes on with another number of processes, and on another mesh."""

import json

import numpy as np
import pytest

from opsd_jax.main import main
from tests.pods import run_pod
from tests.run.test_train import command, lines_of

TRAIN = """
import json
sys.exit(main([*json.loads(arguments[0]), "--distributed"]))
"""


def assert_same_run(found: list[dict], want: list[dict]) -> None:
    """The same metrics, to what another order of summing leaves after some steps."""
    assert len(found) == len(want)
    for line, other in zip(found, want, strict=True):
        assert line.keys() == other.keys()
        for name, value in other.items():
            np.testing.assert_allclose(line[name], value, rtol=1e-3, atol=1e-5, err_msg=name)


def steps(workdir, number: int, *bindings: str) -> list[str]:
    """The arguments of `opsd train` until a step, without evaluations between."""
    settings = [f"train.num_steps = {number}", "train.eval_every_steps = 0"]
    return command(workdir, *settings, *bindings)


@pytest.mark.slow
def test_one_process_two_and_one_again_make_one_run(tmp_path):
    """Eight devices, then two processes of two, then eight of which two share a matrix, then
    processes that share texts, then eight devices of which two do."""
    assert main(steps(tmp_path / "whole", 10)) == 0
    changing = tmp_path / "changing"
    assert main(steps(changing, 2)) == 0
    run_pod(TRAIN, json.dumps(steps(changing, 4, "mesh.replica = 2")), num_devices=2)
    assert main(steps(changing, 6, "mesh.model = 2")) == 0
    run_pod(TRAIN, json.dumps(steps(changing, 8, "mesh.sequence = 2")), num_devices=1)
    assert main(steps(changing, 10, "mesh.sequence = 2")) == 0
    whole, found = lines_of(tmp_path / "whole"), lines_of(changing)
    assert_same_run(found, whole)
