"""Checks of a run before any work, and the checkpoint from which it starts."""

from transformers.integrations import get_available_reporting_integrations
from transformers.utils import logging

from ..calibration import check_risk, rows_in_words, rows_needed
from ..data.task import Modality
from ..models import ExitConfigurationError
from ..training.checkpoints import last_whole_checkpoint
from ..training.history import RUN_FILE, read_run
from .arguments import RunArguments
from .costs import fitting_criterion
from .model import LoadedModel
from .rows import RunRows


logger = logging.get_logger(__name__)


def check_flags(modality: Modality, args: RunArguments) -> None:
    """Raise ExitConfigurationError for flags that have no effect together, or exclude each other."""
    training, wanted = args.training, args.calibration
    if not (training.do_train or training.do_eval or training.do_predict):
        raise ExitConfigurationError("Nothing to do: give --do_train, --do_eval or --do_predict.")
    trackers = get_available_reporting_integrations()
    for tracker in training.report_to:
        if tracker not in trackers:
            raise ExitConfigurationError(
                f"--report_to {tracker} is not installed, or unknown to transformers; installed here: "
                f"{', '.join(sorted(trackers)) or 'none'}. The extras wandb and tensorboard install these two."
            )
    if wanted.measure_speed and modality.main_input_name != "input_ids":
        raise ExitConfigurationError("--measure_speed is for text; benchmarks/inference.py times images.")
    if wanted.measure_speed and not training.do_eval:
        raise ExitConfigurationError("--measure_speed times the evaluation rows: add --do_eval.")
    if not args.data.streaming:
        return
    if training.do_train and training.max_steps <= 0:
        raise ExitConfigurationError("--streaming needs --max_steps: a stream has no length.")
    for flag, value in (
        ("train_val_split", args.data.train_val_split),
        ("calibration_samples", wanted.calibration_samples),
    ):
        if value is not None:
            raise ExitConfigurationError(f"--{flag} needs all training rows in memory: leave --streaming out.")


def find_start(args: RunArguments) -> str | None:
    """Find the checkpoint to resume from.

    If a run ended before its first checkpoint, its folder may be used again.

    Args:
        args: flags of the run.

    Returns:
        the folder of the checkpoint; `None`: start from the beginning.

    Raises:
        ExitConfigurationError: the folder belongs to a finished run, to a run with other settings, or to neither.
    """
    folder = args.folder
    if not args.training.do_train:
        return None
    checkpoint, last = args.training.resume_from_checkpoint, last_whole_checkpoint(folder)
    before = read_run(folder) if (folder / RUN_FILE).exists() else None
    if last is None and not (folder / "config.json").exists() and not (before and before["finished"]):
        return checkpoint
    if before is None:
        raise ExitConfigurationError(
            f"--output_dir {folder} contains a model or checkpoints of another origin: give another --output_dir."
        )
    now = args.settings()
    names = [name for name in now if before["settings"].get(name, now[name]) != now[name]]
    if names:
        changes = ", ".join(f"--{n} was {before['settings'][n]!r}, is {now[n]!r}" for n in names)
        raise ExitConfigurationError(
            f"--output_dir {folder} contains a run with other arguments ({changes}): give another --output_dir, "
            "or remove that folder."
        )
    if before["finished"]:
        raise ExitConfigurationError(
            f"--output_dir {folder} contains a finished run: give another --output_dir, or remove that folder to "
            "train again."
        )
    return checkpoint or last


def check_calibration(args: RunArguments, loaded: LoadedModel, rows: RunRows, chosen_by: str | None) -> None:
    """Check before training that calibration will be possible; warn if the risk cannot be certified.

    Args:
        args: flags of the run.
        loaded: its model.
        rows: its rows.
        chosen_by: what else is chosen on the calibration rows (`rows_chose`).

    Raises:
        ExitConfigurationError: calibration will not be possible.
    """
    wanted, asked = args.calibration, args.asks_for_policy
    if asked and not args.training.do_eval:
        raise ExitConfigurationError("--target_cost and --max_risk calibrate on evaluated rows: add --do_eval.")
    if not args.training.do_eval:
        return
    if rows.calibration is None and len(rows.splits["validation"]) < 2:
        raise ExitConfigurationError(
            "Half of the evaluation rows is used for calibration, but there is only one row: give more, or "
            "--calibration_file."
        )
    kept = loaded.model.config.exit_policy is not None and not args.training.do_train
    if wanted.measure_speed and not (asked or kept):
        raise ExitConfigurationError("--measure_speed times a policy: add --target_cost or --max_risk.")
    fitting_criterion(wanted.exit_criterion, rows.data.problem_type, required=asked)
    if wanted.max_risk is None:
        return
    labelled = rows.calibration is None or "labels" in rows.calibration.column_names
    check_risk(wanted.risk and wanted.risk.value, rows.data.problem_type, labelled)
    _warn_of_few_rows(wanted.max_risk, wanted.risk_confidence, rows)
    if chosen_by is not None:
        logger.warning(
            f"There will be no guarantee for --max_risk, because the calibration rows also chose {chosen_by}. Give "
            "other rows: --calibration_file."
        )


def _warn_of_few_rows(max_risk: float, confidence: float, rows: RunRows) -> None:
    _, needed = rows_needed(max_risk, confidence)
    found = len(rows.splits["validation"]) // 2 if rows.calibration is None else len(rows.calibration)
    if found < needed:
        logger.warning(
            f"No early exit will be certified: --max_risk {max_risk:g} with --risk_confidence {confidence:g} takes at "
            f"least {needed} calibration rows; {rows_in_words(found)}. Give more, or a larger --max_risk."
        )
