# SPDX-License-Identifier: Apache-2.0
"""`opsd_jax.forward` takes ids that the model has, in rows of one length, and no others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opsd_jax.errors import UserError
from opsd_jax.model.decoder import Decoder
from opsd_jax.pretrained.interface import forward
from tests.tiny import VOCAB, tiny_config, tiny_variables

MODEL = Decoder(tiny_config())
VARIABLES = tiny_variables(MODEL.config)


@pytest.mark.parametrize(
    "ids, words",
    [
        ([[3, VOCAB]], rf"ids has {VOCAB}, and the model's ids are 0 to {VOCAB - 1}"),
        ([[2**40]], f"ids has {2**40}"),
        (jnp.array([[1, 2], [3, -1]]), "ids has -1"),
        ([[1, 2], [3]], "rows of one length"),
        ([1, 2], "rows of one length"),
        ([[1.0, 2.0]], "whole numbers"),
    ],
)
def test_other_ids_are_refused(ids, words):
    with pytest.raises(UserError, match=f"^forward: .*{words}"):
        forward(MODEL, VARIABLES, ids)


def test_all_ids_of_the_model_are_taken_and_traced_ones_too():
    ids = np.arange(VOCAB)[None]
    logits = forward(MODEL, VARIABLES, ids)
    assert logits.shape == (1, VOCAB, VOCAB)
    traced = jax.jit(lambda some: forward(MODEL, VARIABLES, some))(ids)
    np.testing.assert_allclose(traced, logits, rtol=1e-5, atol=1e-5)
