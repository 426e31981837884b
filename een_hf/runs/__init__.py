"""What the two scripts do, as steps that exchange values.

`arguments` (flags and recipes), `model` (from a checkpoint or from scratch), `rows` (encoded; some calibrate),
`checks` (before any work), `costs`, `results` (the content of exit_results.json), `report` (files and tables) and
`predictions`; `experiment` puts them in their order.
"""

from ..extras import named_extras


with named_extras():
    from .arguments import RunArguments, parse_arguments
    from .experiment import Run, run_experiment

__all__ = ["Run", "RunArguments", "parse_arguments", "run_experiment"]
