import json
import os
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import csv, parquet
from sklearn.preprocessing import OneHotEncoder

from regtune.errors import InvalidData
from regtune.spec import Validation
from regtune.task import Data, Storage
from worker.errors import NoRoom
from worker.tasks import encoding, tabular
from worker.tasks.preparation import Prepared, prepare
from worker.tasks.tabular import table

TABULAR = (
    Path(os.environ.get("REGTUNE_TEST_DATA", Path(__file__).parents[3].parent / "shared" / "data"))
    / "tabular"
)
ADULT = [
    "age",
    "workclass",
    "fnlwgt",
    "education",
    "education-num",
    "marital-status",
    "occupation",
    "relationship",
    "race",
    "sex",
    "capital-gain",
    "capital-loss",
    "hours-per-week",
    "native-country",
    "income",
]

ROWS = """age,town,paid,noise
31,Bern,yes,1.5
 40 ,Basel,no,
52,,yes,2.5
,Bern,no,-1
28,Chur,yes,0
33,Basel,no,4
"""


def load(folder: Path, text: str = ROWS, **settings: Any) -> Data:
    (folder / "t.csv").write_text(text)
    defaults = {"path": "t.csv", "target": "paid", "test_fraction": 0.34}
    return table(Storage(folder), **(defaults | settings))


def prepared(data: Data, **validation: Any) -> Prepared:
    return prepare(data, Validation(**validation), 0, torch.float64).on(torch.device("cpu"))


def all_rows(part: str, data: Data) -> np.ndarray:
    parts = [getattr(x, part) for x in (data.train_x, data.test_x)]
    return np.concatenate(parts)


def test_numbers_and_categories_are_told_apart_and_missing_values_kept(tmp_path):
    data = load(tmp_path)
    assert (data.classes, len(data.train_y), len(data.test_y)) == (2, 3, 3)
    numbers = all_rows("numbers", data)
    assert numbers.dtype == np.float32
    assert sorted(numbers[:, 0])[:5] == [28, 31, 33, 40, 52]
    assert np.isnan(numbers).sum(0).tolist() == [1, 1]
    towns = all_rows("categories", data)
    assert sorted(towns[:, 0]) == [-1, 0, 0, 1, 1, 2]


def test_what_a_column_is_may_be_said(tmp_path):
    data = load(tmp_path, categorical=["age"], ignore=["noise"])
    assert data.train_x.numbers.shape[1] == 0
    assert data.train_x.categories.shape[1] == 2
    with pytest.raises(InvalidData, match="'town' should be numeric"):
        load(tmp_path, numeric=["town"])


def test_categories_are_what_they_are_dates_and_ids_of_any_size_too(tmp_path):
    ids = [2**53, 2**53 + 1, 2**53 + 1, None] * 5
    columns = {
        "day": [date(2026, 11, day) for day in (1, 2, 2, 3) * 5],
        "id": ids,
        "text": [None if id_ is None else f" {id_}" for id_ in ids],
        "price": [None if id_ is None else Decimal(id_) for id_ in ids],
        "y": ["a", "b"] * 10,
    }
    parquet.write_table(pa.table(columns), tmp_path / "t.parquet")
    with pytest.raises(InvalidData, match=r"'day' is of the type date32.*ignore or categorical"):
        table(Storage(tmp_path), path="t.parquet", target="y")
    named = ["day", "id", "text", "price"]
    data = table(Storage(tmp_path), path="t.parquet", target="y", categorical=named)
    rows = {tuple(row) for row in all_rows("categories", data).tolist()}
    assert rows == {(0, 0, 0, 0), (1, 1, 1, 1), (2, -1, -1, -1)}


def test_categories_of_a_csv_file_keep_their_zeros(tmp_path):
    lines = ["code,y", *["007,a", "7,b", "?,a"] * 6]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    data = table(Storage(tmp_path), path="t.csv", target="y", categorical=["code"], missing=["?"])
    assert set(all_rows("categories", data)[:, 0].tolist()) == {-1, 0, 1}


def test_what_cannot_be_categories_is_refused(tmp_path):
    rows = pa.table({"tags": [["a"], ["b", "c"]] * 10, "y": ["a", "b"] * 10})
    parquet.write_table(rows, tmp_path / "t.parquet")
    with pytest.raises(InvalidData, match=r"'tags' is of the type list.*cannot be categories"):
        table(Storage(tmp_path), path="t.parquet", target="y", categorical=["tags"])


def test_a_column_that_never_varies_needs_no_more_digits(tmp_path):
    rows = pa.table({"x": [0.1] * 60, "y": ["a", "b"] * 30})
    parquet.write_table(rows, tmp_path / "t.parquet")
    data = table(Storage(tmp_path), path="t.parquet", target="y")
    assert data.train_x.numbers.dtype == np.float32


def test_numbers_with_more_digits_than_float32_keep_them_until_they_are_standardized(tmp_path):
    """Moments of one hour, in seconds since 1970: float32 knows one every 128 seconds."""
    seconds = np.arange(0, 3600, 60)
    rows = pa.table({"at": 1_790_000_000 + seconds, "y": 1_790_000_000.0 + seconds})
    parquet.write_table(rows, tmp_path / "t.parquet")
    data = table(Storage(tmp_path), path="t.parquet", target="y")
    ready = prepare(data, Validation(), 0, torch.float32)
    for numbers in (ready.rows.x[:, 0], ready.rows.y):
        assert len(numbers.unique()) == len(ready.rows)
    torch.testing.assert_close(ready.rows.x[:, 0], ready.rows.y, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("values", "kind", "classes"),
    [
        (["a", "b", "c", "a"] * 5, None, 3),
        ([0, 1, 2, 3] * 5, None, 4),
        (list(range(40)), None, None),
        ([0.5, 1.0, 2.0, 3.0] * 5, None, None),
        ([0, 1, 2, 3] * 5, "regression", None),
        ([-3, 7] * 10, "classification", 2),
        ([True, False] * 10, None, 2),
    ],
)
def test_the_kind_of_target_is_seen_or_said(tmp_path, values, kind, classes):
    parquet.write_table(pa.table({"x": range(len(values)), "y": values}), tmp_path / "t.parquet")
    data = table(Storage(tmp_path), path="t.parquet", target="y", kind=kind)
    assert data.classes == classes
    if classes:
        assert sorted(set(data.train_y)) == list(range(classes))
    else:
        assert data.train_y.dtype == np.float32
        assert set(data.train_y) | set(data.test_y) == {float(value) for value in values}


def test_parquet_and_csv_of_the_same_rows_are_the_same_data(tmp_path):
    from_csv = load(tmp_path)
    towns = ["Bern", "Basel", None, "Bern", "Chur", "Basel"]
    parquet.write_table(
        pa.table(
            {
                "age": [31, 40, 52, None, 28, 33],
                "town": pa.array(towns).dictionary_encode(),
                "paid": ["yes", "no"] * 3,
                "noise": [1.5, None, 2.5, -1, 0, 4],
            }
        ),
        tmp_path / "t.parquet",
    )
    assert load(tmp_path, path="t.parquet").content_hash() == from_csv.content_hash()
    changed = load(tmp_path, ROWS.replace("52", "53"))
    assert changed.content_hash() != from_csv.content_hash()


def test_an_index_that_pandas_wrote_is_no_feature(tmp_path):
    meta = {"index_columns": ["__index_level_0__"], "columns": []}
    rows = pa.table({"a": range(10), "y": ["p", "q"] * 5, "__index_level_0__": range(10)})
    rows = rows.replace_schema_metadata({"pandas": json.dumps(meta)})
    parquet.write_table(rows, tmp_path / "t.parquet")
    data = table(Storage(tmp_path), path="t.parquet", target="y")
    assert data.train_x.numbers.shape[1] == 1
    with pytest.raises(InvalidData, match="a column without a name"):
        load(tmp_path, ",age,paid\n0,30,no\n1,31,yes\n")


def test_a_column_that_is_text_in_one_file_alone_is_text_or_numbers_in_both(tmp_path):
    """Arrow infers each file's types by itself."""
    (tmp_path / "test.csv").write_text("age,town,paid,noise\n30,7,no,1\n")
    rows = "age,town,paid,noise\n ?,A1,no,1\n40,7,yes,2\n50,7,no,3\n"
    data = load(tmp_path, rows, test_path="test.csv", missing=["?"])
    assert data.test_x.numbers.tolist() == [[30, 1]]
    assert data.test_x.categories.tolist() == [[int(data.train_x.categories[1, 0])]]


@pytest.mark.parametrize(
    ("known", "other", "stray"),
    [("True", "False", "unknown"), ("1.0", "2.0", "none"), ("01", "00", "A1"), ("1e3", "2", "x")],
)
@pytest.mark.parametrize("swapped", [False, True])
def test_what_is_text_in_one_file_is_read_letter_by_letter_in_the_other(
    tmp_path, known, other, stray, swapped
):
    """A value that Arrow has parsed comes back as ``true``, ``1`` or ``1000``."""
    rows = [[known, other, known], [known, stray, other]]
    files = ["\n".join(["a,paid", *(f"{value},{value}" for value in values)]) for values in rows]
    if swapped:
        files.reverse()
    (tmp_path / "test.csv").write_text(files[1])
    data = load(tmp_path, files[0], test_path="test.csv")
    values = [*data.train_x.categories[:, 0], *data.test_x.categories[:, 0]]
    names = [*rows[swapped], *rows[not swapped]]
    assert [sorted(set(names)).index(name) for name in names] == values
    assert [*data.train_y, *data.test_y] == values


def test_parquet_of_numbers_that_can_be_written_in_several_ways_is_not_made_text(tmp_path):
    (tmp_path / "test.csv").write_text("a,b,paid\nA1,A1,no\n7,7,yes\n")
    rows = pa.table({"a": [7, 8], "b": [7.0, 8.0], "paid": ["yes", "no"]})
    parquet.write_table(rows, tmp_path / "t.parquet")
    both = {"path": "t.parquet", "test_path": "test.csv"}
    with pytest.raises(InvalidData, match=r"'b' is of the type double in 't\.parquet', and text"):
        load(tmp_path, **both)
    data = load(tmp_path, ignore=["b"], **both)
    assert data.train_x.categories[0] == data.test_x.categories[1]


def test_text_that_is_not_utf_8_is_told_as_such(tmp_path):
    (tmp_path / "latin.csv").write_bytes("a,paid\nZürich,yes\nBern,no\n".encode("latin-1"))
    with pytest.raises(InvalidData, match="write its file in UTF-8"):
        load(tmp_path, path="latin.csv")


def test_a_test_file_may_lack_what_is_ignored(tmp_path):
    (tmp_path / "test.csv").write_text("town,age,paid\nGenf,30,no\n")
    data = load(tmp_path, test_path="test.csv", ignore=["noise"])
    assert data.test_x.numbers.tolist() == [[30]]


def test_test_rows_may_have_a_file_of_their_own(tmp_path):
    (tmp_path / "test.csv").write_text("town,noise,age,paid\nGenf,1,30,no\n")
    data = load(tmp_path, test_path="test.csv")
    assert (len(data.train_y), len(data.test_y)) == (6, 1)
    assert data.test_x.numbers.tolist() == [[30, 1]]
    (tmp_path / "test.csv").write_text("town,noise,paid\nGenf,1,no\n")
    with pytest.raises(InvalidData, match="lacks the columns age"):
        load(tmp_path, test_path="test.csv")


@pytest.mark.parametrize(
    ("text", "settings", "says"),
    [
        ("", {}, "cannot be read: Empty CSV file"),
        ("age,town,paid\n", {}, "has no rows"),
        ("age,paid\n1,yes,3\n", {}, "Expected 2 columns, got 3"),
        (ROWS, {"target": "income"}, "no column 'income'; it has age, town, paid, noise"),
        (ROWS, {"ignore": ["x"]}, "no column 'x'"),
        (ROWS, {"ignore": ["paid"]}, "task.data.ignore: 'paid' is the target"),
        (ROWS, {"delimiter": "§"}, "task.data.delimiter: must be an ASCII"),
        ("a,paid\n1,yes\n2,yes\n", {}, "'paid' has one class alone"),
        ("a,paid\n1,yes\n2,\n", {}, "'paid' is missing in 1 of 2 rows"),
        ("a,paid\n1,1.5\n2,nan\n", {}, "'paid' is missing in 1 of 2 rows"),
        ("a,paid\n1,1.5\n2,inf\n", {}, "'paid' is missing in 1 of 2 rows"),
        ("a,paid\n1,yes\ninf,no\n", {}, "'a' holds infinity"),
        ("paid\nyes\nno\n", {}, "no column beside the target"),
        (ROWS, {"kind": "regression"}, "a regression needs a number"),
        (ROWS, {"path": "gone.csv"}, "there is no file 'gone.csv'"),
        (ROWS, {"path": "."}, "cannot be read"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path, text, settings, says):
    with pytest.raises(InvalidData, match=says):
        load(tmp_path, text, **settings)


def test_a_broken_parquet_file_is_said_to_be_one(tmp_path):
    (tmp_path / "t.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(InvalidData, match="cannot be read"):
        load(tmp_path, path="t.parquet")


def test_each_split_imputes_scales_and_encodes_by_its_own_training_rows(tmp_path):
    random = np.random.default_rng(0)
    lines = ["a,b,c,y"]
    lines += [
        f"{'' if i % 7 == 0 else random.normal(5, 3)},{random.choice(list('uvw'))},1,{i % 2}"
        for i in range(60)
    ]
    data = load(tmp_path, "\n".join(lines), target="y", test_fraction=0.2)
    whole = prepared(data, folds=4)
    rows = len(data.train_y)
    for number, split in enumerate(whole.splits):
        own = split.training - number * rows
        assert own.min() >= 0
        assert own.max() < rows
        known = data.train_x.numbers[own, 0]
        filled = np.where(np.isnan(known), np.nanmedian(known), known)
        x = whole.rows.x[split.training]
        expected = (filled - filled.mean()) / filled.std()
        np.testing.assert_allclose(x[:, 0], expected, atol=1e-5)
        np.testing.assert_array_equal(x[:, 1], 0)  # a constant column
        one_hot = OneHotEncoder(sparse_output=False).fit_transform(data.train_x.categories[own])
        np.testing.assert_array_equal(x[:, 2:].sum(1), 1)
        np.testing.assert_array_equal(np.sort(x[:, 2:].sum(0)), np.sort(one_hot.sum(0)))
        labels = whole.rows.y[split.training].numpy()
        np.testing.assert_array_equal(labels, data.train_y[own])
        tested = whole.test.y[split.test].numpy()
        np.testing.assert_array_equal(tested, data.test_y)


def test_a_category_that_no_training_row_has_is_none_of_those_known(tmp_path):
    (tmp_path / "test.csv").write_text("age,town,paid,noise\n30,Genf,no,1\n")
    whole = prepared(load(tmp_path, test_path="test.csv"), fraction=0.5)
    assert whole.test.x[0, 2:].tolist() == [0] * (whole.test.x.shape[1] - 2)
    assert whole.rows.x[whole.splits[0].training][:, 2:].sum(1).tolist() == [1] * 3


def test_features_are_the_same_for_splits_that_know_other_categories(tmp_path):
    lines = ["town,y", *(f"town-{i},{i % 2}" for i in range(40))]
    whole = prepared(load(tmp_path, "\n".join(lines), target="y"), folds=3)
    for split in whole.splits:
        trained = whole.rows.x[split.training]
        assert trained.sum(1).tolist() == [1] * len(trained)
        assert whole.rows.x[split.validation].sum() == 0  # all towns there are unknown


@pytest.mark.parametrize(
    ("free", "path", "says"),
    [
        (100, "t.csv", r"'t\.csv' takes \d\.\d kB of memory at least, but 100 bytes are free"),
        (100, "t.parquet", r"'t\.parquet' takes .* kB of memory at least, but 100 bytes are free"),
        (10_000, "t.csv", r"600 rows of 1 features take .* for 5 folds and repeats, but 10\.0 kB"),
    ],
)
def test_a_table_that_the_memory_cannot_hold_is_refused_with_its_sizes(
    tmp_path, monkeypatch, free, path, says
):
    rows = pa.table({"x": np.linspace(1, 2, 600).round(9), "y": np.arange(600) % 2})
    parquet.write_table(rows, tmp_path / "t.parquet")
    csv.write_csv(rows, tmp_path / "t.csv")
    for module in (tabular, encoding):
        monkeypatch.setattr(module, "free_bytes", lambda device: free)
    with pytest.raises(NoRoom, match=says):
        prepared(table(Storage(tmp_path), path=path, target="y"), folds=5)


def test_many_categories_become_a_hundred_columns_at_most(tmp_path):
    lines = ["town,y", *(f"town-{i // 2 if i < 150 else i},{i % 2}" for i in range(400))]
    whole = prepared(load(tmp_path, "\n".join(lines), target="y", test_fraction=0.01))
    assert whole.rows.x.shape[1] == 100
    assert whole.rows.x.sum(1).tolist() == [1] * len(whole.rows)


def test_a_large_table_is_read_and_prepared(tmp_path):
    """2 000 rows by 500 columns, a fifth of them text."""
    random = np.random.default_rng(0)
    columns: dict[str, Any] = {f"n{i}": random.normal(size=2_000) for i in range(400)}
    columns |= {f"c{i}": random.choice(list("abcdef"), 2_000) for i in range(100)}
    columns["y"] = random.integers(0, 3, 2_000)
    parquet.write_table(pa.table(columns), tmp_path / "t.parquet")
    data = table(Storage(tmp_path), path="t.parquet", target="y")
    whole = prepare(data, Validation(), 0, torch.float32)
    assert whole.rows.x.shape == (1600, 400 + 600)


@pytest.mark.parametrize(
    ("file", "settings", "shape", "positive"),
    [
        ("adult-train.csv", {"target": "income", "columns": ADULT}, (26_048, 6, 8), 0.2408),
        ("phoneme.csv", {"target": "f", "columns": list("abcdef")}, (4_323, 5, 0), 0.2935),
        ("transfusion.data", {"target": "response"}, (598, 4, 0), 0.2375),
    ],
)
def test_real_tables_are_read(file, settings, shape, positive):
    if not (TABULAR / file).is_file():
        pytest.skip(f"needs {TABULAR / file}; REGTUNE_TEST_DATA may say where")
    data = table(Storage(TABULAR), path=file, **settings)
    x = data.train_x
    assert (len(x), x.numbers.shape[1], x.categories.shape[1]) == shape
    assert data.classes == 2
    assert data.train_y.mean() == pytest.approx(positive, abs=0.002)
    assert prepared(data).rows.x.isfinite().all()
