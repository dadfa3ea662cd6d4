"""The build engine: resumable pieces, the same bytes however they are done, refusals in a sentence."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest

from model.data.builders.jobs import Build, BuildReport, Execution, Output, Part, Piece, fingerprint, run_build
from model.data.records import open_records
from model.errors import MedPLIBError

SCHEMA = arrow.schema([("number", arrow.int64()), ("text", arrow.string())])
OUTPUTS = (Output("all.jsonl"), Output("lists/odd.json"), Output("rows.parquet", SCHEMA), Output("never.jsonl"))
ROOT = Path(__file__).resolve().parents[2]


def square(piece: range, context: dict[str, str], part: Part) -> None:
    """Writes a record a number, notes every seventh, and fails as it is told to."""
    for number in piece:
        if number == 13 and "stop" in context and not Path(context["stop"]).exists():
            Path(context["stop"]).touch()
            if context["how"] == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            raise {"told": MedPLIBError("13 is unlucky"), "full": OSError(28, "No space left")}[context["how"]]
        if number % 7 == 0:
            part.find("seventh", f"{number} is left out", record=number)
            continue
        record = {"number": number, "text": f"n°{number * number}", "conversations": []}
        part.write("all.jsonl", record)
        if number % 2:
            part.write("lists/odd.json", record)
        part.write("rows.parquet", {"number": number, "text": record["text"]})
        part.count("parity", "odd" if number % 2 else "even")


PIECES = [Piece(range(start, start + 5), 5) for start in range(0, 60, 5)]
FILES = ("all.jsonl", "lists/odd.json", "rows.parquet", "findings_squares.jsonl")


def build_in(out: Path, **settings: object) -> Build:
    return Build(out, "squares", {"seed": 1, **settings}, OUTPUTS, unit="number")


def go(build: Build, context: dict[str, str] | None = None, pieces: int = 12, **execution: object) -> BuildReport:
    return run_build(build, lambda: (PIECES[:pieces], context or {}), square, Execution(**execution))


def run(out: Path, context: dict[str, str] | None = None, **execution: object) -> BuildReport:
    return go(build_in(out), context, **execution)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    run(out)
    return out


def half(folder: Path, build: Build) -> None:
    """Begin a build and stop in its third piece."""
    context = {"stop": str(folder / "stopped"), "how": "told"}
    with pytest.raises(MedPLIBError, match="unlucky"):
        go(build, context)


def same(left: Path, right: Path) -> bool:
    return all((left / name).read_bytes() == (right / name).read_bytes() for name in FILES)


def test_outputs_hold_all_records_in_order(whole: Path) -> None:
    wanted = [number for number in range(60) if number % 7]
    assert [record["number"] for record in open_records(whole / "all.jsonl")] == wanted
    assert [record["number"] for record in open_records(whole / "lists/odd.json")] == [n for n in wanted if n % 2]
    assert parquet.read_table(whole / "rows.parquet").column("number").to_pylist() == wanted
    assert not (whole / "never.jsonl").exists()
    found = [json.loads(line) for line in (whole / "findings_squares.jsonl").read_text().splitlines()]
    assert [line["record"] for line in found] == list(range(0, 60, 7))
    report = json.loads((whole / "report_squares.json").read_text())
    assert report["counts"] == {"parity": {"even": sum(n % 2 == 0 for n in wanted), "odd": sum(n % 2 for n in wanted)}}
    assert report["findings"]["seventh"]["count"] == 9
    assert report["findings"]["seventh"]["examples"][0] == "0 is left out"
    assert report["files"]["all.jsonl"]["records"] == len(wanted)


def test_any_number_of_workers_gives_the_same_bytes(whole: Path, tmp_path: Path) -> None:
    (tmp_path / ".all.jsonl.host.77.tmp").write_text("half of a run that was killed while it joined")
    run(tmp_path, workers=2)
    assert same(whole, tmp_path)
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_finished_build_is_left_alone(whole: Path) -> None:
    before = {name: (whole / name).stat().st_mtime_ns for name in FILES}
    report = run(whole)
    assert report.did_nothing
    assert "nothing was done" in report.format()
    assert before == {name: (whole / name).stat().st_mtime_ns for name in FILES}


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("how", "told"), [("told", "13 is unlucky"), ("full", "disk of .* is full"), ("die", "worker process died")]
)
def test_a_failure_is_one_sentence_and_a_rerun_goes_on(
    whole: Path, tmp_path: Path, how: str, told: str, workers: int
) -> None:
    if how == "die" and workers == 1:
        pytest.skip("that would end the tests")
    context = {"stop": str(tmp_path / "stopped"), "how": how}
    with pytest.raises(MedPLIBError, match=told):
        run(tmp_path / "out", context, workers=workers)
    assert not (tmp_path / "out/all.jsonl").exists()
    run(tmp_path / "out", context, workers=workers)
    assert same(whole, tmp_path / "out")


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_in_the_middle_it_goes_on_to_the_same_bytes(whole: Path, tmp_path: Path, workers: int) -> None:
    script = (
        "import sys, time\nsys.path[:0] = [sys.argv[1], sys.argv[1] + '/tests/data']\n"
        "import test_build_jobs as t\nfrom pathlib import Path\n"
        "if __name__ == '__main__':\n"
        "    how = t.Execution(int(sys.argv[3]))\n"
        "    t.run_build(t.build_in(Path(sys.argv[2])), lambda: (t.PIECES, {}), t.slowly, how)\n"
    )
    place = tmp_path / "run.py"
    place.write_text(script)
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, str(place), str(ROOT), str(out), str(workers)])
    done = out / ".build/squares/parts/of_12"
    deadline = time.monotonic() + 300
    while len(list(done.glob("part_?????"))) < 3:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "all.jsonl").exists()
    deadline = time.monotonic() + 300
    while True:  # a worker ends with the piece that it has in hand
        try:
            run(out, workers=workers)
            break
        except MedPLIBError:
            assert time.monotonic() < deadline
    assert same(whole, out)


def slowly(piece: range, context: dict[str, str], part: Part) -> None:
    """As ``square``, giving the test time to kill it."""
    time.sleep(0.2)
    square(piece, context, part)


def test_other_settings_and_foreign_files_are_refused(tmp_path: Path) -> None:
    half(tmp_path, build_in(tmp_path))
    other = build_in(tmp_path, seed=2)
    with pytest.raises(MedPLIBError, match=r"seed = 1 where this run has 2.*--overwrite"):
        go(other)
    report = go(other, overwrite=True)
    assert report.files["all.jsonl"]["records"] == 51
    (tmp_path / "other").mkdir()
    (tmp_path / "other/all.jsonl").write_text("mine\n")
    with pytest.raises(MedPLIBError, match=r"all\.jsonl exists"):
        run(tmp_path / "other")
    assert (tmp_path / "other/all.jsonl").read_text() == "mine\n"


def test_parts_of_other_pieces_are_not_taken(tmp_path: Path, whole: Path) -> None:
    context = {"stop": str(tmp_path / "stopped"), "how": "told"}
    halves = [Piece(range(0, 12), 12), Piece(range(12, 60), 48)]
    with pytest.raises(MedPLIBError, match="unlucky"):
        run_build(build_in(tmp_path), lambda: (halves, context), square, Execution())
    run(tmp_path)
    assert same(whole, tmp_path)


def test_nothing_is_prepared_where_all_is_there(whole: Path) -> None:
    def prepare() -> tuple[list[Piece], None]:
        raise AssertionError

    assert run_build(build_in(whole), prepare, square, Execution()).did_nothing


def test_rows_fill_row_groups_whatever_the_pieces(tmp_path: Path) -> None:
    build = Build(
        tmp_path, "squares", {}, (Output("all.jsonl"), Output("lists/odd.json"), Output("rows.parquet", SCHEMA, 17))
    )
    go(build)
    file = parquet.ParquetFile(tmp_path / "rows.parquet")
    assert [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)] == [17, 17, 17]


def test_a_lost_file_is_made_again(tmp_path: Path, whole: Path) -> None:
    run(tmp_path)
    (tmp_path / "lists/odd.json").unlink()
    assert not run(tmp_path).did_nothing
    assert same(whole, tmp_path)


def test_a_changed_source_is_noticed_and_a_copy_is_the_same(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    (raw / "test").mkdir(parents=True)
    files = [raw / "train.json", raw / "test/train.json"]
    for file in files:
        file.write_text("[1]")
    first = fingerprint(files)
    copy = Path(shutil.copytree(raw, tmp_path / "copy", copy_function=shutil.copyfile))
    assert fingerprint([copy / file.relative_to(raw) for file in files]) == first
    assert set(first) == {"train.json", "test/train.json"}
    files[1].write_text("[2]")  # as many bytes
    assert fingerprint(files) != first
    with pytest.raises(MedPLIBError, match="cannot read"):
        fingerprint([tmp_path / "absent"])


def moved(out: Path, images: str, prints: dict[str, str], **execution: object) -> BuildReport:
    return go(Build(out, "squares", {"seed": 1, "images": images}, OUTPUTS, prints), **execution)


@pytest.mark.parametrize("finished", [True, False])
def test_a_moved_source_goes_on_with_same_source(tmp_path: Path, whole: Path, finished: bool) -> None:
    if finished:
        moved(tmp_path, "/disk1/images", {"names.csv": "a"})
    else:
        half(tmp_path, Build(tmp_path, "squares", {"seed": 1, "images": "/disk1/images"}, OUTPUTS, {"names.csv": "a"}))
    with pytest.raises(MedPLIBError, match=r"images = '/disk1/images' where this run has '/disk2.*--same-source"):
        moved(tmp_path, "/disk2/images", {"names.csv": "a"})
    with pytest.raises(MedPLIBError, match=r"the source names\.csv = 'a' where this run has 'b'"):
        moved(tmp_path, "/disk1/images", {"names.csv": "b"})
    report = moved(tmp_path, "/disk2/images", {"names.csv": "b"}, same_source=True)
    assert report.did_nothing == finished and report.settings["images"] == "/disk2/images"
    assert same(whole, tmp_path)
    assert moved(tmp_path, "/disk2/images", {"names.csv": "b"}).did_nothing  # noted, so it is said once


def test_two_runs_do_not_work_in_one_folder(tmp_path: Path) -> None:
    nested = {"out": str(tmp_path)}
    with pytest.raises(MedPLIBError, match="another run builds squares"):
        run_build(build_in(tmp_path), lambda: (PIECES, nested), begin_again, Execution())


def begin_again(piece: range, context: dict[str, str], part: Part) -> None:
    """A build inside a build of the same folder."""
    run(Path(context["out"]))
