"""Look-aheads on static tensors give what the others give; all but capture and replay runs on a CPU."""

import gc
import logging
from weakref import WeakSet

import pytest
import torch
from l2w_trainers import Reads, bert, image_batch, make_trainer, text_batch, vit, warmed_up

from een_hf.training.l2w import devices, programs


FUSED = {"optim": "adamw_torch_fused", "scheme_args": {"meta_gradient": "forward", "meta_cuda_graphs": True}}
PLAIN = {"optim": "adamw_torch_fused", "scheme_args": {"meta_gradient": "forward"}}


def run(trainer, batches):
    """Meta gradients and losses of look-aheads with a real step after each, and the programs that ran."""
    found, ran, gradient, kept = [], [], trainer.look_ahead.gradient, trainer.look_ahead.programs

    def record(train, meta):
        weights, slopes, meta_loss = gradient(train, meta)
        found.append((weights.detach().clone(), slopes.clone(), meta_loss.clone()))
        return weights, slopes, meta_loss

    def note(program):
        ran.extend([program] if program else [])
        return program

    trainer.look_ahead.gradient = record
    if kept:
        find = kept.find
        kept.find = lambda *parts: note(find(*parts))
    for step, batch in enumerate(batches):
        torch.manual_seed(step)
        trainer.meta_step(batch)
        trainer.model(**batch, early_exit=False).loss.backward()
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        trainer.model.zero_grad()
    trainer.look_ahead.gradient = gradient
    if kept:
        kept.find = find
    state = {f"W.{name}": value for name, value in trainer.weight_network.state_dict().items()}
    return found, {**state, **trainer.model.state_dict()}, ran


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kind", ["bert", "vit", "meta batches"])
def test_programs_give_what_plain_look_aheads_give(tmp_path, kind, bf16):
    """Another learning rate than the step's, inputs of the batch before, other dropout masks, or another half."""
    make_model, make_batch = (vit, image_batch) if kind == "vit" else (bert, text_batch)
    drawn = {"meta_batch_size": 12} if kind == "meta batches" else {}
    # A batch of another size, and halves of different size, whose programs come in between.
    batches = [make_batch(size, 10 + step) for step, size in enumerate((8, 8, 8, 5, 8, 5, 8, 5, 8))]
    if drawn:  # and of another length than the meta batches
        batches = [text_batch(size, step, length=size + 1) for step, size in enumerate((8, 8, 8, 5, 8, 5, 8, 5, 8))]
    results = []
    for settings in (PLAIN, FUSED):
        settings = {**settings, "scheme_args": {**settings["scheme_args"], **drawn}}
        trainer = warmed_up(make_model(), tmp_path, [make_batch(8, 1)], bf16=bf16, **settings)
        results.append(run(trainer, batches))
    (found, state, plain), (same, same_state, ran) = results
    assert not plain and len(ran) >= 6 and len(set(ran)) >= (2 if drawn else 3)
    # Learning rates are float32 in programs; half precision makes more of that.
    limits = {"rtol": 2e-2, "atol": 2e-3} if bf16 else {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(same, found, **limits)
    torch.testing.assert_close(same_state, state, **limits)


def test_programs_follow_tensors_that_are_replaced(tmp_path):
    """A graph that reads the weights of before answers for another network."""
    results = []
    for settings in (PLAIN, FUSED):
        trainer = warmed_up(vit(), tmp_path, [image_batch(8, 1)], **settings)
        batches = [image_batch(8, 10 + step) for step in range(3)]
        *_, before = run(trainer, batches)
        trainer.model.load_state_dict(vit(seed=7).state_dict(), assign=True)
        for group in trainer.optimizer.param_groups[1:]:
            group["params"] = []
        trainer.optimizer.param_groups[0]["params"] = list(trainer.model.parameters())
        trainer.optimizer.state.clear()
        results.append(run(trainer, batches))
    torch.testing.assert_close(results[1][:2], results[0][:2], rtol=1e-3, atol=1e-4)
    assert before and results[1][2] and not set(before) & set(results[1][2])


def test_programs_share_memory_and_are_few(tmp_path, monkeypatch):
    """One set of tensors for all directions; shapes without end do not fill the memory."""
    monkeypatch.setattr(programs, "MAX_PROGRAMS", 4)
    trainer = warmed_up(vit(), tmp_path, [image_batch(8, 1)], **FUSED)
    *_, ran = run(trainer, [image_batch(size, 1) for size in (4, 4, 6, 6, 8, 8, 4, 4)])
    directions = {id(part) for program in ran if program.found.direction for part in program.found.direction}
    assert len(directions) <= len(list(trainer.model.parameters()))
    made, left = len(set(ran)), WeakSet(ran)
    ran.clear()
    gc.collect()
    assert made > 4 >= len(left)


def test_programs_wait_for_no_device(tmp_path, monkeypatch):
    """Nothing that is captured may read a value."""
    monkeypatch.setattr(devices, "on_host", lambda tensor: False)
    for model, make_batch in ((bert(), text_batch), (vit(), image_batch)):
        trainer = warmed_up(model, tmp_path, [make_batch(8, 1)], **FUSED)
        *_, ran = run(trainer, [make_batch(8, 2)] * 6)
        for program in set(ran):
            program.run(*program.parts)
            with Reads() as reads:
                program.run(*program.parts)
            assert set(reads.seen) <= {"_local_scalar_dense"}
            # On a CPU the fused step reads the learning rate, which is a tensor there.
            assert len(reads.seen) <= 2 * len(program.rates)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"optim": "sgd"}, "--optim is not adamw_torch_fused"),
        ({"optim": "adamw_torch"}, "--optim is not adamw_torch_fused"),
        ({"optim": "adamw_torch_fused", "gradient_checkpointing": True}, "--gradient_checkpointing"),
        ({"optim": "adamw_torch_fused", "scheme_args": {"meta_gradient": "directional"}}, "not `forward`"),
    ],
)
def test_where_no_graph_is_possible_a_warning_says_why_once(tmp_path, caplog, settings, words):
    scheme_args = {"meta_gradient": "forward", **settings.pop("scheme_args", {}), "meta_cuda_graphs": True}
    trainer = make_trainer(vit(), tmp_path, scheme_args=scheme_args, **settings)
    trainer.create_optimizer_and_scheduler(10)
    trainer.model.train()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            trainer.meta_step(image_batch(8, 1))
    warnings = [record.getMessage() for record in caplog.records if "--meta_cuda_graphs" in record.getMessage()]
    assert len(warnings) == 1 and words in warnings[0]


def test_a_capture_that_fails_is_said_once_and_training_goes_on(tmp_path, caplog):
    trainer, other = (warmed_up(vit(), tmp_path, [image_batch(8, 1)], **settings) for settings in (FUSED, PLAIN))
    kept = trainer.look_ahead.programs
    find = kept.find

    class Refused:
        """A program that no graph can be captured of."""

        def run(self, train, meta):
            kept.fail(RuntimeError("operation not permitted"))

    kept.find = lambda *halves: find(*halves) and Refused()
    batches = [image_batch(8, 10 + step) for step in range(5)]
    with caplog.at_level(logging.WARNING):
        found = run(trainer, batches)
    torch.testing.assert_close(found[:2], run(other, batches)[:2], rtol=0, atol=0)
    assert len(found[2]) == 1 and "operation not permitted" in caplog.text
