"""Callbacks: a table of exits at each evaluation, curves in the run's folder, wandb and TensorBoard.

`EarlyExitTrainer` adds the first two, and replaces the stock callbacks of wandb and TensorBoard by those below. They
have one more event, `on_exit_results(args, state, control, results)`, which receives the final table of exits, budgets
and policy, as in exit_results.json.
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
    from matplotlib.figure import Figure
    from matplotlib.image import imread
    from matplotlib.ticker import MaxNLocator

    from ..evaluation.plots import literal


logger = logging.get_logger(__name__)

HISTORY_NAME = "training_curves"
_MARKERS = "os^DvP*Xp<>h"
_EXIT_METRIC = re.compile(r"(?:(?P<split>.+)_)?exit(?P<exit>\d+)_(?P<name>.+)")


def metrics_by_exit(logs: dict[str, float], prefix: str) -> dict[int, dict[str, float]]:
    """Group logged metrics by exit.

    Args:
        logs: metrics by name; those named `{prefix}_exit{k}_{name}` are used, or `exit{k}_{name}` without a prefix.
        prefix: for example `eval`, or an empty text.

    Returns:
        for each exit k its metrics by name.
    """
    found = {}
    for key, value in logs.items():
        match = _EXIT_METRIC.fullmatch(key)
        if match and (match["split"] or "") == prefix:
            found.setdefault(int(match["exit"]), {})[match["name"]] = value
    return found


def samplers_of(dataloader) -> Iterator:
    """The samplers of a data loader.

    Args:
        dataloader: the data loader.

    Yields:
        its batch sampler, then the samplers that this one wraps, the sampler of rows last.
    """
    part = dataloader.batch_sampler
    while part is not None:
        yield part
        part = getattr(part, "batch_sampler", getattr(part, "sampler", None))


def set_epoch(dataloader, epoch: int) -> None:
    """Call `set_epoch` of a data loader, its rows and its samplers.

    Args:
        dataloader: the data loader.
        epoch: number of the epoch, from 0.
    """
    for part in (dataloader, dataloader.dataset, *samplers_of(dataloader)):
        if hasattr(part, "set_epoch"):
            part.set_epoch(epoch)


class EpochCallback(TrainerCallback):
    """Calls `set_epoch` of the training rows and samplers at the beginning of each epoch.

    accelerate does not call it for the rows in the epoch in which a run resumes, nor, with several processes, for the
    sampler inside the wrapper that skips the batches before.
    """

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        set_epoch(train_dataloader, int(state.epoch))


class ExitTableCallback(TrainerCallback):
    """Prints one line per exit at each evaluation during training."""

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        exits = metrics_by_exit(metrics or {}, "eval")
        if not state.is_world_process_zero or not exits:
            return
        names = list(next(iter(exits.values())))
        print("\t".join([f"step {state.global_step}", *names]))
        for k, values in exits.items():
            print("\t".join([f"exit {k}", *(f"{values[name]:.4f}" for name in names)]), flush=True)


class ExitHistoryCallback(TrainerCallback):
    """Writes the training curves of every exit into the run's folder: training_curves.json and training_curves.png."""

    def on_train_end(self, args, state, control, **kwargs):
        curves = exit_curves(state.log_history)
        if not state.is_world_process_zero or not curves:
            return
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{HISTORY_NAME}.json").write_text(json.dumps(curves, indent=1) + "\n")
        plot_history(curves, folder / f"{HISTORY_NAME}.png")


def exit_curves(log_history: list[dict]) -> dict[str, dict[str, list]]:
    """Collect the curves of all exits from a trainer's log.

    Args:
        log_history: `trainer.state.log_history`.

    Returns:
        by `train_loss`, `eval_loss`, `eval_<metric>`, ...: a dict of columns `step`, `exit 1`, `exit 2`, ...; `None`
        where an exit was not trained (warm start).
    """
    points = {}
    for logs in log_history:
        for split in ("", "eval"):
            exits = metrics_by_exit(logs, split)
            for name in dict.fromkeys(name for values in exits.values() for name in values):
                found = {k: values.get(name) for k, values in exits.items()}
                points.setdefault(f"{split or 'train'}_{name}", []).append((logs["step"], found))
    curves = {}
    for name, curve in points.items():
        exits = sorted({k for _, found in curve for k in found})
        columns = {f"exit {k}": [found.get(k) for _, found in curve] for k in exits}
        curves[name] = {"step": [step for step, _ in curve], **columns}
    return curves


def plot_history(curves: dict[str, dict[str, list]], path: str | os.PathLike) -> Figure:
    """Plot curves into a PNG file, one plot per metric, with one line per exit.

    Args:
        curves: as `exit_curves` returns them.
        path: the PNG file.

    Returns:
        the figure.
    """
    figure = Figure(figsize=(4.5 * len(curves), 3.6), dpi=120, layout="constrained")
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
    """The final tables as flat rows: `exits` and, if there are any, `budgets`."""
    policy = results["policy"]
    shares = policy["exit_fractions"] if policy else [None] * len(results["anytime"])
    thresholds = policy["thresholds"] if policy else shares
    exits = [
        {name: row[name] for name in ("exit", "layer", "relative_cost", "loss", "ece")}
        | row["metrics"]
        | {"share_exiting": share, "threshold": threshold}
        for row, share, threshold in zip(results["anytime"], shares, thresholds, strict=True)
    ]
    budgets = [
        {"target_cost": row["target_cost"], "relative_cost": row["relative_cost"], **row["metrics"]}
        | {f"share_exit{k}": share for k, share in enumerate(row["exit_fractions"], 1)}
        for row in results["budgeted"]
    ]
    return {"exits": exits, **({"budgets": budgets} if budgets else {})}


def _pictures(folder: str) -> list[Path]:
    """The plots of a run: the curves of its exits and, for l2w, weights against losses."""
    return [path for name in ("exit_curves", "l2w_weights") if (path := Path(folder, f"{name}.png")).exists()]


def _policy_scalars(results: dict) -> dict[str, float]:
    policy = results["policy"]
    if not policy:
        return {}
    return {"policy/relative_cost": policy["relative_cost"]} | {
        f"policy/{name}": value for name, value in policy["metrics"].items()
    }


class EarlyExitWandbCallback(WandbCallback):
    """The stock callback, and the results of exits: final tables, curve of budgets, shares, thresholds and plots.

    Curves have the same names in every scheme (`train/exit1_loss`, `eval/exit1_accuracy`, ...), so that one panel can
    show several schemes. The project is `WANDB_PROJECT`, or `args.project` (which the scripts set to data set and
    partition). The name of the run is `args.run_name`, or scheme and seed. `WANDB_MODE=offline` needs no account.
    """

    def setup(self, args, state, model=None, **kwargs):
        if state.is_world_process_zero and self._wandb.run is None and state.trial_name is None:
            name = args.run_name or f"{getattr(args, 'method', None) or 'run'}-seed{args.seed}"
            # By default wandb records the command line with its tokens, the console, and folders of this machine.
            settings = self._wandb.Settings(x_disable_meta=True, console=os.getenv("WANDB_CONSOLE", "off"))
            self._wandb.init(project=os.getenv("WANDB_PROJECT") or args.project, name=name, settings=settings)
        super().setup(args, state, model, **kwargs)

    def on_exit_results(self, args, state, control, results=None, **kwargs):
        """Log the final results.

        Args:
            args, state, control: as for the events of `TrainerCallback`.
            results: exits, budgets and policy, as in exit_results.json.
            **kwargs: as for the events of `TrainerCallback`.
        """
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
    """The stock callback, and the results of exits: final tables as text, numbers of the policy, and plots."""

    def on_exit_results(self, args, state, control, results=None, **kwargs):
        """As in `EarlyExitWandbCallback`."""
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
    """Add the callbacks of this module to a trainer, and replace the stock callbacks of trackers.

    Args:
        trainer: the trainer.
    """
    for own in (EpochCallback, ExitTableCallback, ExitHistoryCallback):
        trainer.add_callback(own)
    present = [type(callback) for callback in trainer.callback_handler.callbacks]
    for stock, own in ((WandbCallback, EarlyExitWandbCallback), (TensorBoardCallback, EarlyExitTensorBoardCallback)):
        if stock in present:
            trainer.remove_callback(stock)
            if own not in present:
                trainer.add_callback(own)
