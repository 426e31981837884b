"""The files of a run on the Hub.

- `card`: the model card, which consists of `sections`; `header` recognizes the card of a run.
- `examples`: the rows that a card shows.
- `endpoints`: the handler for Inference Endpoints.
- `settings`: the flags of a run that may be published.
- `markdown`: Markdown, with text of unknown origin escaped.
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
