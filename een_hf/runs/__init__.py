"""Training runs, as `een-hf train` and the two scripts perform them, in steps that exchange values.

The steps are `arguments` (flags and recipes), `model` (from a checkpoint or from scratch), `rows` (encoded, and those
for calibration), `checks` (before any work), `costs`, `results` (the content of exit_results.json), `report` (files
and tables) and `predictions`; `experiment` calls them in order. `recalibrate` chooses another policy for a finished
run.
"""

from ..extras import named_extras


with named_extras():
    from .arguments import RunArguments, parse_arguments
    from .experiment import Run, run_experiment
    from .recalibrate import RunCalibration, calibrate_run

__all__ = ["Run", "RunArguments", "RunCalibration", "calibrate_run", "parse_arguments", "run_experiment"]
