"""Set runs side by side: one table and, with --output, one plot.

een-hf compare runs/joint runs/boosted runs/l2w --output compare.png

All numbers are measured on the rows that calibrated nothing. "at 50 %": under the largest budget that is at most half
of the plain model's cost. "area": the mean of that over the budgets from where every run can answer up to 1.

A run with one exit is a baseline: plain fine-tuning (--exit_layers names the last layer), or that of a smaller model.
It has one cost, its operations over those of the plain model of the first run with several exits; from that cost on it
has a score in the table, and in the plot it is a point.
"""

from ..evaluation import compare


def add_arguments(parser) -> None:
    parser.add_argument("runs", metavar="RUN", nargs="+", help="output folders of runs, or their exit_results.json")
    parser.add_argument("--output", metavar="PNG", help="draw the curves into this file")


def run(args) -> None:
    print(compare(args.runs, args.output).table)
    if args.output is not None:
        print(f"Plot: {args.output}")
