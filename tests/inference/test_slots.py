"""Examples in flight answer as alone, whatever shares their step, their slot or their program."""

import pytest
import torch
from recorded_graphs import record_graphs

from een_hf import ExitPolicy
from een_hf.inference import ExitEngine, programs
from een_hf.inference import slots as slots_module
from een_hf.inference.slots import Slots

from .test_runner import COUNTS, CRITERIA, DEVICES, TEXT, anytime, make_inputs, make_model, midway_policy, on


def make_batches(model, sizes, longest=30):
    """Batches (ids, inputs) of different length and padding."""
    batches, first = [], 0
    for number, size in enumerate(sizes):
        padding, length = ("right", "left", "none")[number % 3], 3 + (longest - 3) * (number % 4) // 3
        batches.append((torch.arange(first, first + size), make_inputs(model, size, length, number, padding)))
        first += size
    return batches


def assert_as_anytime(engine, model, batches, tolerance=2e-5):
    """Each example is answered once, at the first exit whose score reaches its threshold, by that exit's logits."""
    policy, taken = model.get_exit_policy(), {}
    for ids, logits, exit_index in engine.run((ids, on(model, inputs)) for ids, inputs in batches):
        for place, number in enumerate(ids.tolist()):
            assert number not in taken
            taken[number] = exit_index, logits[place]
    every = torch.cat([anytime(model, inputs) for _, inputs in batches])
    assert sorted(taken) == list(range(len(every)))
    scores = policy.scores(every.float()).tolist()
    for number, (exit_index, logits) in taken.items():
        row = scores[number]
        wanted = next(k for k, score in enumerate(row) if k == len(row) - 1 or score >= policy.thresholds[k])
        assert exit_index == wanted
        assert (logits - every[number, wanted]).abs().max() <= tolerance
    return {exit_index for exit_index, _ in taken.values()}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("aggregation", ["none", "boosted"])
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_static_programs_equal_anytime(kind, criterion, aggregation, device):
    """A surplus row that is kept, columns of the example before in this slot, a state of another row."""
    model = make_model(kind, device, exit_aggregation=aggregation)
    temperatures = None if criterion in COUNTS else [0.7, 1.4, 1.1, 1.0]
    model.set_exit_policy(midway_policy(model, make_inputs(model, 70), criterion, temperatures=temperatures))
    engine = ExitEngine(model, 9, cuda_graphs=True)
    seen = assert_as_anytime(engine, model, make_batches(model, (9, 1, 9, 2, 9, 9, 20, 1, 9)))
    seen |= assert_as_anytime(engine, model, make_batches(model, (2, 9)))
    assert aggregation == "boosted" or len(seen) >= (2 if criterion in COUNTS else 3)
    assert engine.num_in_flight == 0


@pytest.mark.parametrize("kind", ["bert", "vit", "modernbert"])
def test_recorded_programs_equal_anytime(kind, monkeypatch):
    """What a graph must not do: change examples before it is first used, or keep what Python decided once."""
    record_graphs(monkeypatch)
    settings = {**TEXT, "pad_token_id": 0} if kind == "modernbert" else {}
    model = make_model(kind, **settings)
    model.set_exit_policy(midway_policy(model, make_inputs(model, 70)))
    engine, batches = ExitEngine(model, 8, cuda_graphs=True), make_batches(model, (8, 3, 8, 8, 8, 1))
    for _ in range(2):
        assert len(assert_as_anytime(engine, model, batches)) >= 3


@pytest.mark.parametrize("change", ["in place", "assigned", "module"])
def test_no_answer_by_weights_that_are_gone(change, monkeypatch):
    """A graph reads the tensors that were there when it was captured."""
    record_graphs(monkeypatch)
    model, batches = make_model("bert"), None
    model.set_exit_policy(midway_policy(model, make_inputs(model, 70)))
    engine, batches = ExitEngine(model, 8, cuda_graphs=True), make_batches(model, (8, 8, 5))
    assert_as_anytime(engine, model, batches)
    if change == "in place":
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
    elif change == "assigned":
        other = {name: 0.9 * tensor for name, tensor in model.state_dict().items()}
        model.load_state_dict(other, assign=True)
    else:
        layer = model.bert.encoder.layer[1].output
        layer.dense = torch.nn.utils.skip_init(torch.nn.Linear, layer.dense.in_features, layer.dense.out_features)
        torch.nn.init.normal_(layer.dense.weight)
        torch.nn.init.zeros_(layer.dense.bias)
    assert_as_anytime(engine, model, batches)


def test_texts_share_a_step_with_longer_ones_and_slots_with_those_before():
    """The columns behind a short text hold what a longer one left there: a number that is none poisons others."""
    model = make_model("bert", exit_pooling="mean", last_exit_pooling="mean")
    policy = ExitPolicy("confidence", [2.0, 0.0, 0.0, 0.0])  # who exits there is no matter: all go on once
    model.set_exit_policy(policy)
    for static in (False, True):
        slots = Slots(model, ExitPolicy("confidence", [1.0, 1.0, 0.0, 0.0]), 4, static=static)
        step = slots.start({"inputs_embeds": torch.full((2, 30, model.config.hidden_size), float("nan"))})
        # The next two take the slot of a short text first, then one of these.
        slots.release([*step.slots, *slots.start(make_inputs(model, 1, 4, padding="none")).slots])
        short = make_inputs(model, 2, 4, seed=1, padding="none")
        first = slots.start(short)
        longer = slots.start(make_inputs(model, 1, 20, seed=2, padding="none"))
        assert set(first.slots) & set(step.slots)
        together = slots.run(1, [*longer.slots, *first.slots])
        wanted = anytime(model, short)[:, 1]
        torch.testing.assert_close(together.logits[1:], wanted, atol=1e-5, rtol=1e-5)


def test_slots_grow_while_examples_are_in_flight():
    """More examples, and longer ones, than there was room for: those that wait stay as they are."""
    model = make_model("bert")
    policy = ExitPolicy("patience", [9.0, 9.0, 9.0, 0.0])
    for static in (False, True):
        slots = Slots(model, ExitPolicy("patience", [1.0, 1.0, 1.0, 0.0]), 4, static=static, num_slots=4)
        assert len(slots.exits) > 2 and policy.remembers
        parts = [make_inputs(model, 4, length, seed=2, padding="none") for length in (3, 17, 33)]
        own = ExitPolicy("patience", [1.0, 1.0, 2.0, 0.0])
        steps = [slots.start(parts[0], policies=[own] * 4), *map(slots.start, parts[1:])]
        assert slots.num_in_flight == 12 and len({slot for step in steps for slot in step.slots}) == 12
        for part, step in zip(parts, steps, strict=True):
            wanted = anytime(model, part)
            torch.testing.assert_close(step.logits, wanted[:, slots.exits[0]], atol=1e-5, rtol=1e-5)
            found = slots.run(1, step.slots)
            torch.testing.assert_close(found.logits, wanted[:, slots.exits[1]], atol=1e-5, rtol=1e-5)
            agree = wanted.argmax(-1).diff(dim=1) == 0
            streak = agree[:, : slots.exits[1]].flip(1).int().cumprod(1).sum(1)
            assert found.exits() == (streak >= (2 if part is parts[0] else 1)).tolist()
            assert part is not parts[0] or set(streak.tolist()) == {1, 2}  # the two policies differ there


@pytest.mark.parametrize("static", [False, True])
def test_slots_made_in_inference_mode_are_used_outside_of_it(static):
    """Tensors of inference mode can be written in it only, and those of the other mode must not become such."""
    model = make_model("bert")
    model.set_exit_policy(midway_policy(model, make_inputs(model, 70)))
    with torch.inference_mode():
        engine = ExitEngine(model, 8, cuda_graphs=static)
        assert_as_anytime(engine, model, make_batches(model, (8, 8)))
    assert_as_anytime(engine, model, make_batches(model, (8, 8, 8)))


def test_a_start_that_fails_takes_no_slot():
    """Bad examples that keep their slots fill the engine."""
    model = make_model("bert")
    slots = Slots(model, ExitPolicy("confidence", [0.5, 0.5, 0.5, 0.0]), 4)
    for _ in range(5):
        with pytest.raises(IndexError):
            slots.start({"input_ids": torch.full((3, 4), 500)})
    assert slots.num_in_flight == 0 and slots.num_slots == 8


def test_a_deeper_stage_takes_as_many_as_pay(monkeypatch):
    """Each stage has a size of its own, measured once; what is measured must change nobody's answer."""
    measured = []

    def seconds_of(*of):
        measured.append(programs.seconds_of(*of))
        return measured[-1]

    monkeypatch.setattr(slots_module, "seconds_of", seconds_of)
    model = make_model("vit")
    model.set_exit_policy(midway_policy(model, make_inputs(model, 70)))
    engine, batches = ExitEngine(model, 64, cuda_graphs=True), make_batches(model, (64, 64, 64))
    assert_as_anytime(engine, model, batches)
    stages = 1 + sum(map(model.get_exit_policy().lets_exit, range(model.num_exits - 1)))
    assert len(measured) == 2 * (stages - 1)  # 32 and 64 rows of each deeper stage
    assert_as_anytime(engine, model, batches)
    assert len(measured) == 2 * (stages - 1)


def test_a_call_that_failed_leaves_nothing_to_the_next():
    """What breaks: examples of a call that ended early are answered among those of the next."""
    model = make_model("bert", "cpu")
    model.set_exit_policy(midway_policy(model, make_inputs(model, 70), "confidence"))
    engine, inputs = ExitEngine(model, 4), make_inputs(model, 6, 10, 0, "none")

    def fails_later():
        yield torch.arange(6), inputs
        raise OSError("the next rows cannot be read")

    with pytest.raises(OSError):
        list(engine.run(fails_later()))
    assert_as_anytime(engine, model, [(torch.arange(6), make_inputs(model, 6, 12, 1, "none"))])
    assert engine.num_in_flight == 0
