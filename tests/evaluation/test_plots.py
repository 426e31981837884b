"""The picture of a run: it shows the numbers of the results."""

import sys

import numpy as np
import pytest
from PIL import Image

from een_hf.data.partition import plot_partition
from een_hf.evaluation import plot_comparison, plot_exit_curves
from een_hf.training.callbacks import plot_history


def lines_of(figure):
    return {line.get_label(): line.get_xydata().tolist() for line in figure.axes[0].lines}


def points(entries):
    return [[entry["relative_cost"], entry["metrics"]["accuracy"]] for entry in entries]


def test_the_file_is_a_png_with_a_title(results, tmp_path):
    """Fails if no readable image is written, or pyplot's global state (and its display) is needed."""
    figure = plot_exit_curves(results, tmp_path / "exit_curves.png")
    with Image.open(tmp_path / "exit_curves.png") as image:
        assert image.format == "PNG" and image.width > 800 and image.height > 600
        assert len(image.convert("L").getcolors()) > 10
    assert figure.axes[0].get_title() == "glue / sst2: bert, joint"
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_curves_equal_the_results(results, tmp_path):
    """Fails if a curve shows other numbers than the results file."""
    lines = lines_of(plot_exit_curves(results, tmp_path / "exit_curves.png"))
    assert lines["one exit for every sample, by number"] == points(results["anytime_report"])
    assert lines["budgets"] == points(results["budgeted"][::-1])
    assert lines["policy (confidence): 0.880 at cost 0.58"] == points([results["policy"]])
    for baseline in results["baselines"]:
        assert lines[baseline["name"]] == points([baseline])
    assert {y for _, y in lines["exit 3 for every sample"]} == {0.91}


def test_exit_numbers_stand_on_their_points(results, tmp_path):
    """Fails if the numbers are drawn at other exits' points."""
    figure = plot_exit_curves(results, tmp_path / "exit_curves.png")
    placed = {text.get_text(): list(text.get_position()) for text in figure.axes[0].texts}
    assert placed == dict(zip("123", points(results["anytime_report"]), strict=True))


@pytest.mark.parametrize("with_policy", [True, False])
def test_shares_stand_under_their_exits(results, tmp_path, with_policy):
    """Fails if the bars show another policy's shares, or stand under the wrong exit."""
    if not with_policy:
        results["policy"] = None
        results["budgeted"][1]["exit_fractions"] = [0.9, 0.1, 0.0]
    bars = plot_exit_curves(results, tmp_path / "exit_curves.png").axes[1].patches
    expected = [0.6, 0.3, 0.1] if with_policy else [0.9, 0.1, 0.0]
    assert [bar.get_height() for bar in bars] == expected
    centres = [bar.get_x() + bar.get_width() / 2 for bar in bars]
    assert centres == pytest.approx([entry["relative_cost"] for entry in results["anytime_report"]])


def test_a_run_without_policy_budgets_and_baselines(results, tmp_path):
    """Fails if optional parts are needed, or an undefined score (null) stops the drawing."""
    del results["baselines"]
    results |= {"policy": None, "budgeted": [], "anytime_report": []}
    results["anytime"][0]["metrics"]["accuracy"] = None
    figure = plot_exit_curves(results, tmp_path / "exit_curves.png")
    assert len(figure.axes) == 1
    drawn = lines_of(figure)["one exit for every sample, by number"]
    assert drawn[0][1] != drawn[0][1] and drawn[1:] == points(results["anytime"])[1:]


def test_a_single_exit(results, tmp_path):
    """Fails if a model with only its last exit cannot be drawn."""
    results["policy"] = None
    results["anytime_report"] = results["anytime_report"][:1]
    for entry in results["budgeted"]:
        entry["exit_fractions"] = [1.0]
    assert len(plot_exit_curves(results, tmp_path / "exit_curves.png").axes[1].patches) == 1


@pytest.mark.parametrize("name", ["$x$", r"$\frac$", "a$b_c$d"])
def test_names_are_no_formulas(results, tmp_path, name):
    """A name between dollar signs is a formula to matplotlib: drawn as another, or an error after training."""
    for part in (*results["anytime"], *results["anytime_report"], *results["budgeted"], results["policy"]):
        part["metrics"] = {name: 0.5}
    results |= {"metric": name, "dataset": name, "baselines": [{**results["baselines"][0], "metrics": {name: 0.5}}]}
    results["baselines"][0]["name"] = results["policy"]["criterion"] = results["method"] = name
    wanted = name.replace("$", r"\$").replace("_", " ")
    assert plot_exit_curves(results, tmp_path / "curves.png").axes[0].get_ylabel() == wanted
    assert plot_comparison({name: results, "b": results}, tmp_path / "comparison.png").axes[0].get_ylabel() == wanted
    assert plot_history({name: {"step": [1], "exit 1": [2]}}, tmp_path / "h.png").axes[0].get_title() == wanted
    plot_partition(np.ones((2, 2), int), [name, "b"], tmp_path / "partition.png")
