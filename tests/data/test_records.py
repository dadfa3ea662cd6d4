from __future__ import annotations

import json
import pickle
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from model.data.records import open_records
from model.errors import MedPLIBError

RECORDS = [
    {
        "id": f"q{number}",
        "image": f"images/ct_{number}.png",
        "conversations": [
            {"from": "human", "value": '<image>\nIs {this} "the [liver]", 3.5 µm \\ wide?'},
            {"from": "gpt", "value": "Yes, 约 5 }"},
        ],
        "answer_type": "open",
    }
    for number in range(7)
]


def write(path: Path, form: str) -> Path:
    if form == "parquet":
        parquet.write_table(pa.Table.from_pylist(RECORDS), path, row_group_size=3)
    elif form == "parquet with JSON text":
        rows = [{**record, "conversations": json.dumps(record["conversations"])} for record in RECORDS]
        parquet.write_table(pa.Table.from_pylist(rows), path)
    elif form == "lines":
        path.write_text("\n".join(json.dumps(record) for record in RECORDS))
    elif form == "lines, CRLF, blank lines, byte-order mark":
        text = "\r\n\r\n".join(json.dumps(record, ensure_ascii=False) for record in RECORDS)
        path.write_bytes(b"\xef\xbb\xbf" + f"{text}\r\n".encode())
    elif form == "list, indented, CRLF, byte-order mark":
        text = json.dumps(RECORDS, indent=2, ensure_ascii=False).replace("\n", "\r\n")
        path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    else:
        path.write_text(json.dumps(RECORDS))
    return path


FORMS = [
    "list",
    "list, indented, CRLF, byte-order mark",
    "lines",
    "lines, CRLF, blank lines, byte-order mark",
    "parquet",
    "parquet with JSON text",
]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_reads_alike_pickled_and_in_threads(tmp_path: Path, form: str) -> None:
    records = open_records(write(tmp_path / "data", form))
    assert len(records) == 7
    assert [records[index] for index in (6, 0, 3, -1)] == [RECORDS[index] for index in (6, 0, 3, 6)]
    assert list(records) == RECORDS
    assert records[2:5] == RECORDS[2:5]
    copy = pickle.loads(pickle.dumps(records))
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(copy.__getitem__, range(7))) == RECORDS
    with pytest.raises(IndexError):
        records[7]


def test_an_empty_list_has_no_records(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(" [ ] \n")
    assert len(open_records(tmp_path / "data.json")) == 0


def test_memory_holds_offsets_not_records(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps(RECORDS * 1000))
    tracemalloc.start()
    records = open_records(path)
    records[6999]
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(records) == 7000
    assert used < path.stat().st_size / 4


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[{"a": 1},\n {"b": 2},\n]', "line 2, column 10: a comma follows the last record (1)"),
        ('[{"a": 1}\n {"b": 2}]', "line 2, column 2: expected a comma or ']' after record 0"),
        ('[{"a": 1},\n {"b": "cut', "line 2, column 2: record 1 is not closed"),
        ('[{"a": "no end},\n {"b": "x"}]', "line 1, column 2: record 0 is not closed"),
        ('[{"a": 1},', "ends in the middle"),
        ('[{"a": 1}', "ends after 1 records"),
        ('[{"a": 1}] more', "line 1, column 12: text after the end"),
        ('[{"a": 1}, x]', "line 1, column 12: record 1 is no JSON value"),
        ('{\n "a": 1,\n "b": 2\n}\n', "one object over several lines"),
        ("", "holds no record"),
        ("id,image\n", "neither a JSON list"),
        ("PAR1 nonsense", "not a readable Parquet file"),
    ],
)
def test_inseparable_records_are_refused_with_the_place(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "data.json"
    path.write_text(text)
    with pytest.raises(MedPLIBError) as caught:
        open_records(path)
    assert expected in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[{"a": 1},\n{"é": 2, "b": [1, 2,]}]', "record 1, line 2, column 20: a comma stands before a closing bracket"),
        ('[{"a": 1},\n{"b": 2,}]', "a comma stands before a closing bracket"),
        ("[{\"a\": 1},\n{'b': 2}]", "record 1, line 2, column 2: not valid JSON"),
        ('{"a": 1}\n[1]\n', "record 1, line 2, column 1: got list, expected an object"),
        ('{"a": 1}\n{"b": \n', "record 1"),
    ],
)
def test_a_broken_record_leaves_the_others_readable(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "data.json"
    path.write_text(text, encoding="utf-8")
    records = open_records(path)
    assert records[0] == {"a": 1}
    with pytest.raises(MedPLIBError) as caught:
        records[1]
    assert expected in str(caught.value)


def test_bytes_that_are_not_utf8_are_located(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"a": 1}\n{"b": "\xe9t\xe9"}\n')
    with pytest.raises(MedPLIBError, match="record 1, line 2, column 8: not UTF-8"):
        open_records(path)[1]
    path.write_text('[{"a": 1}]', encoding="utf-16")
    with pytest.raises(MedPLIBError, match="UTF-16"):
        open_records(path)


def test_absent_files_and_foreign_tables_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MedPLIBError, match="No such file"):
        open_records(tmp_path / "none.json")
    parquet.write_table(pa.table({"x": [1]}), tmp_path / "x.parquet")
    with pytest.raises(MedPLIBError, match="no column 'conversations'"):
        open_records(tmp_path / "x.parquet")


def test_a_file_that_changed_is_noticed_by_a_worker(tmp_path: Path) -> None:
    path = write(tmp_path / "data", "list")
    state = pickle.dumps(open_records(path))
    path.write_text("[]")
    with pytest.raises(MedPLIBError, match="changed while it was in use"):
        pickle.loads(state)


def test_values_that_are_no_objects_hide_no_other_record(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    long = ["é" * 7000, 7]  # beyond the first piece that is looked at
    values = [{"a": 1}, ["a list", {"é": "]"}], "text", 7, None, {"b": 2}, long, {"c": 3}]
    path.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
    records = open_records(path)
    assert len(records) == 8 and records[5] == {"b": 2} and records[7] == {"c": 3}
    for number, found in enumerate(("list", "str", "int", "NoneType"), start=1):
        with pytest.raises(MedPLIBError, match=f"record {number}, .*got {found}, expected an object"):
            records[number]
