"""The gallery is drawn, taken up again, and says what the theory says."""

import json
import shutil

import pytest

from nsrl.bench.gallery import FIGURES, make_gallery
from nsrl.bench.gallery.page import ROOMS, write_page
from nsrl.errors import NsrlError

#: Seconds each in small sizes; the others draw the same way.
LIGHT = ("minimum_norm", "one_parameter", "nadaraya_watson", "two_minima")


@pytest.fixture(scope="module")
def gallery(tmp_path_factory):
    out = tmp_path_factory.mktemp("gallery")
    make_gallery(out, only=LIGHT, workers=0, quick=True)
    return out


def numbers(out, name):
    return json.loads((out / f"{name}.json").read_text())["numbers"]


def test_figures_numbers_and_page_are_written(gallery):
    page = (gallery / "README.md").read_text()
    for name in LIGHT:
        assert (gallery / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"![{FIGURES[name].title}]({name}.png)" in page
    assert "certificate.png" not in page


def test_what_the_light_figures_say(gallery):
    assert numbers(gallery, "minimum_norm")["distance"] < 1e-2
    one = numbers(gallery, "one_parameter")
    assert one["gap_alpha_30"] < 0.3 * one["gap_alpha_1"]
    regression = numbers(gallery, "nadaraya_watson")
    assert regression["rmse_bandwidth_0.2"] < min(regression["rmse_bandwidth_0.03"], regression["rmse_bandwidth_2"])
    wells = numbers(gallery, "two_minima")
    assert wells["0.3"]["crossed"] and not wells["0.02"]["crossed"]
    assert wells["0.3"]["first_order"] > 10 * wells["0.02"]["first_order"]


def test_what_is_there_is_not_drawn_again(gallery, tmp_path):
    gallery = shutil.copytree(gallery, tmp_path / "gallery")
    before = {name: (gallery / f"{name}.png").stat().st_mtime_ns for name in LIGHT}
    (gallery / "two_minima.json").unlink()
    seen = []
    make_gallery(gallery, only=LIGHT, workers=0, quick=True, on_progress=lambda *told: seen.append(told))
    assert seen == [("two_minima", 4, 4)]
    after = {name: (gallery / f"{name}.png").stat().st_mtime_ns for name in LIGHT}
    assert [name for name in LIGHT if before[name] != after[name]] == ["two_minima"]


@pytest.mark.slow
def test_processes_draw_and_a_failure_is_told_behind_the_others(tmp_path):
    (tmp_path / "one_parameter.png").mkdir()  # cannot be replaced by a file
    with pytest.raises(NsrlError, match="one_parameter failed"):
        make_gallery(tmp_path, only=["one_parameter", "nadaraya_watson"], workers=1, quick=True)
    assert (tmp_path / "nadaraya_watson.json").is_file()


def test_every_figure_has_a_room_a_caption_and_a_painter():
    import importlib

    for name, entry in FIGURES.items():
        assert entry.room in ROOMS and entry.caption.endswith(".")
        assert callable(getattr(importlib.import_module(f"nsrl.bench.gallery.{entry.room}"), name))


@pytest.mark.slow
def test_all_figures_can_be_drawn(tmp_path):
    assert len(make_gallery(tmp_path, workers=2, quick=True)) == len(FIGURES)


def test_the_study_of_the_forecast_is_shown_as_a_guest(tmp_path):
    ranks = {"forecast": {"spearman": 0.9, "partial": None}, "rivals": {"rate": {"spearman": 0.5, "partial": None}}}
    content = {"settings": {"n_envs": 4}, "rows": [], "whole_run": ranks}
    (tmp_path / "forecast.json").write_text(json.dumps(content))
    (tmp_path / "forecast.png").write_bytes(b"\x89PNG")
    page = write_page(tmp_path).read_text()
    assert "| whole_run, forecast, spearman | 0.9 |" in page and "| whole_run, forecast, partial | - |" in page
    assert "n_envs" not in page


def test_groups_of_numbers_are_tables_and_nothing_is_cut_off(gallery):
    page = (gallery / "README.md").read_text()
    wells = numbers(gallery, "two_minima")
    assert "|  | crossed | first_order | two_nodes |" in page
    assert sum(f"| {rate} | yes |" in page or f"| {rate} | no |" in page for rate in wells) == len(wells)


def test_the_time_of_the_whole_is_on_the_page(tmp_path, monkeypatch):
    few = {name: FIGURES[name] for name in ("one_parameter", "nadaraya_watson")}
    for module in ("curation", "page"):
        monkeypatch.setattr(f"nsrl.bench.gallery.{module}.FIGURES", few)
    make_gallery(tmp_path, only=["one_parameter"], workers=0, quick=True)
    assert not (tmp_path / "gallery.json").exists()
    make_gallery(tmp_path, workers=0, quick=True, again=True)
    whole = json.loads((tmp_path / "gallery.json").read_text())
    drawn = sum(json.loads((tmp_path / f"{name}.json").read_text())["seconds"] for name in few)
    assert whole["figures"] == 2 and whole["seconds"] > 0.9 * drawn - 0.2
    assert "All 2 figures took" in (tmp_path / "README.md").read_text()


def test_an_unknown_figure_is_told():
    with pytest.raises(NsrlError, match="no figure sunflowers; known: random_nets"):
        make_gallery("nowhere", only=["sunflowers"])
