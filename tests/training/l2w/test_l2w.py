"""The meta-weighted scheme: the look-ahead against real steps, double backward and numerical differentiation."""

import copy
import json
import math
import os
import resource
from fractions import Fraction

import pytest
import torch
from l2w_trainers import NUM_LABELS, Reads, bert, image_batch, make_trainer, text_batch, vit, warmed_up
from torch.nn.utils import clip_grad_norm_
from transformers import TrainerCallback

from een_hf.data.transforms import ImageCollator
from een_hf.models import ExitConfigurationError
from een_hf.training import EarlyExitTrainingArguments, get_scheme
from een_hf.training.l2w import (
    LookAhead,
    MetaWeightedArguments,
    MetaWeightedExitTrainer,
    WeightPredictionNetwork,
    charged_shares,
    charging,
    devices,
    look_ahead,
    save_weight_map,
)
from een_hf.training.l2w.look_ahead import halve


VOCABULARY = 30_000
most_confident_first = charging.most_confident_first
SGD = {"optim": "sgd", "optim_args": "momentum=0.9"}
ADAMW = {"optim": "adamw_torch"}


def meta_gradients(trainer, train, meta, method, seed):
    """dL_meta/dw and the gradient of all of W, for one random state."""
    trainer.scheme_args = copy.copy(trainer.scheme_args)
    trainer.scheme_args.meta_gradient = method
    torch.manual_seed(seed)
    weights, gradient, _ = trainer.meta_gradient(train, meta)
    of_network = torch.autograd.grad(weights, list(trainer.weight_network.parameters()), gradient)
    return gradient, torch.cat([part.flatten() for part in of_network])


def assert_close(ours, exact, cosine, error):
    ours, exact = ours.double().flatten(), exact.double().flatten()
    assert torch.cosine_similarity(ours, exact, dim=0) > cosine
    assert (ours - exact).norm() < error * exact.norm()


def assert_close_gradients(trainer, batches, states=4):
    for seed in range(states):
        train, meta = batches(seed)
        wanted = meta_gradients(trainer, train, meta, "exact", seed)
        for method, limits in (("directional", (0.9999, 5e-3)), ("forward", (0.99999, 1e-4))):
            for ours, exact in zip(meta_gradients(trainer, train, meta, method, seed), wanted, strict=True):
                assert_close(ours, exact, *limits)


@pytest.mark.parametrize("shared", [0, 4], ids=["no words shared", "words shared"])
@pytest.mark.parametrize("optimizer", [SGD, ADAMW], ids=["sgd", "adamw"])
def test_the_gradient_is_exact_on_bert(tmp_path, optimizer, shared):
    # Words from the upper half of the vocabulary are new to the optimizer and to the train half: AdamW's P is about
    # 1/eps for their rows. Without the mask on them the directional derivative is noise. Words that both halves have,
    # of which the optimizer knows some and others not, are part of the direction.
    model = bert(VOCABULARY)
    seen = [text_batch(16, 100 + step, high=VOCABULARY // 2) for step in range(25)]
    trainer = warmed_up(model, tmp_path, seen, **optimizer)
    assert len({group["lr"] for group in trainer.optimizer.param_groups}) == 2

    def batches(seed):
        train = text_batch(8, seed, high=VOCABULARY // 2)
        meta = text_batch(8, 50 + seed, low=VOCABULARY // 2, high=VOCABULARY)
        if shared:
            train["input_ids"][:, 0] = seen[0]["input_ids"][:8, 0]
            meta["input_ids"][:, :shared] = train["input_ids"][:, :shared]
        return train, meta

    assert_close_gradients(trainer, batches)


@pytest.mark.parametrize("optimizer", [SGD, ADAMW], ids=["sgd", "adamw"])
def test_the_gradient_is_exact_on_vit(tmp_path, optimizer):
    trainer = warmed_up(vit(), tmp_path, [image_batch(16, 100 + step) for step in range(25)], **optimizer)
    assert_close_gradients(trainer, lambda seed: (image_batch(8, seed), image_batch(8, 50 + seed)))


@pytest.mark.parametrize("optimizer", [SGD, ADAMW], ids=["sgd", "adamw"])
@pytest.mark.parametrize("sizes", [(1, 1), (1, 2), (2, 1)])
def test_the_gradient_is_exact_on_few_images(tmp_path, optimizer, sizes, monkeypatch):
    # Of one image, the gradients of the class token and of the positions are one piece of memory.
    # Their losses bend: at the usual length some are 9e-3 off under torch 2.11.
    monkeypatch.setattr(look_ahead, "_STEP_NORM", 0.003)
    trainer = warmed_up(vit(), tmp_path, [image_batch(16, 100 + step) for step in range(5)], **optimizer)
    train, meta = sizes
    assert_close_gradients(trainer, lambda seed: (image_batch(train, seed), image_batch(meta, 50 + seed)))


class SameOrders:
    """The orders by confidence of the first look-ahead, also in those that follow `again`."""

    def __init__(self):
        self.orders, self.calls = [], 0

    def again(self):
        self.calls = 0

    def __call__(self, logits):
        if self.calls == len(self.orders):
            self.orders.append(most_confident_first(logits))
        self.calls += 1
        return self.orders[self.calls - 1]


@pytest.mark.parametrize("optimizer", [SGD, ADAMW], ids=["sgd", "adamw"])
@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_forward_mode_holds_in_the_precision_of_the_training(tmp_path, monkeypatch, kind, optimizer):
    """What breaks: other dropout masks, bfloat16 parameters left from before the step, a direction out of range."""
    model, make_batch = (bert(), text_batch) if kind == "bert" else (vit(), image_batch)
    batches = [make_batch(16, 100 + step) for step in range(10)]
    trainer = warmed_up(model, tmp_path, batches, bf16=True, **optimizer)
    for seed in range(3):
        orders = SameOrders()  # of nearly equal confidences bfloat16 may take another as the larger
        monkeypatch.setattr(charging, "most_confident_first", orders)
        train, meta = make_batch(16, seed), make_batch(16, 50 + seed)
        exact, _ = meta_gradients(trainer, train, meta, "exact", seed)
        orders.again()
        found, _ = meta_gradients(trainer, train, meta, "forward", seed)
        assert not torch.equal(found, exact)
        assert_close(found, exact, 0.999, 2e-2)


@pytest.mark.parametrize("optimizer", [SGD, ADAMW, {"optim": "adamw_torch_fused"}], ids=["sgd", "adamw", "fused"])
def test_on_a_device_the_same_is_done_without_reading_it(tmp_path, monkeypatch, optimizer):
    """What breaks: the branches for accelerators, on the CPU here, give something else, or wait for values."""
    model = bert().double()
    batches = [text_batch(8, 100 + step) for step in range(5)]
    trainer = warmed_up(
        model, tmp_path, batches, weight_decay=0.1, scheme_args={"meta_gradient": "forward"}, **optimizer
    )
    batch = text_batch(9, 1)
    batch["input_ids"][::2, 6:], batch["attention_mask"][::2, 6:] = 0, 0
    batch["attention_mask"][0, 6:] = 1  # a padding token that is read, but never learned
    found = []
    meta_gradient = trainer.meta_gradient

    def record(train, meta):
        with Reads() as reads:
            weights, gradient, meta_loss = meta_gradient(train, meta)
        found.append((gradient, meta_loss))
        seen.append(reads.seen)
        return weights, gradient * 0, meta_loss

    trainer.meta_gradient, seen = record, []
    for on_host in (devices.on_host, lambda tensor: False):
        monkeypatch.setattr(devices, "on_host", on_host)
        torch.manual_seed(3)
        trainer.meta_generator.manual_seed(3)
        trainer.meta_optimizer.param_groups[0].update(lr=0.0)  # W stays as it is
        trainer.meta_step(batch)
    assert seen[0] and seen[2:] == [[], []]
    for wanted, got in zip(found[:2], found[2:], strict=True):
        for one, other in zip(wanted, got, strict=True):
            assert one.norm() > 0
            torch.testing.assert_close(other, one, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize(
    "method,bf16,dtype,matmul",
    [
        ("directional", True, torch.float32, "ieee"),
        ("exact", True, torch.float32, "ieee"),
        ("forward", False, torch.float32, "tf32"),
        ("forward", True, torch.bfloat16, "tf32"),
    ],
)
def test_the_look_ahead_sets_the_precision_that_it_needs(tmp_path, method, bf16, dtype, matmul):
    """What breaks: under TF32 convolutions, a GPU's default, the gradient is 5e-3 off; under bfloat16 it is noise."""
    trainer = warmed_up(bert(), tmp_path, [text_batch(8, 1)], bf16=bf16, scheme_args={"meta_gradient": method})
    kinds = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    seen, before, losses_of = [], [kind.fp32_precision for kind in kinds], trainer.losses_of

    def record(exit_logits, labels):
        seen.append((exit_logits.dtype, *[kind.fp32_precision for kind in kinds]))
        return losses_of(exit_logits, labels)

    trainer.losses_of = record
    for kind in kinds:
        kind.fp32_precision = "tf32"
    try:
        with torch.autocast("cpu", torch.bfloat16):
            trainer.meta_gradient(text_batch(8, 2), text_batch(8, 3))
            trainer.meta_step(text_batch(8, 2))
            assert torch.is_autocast_enabled("cpu")
        assert [kind.fp32_precision for kind in kinds] == ["tf32", "tf32"]
    finally:
        for kind, value in zip(kinds, before, strict=True):
            kind.fp32_precision = value
    assert len(seen) == 3 * {"directional": 4, "exact": 2, "forward": 3}[method]
    assert set(seen) == {(dtype, matmul, "ieee")}


def test_the_look_ahead_of_central_differences_is_float32_under_mixed_precision(tmp_path):
    # accelerate patches the instance's forward with autocast; perturbations of 1e-6 would vanish in bfloat16.
    batches = [text_batch(16, 100 + step) for step in range(5)]
    found = {}
    for bf16 in (False, True):
        trainer = warmed_up(bert(), tmp_path, batches, bf16=bf16, **ADAMW)
        if bf16:
            trainer.accelerator.prepare(trainer.model)
            assert "forward" in vars(trainer.model)
        found[bf16], _ = meta_gradients(trainer, text_batch(8, 1), text_batch(8, 2), "directional", 0)
    torch.testing.assert_close(found[True], found[False], rtol=0, atol=0)


@pytest.mark.parametrize("optimizer", [SGD, ADAMW], ids=["sgd", "adamw"])
def test_exact_gradient_is_the_numerical_one(tmp_path, optimizer):
    batches = [text_batch(8, 100 + step) for step in range(5)]
    model = bert().double()
    # The meta half's rows leave where they are charged; where it draws all of its masks before that, they are those of
    # the plain forward pass below.
    for part in (*model.backbone_layers[1:], *model.exit_head_modules(1), model.dropout):
        for module in part.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    trainer = warmed_up(
        model, tmp_path, batches, max_grad_norm=0.1, scheme_args={"meta_gradient": "exact"}, **optimizer
    )
    train, meta = text_batch(4, 1), text_batch(4, 2)
    torch.manual_seed(0)
    weights, gradient, meta_loss = trainer.meta_gradient(train, meta)
    weights = weights.detach()

    # What follows knows neither the look-ahead nor its step: plain modules, the formulas of the optimizers.
    def losses_of(network, batch):
        logits = network(**{**batch, "labels": None}).exit_logits
        losses = torch.stack(
            [
                torch.nn.functional.cross_entropy(logits[:, k], batch["labels"], reduction="none")
                for k in range(logits.shape[1])
            ],
            1,
        )
        return losses, logits

    def gradients_at(weights):
        torch.manual_seed(0)
        losses, _ = losses_of(model, train)
        return torch.autograd.grad((weights * losses).mean(0).sum(), list(model.parameters()))

    start = gradients_at(weights)
    norm = math.sqrt(sum(part.square().sum().item() for part in start))
    clip = 0.1 / (norm + 1e-6)
    assert clip < 1
    parameters = list(model.parameters())
    group_of = {id(p): group for group in trainer.optimizer.param_groups for p in group["params"]}
    frozen_charges = []

    def meta_loss_at(weights):
        ahead, moved = copy.deepcopy(model), gradients_at(weights)
        with torch.no_grad():
            for target, parameter, g, g0 in zip(ahead.parameters(), parameters, moved, start, strict=True):
                group, state = group_of[id(parameter)], trainer.optimizer.state[parameter]
                g, g0 = clip * g, clip * g0
                if "betas" in group:
                    (b1, b2), t = group["betas"], state["step"].item() + 1
                    m = (b1 * state["exp_avg"] + (1 - b1) * g) / (1 - b1**t)
                    v = (b2 * state["exp_avg_sq"] + (1 - b2) * g0**2) / (1 - b2**t)
                    target.copy_(parameter * (1 - group["lr"] * group["weight_decay"]))
                    target.sub_(group["lr"] * m / (v.sqrt() + group["eps"]))
                else:
                    d = g + group["weight_decay"] * parameter
                    target.sub_(group["lr"] * (0.9 * state["momentum_buffer"] + d))
            torch.manual_seed(0)
            losses_of(model, train)  # the train half's masks come first in the random stream
            losses, logits = losses_of(ahead, meta)
        if not frozen_charges:
            frozen_charges.append(charged_by_loop(logits.softmax(-1).amax(-1).tolist(), 0.75))
        return sum(
            sum(losses[row, k].item() for row in rows) / len(rows) for k, rows in enumerate(frozen_charges[0]) if rows
        )

    assert meta_loss_at(weights) == pytest.approx(meta_loss.item(), rel=1e-9)
    numerical = torch.zeros_like(weights)
    for i in range(weights.shape[0]):
        for k in range(weights.shape[1]):
            nudge = torch.zeros_like(weights)
            nudge[i, k] = 1e-3
            numerical[i, k] = (meta_loss_at(weights + nudge) - meta_loss_at(weights - nudge)) / 2e-3
    assert (numerical - gradient).norm() < 1e-5 * numerical.norm()


def charged_by_loop(confidences, target_p, offset=0.0):
    """The rows charged at each exit, by sorted lists and exact fractions."""
    num_rows, num_exits = len(confidences), len(confidences[0])
    q = Fraction(target_p)
    total = sum(q**k for k in range(1, num_exits + 1))
    left, charged, before = list(range(num_rows)), [], 0
    for k in range(num_exits):
        before, share = before + q ** (k + 1) / total, -math.floor(num_rows * before + Fraction(offset))
        share += math.floor(num_rows * before + Fraction(offset))
        surest = sorted(left, key=lambda row: -confidences[row][k])  # stable: of equals the earlier row
        charged.append(surest[:share])
        left = [row for row in left if row not in charged[-1]]
    return charged


@pytest.mark.parametrize("target_p", [0.3, 0.75, 1.0, 1.4])
def test_shares_equal_exact_fractions(target_p):
    for num_rows in [*range(1, 12), 37]:
        for num_exits in (1, 2, 3, 7):
            for offset in (0.0, 0.3, 0.95):
                wanted = charged_by_loop([[0.0] * num_exits] * num_rows, target_p, offset)
                assert charged_shares(num_rows, num_exits, target_p, offset) == [len(rows) for rows in wanted]


@pytest.mark.parametrize("num_rows", [1, 16, 50])
def test_each_exit_is_charged_with_its_share_on_average(num_rows):
    """What breaks: rounding down never charges exits 6 to 11 of 12 with any of 16 samples, and the last with 5."""
    p = [0.75**k for k in range(1, 13)]
    p = [part / sum(p) for part in p]
    counts = torch.tensor(
        [charged_shares(num_rows, 12, 0.75, (draw + 0.5) / 1000) for draw in range(1000)], dtype=torch.float64
    )
    assert (counts.sum(1) == num_rows).all()
    wanted = num_rows * torch.tensor(p, dtype=torch.float64)
    assert ((counts >= wanted.floor()) & (counts <= wanted.ceil())).all()
    torch.testing.assert_close(counts.mean(0), wanted, rtol=0, atol=2e-3)


def test_each_look_ahead_draws_one_rounding_from_its_own_generator(tmp_path):
    trainer = make_trainer(bert(), tmp_path, size=40, max_steps=4, scheme_args={"meta_interval": 2})
    generator = torch.Generator()
    generator.set_state(trainer.meta_generator.get_state())
    seen, meta_loss = [], trainer.look_ahead.meta_loss

    def record(inputs, parameters=None):
        seen.append(trainer.look_ahead.share_offset)
        return meta_loss(inputs, parameters)

    trainer.look_ahead.meta_loss = record
    trainer.train()
    draws = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
    assert seen == [draws[0], draws[0], draws[1], draws[1]]


def plain_meta_loss(exit_logits, labels):
    """The charged rows' cross-entropy, from all rows at all exits (rows, exits, labels)."""
    total = 0.0
    for k, rows in enumerate(charged_by_loop(exit_logits.softmax(-1).amax(-1).tolist(), 0.75)):
        if rows:
            total = total + torch.nn.functional.cross_entropy(exit_logits[rows, k], labels[rows])
    return total


@pytest.mark.parametrize("kind", ["left padding", "right padding", "4-D mask", "images"])
@pytest.mark.parametrize("num_rows", [1, 3, 16])
def test_rows_that_leave_where_they_are_charged_change_no_gradient(tmp_path, kind, num_rows):
    """What breaks: a row is charged at another exit, or reaches a parameter more or less than if it had stayed."""
    text = kind != "images"
    model = (bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0) if text else vit(dropout=0.0)).double()
    batch = text_batch(num_rows, 1) if text else image_batch(num_rows, 1)
    if text:
        lengths = torch.randint(2, 11, (num_rows, 1), generator=torch.Generator().manual_seed(0))
        mask = (torch.arange(10) < lengths).long()
        batch["attention_mask"] = mask.flip(1) if kind == "left padding" else mask
        if kind == "4-D mask":
            batch["attention_mask"] = mask.bool()[:, None, None].expand(-1, 1, 10, -1)
    else:
        batch["pixel_values"] = batch["pixel_values"].double()
    trainer = make_trainer(model, tmp_path)
    model.train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # rows differ in how sure they are
    parameters, seen = list(model.parameters()), []
    handles = [layer.register_forward_hook(lambda *args: seen.append(len(args[2]))) for layer in model.backbone_layers]
    loss = trainer.look_ahead.meta_loss(batch)
    for handle in handles:
        handle.remove()
    staying = {1: [1, 1, 1], 3: [3, 2, 1], 16: [16, 10, 4]}[num_rows]
    assert seen == staying
    wanted = plain_meta_loss(model(**batch).exit_logits, batch["labels"])
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-12)
    ours, plain = (torch.autograd.grad(of, parameters, materialize_grads=True) for of in (loss, wanted))
    for found, expected in zip(ours, plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


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
    for old, new in zip(_tensors(states), _tensors(trainer.optimizer.state_dict()), strict=True):
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


def _tensors(state):
    if isinstance(state, torch.Tensor):
        return [state]
    if isinstance(state, dict):
        state = list(state.values())
    return [tensor for part in state for tensor in _tensors(part)] if isinstance(state, (list, tuple)) else []


class Record(TrainerCallback):
    """The parameters after every step."""

    def __init__(self):
        self.steps = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.steps.append([parameter.detach().clone() for parameter in model.parameters()])


@pytest.mark.parametrize("constraint", ["exit", "sample", "batch"])
@pytest.mark.parametrize("kwargs", [{}, {"gradient_accumulation_steps": 3, "exit_loss_weights": "linear"}])
def test_epsilon_0_is_joint_to_the_last_bit(tmp_path, constraint, kwargs):
    # Any trace of the look-ahead would show: a random number drawn, a parameter or buffer not put back, a gradient.
    records, logs = [], []
    for scheme, scheme_args in (
        ("joint", None),
        ("l2w", {"meta_epsilon": 0.0, "meta_constraint": constraint, "meta_input": "both"}),
    ):
        trainer = make_trainer(bert(), tmp_path, scheme, scheme_args, size=33, logging_steps=1, max_steps=7, **kwargs)
        records.append(Record())
        trainer.add_callback(records[-1])
        trainer.train()
        logs.append([(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry])
    assert len(records[0].steps) == 7
    for joint, weighted in zip(records[0].steps, records[1].steps, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(joint, weighted, strict=True))
    assert logs[0] == logs[1]


def test_weights_change_the_training_and_w_learns(tmp_path):
    joint, weighted = make_trainer(bert(), tmp_path, "joint"), make_trainer(bert(), tmp_path)
    before = copy.deepcopy(weighted.weight_network.state_dict())
    joint.train()
    weighted.train()
    assert any(
        not torch.equal(a, b) for a, b in zip(joint.model.parameters(), weighted.model.parameters(), strict=True)
    )
    assert all(not torch.equal(before[name], value) for name, value in weighted.weight_network.state_dict().items())


def test_resumed_is_uninterrupted(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 4, "max_steps": 9, "gradient_accumulation_steps": 2}
    whole = make_trainer(bert(), tmp_path / "whole", scheme_args={"meta_interval": 2}, **settings)
    torch.rand(3, generator=whole.meta_generator)  # no longer where its seed puts it
    whole.train()
    resumed = make_trainer(bert(seed=9), tmp_path / "resumed", scheme_args={"meta_interval": 2}, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert resumed.state.global_step == 9
    for part in ("model", "weight_network", "meta_optimizer"):
        pairs = zip(
            _tensors(getattr(whole, part).state_dict()), _tensors(getattr(resumed, part).state_dict()), strict=True
        )
        assert all(torch.equal(a, b) for a, b in pairs), part
    assert whole.meta_scheduler.state_dict() == resumed.meta_scheduler.state_dict()
    assert torch.equal(whole.meta_generator.get_state(), resumed.meta_generator.get_state())


def test_a_checkpoint_without_weight_network_is_refused(tmp_path):
    make_trainer(bert(), tmp_path, save_strategy="steps", save_steps=2, max_steps=2).train()
    os.remove(tmp_path / "checkpoint-2" / "weight_network.pt")
    trainer = make_trainer(bert(), tmp_path, max_steps=4)
    with pytest.raises(ExitConfigurationError, match="--resume_from_checkpoint.*weight_network.pt"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("fails_at", [None, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("method", ["directional", "forward", "exact"])
def test_the_look_ahead_leaves_no_trace(tmp_path, method, fails_at):
    model = bert()
    trainer = warmed_up(model, tmp_path, [text_batch(8, 1)], scheme_args={"meta_gradient": method})
    model.register_buffer("counter", torch.zeros(3))
    calls = []

    def outputs(*args):
        calls.append(1)
        model.counter.add_(1)
        if len(calls) == fails_at:
            raise KeyboardInterrupt
        return LookAhead.outputs(trainer.look_ahead, *args)

    trainer.look_ahead.outputs = outputs
    before, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    optimizer_before = copy.deepcopy(trainer.optimizer.state_dict())
    table = model.get_input_embeddings()

    def objects():
        grouped = [parameter for group in trainer.optimizer.param_groups for parameter in group["params"]]
        tensors = [*model.parameters(), *grouped, *trainer.optimizer.state]
        return [(id(t), t.data_ptr()) for t in tensors], table.padding_idx, len(table._forward_pre_hooks)

    objects_before = objects()
    try:
        trainer.meta_step(text_batch(8, 2))
        failed = False
    except KeyboardInterrupt:
        failed = True
    assert failed == (fails_at is not None and len(calls) == fails_at)
    assert len(calls) == (fails_at if failed else {"directional": 8, "forward": 6, "exact": 4}[method])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert objects() == objects_before
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(parameter.grad is None for parameter in model.parameters())
    for old, new in zip(_tensors(optimizer_before), _tensors(trainer.optimizer.state_dict()), strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize("method", ["directional", "exact"])
@pytest.mark.parametrize("optimizer", [SGD, ADAMW], ids=["sgd", "adamw"])
@pytest.mark.parametrize("table", ["padded", "unpadded", "shared"])
def test_only_the_words_of_the_batch_count(tmp_path, table, optimizer, method):
    """A look-ahead on the rows of the word table that the batch looks up is the one on the whole table."""
    model = bert().double()
    words = model.get_input_embeddings()
    if table == "shared":
        model.twin = torch.nn.Embedding(*words.weight.shape, dtype=torch.float64)
        model.twin.weight = words.weight
    batches = [text_batch(8, 100 + step) for step in range(5)]
    trainer = warmed_up(model, tmp_path, batches, weight_decay=0.1, scheme_args={"meta_gradient": method}, **optimizer)
    batch = text_batch(7, 1)
    assert words.padding_idx == 0
    if table == "padded":
        batch["input_ids"][::2, 6:], batch["attention_mask"][::2, 6:] = 0, 0
        batch["attention_mask"][0, 6:] = 1  # a padding word that is read, but never learned

    found, sizes, whole_table = [], set(), trainer.meta_gradient

    def record(train, meta):
        weights, gradient, meta_loss = whole_table(train, meta)
        sizes.add(len(words.weight))
        found.append((weights.detach().clone(), gradient, meta_loss))
        return weights, gradient * 0, meta_loss

    trainer.meta_gradient = record
    # W stays as it is, so that both orders can be told from the same one.
    trainer.meta_optimizer.param_groups[0].update(lr=0.0)
    torch.manual_seed(3)
    trainer.meta_step(batch)
    assert sizes == {200 if table == "shared" else len(batch["input_ids"].unique())}
    assert len(found) == 2
    torch.manual_seed(3)
    first, second = halve(batch)
    for (train, meta), ours in zip(((first, second), (second, first)), found, strict=True):
        for wanted, got in zip(whole_table(train, meta), ours, strict=True):
            assert wanted.norm() > 0
            torch.testing.assert_close(got, wanted.detach(), rtol=1e-6, atol=1e-10)


def test_w_never_touches_the_global_random_state(tmp_path):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    networks = [
        WeightPredictionNetwork(3, MetaWeightedArguments(), torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    ]
    assert torch.equal(torch.get_rng_state(), before)
    first, same, other = (network.layers[0].weight for network in networks)
    assert torch.equal(first, same) and not torch.equal(first, other)


@pytest.mark.parametrize("inputs,width", [("loss", 3), ("confidence", 3), ("both", 6)])
@pytest.mark.parametrize("constraint,over", [("exit", 1), ("sample", 0), ("batch", (0, 1))])
def test_weights_average_1_over_their_constraint(inputs, width, constraint, over):
    args = MetaWeightedArguments(meta_input=inputs, meta_constraint=constraint, wpn_num_layers=2, wpn_hidden_size=7)
    network = WeightPredictionNetwork(3, args, torch.Generator().manual_seed(0))
    assert [tuple(p.shape) for p in network.parameters()][::2] == [(7, width), (7, 7), (3, 7)]
    losses, logits = torch.rand(5, 3) * 4, torch.randn(5, 3, NUM_LABELS) * 4
    weights = network(losses, logits)
    confidences = torch.stack([logits[:, k].softmax(-1).max(-1).values for k in range(3)], 1)
    read = {"loss": losses, "confidence": confidences, "both": torch.cat([losses, confidences], 1)}[inputs]
    a, b, c = network.layers[0], network.layers[2], network.layers[4]
    g = torch.tanh(c(torch.relu(b(torch.relu(a(read))))))
    torch.testing.assert_close(weights, 1 + 0.8 * (g - g.mean(over, keepdim=True)))
    torch.testing.assert_close(weights.mean(over), torch.ones_like(weights.mean(over)))


def test_looks_ahead_once_per_interval_on_the_first_micro_batch(tmp_path):
    trainer = make_trainer(
        bert(), tmp_path, scheme_args={"meta_interval": 3}, size=64, gradient_accumulation_steps=2, max_steps=7
    )
    seen, batches = [], []
    meta_step, training_step = trainer.meta_step, MetaWeightedExitTrainer.training_step

    def record(inputs):
        seen.append((trainer.state.global_step, len(batches)))
        meta_step(inputs)

    def count(model, inputs, num_items_in_batch=None):
        loss = training_step(trainer, model, inputs, num_items_in_batch)
        batches.append(1)
        return loss

    trainer.meta_step, trainer.training_step = record, count
    trainer.train()
    assert seen == [(0, 0), (3, 6), (6, 12)]
    assert trainer.meta_optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)  # cosine, all three used up


def test_odd_and_tiny_batches(tmp_path):
    # 7 samples, then 3, 2 or 1: one sample has no halves, so the network is trained and W rests.
    for size, expected in ((10, [0, 0, 1, 1]), (9, [0, 0, 1, 1]), (8, [0, 0])):
        trainer = make_trainer(bert(), tmp_path, size=size, per_device_train_batch_size=7, num_train_epochs=1)
        updates = []
        trainer.meta_optimizer.register_step_post_hook(
            lambda *_, trainer=trainer, updates=updates: updates.append(trainer.state.global_step)
        )
        trainer.train()
        assert trainer.state.global_step == 2
        assert updates == expected
    weights, gradient, _ = trainer.meta_gradient(text_batch(1, 0), text_batch(2, 1))
    assert weights.shape == gradient.shape == (1, 3) and gradient.isfinite().all()


def test_soft_labels_and_label_smoothing(tmp_path):
    for kwargs, labels in (
        ({"label_smoothing_factor": 0.1}, torch.randint(0, NUM_LABELS, (8,))),
        ({}, torch.rand(8, NUM_LABELS).softmax(-1)),
    ):
        model = bert(problem_type="single_label_classification")
        trainer = warmed_up(model, tmp_path, [text_batch(8, 1)], **kwargs)
        before = copy.deepcopy(trainer.weight_network.state_dict())
        trainer.meta_step({**text_batch(8, 2), "labels": labels})
        assert any(not torch.equal(before[name], p) for name, p in trainer.weight_network.state_dict().items())


def test_the_meta_loss_of_a_mixed_batch(tmp_path):
    """Each half of an odd batch keeps its own soft labels: every row is charged once, by a plain loop over numbers."""
    model = vit().double().eval()
    model.config.problem_type = "single_label_classification"
    trainer = make_trainer(model, tmp_path)
    pixels = torch.randn(7, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows = [{"pixel_values": image, "labels": k % NUM_LABELS, "draw": (1, 0, k)} for k, image in enumerate(pixels)]
    batch = ImageCollator(mixup=0.8, cutmix=1.0, num_labels=NUM_LABELS)(rows)
    with torch.no_grad():
        logits = model(pixel_values=batch["pixel_values"], early_exit=False).exit_logits
    for half, start, stop in zip(halve(batch), (0, 3), (3, 7), strict=True):
        confidences = logits[start:stop].softmax(-1).amax(-1).tolist()
        wanted = 0.0
        for k, charged in enumerate(charged_by_loop(confidences, 0.75)):
            for row in charged:
                values, target = logits[start + row, k].tolist(), batch["labels"][start + row].tolist()
                log_sum = math.log(sum(map(math.exp, values)))
                wanted += sum(y * (log_sum - value) for y, value in zip(target, values, strict=True)) / len(charged)
        assert trainer.look_ahead.meta_loss(half).item() == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("method", ["directional", "forward", "exact"])
@pytest.mark.parametrize("batch_size", [3, 8])
def test_frozen_backbone(tmp_path, batch_size, method):
    # One sample may be charged at the last exit, which is frozen: then the meta loss has no gradient.
    model = bert()
    model.newly_initialized = frozenset(name for name, _ in model.named_parameters() if name.startswith("exit_heads"))
    before = copy.deepcopy(model.state_dict())
    settings = {"freeze_backbone": True, "max_steps": 3, "per_device_train_batch_size": batch_size}
    make_trainer(model, tmp_path, scheme_args={"meta_gradient": method}, **settings).train()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) != name.startswith("exit_heads"), name


def test_logs_what_w_has_learned(tmp_path):
    trainer = make_trainer(bert(), tmp_path, size=16, max_steps=2)
    seen = []
    sample_weights = trainer.sample_weights

    def record(losses, exit_logits):
        weights = sample_weights(losses, exit_logits)
        seen.append((weights, losses))
        return weights

    trainer.sample_weights = record
    trainer.train()
    weights, losses = (torch.cat(part) for part in zip(*seen, strict=True))
    entry = next(entry for entry in trainer.state.log_history if "l2w_weight_std" in entry)
    assert entry["step"] == 2
    assert entry["l2w_weight_std"] == pytest.approx(weights.std(unbiased=False).item(), rel=1e-4)
    for k in range(3):
        assert entry[f"l2w_weight_exit{k + 1}"] == pytest.approx(weights[:, k].mean().item(), rel=1e-5)
        correlation = torch.corrcoef(torch.stack([weights[:, k], losses[:, k]]))[0, 1].item()
        assert entry[f"l2w_correlation_exit{k + 1}"] == pytest.approx(correlation, rel=1e-3, abs=1e-4)
    assert entry["l2w_meta_loss"] > 0
    assert (tmp_path / "l2w_weights.png").read_bytes()[:4] == b"\x89PNG"
    table = json.loads((tmp_path / "l2w_weights.json").read_text())
    assert sum(map(sum, table["counts"])) == 16 * 3


def test_weight_map(tmp_path):
    losses = torch.tensor([[1e-5, 0.5], [100.0, 0.5], [0.5, 0.02]], dtype=torch.float64)
    weights = torch.tensor([[0.5, 1.0], [1.5, 2.0], [0.7, 0.1]], dtype=torch.float64)
    save_weight_map(weights, losses, str(tmp_path))
    table = json.loads((tmp_path / "l2w_weights.json").read_text())
    cells = {
        (k, index): mean
        for k, row in enumerate(table["mean_weight"])
        for index, mean in enumerate(row)
        if mean is not None
    }
    edges = table["loss_edges"]
    of_half = next(index for index in range(len(edges) - 1) if edges[index] <= 0.5 < edges[index + 1])
    of_small = next(index for index in range(len(edges) - 1) if edges[index] <= 0.02 < edges[index + 1])
    expected = {(0, 0): 0.5, (0, len(edges) - 2): 1.5, (0, of_half): 0.7, (1, of_half): 1.5, (1, of_small): 0.1}
    assert cells == pytest.approx(expected)


@pytest.mark.parametrize(
    "name,value",
    [
        ("wpn_hidden_size", 0),
        ("wpn_num_layers", 0),
        ("meta_learning_rate", 0.0),
        ("meta_weight_decay", -1.0),
        ("meta_lr_scheduler_type", "step"),
        ("meta_interval", 0),
        ("meta_epsilon", 1.5),
        ("meta_target_p", 0.0),
        ("meta_input", "labels"),
        ("meta_constraint", "row"),
        ("meta_gradient", "backward"),
    ],
)
def test_bad_settings_name_their_flag(name, value):
    with pytest.raises(ExitConfigurationError, match=f"--{name} "):
        MetaWeightedArguments(**{name: value})


def test_what_cannot_be_trained_is_refused_before_training(tmp_path):
    assert get_scheme("l2w") is MetaWeightedExitTrainer
    with pytest.raises(ExitConfigurationError, match="--optim .*adafactor"):
        make_trainer(bert(), tmp_path, optim="adafactor")
    for model in (bert(problem_type="multi_label_classification"), bert(problem_type="regression")):
        with pytest.raises(ExitConfigurationError, match="--method l2w"):
            make_trainer(model, tmp_path)
    with pytest.raises(ExitConfigurationError, match="--method l2w.*float32"):
        make_trainer(bert().bfloat16(), tmp_path)
    with pytest.raises(ExitConfigurationError, match="--meta_gradient exact.*--gradient_checkpointing"):
        make_trainer(bert(), tmp_path, scheme_args={"meta_gradient": "exact"}, gradient_checkpointing=True)
    model = bert()
    for name in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
        if name in EarlyExitTrainingArguments.__dataclass_fields__:
            with pytest.raises(ExitConfigurationError, match=r"use_reentrant.*checkpointing_kwargs"):
                make_trainer(model, tmp_path, **{name: {"use_reentrant": True}})
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ExitConfigurationError, match="flash_attention_2.*--attn_implementation sdpa"):
        make_trainer(model, tmp_path)
    model = bert()
    for optimizer in (
        torch.optim.Adam(model.parameters()),
        torch.optim.AdamW(model.parameters(), amsgrad=True),
        torch.optim.SGD(model.parameters(), maximize=True),
    ):
        with pytest.raises(ExitConfigurationError, match="--optim"):
            make_trainer(model, tmp_path, optimizers=(optimizer, None))
    trainer = make_trainer(bert(), tmp_path)
    trainer.train_dataset.columns["labels"] = torch.rand(40, NUM_LABELS)  # inferred as multi-label
    with pytest.raises(ExitConfigurationError, match="--method l2w"):
        trainer.train()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["directional", "forward"])
def test_memory_is_flat_over_500_steps(tmp_path, method):
    """What breaks: a graph, a copy or a log entry is kept at every step.."""
    peaks = {}

    class Peaks(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step in (100, 600):
                peaks[state.global_step] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10

    settings = {"max_steps": 600, "logging_strategy": "no", "per_device_train_batch_size": 4}
    trainer = make_trainer(bert(), tmp_path, scheme_args={"meta_gradient": method}, **settings)
    trainer.add_callback(Peaks())
    trainer.train()
    assert peaks[600] - peaks[100] < 5
