"""The flags of a run, from the command line or a recipe, and the settings by which runs are compared."""

import difflib
import json
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from ..data.task import Modality
from ..errors import in_one_line, refuse_nan
from ..models import ExitConfigurationError
from ..models.criteria import find_criterion
from ..training.arguments import CalibrationArguments, EarlyExitTrainingArguments, ModelArguments
from ..training.registry import get_scheme, scheme_arguments, scheme_names
from .parser import RunParser


# Flags that set where a run is written, how it is monitored and how fast it loads data, but not what it computes.
_WATCHING = ("log", "hub_", "card_", "save_", "resume_")
_WHERE = (
    "output_dir report_to run_name project push_to_hub disable_tqdm token do_eval do_predict local_rank cache_dir "
    "overwrite_cache preprocessing_num_workers measure_speed dataloader_num_workers dataloader_pin_memory "
    "dataloader_persistent_workers dataloader_prefetch_factor"
).split()


@dataclass
class RunArguments:
    """The parsed flags of one run.

    Args:
        model: flags of the model.
        data: flags of the data, of texts or of images.
        training: flags of training.
        calibration: flags of calibration.
        scheme: flags of the scheme; `None` if it has none.
    """

    model: ModelArguments
    data: Any
    training: EarlyExitTrainingArguments
    calibration: CalibrationArguments
    scheme: Any | None

    def __post_init__(self):
        self._settings = self._read_settings()  # as given by the user, before the run fills in defaults

    @property
    def folder(self) -> Path:
        """The output folder."""
        return Path(self.training.output_dir)

    @property
    def asks_for_policy(self) -> bool:
        """Whether an exit policy is to be chosen."""
        return self.calibration.target_cost is not None or self.calibration.max_risk is not None

    def settings(self) -> dict:
        """The settings that must be equal in two runs of the same experiment.

        Returns:
            all flags but those of output and monitoring, by name.
        """
        return self._settings

    def _read_settings(self) -> dict:
        parts = filter(None, (self.model, self.data, self.training, self.calibration, self.scheme))
        merged = {field.name: getattr(part, field.name) for part in parts for field in fields(part)}
        where = {*_WHERE} - ({"dataloader_num_workers"} if self.data.streaming else set())  # workers share a stream
        kept = {name: value for name, value in merged.items() if name not in where and not name.startswith(_WATCHING)}
        return json.loads(json.dumps(kept, default=str))


def parse_arguments(modality: Modality, argv: list[str], prog: str | None = None) -> RunArguments:
    """Parse flags, or a recipe (first argument, YAML or JSON) and flags that override it.

    Args:
        modality: texts or images, which have different data flags.
        argv: the arguments after the name of the script.
        prog: name of the script in `--help`; default: that of the process.

    Returns:
        the flags.

    Raises:
        ExitConfigurationError: a recipe that does not exist, or an unknown flag or recipe key.
    """
    recipe = None
    if argv and argv[0].endswith((".yaml", ".yml", ".json")):
        recipe, argv = argv[0], argv[1:]
    given = [*read_recipe(recipe), *argv] if recipe else list(argv)
    # `--method=boosted` is the same as `--method boosted`.
    given = [part for word in given for part in (word.split("=", 1) if word.startswith("--method=") else [word])]
    method = next(
        (given[i + 1] for i in reversed(range(len(given) - 1)) if given[i] == "--method"),
        EarlyExitTrainingArguments.method,
    )
    scheme_class = get_scheme(method)  # imports the module of a scheme from elsewhere, which then has flags
    common = {
        "model": ModelArguments,
        "data": modality.data_arguments,
        "training of exits": EarlyExitTrainingArguments,
        "evaluation and calibration": CalibrationArguments,
    }
    names = {get_scheme(name).arguments_class: name for name in reversed(scheme_names())}
    schemes = {f"--method {names[kind]}": kind for kind in scheme_arguments()}
    known = ", ".join(f"`{name}`" for name in scheme_names())
    texts = {"method": f"Scheme by which exits are trained: {known}, or package.module:TrainerClass."}
    parser = RunParser({**common, **schemes}, prog, texts)
    _refuse_unknown(parser, given, argv, recipe)
    try:
        parsed = parser.parse_args_into_dataclasses(given)
    except ExitConfigurationError:
        raise
    except (ImportError, OSError, TypeError, ValueError) as error:  # of transformers
        raise ExitConfigurationError(" ".join(str(error).split())) from error
    for part in parsed:
        refuse_nan(vars(part))
    model, data, training, calibration = parsed[: len(common)]
    calibration.exit_criterion = find_criterion(calibration.exit_criterion)
    own = dict(zip(schemes.values(), parsed[len(common) :], strict=True)).get(scheme_class.arguments_class)
    return RunArguments(model, data, training, calibration, scheme=own)


def _refuse_unknown(parser: RunParser, given: list[str], argv: list[str], recipe: str | None) -> None:
    """Raise ExitConfigurationError for a flag or recipe key that the parser does not know, with those most like it."""
    flags = sorted(option for action in parser._actions for option in action.option_strings)
    for word in given:
        name = word.split("=", 1)[0]
        if name.startswith("--") and name not in flags and name.replace("-", "_").replace("__", "--", 1) not in flags:
            near = difflib.get_close_matches(name, flags, n=3)
            where = f"recipe {recipe}: key {name[2:]!r}" if recipe and word not in argv else f"flag {name}"
            hint = f"; did you mean {' or '.join(near)}?" if near else "; see --help."
            raise ExitConfigurationError(f"Unknown {where}{hint}")


def read_recipe(path: str) -> list[str]:
    """The flags of a recipe, as they would be given on the command line.

    Raises:
        ExitConfigurationError: a file that does not exist, cannot be read, or is not a mapping.
    """
    if not os.path.exists(path):
        raise ExitConfigurationError(f"Recipe {path} does not exist; recipes of this project are in recipes/.")
    try:
        with open(path, encoding="utf-8") as file:
            recipe = yaml.safe_load(file)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ExitConfigurationError(f"Recipe {path} cannot be read: {in_one_line(error)}") from error
    if not isinstance(recipe, dict):
        raise ExitConfigurationError(f"Recipe {path} must be a mapping of flags to values.")
    flags = []
    for name, value in recipe.items():
        if value is None:
            continue
        values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        flags += [f"--{name}", *map(str, values)]
    return flags
