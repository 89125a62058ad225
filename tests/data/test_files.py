import gzip
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from gptjax.data import files
from gptjax.errors import UserError

TEXTS = ["one\ntwo", "漢字 and 👩‍👧", "x" * 100, "", "last"]
OPENERS = {"jsonl": open, "jsonl.gz": gzip.open, "jsonl.zst": zstandard.open}


def write_jsonl(path, texts=TEXTS, key="text"):
  opener = OPENERS[path.name.split(".", 1)[1]]
  with opener(path, "wb") as stream:
    stream.write("\n".join(json.dumps({"id": 1, key: text}) for text in texts).encode())
  return path


def read(source):
  return [source[index] for index in range(len(source))]


@pytest.mark.parametrize("suffix", OPENERS)
def test_jsonl_reads_at_random(tmp_path, suffix):
  source = files.open_by_suffix(str(write_jsonl(tmp_path / f"a.{suffix}")), "text", "error")
  assert [source[index] for index in (4, 0, 2, 1, 3, 4)] == [
    TEXTS[index] for index in (4, 0, 2, 1, 3, 4)
  ]
  assert source.name(4) == f"{tmp_path / f'a.{suffix}'}:5"
  assert sum(source.sizes()) > 100


def test_jsonl_folder_mixes_plain_and_compressed_files(tmp_path):
  for number, suffix in enumerate(OPENERS):
    write_jsonl(tmp_path / f"{number}.{suffix}", [f"{suffix} {line}" for line in range(3)])
  (tmp_path / "README.md").write_text("not data")
  source = files.open_by_suffix(str(tmp_path), "text", "error")
  assert read(source) == [f"{suffix} {line}" for suffix in OPENERS for line in range(3)]
  assert source.name(5) == f"{tmp_path / '1.jsonl.gz'}:3"


def test_zstandard_frames_are_read_across(tmp_path):
  path = tmp_path / "a.jsonl.zst"
  path.write_bytes(zstandard.compress(b'{"text": "a') + zstandard.compress(b'b"}\n{"text": "c"}\n'))
  assert read(files.open_by_suffix(str(path), "text", "error")) == ["ab", "c"]


@pytest.mark.parametrize(
  ("line", "problem"),
  [
    ('{"content": "a", "url": "b"}', r":2: no key 'text' \(found: 'content', 'url'\)\. "
                                     r"Set --config\.data\.text_key=content\."),
    ('{"text": 1}', ":2: 'text' is int, not a string"),
    ('{"text": "a"', ":2: not JSON"),
    ("[1]", ":2: a JSON list, not an object"),
    ('{"text": "\\ud800"}', ":2: 'text' has half a surrogate pair"),
  ],
)  # fmt: skip
def test_a_bad_line_is_named(tmp_path, line, problem):
  path = tmp_path / "a.jsonl"
  path.write_text('{"text": "fine"}\n' + line + "\n")
  with pytest.raises(UserError, match=f"a.jsonl{problem}"):
    read(files.open_by_suffix(str(path), "text", "error"))


def test_a_damaged_archive_is_named(tmp_path):
  path = write_jsonl(tmp_path / "a.jsonl.gz")
  path.write_bytes(path.read_bytes()[:-12])
  with pytest.raises(UserError, match=r"a\.jsonl\.gz: cannot be read"):
    files.open_by_suffix(str(path), "text", "error")


def test_parquet_reads_at_random_across_files_and_row_groups(tmp_path):
  for number in range(2):
    texts = [f"{number} {row} 漢" for row in range(25)]
    table = pa.table({"id": range(25), "text": texts})
    pq.write_table(table, tmp_path / f"{number}.parquet", row_group_size=10)
  source = files.open_by_suffix(str(tmp_path), "text", "error")
  assert len(source) == 50
  assert (source[49], source[0], source[24], source[25]) == (
    "1 24 漢",
    "0 0 漢",
    "0 24 漢",
    "1 0 漢",
  )
  assert source.name(37) == f"{tmp_path / '1.parquet'}:13"


def test_parquet_names_the_missing_column_and_the_empty_cell(tmp_path):
  pq.write_table(pa.table({"content": ["a"]}), tmp_path / "a.parquet")
  with pytest.raises(UserError, match=r"no key 'text' .*text_key=content"):
    files.open_by_suffix(str(tmp_path), "text", "error")
  pq.write_table(pa.table({"text": ["a", None]}), tmp_path / "a.parquet")
  with pytest.raises(UserError, match=r"a\.parquet:2: 'text' is NoneType"):
    read(files.open_by_suffix(str(tmp_path), "text", "error"))
  (tmp_path / "a.parquet").write_text("no")
  with pytest.raises(UserError, match=r"a\.parquet: not a Parquet file"):
    files.open_by_suffix(str(tmp_path), "text", "error")


@pytest.mark.parametrize("data", [b"\xff\xfe\x00", "text".encode("utf-16-le"), b"\x89PNG\r\n"])
def test_a_binary_file_is_an_error_that_names_it_or_is_skipped(tmp_path, data, caplog):
  (tmp_path / "good.txt").write_text("good")
  (tmp_path / "bad.txt").write_bytes(data)
  found = files.find_files(str(tmp_path))
  with pytest.raises(UserError, match=r"bad\.txt: not UTF-8 text .*undecodable=skip"):
    read(files.TextFiles(found, "error"))
  assert read(files.TextFiles(found, "skip")) == ["", "good"]
  assert "bad.txt: skipped" in caplog.text


RECORDS = [{"text": 'a, "b"\nc', "n": 1.5}, {"text": "漢", "n": 2.0}]
WRITTEN = {
  "a.jsonl": "\n".join(map(json.dumps, RECORDS)),
  "lines.json": "\n".join(map(json.dumps, RECORDS)),
  "array.json": json.dumps(RECORDS, indent=2),
  "a.csv": 'text,n\n"a, ""b""\nc",1.5\n漢,2.0\n',
  "a.tsv": 'text\tn\n"a, ""b""\nc"\t1.5\n漢\t2.0\n',
}


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("name", WRITTEN)
def test_the_format_follows_the_suffix(tmp_path, name, mark):
  (tmp_path / name).write_text(mark + WRITTEN[name])
  for path in (tmp_path / name, tmp_path):
    assert read(files.open_by_suffix(str(path), "text", "error")) == ['a, "b"\nc', "漢"]
    whole = files.open_by_suffix(str(path), "", "error")
    assert [json.loads(record) for record in read(whole)] == RECORDS
  with pytest.raises(UserError, match=rf"{name}:1: no key 'word' \(found: 'text', 'n'\)"):
    read(files.open_by_suffix(str(tmp_path), "word", "error"))


@pytest.mark.parametrize(
  ("name", "content", "sentence"),
  [
    ("a.json", "[1, 2]", "a.json: JSON, but neither an array of objects nor one object a line"),
    ("a.csv", "a,b\n1,2,3\n", "a.csv: cannot be read as CSV .*Expected 2 columns, got 3"),
    ("a.csv", "", "a.csv: cannot be read as CSV"),
  ],
)
def test_a_bad_table_is_named(tmp_path, name, content, sentence):
  (tmp_path / name).write_text(content)
  with pytest.raises(UserError, match=sentence):
    files.open_by_suffix(str(tmp_path), "text", "error")


def test_json_lines_come_before_other_files_of_a_folder(tmp_path):
  (tmp_path / "train.jsonl").write_text('{"text": "a"}')
  (tmp_path / "card.json").write_text("[1]")
  assert read(files.open_by_suffix(str(tmp_path), "text", "error")) == ["a"]


def test_text_has_no_byte_order_mark(tmp_path):
  (tmp_path / "a.txt").write_text("\ufefftext")
  assert read(files.TextFiles(files.find_files(str(tmp_path)), "error")) == ["text"]


def test_a_folder_a_file_and_a_glob(tmp_path):
  for name in ("b.py", "a.txt", "sub/c.md", ".hidden", ".git/config"):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(name)

  def found(path):
    return [str(file.relative_to(tmp_path)) for file in files.find_files(str(path)).files]

  assert found(tmp_path) == ["a.txt", "b.py", "sub/c.md"]
  assert found(tmp_path / "a.txt") == ["a.txt"]
  assert found(tmp_path / "**/*.[mp]*") == ["b.py", "sub/c.md"]


def test_a_path_that_leads_nowhere_is_named(tmp_path):
  with pytest.raises(UserError, match="nowhere: no such file or folder"):
    files.find_files(str(tmp_path / "nowhere"))
  with pytest.raises(UserError, match="no visible file in this folder"):
    files.find_files(str(tmp_path))
  with pytest.raises(UserError, match=r"no \.jsonl or .* \.json file in this folder"):
    files.open_by_suffix(str(tmp_path), "text", "error")


def test_fingerprint_follows_the_content_and_not_the_place(tmp_path):
  old, new = tmp_path / "old", tmp_path / "new"
  old.mkdir()
  (old / "a.txt").write_text("one")
  before = files.TextFiles(files.find_files(str(old)), "error").fingerprint()
  old.rename(new)
  assert files.TextFiles(files.find_files(str(new)), "error").fingerprint() == before
  (new / "a.txt").write_text("two")
  assert files.TextFiles(files.find_files(str(new)), "error").fingerprint() != before


def test_stdlib_is_hand_written_python_without_tests():
  source = files.stdlib("error")
  names = [source.name(index) for index in range(len(source))]
  assert 5e6 < source.sizes().sum() < 15e6
  assert any(name.endswith("argparse.py") for name in names)
  assert any(name.endswith("encodings/utf_8.py") for name in names)
  for foreign in ("site-packages", "/test/", "/tests/", "pydoc_data", "encodings/cp1252.py"):
    assert not any(foreign in name for name in names)
  assert "def " in source[names.index(next(n for n in names if n.endswith("argparse.py")))]


def test_a_pipe_is_refused_before_anybody_waits_for_it(tmp_path):
  (tmp_path / "a.txt").write_text("text")
  os.mkfifo(tmp_path / "pipe.txt")
  for path in (tmp_path, tmp_path / "pipe.txt"):
    with pytest.raises(UserError, match=r"pipe\.txt is neither a file nor a folder"):
      files.find_files(str(path))


def test_a_link_to_nothing_is_named(tmp_path):
  (tmp_path / "link.txt").symlink_to(tmp_path / "gone")
  with pytest.raises(UserError, match=r"link\.txt is a link to what is not there"):
    files.find_files(str(tmp_path))


@pytest.mark.parametrize("suffix", ["jsonl.gz", "jsonl.zst"])
def test_a_small_file_that_expands_without_end_is_refused(tmp_path, monkeypatch, suffix):
  monkeypatch.setattr(files, "_BLOCK_BYTES", 1 << 16)
  path = tmp_path / f"bomb.{suffix}"
  with OPENERS[suffix](path, "wb") as stream:
    for _ in range(64):
      stream.write(b" " * (1 << 20))
  assert path.stat().st_size < 1 << 17
  with pytest.raises(UserError, match=rf"bomb\.{suffix}: expands to more than 200 times its"):
    files.open_by_suffix(str(path), "text", "error")


@pytest.mark.parametrize(
  ("line", "reason"),
  [
    ('{"text": ' + "1" * 5000 + "}", "an integer of 5000 digits"),
    ('{"text": ' + "[" * 100_000 + "}", "nested too deep"),
  ],
)
def test_json_that_no_record_needs_is_refused_by_its_line(tmp_path, line, reason):
  (tmp_path / "a.jsonl").write_text('{"text": "first"}\n' + line + "\n")
  source = files.open_by_suffix(str(tmp_path), "text", "error")
  with pytest.raises(UserError, match=rf"a\.jsonl:2: .*{reason}"):
    source[1]


@pytest.mark.parametrize("dictionary", [True, False])
@pytest.mark.parametrize("text_key", ["text", ""])
def test_a_small_parquet_file_that_expands_without_end_is_refused(
  tmp_path, monkeypatch, dictionary, text_key
):
  monkeypatch.setattr(files, "_BLOCK_BYTES", 1 << 16)
  path = tmp_path / "bomb.parquet"
  table = pa.table({"text": ["x" * (1 << 16)] * 1024})
  pq.write_table(table, path, compression="zstd", use_dictionary=dictionary)
  assert path.stat().st_size < 1 << 17
  with pytest.raises(UserError, match=r"bomb\.parquet: expands to more than 200 times its"):
    files.open_by_suffix(str(path), text_key, "error")[0]


def test_a_repeated_text_is_read_from_parquet(tmp_path):
  pq.write_table(pa.table({"text": ["a", "b", "a", None]}), tmp_path / "a.parquet")
  source = files.open_by_suffix(str(tmp_path), "text", "error")
  assert [source[index] for index in range(3)] == ["a", "b", "a"]
  with pytest.raises(UserError, match=r"a\.parquet:4: 'text' is NoneType"):
    source[3]


@pytest.mark.parametrize("text_key", ["text", ""])
def test_a_parquet_string_that_is_not_utf8_is_named_by_its_row(tmp_path, text_key):
  text = pa.array([b"fine", b"\xff"]).cast(pa.binary()).view(pa.string())
  pq.write_table(pa.table({"text": text}), tmp_path / "a.parquet")
  source = files.open_by_suffix(str(tmp_path), text_key, "error")
  with pytest.raises(UserError, match=r"a\.parquet:2: not UTF-8 text \(byte 0") as caught:
    source[1]
  assert "skip" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.parquet", "a.csv", "a.json"])
def test_skipping_is_refused_where_nothing_can_be_skipped(tmp_path, name):
  (tmp_path / name).write_text('[{"text": "a"}]' if name == "a.json" else "text\na\n")
  if name == "a.parquet":
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / name)
  sentence = rf"{name}: data\.undecodable=skip is for text and jsonl.*=error"
  with pytest.raises(UserError, match=sentence):
    files.open_by_suffix(str(tmp_path / name), "text", "skip")


def test_a_table_that_is_not_utf8_is_not_told_to_skip(tmp_path):
  (tmp_path / "a.json").write_bytes(b'[{"text": "\xff"}]')
  with pytest.raises(UserError, match=r"a\.json: not UTF-8 text .*Convert it\.$"):
    files.open_by_suffix(str(tmp_path), "text", "error")
