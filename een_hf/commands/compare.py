"""Compare runs: one table and, with --output, one plot.

een-hf compare runs/joint runs/boosted runs/l2w --output compare.png

All numbers are measured on the rows that were not used for calibration. "at 50 %" is the metric under the largest
budget that is at most half of the plain model's cost. "area" is the mean of the metric over all budgets, from the
smallest one that every run has up to 1.

A run with one exit is a baseline: plain fine-tuning (--exit_layers names the last layer), or a smaller model. Its cost
is the number of its operations divided by that of the plain model of the first run with several exits. In the table it
has a score at budgets from this cost, and in the plot it is a point.
"""

from ..evaluation import compare


def add_arguments(parser) -> None:
    parser.add_argument("runs", metavar="RUN", nargs="+", help="Output folders of runs, or their exit_results.json.")
    parser.add_argument("--output", metavar="PNG", help="File for a plot of the curves.")


def run(args) -> None:
    print(compare(args.runs, args.output).table)
    if args.output is not None:
        print(f"Plot: {args.output}")
