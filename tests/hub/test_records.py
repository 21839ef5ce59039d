"""training.json and evaluation.json: what is not of their form is refused in one line."""

import copy
import json
import math
from dataclasses import asdict, replace

import anndata
import numpy as np
import pytest

from perturbdiff.data.screen import Screen
from perturbdiff.evaluation.metrics import METRICS
from perturbdiff.evaluation.scores import score_conditions
from perturbdiff.files import typed
from perturbdiff.hub.records import (
    AtlasRecord,
    Calibration,
    ConversionRecord,
    Coverage,
    StartRecord,
    TrainingRecord,
    Width,
    read_evaluation,
)
from tests.hub.test_card import EVALUATION
from tests.simulated import tiny_config, write_screen

LATER = {"interval", "verdict", "n_genes", "n_left_out", "kept_response", "notes"}
COVERAGE = Coverage("test", 3, of_all=0.88, of_responding=0.86)
CALIBRATION = Calibration(0.9, 0.2, Width(2.0, 0.3), Width(3.0, 0.5), n_conditions=4, coverage=COVERAGE)
TRAINING = TrainingRecord(
    "0.1.0", "s.h5ad", (AtlasRecord("a/b", "c" * 40, "d" * 64),), 7, 800, "batch", ("A:T",),
    StartRecord("model", None, "e" * 64, "full"), ConversionRecord("x.ckpt", "f" * 64, "ema", 7, None, "pbmc"),
    "mit", CALIBRATION, (0.0, 1.0, 2.5, 2.5, 1e4), 36_601, {"any": [{"thing": 1.5}]},
)  # fmt: skip


def changed(content, path, value):
    content = copy.deepcopy(content)
    part = content
    for key in path[:-1]:
        part = part[key]
    if value is KeyError:
        del part[path[-1]]
    else:
        part[path[-1]] = value
    return content


def plain(record):
    return json.loads(json.dumps(record))


def refused(read, name, content):
    with pytest.raises(ValueError, match=rf"^{name}") as error:
        read(content)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 600


@pytest.mark.parametrize("record", [TRAINING, TrainingRecord()])
def test_training_is_read_as_it_was_written(record):
    assert typed(TrainingRecord, plain(asdict(record)), "training.json") == record


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["steps"], -1), (["steps"], 1.5), (["steps"], True), (["steps"], []), (["screen"], 5), (["screen"], KeyError),
        (["licence"], "mit"), (["license"], {"a": 1}), (["hold_out"], "A:T"), (["hold_out"], [1]), (["atlases"], {}),
        (["atlases"], [1]), (["atlases", 0, "commit"], 3), (["atlases", 0, "more"], 1), (["control_match"], "auto"),
        (["init_from"], "base"), (["init_from", "sha256"], None), (["converted_from"], "x.ckpt"), (["settings"], 1),
        (["control_sums"], [1, 2, 3, 4]), (["control_sums"], [5, 4, 3, 2, 1]), (["control_sums"], [-1, 0, 0, 0, 0]),
        (["control_sums"], "x"), (["measured_genes"], -1),
        (["calibration"], "yes"), (["calibration"], []), (["calibration"], {}), (["calibration", "more"], 1),
        (["calibration", "level"], 1.5), (["calibration", "n_conditions"], 2.5), (["calibration", "factor"], 2.0),
        (["calibration", "coverage", "of_all"], 1.5), (["calibration", "coverage", "of_responding"], 1.5),
        (["calibration", "coverage", "conditions"], "training"), (["calibration", "coverage", "n_conditions"], 0),
        *((["calibration", name], value) for name in asdict(CALIBRATION) for value in (-1, "1", None, True, [])),
        *((["calibration", name], 0) for name in asdict(CALIBRATION) if name != "change"),
        *((["calibration", of, name], value) for of in ("others", "responding") for name in ("factor", "floor")
          for value in (-1, 0, "1", None, math.nan)),
    ],
)  # fmt: skip
def test_training_that_cannot_be_is_refused(path, value):
    content = changed(plain(asdict(TRAINING)), path, value)
    refused(lambda content: typed(TrainingRecord, content, "training.json"), r"training\.json", content)


def test_half_a_width_is_the_factor_of_its_kind_times_spread_and_floor():
    spread, change = np.array([0.4, 0.4, np.nan, 0.4]), np.array([0.1, -0.2, 0.1, np.nan])
    half = CALIBRATION.half_width(spread, change)
    expected = [2.0 * math.sqrt(0.4**2 + 0.3**2), 3.0 * math.sqrt(0.4**2 + 0.5**2), np.nan, np.nan]
    np.testing.assert_allclose(half, expected)


def test_an_evaluation_is_read_as_it_was_written(tmp_path):
    config = tiny_config(write_screen(tmp_path), tmp_path / "out")
    screen = Screen.read(config.data.screen, config.data)
    rows = (~screen.is_control).nonzero()[0]
    truth = anndata.AnnData(screen.expression.log1p(rows), screen.obs.iloc[rows])
    truth.var_names = list(screen.expression.genes.names)
    scores = score_conditions(truth, screen, "batch")
    _, path = scores.save(tmp_path)
    record = read_evaluation(json.loads(path.read_text()))
    assert record == scores.record()
    assert list(record.metrics) == list(METRICS)
    assert record.scores["variance_ratio"] == pytest.approx(1.0)
    assert set(record.mean) == {record.model, record.ceiling, *record.baselines}


def test_baselines_are_better_by_the_direction_of_each_metric():
    better = {metric: EVALUATION.better(metric) for metric in EVALUATION.metrics}
    assert better == {"pearson_delta": [], "energy_distance": ["ridge"], "variance_ratio": ["no change", "ridge"]}


def test_an_evaluation_of_before_is_without_doubt():
    old = {key: value for key, value in plain(EVALUATION.as_json()).items() if key not in LATER}
    assert read_evaluation({**old, "format_version": 1}) == replace(
        EVALUATION, interval={}, verdict="", n_genes=None, n_left_out=0, kept_response=None, notes=()
    )


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["format_version"], 3), (["format_version"], True), (["format_version"], KeyError), (["mean"], KeyError),
        (["extra"], 1), (["library_version"], 1), (["model"], None), (["model"], "another"), (["model"], ["x"]),
        (["ceiling"], "x" * 201), (["ceiling"], ""), (["data"], 3), (["split"], []), (["split"], {"hold_out": []}),
        (["split", "hold_out"], "abc"), (["split", "hold_out"], [1]), (["split", "sha256"], "C" * 64),
        (["split", "sha256"], 1), (["n_conditions"], 0), (["n_conditions"], 3.0), (["n_conditions"], True),
        (["n_conditions"], 1 << 50), (["metrics"], {}), (["metrics"], []), (["metrics", "pearson_delta"], "up"),
        (["metrics", "pearson_delta"], ["higher"]), (["metrics"], {f"m{i}": "higher" for i in range(65)}),
        (["mean"], []), (["mean", "PerturbDiff"], KeyError), (["mean", "ridge"], KeyError), (["mean", "ridge"], 1),
        (["mean", "ridge", "pearson_delta"], KeyError), (["mean", "ridge", "other"], 1),
        (["mean", "ridge", "pearson_delta"], 1e13), (["mean", "ridge", "pearson_delta"], float("inf")),
        (["mean", "ridge", "pearson_delta"], "0.5"), (["mean", "ridge", "pearson_delta"], True),
        (["n_undefined", "ridge", "pearson_delta"], None), (["n_undefined", "ridge", "pearson_delta"], 4),
        (["n_undefined", "ridge", "pearson_delta"], -1), (["n_undefined", "ridge", "pearson_delta"], 1.0),
        (["n_undefined", "x"], {}), (["interval", "x"], {}), (["interval", "PerturbDiff", "pearson_delta"], [0.1]),
        (["interval"], KeyError), (["verdict"], "x" * 2001), (["verdict"], None), (["notes"], ["x" * 2001]),
        (["kept_response"], "much"), (["n_genes"], -1), (["n_left_out"], None),
    ],
)  # fmt: skip
def test_an_evaluation_that_cannot_be_is_refused(path, value):
    right = plain(EVALUATION.as_json())
    assert read_evaluation(right) == EVALUATION
    refused(read_evaluation, r"evaluation\.json", changed(right, path, value))
