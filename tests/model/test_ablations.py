"""Ablations: which runs are planned, what is kept of them, and what the tables say."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict
from pathlib import Path

import pytest

pytest.importorskip("lightning")
pytest.importorskip("omegaconf")
pytest.importorskip("typer")

from typer.testing import CliRunner

from setemb import ablations
from setemb.ablations import FIGURES, STUDIES, Run, plan, tables, to_markdown, train_run, vary
from setemb.cli import app
from setemb.config import load_config
from setemb.training import read_metrics

TINY = Path(__file__).parents[1] / "data" / "tiny.yaml"


def test_every_study_changes_what_it_says():
    for name, study in STUDIES.items():
        (planned,) = plan(TINY, [], [study], 1).studies
        folders = [runs[0].folder for runs in planned[1]]
        assert len(set(folders)) == len(study.variants), f"{name}: variants must differ, got {folders}"
        assert "recipe/seed_0" in folders or name in ("loss", "batch"), (
            f"{name}: the recipe itself is one of them, got {folders}"
        )
    assert plan(TINY, [], [STUDIES["loss"]], 1).runs[1].folder == "recipe/seed_0"


def test_what_is_alike_is_trained_once_and_seeds_count_on():
    one_k = vary("model.sets.num_slots", ["1", "4"])
    planned = plan(TINY, ["trainer.seed=7", "model.sets.num_slots=1"], [one_k, STUDIES["similarity"]], 2)
    folders = [run.folder for run in planned.runs]
    assert len(folders) == len(set(folders)) == 2 * (2 + 3)  # with K = 1, "one vector" is smooth-Chamfer
    assert folders[:2] == ["recipe/seed_7", "recipe/seed_8"]
    assert folders[2] == "model.sets.num_slots=4/seed_7"
    for run in planned.runs:
        assert run.settings["trainer"]["seed"] == int(run.folder[-1])
    settings = {run.folder: run.settings for run in planned.runs}
    assert settings["model.similarity=max/seed_8"]["model"]["similarity"] == "max"


def test_a_value_may_hold_what_a_folder_cannot():
    ((_, variants),) = plan(TINY, [], [vary("data.cache", ["a/b"])], 1).studies
    assert variants[0][0].folder == "data.cache=a%2Fb/seed_0"
    assert variants[0][0].settings["data"]["cache"] == "a/b"


@pytest.mark.parametrize(("studies", "seeds"), [([], 1), ([vary("model.alpha", ["1"])], 0)])
def test_refused(studies, seeds):
    with pytest.raises(ValueError, match="at least one study and one seed"):
        plan(TINY, [], studies, seeds)


def test_seeds_are_no_study():
    with pytest.raises(ValueError, match=r"a study cannot vary trainer\.seed, got 'trainer\.seed = 3'"):
        plan(TINY, [], [vary("trainer.seed", ["3"])], 2)


def figures(rsum: float) -> dict[str, object]:
    last = dict.fromkeys(FIGURES, rsum / 6) | {"rsum": rsum}
    return {"epochs": 1, "last": last, "best": last | {"rsum": rsum + 1}}


def test_the_table_has_means_and_deviations_of_what_has_ended():
    planned = plan(TINY, [], [vary("model.alpha", ["1", "4", "16"])], 3)
    found = {f"model.alpha=1.0/seed_{i}": figures(value) for i, value in enumerate((100.0, 110.0, 150.0))}
    found["recipe/seed_0"] = figures(60.0)
    (study,) = tables(planned, found)
    assert [row["variant"] for row in study["rows"]] == ["model.alpha = 1", "model.alpha = 16"]
    first, last = study["rows"]
    assert (first["seeds"], first["mean"]["rsum"], first["best_rsum"]) == (3, 120.0, 121.0)
    assert first["rsum_deviation"] == pytest.approx(statistics.stdev((100, 110, 150)))
    assert (last["seeds"], last["rsum_deviation"]) == (1, None)
    text = to_markdown([study]).splitlines()
    assert text[2] == "| model.alpha = 1 | 20.0 20.0 20.0 | 20.0 20.0 20.0 | 120.0 ± 26.5 | 3 |"
    assert text[3] == "| model.alpha = 16 | 10.0 10.0 10.0 | 10.0 10.0 10.0 | 60.0 | 1 |"


def settings(tiny_precomp: Path, *overrides: str) -> dict[str, object]:
    return asdict(load_config(TINY, [f"data.dir={tiny_precomp}", "trainer.epochs=2", *overrides]))


def test_a_run_is_resumed_kept_and_not_mixed_up(tiny_precomp, tmp_path, monkeypatch):
    run = Run("recipe/seed_0", settings(tiny_precomp))
    folder = tmp_path / "runs" / "recipe" / "seed_0"
    found = train_run(run, tmp_path)
    assert found["epochs"] == 2
    logged = [row["dev/rsum"] for row in read_metrics(folder) if "dev/rsum" in row]
    assert (found["last"]["rsum"], found["best"]["rsum"]) == (logged[-1], max(logged))

    # stopped just before its end: it goes on, and ends at the same
    (folder / "figures.json").unlink()
    assert train_run(run, tmp_path) == found
    # ended: nothing is trained
    monkeypatch.setattr("setemb.training.train_precomp", None)
    assert train_run(run, tmp_path) == found
    with pytest.raises(FileExistsError, match=r"was trained with trainer\.epochs=2, now asked for is 3"):
        train_run(Run("recipe/seed_0", settings(tiny_precomp, "trainer.epochs=3")), tmp_path)


@pytest.mark.parametrize("jobs", [1, 2])
def test_the_command(tiny_precomp, tmp_path, jobs):
    arguments = [str(TINY), f"data.dir={tiny_precomp}", "trainer.epochs=1", "--vary", "model.sets.num_slots=1,2"]
    arguments += ["--seeds", "2", "--jobs", str(jobs), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, ["ablate", *arguments])
    assert result.exit_code == 0, result.output
    said = json.loads((tmp_path / "out" / "ablations.json").read_text())
    assert said["recipe"] == str(TINY) and said["seeds"] == 2
    (study,) = said["studies"]
    assert [(row["variant"], row["seeds"]) for row in study["rows"]] == [
        ("model.sets.num_slots = 1", 2),
        ("model.sets.num_slots = 2", 2),
    ]
    runs = sorted((tmp_path / "out" / "runs").glob("*/seed_*/figures.json"))
    assert len(runs) == 4
    ends = [json.loads(path.read_text())["last"]["rsum"] for path in runs]
    means = sorted(row["mean"]["rsum"] for row in study["rows"])
    assert means == pytest.approx(sorted((statistics.fmean(ends[:2]), statistics.fmean(ends[2:]))))
    assert (tmp_path / "out" / "ablations.md").read_text() == to_markdown(said["studies"])
    # asked again, all is there
    again = CliRunner().invoke(app, ["ablate", *arguments])
    assert again.exit_code == 0 and json.loads((tmp_path / "out" / "ablations.json").read_text()) == said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give at least one --study or --vary"),
        (
            ["--study", "colour"],
            "--study must be one of similarity, sets, slots, iterations, alpha, loss, batch, got 'colour'",
        ),
        (["--vary", "model.alpha"], "--vary must read KEY=V1,V2, got 'model.alpha'"),
        (["--vary", "model.alfa=1"], 'unknown setting "model.alfa"; did you mean "model.alpha"'),
        (["--study", "alpha", "--jobs", "0"], "jobs must be at least 1, got 0"),
    ],
)
def test_the_command_refuses(tmp_path, arguments, message):
    result = CliRunner().invoke(app, ["ablate", str(TINY), *arguments, "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert not list(tmp_path.iterdir())


def test_one_that_fails_does_not_take_the_others_along(tiny_precomp, tmp_path):
    good = [Run(f"recipe/seed_{i}", settings(tiny_precomp, "trainer.epochs=1", f"trainer.seed={i}")) for i in (0, 1)]
    bad = Run("bad/seed_0", settings(tiny_precomp, f"data.dir={tmp_path / 'nothing'}"))
    with pytest.raises((ValueError, OSError), match="nothing"):
        list(ablations.train_all([good[0], bad, good[1]], tmp_path / "out", jobs=2))
    kept = sorted(path.parent.parent.name for path in (tmp_path / "out").rglob("figures.json"))
    assert "recipe" in kept and "bad" not in kept
