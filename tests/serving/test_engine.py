"""The asynchronous engine answers each row as `model(...)` does that row alone, whatever happens to other requests."""

import asyncio
import copy
import gc
import io
import random
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from factory import tiny_model
from recorded_graphs import record_graphs

from een_hf import ExitConfigurationError, ExitPolicy, predict
from een_hf.inference.runner import input_names
from een_hf.inference.slots import Step
from een_hf.serving import AsyncExitEngine, EngineBusyError, EngineClosedError, EngineObserver
from een_hf.serving.stages import Request, Row, StageWorker

from .conftest import make_bert, random_texts


@torch.no_grad()
def expected(served, example, policy=True):
    """(logits, 0-based exit) of one example, by the model's own forward."""
    if isinstance(example, (str, tuple)):
        pair = (example,) if isinstance(example, str) else example
        inputs = served.processor(*pair, return_tensors="pt", truncation=True, max_length=40)
    elif isinstance(example, dict):
        inputs = {name: torch.as_tensor(value)[None] for name, value in example.items()}
    else:
        inputs = served.processor(example, return_tensors="pt")
    outputs = served.model(**inputs, early_exit=policy)
    exit_index = served.model.num_exits - 1 if outputs.exit_index is None else int(outputs.exit_index)
    return outputs.logits[0], exit_index


def assert_answers(served, examples, answers, policy=True):
    for number, example in enumerate(examples):
        logits, exit_index = expected(served, example, policy)
        assert int(answers.exit_index[number]) == exit_index, example
        torch.testing.assert_close(answers.logits[number], logits, atol=1e-5, rtol=1e-5)


class Log(EngineObserver):
    def __init__(self):
        self.steps, self.num_dropped, self.num_refused = [], 0, 0

    def stage_ran(self, exit_index, num_rows, waited):
        self.steps.append((exit_index, num_rows))

    def dropped(self, num_rows):
        self.num_dropped += num_rows

    def refused(self, num_rows):
        self.num_refused += num_rows


def other_policies(model):
    """Other thresholds, temperatures, a criterion with a memory, an exit less, nobody exits early."""
    first, second, _ = model.config.exit_policy["thresholds"]
    return [
        True,
        {"criterion": "confidence", "thresholds": [second, first, 0.0]},
        {"criterion": "confidence", "thresholds": [0.7, 0.8, 0.0], "temperatures": [2.0, 3.0, 1.0]},
        {"criterion": "patience", "thresholds": [1.0, 1.0, 0.0]},
        ExitPolicy("margin", [2.0, 0.5, 0.0]),
        False,
    ]


@pytest.mark.parametrize("aggregation", ["none", "boosted"])
@pytest.mark.parametrize("cuda_graphs", [None, True, "recorded"])
def test_any_mix_of_requests_policies_and_lengths_is_answered_as_by_the_model(
    tmp_path, cuda_graphs, aggregation, monkeypatch
):
    """What breaks: a row gets another's answer, another's thresholds, or sees the padding of its batch."""
    if cuda_graphs == "recorded":
        record_graphs(monkeypatch)
    served = make_bert(tmp_path, exit_aggregation=aggregation)
    rng, texts = random.Random(0), random_texts(150, longest=36, seed=1)
    policies = other_policies(served.model)
    requests = []
    while texts:
        count = rng.choice([1, 1, 1, 2, 7])
        requests.append((texts[:count], rng.choice(policies)))
        texts = texts[count:]

    async def ask(engine, examples, policy, delay):
        await asyncio.sleep(delay)
        return await engine.predict(examples, policy=None if policy is True else policy)

    async def main():
        async with AsyncExitEngine(served.model, served.processor, max_rows=5, cuda_graphs=cuda_graphs) as engine:
            tasks = [ask(engine, *request, rng.random() / 20) for request in requests]
            return await asyncio.gather(*tasks)

    exits = Counter()
    for (examples, policy), answers in zip(requests, asyncio.run(main()), strict=True):
        assert_answers(served, examples, answers, policy)
        exits.update(answers.exit_index.tolist())
    assert len(exits) == 3  # it was a mix


@pytest.mark.parametrize("cuda_graphs", [None, True])
def test_images_pairs_and_rows_of_model_inputs(bert, vit, cuda_graphs):
    left_padded = {"input_ids": [0, 0, 2, 5, 6, 3], "attention_mask": [0, 0, 1, 1, 1, 1]}
    examples = ["a b", ("a b", "c"), ("d", "e f"), left_padded, {"input_ids": [2, 9, 3]}]

    async def main(served, examples):
        async with AsyncExitEngine(served.model, served.processor, cuda_graphs=cuda_graphs) as engine:
            return await engine.predict(examples)

    assert_answers(bert, examples, asyncio.run(main(bert, examples)))
    answers = asyncio.run(main(vit, vit.images))
    assert_answers(vit, vit.images, answers)
    assert len(set(answers.exit_index.tolist())) == 3
    tempered = torch.softmax(answers.logits, -1).amax(-1)
    torch.testing.assert_close(answers.confidence, tempered)


def test_no_request_is_answered_by_weights_that_are_gone(bert, monkeypatch):
    """A captured program reads the tensors that the model had when it was captured."""
    record_graphs(monkeypatch)
    served, texts = SimpleNamespace(**{**vars(bert), "model": copy.deepcopy(bert.model)}), random_texts(12, seed=8)

    async def main():
        async with AsyncExitEngine(served.model, served.processor, max_rows=4, cuda_graphs=True) as engine:
            for factor in (1.0, 0.8, 1.1):
                tensors = {name: factor * tensor for name, tensor in served.model.state_dict().items()}
                served.model.load_state_dict(tensors, assign=factor != 1.1)  # replaced, then changed in place
                assert_answers(served, texts, await engine.predict(texts))

    asyncio.run(main())


def rows_of(served, texts, policy=None, future=None, arrived=0.0):
    loop = asyncio.new_event_loop()
    request = Request(None, policy or served.model.get_exit_policy(), future or loop.create_future(), True, arrived)
    loop.close()
    for text in texts:
        encoded = {n: torch.tensor(v) for n, v in served.processor(text).items() if n in input_names(served.model)}
        length = len(encoded["input_ids"])
        request.rows.append(Row(request, encoded, -(-length // 4), length))
    return request.rows


def never(model, exit_index):
    """Everybody exits at this exit, the only one that is evaluated before the last."""
    thresholds = [1e30] * model.num_exits
    thresholds[exit_index] = -1e30
    return ExitPolicy("confidence", thresholds)


def test_survivors_of_several_requests_share_the_deeper_stages(bert):
    """What breaks: each request runs through the stages by itself."""
    log = Log()
    worker = StageWorker(bert.model, 8, max_wait=100.0, observer=log)
    policy = ExitPolicy("confidence", [0.999999, 0.999999, 0.0])
    for number in range(4):
        worker.add(rows_of(bert, ["a b c"], policy, arrived=number))
    assert worker.num_waiting() == 4
    while worker.step():
        pass
    assert log.steps == [(0, 4), (1, 4), (2, 4)]
    # Ten rows, eight fit: the two others run while the eight wait, and join them as far as there is room.
    log.steps.clear()
    worker.add(rows_of(bert, ["a b c"] * 10, policy))
    while worker.step():
        pass
    assert sum(count for exit_index, count in log.steps if exit_index == 2) == 10
    assert max(count for _, count in log.steps) == 8


def test_survivors_wait_for_no_longer_than_they_may_while_new_rows_keep_coming(bert):
    """What breaks: under a stream of new rows those that have started are never finished."""
    policy = ExitPolicy("confidence", [0.999999, 0.999999, 0.0])
    for max_wait, then in ((100.0, (0, 1)), (0.0, (1, 1))):
        log = Log()
        worker = StageWorker(bert.model, 8, max_wait, observer=log)
        worker.add(rows_of(bert, ["a b c"], policy))
        worker.step()
        worker.add(rows_of(bert, ["a b c d e f g h i j"], policy, arrived=1.0))
        worker.step()
        assert log.steps == [(0, 1), then]
        # A full list goes before new rows, the deepest first.
    log = Log()
    worker = StageWorker(bert.model, 2, 100.0, observer=log)
    worker.add(rows_of(bert, ["a b c"] * 2, policy))
    worker.step()
    worker.add(rows_of(bert, ["a b c"], policy, arrived=1.0))
    worker.step()
    assert log.steps == [(0, 2), (1, 2)]


def test_texts_of_other_lengths_join_where_their_padding_costs_less_than_a_step(bert):
    """What breaks: rows of every length run by themselves, or short ones beside the longest."""
    policy = ExitPolicy("confidence", [0.999999, 0.999999, 0.0])
    for texts, wanted in (
        (["a b c"] * 2 + ["a b c d e f g h"] * 2, [4, 4, 4]),  # 5 tokens of padding for each of two rows
        (["a b c"] * 3 + ["a b c d e f g h i j k l"] * 2, [2, 2, 2, 3, 3, 3]),  # 9 for each of three
        (["a b c"] * 2 + ["a b c d e f g h"] * 7, [2, 2, 2, 7, 7, 7]),  # nine rows, eight fit
        (["a b c"] * 2 + ["a b c d e f g h"] * 6, [8, 8, 8]),
    ):
        log = Log()
        worker = StageWorker(bert.model, 8, max_wait=100.0, observer=log)
        worker.add(rows_of(bert, texts, policy))
        while worker.step():
            pass
        assert sorted(count for _, count in log.steps) == wanted


def test_no_more_rows_are_in_flight_than_there_are_slots(bert):
    """What breaks: new rows of ever other lengths start while those before wait, and fill the memory."""
    for cuda_graphs in (None, True):
        worker, most = StageWorker(bert.model, 2, 100.0, EngineObserver(), cuda_graphs=cuda_graphs), 0
        policy = ExitPolicy("confidence", [0.999999, 0.999999, 0.0])
        for number in range(30):
            worker.add(rows_of(bert, [" ".join("abcdefghij"[: 1 + number % 10] * (1 + number % 3))], policy))
        while worker.step():
            most = max(most, worker.num_in_flight())
        assert 2 < most <= 8 and len(worker.finished) == 30  # 2 for each of 3 stages, and 2 that start
        assert worker.num_in_flight() == 0
    worker, most = StageWorker(bert.model, 8, 100.0, EngineObserver()), 0
    for length in range(2, 38, 8):  # 7 rows each, which wait for an eighth that never comes
        worker.add(rows_of(bert, [" ".join("a" * length)] * 7, policy))
    while worker.step():
        most = max(most, worker.num_in_flight())
    assert 8 < most <= 32


@pytest.mark.parametrize("cuda_graphs", [None, True])
def test_a_request_that_cannot_be_answered_harms_no_other(bert, cuda_graphs):
    """What breaks: one bad row fails the batch that it shares, or the engine."""
    bad = [
        ({"input_ids": [2, 5, 3], "position_ids": [0, 999, 2]}, RuntimeError),  # the whole batch fails
        ({"input_ids": [2, 999, 3]}, ExitConfigurationError),
        ({"input_ids": [2, 5, 3], "token_type_ids": [0, -1, 0]}, ExitConfigurationError),
        ({"input_ids": [2] * 50}, ExitConfigurationError),
        ({"input_ids": []}, ExitConfigurationError),
        ({"input_ids": [[2, 3]]}, ExitConfigurationError),
        ({"input_ids": [2, 5, 3], "attention_mask": [1, 1]}, ExitConfigurationError),
        ({"input_ids": [2, 5, 3], "attention_mask": [[1, 1, 1]] * 3}, ExitConfigurationError),
        ({"pixel_values": [2]}, ExitConfigurationError),
        (7, ExitConfigurationError),
        (("a", "b", "c"), ExitConfigurationError),
    ]
    texts = random_texts(40, seed=2)

    async def main():
        async with AsyncExitEngine(bert.model, bert.processor, max_rows=16, cuda_graphs=cuda_graphs) as engine:
            good = [engine.predict([text]) for text in texts[:20]]
            failing = [engine.predict(["a", example, "b"]) for example, _ in bad]
            more = [engine.predict([text]) for text in texts[20:]]
            found = await asyncio.gather(*good, *failing, *more, return_exceptions=True)
            with pytest.raises(ExitConfigurationError, match="at least one"):
                await engine.predict([])
            with pytest.raises(ExitConfigurationError, match="2 thresholds"):
                await engine.predict(["a"], policy={"criterion": "confidence", "thresholds": [0.5, 0.5]})
            return found, await engine.predict(texts), engine.num_waiting

    found, after, waiting = asyncio.run(main())
    assert waiting == 0
    for (_, kind), error in zip(bad, found[20 : 20 + len(bad)], strict=True):
        assert isinstance(error, kind), error
    for text, answers in zip(texts, found[:20] + found[20 + len(bad) :], strict=True):
        assert_answers(bert, [text], answers)
    assert_answers(bert, texts, after)


@pytest.mark.parametrize("kind", ["deberta", "modernbert"])
@pytest.mark.parametrize(("pooling", "refused"), [("cls", True), ("mean", False)])
def test_padding_on_the_left_that_changes_answers_is_refused(pooling, refused, kind):
    """What breaks: a first token of padding sees all padding, also that for the longer texts of others.

    In DeBERTa, and in eager attention where the window of a layer holds nothing else.
    """
    settings = {"exit_pooling": pooling, "last_exit_pooling": pooling, "initializer_range": 0.5}
    if kind == "modernbert":
        settings |= {"local_attention": 2, "attn_implementation": "eager", "pad_token_id": 0, "bos_token_id": 2}
        settings |= {"eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
    model = tiny_model(kind, max_position_embeddings=40, **settings).eval()
    padded = {"input_ids": [0, 0, 2, 5, 6, 3], "attention_mask": [0, 0, 1, 1, 1, 1]}
    rows = [padded, {"input_ids": [2, 5, 6, 3, 7, 8, 9, 10], "attention_mask": [1] * 8}]

    async def main():
        async with AsyncExitEngine(model, length_step=16) as engine:
            return await engine.predict(rows)

    if refused:
        with pytest.raises(ExitConfigurationError, match="pad on the right"):
            asyncio.run(main())
        with pytest.raises(ExitConfigurationError, match="pad on the right"):
            predict(model, rows)
        return
    served = SimpleNamespace(model=model)
    assert_answers(served, rows, asyncio.run(main()))
    assert_answers(served, rows, predict(model, rows))


def test_images_of_too_many_pixels_are_refused(vit):
    """What breaks: a small file that holds a huge image fills the memory, or one at the limit is refused."""
    file = io.BytesIO()
    vit.images[0].save(file, "png")  # 8 x 8

    async def ask(limit):
        async with AsyncExitEngine(vit.model, vit.processor, max_pixels=limit) as engine:
            return await engine.predict([file.getvalue()])

    assert_answers(vit, vit.images[:1], asyncio.run(ask(64)))
    with pytest.raises(ExitConfigurationError, match="8 x 8 pixels, more than 63"):
        asyncio.run(ask(63))


def test_answered_requests_are_forgotten(bert):
    """What breaks: a server keeps the texts of all its users, and its memory grows until it ends."""

    async def main():
        async with AsyncExitEngine(bert.model, bert.processor) as engine:
            for text in random_texts(6):
                await engine.predict([text])
            loop = asyncio.get_running_loop()
            gc.collect()  # a request and its rows name each other
            return sum(isinstance(o, Request) and o.future.get_loop() is loop for o in gc.get_objects())

    assert asyncio.run(main()) <= 1  # the worker holds the last one while it waits


def test_cancelled_rows_are_removed_at_the_next_stage(bert):
    """What breaks: clients that went away cost as much as those that wait."""
    log = Log()
    worker = StageWorker(bert.model, 8, max_wait=100.0, observer=log)
    policy, loop = ExitPolicy("confidence", [0.999999, 0.999999, 0.0]), asyncio.new_event_loop()
    staying, going = loop.create_future(), loop.create_future()
    worker.add(rows_of(bert, ["a b c"] * 2, policy, staying))
    worker.add(rows_of(bert, ["c b a"] * 3, policy, going))
    worker.step()
    going.cancel()
    while worker.step():
        pass
    loop.close()
    assert log.steps == [(0, 5), (1, 2), (2, 2)]
    assert log.num_dropped == 3 and worker.num_through == 5 and worker.num_in_flight() == 0
    assert [request.future for request, _ in worker.finished] == [staying]


def test_a_full_queue_refuses_and_a_deadline_ends_a_request(bert):
    log = Log()

    async def main():
        async with AsyncExitEngine(bert.model, bert.processor, max_waiting=3, observer=log) as engine:
            first = asyncio.create_task(engine.predict(["a"] * 3))
            await asyncio.sleep(0)
            with pytest.raises(EngineBusyError) as busy:
                await engine.predict(["b"])
            assert busy.value.retry_after >= 1
            with pytest.raises(ExitConfigurationError, match="at most 3"):
                await engine.predict(["b"] * 4)
            await first
            with pytest.raises(asyncio.TimeoutError):
                await engine.predict(["a"], timeout=0)
            while engine.num_waiting:
                await asyncio.sleep(0.001)
            return await engine.predict(["b"] * 3)

    assert_answers(bert, ["b"] * 3, asyncio.run(main()))
    assert log.num_refused == 1


def test_stopping_answers_what_was_accepted(bert):
    texts = random_texts(60, seed=3)

    async def main():
        engine = AsyncExitEngine(bert.model, bert.processor)
        with pytest.raises(EngineClosedError):
            await engine.predict(["a"])
        await engine.start()
        tasks = [asyncio.create_task(engine.predict([text])) for text in texts]
        await asyncio.sleep(0)
        await engine.stop()
        assert all(task.done() for task in tasks) and not engine.is_running
        with pytest.raises(EngineClosedError):
            await engine.predict(["a"])
        return [task.result() for task in tasks]

    for text, answers in zip(texts, asyncio.run(main()), strict=True):
        assert_answers(bert, [text], answers)


def test_an_engine_is_started_once(bert):
    """What breaks: a second start takes the loop from a running engine; one after `stop` leaves a thread for ever."""

    async def main():
        async with AsyncExitEngine(bert.model, bert.processor) as engine:
            answering = asyncio.create_task(engine.predict(["a", "b c"]))
            await asyncio.sleep(0)
            with pytest.raises(EngineClosedError, match="started once"):
                await engine.start()
            answers = await answering
        with pytest.raises(EngineClosedError, match="started once"):
            await engine.start()
        stopped = AsyncExitEngine(bert.model, bert.processor)
        await stopped.stop()
        with pytest.raises(EngineClosedError, match="started once"):
            await stopped.start()
        return answers

    assert_answers(bert, ["a", "b c"], asyncio.run(main()))


def test_nobody_waits_for_ever_when_the_worker_fails(bert):
    """What breaks: a fault outside of a batch ends the thread, and requests hang."""

    class Broken(EngineObserver):
        def stage_ran(self, *_):
            raise RuntimeError("a fault")

    async def main():
        async with AsyncExitEngine(bert.model, bert.processor, observer=Broken()) as engine:
            with pytest.raises(EngineClosedError, match="RuntimeError"):
                await asyncio.wait_for(engine.predict(["a"]), 20)
            assert not engine.is_running

    asyncio.run(main())


@pytest.mark.parametrize(
    "settings", [{"max_rows": 0}, {"max_waiting": 0}, {"length_step": 0}, {"max_wait_ms": float("nan")}]
)
def test_impossible_settings_are_refused(bert, settings):
    with pytest.raises(ExitConfigurationError, match=next(iter(settings))):
        AsyncExitEngine(bert.model, **settings)


@pytest.mark.parametrize("exit_index", [0, 1])
def test_a_step_that_fails_after_it_ran_answers_nothing_wrong(bert, exit_index, monkeypatch):
    """What breaks: rows that a stage has changed run through it again, or keep their slots until none is free."""
    policy = {"criterion": "confidence", "thresholds": [1e30] * (bert.model.num_exits - 1) + [0.0]}
    policy["thresholds"][:2] = [0.9999, 0.9999]
    examples, failures, exits = random_texts(2), [], Step.exits

    def fail_once(step):
        if step.exit_index == exit_index and len(failures) % 2 == 0:
            failures.append("failed")
            raise RuntimeError("the device has failed")
        failures.append("passed") if step.exit_index == exit_index else None
        return exits(step)

    monkeypatch.setattr(Step, "exits", fail_once)

    async def run():
        async with AsyncExitEngine(bert.model, bert.processor, max_rows=2) as engine:
            for _ in range(8):
                try:
                    answers = await engine.predict(examples, policy, timeout=20)
                except RuntimeError as error:
                    assert "device" in str(error)
                else:
                    assert_answers(bert, examples, answers, policy)

    asyncio.run(run())
    assert "failed" in failures
