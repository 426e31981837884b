"""theta' is where the real optimizer's step would go."""

import copy
import math

import pytest
import torch
from l2w_trainers import ADAMW, SGD, bert, make_trainer, tensors_of, text_batch, warmed_up
from torch.nn.utils import clip_grad_norm_

from een_hf.training.l2w import LookAhead


def record_ahead(trainer):
    """A dict that takes theta' as `ahead` when the meta loss is computed."""
    seen = {}

    def snapshot(inputs, parameters=None):
        named = {f"network.{name}": p for name, p in trainer.model.named_parameters()}
        seen["ahead"] = [p.detach().clone() for p in {**named, **(parameters or {})}.values()]
        return LookAhead.meta_loss(trainer.look_ahead, inputs, parameters)

    trainer.look_ahead.meta_loss = snapshot
    return seen


@pytest.mark.parametrize("steps", [0, 1, 25], ids=["first", "second", "later"])
@pytest.mark.parametrize("max_grad_norm", [0.05, 1e9], ids=["clipped", "unclipped"])
@pytest.mark.parametrize(
    "optimizer",
    [
        ADAMW,
        {"optim": "adamw_torch_fused"},
        {"optim": "sgd"},
        SGD,
        {"optim": "sgd", "optim_args": "momentum=0.9,dampening=0.3"},
        {"optim": "sgd", "optim_args": "momentum=0.9,nesterov=true"},
    ],
    ids=["adamw", "fused", "plain", "momentum", "dampening", "nesterov"],
)
@pytest.mark.parametrize("method", ["directional", "exact"])
def test_look_ahead_is_the_real_step(tmp_path, optimizer, max_grad_norm, steps, method, monkeypatch):
    # Decay for some parameters only and two learning rates: a step by one global rule would not pass. Some parameters
    # are taken in parts, the last of them a short one, and some together.
    monkeypatch.setattr("een_hf.training.l2w.step.PIECE", 300)
    batches = [text_batch(8, 100 + step) for step in range(steps)]
    model = bert().double()
    trainer = warmed_up(model, tmp_path, batches, weight_decay=0.1, max_grad_norm=max_grad_norm, **optimizer)
    assert len(trainer.optimizer.param_groups) >= 4
    model.train()
    trainer.scheme_args.meta_gradient = method
    before = [parameter.detach().clone() for parameter in model.parameters()]
    states = copy.deepcopy(trainer.optimizer.state_dict())
    seen = record_ahead(trainer)
    train, meta = text_batch(6, 1), text_batch(6, 2)
    torch.manual_seed(5)
    weights, _, _ = trainer.meta_gradient(train, meta)
    for old, new in zip(tensors_of(states), tensors_of(trainer.optimizer.state_dict()), strict=True):
        assert torch.equal(old, new)

    real, optimizer = copy.deepcopy((model, trainer.optimizer))
    torch.manual_seed(5)
    losses = trainer.losses_of(real(**train).exit_logits, train["labels"])
    (weights.detach() * losses).mean(0).sum().backward()
    norm = clip_grad_norm_(real.parameters(), max_grad_norm)
    assert (norm > max_grad_norm) == (max_grad_norm < 1)
    optimizer.step()
    wanted = torch.cat([(p.detach() - old).flatten() for p, old in zip(real.parameters(), before, strict=True)])
    found = torch.cat([(p - old).flatten() for p, old in zip(seen["ahead"], before, strict=True)])
    assert wanted.norm() > 0
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("method", ["directional", "forward", "exact"])
def test_what_the_optimizer_does_not_hold_stays(tmp_path, method):
    """What breaks: theta' of parameters in no group is whatever memory held; their gradient still counts in c."""
    model = bert().double().train()
    heads = list(model.exit_heads.parameters())
    # SGD's step is linear in c; AdamW's first one hardly shows it.
    trainer = make_trainer(model, tmp_path, max_grad_norm=0.05, optimizers=(torch.optim.SGD(heads, lr=1e-2), None))
    trainer.scheme_args.meta_gradient = method
    before, seen = [parameter.detach().clone() for parameter in model.parameters()], record_ahead(trainer)
    train, meta = text_batch(6, 1), text_batch(6, 2)
    torch.manual_seed(5)
    weights, gradient, _ = trainer.meta_gradient(train, meta)
    assert gradient.norm() > 0

    real, optimizer = copy.deepcopy((model, trainer.optimizer))
    torch.manual_seed(5)
    losses = trainer.losses_of(real(**train).exit_logits, train["labels"])
    (weights.detach() * losses).mean(0).sum().backward()
    of_heads = clip_grad_norm_(real.exit_heads.parameters(), math.inf)
    assert clip_grad_norm_(real.parameters(), 0.05) > 1.01 * of_heads > 0.05
    optimizer.step()
    ids = {id(parameter) for parameter in heads}
    rows = zip(model.parameters(), seen["ahead"], real.parameters(), before, strict=True)
    for parameter, found, wanted, old in rows:
        assert torch.equal(found, old) != (id(parameter) in ids)
        torch.testing.assert_close(found, wanted.detach(), rtol=1e-9, atol=1e-12)
    # One sample is charged at the last exit, whose head is not held.
    assert not trainer.meta_gradient(train, text_batch(1, 3))[1].any()
