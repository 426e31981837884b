"""The page of the benchmarks says what its JSON files say."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest


ROOT = Path(__file__).parents[1]
MACHINE = {"device": "abacus", "cores": 2, "threads": 1, "torch": "2", "transformers": "5"}


def run_page(*words):
    command = [sys.executable, str(ROOT / "benchmarks" / "page.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_committed_page_is_up_to_date():
    """What breaks: figures on the page that no file in the repository holds any more."""
    done = run_page("--check")
    assert done.returncode == 0, done.stderr


# What schemes and baselines got, by seed: at the budgets 0.25 and 0.5, at exit 1 and at the last exit.
SCORES = {
    "joint": {1: (0.70, 0.80, 0.60, 0.90), 2: (0.74, 0.82, 0.64, 0.94)},
    "boosted": {1: (0.72, 0.79, 0.62, 0.91), 2: (0.77, 0.84, 0.63, 0.92)},
}
STOCK, CUT = {1: 0.91, 2: 0.96}, {1: 0.75, 2: 0.73}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmarks")
    common = {"machine": MACHINE, "dataset": "news", "task_name": None, "metric": "accuracy", "num_eval_samples": 9}
    rows = []
    for method, seeds in SCORES.items():
        for seed, (quarter, half, first, last) in seeds.items():
            exits = [
                {
                    "exit": k,
                    "layer": k,
                    "relative_cost": k / 2,
                    "loss": 1.0,
                    "metrics": {"accuracy": score},
                    "ece": 0.1,
                }
                for k, score in ((1, first), (2, last))
            ]
            budgets = [
                {"target_cost": cost, "relative_cost": cost - 0.01, "metrics": {"accuracy": score}}
                for cost, score in ((0.25, quarter), (0.5, half))
            ]
            row = {"method": method, "seed": seed, "anytime": exits, "anytime_report": exits, "budgeted": budgets}
            rows.append({**row, "risk": {"message": "no early exit"}, **common})
    for method, cost, seeds in (("stock", 1.0, STOCK), ("cut-2", 0.5, CUT)):
        for seed, score in seeds.items():
            row = {"method": method, "seed": seed, "relative_cost": cost, "metrics_report": {"accuracy": score}}
            rows.append({**row, **common})
    (folder / "results").mkdir()
    (folder / "results" / "quality_news.json").write_text(json.dumps({"recipe": "recipes/news.yaml", "rows": rows}))
    done = run_page("--folder", folder)
    assert done.returncode == 0, done.stderr
    assert (folder / "plots" / "quality_news.png").stat().st_size > 5000
    return (folder / "README.md").read_text()


def cells(page, first):
    """The cells of all table rows that begin with a word."""
    lines = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith(f"| {first} |")]
    assert lines
    return lines


def shown(values, signed=False):
    mean = f"{np.mean(values):+.3f}" if signed else f"{np.mean(values):.3f}"
    return f"{mean} ± {np.std(values, ddof=1):.3f}"


def test_means_and_deviations_over_seeds(page):
    for method, seeds in SCORES.items():
        anytime, budgets = cells(page, method)
        quarter, half, first, last = (list(column) for column in zip(*seeds.values(), strict=True))
        assert anytime[1:] == [shown(first), shown(last)]
        assert budgets[1:4] == [shown(quarter), shown(half), shown(half)]
        # The mean over the costs from 0.25 to 1: a third of the range under the first budget.
        assert budgets[4] == shown([(q + 2 * h) / 3 for q, h in zip(quarter, half, strict=True)])
        assert budgets[5] == shown(last)
        assert budgets[6] == shown([seeds[s][3] - STOCK[s] for s in seeds], signed=True)
        assert budgets[7] == "0 of 2"


def test_differences_are_paired_by_seed(page):
    (line,) = cells(page, "boosted - joint")
    for column, index in ((1, 0), (2, 1), (4, 3)):
        wanted = [SCORES["boosted"][seed][index] - SCORES["joint"][seed][index] for seed in (1, 2)]
        assert line[column] == shown(wanted, signed=True)
    (line,) = cells(page, "fine-tuned, first 2 layers")
    assert line[1:4] == ["0.50", shown(list(CUT.values())), shown([0.80 - 0.75, 0.82 - 0.73], signed=True)]


def test_what_was_not_run_says_so(page):
    assert [set(line[1:]) for line in cells(page, "l2w")] == [{"not run"}, {"not run"}]
    assert set(cells(page, "fine-tuned, first 3 layers")[0][1:]) == {"not run"}


def test_sentences_follow_the_signs(page):
    """A scheme wins or loses only if all seeds agree."""
    assert "- joint under the budget 0.50 beats the model of 2 layers (+0.070 over 2 seeds)." in page
    assert "- joint at the last exit loses to plain fine-tuning (-0.015 over 2 seeds)." in page
    assert "- boosted under the budget 50% does not differ clearly from joint (+0.005 over 2 seeds)." in page
