"""Evaluations, trainings and registries of strangers, and what of all their texts reaches a terminal."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pytest

from perturbdiff.hub.records import TrainingRecord, read_evaluation
from perturbdiff.model import PerturbDiff
from tests.trust.attacks import (
    ESCAPES,
    EVALUATION,
    as_format_3,
    assert_refused,
    change_config,
    forge,
    giant,
    nested,
    put,
    stating,
)

pytestmark = pytest.mark.slow


def evaluation(**change: Any) -> str:
    return json.dumps({**EVALUATION, **change})


EVALUATIONS = {
    "no JSON": "x",
    "a list": "[]",
    "a key less": json.dumps({key: value for key, value in EVALUATION.items() if key != "mean"}),
    "a key more": evaluation(extra=1),
    "NaN": evaluation(mean={"PerturbDiff": {"pearson_delta": float("nan")}}),
    "1e400": evaluation(mean={"PerturbDiff": {"pearson_delta": 12345}}).replace("12345", "1e400"),
    "a huge number": evaluation(mean={"PerturbDiff": {"pearson_delta": 10**300}}),
    "texts": evaluation(mean={"PerturbDiff": {"pearson_delta": "0.9"}}),
    "no table": evaluation(mean=None),
    "lists": evaluation(mean=[["PerturbDiff", {"pearson_delta": 1}]]),
    "nested": evaluation(data=1).replace('"data": 1', '"data": ' + nested(900)),
    "escapes": evaluation(metrics={ESCAPES: "x"}),
    "escapes in a method": evaluation(mean={"PerturbDiff": {"pearson_delta": 1}, ESCAPES: 1}, n_undefined={}),
    "many metrics": evaluation(metrics={f"m{i}": "higher" for i in range(100_000)}),
    "conditions": evaluation(n_conditions=10**30),
}


@pytest.mark.parametrize("name", EVALUATIONS)
def test_an_evaluation_of_odd_shape_is_refused(no_waiting, folder, name):
    (folder / "evaluation.json").write_text(evaluation())
    forge(folder, lambda config: config["sha256"].update({"evaluation.json": "0" * 64}))
    forge(folder)
    assert PerturbDiff.from_pretrained(folder).evaluation == read_evaluation(EVALUATION)
    put("evaluation.json", EVALUATIONS[name])(folder)
    with pytest.raises(ValueError, match=r"evaluation\.json") as error:
        PerturbDiff.from_pretrained(folder)
    assert str(error.value).isprintable()


COMMANDS = (["hub", "info"], ["hub", "verify"], ["hub", "diff"])
TRAINING = asdict(TrainingRecord())
LOUD = {
    "names": put("cell_types.json", json.dumps({"names": [ESCAPES, "B"]})),
    "names twice": put("cell_types.json", json.dumps({"names": [ESCAPES, ESCAPES]})),
    "version": change_config(lambda config: config.update(format_version=ESCAPES)),
    "class": change_config(lambda config: config.update({"class": ESCAPES})),
    "library": change_config(lambda config: config.update(library_version=ESCAPES)),
    "a key": change_config(lambda config: config.update({ESCAPES: 1})),
    "a key within": change_config(lambda config: config["denoiser"].update({ESCAPES: 1})),
    "a choice": giant("denoiser.output", ESCAPES),
    "columns": giant("obs.batch", ESCAPES),
    "a file": stating(f"{ESCAPES}.json"),
    "license": put("training.json", json.dumps({**TRAINING, "license": ESCAPES, "hold_out": [ESCAPES]})),
    "training": put("training.json", json.dumps({ESCAPES: {ESCAPES: ESCAPES}})),
}


@pytest.mark.parametrize("name", LOUD)
def test_nothing_that_a_stranger_wrote_reaches_a_terminal_raw(reader, saved, folder, name):
    LOUD[name](folder)
    for command in COMMANDS:
        folders = [str(folder), str(saved)][: 1 + (command[1] == "diff")]
        said = reader.ask(command=[*command, *folders])
        assert said["type"] in ("done", "exit 2"), said
        written = said["out"] + said["err"]
        assert len(written) > 20
        assert all(line.isprintable() for line in written.splitlines()), (command, written)


@pytest.mark.parametrize(
    "training", [{"hold_out": 1}, {"atlases": [1, None, {}]}, {"steps": []}, {"converted_from": None}, {"settings": 1}]
)
@pytest.mark.parametrize("version", [3, 4])
def test_training_of_odd_shape_is_refused_in_any_format(no_waiting, folder, training, version):
    put("training.json", json.dumps(training))(folder)
    if version == 3:
        as_format_3(folder)
    with pytest.raises(ValueError, match=r"training\.json") as error:
        PerturbDiff.from_pretrained(folder)
    assert str(error.value).isprintable()


LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{c}: &{c} [{','.join([f'*{chr(ord(c) - 1)}'] * 9)}]\n" for c in "bcdefghij"
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{c}: &{c} {{<<: [{','.join([f'*{chr(ord(c) - 1)}'] * 9)}]}}\n" for c in "bcdefghij"
)
REGISTRIES = {
    "laughs": LAUGHS,
    "laughs as entries": f"{LAUGHS}checkpoints: *j\n",
    "merges": MERGES + "checkpoints: {}\n",
    "python": "checkpoints: !!python/object/apply:os.mkdir ['MARK']",
    "python name": "checkpoints: {a: !!python/name:os.system ''}",
    "nested": "checkpoints: " + nested(20_000),
    "nested blocks": "- " * 20_000 + "a",
    "a list": "[]",
    "nothing": "",
    "not UTF-8": b"\xff",
    "numbers": "checkpoints: {1: {repo: a/b, sha256: 1}}",
    "a date": "checkpoints: {a: {repo: a/b, sha256: 2026-13-99}}",
    "a list as key": "checkpoints: {[a]: 1}",
    "text": "checkpoints: {a: x}",
    "digest": f"checkpoints: {{a: {{repo: a/b, revision: v1, sha256: {'0' * 63}}}}}",
    "escapes": json.dumps({"checkpoints": {ESCAPES: {}}}),
    "keys": json.dumps({"checkpoints": {"a": {ESCAPES: 1}}}),
    "metrics": f"checkpoints: {{a: {{repo: a/b, revision: v1, sha256: '{'0' * 64}', metrics: [1]}}}}",
    "5 MB": "#" * 5_000_000,
}


@pytest.mark.parametrize("name", REGISTRIES)
def test_a_registry_of_a_stranger_is_refused(reader, tmp_path, name):
    content = REGISTRIES[name]
    text = content if isinstance(content, bytes) else content.replace("MARK", str(tmp_path / "mark")).encode()
    (tmp_path / "registry.yaml").write_bytes(text)
    assert_refused(reader.ask(load={"path_or_repo_id": "tiny"}, registry=str(tmp_path / "registry.yaml")))
    assert not (tmp_path / "mark").exists()


def test_a_number_in_a_registry_that_is_beyond_measure_is_refused_or_shown(reader, tmp_path):
    entry = {"repo": "a/b", "revision": "v1", "sha256": "0" * 64, "metrics": {"score": 10**400}}
    (tmp_path / "registry.yaml").write_text(json.dumps({"checkpoints": {"a": entry}}))
    said = reader.ask(command=["hub", "list"], registry=str(tmp_path / "registry.yaml"))
    assert said["type"] in ("done", "exit 2"), said
