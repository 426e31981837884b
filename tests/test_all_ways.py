"""Random models, policies, masks and dtypes: by whatever way rows are answered, each gets its own exit's logits.

The reference is each row alone, with every exit evaluated: it exits at the first exit whose score reaches the
threshold.
"""

import asyncio
import random
from dataclasses import replace
from datetime import date
from functools import partial

import numpy as np
import pytest
import torch
from factory import TEXT, reads_text, tiny_model

from een_hf import ExitConfigurationError, ExitPolicy, calibrate, export_onnx
from een_hf.inference import ExitRunner, predict
from een_hf.inference.programs import main_input
from een_hf.inference.runner import input_names
from een_hf.models import EarlyExitClassifierOutput
from een_hf.models.criteria import fitting_criteria, resolve_problem_type
from een_hf.models.policies import NEVER
from een_hf.serving import AsyncExitEngine


EXPORTED = "bert roberta distilbert electra mpnet modernbert vit deit dinov2".split()
KINDS = [*EXPORTED, *"xlm-roberta camembert deberta deberta-v2 dinov2_with_registers beit".split()]
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
_RELATIVE = {"relative_attention": True, "pos_att_type": "c2p|p2c", "position_biased_input": False}
SETTINGS = {
    **dict.fromkeys(["roberta", "xlm-roberta", "camembert", "mpnet"], {"pad_token_id": 1}),
    "modernbert": {**_TOKENS, "local_attention": 4},
    "deberta": _RELATIVE,
    "deberta-v2": {**_RELATIVE, "position_buckets": 8},
}
COUNTS = {"patience": (1, 2), "vote": (2, 3)}
NUM_ROWS, WIDTH, LONGEST = 24, 11, 20
# Of logits up to 3; answers are float32 whatever the model is.
TOLERANCE = {torch.float64: 2e-6, torch.float32: 2e-5, torch.float16: 0.02, torch.bfloat16: 0.08}


class Draw:
    """A model, a policy and rows, all from one seed; `str` says which."""

    def __init__(self, seed: int, kind: str):
        self.seed, self.kind, self.text, chance = seed, kind, reads_text(kind), random.Random(f"{seed} {kind}")
        problem, num_labels = chance.choice(
            [(None, 3), (None, 3), (None, 17), ("multi_label_classification", 3), (None, 1)]
        )
        some = sorted(chance.sample(range(1, 5), chance.randint(2, 4)))
        self.settings = {
            "num_hidden_layers": 4,
            "num_labels": num_labels,
            "problem_type": problem,
            "exit_layers": chance.choice([some, some, None, [4]]),
            "exit_aggregation": chance.choice(["none", "none", "boosted"]),
            "boost_temperature": chance.choice([0.5, 1]),
            "exit_pooling": chance.choice(["cls", "mean", "cls_mean"]),
            "exit_head": chance.choice(
                [None, None, "pooler", "norm", "norm_pooler", *([] if self.text else ["attention"] * 3)]
            ),
            "attn_implementation": "eager"
            if kind == "mpnet" or "deberta" in kind
            else chance.choice(["eager", "sdpa"]),
            **SETTINGS.get(kind, {}),
            **({"max_position_embeddings": LONGEST} if self.text else {}),
        }
        self.dtype = chance.choice([torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64])
        masks = ["right", "left", "holes", "ones", "first", "bool", "none"]
        self.mask = chance.choice(masks) if self.text else "none"
        self.model = tiny_model(kind, seed=seed, noise=0.3, **self.settings).to(self.dtype).eval()
        if self.mask == "left" and not self.model.answers_left_padding:
            self.mask = "right"
        self.beside = chance.choice([None, None, "token_type_ids", "position_ids", "inputs_embeds"])
        self.width = chance.choice([WIDTH, self.model.config.max_input_length or LONGEST]) if self.text else None
        self.rows = self.make_rows(torch.Generator().manual_seed(seed))
        self.scale_logits(3 / float(self.alone().abs().max()))
        self.look(chance)

    def look(self, chance) -> None:
        """The answers of the model as it is now, and two policies, of which the first becomes its own."""
        self.every = self.alone()
        self.tolerance = TOLERANCE[self.dtype] * max(1.0, float(self.every.abs().max()) / 3)
        self.policies = [self.make_policy(chance), self.make_policy(chance)]
        self.model.set_exit_policy(self.policies[0])

    def make_policy(self, chance) -> ExitPolicy:
        config, num_exits = self.model.config, self.model.num_exits
        criterion = chance.choice(fitting_criteria(resolve_problem_type(config.problem_type, config.num_labels)))
        counts, params = criterion in COUNTS, {}
        if config.num_labels == 1:
            moves = self.every.diff(dim=1).abs()
            params = {"tolerance": float(moves.median()) + 1e-3} if moves.numel() else {}
        temperatures = None if counts or chance.random() < 0.5 else [chance.uniform(0.5, 2) for _ in range(num_exits)]
        policy = ExitPolicy(criterion, [0.0] * num_exits, temperatures=temperatures, params=params)
        columns = policy.scores(self.every.float()).T.tolist()
        return replace(policy, thresholds=[self.threshold(criterion, chance, column) for column in columns])

    def __str__(self):
        policies = [policy.to_dict() for policy in self.policies]
        rows = f"mask {self.mask}, {self.beside}, width {self.width}"
        return f"Draw({self.seed}, {self.kind!r}): {self.dtype}, {rows}, {self.settings}, {policies}"

    def make_rows(self, generator) -> list[dict]:
        if not self.text:
            return [
                {"pixel_values": row.to(self.dtype)} for row in torch.randn(NUM_ROWS, 3, 8, 8, generator=generator)
            ]
        config, width = self.model.config, self.width
        tokens = torch.randint(3, TEXT["vocab_size"], (NUM_ROWS, width), generator=generator)
        lengths = torch.randint(1, width + 1, (NUM_ROWS, 1), generator=generator)
        lengths[::4] = width
        if self.mask in ("ones", "first"):
            lengths.fill_(width if self.mask == "ones" else 1)
        mask = torch.arange(width) < lengths
        if self.mask == "left":
            mask = mask.flip(1)
        elif self.mask == "holes":
            mask[:, 1:] &= torch.rand(NUM_ROWS, width - 1, generator=generator) < 0.5
        tokens[~mask] = config.pad_token_id or 0
        columns = {"input_ids": tokens, "attention_mask": mask if self.mask == "bool" else mask.long()}
        if self.beside == "inputs_embeds":
            size = self.model.get_input_embeddings().weight.shape[1]
            columns["inputs_embeds"] = torch.randn(NUM_ROWS, width, size, generator=generator).to(self.dtype)
            del columns["input_ids"]
        elif self.beside in input_names(self.model):
            largest = config.type_vocab_size if self.beside == "token_type_ids" else config.max_input_length or LONGEST
            if largest:
                columns[self.beside] = torch.randint(largest, (NUM_ROWS, width), generator=generator)
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        if self.mask == "none":
            for row, length in zip(rows, lengths.flatten().tolist(), strict=True):
                del row["attention_mask"]
                row.update({name: value[:length] for name, value in row.items()})
        return rows

    def threshold(self, criterion: str, chance, scores: list[float]) -> float:
        """Between two scores that are as far from each other as any near a random share; or never, or a count."""
        if chance.random() < 0.15:
            return NEVER
        if criterion in COUNTS:
            return float(chance.choice(COUNTS[criterion]))
        ordered = sorted(scores)
        start = chance.randrange(0, NUM_ROWS - 8)
        low, high = max(zip(ordered[start : start + 8], ordered[start + 1 : start + 9], strict=True), key=_gap)
        return (low + high) / 2

    @torch.no_grad()
    def scale_logits(self, factor: float) -> None:
        for parameter in self.model.parameters():
            if parameter.dim() < 3 and len(parameter) == self.model.config.num_labels:
                parameter.mul_(factor)

    @torch.no_grad()
    def alone(self) -> torch.Tensor:
        """Logits at all exits, of one row at a time."""
        rows = [{name: value[None] for name, value in row.items()} for row in self.rows]
        return torch.cat([self.model(**row, early_exit=False).exit_logits for row in rows])

    def exits(self, policy: ExitPolicy) -> list[int]:
        """By a plain loop over the scores of each row."""
        last, limits = self.model.num_exits - 1, policy.thresholds
        scores = policy.scores(self.every.float()).tolist()
        return [next((k for k in range(last) if row[k] >= limits[k]), last) for row in scores]

    def clear(self, policy: ExitPolicy) -> list[bool]:
        """Of each row, whether no score or prediction, up to its exit, is so close that rounding may change it."""
        found, every, temperatures = [], self.every.float(), policy.temperatures or [1.0] * self.model.num_exits
        for row, scores, exit_index in zip(every, policy.scores(every).tolist(), self.exits(policy), strict=True):
            if policy.criterion not in COUNTS:
                pairs = zip(scores[: exit_index + 1], policy.thresholds[:-1], temperatures, strict=False)
                found.append(all(abs(score - limit) > self.tolerance / t for score, limit, t in pairs))
            elif row.shape[-1] == 1:
                moves = row[: exit_index + 1, 0].diff().abs() - policy.scorer.params["tolerance"]
                found.append(bool((moves.abs() > 2 * self.tolerance).all()))
            else:
                best = row[: exit_index + 1].sort(-1).values
                found.append(bool((best[:, -1] - best[:, -2]).min() > 2 * self.tolerance))
        return found

    def batches(self) -> list[tuple[list[int], dict]]:
        """Rows that can be stacked, and the batch that they make."""
        by_width = {}
        for number, row in enumerate(self.rows):
            by_width.setdefault(main_input(row, self.model.main_input_name).shape, []).append(number)
        names = list(self.rows[0])
        return [
            (numbers, {name: torch.stack([self.rows[n][name] for n in numbers]) for name in names})
            for numbers in by_width.values()
        ]

    def check(self, way: str, exit_index, logits, *, policy=None, rows=range(NUM_ROWS), tolerance=None) -> None:
        tolerance, policy = tolerance or self.tolerance, policy or self.policies[0]
        wanted, clear = self.exits(policy), self.clear(policy)
        found = [int(index) for index in exit_index]
        for row, mine in zip(rows, found, strict=True):
            known = mine == wanted[row] or not clear[row]
            assert known, f"{way}: row {row} exits at {mine}, not {wanted[row]}. {self}"
        own = self.every[list(rows), found].double()
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


async def by_engine(draw) -> list[tuple]:
    """Requests of one to five rows, all at once, by both policies: the rows, the policy and the answers of each."""
    async with AsyncExitEngine(draw.model, max_rows=8, max_wait_ms=1) as engine:
        starts = [0]
        while starts[-1] < NUM_ROWS:
            starts.append(min(NUM_ROWS, starts[-1] + 1 + len(starts) % 5))
        asked = [(range(a, b), draw.policies[a % 2]) for a, b in zip(starts, starts[1:], strict=False)]
        answers = [engine.predict([draw.rows[n] for n in rows], policy=policy) for rows, policy in asked]
        return [(*one, answer) for one, answer in zip(asked, await asyncio.gather(*answers), strict=True)]


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
            batch.setdefault("token_type_ids", torch.zeros_like(batch["input_ids"]))
        feed = {n: (v.float() if v.is_floating_point() else v.long()).numpy() for n, v in batch.items()}
        exit_index, logits = map(torch.from_numpy, session.run(["exit_index", "logits"], feed))
        return EarlyExitClassifierOutput(logits=logits, exit_index=exit_index)

    return by_batches(draw, answer)


@torch.no_grad()
def replace_weights(draw) -> None:
    weights = {name: weight.clone() for name, weight in draw.model.state_dict().items()}
    draw.model.load_state_dict({n: w * 1.05 if w.is_floating_point() else w for n, w in weights.items()}, assign=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [1, 2, pytest.param(int(f"{date.today():%Y%m%d}"), id="of the day")])
def test_all_ways_give_each_row_its_own_exits_answer(seed, kind, tmp_path):
    """What breaks: an answer that depends on the way it is asked for, on the rows beside it, or on an earlier call."""
    draw = Draw(seed, kind)
    print(draw)
    model, runner = draw.model, ExitRunner(draw.model)
    exact = draw.dtype in (torch.float32, torch.float64)
    assert not exact or sum(draw.clear(draw.policies[0])) >= NUM_ROWS / 2, draw
    for change in (None, replace_weights):
        if change is not None:
            change(draw)
            draw.look(random.Random(seed))
        first, second = draw.policies
        with torch.no_grad():
            draw.check("model(**batch)", *by_batches(draw, model))
            draw.check("early_exit=policy", *by_batches(draw, partial(model, early_exit=second)), policy=second)
            draw.check("all layers", *by_batches(draw, partial(model, output_hidden_states=True)))
        draw.check("ExitRunner", *by_batches(draw, runner))
        draw.check("under", *by_batches(draw, runner.under(second)), policy=second)
        for policy in (second, first):
            model.set_exit_policy(policy)
            draw.check("the other policy", *by_batches(draw, runner), policy=policy)
        for graphs in (False, True):
            found = predict(model, draw.rows, 7, cuda_graphs=graphs)
            draw.check(f"predict(cuda_graphs={graphs})", found.exit_index, found.logits)
        if draw.beside != "inputs_embeds":
            for rows, policy, found in asyncio.run(by_engine(draw)):
                draw.check("AsyncExitEngine", found.exit_index, found.logits, policy=policy, rows=rows)
    # An export takes ten seconds and more; it has no input for positions or embeddings.
    exported = model.num_exits > 1 and draw.beside not in ("position_ids", "inputs_embeds")
    if kind == EXPORTED[seed % len(EXPORTED)] and exported:
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
    draw.model.set_exit_policy(replace(draw.policies[0], thresholds=[-NEVER] * draw.model.num_exits))
    found = predict(draw.model, draw.rows, 7)
    with pytest.raises(AssertionError, match="exits at 0"):
        draw.check("another policy", found.exit_index, found.logits)


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
def test_odd_logits_are_calibrated_as_they_exit():
    """What breaks: NaN, infinite, huge or equal logits, by which rows exit elsewhere than calibration says."""
    chosen = 0
    for seed in range(int(f"{date.today():%Y%m%d}"), int(f"{date.today():%Y%m%d}") + 80):
        chance, rng = random.Random(seed), np.random.default_rng(seed)
        problem = chance.choice(["single_label_classification", "multi_label_classification", "regression"])
        num_labels = 1 if problem == "regression" else chance.choice([2, 3, 17])
        num_rows, num_exits = chance.choice([1, 2, 20, 120]), chance.choice([1, 2, 4])
        logits = (rng.normal(size=(num_rows, num_exits, num_labels)) * chance.choice([0, 3, 3e37])).astype(np.float32)
        odd = rng.random(logits.shape) < chance.choice([0, 0.02, 0.3])
        logits[odd] = rng.choice([np.nan, np.inf, -np.inf], odd.sum())
        criterion, target_cost = chance.choice(fitting_criteria(problem)), chance.choice([0.5, 0.8, 1.0])
        costs = chance.choice([np.linspace(1 / num_exits, 1, num_exits), np.ones(num_exits), rng.random(num_exits)])
        what = f"seed {seed}: {problem}, {criterion}, {target_cost}, {costs}"
        try:
            settings = {"criterion": criterion, "problem_type": problem, "target_cost": target_cost}
            report = calibrate(logits, None, costs, **settings)
        except ExitConfigurationError as error:
            assert "--target_cost" in str(error), what
            continue
        chosen += 1
        exits = report.policy.exits_of(torch.from_numpy(logits)).numpy()
        assert report.exit_fractions == (np.bincount(exits, minlength=num_exits) / num_rows).tolist(), what
        assert report.relative_cost <= target_cost + 1e-9 and np.isfinite(report.score), what
        taken = logits[np.arange(num_rows), exits][exits < num_exits - 1]
        broken = np.isnan(taken).any(-1) | (problem == "single_label_classification") & np.isposinf(taken).any(-1)
        assert not broken.any(), what
    assert chosen >= 20
