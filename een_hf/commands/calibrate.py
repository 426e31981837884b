"""Choose an exit policy from the saved logits of a run, without running the model.

een-hf calibrate runs/mine --target_cost 0.4          shows the policy of a budget and its results
een-hf calibrate runs/mine --target_cost 0.4 --save   writes it into the saved model

The same flags give the same policy as in the training run: the same rows are used for calibration, and the others
measure the policy. A certified risk (--max_risk) is valid only for flags that are chosen before looking at these rows,
not for the best of several attempts.
"""

from ..evaluation import format_exit_table
from ..hub import guarantee_in_words
from ..hub.sections import thresholds_in_words
from ..runs.recalibrate import calibrate_run
from ..training.arguments import CalibrationArguments
from .flags import add_flags


def add_arguments(parser) -> None:
    parser.add_argument("run", metavar="RUN", help="Output folder of a training run with --do_eval.")
    names = ("target_cost", "max_risk", "risk", "risk_confidence", "exit_criterion")
    add_flags(parser, CalibrationArguments, names, exit_criterion=None)
    parser.add_argument(
        "--seed", type=int, help="Seed of the choice of the rows that certify a risk. Default: the run's."
    )
    parser.add_argument(
        "--save", action="store_true", help="Write the policy into RUN: config, results, plot and card."
    )


def run(args) -> None:
    found = calibrate_run(**vars(args))
    policy = found.report.policy
    print(f"Calibration: {found.report.message}")
    if policy is None:
        print(f"There is nothing to save: {args.run} is not changed.")
        return
    print(format_exit_table(found.results))
    print(f"thresholds by exit: {thresholds_in_words(policy.thresholds)}")
    if policy.guarantee:
        print(guarantee_in_words(policy.guarantee))
    if args.save:
        print(
            f"Saved in {args.run}: config.json, exit_results.json, exit_curves.png and README.md. The model uses this "
            "policy when it is loaded."
        )
    else:
        print(f"Not saved: --save writes this policy into {args.run}.")
