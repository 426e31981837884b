"""Callbacks: a table of exits at each evaluation, curves in the run's folder, wandb and TensorBoard.

`EarlyExitTrainer` adds the first two and replaces the stock callbacks of wandb and TensorBoard by ours.
In addition to the Trainer's events, these callbacks have `on_exit_results(args, state, control, results)`, which gets
the final table of exits, budgets and policy, as in exit_results.json.
"""

import json
import os
import re
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

import numpy as np
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, WandbCallback
from transformers.utils import logging

from ..extras import named_extras


with named_extras():
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.image import imread
    from matplotlib.ticker import MaxNLocator

    from ..evaluation.plots import literal


logger = logging.get_logger(__name__)

HISTORY_NAME = "training_curves"
_MARKERS = "os^DvP*Xp<>h"
_EXIT_METRIC = re.compile(r"(?:(?P<split>.+)_)?exit(?P<exit>\d+)_(?P<name>.+)")


def metrics_by_exit(logs: dict[str, float], prefix: str) -> dict[int, dict[str, float]]:
    """`{prefix}_exit{k}_{name}` (or `exit{k}_{name}` where the prefix is empty) as {k: {name: value}}."""
    found = {}
    for key, value in logs.items():
        match = _EXIT_METRIC.fullmatch(key)
        if match and (match["split"] or "") == prefix:
            found.setdefault(int(match["exit"]), {})[match["name"]] = value
    return found


def samplers_of(dataloader) -> Iterator:
    """The batch sampler of a data loader, whatever it wraps, and at the end the sampler of rows."""
    part = dataloader.batch_sampler
    while part is not None:
        yield part
        part = getattr(part, "batch_sampler", getattr(part, "sampler", None))


class EpochCallback(TrainerCallback):
    """Tell training rows and samplers which epoch it is.

    accelerate leaves out the rows in the epoch in which a run resumes, and with several processes the sampler below
    the wrapper that skips the batches of before.
    """

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        for part in (train_dataloader.dataset, *samplers_of(train_dataloader)):
            if hasattr(part, "set_epoch"):
                part.set_epoch(int(state.epoch))


class ExitTableCallback(TrainerCallback):
    """Print a line per exit at each evaluation during training."""

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        exits = metrics_by_exit(metrics or {}, "eval")
        if not state.is_world_process_zero or not exits:
            return
        names = list(next(iter(exits.values())))
        print("\t".join([f"step {state.global_step}", *names]))
        for k, values in exits.items():
            print("\t".join([f"exit {k}", *(f"{values[name]:.4f}" for name in names)]), flush=True)


class ExitHistoryCallback(TrainerCallback):
    """Write every exit's curves over training into the run's folder: training_curves.json and training_curves.png."""

    def on_train_end(self, args, state, control, **kwargs):
        curves = exit_curves(state.log_history)
        if not state.is_world_process_zero or not curves:
            return
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{HISTORY_NAME}.json").write_text(json.dumps(curves, indent=1) + "\n")
        plot_history(curves, folder / f"{HISTORY_NAME}.png")


def exit_curves(log_history: list[dict]) -> dict[str, dict[str, list]]:
    """{`train_loss`, `eval_loss`, `eval_<metric>`, ...: {`step`: [..], `exit 1`: [..], ..}} of a trainer's log."""
    curves = {}
    for logs in log_history:
        for split in ("", "eval"):
            exits = metrics_by_exit(logs, split)
            for name in dict.fromkeys(name for values in exits.values() for name in values):
                curve = curves.setdefault(f"{split or 'train'}_{name}", {"step": []})
                curve["step"].append(logs["step"])
                for k, values in exits.items():
                    curve.setdefault(f"exit {k}", []).append(values.get(name))
    return curves


def plot_history(curves: dict[str, dict[str, list]], path: str | os.PathLike) -> Figure:
    """Draw one picture per curve of `exit_curves`, a line per exit with a colour and a marker of its own."""
    figure = Figure(figsize=(4.5 * len(curves), 3.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, curve) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        exits = [column for column in curve if column != "step"]
        colours = colormaps["turbo"](np.linspace(0.05, 0.95, len(exits)))
        for column, colour, marker in zip(exits, colours, cycle(_MARKERS), strict=False):
            axes.plot(curve["step"], curve[column], marker=marker, markersize=4, color=colour, label=column)
        axes.set(title=literal(name.replace("_", " ")), xlabel="step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize="small")
    figure.savefig(path, format="png")
    return figure


def _result_rows(results: dict) -> dict[str, list[dict]]:
    """The final tables as flat rows: `exits`, `budgets` and, where there is a policy, `policy`."""
    policy = results["policy"]
    shares = policy["exit_fractions"] if policy else [None] * len(results["anytime"])
    thresholds = policy["thresholds"] if policy else shares
    exits = [
        {name: row[name] for name in ("exit", "layer", "relative_cost", "loss", "ece")}
        | row["metrics"]
        | {"share_leaving": share, "threshold": threshold}
        for row, share, threshold in zip(results["anytime"], shares, thresholds, strict=True)
    ]
    budgets = [
        {"target_cost": row["target_cost"], "relative_cost": row["relative_cost"], **row["metrics"]}
        | {f"share_exit{k}": share for k, share in enumerate(row["exit_fractions"], 1)}
        for row in results["budgeted"]
    ]
    return {"exits": exits, **({"budgets": budgets} if budgets else {})}


def _pictures(folder: str) -> list[Path]:
    """Of a run: the curves of its exits and, of l2w, weights against losses."""
    return [path for name in ("exit_curves", "l2w_weights") if (path := Path(folder, f"{name}.png")).exists()]


def _policy_scalars(results: dict) -> dict[str, float]:
    policy = results["policy"]
    if not policy:
        return {}
    return {"policy/relative_cost": policy["relative_cost"]} | {
        f"policy/{name}": value for name, value in policy["metrics"].items()
    }


class EarlyExitWandbCallback(WandbCallback):
    """The stock callback, with exits: final tables, the budgeted curve, shares, thresholds and pictures.

    Curves have the same names in every scheme (`train/exit1_loss`, `eval/exit1_accuracy`, ...), so that one panel
    overlays them. Runs go to the project `WANDB_PROJECT`, or else `args.project` (the scripts put data set and
    partition there), under the name `args.run_name`, or else scheme and seed. `WANDB_MODE=offline` needs no account.
    """

    def setup(self, args, state, model=None, **kwargs):
        if state.is_world_process_zero and self._wandb.run is None and state.trial_name is None:
            name = args.run_name or f"{getattr(args, 'method', None) or 'run'}-seed{args.seed}"
            # Of itself wandb records the command line with its tokens, the console, and folders of this machine.
            settings = self._wandb.Settings(x_disable_meta=True, console=os.getenv("WANDB_CONSOLE", "off"))
            self._wandb.init(project=os.getenv("WANDB_PROJECT") or args.project, name=name, settings=settings)
        super().setup(args, state, model, **kwargs)

    def on_exit_results(self, args, state, control, results=None, **kwargs):
        if not state.is_world_process_zero:
            return
        if not self._initialized:
            self.setup(args, state, **kwargs)
        wandb, content = self._wandb, dict(_policy_scalars(results))
        for name, rows in _result_rows(results).items():
            columns = list(rows[0])
            table = wandb.Table(columns=columns, data=[[row[column] for column in columns] for row in rows])
            content[f"results/{name}"] = table
            if name == "budgets":
                title = f"{results['metric']} against relative cost"
                content["results/budgeted_curve"] = wandb.plot.line(
                    table, "relative_cost", results["metric"], title=title
                )
        for path in _pictures(args.output_dir):
            content[f"results/{path.stem}"] = wandb.Image(str(path))
        wandb.log({**content, "train/global_step": state.global_step})


class EarlyExitTensorBoardCallback(TensorBoardCallback):
    """The stock callback, with exits: the final tables as text, the policy's figures and the pictures."""

    def on_exit_results(self, args, state, control, results=None, **kwargs):
        if not state.is_world_process_zero:
            return
        if self.tb_writer is None:
            self.logging_dir = self.logging_dir or os.path.join(args.output_dir, "tensorboard")
            self._init_summary_writer(args)
        step = state.global_step
        for name, value in _policy_scalars(results).items():
            self.tb_writer.add_scalar(name, value, step)
        for name, rows in _result_rows(results).items():
            head = [f"|{'|'.join(rows[0])}|", "|" + "---|" * len(rows[0])]
            body = ["|" + "|".join("" if v is None else f"{v:.4g}" for v in row.values()) + "|" for row in rows]
            self.tb_writer.add_text(f"results/{name}", "\n".join(head + body), step)
        for path in _pictures(args.output_dir):
            self.tb_writer.add_image(f"results/{path.stem}", imread(path), step, dataformats="HWC")
        self.tb_writer.flush()


def use_early_exit_callbacks(trainer) -> None:
    """Add the table and the curves, and put ours in the place of a tracker's stock callback: never two of a kind."""
    for own in (EpochCallback, ExitTableCallback, ExitHistoryCallback):
        trainer.add_callback(own)
    present = [type(callback) for callback in trainer.callback_handler.callbacks]
    for stock, own in ((WandbCallback, EarlyExitWandbCallback), (TensorBoardCallback, EarlyExitTensorBoardCallback)):
        if stock in present:
            trainer.remove_callback(stock)
            if own not in present:
                trainer.add_callback(own)
