"""The choice of the rows that certify a policy, and the certification."""

from dataclasses import replace

import numpy as np

from ..calibration import CalibrationReport, calibrate, rows_needed
from ..data.task import DataError
from ..evaluation import ExitCosts
from .arguments import RetrofitArguments


def certifying_rows(num_rows: int, args: RetrofitArguments) -> np.ndarray:
    """Choose the rows that certify; the others train the exits.

    Args:
        num_rows: number of all rows.
        args: risk, confidence, share and seed.

    Returns:
        0-based numbers of the rows that certify, sorted.

    Raises:
        DataError: too few rows to train exits and to certify the risk.
    """
    _, needed = rows_needed(args.max_risk, args.risk_confidence)
    share = args.calibration_share or 1 / 3
    wanted = round(share * num_rows) if args.calibration_share else max(round(share * num_rows), needed)
    if wanted < needed or num_rows - wanted < args.train_batch_size:
        raise DataError(
            f"{num_rows} rows are too few: --max_risk {args.max_risk:g} with --risk_confidence "
            f"{args.risk_confidence:g} needs at least {needed} rows that certify, and at least "
            f"{args.train_batch_size} rows that train exits (--train_batch_size). Give more rows, a larger "
            "--max_risk, or a lower --risk_confidence"
            + (", or another --calibration_share." if args.calibration_share else ".")
        )
    return np.sort(np.random.default_rng(args.seed).permutation(num_rows)[:wanted])


def certify(exit_logits: np.ndarray, costs: ExitCosts, args: RetrofitArguments) -> CalibrationReport:
    """The cheapest policy whose answers differ from the last exit's on at most `args.max_risk` of new rows.

    Args:
        exit_logits: (num_rows, num_exits, num_labels), of rows that the exits were not trained on.
        costs: relative costs of the exits.
        args: risk, confidence, criterion and seed.

    Returns:
        the policy and its results on these rows.
    """
    report = calibrate(
        exit_logits,
        None,
        costs,
        criterion=args.exit_criterion,
        max_risk=args.max_risk,
        risk=args.risk,
        risk_confidence=args.risk_confidence,
        seed=args.seed,
    )
    if report.policy is not None and report.relative_cost >= 1:
        message = (
            f"No early exit: the policy that could be certified costs {report.relative_cost:.3f} of your model's cost."
        )
        report = replace(report, policy=None, message=message)
    return report
