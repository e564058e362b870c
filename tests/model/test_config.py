"""Configuration: recipes, overrides, and one clear sentence for what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from setemb.config import Config, ModelConfig, from_dict, load_config, recipes, to_yaml

pytest.importorskip("omegaconf")


@pytest.mark.parametrize("name", recipes())
def test_every_shipped_recipe_loads_and_survives_yaml(name, tmp_path):
    config = load_config(name)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "config.yaml") == config
    assert config != Config()


def test_overrides_win_over_the_recipe(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("loss: {margin: 0.3, kind: info_nce}\n")
    config = load_config(recipe, ["loss.margin=0.1", "model.sets.num_slots=2", "data.dir=a b"])
    assert (config.loss.margin, config.loss.kind) == (0.1, "info_nce")
    assert (config.model.sets.num_slots, config.data.dir) == (2, "a b")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("loss.margn=0.1", 'unknown setting "loss.margn"; did you mean "loss.margin"'),
        ("margin=0.1", 'unknown setting "margin"; did you mean "loss.margin"'),
        ("zzz=1", 'unknown setting "zzz"$'),
        ("loss.margin.x=1", 'unknown setting "loss.margin.x"'),
        ("trainer.epochs=many", "setting trainer.epochs: .*many"),
        ("loss.kind=hinge", 'setting "loss.kind" must be one of triplet, info_nce, got .hinge.'),
        ("model.sets.padding=zero", 'setting "model.sets.padding" must be one of'),
        ("loss.margin", "an override must read key=value, got 'loss.margin'"),
        ("data.dir=[x", r"cannot read the override 'data.dir=\[x'"),
        ("data.dir=[x]", r"setting data.dir: it takes str, got \['x'\]"),
        ("model.dim=2.5", "setting model.dim: it takes int, got 2.5"),
        ("trainer.progress=3", "setting trainer.progress: it takes bool, got 3"),
        ("model.text=gru", "setting model.text: it is a section of settings, got 'gru'"),
    ],
)
def test_wrong_settings_are_named(override, message):
    with pytest.raises(ValueError, match=message):
        load_config(None, [override])


def test_values_become_what_the_setting_takes():
    config = load_config(None, ["loss.margin=1", "trainer.precision=32", "trainer.progress=false", "data.dir=2024"])
    assert (config.loss.margin, config.trainer.precision, config.data.dir) == (1.0, "32", "2024")
    assert type(config.loss.margin) is float
    assert config.trainer.progress is False


def test_wrong_recipes_are_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"recipe must be a .yaml file or one of .*f8k-grid-bigru.*; got 'nothing'"):
        load_config("nothing")
    with pytest.raises(ValueError, match=r"cannot read .*none\.yaml"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    with pytest.raises(ValueError, match=r"cannot read .*broken\.yaml"):
        load_config(tmp_path / "broken.yaml")
    (tmp_path / "absent.yaml").write_text("data: {dir: '${oc.env:SETEMB_ABSENT}'}\n")
    with pytest.raises(ValueError, match=r"cannot read .*absent\.yaml: .*SETEMB_ABSENT"):
        load_config(tmp_path / "absent.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ValueError, match="must hold a mapping"):
        load_config(tmp_path / "list.yaml")


def test_choices_are_checked_in_a_section_alone():
    with pytest.raises(ValueError, match='"similarity" must be one of'):
        from_dict(ModelConfig, {"similarity": "dot"})
