"""The gradient of the meta loss, against double backward, numerical differentiation and other precisions."""

import copy
import math

import pytest
import torch
from l2w_trainers import ADAMW, SGD, Reads, bert, charged_by_loop, image_batch, tensors_of, text_batch, vit, warmed_up

from een_hf.training.l2w import (
    LookAhead,
    charging,
    devices,
)


def assert_close(ours, exact, cosine, error):
    ours, exact = ours.double().flatten(), exact.double().flatten()
    assert torch.cosine_similarity(ours, exact, dim=0) > cosine
    assert (ours - exact).norm() < error * exact.norm()


VOCABULARY = 30_000
most_confident_first = charging.most_confident_first


def meta_gradients(trainer, train, meta, method, seed):
    """dL_meta/dw and the gradient of all of W, for one random state."""
    trainer.scheme_args = copy.copy(trainer.scheme_args)
    trainer.scheme_args.meta_gradient = method
    torch.manual_seed(seed)
    weights, gradient, _ = trainer.meta_gradient(train, meta)
    of_network = torch.autograd.grad(weights, list(trainer.weight_network.parameters()), gradient)
    return gradient, torch.cat([part.flatten() for part in of_network])


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
def test_the_gradient_is_exact_for_parts_of_other_sizes_and_lengths(tmp_path, optimizer):
    seen = [text_batch(16, 100 + step) for step in range(25)]
    trainer = warmed_up(bert(), tmp_path, seen, exit_loss_weights="linear", **optimizer)
    assert_close_gradients(trainer, lambda seed: (text_batch(5, seed, length=7), text_batch(14, 50 + seed)))


@pytest.mark.parametrize("optimizer", [SGD, ADAMW], ids=["sgd", "adamw"])
def test_the_gradient_is_exact_on_vit(tmp_path, optimizer):
    trainer = warmed_up(vit(), tmp_path, [image_batch(16, 100 + step) for step in range(25)], **optimizer)
    assert_close_gradients(trainer, lambda seed: (image_batch(8, seed), image_batch(8, 50 + seed)))


@pytest.mark.parametrize("optimizer", [SGD, ADAMW], ids=["sgd", "adamw"])
@pytest.mark.parametrize("sizes", [(1, 1), (1, 2), (2, 1)])
def test_the_gradient_is_exact_on_few_images(tmp_path, optimizer, sizes):
    # Of one image, the gradients of the class token and of the positions are one piece of memory.
    trainer = warmed_up(vit(), tmp_path, [image_batch(16, 100 + step) for step in range(5)], **optimizer)
    # Their losses bend: at the usual length some are 9e-3 off under torch 2.11.
    trainer.look_ahead.step_norm = 0.003
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
@pytest.mark.parametrize("size, length", [(4, 10), (9, 7)])
def test_exact_gradient_is_the_numerical_one(tmp_path, optimizer, size, length):
    batches = [text_batch(8, 100 + step) for step in range(5)]
    model = bert().double()
    # The meta half's rows exit where they are charged; where it draws all of its masks before that, they are those of
    # the plain forward pass below.
    for part in (*model.backbone_layers[1:], *model.exit_head_modules(1), model.dropout):
        for module in part.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    trainer = warmed_up(
        model, tmp_path, batches, max_grad_norm=0.1, scheme_args={"meta_gradient": "exact"}, **optimizer
    )
    train, meta = text_batch(4, 1), text_batch(size, 2, length=length)
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
        return [(id(t), t.data_ptr()) for t in tensors], table.padding_idx

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
    tokens = torch.arange(len(table.weight))
    assert torch.equal(table(tokens), table.weight)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(parameter.grad is None for parameter in model.parameters())
    for old, new in zip(tensors_of(optimizer_before), tensors_of(trainer.optimizer.state_dict()), strict=True):
        assert torch.equal(old, new)
