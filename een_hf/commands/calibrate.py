"""Choose an exit policy from the logits that a run saved; the model is not run.

een-hf calibrate runs/mine --target_cost 0.4          shows what a budget gives
een-hf calibrate runs/mine --target_cost 0.4 --save   writes it into the saved model

The same flags give the same policy as in the training run: the rows that calibrated there calibrate here, and the
others measure it. A certified risk (--max_risk) holds for one choice of flags made beforehand, not for the best of
several tries on the same rows.
"""

from ..evaluation import format_exit_table
from ..hub import guarantee_in_words
from ..runs.recalibrate import calibrate_run
from ..training.arguments import CalibrationArguments
from .flags import add_flags


def add_arguments(parser) -> None:
    parser.add_argument("run", metavar="RUN", help="output folder of a training run with --do_eval")
    names = ("target_cost", "max_risk", "risk", "risk_confidence", "exit_criterion")
    add_flags(parser, CalibrationArguments, names, exit_criterion=None)
    parser.add_argument("--seed", type=int, help="parts searching from certifying rows; default: the run's")
    parser.add_argument(
        "--save", action="store_true", help="write the policy into RUN: config, results, plot and card"
    )


def run(args) -> None:
    found = calibrate_run(**vars(args))
    policy = found.report.policy
    print(f"Calibration: {found.report.message}")
    if policy is None:
        print(f"Nothing to save: {args.run} stays as it is.")
        return
    print(format_exit_table(found.results))
    print(f"thresholds: {', '.join(f'{threshold:.4g}' for threshold in policy.thresholds[:-1])}")
    if policy.guarantee:
        print(guarantee_in_words(policy.guarantee))
    if args.save:
        print(
            f"Saved in {args.run}: config.json, exit_results.json, exit_curves.png and README.md. The loaded model "
            "exits by it."
        )
    else:
        print(f"Not saved: --save writes this policy into {args.run}.")
