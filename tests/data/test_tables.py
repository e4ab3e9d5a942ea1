"""Documents from JSON lines, Parquet, Arrow, ``datasets`` and compressed files: the same ones, whoever reads them."""

import bz2
import gzip
import json
import lzma
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from k2train.config import SourceConfig
from k2train.data import DataError
from k2train.data.sources import Skip, cut_pieces, find_corpus, read_rows

ROWS = [
    {"title": f"title {n}", "text": f"line {n}\r\nnaïve 数据 😀 " * (n % 7 + 1), "url": f"https://x/{n}", "n": n}
    for n in range(200)
]


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=row["n"] % 2 == 0) + "\n" for row in rows), encoding="utf-8")


def write_parquet(path: Path, rows: list[dict]) -> None:
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=17)


def write_arrow(path: Path, rows: list[dict]) -> None:
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_file(path, table.schema) as file:
        file.write_table(table, max_chunksize=13)


def write_arrow_stream(path: Path, rows: list[dict]) -> None:
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_stream(path, table.schema) as file:
        file.write_table(table, max_chunksize=13)


def zstd(data: bytes) -> bytes:
    return pa.compress(data, codec="zstd", asbytes=True)


WRITERS = {
    "jsonl": ("jsonl", "a.jsonl", write_jsonl),
    "parquet": ("parquet", "a.parquet", write_parquet),
    "arrow": ("arrow", "a.arrow", write_arrow),
    "arrow stream": ("arrow", "a.arrow", write_arrow_stream),
}


def rows_of(source: SourceConfig, *, size: int = 1 << 20) -> list:
    corpus = find_corpus(source, "own", apart_from=Path("/nowhere"))
    return [row for piece in cut_pieces(source, corpus, size=size) for row in read_rows(source, piece)]


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("size", [1, 1000, 1 << 30])
def test_each_row_is_a_document_once_however_the_file_is_cut(tmp_path, name, size):
    kind, file, write = WRITERS[name]
    write(tmp_path / file, ROWS)
    found = rows_of(SourceConfig(kind=kind, path=str(tmp_path)), size=size)
    assert [row.content for row in found] == [row["text"] for row in ROWS]
    assert len({row.origin for row in found}) == len(ROWS)
    assert found == rows_of(SourceConfig(kind=kind, path=str(tmp_path / file)))


def test_the_place_of_a_line_is_its_byte_and_of_a_row_its_number(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    data = (tmp_path / "a.jsonl").read_bytes()
    for row in rows_of(SourceConfig(kind="jsonl", path=str(tmp_path)), size=500):
        start = int(row.origin.removeprefix("a.jsonl@"))
        assert json.loads(data[start:].split(b"\n")[0])["text"] == row.content
    write_parquet(tmp_path / "b.parquet", ROWS)
    found = rows_of(SourceConfig(kind="parquet", path=str(tmp_path)), size=500)
    assert [row.origin for row in found] == [f"b.parquet#{number}" for number in range(len(ROWS))]


@pytest.mark.parametrize("name", WRITERS)
def test_template_origin_and_group_are_columns(tmp_path, name):
    kind, file, write = WRITERS[name]
    write(tmp_path / file, ROWS)
    source = SourceConfig(kind=kind, path=str(tmp_path), text="{title}\n{text}", origin="url", group="title")
    assert rows_of(source) == [(f"{row['title']}\n{row['text']}", row["url"], row["title"]) for row in ROWS]


@pytest.mark.parametrize("name", WRITERS)
def test_a_mistyped_column_is_named_with_those_that_are_there(tmp_path, name):
    kind, file, write = WRITERS[name]
    write(tmp_path / file, ROWS)
    for keys in ({"text": "txt"}, {"text": "{title} {txt}"}, {"origin": "txt"}, {"group": "txt"}):
        with pytest.raises(DataError, match=rf"{file}.* has no column 'txt': it has 'title', 'text', 'url', 'n'; set"):
            rows_of(SourceConfig(kind=kind, path=str(tmp_path), **keys))
    with pytest.raises(DataError, match=rf"{file}.*: column 'n' holds int, not text: set the source's text"):
        rows_of(SourceConfig(kind=kind, path=str(tmp_path), text="n"))


@pytest.mark.parametrize(
    ("ending", "pack"),
    [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress), (".zst", zstd)],
)
def test_compressed_files_are_read_and_damaged_ones_named(tmp_path, ending, pack):
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    packed = tmp_path / f"a.jsonl{ending}"
    packed.write_bytes(pack((tmp_path / "a.jsonl").read_bytes()))
    (tmp_path / "a.jsonl").unlink()
    lines = SourceConfig(kind="jsonl", path=str(tmp_path))
    assert [row.content for row in rows_of(lines, size=100)] == [row["text"] for row in ROWS]
    (text,) = rows_of(SourceConfig(kind="folder", path=str(tmp_path)))
    assert text.content.count("\n") == len(ROWS)
    whole = packed.read_bytes()
    for damaged in (whole[:-20], whole[:40] + bytes(20) + whole[60:]):
        packed.write_bytes(damaged)
        for source in (lines, SourceConfig(kind="folder", path=str(tmp_path))):
            with pytest.raises(DataError, match=rf"{packed} (cannot be decompressed|has no JSON object).*: "):
                rows_of(source)


def test_what_is_no_document_is_counted_and_a_broken_line_is_an_error(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n{"text": ""}\n{"text": null}\n{"text": "na\xefve"}\n{"text": "\\ud800"}\n')
    source = SourceConfig(kind="jsonl", path=str(tmp_path))
    assert [row.content for row in rows_of(source)] == ["good", Skip.EMPTY, Skip.EMPTY, Skip.NOT_UTF8, Skip.NOT_UTF8]
    for broken in (b'{"text": "cut sh', b"[1]\n", b"3\n"):
        path.write_bytes(b'{"text": "good"}\n' + broken)
        with pytest.raises(
            DataError, match=r"a.jsonl has no JSON object in the line at byte 17 \(.*\): it may have been"
        ):
            rows_of(source)


def test_a_damaged_table_is_named(tmp_path):
    for kind, file, write in list(WRITERS.values())[1:3]:
        write(tmp_path / file, ROWS)
        whole = (tmp_path / file).read_bytes()
        (tmp_path / file).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(DataError, match=rf"{file} is no whole (Parquet|Arrow) file .*: get a whole copy"):
            rows_of(SourceConfig(kind=kind, path=str(tmp_path)))
        (tmp_path / file).unlink()


def test_filters(tmp_path):
    write_jsonl(
        tmp_path / "a.jsonl", [{"text": text, "n": 0} for text in ("ab", "abc", "abcd", "abcde", "xbcd", "abc#")]
    )
    source = SourceConfig(
        kind="jsonl", path=str(tmp_path), min_characters=3, max_characters=4, match=("^a", "c"), reject=("#$",)
    )
    assert [row.content for row in rows_of(source)] == [
        Skip.SHORT,
        "abc",
        "abcd",
        Skip.LONG,
        Skip.UNMATCHED,
        Skip.REJECTED,
    ]


@pytest.mark.parametrize("streaming", [False, True])
def test_what_datasets_reads(tmp_path, streaming, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    for number in range(3):
        write_jsonl(tmp_path / f"part{number}.jsonl", ROWS[number * 60 : number * 60 + 60])
    files = tuple(str(tmp_path / f"part{number}.jsonl") for number in range(3))
    source = SourceConfig(kind="datasets", path="json", data_files=files, streaming=streaming, origin="url")
    assert [tuple(row[:2]) for row in rows_of(source, size=2000)] == [(row["text"], row["url"]) for row in ROWS[:180]]
    with pytest.raises(DataError, match="no column 'txt': it has"):
        rows_of(SourceConfig(kind="datasets", path="json", data_files=files, streaming=streaming, text="txt"))
    with pytest.raises(DataError, match=r"load_dataset\('json', name=None, split='test'\) failed with ValueError"):
        rows_of(SourceConfig(kind="datasets", path="json", data_files=files, streaming=streaming, split="test"))


def write_megatron(path: Path, documents: list[list[int]], dtype: str, code: int) -> None:
    """As Megatron-LM's builder does: a sequence a document."""
    arrays = [np.array(document, dtype) for document in documents]
    path.with_suffix(".bin").write_bytes(b"".join(array.tobytes() for array in arrays))
    lengths = np.array([len(array) for array in arrays], "<i4")
    offsets = np.concatenate([[0], np.cumsum(lengths[:-1], dtype=np.int64)]) * np.dtype(dtype).itemsize
    bounds = np.arange(len(arrays) + 1, dtype="<i8")
    header = b"MMIDIDX\x00\x00" + (1).to_bytes(8, "little") + bytes([code])
    header += len(arrays).to_bytes(8, "little") + len(bounds).to_bytes(8, "little")
    path.with_suffix(".idx").write_bytes(
        header + lengths.tobytes() + offsets.astype("<i8").tobytes() + bounds.tobytes()
    )


DOCUMENTS = [list(range(10 + n, 30 + 3 * n)) for n in range(40)]


@pytest.mark.parametrize(("dtype", "code"), [("<u2", 8), ("<i4", 4)])
@pytest.mark.parametrize("size", [1, 300, 1 << 30])
def test_megatrons_files(tmp_path, dtype, code, size):
    write_megatron(tmp_path / "a", [[*document, 7] for document in DOCUMENTS], dtype, code)
    source = SourceConfig(kind="megatron", path=str(tmp_path), separator=7)
    found = rows_of(source, size=size)
    assert [row.content.tolist() for row in found] == DOCUMENTS
    assert [row.origin for row in found] == [f"a.idx#{number}" for number in range(len(DOCUMENTS))]
    (tmp_path / "a.bin").write_bytes((tmp_path / "a.bin").read_bytes()[:-1])
    with pytest.raises(DataError, match=r"a.bin is cut short: it has \d+ bytes and its index asks for \d+"):
        rows_of(source)
    (tmp_path / "a.idx").write_bytes((tmp_path / "a.idx").read_bytes()[:100])
    with pytest.raises(DataError, match=r"a\.idx is cut short"):
        rows_of(source)
    (tmp_path / "a.idx").write_bytes(b"x" * 100)
    with pytest.raises(DataError, match=r"a\.idx is no Megatron index"):
        rows_of(source)


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
@pytest.mark.parametrize("size", [1, 100, 1 << 30])
@pytest.mark.parametrize("before", [False, True])
def test_raw_files(tmp_path, dtype, size, before):
    ids = [token for document in DOCUMENTS for token in ([7, *document] if before else [*document, 7])]
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(ids)
    head = header.tobytes() if before else b""  # llm.c's, and none as of nanoGPT
    (tmp_path / "a.bin").write_bytes(head + np.array(ids, dtype).tobytes())
    source = SourceConfig(kind="raw", path=str(tmp_path), separator=7, dtype=dtype)
    assert [row.content.tolist() for row in rows_of(source, size=size)] == DOCUMENTS
    (tmp_path / "a.bin").write_bytes(b"\0" * 1023)
    with pytest.raises(DataError, match=rf"a\.bin has 1023 bytes, no whole number of {dtype} ids"):
        rows_of(source)
