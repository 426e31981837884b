"""`een-hf retrofit` as a library: exits on a fine-tuned classifier, without labels.

`arguments` (what is asked for), `model` (the fine-tuned one, with exits), `rows` (texts or images), `features` (one
pass of the model, kept on disk), `heads` (trained on them), `certify` (a policy with a guarantee) and `report` (the
outcome and its files); `job` puts them in their order.
"""

from ..extras import named_extras


with named_extras():
    from .arguments import RetrofitArguments
    from .job import retrofit
    from .report import RetrofitReport

__all__ = ["RetrofitArguments", "RetrofitReport", "retrofit"]
