"""`een-hf compare`: the table and the plot show the runs' own numbers, over one range of costs."""

import json

import pytest
from PIL import Image

import een_hf
from een_hf.commands import main
from een_hf.evaluation import curve_area, metric_at_cost, plot_comparison


def curve(*points, metric="accuracy"):
    return [{"target_cost": cost, "relative_cost": cost, "metrics": {metric: score}} for cost, score in points]


CURVE = curve((0.6, 0.9), (0.2, 0.5), (0.4, 0.8), (0.5, 0.7), (1.02, 0.95))


@pytest.mark.parametrize(
    ("cost", "wanted"), [(0.1, None), (0.2, 0.5), (0.39, 0.5), (0.4, 0.8), (0.55, 0.7), (1.0, 0.9), (1.02, 0.95)]
)
def test_metric_at_a_cost(cost, wanted):
    """Fails if a budget above the cost counts, if anything is interpolated, or if the best of several is picked."""
    assert metric_at_cost(CURVE, cost, "accuracy") == wanted


def test_the_area_is_the_sum_of_the_steps():
    """Fails if steps are interpolated, the range is not 0.2 to 1, or the sum is not divided by its width."""
    assert curve_area(CURVE, "accuracy") == pytest.approx((0.2 * 0.5 + 0.1 * 0.8 + 0.1 * 0.7 + 0.4 * 0.9) / 0.8)
    assert curve_area(CURVE, "accuracy", start=0.45) == pytest.approx((0.05 * 0.8 + 0.1 * 0.7 + 0.4 * 0.9) / 0.55)


def test_the_area_equals_a_fine_sum():
    """Fails if the steps' widths are wrong anywhere: the mean over 80,000 costs is the area."""
    costs = [0.2 + 0.8 * (i + 0.5) / 80000 for i in range(80000)]
    wanted = sum(metric_at_cost(CURVE, cost, "accuracy") for cost in costs) / len(costs)
    assert curve_area(CURVE, "accuracy") == pytest.approx(wanted, abs=1e-4)


def test_curves_without_an_area():
    """Fails if an empty range, a start that a curve does not reach, or null scores give a number."""
    assert curve_area([], "accuracy") is None
    assert curve_area(curve((1.0, 0.9)), "accuracy") is None
    assert curve_area(CURVE, "accuracy", start=0.1) is None
    assert curve_area(curve((0.2, None), (0.5, float("nan"))), "accuracy") is None
    assert metric_at_cost(curve((0.2, None), (0.5, 0.7)), 0.6, "accuracy") == 0.7


@pytest.fixture
def write_run(tmp_path):
    """Write a results file: `write_run(folder, points, **keys)`."""

    def write(name, points, **keys):
        exits = [
            {"exit": k, "layer": k, "relative_cost": k / 2, "loss": 0.1, "metrics": {"accuracy": 0.6 * k}, "ece": 0.1}
            for k in (1, 2)
        ]
        for entry in points:
            entry |= dict.fromkeys(("thresholds", "exit_fractions"), [0.5] * len(keys.get("anytime", exits)))
        results = {"schema_version": 1, "method": "joint", "model_type": "bert", "dataset": "news", "task_name": None}
        results |= {"metric": "accuracy", "exit_layers": [1, 2], "num_eval_samples": 9, "num_calibration_samples": 4}
        results |= {"anytime": exits, "anytime_report": exits, "budgeted": points, "policy": None, **keys}
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "exit_results.json").write_text(json.dumps(results))
        return str(tmp_path / name)

    return write


def test_the_table(write_run, tmp_path, capsys):
    """Fails if a number stands in another column or row, or areas are taken over different ranges."""
    first = write_run("a/one", CURVE)
    second = write_run("b/one", curve((0.4, 0.6), (0.7, 0.8)), method="boosted")
    third = write_run("stock", curve((1.0, 0.97)))
    main(["compare", first, second + "/exit_results.json", third])
    title, header, *rows = capsys.readouterr().out.splitlines()
    assert title == "accuracy at a share of the plain model's cost; area over relative costs 0.400 to 1"
    assert header.split() == "run method cost at 25% at 50% at 75% area last exit".split()
    areas = [(0.1 * 0.8 + 0.1 * 0.7 + 0.4 * 0.9) / 0.6, (0.3 * 0.6 + 0.3 * 0.8) / 0.6]
    assert [row.split() for row in rows] == [
        ["a/one", "joint", "1.000", "0.5000", "0.7000", "0.9000", f"{areas[0]:.4f}", "1.2000"],
        ["b/one", "boosted", "1.000", "-", "0.6000", "0.8000", f"{areas[1]:.4f}", "1.2000"],
        [f"{tmp_path.name}/stock", "joint", "1.000", "-", "-", "-", "-", "1.2000"],
    ]


def test_a_run_with_one_exit_is_a_baseline(write_run, tmp_path, capsys):
    """Fails if a smaller model is charged as the whole one, or answers below its own cost."""
    joint = write_run("joint", CURVE, plain_operations=400)
    last = {"exit": 1, "layer": 3, "relative_cost": 1.0, "loss": 0.1, "metrics": {"accuracy": 0.75}, "ece": 0.1}
    single = {"exit_layers": [3], "anytime": [last], "anytime_report": [last]}
    small = write_run("small", curve((1.0, 0.75)), plain_operations=180, **single)
    plot = tmp_path / "compare.png"
    main(["compare", small, joint, "--output", str(plot)])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:4]]
    assert rows[0] == ["small", "plain", "0.450", "-", "0.7500", "0.7500", "-", "0.7500"]
    runs = {name: json.loads((tmp_path / name / "exit_results.json").read_text()) for name in ("joint", "small")}
    runs["small"]["anytime_report"][0]["relative_cost"] = 0.45
    lines = {line.get_label(): line.get_xydata().tolist() for line in plot_comparison(runs, plot).axes[0].lines}
    assert lines["small"] == [[0.45, 0.75]]
    old = write_run("old", CURVE)
    with pytest.raises(SystemExit, match=f"{old} lacks the cost of its network"):
        main(["compare", old, small])


def test_the_plot(write_run, tmp_path):
    """Fails if the picture is no PNG, or a curve or baseline in it is not the results' own."""
    baseline = {"name": "stock model", "relative_cost": 1.0, "metrics": {"accuracy": 0.96}}
    first = write_run("one", CURVE, baselines=[baseline])
    second = write_run("two", curve((0.4, 0.6), (0.7, 0.8)), baselines=[baseline])
    main(["compare", first, second, "--output", str(tmp_path / "compare.png")])
    with Image.open(tmp_path / "compare.png") as image:
        assert image.format == "PNG" and image.width > 800

    runs = {name: json.loads((tmp_path / name / "exit_results.json").read_text()) for name in ("one", "two")}
    figure = plot_comparison(runs, tmp_path / "again.png")
    lines = {line.get_label(): line.get_xydata().tolist() for line in figure.axes[0].lines}
    assert lines == {
        "one (joint)": [[0.2, 0.5], [0.4, 0.8], [0.5, 0.7], [0.6, 0.9], [1.02, 0.95]],
        "two (joint)": [[0.4, 0.6], [0.7, 0.8]],
        "stock model": [[1.0, 0.96]],
    }


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"dataset": "reviews"}, "same data set.*has news.*has reviews"),
        ({"task_name": "sst2"}, "same data set"),
        ({"metric": "f1"}, "same metric.*accuracy.*f1"),
        ({"cost_unit": "latency"}, "same unit of cost.*has operations.*has latency"),
        ({"num_eval_samples": 12}, "same evaluation rows"),
    ],
)
def test_runs_that_cannot_be_compared(write_run, keys, named):
    """Fails if numbers of different data stand in one table, or the message does not name both files."""
    first, second = write_run("one", CURVE), write_run("two", CURVE, **keys)
    with pytest.raises(SystemExit, match=named) as refusal:
        main(["compare", first, second])
    assert first in str(refusal.value) and second in str(refusal.value)


def test_bad_input(write_run, tmp_path):
    """Fails if a wrong path ends in a traceback, or in a message that does not name it."""
    first = write_run("one", CURVE)
    with pytest.raises(SystemExit, match="exit_results.json does not exist"):
        main(["compare", first, str(tmp_path)])
    with pytest.raises(SystemExit, match="named twice"):
        main(["compare", first, first])
    with pytest.raises(SystemExit, match="--output"):
        main(["compare", first, "--output", str(tmp_path / "compare.pdf")])
    with pytest.raises(SystemExit, match="--output"):
        main(["compare", first, "--output", str(tmp_path / "nowhere" / "compare.png")])


def test_python_compares_as_the_command_does(write_run, tmp_path, capsys):
    """Fails if the function's table or plot is another than the command's."""
    paths = [write_run("one", curve((0.2, 0.5), (0.5, 0.7))), write_run("two", curve((0.3, 0.6), (0.8, 0.85)))]
    main(["compare", *paths, "--output", str(tmp_path / "command.png")])
    found = een_hf.compare(paths, output=tmp_path / "python.png")
    assert repr(found) == found.table
    assert capsys.readouterr().out.startswith(found.table + "\n")
    assert (tmp_path / "python.png").read_bytes() == (tmp_path / "command.png").read_bytes()
    assert [row["at 50%"] for row in found.rows] == [0.7, 0.6]
