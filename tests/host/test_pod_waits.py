# SPDX-License-Identifier: Apache-2.0
"""What the processes of a pod do before they first compute together."""

import json

from tests.pods import run_pod

MADE_ONCE = """
import json
import numpy as np
from opsd_jax.run import testbed_base
from opsd_jax.testbed import warm_start
from opsd_jax.errors import UserError
from opsd_jax.model.sharding import FULLY_SHARDED, MeshConfig, make_mesh

jax.distributed.initialize()
calls = []
def train(config, model_config, say):
    calls.append(config.seed)
    if config.seed:
        raise UserError("the gate is shut")
    report = warm_start.BaseReport(*range(9))
    return warm_start.WarmStarted({"embed": np.full(3, index + 5.0, np.float32)}, report, 1)
warm_start.warm_start = train
said = []
for seed in (0, 1):
    base = testbed_base.TestbedBase(warm_start.WarmStartConfig(seed=seed))
    try:
        loaded = base.load(make_mesh(MeshConfig()), FULLY_SHARDED, arguments[0], print)
        said.append(loaded.params["embed"].tolist())
    except UserError as error:
        said.append(str(error))
print(json.dumps([calls, said]))
"""


def test_process_0_makes_the_base_and_the_others_start_from_the_same_bits(tmp_path):
    (first, _), (second, _) = run_pod(MADE_ONCE, tmp_path)
    refused = f"the testbed's base below {tmp_path} cannot be used; process 0 tells why"
    assert json.loads(first.splitlines()[-1]) == [[0, 1], [[5.0] * 3, "the gate is shut"]]
    assert json.loads(second.splitlines()[-1]) == [[], [[5.0] * 3, refused]]


# Gloo says on stdout when a group connects, past Python's buffer.
CONNECTED = """
import ctypes
import jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from opsd_jax.host.pod import connected_mesh
from opsd_jax.model.sharding import MeshConfig

def say(text):
    ctypes.CDLL(None).fflush(None)
    print(text, flush=True)

jax.distributed.initialize()
mesh = connected_mesh(MeshConfig(model=2))
say("connected")
place = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))
x = np.arange(16.0).reshape(4, 4)
x = jax.make_array_from_callback(x.shape, place("data", "model"), lambda index: x[index])
for f in (lambda x: x.sum(0), lambda x: x.max(1), lambda x: (x @ x.T).sum()):
    say(jax.jit(f, out_shardings=place())(x).tolist())
"""


def test_no_group_of_devices_meets_for_the_first_time_in_a_long_program():
    for said, _ in run_pod(CONNECTED, num_devices=2):
        before, after = said.split("connected\n")
        assert before.count("[Gloo]") >= 2
        assert after.splitlines() == [
            "[24.0, 28.0, 32.0, 36.0]",
            "[3.0, 7.0, 11.0, 15.0]",
            "3680.0",
        ]
