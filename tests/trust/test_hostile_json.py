"""JSON files of strangers: one line of ValueError, soon, within memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from perturbdiff.hub.metadata import parse_metadata
from perturbdiff.hub.model_folder import CONFIG, JSON_FILES, config_hash, read_folder
from perturbdiff.model import PerturbDiff
from tests.trust.attacks import ESCAPES, assert_refused, forge, giant, nested, put

pytestmark = pytest.mark.slow


def keys_of(content: dict[str, Any], before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in content.items():
        if key != "sha256":
            yield (*before, key)
            if isinstance(value, dict):
                yield from keys_of(value, (*before, key))


ODD_VALUES = [
    True, None, [], {"x": 1}, "", "1", "\ud800", ESCAPES, "${oc.env:HOME}", 0, -1, 7, 10**12, 10**4000, 1.5, 1e300,
    float("nan"), [[1]],
]  # fmt: skip


def test_every_setting_of_another_kind_is_refused_or_taken_as_it_is(folder):
    """A value is refused, or is what the model then has: it is never made to fit, and never falls back to a default."""
    config = json.loads((folder / CONFIG).read_text())
    files = [(CONFIG, keys) for keys in keys_of(config)]
    files += [(name, keys) for name in JSON_FILES for keys in keys_of(json.loads((folder / name).read_text()))]
    taken: dict[str, int] = {}
    refusals: list[str] = []
    assert len(files) > 45
    for name, keys in files:
        path, before = folder / name, (folder / name).read_bytes()
        for value in ODD_VALUES:
            content = json.loads(before)
            part = content
            for key in keys[:-1]:
                part = part[key]
            part[keys[-1]] = value
            path.write_text(json.dumps(content))
            forge(folder)
            try:
                said = parse_metadata(read_folder(folder))
            except ValueError as error:
                refusals.append(str(error))
            else:
                taken[".".join(keys)] = taken.get(".".join(keys), 0) + 1
                new_config, new_files = said.as_json()
                again = json.loads(json.dumps(new_config if name == CONFIG else new_files[name]))
                for key in keys if keys != ("library_version",) else ():
                    again = again[key]
                assert again == value or keys == ("library_version",), (name, keys, value)
                assert isinstance(again, bool) == isinstance(value, bool) or keys == ("library_version",)
        path.write_bytes(before)
    assert {"obs.control_label", "denoiser.parallel_block", "steps"} <= set(taken)  # some are good: texts, booleans
    assert not {"format_version", "class"} & set(taken)
    assert all(text.isprintable() and len(text) < 1000 for text in refusals)


def raw_config(text_of: Callable[[str], str]) -> Callable[[Path], None]:
    def attack(folder: Path) -> None:
        (folder / CONFIG).write_text(text_of((folder / CONFIG).read_text()))

    return attack


def with_hash_of(key: str, text: str) -> Callable[[Path], None]:
    """A setting written in a way of its own; the hash is that of what a lenient reader finds."""

    def attack(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        config[key] = "PLACE"
        digests = config.pop("sha256")
        written = json.dumps(config).replace('"PLACE"', text, 1)
        digests[CONFIG] = config_hash(json.loads(written))
        (folder / CONFIG).write_text(f'{written[:-1]}, "sha256": {json.dumps(digests)}}}')

    return attack


BILLIONS = {
    "width": giant("denoiser.width", 10**12),
    "every size": giant("denoiser.width", 1 << 16, depth=1 << 8, n_heads=1, mlp_ratio=256.0, covariate_dim=1 << 16),
    "deep": giant("denoiser.depth", 10**9),
    "deep and thin": giant("denoiser.depth", 1 << 8, width=2, n_heads=1),
    "wide": giant("denoiser.width", 1 << 16, n_heads=1 << 17),
    "heads": giant("denoiser.n_heads", 1 << 62),
    "ratio": giant("denoiser.mlp_ratio", 1e308),
    "small ratio": giant("denoiser.mlp_ratio", 1e-308),
    "covariates": giant("denoiser.covariate_dim", 10**12, conditioning="reference"),
    "reference": giant("denoiser.conditioning", "reference", covariate_dim=1 << 16),
    **{
        name: giant("denoiser.published_encoding", {
            "perturbation_features": 0, "doses": 0, "cell_type_features": 0, "covariates": 0, name: 10**12
        }, conditioning="reference")
        for name in ("perturbation_features", "doses", "cell_type_features", "covariates")
    },
    "tables": giant(
        "denoiser.published_encoding",
        {"perturbation_features": 1 << 20, "doses": 1 << 20, "cell_type_features": 1 << 20, "covariates": 1 << 20},
        conditioning="reference", perturbation_encoding="features", cell_type_encoding="features",
        covariate_dim=1 << 16,
    ),
    "sets": giant("set_size", 10**12),
    "timesteps": giant("diffusion.n_timesteps", 10**12),
    "steps": giant("sampling.n_steps", 10**12),
    "a list of a million": giant("denoiser.width", [1] * 1_000_000),
    "a dictionary of a hundred thousand": giant("denoiser.published_encoding", {str(i): 0 for i in range(100_000)}),
    "a long text": giant("obs.batch", "x" * 10_000_000),
}  # fmt: skip


@pytest.mark.parametrize("name", BILLIONS)
def test_a_giant_is_refused_before_memory_is_taken(reader, folder, name):
    BILLIONS[name](folder)
    said = reader.load(folder)
    if name == "a long text":  # is a name as any other
        assert said["type"] == "done"
    else:
        assert_refused(said)


MUCH_JSON: dict[str, Callable[[], str]] = {
    "60 MB": lambda: "[" + "1," * 30_000_000 + "1]",
    "lists": lambda: '{"a": [' + "[]," * 5_500_000 + "0]}",
    "dictionaries": lambda: '{"a": [' + "{}," * 5_500_000 + "0]}",
    "a million dictionaries": lambda: '{"a": [' + "{}," * 1_000_000 + "0]}",
    "names": lambda: '{"a": [' + ",".join(f'"{i:x}"' for i in range(1_600_000)) + "]}",
    "keys": lambda: "{" + ",".join(f'"{i:x}":1' for i in range(1_300_000)) + "}",
    "floats": lambda: '{"a": [' + "1e1," * 4_000_000 + "0]}",
    "wide characters": lambda: '{"a": "' + "x" * 15_000_000 + "\U0001f600" + '"}',
}


@pytest.mark.parametrize("what", MUCH_JSON)
def test_json_beyond_measure_is_refused_within_memory(reader, folder, what):
    put("perturbations.json", MUCH_JSON[what]())(folder)
    assert_refused(reader.load(folder))


ODD_JSON = {
    **{f"depth {n}": '{"a": ' + nested(n) + "}" for n in (100, 900, 925, 950, 960, 970, 980, 990, 100_000)},
    "a long number": '{"a": ' + "9" * 100_000 + "}",
    "not UTF-8": b'{"a": "\xff"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "half a character": '{"a": "\\ud800"}',
    "NUL": '{"a": 1}\0',
    "nothing": "",
    "a text": '"abc"',
    "not a number": '{"a": NaN}',
    "infinite": '{"a": 1e400}',
    "twice": '{"names": ["A", "B", "C"], "names": ["A", "B", "D"], "combination_separator": "+"}',
    "byte order mark": '\ufeff{"a": 1}',
}


@pytest.mark.parametrize("name", [CONFIG, "perturbations.json", "training.json"])
@pytest.mark.parametrize("what", ODD_JSON)
def test_what_is_not_plain_json_is_refused_by_name(no_waiting, folder, name, what):
    put(name, ODD_JSON[what])(folder)
    with pytest.raises(ValueError, match=name) as error:
        PerturbDiff.from_pretrained(folder)
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    "text", ["1e400", "-Infinity", "NaN", nested(900), '"\\ud800"', '{"a": 1, "a": 2}', "9" * 4000]
)
@pytest.mark.parametrize("key", ["set_size", "obs", "format_version", "library_version"])
def test_a_config_of_the_right_hash_must_still_be_json(no_waiting, folder, key, text):
    with_hash_of(key, text)(folder)
    with pytest.raises(ValueError, match=CONFIG) as error:
        PerturbDiff.from_pretrained(folder)
    assert str(error.value).isprintable()


VOCABULARIES: dict[str, Any] = {
    "long names twice": {"names": [ESCAPES * 50_000] * 2},
    "names twice": {"names": [ESCAPES, ESCAPES]},
    "numbers": {"names": [1, 2]},
    "lists": {"names": [["T"], ["B"]]},
    "nothing": {"names": [None, "B"]},
    "a text": {"names": "TB"},
    "a dictionary": {"names": {"T": 0, "B": 1}},
    "no names": {"names": []},
    "no key": {ESCAPES: []},
    "others": {"names": ["T", "B", "C"]},
}


@pytest.mark.parametrize("file", ["cell_types.json", "genes.json"])
@pytest.mark.parametrize("what", VOCABULARIES)
def test_vocabularies_of_strangers_are_refused_in_a_printable_line(no_waiting, folder, file, what):
    put(file, json.dumps({**VOCABULARIES[what], **({"ensembl": []} if file == "genes.json" else {})}))(folder)
    with pytest.raises(ValueError, match=r"names are missing|no genes|does not fit") as error:
        PerturbDiff.from_pretrained(folder)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("names", ['"GENE",' * 10_000_000, "a million", f'"{"x" * 10_000_000}",'], ids=range(3))
def test_vocabularies_beyond_measure_are_refused_within_memory(reader, folder, names):
    if names == "a million":
        names = "".join(f'"{i:06}",' for i in range(1_400_000))
    put("genes.json", f'{{"names": [{names[:-1]}], "ensembl": []}}')(folder)
    assert_refused(reader.load(folder))


def test_labels_are_bytes_of_a_file_and_order_is_told_by_the_identity_alone(no_waiting, folder, tmp_path):
    """Genes in another order fit every shape and the golden output; the sha256 of config.json, which a registry has,
    is what says that it is another model.
    """
    honest = read_folder(folder).sha256
    content = json.loads((folder / "genes.json").read_text())
    content["names"][:2] = content["names"][1::-1]
    (folder / "genes.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"genes\.json does not have the sha256"):
        PerturbDiff.from_pretrained(folder)
    forge(folder)
    assert PerturbDiff.from_pretrained(folder).genes.names[:2] == ("GENE1", "GENE0")
    assert read_folder(folder).sha256 != honest


def test_a_registry_refuses_what_was_forged_with_care(no_waiting, folder, tmp_path, monkeypatch):
    registry = tmp_path / "registry.yaml"
    registry.write_text(f"checkpoints: {{tiny: {{repo: model, sha256: {read_folder(folder).sha256}}}}}")
    monkeypatch.setenv("PERTURBDIFF_REGISTRY", str(registry))
    monkeypatch.chdir(tmp_path / "..")
    PerturbDiff.from_pretrained("tiny")
    names = json.loads((folder / "perturbations.json").read_text())
    put("perturbations.json", json.dumps({**names, "names": ["B", "A", "C"]}))(folder)
    PerturbDiff.from_pretrained(folder)
    with pytest.raises(ValueError, match="another model than the registered one"):
        PerturbDiff.from_pretrained("tiny")


@pytest.mark.parametrize("separator", [1, True, [], ["+"], {}, 1.5])
def test_a_separator_is_text_or_nothing(no_waiting, folder, separator):
    names = {"names": ["A", "B", "C"], "combination_separator": separator}
    put("perturbations.json", json.dumps(names))(folder)
    with pytest.raises(ValueError, match="names are missing or not as they should be"):
        PerturbDiff.from_pretrained(folder)
