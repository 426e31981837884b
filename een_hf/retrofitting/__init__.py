"""Retrofitting: adds exits to a fine-tuned classifier without labels (`een-hf retrofit`).

The steps are `arguments` (the settings), `model` (loading), `rows` (texts or images), `features` (one pass of the
model, stored on disk), `certify` (a policy with a guarantee) and `report` (the result and its files); `job` calls them
in order.
"""

from ..extras import named_extras


with named_extras():
    from .arguments import RetrofitArguments
    from .job import retrofit
    from .report import RetrofitReport

__all__ = ["RetrofitArguments", "RetrofitReport", "retrofit"]
