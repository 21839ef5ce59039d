import ast
import dataclasses
import os
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import perturbdiff
from perturbdiff.config import (
    Config,
    DataConfig,
    DenoiserConfig,
    ObsColumns,
    Preprocessing,
    SamplingConfig,
    as_dict,
    find_recipe,
    from_dict,
    given_columns,
    list_recipes,
    load_build_config,
    load_config,
    reference_denoiser,
    save_config,
)

GIVEN = {"out": "runs/x", "data": {"screen": "x.h5ad"}}
PACKAGE = Path(perturbdiff.__file__).parent
SHIPPED = Path(__file__).parents[1] / "recipes"


def load(*words, recipe=None, given=GIVEN):
    return load_config(recipe, list(words), given)


@pytest.fixture
def recipe(tmp_path):
    def write(text):
        path = tmp_path / "recipe.yaml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return write


# ---------------------------------------------------------------- who wins


def test_without_words_every_setting_has_its_default():
    assert load() == Config(out="runs/x", data=DataConfig(screen="x.h5ad"))


def test_the_recipe_wins_over_defaults_given_values_over_it_and_words_over_all(recipe):
    path = recipe("training: {n_steps: 1, seed: 1, log_every: 1}\noptim: {lr: 0.1}\nout: from_recipe\n")
    given_ = {"out": "from_given", "data": {"screen": "s"}, "training": {"seed": 2, "log_every": 2}}
    config = load("training.log_every=3", recipe=path, given=given_)
    assert (config.training.n_steps, config.training.seed, config.training.log_every) == (1, 2, 3)
    assert (config.optim.lr, config.out, config.optim.warmup_steps) == (0.1, "from_given", 50)


def test_of_two_words_for_one_key_the_later_wins():
    assert load("training.n_steps=5", "training.n_steps=6").training.n_steps == 6


def test_an_empty_recipe_changes_nothing(recipe):
    assert load(recipe=recipe("")) == load()


def test_values_are_what_their_words_look_like():
    config = load(
        "data.n_hvg=null", "split.hold_out=[IFN-beta:CD4T, batch=rep_3]", "optim.lr=3e-4", "training.n_steps=1_000",
        "data.library_size_col=n_counts", "denoiser.parallel_block=false", "data.control_label=a=b",
    )  # fmt: skip
    assert config.data.n_hvg is None
    assert config.split.hold_out == ["IFN-beta:CD4T", "batch=rep_3"]
    assert (config.optim.lr, config.training.n_steps) == (3e-4, 1000)
    assert config.data.library_size_col == "n_counts"
    assert config.denoiser.parallel_block is False
    assert config.data.control_label == "a=b"


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("training.n_stps=5", r"'n_stps' not in 'TrainingConfig'\. Did you mean: 'n_steps'\?"),
        ("trainig.n_steps=5", r"'trainig' not in 'Config'\. Did you mean: 'training'\?"),
        ("sed=5", "'sed' not in 'Config'"),
        ("training.n_steps", r"override 'training.n_steps' is not key=value; for example training.n_steps=500"),
        ("training.n_steps=many", r"'many' .* could not be converted to Integer \(key training.n_steps\)"),
        ("training.n_steps=1.5", r"'1.5' .*Integer \(key training.n_steps\)"),
        ("training.n_steps=null", r"'None' .*\(key training.n_steps\)"),
        ("training.n_steps=", r"\(key training.n_steps\)"),
        ("optim.lr=fast", r"'fast' .*Float \(key optim.lr\)"),
        ("denoiser.parallel_block=maybe", r"'maybe' .*\(key denoiser.parallel_block\)"),
        ("data.input_kind=raw", r"'raw', expected one of \['auto', 'counts', 'log1p'\] \(key data.input_kind\)"),
        ("training.device=tpu", r"'tpu', expected one of \['auto', 'cpu', 'cuda'\] \(key training.device\)"),
        ("training=5", "TrainingConfig"),
        ("n_steps=5", r"Key 'n_steps' not in 'Config'; did you mean sampling.n_steps or training.n_steps\?"),
        ("training.n_steps.x=5", r"\(key training.n_steps\)"),
        ("split.hold_out={A: B}", "incompatible container types"),
        ("split.hold_out[0]=A", "config: "),
        ("split.hold_out=[A", r"'\[A' is not yaml; quote it: split.hold_out=\"'\[A'\""),
        ("split.hold_out=[@x]", r"'\[@x\]' is not yaml; quote it"),
        ("data.control_label=${nope}", r"settings hold '\$\{nope\}'; nothing in them is filled in"),
    ],
)
def test_typos_and_wrong_types_are_errors_that_name_key_and_value(word, text):
    with pytest.raises(ValueError, match=text) as error:
        load(word)
    assert "\n" not in str(error.value)


TEXTS = ["NO", "0.10", "1e3", "#", "|", "~", "*", "@x", "[('DMSO_TF', 0.0, 'uM')]", "a: b", "true", " x ", "a=b", "'q'"]


@pytest.mark.parametrize("text", [*TEXTS, "null"])
def test_a_text_is_taken_as_it_is(text):
    assert load(f"data.control_label={text}").data.control_label == text
    separator = load(f"data.combination_separator={text}").data.combination_separator
    assert separator == (None if text == "null" else text)
    [source] = load_build_config(["a.h5ad"], overrides=[f"source.batch_col={text}"], given={"out": "x"}).sources
    assert source.batch_col == (None if text == "null" else text)


def test_words_that_are_one_of_a_few_are_texts_too():
    for word in ("no", "'no'", '"no"'):
        assert load(f"training.mixed_precision={word}").training.mixed_precision == "no"
    assert load("split.hold_out=[A,B]").split.hold_out == ["A", "B"]


@pytest.mark.parametrize("name", ["no", "on", "0.10", "1e5", "null", "~", "2026-11-29", "a, b"])
def test_texts_of_lists_and_recipes_are_what_is_written_too(recipe, name):
    written = f"'{name}'" if "," in name else name
    assert load(f"data.drop=[{written},'']").data.drop == [name, ""]
    own = recipe(
        f"data: {{drop: [{written}], control_label: {written}, n_hvg: null}}\ntraining: {{mixed_precision: no}}"
    )
    config = load(recipe=own)
    assert (config.data.drop, config.data.control_label) == ([name], name)
    assert (config.data.n_hvg, config.training.mixed_precision) == (None, "no")


@pytest.mark.parametrize(
    "word",
    [
        "data.set_size=0", "data.sets_per_batch=-1", "data.target_sum=0.0", "data.scale=-2.0", "data.n_hvg=0",
        "denoiser.width=0", "denoiser.depth=0", "denoiser.n_heads=-3", "denoiser.mlp_ratio=0.0",
        "denoiser.covariate_dim=0", "diffusion.n_timesteps=0", "diffusion.p_self_cond=1.1",
        "diffusion.p_drop_cond=-0.1", "diffusion.p_drop_label=2.0", "diffusion.mse_weight=-1.0",
        "diffusion.mmd_weight=-1.0", "sampling.n_steps=0", "sampling.start_time=0", "sampling.eta=1.5",
        "sampling.guidance_scale=-1.0", "sampling.cutoff=-0.1", "optim.lr=0.0", "optim.beta1=1.0", "optim.beta2=-0.1",
        "optim.eps=0.0", "optim.weight_decay=-0.1", "optim.warmup_steps=-1", "optim.min_lr_ratio=1.5",
        "optim.plateau_ratio=-0.5", "optim.grad_clip=0.0", "optim.ema_decay=1.01", "optim.ema_every=0",
        "training.n_steps=-5", "training.seed=-1", "training.log_every=0", "training.validate_every=0",
        "training.early_stop_patience=0", "training.save_every=0", "training.keep_states=0",
        "training.save_minutes=-1.0",
        "split.validation_fraction=1.2", "sampling.n_steps=1001", "denoiser.n_heads=7", "denoiser.control_weight=1.5",
        "data.prefetch=-1", "data.min_set_size=17", "data.n_streams=0", "data.n_streams=5", "training.timeout=0.0",
        "training.profile_steps=-1", "training.validate_sets=0", "training.accumulation_steps=0", "adapt.lr_ratio=0.0",
        "adapt.lora_rank=0", "adapt.lora_alpha=-1.0", "diffusion.p_drop_perturbation=1.5",
        "diffusion.p_features_only=-0.5", "denoiser.published_encoding.doses=-1",
    ],
)  # fmt: skip
def test_values_out_of_range_are_errors_that_name_key_value_and_rule(word):
    key, value = word.split("=")
    with pytest.raises(ValueError, match=rf"{key} \({value}\) must ") as error:
        load(word)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("word", "rule"),
    [
        ("optim.lr=0.0", "be greater than 0."), ("training.seed=-1", "not be negative."),
        ("sampling.eta=1.5", "be between 0 and 1."), ("optim.beta1=1.0", "be at least 0 and less than 1."),
        ("data.min_set_size=0", "be at least 1."), ("data.n_hvg=0", "be at least 1, or null."),
    ],
)  # fmt: skip
def test_the_rule_says_what_may_be_given(word, rule):
    with pytest.raises(ValueError, match=re.escape(f"{word.replace('=', ' (')}) must {rule}") + "$"):
        load(word)


def test_weights_of_atlases_have_bounds_and_all_have_one_or_none():
    def weighted(*weights):
        atlases = [{"path": "x", **({} if weight is None else {"weight": weight})} for weight in weights]
        return load(given={"out": "x", "data": {"atlases": atlases}})

    weighted(None, None)
    weighted(1.0, 2.5)
    with pytest.raises(ValueError, match=r"data.atlases\[1\].weight \(0.0\) must be greater than 0, or null"):
        weighted(1.0, 0.0)
    with pytest.raises(ValueError, match=r"weights \[1.0, None\] must be given to all atlases or to none"):
        weighted(1.0, None)


FLOATS = [
    f"{section.name}.{setting.name}"
    for section in dataclasses.fields(Config)
    if section.name != "out"
    for setting in dataclasses.fields(section.default_factory)
    if setting.type is float
]


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("key", FLOATS)
def test_no_setting_is_infinite_or_nan(key, value):
    with pytest.raises(ValueError, match=rf"{key} \({value}\) must be a finite number"):
        load(f"{key}=.{value}" if value != "-inf" else f"{key}=-.inf")


def test_an_empty_separator_is_refused_because_it_would_never_split():
    with pytest.raises(ValueError, match=r"data.combination_separator \(''\) must not be empty; null"):
        load("data.combination_separator=")
    assert load("data.combination_separator=null").data.combination_separator is None


def test_heads_must_divide_twice_the_width():
    load("denoiser.width=10", "denoiser.n_heads=20")
    with pytest.raises(ValueError, match=r"denoiser.n_heads \(8\) must divide twice denoiser.width \(10\)"):
        load("denoiser.width=10", "denoiser.n_heads=8")


def test_the_spacing_decides_which_number_of_steps_must_fit_the_schedule():
    load("sampling.start_time=5000")
    load("sampling.n_steps=5000", "sampling.spacing=reference")
    with pytest.raises(ValueError, match=r"sampling.start_time \(5000\) must be between 1 and .*\(1000\)"):
        load("sampling.start_time=5000", "sampling.spacing=reference")


def test_what_has_no_default_must_be_given():
    nothing, no_out = {"out": "x"}, {"data": {"screen": "x"}}
    empty_out = {**no_out, "out": ""}
    for given_, said in (
        (nothing, "give one of them"), (no_out, "out is not set; give it"), (empty_out, "out is empty; name a run"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            load_config(None, [], given_)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training: [", "recipe.yaml' is not yaml"),
        ("training:\n\tn_steps: 5", "recipe.yaml' is not yaml"),
        ("training: {n_steps: 1}\ntraining: {n_steps: 2}", "recipe.yaml' is not yaml .*duplicate key training"),
        ("- 1\n- 2", "recipe.yaml' is a list; it must hold keys and values"),
        ("5", "recipe.yaml' is not yaml"),
        (b"\xff\xfe\x00", "recipe.yaml' is not yaml"),
        ("training: {n_stps: 5}", "'n_stps' not in 'TrainingConfig'"),
        ("training: {n_steps: -1}", r"training.n_steps \(-1\) must not be negative"),
    ],
)
def test_a_recipe_that_is_none_is_an_error_of_one_line(recipe, text, message):
    with pytest.raises(ValueError, match=message) as error:
        load(recipe=recipe(text))
    assert "\n" not in str(error.value)


def test_a_recipe_that_does_not_exist_is_an_error_that_names_it(tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(FileNotFoundError, match=rf"recipe '{path}' is neither a file .* path of a .yaml file"):
            load(recipe=path)


@pytest.mark.parametrize(
    ("name", "folder", "file"),
    [
        ("train/new_batch", None, "train/new_batch.yaml"), ("new_batch", None, "train/new_batch.yaml"),
        ("cross_cell_type", "train", "train/cross_cell_type.yaml"), ("finetune/lora", "train", "finetune/lora.yaml"),
        ("cross_cell_type", "finetune", "finetune/cross_cell_type.yaml"), ("lora", "train", "finetune/lora.yaml"),
        ("slurm/pretrain", None, "slurm/pretrain.sbatch"),
    ],
)  # fmt: skip
def test_a_recipe_that_ships_is_found_by_its_name(name, folder, file):
    assert find_recipe(name, folder) == SHIPPED / file


def test_a_file_wins_over_a_name_that_ships(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "new_batch").write_text("training: {n_steps: 9}\n")
    assert find_recipe("new_batch", "train") == Path("new_batch")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cross_cell_type", "is one of finetune/cross_cell_type, train/cross_cell_type; give the whole name"),
        ("cross_cel_type", r"nearest: finetune/cross_cell_type, train/cross_cell_type\)"),
        ("train/lora", r"nearest: finetune/lora\)"), ("../README", "path of a .yaml file, or a name"), ("", "a name"),
    ],
)  # fmt: skip
def test_a_name_of_none_or_of_several_recipes_is_an_error_that_lists_the_likely_ones(name, message):
    with pytest.raises(FileNotFoundError, match=message):
        find_recipe(name)


def test_every_kind_of_settings_finds_recipes_of_its_own_folder():
    assert load(recipe="cross_cell_type") == load(recipe=SHIPPED / "train" / "cross_cell_type.yaml")
    atlas = load_build_config([], SHIPPED / "atlas" / "pbmc.yaml", [], {"out": "x"})
    assert load_build_config([], "pbmc", [], {"out": "x"}) == atlas


def test_every_name_of_a_recipe_that_ships_is_of_one_file():
    names = [name for name, _, _ in list_recipes()]
    assert len(set(names)) == len(names) == len([path for path in SHIPPED.rglob("*") if path.is_file()])


def test_a_recipe_runs_no_code(recipe, tmp_path):
    with pytest.raises(ValueError, match="is not yaml"):
        load(recipe=recipe(f"!!python/object/apply:os.system ['touch {tmp_path}/ran']"))
    assert not (tmp_path / "ran").exists()


# ---------------------------------------------------------------- written and read back


def test_settings_are_written_and_read_back_unchanged(tmp_path):
    config = load(
        "data.n_hvg=null", "data.control_label=null", "data.cell_type_col=1e3", "optim.lr=1.23456789e-7",
        "split.hold_out=['a: b', 'x#y', '']", "data.combination_separator=,", "training.early_stop_patience=3",
    )  # fmt: skip
    assert config.data.control_label == "null"
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.slow
@settings(derandomize=True, max_examples=20)
@given(st.text(st.characters(codec="utf-8", exclude_characters="$", exclude_categories=["Cc"]), min_size=1), st.data())
def test_any_label_and_number_survive_being_written(tmp_path_factory, label, data):
    config = load()
    config.data.control_label = label
    config.split.hold_out = [label, f"{label}:x"]
    config.optim.lr = data.draw(st.floats(1e-300, 1e300))
    config.training.seed = data.draw(st.integers(0, 2**63))
    path = tmp_path_factory.mktemp("config") / "config.yaml"
    save_config(config, path)
    assert load_config(path) == config


@pytest.mark.parametrize(
    "value", [DenoiserConfig(width=8, n_heads=2), SamplingConfig(eta=0.5), Preprocessing("log1p", 1e4, 10.0, "total")]
)
def test_a_settings_class_survives_being_plain_values(value):
    plain = as_dict(value)
    assert plain == dataclasses.asdict(value)
    assert from_dict(type(value), plain) == value


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"widht": 3}, "Key 'widht' not in 'DenoiserConfig'. Did you mean: 'width'"),
        ({"width": 3.5}, r"'3.5' .*Integer \(key width\)"),
        ({"output": "cross"}, r"'cross', expected one of \['direct', 'control_residual'\]"),
        ({"width": None}, r"\(key width\)"),
        ({"width": "${oc.env:HOME}"}, "nothing in them is filled in"),
        ({"output": "${oc.env:PERTURBDIFF_TEST_SECRET}"}, "nothing in them is filled in"),
        ({"a": [{"b": "${x}"}]}, "nothing in them is filled in"),
        ({"${x}": 1}, "nothing in them is filled in"),
    ],
)
def test_plain_values_with_unknown_keys_wrong_types_or_interpolations_are_refused(monkeypatch, values, text):
    monkeypatch.setitem(os.environ, "PERTURBDIFF_TEST_SECRET", "direct")
    with pytest.raises(ValueError, match=text):
        from_dict(DenoiserConfig, values)


def test_a_field_without_default_must_be_among_the_plain_values():
    with pytest.raises(ValueError, match="missing mandatory value: target_sum"):
        from_dict(Preprocessing, {"input_kind": "counts"})


def test_the_reference_denoiser_is_a_denoiser_that_loads():
    words = [f"denoiser.{key}={value}" for key, value in as_dict(reference_denoiser()).items()]
    assert load(*words).denoiser == reference_denoiser()


# ---------------------------------------------------------------- nothing is set in vain


def read_attributes(source: str) -> set[str]:
    """Names of attributes that some source reads, as in `config.optim.lr`."""
    return {
        node.attr
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }


def config_classes():
    classes = [Config, *(f.default_factory for f in dataclasses.fields(Config) if f.name != "out"), Preprocessing]
    assert len(classes) == 10
    return classes


def test_every_setting_is_read_somewhere_in_the_package():
    sources = [path for path in PACKAGE.rglob("*.py") if path.name != "config.py"]
    assert len(sources) > 20
    read = set.union(*(read_attributes(path.read_text()) for path in sources))
    unread = [f"{c.__name__}.{f.name}" for c in config_classes() for f in dataclasses.fields(c) if f.name not in read]
    assert unread == []


def test_a_setting_that_is_only_written_counts_as_unread():
    assert read_attributes("config.lr = 1\nx = config.eps.deep\n# config.beta") == {"eps", "deep"}


def test_columns_of_a_file_of_controls_are_given_as_those_of_a_screen():
    obs, how = ObsColumns("p", "c", None, "control", ("NT",), "dose"), Preprocessing("counts", 1e4, 10.0, None)
    words = ["data.perturbation_col=no", "data.batch_col=0.10", "data.other_control_labels=[a, 'b,c']"]
    given = dataclasses.replace(obs, perturbation="no", batch="0.10", other_control_labels=("a", "b,c"))
    assert given_columns(obs, how, words) == (given, how)
    assert given_columns(obs, how, ["data.other_control_labels=[]"])[0].other_control_labels == ()
    found = given_columns(obs, how, ["data.library_size_col=n"])
    assert found == (obs, dataclasses.replace(how, library_size_col="n"))
    for word in ("data.cell_type_col=null", "data.control_label="):
        with pytest.raises(ValueError, match="must name one"):
            given_columns(obs, how, [word])
    for word in ("perturbation_col=x", "data.layer=x", "data.dose_col=x", "data.perturbation_col", "training.seed=1"):
        with pytest.raises(ValueError, match=f"setting {word!r}: what a file of control cells can be told"):
            given_columns(obs, how, [word])
