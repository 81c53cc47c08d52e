"""The data set ``table``: a CSV or Parquet file with one column to predict."""

import io
from collections.abc import Collection, Mapping, Sequence
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from pyarrow import csv, parquet

from regtune.errors import InvalidData
from regtune.spec import TableSettings
from regtune.task import Columns, Data, Storage
from worker.errors import NoRoom
from worker.tasks.files import opened
from worker.tasks.holdout import hold_out
from worker.training.capacity import free_bytes, readable

MOST_CLASSES = 20
"""A target of whole numbers is a class if it has no more values than this."""

_PARQUET = (".parquet", ".pq")

_FAR = 2**12
"""So many times as far from zero as it is wide is a column of which float32 keeps too little."""


def table(storage: Storage, **settings: Any) -> Data:
    """Return a table's rows; what is done with them is said at ``TableSettings``.

    Text is stripped of spaces, and is numbers where all of it reads as such. Classes are numbered
    in the order of their names, or of their values. Raises InvalidData.
    """
    asked = TableSettings.model_validate(settings)
    for field, fault in asked.faults():
        raise InvalidData(f"task.data.{field}: {fault}")
    train = _read(asked.path, storage, asked)
    both = train if asked.test_path is None else _with_test_rows(train, storage, asked)
    columns = {name: _settled(both[name], name, asked) for name in both.column_names}
    y, classes = _target(columns.pop(asked.target), asked)
    x = _inputs(columns, asked)
    if asked.test_path is not None:
        training, tested = np.split(np.arange(len(y)), [len(train)])
    else:
        training, tested = hold_out(y, classes, asked.test_fraction)
    return Data(x[training], y[training], x[tested], y[tested], classes)


def _read(
    address: str,
    storage: Storage,
    asked: TableSettings,
    *,
    may_lack: Collection[str] = (),
    texts: Collection[str] = (),
) -> pa.Table:
    """Return a file's columns, without those to ignore, of which it may lack some.

    ``texts`` are columns to be read as text, letter by letter. Raise InvalidData if there are no
    rows, or no column of a name that is asked for.
    """
    with opened(address, storage) as file:
        try:
            _check_room(address, file)
            if address.lower().endswith(_PARQUET):
                rows = _as_texts(_without_index(parquet.read_table(file)), texts, address)
            else:
                rows = csv.read_csv(
                    file,
                    csv.ReadOptions(column_names=asked.columns),
                    csv.ParseOptions(delimiter=asked.delimiter),
                    csv.ConvertOptions(
                        null_values=list(asked.missing),
                        strings_can_be_null=True,
                        column_types=dict.fromkeys((*asked.categorical, *texts), pa.string()),
                    ),
                )
        except MemoryError:  # Arrow's is one of its own, too
            raise
        except pa.ArrowException as error:
            raise InvalidData(f"{address!r} cannot be read: {error}") from None
    if not len(rows):
        raise InvalidData(f"{address!r} has no rows")
    named = [asked.target, *asked.numeric, *asked.categorical, *asked.ignore]
    unknown = [name for name in named if name not in (*rows.column_names, *may_lack)]
    if unknown:
        raise InvalidData(
            f"{address!r} has no column {unknown[0]!r}; it has {_listed(rows.column_names)}"
        )
    if len(set(rows.column_names)) < len(rows.column_names):
        raise InvalidData(f"{address!r} has two columns of one name")
    if "" in rows.column_names:
        raise InvalidData(
            f"{address!r} has a column without a name, as an index that pandas wrote beside the "
            "columns; write it without (`index=False`), or name all under task.data.columns"
        )
    return rows.drop_columns([name for name in asked.ignore if name in rows.column_names])


def _without_index(rows: pa.Table) -> pa.Table:
    """Return a table without the index that pandas has written among the columns of its frame.

    Nobody sees it there as a column, and it may well tell the target: of rows in order, for one.
    """
    kept = (rows.schema.pandas_metadata or {}).get("index_columns", [])
    unnamed = [name for name in kept if isinstance(name, str) and name.startswith("__index_level_")]
    return rows.drop_columns([name for name in unnamed if name in rows.column_names])


def _check_room(address: str, file: IO[bytes]) -> None:
    """Raise NoRoom if the machine's memory cannot hold a file's columns."""
    if address.lower().endswith(_PARQUET):
        metadata = parquet.read_metadata(file)
        groups = (metadata.row_group(number) for number in range(metadata.num_row_groups))
        needed = sum(group.total_byte_size for group in groups)
    else:
        needed = file.seek(0, io.SEEK_END)
    file.seek(0)
    free = free_bytes(torch.device("cpu"))
    if needed > free:
        raise NoRoom(
            f"{address!r} takes {readable(needed)} of memory at least, but {readable(free)} are "
            "free; take a file of fewer rows or columns, or a machine of more memory"
        )


def _with_test_rows(train: pa.Table, storage: Storage, asked: TableSettings) -> pa.Table:
    """Return the training rows and, behind them, those of the test file.

    A column that is text in one file alone is read anew as text in the other: of what has been
    taken for numbers or for true and false, nobody knows any more how it was written.
    """
    assert asked.test_path is not None
    test = _read(asked.test_path, storage, asked, may_lack=asked.ignore)
    lacking = set(train.column_names) - set(test.column_names)
    if lacking:
        raise InvalidData(f"{asked.test_path!r} lacks the columns {_listed(sorted(lacking))}")
    kinds = {name: (train[name].type, test[name].type) for name in train.column_names}
    texts = [name for name, (a, b) in kinds.items() if _is_text(a) != _is_text(b)]
    if any(not _is_text(kinds[name][0]) for name in texts):
        train = _read(asked.path, storage, asked, texts=texts)
    if any(not _is_text(kinds[name][1]) for name in texts):
        test = _read(asked.test_path, storage, asked, may_lack=asked.ignore, texts=texts)
    both = [train, test.select(train.column_names)]
    try:
        return pa.concat_tables(both, promote_options="permissive")
    except pa.ArrowException as error:
        raise InvalidData(f"training and test rows are of different types: {error}") from None


def _as_texts(rows: pa.Table, names: Collection[str], address: str) -> pa.Table:
    """Return Parquet's columns with some of them as text; raise InvalidData if one has no one way.

    Whole numbers have one way to be written. Others, such as 1.0, have several.
    """
    for name in names:
        column = rows[name]
        kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
        if not (_is_text(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind)):
            raise InvalidData(
                f"the column {name!r} is of the type {kind} in {address!r}, and text in the other "
                "file; write it as text in both, or name it under task.data.ignore"
            )
        place = rows.column_names.index(name)
        rows = rows.set_column(place, name, column.cast(kind).cast(pa.string()))
    return rows


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _settled(column: pa.ChunkedArray, name: str, asked: TableSettings) -> pa.Array:
    """Return a column as float64 or as text, with nulls where a value is missing."""
    values = column.combine_chunks()
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    kind = values.type
    if name in asked.categorical:
        return _names(values, name, asked)
    if pa.types.is_boolean(kind):
        values = values.cast(pa.string())
    elif pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        values = values.cast(pa.float64(), safe=False)
    elif pa.types.is_null(kind):
        values = values.cast(pa.float64())
    elif _is_text(kind):
        values = _text(values, asked.missing)
    else:
        other = ", or write its file in UTF-8 if it is a text in other letters"
        raise InvalidData(
            f"the column {name!r} is of the type {kind}, which is neither a number nor text; name "
            f"it under task.data.ignore or categorical{other if pa.types.is_binary(kind) else ''}"
        )
    if name in asked.numeric and not pa.types.is_floating(values.type):
        raise InvalidData(f"the column {name!r} should be numeric, but not all of it is numbers")
    return values


def _names(values: pa.Array, name: str, asked: TableSettings) -> pa.Array:
    """Return categories as text, each as it is: as numbers, long ids would become one another."""
    if _is_text(values.type):
        return _known(values, asked.missing)
    if pa.types.is_floating(values.type):
        values = pc.if_else(pc.is_nan(values), None, values)
    try:
        return values.cast(pa.string())
    except pa.ArrowException as error:
        raise InvalidData(
            f"the column {name!r} is of the type {values.type}, which cannot be categories "
            f"({error}); name it under task.data.ignore"
        ) from None


def _text(values: pa.Array, missing: Sequence[str]) -> pa.Array:
    """Return text without spaces around it, or as numbers if all of it reads as such."""
    known = _known(values, missing)
    try:
        return known.cast(pa.float64())
    except pa.ArrowInvalid:
        return known


def _known(values: pa.Array, missing: Sequence[str]) -> pa.Array:
    """Return text without spaces around it, and null where that says that there is none."""
    stripped = pc.utf8_trim_whitespace(values)
    absent = pc.is_in(stripped, value_set=pa.array(missing, stripped.type))
    return pc.if_else(absent, pa.scalar(None, stripped.type), stripped)


def _target(values: pa.Array, asked: TableSettings) -> tuple[NDArray[Any], int | None]:
    """Return the target, and how many classes it has; None if it is a number."""
    numbers = pa.types.is_floating(values.type)
    absent = values.null_count
    if numbers:
        plain = values.to_numpy(zero_copy_only=False)
        absent = np.count_nonzero(~np.isfinite(plain))
    if absent:
        raise InvalidData(
            f"the target {asked.target!r} is missing in {absent} of {len(values)} rows"
        )
    distinct = np.unique(plain) if numbers else pc.unique(values).sort()
    if (asked.kind or _kind(distinct if numbers else None)) == "regression":
        if not numbers:
            raise InvalidData(f"a regression needs a number, and {asked.target!r} is none")
        return plain.astype(_precision([plain])), None
    if len(distinct) < 2:
        raise InvalidData(f"the target {asked.target!r} has one class alone")
    codes = np.searchsorted(distinct, plain) if numbers else pc.index_in(values, distinct)
    return np.asarray(codes).astype(np.int64), len(distinct)


def _kind(numbers: NDArray[np.float64] | None) -> str:
    if numbers is None:
        return "classification"
    whole = bool((numbers == np.round(numbers)).all())
    return "classification" if whole and len(numbers) <= MOST_CLASSES else "regression"


def _inputs(columns: Mapping[str, pa.Array], asked: TableSettings) -> Columns:
    """Put numbers side by side, and number the values of each categorical column."""
    if not columns:
        raise InvalidData("there is no column beside the target")
    numbers = {name: v for name, v in columns.items() if pa.types.is_floating(v.type)}
    for name, values in numbers.items():
        if pc.any(pc.is_inf(values)).as_py():
            raise InvalidData(f"the column {name!r} holds infinity")
    rows = len(next(iter(columns.values())))
    plain = [values.to_numpy(zero_copy_only=False) for values in numbers.values()]
    codes = [_codes(values) for name, values in columns.items() if name not in numbers]
    return Columns(
        _side_by_side(plain, rows, _precision(plain)), _side_by_side(codes, rows, np.int32)
    )


def _precision(columns: Sequence[NDArray[np.float64]]) -> type[np.float32 | np.float64]:
    """Return in what numbers are kept until they are standardized: float64 where it must be.

    float32 has 24 bits. Of a column that is much further from zero than it is wide, as of moments
    of a week in seconds since 1970, less than half of them would be left for what varies.
    """
    for column in columns:
        known = column[np.isfinite(column)]
        if known.size and 0 < np.ptp(known) * _FAR < np.abs(known).max():
            return np.float64
    return np.float32


def _codes(values: pa.Array) -> NDArray[np.int32]:
    """Number the values of a column in their order, -1 for a missing one."""
    distinct = pc.unique(values.drop_null()).sort()
    codes: NDArray[np.int32] = pc.fill_null(pc.index_in(values, distinct), -1).to_numpy()
    return codes


def _side_by_side(columns: Sequence[NDArray[Any]], rows: int, dtype: Any) -> NDArray[Any]:
    whole = np.empty((rows, len(columns)), dtype)
    for place, column in enumerate(columns):
        whole[:, place] = column
    return whole


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:20])
    return f"{shown} and {len(names) - 20} more" if len(names) > 20 else shown
