"""The criteria once more, on plain numbers, and policies by which examples exit everywhere."""

import math

import torch


NUM_EXITS = 3
EXIT_LAYERS = [1, 3]  # of 4 layers, so a block of one layer, one of two, and the last exit
CRITERIA = ["confidence", "entropy", "margin", "patience", "vote"]
TEMPERATURES = [0.8, 1.7, 1.2, 0.6]


def _softmax(logits, temperature):
    exponentials = [math.exp((value - max(logits)) / temperature) for value in logits]
    return [value / sum(exponentials) for value in exponentials]


def _prediction(logits):
    return max(range(len(logits)), key=logits.__getitem__)


def scores_by_hand(criterion, exits, temperatures=None, tolerance=None):
    """How sure each exit is of one row: `exits` is a list of the exits' logits, as lists."""
    scores, predictions = [], []
    for index, logits in enumerate(exits):
        chances = sorted(_softmax(logits, temperatures[index] if temperatures else 1.0), reverse=True)
        predictions.append(_prediction(logits) if tolerance is None else logits[0])
        if criterion == "confidence":
            scores.append(chances[0])
        elif criterion == "entropy":
            scores.append(sum(chance * math.log(chance) for chance in chances if chance) / math.log(len(chances)))
        elif criterion == "margin":
            scores.append(chances[0] - chances[1])
        elif criterion == "vote":
            scores.append(max(predictions.count(label) for label in predictions))
        else:
            agreements = 0
            while agreements < index:
                now, before = predictions[index - agreements], predictions[index - agreements - 1]
                if (now != before) if tolerance is None else not abs(now - before) < tolerance:
                    break
                agreements += 1
            scores.append(agreements)
    return scores


def expected_exits(scores, thresholds):
    """Per row, the first exit that is sure enough, and whether 1e-5 could change that."""
    exits, clear = [], []
    for row in scores:
        sure = [score >= threshold for score, threshold in zip(row[:-1], thresholds[:-1], strict=True)]
        exits.append(sure.index(True) if True in sure else len(row) - 1)
        near = [abs(score - limit) <= 1e-5 for score, limit in zip(row[:-1], thresholds[:-1], strict=True)]
        clear.append(isinstance(row[0], int) or not any(near[: exits[-1] + 1]))
    return exits, clear


def policy_of(criterion, thresholds, **more):
    return {"criterion": criterion, "thresholds": list(thresholds), **more}


COUNTS = {
    "patience": [[0, 1, 1], [1, 1, 1], [1, 2, 2], [2, 1, 1], [1, 0.5, 2], [2, 2, 1], [1, 2, 3]],
    "vote": [[1, 2, 2], [2, 2, 2], [2, 3, 2], [3, 2, 3], [2, 1.5, 3], [2, 3, 4]],
}


def exit_layers_for(criterion):
    """Counts need the most exits to differ; for the others, blocks of one, two and one layers."""
    return [1, 2, 3] if criterion in COUNTS else EXIT_LAYERS


def threshold_grid(criterion, scores):
    """Lists of thresholds: at several quantiles of the scores, or several counts."""
    if criterion in COUNTS:
        return [[*counts, 0.0] for counts in COUNTS[criterion]]
    columns = [sorted(column) for column in zip(*scores, strict=True)]

    def threshold(index, share):
        column = columns[index]
        return column[min(len(column) - 1, int(share * len(column)))] - 1e-4

    shares = [(0.2, 0.2), (0.5, 0.5), (0.8, 0.8), (0.9, 0.2), (0.0, 0.5)]
    return [[threshold(0, first), threshold(1, second), 0.0] for first, second in shares]


def run_dynamic(model, policy, inputs, **kwargs):
    model.set_exit_policy(policy)
    with torch.no_grad():
        return model(**inputs, **kwargs)


def anytime_logits(model, inputs):
    with torch.no_grad():
        return model(**inputs, early_exit=False).exit_logits


def rows_at(inputs, index):
    return {name: tensor[index] for name, tensor in inputs.items()}


def with_nan(architecture, inputs, rows, model):
    """The same inputs, embedded where they are tokens, with NaN in these rows."""
    if architecture.name == "vit":
        pixels = inputs["pixel_values"].clone()
        pixels[rows, 0, 0, 0] = math.nan
        return {"pixel_values": pixels}
    inputs = dict(inputs)
    with torch.no_grad():
        inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
    inputs["inputs_embeds"][rows, 0] = math.nan
    return inputs
