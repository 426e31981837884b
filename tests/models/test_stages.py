"""Masks and compaction of examples."""

import pytest
import torch
from factory import tiny_config

from een_hf.models.stages import Examples, bidirectional_mask


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_token_that_sees_nothing_stays_a_number(dtype):
    """Eager attention takes its softmax in float32, where the smallest float64 is minus infinity: 0/0 in the row."""
    config = tiny_config(attn_implementation="eager")
    mask = torch.tensor([[0, 0, 0, 0, 1, 1]])  # the first token's window is padding only
    examples = Examples(torch.zeros(1, 6, 4, dtype=dtype), mask, padded=True)
    scores = bidirectional_mask(config, examples, window=1)
    weights = scores.softmax(-1, dtype=torch.float32)[0, 0]
    assert weights.isfinite().all()
    # A token beside the padding attends to its unmasked neighbours alone.
    assert weights[4].tolist() == [0, 0, 0, 0, 0.5, 0.5]
