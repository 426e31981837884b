"""The cheapest policy whose risk is certified."""

import math
from collections.abc import Callable

import numpy as np

from ..extras import named_extras
from ..models import ExitConfigurationError
from ..models.policies import NEVER
from .rows import CalibrationReport, ScoredRows
from .thresholds import threshold_between, without_idle_exits


with named_extras():
    import scipy.special
    import scipy.stats


RISKS = ("accuracy_gap", "consistency", "hamming")
_BINARY_RISKS = ("accuracy_gap", "consistency")
_MIN_SEARCH_ROWS, _MAX_SEARCH_ROWS = 50, 500
_PATH_LEVELS = 100


def risk_p_value(losses: np.ndarray, limit: float, binary: bool = True) -> float:
    """P-value of the hypothesis that the risk exceeds `limit`, from the losses of independent rows.

    Exact binomial, P(Bin(n, limit) <= sum of losses), for losses that can only be 0 or 1; else Hoeffding-Bentkus for
    losses in [0, 1].

    Args:
        losses: (num_rows,).
        limit: the limit of the risk.
        binary: whether losses can only be 0 or 1. It must follow from the kind of risk, not from these losses: a test
            that was chosen by the data is not valid.

    Returns:
        the p-value.

    References:
        Learn then Test: Calibrating Predictive Algorithms to Achieve Risk Control (Angelopoulos et al., 2021),
        proposition 1.
    """
    num_rows, total = len(losses), float(np.sum(losses))
    if binary:
        return float(scipy.stats.binom.cdf(round(total), num_rows, limit))
    mean = min(total / num_rows, limit)
    divergence = scipy.special.rel_entr(mean, limit) + scipy.special.rel_entr(1 - mean, 1 - limit)
    bentkus = math.e * scipy.stats.binom.cdf(math.ceil(total), num_rows, limit)
    return float(min(1, math.exp(-num_rows * divergence), bentkus))


def calibrate_risk(
    scored: ScoredRows,
    max_risk: float,
    risk: str | Callable | None,
    confidence: float,
    seed: int,
    chosen_by: str | None,
) -> CalibrationReport:
    """The cheapest policy with P(risk <= max_risk) >= confidence, by fixed-sequence testing.

    Some of the rows define a path of policies, from few early exits to all examples exiting at the first exit. The
    other rows test the policies along this path, and the test stops at the first policy that is not certified.

    Args:
        scored: the calibration rows.
        max_risk, risk, confidence, seed, chosen_by: as in `calibrate` (`confidence` is its `risk_confidence`).

    Returns:
        the policy and its results on the rows that certify it.

    Raises:
        ExitConfigurationError: limits outside (0, 1), or a risk that does not fit.

    References:
        Learn then Test: Calibrating Predictive Algorithms to Achieve Risk Control (Angelopoulos et al., 2021),
        section 2 and proposition 1.
    """
    if not (0 < max_risk < 1 and 0 < confidence < 1):
        raise ExitConfigurationError("--max_risk and --risk_confidence must be between 0 and 1.")
    risk = check_risk(risk, scored.problem_type, labelled=scored.labels is not None)
    name, never = getattr(risk, "__name__", risk), np.full(scored.num_exits, NEVER)
    num_certify = scored.num_rows - _num_search_rows(scored.num_rows)
    if (1 - max_risk) ** num_certify > 1 - confidence:
        return scored.report(None, never, _too_few_rows(scored.num_rows, max_risk, confidence))
    search, certify = _split(scored, seed)
    certified, errors = _last_certified(search, certify, max_risk, risk, confidence)
    if certified is None:
        message = (
            f"No early exit: the policy with the fewest early exits already shows {errors:g} errors in {num_certify} "
            f"certifying rows, too many to certify a risk ({name}) of at most {max_risk:g}."
        )
        return scored.report(None, never, message)
    thresholds, errors, p_value = certified
    goal = {"max_risk": float(max_risk), "risk": name, "risk_confidence": float(confidence)}
    cost, _ = certify.cost_and_gain(thresholds)
    if chosen_by is not None:
        goal["no_guarantee"] = f"The calibration rows also chose {chosen_by}."
        guarantee = None
        message = f"At {cost:.3f} of the full cost; no guarantee, because the calibration rows also chose {chosen_by}."
    else:
        guarantee = {"risk": name, "limit": float(max_risk), "confidence": float(confidence)}
        guarantee |= {"num_rows": num_certify, "errors": errors, "p_value": p_value, "seed": seed}
        message = (
            f"At {cost:.3f} of the full cost, risk ({name}) at most {max_risk:g} with confidence {confidence:g}: "
            f"{errors:g} errors in {num_certify} certifying rows, p = {p_value:.3g}."
        )
    policy = search.policy(thresholds, calibrated_for=goal, guarantee=guarantee)
    return certify.report(policy, thresholds, message)


def _too_few_rows(num_rows: int, max_risk: float, confidence: float) -> str:
    needed, total = rows_needed(max_risk, confidence)
    return (
        f"No early exit: {rows_in_words(num_rows)}. That cannot show a risk of at most {max_risk:g} with "
        f"confidence {confidence:g} for any policy: at least {needed} rows must certify, which needs {total} "
        "calibration rows. Give more rows (--calibration_file, --calibration_samples), a larger --max_risk or a lower "
        "--risk_confidence."
    )


def _split(scored: ScoredRows, seed: int) -> tuple[ScoredRows, ScoredRows]:
    """The rows that search for a policy and those that certify it; temperatures are fitted on the first only."""
    searching, certifying = split_rows(scored.num_rows, seed)
    search = scored.select(searching)
    if scored.regression:
        choices = search.choices()
        search = choices[len(choices) // 2]
    return search, scored.select(certifying, search.temperatures, search.params)


def split_rows(num_rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the rows that search for a policy and of those that certify it.

    Args:
        num_rows: calibration rows.
        seed: of the permutation that parts them.
    """
    order, num_search = np.random.default_rng(seed).permutation(num_rows), _num_search_rows(num_rows)
    return order[:num_search], order[num_search:]


def _last_certified(search: ScoredRows, certify: ScoredRows, max_risk: float, risk: str | Callable, confidence: float):
    """Test policies in a fixed order, up to the first that is not certified.

    Returns:
        the cheapest certified policy as (thresholds, errors, p-value), or `None`, and the errors of the last one that
        was tested.
    """
    certified, cheapest, errors = None, math.inf, 0.0
    for level in range(1, _PATH_LEVELS + 1):
        num_exiting = round(level * search.num_rows / _PATH_LEVELS)
        thresholds = np.array([threshold_between(scores, num_exiting) for scores in search.scores.T])
        # Chosen on the searching rows alone, so that the test stays valid.
        thresholds = without_idle_exits(thresholds, lambda candidate: -search.cost_and_gain(candidate)[0])
        losses = risk_losses(risk, certify, certify.exits(thresholds))
        p_value, errors = risk_p_value(losses, max_risk, binary=risk in _BINARY_RISKS), float(losses.sum())
        if p_value > 1 - confidence:
            break
        cost, _ = search.cost_and_gain(thresholds)
        if cost <= cheapest:  # a later policy may cost more, because it uses other exits
            certified, cheapest = (thresholds, errors, p_value), cost
    return certified, errors


def check_risk(risk: str | Callable | None, problem_type: str, labelled: bool) -> str | Callable:
    """Check a risk, and fill in its default.

    Args:
        risk: name or function; `None`: the default.
        problem_type: as in transformers.
        labelled: whether there are labels.

    Returns:
        name or function.

    Raises:
        ExitConfigurationError: an unknown risk, or one that does not fit the problem or needs labels.
    """
    if risk is None:
        risk = "accuracy_gap" if labelled else "consistency"
    if callable(risk):
        return risk
    if risk not in RISKS:
        raise ExitConfigurationError(f"--risk {risk!r} is not one of: {', '.join(RISKS)}.")
    if problem_type == "regression":
        raise ExitConfigurationError(
            f"--max_risk with --risk {risk} counts classes and does not fit regression: use --target_cost."
        )
    if risk == "hamming" and problem_type != "multi_label_classification":
        raise ExitConfigurationError("--risk hamming counts the labels of a multi-label problem: use consistency.")
    if risk == "accuracy_gap" and not labelled:
        raise ExitConfigurationError("--risk accuracy_gap needs labels; without them use --risk consistency.")
    return risk


def rows_needed(max_risk: float, confidence: float) -> tuple[int, int]:
    """The smallest number of rows that can certify a policy: one that makes no error on them.

    Args:
        max_risk: the limit of the risk.
        confidence: the confidence.

    Returns:
        number of rows that certify, and number of calibration rows, which also include those that search.
    """
    needed = math.ceil(math.log1p(-confidence) / math.log1p(-max_risk))
    total = next(n for n in range(needed, needed + _MAX_SEARCH_ROWS + 1) if n - _num_search_rows(n) >= needed)
    return needed, total


def rows_in_words(num_rows: int) -> str:
    """Describe how many calibration rows search for a policy and how many certify it.

    Args:
        num_rows: number of calibration rows.

    Returns:
        a sentence without its full stop.
    """
    num_search = _num_search_rows(num_rows)
    if num_search == num_rows:
        return f"there are {num_rows} calibration rows, all of them search for a policy and none certifies it"
    return (
        f"there are {num_rows} calibration rows, {num_search} of them search for a policy and {num_rows - num_search} "
        "certify it"
    )


def _num_search_rows(num_rows: int) -> int:
    return min(num_rows, max(_MIN_SEARCH_ROWS, min(num_rows // 5, _MAX_SEARCH_ROWS)))


def risk_losses(risk: str | Callable, scored: ScoredRows, exits: np.ndarray) -> np.ndarray:
    """The loss in [0, 1] of each row, (num_rows,)."""
    if callable(risk):
        losses = np.asarray(risk(scored.logits.numpy(), exits, scored.labels), dtype=np.float64)
        if losses.shape != exits.shape or not ((losses >= 0) & (losses <= 1)).all():
            raise ExitConfigurationError("A risk function must give each row a loss in [0, 1], and no NaN.")
        return losses
    rows = np.arange(scored.num_rows)
    if risk == "accuracy_gap":
        right = (scored.reference == scored.targets).all(1)
        return (right & (scored.right[rows, exits] < 1)).astype(np.float64)
    differs = scored.predictions[rows, exits] != scored.reference
    return differs.mean(1) if risk == "hamming" else differs.any(1).astype(np.float64)
