# SPDX-License-Identifier: Apache-2.0
"""Small data sets, prepared here by TFDS without TensorFlow, come back as problems."""

import json
import re

import numpy as np
import pytest
import tensorflow_datasets as tfds

from opsd_jax.data.builder import _quiet
from opsd_jax.data.problems import Problem
from opsd_jax.data.tfds import TfdsProblems
from opsd_jax.errors import UserError

ROWS = {"train": 7, "test": 3}
COLUMNS = dict(question_column="text", solution_column="meta.worked", answer_column="meta.result")


def row(split, number):
    return {
        "text": f"{split} {number}?",
        "meta": {"worked": f"déjà {number}", "result": number / 10, "whole": number},
        "kind": number % 2,
        "several": {"text": ["a", "b"]},
    }


class Sums(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in ("easy", "hard")]
    skip_registration = True

    def _info(self):
        text = tfds.features.Text()
        number, whole = tfds.features.Scalar(np.float32), tfds.features.Scalar(np.int64)
        features = {
            "text": text,
            "meta": {"worked": text, "result": number, "whole": whole},
            "kind": tfds.features.ClassLabel(names=["even", "odd"]),
            "several": tfds.features.Sequence({"text": text}),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in ROWS}

    def _generate_examples(self, split):
        for number in range(ROWS[split]):
            yield number, row(split, number)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Formats of files -> where a data set lies in that format."""
    found = {}
    for file_format in ("array_record", "parquet"):
        found[file_format] = tmp_path_factory.mktemp(file_format)
        for version in ("1.0.9", "1.0.10"):
            Sums.VERSION = tfds.core.Version(version)
            with _quiet():
                builder = Sums(config="easy", data_dir=found[file_format], file_format=file_format)
                builder.download_and_prepare()
    return found


def load(prepared, file_format="array_record", name="sums/easy", **settings):
    source = TfdsProblems(name=name, data_dir=str(prepared[file_format]), **COLUMNS | settings)
    return source.load().problems


@pytest.mark.parametrize("file_format", ["array_record", "parquet"])
def test_every_row_comes_once_in_an_order_that_stays(prepared, file_format):
    problems = load(prepared, file_format, grader="exact")
    want = {
        ("train 0?", "déjà 0", "0"),
        *((f"train {i}?", f"déjà {i}", f"0.{i}") for i in range(1, 7)),
    }
    assert {(p.question, p.solution, p.answer) for p in problems} == want and len(problems) == 7
    assert [p.id for p in problems] == [f"sums/easy:train:{i}" for i in range(1, 8)]
    assert load(prepared, "array_record", grader="exact") == problems  # TFDS shuffles by key
    parts = [dict(stop=3), dict(start=3, stop=5), dict(start=5)]
    assert sum((load(prepared, file_format, grader="exact", **p) for p in parts), ()) == problems


def test_numbers_classes_and_sets_without_solutions(prepared):
    kinds = load(prepared, answer_column="kind", solution_column=None, grader="exact")
    assert {p.answer for p in kinds} == {"even", "odd"} and {p.solution for p in kinds} == {""}
    whole = load(prepared, answer_column="meta.whole", id_column="meta.whole", split="test")
    assert {(p.id, p.answer) for p in whole} == {("0", "0"), ("1", "1"), ("2", "2")}
    assert isinstance(whole[0], Problem)


def test_the_newest_version_unless_one_is_named(prepared):
    path = prepared["array_record"] / "sums" / "easy" / "1.0.9" / "dataset_info.json"
    text = path.read_text()
    path.write_text("{")
    try:
        load(prepared)
        with pytest.raises(UserError, match="1.0.9"):
            load(prepared, name="sums/easy:1.0.9")
    finally:
        path.write_text(text)


@pytest.mark.parametrize(
    "settings, told",
    [
        (dict(name="gsm8k"), "holds sums; prepare it with `tfds build gsm8k"),
        (dict(name="sums"), "choose from sums/easy"),
        (dict(name="sums/easy:2.0.0"), "choose from sums/easy:1.0.10, sums/easy:1.0.9"),
        (dict(name="../x"), "name must be 'set'"),
        (dict(split="train[:3]"), "split must be one of train, test, not 'train[:3]'"),
        (
            dict(question_column="meta"),
            "question_column must be one of kind, meta.result, meta.whole",
        ),
        (dict(solution_column="no"), "(or None, where there is none), not 'no'"),
        (dict(question_column="several.text"), "not 'several.text'"),
        (dict(question_column="several"), "`several` must be text, but is of type dict"),
        (dict(question_column="meta.whole"), "`meta.whole` must be text, but is of type int"),
        (dict(start=7), "the split train of sums/easy has 7 rows"),
    ],
)
def test_what_does_not_fit_is_named(prepared, settings, told):
    with pytest.raises(UserError, match=re.escape(told)) as error:
        load(prepared, **settings)
    assert "\n" not in str(error.value)


@pytest.fixture
def copy(prepared, tmp_path):
    """A data set of one's own to damage, and how to load it."""
    import shutil

    shutil.copytree(prepared["array_record"], tmp_path / "copy")
    folder = tmp_path / "copy" / "sums" / "easy" / "1.0.10"
    return folder, lambda: load({"array_record": tmp_path / "copy"})


def test_a_set_that_wants_tensorflow(copy):
    folder, load_it = copy
    info = json.loads((folder / "dataset_info.json").read_text())
    info["fileFormat"] = "tfrecord"
    (folder / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match="tfrecord, which TensorFlow alone can read"):
        load_it()


def test_a_set_that_wants_code_of_its_own(copy, tmp_path, monkeypatch):
    folder, load_it = copy
    (tmp_path / "hostile.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    text = (folder / "features.json").read_text()
    name = "tensorflow_datasets.core.features.text_feature.Text"
    (folder / "features.json").write_text(text.replace(name, "hostile.Text"))
    with pytest.raises(UserError, match="hostile.Text, which is not run"):
        load_it()


@pytest.mark.parametrize("name", ["features.json", "dataset_info.json", "sums-train.array_record"])
@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xff", None], ids=str)
def test_damaged_files(copy, name, content):
    folder, load_it = copy
    [path] = folder.glob(f"{name}*")
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        load_it()
    assert "\n" not in str(error.value)
