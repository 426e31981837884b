"""The assignment of rows to parts: IID, by Dirichlet shares of the classes, or a few classes in each part."""

import heapq
import math
from collections.abc import Sequence

import numpy as np

from ..task import DataError


SCHEMES = ("iid", "dir", "pat")
# Spread of unbalanced sizes: one part in six has less than 0.22, and one in six more than 1.6 times the mean.
_SIZE_SIGMA = 1.0
_MAX_ALPHA = 1e9


def partition_indices(
    labels: Sequence | np.ndarray,
    num_partitions: int,
    scheme: str,
    *,
    alpha: float = 0.1,
    classes_per_partition: int = 2,
    balance: bool = False,
    min_size: int = 1,
    seed: int = 42,
) -> tuple[list[np.ndarray], np.ndarray | None]:
    """Assign every row to one part.

    - `iid`: at random.
    - `dir`: each part draws shares of the classes from a symmetric Dirichlet distribution, and the classes of its rows
      from these shares. All parts draw at the same time. If a class is drawn more often than it has rows, the rows go
      to a random choice of these draws. The other draws are repeated with the same shares over the classes that still
      have rows (if these shares are zero, in proportion to the remaining rows).
    - `pat`: each part has `classes_per_partition` classes. The number of parts that have a class grows with the rows
      of the class, which are distributed over these parts.

    With `balance` sizes are equal up to one row; otherwise they are `min_size` plus a log-normal share of the rest.
    With `pat` this applies to each class and the parts that have it: parts have equal size if the classes have.

    Args:
        labels: (n,), of any type that can be sorted.
        num_partitions: number of parts.
        scheme: `iid`, `dir` or `pat`.
        alpha: concentration of the Dirichlet distribution; the smaller, the fewer classes in a part.
        classes_per_partition: for `pat`: number of classes of each part.
        balance: whether parts have equal size.
        min_size: smallest number of rows of a part.
        seed: seed of all random draws.

    Returns:
        one array of row numbers per part, in random order, and for `dir` the shares as drawn (num_partitions,
        classes), classes sorted; otherwise `None`.

    Raises:
        DataError: a value out of range, or parts that cannot be made of these rows.
    """
    labels = np.asarray(labels)
    _check_request(len(labels), num_partitions, scheme, alpha, min_size)
    rng = np.random.default_rng(seed)
    _, labels = np.unique(labels, return_inverse=True)
    totals = np.bincount(labels)
    shares = None
    if scheme == "pat":
        counts = _pathological_counts(totals, num_partitions, classes_per_partition, balance, min_size, rng)
        sizes = counts.sum(axis=1)
    else:
        sizes = _draw_sizes(len(labels), num_partitions, balance, min_size, rng)
    if scheme == "dir":
        shares = rng.dirichlet(np.full(len(totals), alpha), num_partitions)
        counts = _draw_counts(shares, sizes, totals, rng)

    order = rng.permutation(len(labels))
    if scheme != "iid":
        by_class = order[np.argsort(labels[order], kind="stable")]
        owners = np.empty_like(order)
        owners[by_class] = np.repeat(np.tile(np.arange(num_partitions), len(totals)), counts.T.ravel())
        order = rng.permutation(len(labels))
        order = order[np.argsort(owners[order], kind="stable")]
    return np.split(order, np.cumsum(sizes)[:-1]), shares


def _check_request(num_rows: int, num_partitions: int, scheme: str, alpha: float, min_size: int) -> None:
    if scheme not in SCHEMES:
        raise DataError(f"--scheme {scheme!r} is not one of: {', '.join(SCHEMES)}.")
    if num_partitions < 1:
        raise DataError(f"--num_partitions must be at least 1, not {num_partitions}.")
    if num_partitions > num_rows:
        raise DataError(f"--num_partitions {num_partitions} is more than the {num_rows} rows.")
    if not 0 < alpha <= _MAX_ALPHA:
        raise DataError(f"--alpha must be above 0 and at most {_MAX_ALPHA:g}, not {alpha}.")
    if min_size < 1:
        raise DataError(f"--min_size must be at least 1, not {min_size}.")
    if num_partitions * min_size > num_rows:
        raise DataError(
            f"--min_size {min_size} cannot be reached: {num_rows} rows in {num_partitions} parts are "
            f"{num_rows / num_partitions:.4g} each. Give a smaller --min_size or --num_partitions."
        )


def _draw_sizes(
    num_rows: int, num_partitions: int, balance: bool, min_size: int, rng: np.random.Generator
) -> np.ndarray:
    if balance:
        return num_rows // num_partitions + (np.arange(num_partitions) < num_rows % num_partitions)
    weights = rng.lognormal(sigma=_SIZE_SIGMA, size=num_partitions)
    return min_size + _apportion(num_rows - min_size * num_partitions, weights)


def _apportion(total: int, weights: np.ndarray) -> np.ndarray:
    """Whole numbers in proportion to `weights` that add up to `total`, by largest remainders."""
    exact = total * weights / weights.sum()
    numbers = np.floor(exact).astype(int)
    numbers[np.argsort(numbers - exact, kind="stable")[: total - numbers.sum()]] += 1
    return numbers


def _draw_counts(shares: np.ndarray, sizes: np.ndarray, totals: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Rows of each class (parts, classes) for each part. Every round but the last exhausts a class."""
    counts = np.zeros(shares.shape, dtype=int)
    left, missing = totals.copy(), sizes.copy()
    while missing.any():
        weights = shares * (left > 0)
        weights[weights.sum(axis=1) == 0] = left
        draws = rng.multinomial(missing, weights / weights.sum(axis=1, keepdims=True))
        for label in np.flatnonzero(draws.sum(axis=0) > left):
            draws[:, label] = rng.multivariate_hypergeometric(draws[:, label], left[label])
        counts += draws
        left -= draws.sum(axis=0)
        missing -= draws.sum(axis=1)
    return counts


def _pathological_counts(
    totals: np.ndarray,
    num_partitions: int,
    classes_per_partition: int,
    balance: bool,
    min_size: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """Rows of each class (parts, classes) for each part: `classes_per_partition` entries of a row are not 0."""
    seen = _deal_classes(_parts_per_class(totals, num_partitions, classes_per_partition), num_partitions, rng)
    weights = rng.lognormal(sigma=_SIZE_SIGMA, size=num_partitions)
    counts = np.zeros(seen.shape, dtype=int)
    for label, total in enumerate(totals):
        parts = rng.permutation(np.flatnonzero(seen[:, label]))
        if balance:
            # The rows that are left over go to the parts that are smallest so far.
            parts = parts[np.argsort(counts[parts].sum(axis=1), kind="stable")]
            counts[parts, label] = total // len(parts) + (np.arange(len(parts)) < total % len(parts))
        else:
            least = min(math.ceil(min_size / classes_per_partition), total // len(parts))
            counts[parts, label] = least + _apportion(total - least * len(parts), weights[parts])
    smallest = counts.sum(axis=1).min()
    if smallest < min_size:
        raise DataError(
            f"--min_size {min_size} cannot be reached: the smallest part of {classes_per_partition} classes has "
            f"{smallest} rows. Give a smaller --min_size or --num_partitions, or other --classes_per_partition."
        )
    return counts


def _parts_per_class(totals: np.ndarray, num_partitions: int, classes_per_partition: int) -> np.ndarray:
    """The number of parts that have each class: one more, each time, for the class with the most rows per part."""
    if not 1 <= classes_per_partition <= len(totals):
        raise DataError(
            f"--classes_per_partition must be between 1 and the number of classes, {len(totals)}, not "
            f"{classes_per_partition}."
        )
    wanted = num_partitions * classes_per_partition
    most = np.minimum(totals, num_partitions)
    if not len(totals) <= wanted <= most.sum():
        limit = f"at least {len(totals)}" if wanted < len(totals) else f"at most {most.sum()}"
        raise DataError(
            f"--num_partitions {num_partitions} x --classes_per_partition {classes_per_partition} must be {limit} "
            f"for {len(totals)} classes of {totals.min()} to {totals.max()} rows."
        )
    parts = np.ones(len(totals), dtype=int)
    heap = [(-total, label) for label, total in enumerate(totals) if parts[label] < most[label]]
    heapq.heapify(heap)
    for _ in range(wanted - len(totals)):
        label = heapq.heappop(heap)[1]
        parts[label] += 1
        if parts[label] < most[label]:
            heapq.heappush(heap, (-totals[label] / parts[label], label))
    return parts


def _deal_classes(parts_per_class: np.ndarray, num_partitions: int, rng: np.random.Generator) -> np.ndarray:
    """Which part has which class (parts, classes), bool; every part has the same number of classes."""
    left = parts_per_class.copy()
    each = left.sum() // num_partitions
    seen = np.zeros((num_partitions, len(left)), dtype=bool)
    for part in range(num_partitions):
        # A class that all remaining parts must have is taken; there are never more such classes than `each`.
        due = left == num_partitions - part
        free = np.where(due, 0, left)
        seen[part] = due
        if due.sum() < each:
            seen[part, rng.choice(len(left), each - due.sum(), replace=False, p=free / free.sum())] = True
        left -= seen[part]
    return seen
