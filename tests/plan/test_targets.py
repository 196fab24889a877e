# SPDX-License-Identifier: Apache-2.0
"""Targets are read, or refused in a sentence."""

import importlib.util
import os
import subprocess
import sys

import jax
import pytest

from opsd_jax.errors import UserError
from opsd_jax.plan import targets
from opsd_jax.plan.targets import CARDS, description, find_target

INSTALLED = {
    "tpu": importlib.util.find_spec("libtpu") is not None,
    "cuda": importlib.util.find_spec("jax_cuda12_plugin") is not None,
}


@pytest.mark.parametrize(
    "text", ["", "v5e", "h100:", "h100:8x", "v9:2x2", "h100:8 ", "h100:-1", "v5e:4x4x4x4", "8"]
)
def test_other_words_are_refused_with_the_choices(text):
    with pytest.raises(UserError, match=r"--target must be one of v4, .*h100:2x8"):
        find_target(text)


def bare(name: str) -> None:
    """`find_spec` where nothing is installed: of a dotted name the parent is imported first."""
    if "." in name:
        raise ModuleNotFoundError(f"No module named {name.partition('.')[0]!r}")


@pytest.mark.parametrize("text, extra", [("v5e:2x2", "plan-tpu"), ("h100:2", "plan-cuda")])
def test_a_compiler_that_is_not_installed_is_named(text, extra, monkeypatch):
    monkeypatch.setattr(targets.importlib.util, "find_spec", bare)
    with pytest.raises(UserError, match=rf"pip install '\.\[{extra}\]'"):
        find_target(text)


@pytest.mark.parametrize("text", ["h100:0", "h100:1x1x1"])
def test_no_cards_or_a_third_number_are_refused(text, monkeypatch):
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: name)
    with pytest.raises(UserError, match="cards"):
        find_target(text)


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED["tpu"], reason="the plan-tpu extra is not installed")
@pytest.mark.parametrize(
    "text, kind, number",
    [("v5e:4x4", "TPU v5 lite", 16), ("v5p:2x2x2", "TPU v5", 8), ("v6e:4x4", "TPU v6 lite", 16)],
)
def test_slices_have_their_chips(text, kind, number):
    found = find_target(text)
    assert [device.device_kind for device in found.devices] == [kind] * number


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED["tpu"], reason="the plan-tpu extra is not installed")
def test_another_process_may_ask_at_the_same_time():
    """libtpu lets one process of a machine have the chips, and none is had here."""
    find_target("v5e:2x2")
    code = "from opsd_jax.plan.targets import find_target; find_target('v5e:2x2')"
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED["tpu"], reason="the plan-tpu extra is not installed")
def test_a_slice_that_does_not_exist_is_refused():
    with pytest.raises(UserError, match="--target=v5e:3x3"):
        find_target("v5e:3x3")


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED["cuda"], reason="the plan-cuda extra is not installed")
@pytest.mark.parametrize("chip", CARDS)
def test_cards_are_described(chip):
    found = find_target(f"{chip}:2x4")
    assert [device.device_kind for device in found.devices] == [CARDS[chip].name] * 8
    assert found.hosts == 2


def test_a_description_has_the_numbers_of_the_card():
    text = description(CARDS["a100"])
    assert "major: 8 minor: 0" in text and "core_count: 108" in text
    assert text.count("{") == text.count("}")


def test_the_peaks_of_all_targets_are_known():
    from opsd_jax.host.chips import PEAKS
    from opsd_jax.plan.estimate import LINKS

    assert {card.name for card in CARDS.values()} <= set(PEAKS)
    assert set(LINKS) == set(CARDS) | set(targets.TPUS)
    assert jax.devices()[0].platform == "cpu"
