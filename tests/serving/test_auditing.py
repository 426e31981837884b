"""Audits: rows that run on to the last exit, without a change in what is answered or when."""

import asyncio
import copy
import logging

import pytest
import torch

from een_hf import ExitConfigurationError, ExitPolicy
from een_hf.commands import main as een_hf
from een_hf.serving import AsyncExitEngine, Auditor, EngineObserver
from een_hf.serving.stages import StageWorker

from .conftest import random_texts
from .test_engine import assert_answers, rows_of


@torch.no_grad()
def differences(served, texts):
    """Whether the policy's answer differs from the last exit's, text by text, by the model's own forward."""
    found = []
    for text in texts:
        inputs = served.processor(text, return_tensors="pt")
        answer, last = (served.model(**inputs, early_exit=early).logits.argmax() for early in (True, False))
        found.append(float(answer != last))
    return found


class Log(EngineObserver):
    def __init__(self):
        self.seen = []

    def audited(self, difference, alarm):
        self.seen.append((difference, alarm))


@pytest.mark.parametrize("cuda_graphs", [None, True])
def test_audits_see_what_the_last_exit_answers_and_change_no_answer(bert, cuda_graphs):
    """What breaks: the risk in service is measured on other rows, or by other answers, than those that were given."""
    texts, log = random_texts(120, seed=11), Log()
    auditor = Auditor(bert.model, 1.0, limit=0.999)

    async def main():
        settings = {"observer": log, "auditor": auditor, "cuda_graphs": cuda_graphs}
        async with AsyncExitEngine(bert.model, bert.processor, **settings) as engine:
            answers = []
            for start in range(0, 120, 12):  # in turn, so that the order of the audits is that of the texts
                answers.append(await engine.predict(texts[start : start + 12]))
            await engine.predict(["a b", "c"], policy=False)  # another policy than the one that is audited
        return answers

    for number, answers in enumerate(asyncio.run(asyncio.wait_for(main(), 120))):  # lost rows would be waited for
        assert_answers(bert, texts[12 * number : 12 * number + 12], answers)
    wanted = differences(bert, texts)
    assert 0 < sum(wanted) < 120
    assert [difference for difference, _ in log.seen] == wanted
    assert auditor.monitor.num_values == 120 and auditor.monitor.mean == pytest.approx(sum(wanted) / 120)
    assert auditor.summary()["disagreement"] == auditor.monitor.mean


def test_an_answer_does_not_wait_for_its_audit(bert):
    worker = StageWorker(bert.model, 8, 100.0, EngineObserver(), Auditor(bert.model, 1.0, limit=0.5))
    policy = {"criterion": "confidence", "thresholds": [-1e30, 0.9, 0.0]}
    served = copy.copy(bert)
    served.model = copy.deepcopy(bert.model)
    served.model.set_exit_policy(policy)
    rows = rows_of(served, ["a b c", "d"])
    worker.add(rows)
    while not worker.finished:
        worker.step()
    assert all(row.last_logits is None for row in rows) and worker.num_waiting() == 2
    # The client is gone: the audit goes on, else the slow ones would be missing.
    rows[0].request.future.cancel()
    while worker.step():
        pass
    assert worker.auditor.monitor.num_values == 2 and worker.num_through == 2


def test_an_audit_that_fails_leaves_the_answer_as_it_was(bert):
    """What breaks: rows that were answered count twice, a request that has its answer gets an error too, or later
    audits wait for one that never ends."""
    worker = StageWorker(bert.model, 8, 100.0, EngineObserver(), Auditor(bert.model, 1.0, limit=0.5))
    policy = ExitPolicy("confidence", [-1e30, 0.9, 0.0])
    rows = rows_of(bert, ["a b c", "d"], policy)
    worker.add(rows)
    while not worker.finished:
        worker.step()

    def fail(*_):
        raise RuntimeError("the device has failed")

    hook = bert.model.bert.encoder.layer[-1].register_forward_pre_hook(fail)
    try:
        while worker.step():
            pass
    finally:
        hook.remove()
    assert worker.finished == [(rows[0].request, None)] and worker.num_through == 2
    assert worker.num_in_flight() == worker.auditor.monitor.num_values == 0
    worker.add(rows_of(bert, ["b"], policy))
    while worker.step():
        pass
    assert worker.auditor.monitor.num_values == 1


def test_a_share_of_the_rows_is_audited(bert):
    auditor = Auditor(bert.model, 0.25, limit=0.999, seed=0)

    async def main():
        async with AsyncExitEngine(bert.model, bert.processor, auditor=auditor) as engine:
            await engine.predict(random_texts(400))

    asyncio.run(main())
    assert 60 < auditor.monitor.num_values < 140


def test_an_alarm_ends_early_exits_where_that_is_wanted(bert, caplog):
    """What breaks: a promise that is known to be broken goes on being given."""
    texts = random_texts(150, seed=12)
    for on_alarm, exits in (("full", {2}), ("log", {0, 1, 2})):
        caplog.clear()
        auditor = Auditor(bert.model, 1.0, limit=0.01, on_alarm=on_alarm)

        async def main(auditor=auditor):
            async with AsyncExitEngine(bert.model, bert.processor, auditor=auditor) as engine:
                await engine.predict(texts)
                while not auditor.monitor.alarm:
                    await asyncio.sleep(0.005)
                return await engine.predict(texts)

        with caplog.at_level(logging.WARNING):
            answers = asyncio.run(main())
        assert set(answers.exit_index.tolist()) == exits
        assert len([record for record in caplog.records if "limit of 0.01" in record.getMessage()]) == 1


def test_what_cannot_be_audited(bert, tmp_path):
    model = copy.deepcopy(bert.model)
    certified = {**model.config.exit_policy, "guarantee": {"risk": "consistency", "limit": 0.07, "confidence": 0.9}}
    model.set_exit_policy(certified)
    assert Auditor(model, 0.1).monitor.limit == 0.07 and Auditor(model, 0.1, limit=0.2).monitor.limit == 0.2
    certified["guarantee"]["risk"] = "accuracy_gap"
    model.set_exit_policy(certified)
    for settings, said in (({}, "needs labels"), ({"rate": 0}, "between 0 and 1"), ({"on_alarm": "stop"}, "on_alarm")):
        with pytest.raises(ExitConfigurationError, match=said):
            Auditor(model, **{"rate": 0.1, **settings})
    with pytest.raises(ExitConfigurationError, match="certifies nothing"):
        Auditor(bert.model, 0.1)
    model.set_exit_policy(None)
    with pytest.raises(ExitConfigurationError, match="no exit policy"):
        Auditor(model, 0.1, limit=0.1)
    with pytest.raises(SystemExit, match="error: .*certifies nothing"):
        een_hf(["serve", str(bert.folder), "--port", "0", "--audit_rate", "0.1"])
