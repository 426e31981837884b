"""The page of the benchmarks says what its JSON files say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import page as page_script
import pytest
import torch
from common import pack_bits, unpack_bits
from factory import tiny_model
from quality import side_by_side
from student import StudentArguments, StudentTrainer
from text_runs import write_task

from een_hf import EarlyExitTrainingArguments, ExitConfigurationError


ROOT = Path(__file__).parents[1]
MACHINE = {"device": "abacus", "cores": 2, "threads": 1, "torch": "2.0", "transformers": "5.0"}


def run_page(*words):
    page_script.main([str(word) for word in words])


def test_the_committed_page_is_up_to_date():
    """What breaks: figures on the page that no file in the repository holds any more."""
    run_page("--check")


# What schemes and baselines got, by seed: at the budgets 0.25 and 0.5, at exit 1 and at the last exit.
SCORES = {
    "joint": {1: (0.70, 0.80, 0.60, 0.90), 2: (0.74, 0.82, 0.64, 0.94)},
    "boosted": {1: (0.72, 0.79, 0.62, 0.91), 2: (0.77, 0.84, 0.63, 0.92)},
}
STOCK, CUT = {1: 0.91, 2: 0.96}, {1: 0.75, 2: 0.73}
NO_POLICY = {"message": "no early exit"}
RISKS = {
    "joint": {1: {"0.05": NO_POLICY}, 2: {"0.05": NO_POLICY}},
    "boosted": {
        1: {"0.05": NO_POLICY},
        2: {"0.05": {"message": "", "relative_cost": 0.4, "metrics": {"accuracy": 0.85}}},
    },
}


def quality_rows():
    """One row per scheme or baseline and seed, as benchmarks/quality.py writes them."""
    common = {"machine": MACHINE, "dataset": "news", "task_name": None, "metric": "accuracy", "num_eval_samples": 9}
    rows = []
    for method, seeds in SCORES.items():
        for seed, (quarter, half, first, last) in seeds.items():
            exits = [
                {"exit": k, "layer": k, "relative_cost": k / 2, "metrics": {"accuracy": score}}
                for k, score in ((1, first), (2, last))
            ]
            budgets = [
                {"target_cost": cost, "relative_cost": cost - 0.01, "metrics": {"accuracy": score}}
                for cost, score in ((0.25, quarter), (0.5, half))
            ]
            row = {"method": method, "seed": seed, "anytime": exits, "anytime_report": exits, "budgeted": budgets}
            row["command"] = f"python run_glue_een.py recipes/news.yaml --seed {seed} --method {method}"
            rows.append({**row, "risks": RISKS[method][seed], **common})
    for method, cost, seeds in (("stock", 1.0, STOCK), ("cut-2", 0.5, CUT)):
        for seed, score in seeds.items():
            row = {"method": method, "seed": seed, "relative_cost": cost, "metrics_report": {"accuracy": score}}
            row["metrics"] = {"accuracy": score}
            rows.append({**row, "command": "python run_glue_een.py", **common})
    return rows


def write_page(folder, **results):
    """The page of these results: the content of each JSON file, under its name."""
    (folder / "results").mkdir()
    for name, content in results.items():
        (folder / "results" / f"{name}.json").write_text(json.dumps(content))
    run_page("--folder", folder)
    return (folder / "README.md").read_text()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmarks")
    return write_page(folder, quality_news={"recipe": "recipes/news.yaml", "rows": quality_rows()})


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
    assert cells(page, "joint")[1][7] == "0 of 2"
    assert cells(page, "boosted")[1][7] == "1 of 2: cost 0.400, accuracy 0.850"


def test_differences_are_paired_by_seed(page):
    (line,) = cells(page, "boosted - joint")
    for column, index in ((1, 0), (2, 1), (4, 3)):
        wanted = [SCORES["boosted"][seed][index] - SCORES["joint"][seed][index] for seed in (1, 2)]
        assert line[column] == shown(wanted, signed=True)
    (line,) = cells(page, "fine-tuned, first 2 layers")
    assert line[1:4] == ["0.50", shown(list(CUT.values())), shown([0.80 - 0.75, 0.82 - 0.73], signed=True)]


def test_a_distilled_baseline_is_named_as_one(tmp_path):
    """What breaks: a model that learned from another is compared as if it had learned from labels."""
    rows = quality_rows()
    rows += [{**row, "method": "student-2"} for row in rows if row["method"] == "cut-2" and row["seed"] == 1]
    page = write_page(tmp_path, quality_news={"recipe": "recipes/news.yaml", "rows": rows})
    assert cells(page, "fine-tuned, first 2 layers")[0][1:3] == ["0.50", shown(list(CUT.values()))]
    assert cells(page, "fine-tuned, first 2 layers, distilled")[0][1:3] == ["0.50", f"{CUT[1]:.3f}"]


def test_models_of_one_cost_stand_together(tmp_path):
    """What breaks: a larger model's budget is a share of its own cost, and so not the smaller model's."""
    large = quality_rows()
    small = [row for row in quality_rows() if row["method"] != "boosted"]
    files = {"quality_clinc_e5": large, "quality_clinc_minilm": small}
    page = write_page(tmp_path, **{name: {"recipe": name, "rows": rows} for name, rows in files.items()})
    quarter, half, _, last = (shown(list(column)) for column in zip(*SCORES["joint"].values(), strict=True))
    stock, cut = shown(list(STOCK.values())), shown(list(CUT.values()))
    assert cells(page, "news") == [
        ["news", "2.00", "e5", stock, last],
        ["news", "1.00", "e5", cut, half],
        ["news", "1.00", "minilm", stock, last],
        ["news", "0.50", "e5", "", quarter],
        ["news", "0.50", "minilm", cut, half],
        ["news", "0.25", "minilm", "", quarter],
    ]


def test_a_student_learns_from_its_teacher_alone(tmp_path):
    """What breaks: a baseline that also reads the labels, or learns them, is no distilled model."""
    student, teacher = tiny_model("vit", num_labels=3), tiny_model("vit", seed=1, num_labels=3)
    teacher.save_pretrained(tmp_path / "teacher")
    args = EarlyExitTrainingArguments(str(tmp_path), use_cpu=True, disable_tqdm=True)
    trainer = StudentTrainer(student, args, scheme_args=StudentArguments(str(tmp_path / "teacher")))
    rows = {"pixel_values": torch.randn(4, 3, 8, 8), "labels": torch.tensor([0, 1, 2, 0])}
    with torch.no_grad():
        target = teacher.eval()(rows["pixel_values"]).logits.double().softmax(-1)
        own = student.eval()(rows["pixel_values"], early_exit=False).exit_logits.double().log_softmax(-1)
        labelled = trainer.compute_loss(student, rows).item()
        student.train()
        others = {**rows, "labels": torch.tensor([1, 2, 0, 1])}
        taught = [trainer.compute_loss(student, inputs) for inputs in (rows, others)]
    wanted = -sum((target[i] * own[i, k]).sum() for i in range(4) for k in range(student.num_exits)) / 4
    assert torch.allclose(torch.stack(taught).double(), wanted.repeat(2), atol=1e-5)
    with pytest.raises(ExitConfigurationError, match="not for regression"):
        StudentTrainer(tiny_model("vit", num_labels=1), args, scheme_args=StudentArguments(str(tmp_path / "teacher")))
    assert labelled == pytest.approx(-sum(own[i, :, label].sum().item() for i, label in enumerate([0, 1, 2, 0])) / 4)


def test_tables_show_what_ran(tmp_path):
    """What breaks: rows and columns of methods that no seed ran, or a run of some seeds that is not shown."""
    rows = [row for row in quality_rows() if (row["method"], row["seed"]) != ("boosted", 2)]
    rows += [{**row, "risks": row["risks"] | {"0.01": NO_POLICY}} for row in rows if row["method"] == "boosted"]
    page = write_page(tmp_path, quality_news={"recipe": "recipes/news.yaml", "rows": rows})
    assert "l2w" not in page and "two_stage -" not in page and "first 3 layers" not in page
    assert cells(page, "joint")[1][-2:] == ["not run", "0 of 2"]
    assert cells(page, "boosted")[1][-2:] == ["0 of 1", "0 of 1"]
    (head,) = [line for line in page.splitlines() if "| area |" in line]
    assert "≤ 1%" in head and "≤ 2%" not in head


def test_warm_starts_and_other_cuts_have_rows_of_their_own(tmp_path):
    """What breaks: cells that ran and are not shown, or a warm start that is taken for the scheme itself."""
    rows = quality_rows()
    warm = [{**row, "method": "boosted-warm"} for row in rows if row["method"] == "boosted"]
    deeper = [{**row, "method": "cut-6"} for row in rows if row["method"] == "cut-2"]
    page = write_page(tmp_path, quality_news={"recipe": "recipes/news.yaml", "rows": rows + warm + deeper})
    assert cells(page, "boosted-warm")[0][1:] == cells(page, "boosted")[0][1:]
    assert cells(page, "boosted-warm - joint")[0][1:] == cells(page, "boosted - joint")[0][1:]
    assert cells(page, "fine-tuned, first 6 layers")[0][2] == shown(list(CUT.values()))


def test_a_budget_under_the_first_exit_is_not_called_a_missing_run(tmp_path):
    rows = quality_rows()
    for row in rows:
        if "budgeted" in row:
            del row["budgeted"][0]
    page = write_page(tmp_path, quality_news={"recipe": "recipes/news.yaml", "rows": rows})
    assert cells(page, "joint")[1][1:3] == ["none", shown([0.80, 0.82])]
    assert cells(page, "boosted - joint")[0][1] == "none"


def test_a_file_of_baselines_alone_has_a_page(tmp_path):
    """What breaks: the page, while a benchmark whose first method is a baseline is still running."""
    rows = [row for row in quality_rows() if row["method"] == "stock"]
    page = write_page(tmp_path, quality_news={"recipe": "recipes/news.yaml", "rows": rows})
    assert cells(page, "fine-tuned, whole")[0][2] == shown(list(STOCK.values()))
    assert "joint" not in page.split("## Quality")[1].split("## What")[0]


def test_sentences_follow_the_signs(page):
    """A scheme wins or loses only if all seeds agree."""
    assert (
        "- joint beats the smaller fine-tuned model of the same cost: first 2 layers, cost 0.50 (+0.070, seeds" in page
    )
    assert "- joint loses to plain fine-tuning of the whole model: last exit (-0.015, seeds: 2)." in page
    assert "- boosted beats joint: budget 25% (+0.025, seeds: 2)." in page
    (line,) = [line for line in page.splitlines() if line.startswith("- boosted does not clearly differ from joint:")]
    assert "budget 50% (+0.005, seeds: 2)" in line and "last exit (-0.005, seeds: 2)" in line


def with_answers(rows, num_rows=400):
    """The rows with what each run answers rightly: draws of its accuracy, the same rows easy for every run."""
    hardness = np.random.default_rng(0).random(num_rows)
    rows = [{**row, "num_eval_samples": num_rows} for row in rows]
    for row in rows:
        if "anytime" in row:
            quarter, half, _, last = SCORES[row["method"]][row["seed"]]
            scores = {"0.25": quarter, "0.5": half, "exit 1": half, "last": last}  # exit 1 costs 0.5
        else:
            scores = {"last": row["metrics_report"]["accuracy"]}
        row["right"] = {place: pack_bits(hardness < score) for place, score in scores.items()}
    return rows


def right_answers(rows, method, place):
    found = [row for row in rows if row["method"] == method]
    return np.array([unpack_bits(row["right"][place], row["num_eval_samples"]) for row in found]).astype(float)


def test_intervals_are_those_of_a_bootstrap_over_seeds_and_rows(tmp_path):
    """What breaks: intervals of rows alone, which are too narrow, or of unpaired runs, which are too wide."""
    rows = with_answers(quality_rows())
    page = write_page(tmp_path, quality_news={"recipe": "recipes/news.yaml", "rows": rows})
    (line,) = cells(page, "boosted - joint")
    for column, place in ((1, "0.25"), (2, "0.5"), (4, "last")):
        differences = right_answers(rows, "boosted", place) - right_answers(rows, "joint", place)
        random, means = np.random.default_rng(1), []
        for _ in range(3000):
            seeds, drawn = random.integers(2, size=2), random.integers(400, size=400)
            means.append(np.mean([differences[seed][drawn] for seed in seeds]))
        mean, low, high = (float(word.strip("[],")) for word in line[column].split())
        assert mean == pytest.approx(differences.mean(), abs=5e-4)
        assert (low, high) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=4e-3)
    # Seed by seed boosted wins at the last exit and loses: with seeds drawn again that is no difference.
    assert "boosted beats joint: budget 25%" in page
    assert "boosted does not clearly differ from joint: budget 50%" in page


def test_without_the_answers_of_every_run_there_is_no_interval(tmp_path):
    rows = with_answers(quality_rows())
    del next(row for row in rows if row["method"] == "joint")["right"]
    page = write_page(tmp_path, quality_news={"recipe": "recipes/news.yaml", "rows": rows})
    assert "±" in cells(page, "boosted - joint")[0][1] and "[" not in cells(page, "boosted - joint")[0][1]


def test_bits_are_kept():
    bits = np.random.default_rng(0).random(77) < 0.5
    assert (unpack_bits(pack_bits(bits), 77) == bits).all()


def test_the_summary_says_what_half_of_the_cost_gives(page):
    """What breaks: a reader who looks at the top of the page alone."""
    (line,) = cells(page, "news, news")
    lost = [SCORES["joint"][seed][1] - STOCK[seed] for seed in (1, 2)]
    assert line[3] == shown(lost, signed=True)
    assert line[5] == "none"
    assert line[6] == f"{shown([CUT[seed] - STOCK[seed] for seed in (1, 2)], signed=True)}, first 2 layers"
    assert np.mean(lost) < -0.003 and "less at most 0.003: 0 of 1 with `joint`." in page
    assert page.index("## In one minute") < page.index("## Quality")


def test_int8_is_shown_beside_float32(tmp_path):
    rows = quality_rows()
    for row in rows:
        if row["method"] == "stock":
            row["int8"] = {"metrics": {"accuracy": STOCK[row["seed"]] - 0.01}, "time / float32": 0.4}
    page = write_page(tmp_path, quality_news={"recipe": "recipes/news.yaml", "rows": rows})
    values = [np.array([*STOCK.values()]) - 0.01, [*STOCK.values()]]
    said = "{}, against {} in float32, at 0.400 ± 0.000 of the time at batch 1".format(*map(shown, values))
    assert said in page


def test_one_seed_is_shown_as_one_seed(tmp_path):
    rows = [row for row in quality_rows() if row["seed"] == 1]
    page = write_page(tmp_path, gpu_quality_news={"recipe": "recipes/news.yaml", "rows": rows})
    assert cells(page, "joint")[0][1:] == ["1.00", "0.600", "0.900", "0.700", "0.800", "0.800", "0 of 1"]
    assert cells(page, "cut-2")[0][1:4] == ["0.50", "", "0.750"]
    assert "One seed" in page and "beats" not in page and "±" not in page.split("## Whole")[1]


def test_cells_run_side_by_side_within_their_time(tmp_path):
    """What breaks: a benchmark that takes its cells one by one, stops at the first that fails, or does not end."""
    meet = "import pathlib, sys, time\nmine, other = map(pathlib.Path, sys.argv[1:])\nmine.touch()\n"
    meet += "while not other.exists(): time.sleep(0.01)\nprint('met')"
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    commands = {
        "a": [sys.executable, "-c", meet, a, b],
        "b": [sys.executable, "-c", meet, b, a],
        "broken": [sys.executable, "-c", "raise SystemExit(3)"],
    }
    done = []
    failed = side_by_side(commands, 2, 60, tmp_path / "logs", done.append)
    assert sorted(done) == ["a", "b"] and (tmp_path / "logs" / "a.log").read_text() == "met\n"
    assert list(failed) == ["broken"] and "exit status 3" in failed["broken"]
    endless = {name: [sys.executable, "-c", "import time; time.sleep(600)"] for name in "cd"}
    failed = side_by_side(endless, 1, 0.5, tmp_path / "logs", done.append)
    assert failed == {"c": "the time is over", "d": "the time is over"} and sorted(done) == ["a", "b"]


def test_options_that_were_tried_stand_beside_joint(tmp_path):
    """What breaks: an option that is built, or left out, by a difference of other seeds or rows than its own."""
    random, rows = np.random.default_rng(0), []
    for option, seeds in (("joint", (1, 2, 3)), ("distill", (2, 3)), ("stock", (2,))):
        for seed in seeds:
            places = ("last",) if option == "stock" else ("0.25", "0.5", "0.75", "last")
            right = {place: pack_bits(random.random(50) < 0.7) for place in places}
            row = {"data": "news", "option": option, "seed": seed, "num_rows": 50, "exits": [0.5, 0.7], "right": right}
            rows.append({**row, "command": f"python benchmarks/screen.py {option}", "machine": MACHINE})
    page = write_page(tmp_path, screen={"rows": rows})
    lines = {line[1]: line for line in cells(page, "news")}
    bits = {
        option: np.array(
            [unpack_bits(row["right"]["0.5"], 50) for row in rows if (row["option"], row["seed"]) in wanted]
        )
        for option, wanted in (
            ("joint", [("joint", 2), ("joint", 3)]),
            ("distill", [("distill", 2), ("distill", 3)]),
        )
    }
    mean = bits["distill"].mean() - bits["joint"].mean()
    assert lines["distill"][2:4] == ["2", "0.500 0.700"] and lines["distill"][5].startswith(f"{mean:+.3f} [")
    assert lines["stock"][4:7] == ["", "", ""] and "[" in lines["stock"][7]
    assert "[" not in "".join(lines["joint"]) and "screen.py distill\n" in page


def test_gpu_quality_says_how_it_is_called(tmp_path):
    """What breaks: a command line that the script reads otherwise than it says, or runs that start without data."""
    script = str(ROOT / "benchmarks" / "gpu_quality.sh")
    done = subprocess.run(["bash", script], capture_output=True, text=True)
    assert done.returncode == 2 and "gpu_quality.sh RESULTS DATA [FLAGS]" in done.stderr
    done = subprocess.run(["bash", script, str(tmp_path / "results"), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0 and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_gpu_quality_goes_on_where_it_was_stopped(tmp_path, minilm_path):
    """What breaks: a machine that is lent for an hour, and cells that run again or are lost."""
    data, results = tmp_path / "data", tmp_path / "results"
    write_task(data, "sst2")
    (data / "minilm").symlink_to(minilm_path)
    command = ["bash", str(ROOT / "benchmarks" / "gpu_quality.sh"), str(results), str(data)]
    command += ["--use_cpu", "--bf16", "false", "--max_train_samples", "16", "--max_eval_samples", "16"]
    settings = {**os.environ, "PYTHON": sys.executable, "JOBS": "2", "SEEDS": "1", "METHODS": "joint stock"}
    first = subprocess.run(command, cwd=ROOT, env={**settings, "LIMIT": "1"}, capture_output=True, text=True)
    assert first.returncode == 1 and "give the same command again" in first.stderr
    done = subprocess.run(command, cwd=ROOT, env={**settings, "LIMIT": "300"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((results / "quality_sst2_whole.json").read_text())["rows"]
    assert sorted(row["method"] for row in rows) == ["cut-2", "cut-3", "joint", "stock", "student-3"]


def test_source_is_the_recorded_one(page):
    """What breaks: a reader who repeats a run does another one."""
    assert "\npython run_glue_een.py recipes/news.yaml --seed 1 --method joint\n" in page
    assert "seeds 1, 2," in page and "abacus, 2 cores, threads: 1; torch 2.0, transformers 5.0" in page


def test_check_compares_and_writes_nothing(tmp_path):
    text = write_page(tmp_path, quality_news={"recipe": "recipes/news.yaml", "rows": quality_rows()})
    page, plot = tmp_path / "README.md", tmp_path / "plots" / "quality_news.png"
    assert plot.stat().st_size > 5000
    plot.unlink()
    run_page("--check", "--folder", tmp_path)
    page.write_text(text.replace("0.720", "0.990"))
    with pytest.raises(SystemExit, match="not up to date"):
        run_page("--check", "--folder", tmp_path)
    assert not plot.exists() and "0.990" in page.read_text()


MEASURED = {"median_ms": 2.0, "quartile_1_ms": 1.5, "quartile_3_ms": 2.5, "repeats": 5}


@pytest.mark.parametrize(
    ("device", "single", "batch"),
    [
        ("abacus", ["≤ 1.06: met", "≤ 1.03: missed"], "≥ 0.97: missed"),
        ("NVIDIA abacus", ["≤ 1.10: met", "≤ 1.10: met"], "≥ 0.85: met"),
    ],
)
def test_targets_of_inference_are_those_of_the_device(tmp_path, device, single, batch):
    times = {name: MEASURED for name in ("dynamic", "cut")}
    rows = [{"what": "batch 1", "length": n, "exit": 1, "layer": 1, **times} for n in (16, 128)]
    for row in rows:
        row |= {"dynamic / cut stock model": 1.05, "undecided / cut stock model": 1.02}
    shares = {"mean share of rows": 0.5, "dynamic / stock": 0.6, "all exits / stock": 1.1}
    rows.append({"what": "batch", "batch_size": 8, "length": 128, "ideal / dynamic": 0.9, **shares, **times})
    data = {"command": "python benchmarks/inference.py", "machine": {**MACHINE, "device": device}, "rows": rows}
    page = write_page(tmp_path, inference_tiny=data)
    assert [cells(page, f"{n} tokens")[0][3:6] for n in (16, 128)] == [["1.050", "1.020", text] for text in single]
    assert cells(page, "8")[0][2] == batch
    assert (tmp_path / "plots" / "inference_tiny.png").exists()


def test_targets_of_training_are_against_the_named_scheme(tmp_path):
    rows = [
        {
            "scheme": scheme,
            "batch_size": 16,
            "time / plain fine-tuning": plain,
            "time / joint": joint,
            "memory / plain fine-tuning": 1.0,
            "memory / joint": memory,
            "step": MEASURED,
        }
        for scheme, plain, joint, memory in (("boosted", 1.06, 1.0, 1.0), ("l2w, interval 1", 4.2, 3.9, 1.7))
    ]
    data = {"command": "python benchmarks/training_step.py", "machine": MACHINE, "rows": rows}
    page = write_page(tmp_path, training_step_tiny=data)
    assert cells(page, "boosted")[0][6] == "time / plain fine-tuning ≤ 1.05: missed"
    assert cells(page, "l2w, interval 1")[0][6] == "time / joint ≤ 4.00: met; memory / joint ≤ 1.60: missed"


def test_targets_of_partition(tmp_path):
    """What breaks: milliseconds that are taken for seconds, or a target that was missed and is not called so."""
    rows = []
    for name, seconds, memory in (("parquet", 61, 1.5), ("npz", 59, 2.5)):
        times = {"wall": {**MEASURED, "median_ms": 1000.0 * seconds}, "cpu": {**MEASURED, "median_ms": 20_000.0}}
        rows.append({"format": name, "parts": 1000, "rows": 50000, "peak memory (GiB)": memory, **times})
    data = {"command": "python benchmarks/partition.py", "machine": MACHINE, "rows": rows}
    page = write_page(tmp_path, partition=data)
    assert cells(page, "parquet")[0][3:5] == ["61.0", "≤ 60.00: missed"]
    assert cells(page, "npz")[0][3:] == ["59.0", "≤ 60.00: met", "0.0 to 0.0", "20.0", "2.50", "≤ 2.00: missed"]
