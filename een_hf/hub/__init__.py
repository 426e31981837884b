"""What a run shows on the Hub.

- `card`: the model card, made of `sections`; `header` recognises the card of a run.
- `examples`: the rows that a card shows.
- `endpoints`: the file by which Inference Endpoints run a model.
- `settings`: what of a run's flags may be shown.
- `markdown`: text of unknown origin in Markdown.
"""

from .card import refresh_model_card, write_model_card
from .endpoints import write_handler
from .examples import PRIVATE_EXAMPLES, SHARED_EXAMPLES, choose_examples, write_examples
from .header import CARD_NAME, is_run_card
from .sections import guarantee_in_words
from .settings import hub_name, public_settings


__all__ = [
    "CARD_NAME",
    "PRIVATE_EXAMPLES",
    "SHARED_EXAMPLES",
    "choose_examples",
    "guarantee_in_words",
    "hub_name",
    "is_run_card",
    "public_settings",
    "refresh_model_card",
    "write_examples",
    "write_handler",
    "write_model_card",
]
