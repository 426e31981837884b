"""Random models, policies, masks and dtypes: by whatever way rows are answered, each gets its own exit's logits.

The reference is each row alone, with every exit evaluated: it exits at the first exit whose score reaches the
threshold.
"""

import asyncio
import random
from dataclasses import replace
from datetime import date

import pytest
import torch
from factory import TEXT, reads_text, tiny_model

from een_hf import ExitPolicy, export_onnx
from een_hf.inference import ExitRunner, predict
from een_hf.models import EarlyExitClassifierOutput
from een_hf.models.policies import NEVER
from een_hf.serving import AsyncExitEngine


KINDS = "bert roberta distilbert electra mpnet modernbert vit deit dinov2".split()
SETTINGS = {"roberta": {"pad_token_id": 1}, "mpnet": {"pad_token_id": 1}, "modernbert": {"pad_token_id": 0}}
COUNTS = {"patience": (1, 2), "vote": (2, 3)}
NUM_ROWS, WIDTH = 24, 11
# Of logits up to 3; answers are float32 whatever the model is.
TOLERANCE = {torch.float64: 2e-6, torch.float32: 2e-5, torch.bfloat16: 0.08}


class Draw:
    """A model, a policy and rows, all from one seed; `str` says which."""

    def __init__(self, seed: int, kind: str):
        self.seed, self.kind, chance = seed, kind, random.Random(f"{seed} {kind}")
        exit_layers = sorted(chance.sample(range(1, 5), chance.randint(2, 4)))
        self.settings = {
            "num_hidden_layers": 4,
            "exit_layers": exit_layers,
            "exit_aggregation": chance.choice(["none", "none", "boosted"]),
            "exit_pooling": chance.choice(["cls", "mean", "cls_mean"]),
            "attn_implementation": "eager" if kind == "mpnet" else chance.choice(["eager", "sdpa"]),
            "problem_type": chance.choice([None, None, None, "multi_label_classification"]),
            **SETTINGS.get(kind, {}),
            **({"max_position_embeddings": 20} if reads_text(kind) else {}),
        }
        self.dtype = chance.choice([torch.float32, torch.float32, torch.bfloat16, torch.float64])
        self.mask = chance.choice(["right", "left", "holes", "none"]) if reads_text(kind) else "none"
        criteria = ["confidence", "entropy", "margin", "patience", "vote"]
        self.criterion = "label_confidence" if self.settings["problem_type"] else chance.choice(criteria)
        self.model = tiny_model(kind, seed=seed, noise=0.3, **self.settings).to(self.dtype).eval()
        num_exits = self.model.num_exits
        counts = self.criterion in COUNTS
        temperatures = None if counts or chance.random() < 0.5 else [chance.uniform(0.5, 2) for _ in range(num_exits)]
        self.rows = self.make_rows(torch.Generator().manual_seed(seed))
        self.scale_logits(3 / float(self.alone().abs().max()))
        self.every = self.alone()
        self.tolerance = TOLERANCE[self.dtype]
        policy = ExitPolicy(self.criterion, [0.0] * num_exits, temperatures=temperatures)
        self.scores = policy.scores(self.every.float())
        self.policy = replace(policy, thresholds=[self.threshold(chance, column.tolist()) for column in self.scores.T])
        self.model.set_exit_policy(self.policy)

    def __str__(self):
        policy = self.policy.to_dict()
        return f"Draw({self.seed}, {self.kind!r}): {self.dtype}, mask {self.mask}, {self.settings}, {policy}"

    def make_rows(self, generator) -> list[dict]:
        if not reads_text(self.kind):
            return [
                {"pixel_values": row.to(self.dtype)} for row in torch.randn(NUM_ROWS, 3, 8, 8, generator=generator)
            ]
        tokens = torch.randint(2, TEXT["vocab_size"], (NUM_ROWS, WIDTH), generator=generator)
        lengths = torch.randint(1, WIDTH + 1, (NUM_ROWS, 1), generator=generator)
        mask = (torch.arange(WIDTH) < lengths).long()
        if self.mask == "none":
            return [{"input_ids": row[:length]} for row, length in zip(tokens, lengths.flatten(), strict=True)]
        if self.mask == "left":
            mask = mask.flip(1)
        elif self.mask == "holes":
            mask[:, 1:] *= torch.randint(0, 2, (NUM_ROWS, WIDTH - 1), generator=generator)
        tokens[mask == 0] = self.model.config.pad_token_id or 0
        return [{"input_ids": row, "attention_mask": kept} for row, kept in zip(tokens, mask, strict=True)]

    def threshold(self, chance, scores: list[float]) -> float:
        """Between two scores that are as far from each other as any near a random share; or never, or a count."""
        if chance.random() < 0.15:
            return NEVER
        if self.criterion in COUNTS:
            return float(chance.choice(COUNTS[self.criterion]))
        ordered = sorted(scores)
        start = chance.randrange(0, NUM_ROWS - 8)
        low, high = max(zip(ordered[start : start + 8], ordered[start + 1 : start + 9], strict=True), key=_gap)
        return (low + high) / 2

    @torch.no_grad()
    def scale_logits(self, factor: float) -> None:
        for parameter in self.model.parameters():
            if len(parameter) == self.model.config.num_labels:
                parameter.mul_(factor)

    @torch.no_grad()
    def alone(self) -> torch.Tensor:
        """Logits at all exits, of one row at a time."""
        rows = [{name: value[None] for name, value in row.items()} for row in self.rows]
        return torch.cat([self.model(**row, early_exit=False).exit_logits for row in rows])

    def exits(self) -> list[int]:
        """By a plain loop over the scores of each row."""
        last = self.model.num_exits - 1
        limits = self.policy.thresholds
        return [next((k for k in range(last) if row[k] >= limits[k]), last) for row in self.scores.tolist()]

    def clear(self) -> list[bool]:
        """Of each row, whether no score or prediction, up to its exit, is so close that rounding may change it."""
        found = []
        for row, scores, exit_index in zip(self.every.float(), self.scores.tolist(), self.exits(), strict=True):
            if self.criterion in COUNTS:
                best = row[: exit_index + 1].sort(-1).values
                found.append(bool((best[:, -1] - best[:, -2]).min() > 2 * self.tolerance))
            else:
                pairs = zip(scores[: exit_index + 1], self.policy.thresholds[:-1], strict=False)
                found.append(all(abs(score - threshold) > self.tolerance for score, threshold in pairs))
        return found

    def batches(self) -> list[tuple[list[int], dict]]:
        """Rows that can be stacked, and the batch that they make."""
        by_width = {}
        for number, row in enumerate(self.rows):
            by_width.setdefault(row[self.model.main_input_name].shape, []).append(number)
        names = list(self.rows[0])
        return [
            (numbers, {name: torch.stack([self.rows[n][name] for n in numbers]) for name in names})
            for numbers in by_width.values()
        ]

    def check(self, way: str, exit_index, logits, tolerance=None) -> None:
        tolerance, wanted, clear = tolerance or self.tolerance, self.exits(), self.clear()
        found = [int(index) for index in exit_index]
        for number, (mine, theirs, sure) in enumerate(zip(found, wanted, clear, strict=True)):
            assert mine == theirs or not sure, f"{way}: row {number} exits at {mine}, not {theirs}. {self}"
        own = self.every[torch.arange(NUM_ROWS), found].double()
        difference = float((torch.as_tensor(logits).double() - own).abs().max())
        assert difference <= tolerance, f"{way}: logits differ by {difference}. {self}"


def _gap(pair):
    return pair[1] - pair[0]


def by_batches(draw, answer) -> tuple[torch.Tensor, torch.Tensor]:
    """Exits and logits in the order of the rows, of a function that answers one batch."""
    exits, logits = [None] * NUM_ROWS, [None] * NUM_ROWS
    for numbers, batch in draw.batches():
        output = answer(**batch)
        for number, exit_index, row in zip(numbers, output.exit_index, output.logits, strict=True):
            exits[number], logits[number] = exit_index, row
    return torch.stack(exits), torch.stack(logits)


async def by_engine(draw):
    """Requests of one to five rows, all at once."""
    async with AsyncExitEngine(draw.model, max_rows=8, max_wait_ms=1) as engine:
        starts = [0]
        while starts[-1] < NUM_ROWS:
            starts.append(min(NUM_ROWS, starts[-1] + 1 + len(starts) % 5))
        requests = [engine.predict(draw.rows[a:b]) for a, b in zip(starts, starts[1:], strict=False)]
        answers = await asyncio.gather(*requests)
    return torch.cat([a.exit_index for a in answers]), torch.cat([a.logits for a in answers])


def by_onnx(draw, folder):
    pytest.importorskip("onnxscript")
    from een_hf.inference.onnx import load_session

    export_onnx(draw.model, folder / "model.onnx")
    session = load_session(folder / "model.onnx")
    names = {value.name for value in session.get_inputs()}

    def answer(**batch):
        if "attention_mask" in names:
            batch.setdefault("attention_mask", torch.ones_like(batch["input_ids"]))
        if "token_type_ids" in names:
            batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
        feed = {n: (v.float() if v.is_floating_point() else v).numpy() for n, v in batch.items()}
        exit_index, logits = map(torch.from_numpy, session.run(["exit_index", "logits"], feed))
        return EarlyExitClassifierOutput(logits=logits, exit_index=exit_index)

    return by_batches(draw, answer)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [1, 2, pytest.param(int(f"{date.today():%Y%m%d}"), id="of the day")])
def test_all_ways_give_each_row_its_own_exits_answer(seed, kind, tmp_path):
    """What breaks: an answer that depends on the way it is asked for, or on the rows beside it."""
    draw = Draw(seed, kind)
    print(draw)
    assert draw.dtype == torch.bfloat16 or sum(draw.clear()) >= NUM_ROWS / 2, draw
    with torch.no_grad():
        draw.check("model(**batch)", *by_batches(draw, draw.model))
    for graphs in (False, True):
        found = predict(draw.model, draw.rows, 7, cuda_graphs=graphs)
        draw.check(f"predict(cuda_graphs={graphs})", found.exit_index, found.logits)
    draw.check("ExitRunner", *by_batches(draw, ExitRunner(draw.model)))
    draw.check("AsyncExitEngine", *asyncio.run(by_engine(draw)))
    if kind == KINDS[seed % len(KINDS)]:  # an export takes ten seconds and more
        draw.check("ONNX", *by_onnx(draw, tmp_path), tolerance=max(draw.tolerance, 1e-4))


@pytest.mark.slow
def test_a_row_that_takes_anothers_answer_would_be_seen():
    """What breaks: a comparison that nothing can fail."""
    draw = Draw(1, "bert")
    found = predict(draw.model, draw.rows, 7)
    swapped = found.logits.clone()
    swapped[0], swapped[1] = found.logits[1], found.logits[0]
    with pytest.raises(AssertionError, match="logits differ"):
        draw.check("swapped", found.exit_index, swapped)
    draw.model.set_exit_policy(replace(draw.policy, thresholds=[-NEVER] * draw.model.num_exits))
    found = predict(draw.model, draw.rows, 7)
    with pytest.raises(AssertionError, match="exits at 0"):
        draw.check("another policy", found.exit_index, found.logits)
