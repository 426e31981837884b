"""The parser of a run's flags, and its `--help`: our flags in groups, then those of transformers."""

import textwrap
from argparse import SUPPRESS, Action, ArgumentDefaultsHelpFormatter
from collections.abc import Mapping
from dataclasses import fields
from enum import Enum

from transformers import HfArgumentParser, TrainingArguments


# The flags of `TrainingArguments` that `--help` shows; `--help_all` shows all.
_MOST_USED = (
    "do_train do_eval do_predict output_dir learning_rate weight_decay num_train_epochs max_steps warmup_steps "
    "lr_scheduler_type optim per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps "
    "eval_strategy save_strategy load_best_model_at_end metric_for_best_model resume_from_checkpoint seed bf16 "
    "use_cpu report_to push_to_hub hub_model_id"
).split()


class RunParser(HfArgumentParser):
    """Parses flags into dataclasses, as `HfArgumentParser` does.

    Args:
        groups: the dataclasses, by the title under which `--help` shows their flags.
        prog: name of the program; `None`: that of the process.
        texts: the help of flags for which the dataclasses do not know it, by name.
    """

    def __init__(self, groups: Mapping[str, type], prog: str | None = None, texts: Mapping[str, str] | None = None):
        super().__init__(groups.values(), prog=prog, usage="%(prog)s [RECIPE] [--flag value ...]", add_help=False)
        self.formatter_class = _FlagFormatter
        self.shows_all = False
        stock = {field.name for field in fields(TrainingArguments)}
        for action in self._actions:
            action.help = (texts or {}).get(action.dest, action.help)
            if action.dest == "report_to":
                action.nargs = "+"  # `TrainingArguments` takes several trackers
        self.groups = {title: [f.name for f in fields(kind) if f.name not in stock] for title, kind in groups.items()}
        self.add_argument("--help", "-h", action=_Help, help="show these flags")
        self.add_argument("--help_all", action=_Help, help="show also all flags of transformers' TrainingArguments")

    def format_help(self) -> str:
        """As in `ArgumentParser`, in groups."""
        stock = [field.name for field in fields(TrainingArguments)]
        groups = {
            "help": ["help", "help_all"],
            **self.groups,
            "training, the most used flags of transformers' TrainingArguments": _MOST_USED,
        }
        if self.shows_all:
            groups["training, the other flags of TrainingArguments"] = [n for n in stock if n not in _MOST_USED]
        formatter = self.formatter_class(self.prog, max_help_position=36)
        formatter.add_usage(self.usage, self._actions, [])
        formatter.add_text("RECIPE is a .yaml, .yml or .json file of flags; flags after it override it.")
        for title, names in groups.items():
            place = {name: index for index, name in enumerate(names)}
            formatter.start_section(title)
            formatter.add_arguments(sorted((a for a in self._actions if a.dest in place), key=lambda a: place[a.dest]))
            formatter.end_section()
        if not self.shows_all:
            formatter.add_text("All other flags of TrainingArguments are taken too: --help_all.")
        return formatter.format_help()


class _Help(Action):
    """Prints the help, with `--help_all` all of it, and ends the process."""

    def __init__(self, option_strings, dest, help):
        super().__init__(option_strings, dest, nargs=0, default=SUPPRESS, help=help)

    def __call__(self, parser, namespace, values, option_string=None):
        parser.shows_all = option_string == "--help_all"
        parser.print_help()
        parser.exit()


class _FlagFormatter(ArgumentDefaultsHelpFormatter):
    """Shows one spelling of each flag, and its default if the help does not name it."""

    _METAVARS = {int: "N", float: "X"}

    def _format_action_invocation(self, action):
        name = action.option_strings[0]
        if action.nargs == 0 or isinstance(action.const, bool):
            return name
        if action.choices is not None and len(action.choices) > 6:
            return f"{name} NAME"
        return f"{name} {self._format_args(action, self._METAVARS.get(action.type, 'NAME'))}"

    def _split_lines(self, text, width):
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)  # names stay whole

    def _get_help_string(self, action):
        text, default = action.help or "", action.default
        if action.option_strings[0].startswith("--no_") and action.const is False:
            return f"Turns --{action.dest} off."
        no_default = default is None or default is False or default in (SUPPRESS, "", [])
        if no_default or isinstance(default, dict) or "default" in text.lower():
            return text
        if isinstance(default, list):
            default = " ".join(map(str, default))
        default = default.value if isinstance(default, Enum) else default
        return f"{text} Default: {default}.".replace("%", "%%") if "%" not in text else text
