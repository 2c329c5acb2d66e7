"""Hostile tables: each is read exactly, compared with pandas, or refused with one message."""

import csv
import io
import json

import pandas
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from extensions.common.errors import UserError
from extensions.data.tables import columns_of, format_of, read_rows
from extensions.tasks import Source

# Valid CSV cells; each is changed by some reader.
CELLS = [
    "plain",
    "a, b; c | d \t e",
    'He said "no", and "never"',
    '"',
    '""',
    "first\nsecond\n\nfourth",
    "first\r\nsecond",
    "one\rtwo",
    "007",
    "1e5",
    "NA",
    "null",
    "None",
    "nan",
    "TRUE",
    "",
    " spaces ",
    "\u00e9\u0301 \U0001f469\u200d\U0001f680 \U0001f600",
    "\u05e9\u05dc\u05d5\u05dd \u202eabc\u202c \u0645\u0631\u062d\u0628\u0627",
    "line\u2028separator\u2029 \x85 \x0b \x1c",
    "# no comment",
    "=1+1",
    "'apostrophes'",
    "back\\slash \\n",
    "{text} {{x}}",
    "\ufeffmark",
]
SAFE = [cell for cell in CELLS if not set(cell) & set("\r\n\t")]


def source(**keys):
    return Source.model_validate(keys)


def put(folder, name, content, encoding="utf-8"):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
    return path


def read(path, **keys):
    return [row for _, row in read_rows(path, source(**keys))]


def refused(path, **keys):
    with pytest.raises(UserError) as caught:
        read(path, **keys)
    assert str(path) in str(caught.value)
    return str(caught.value)


def by_pandas(path, **options):
    """An independent reader: all cells as text, "" for missing ones."""
    frame = pandas.read_csv(path, dtype=str, keep_default_na=False, na_filter=False, **options)
    return frame.to_dict("records")


def frame():
    return pandas.DataFrame({"id": [f"{k:03}" for k in range(len(CELLS))], "text": CELLS, "label": ["a", "b"] * 13})


# ---------------------------------------------------------------------------------------------------- read exactly


@pytest.mark.parametrize("separator", [",", ";", "|", "\t"], ids=["comma", "semicolon", "bar", "tab"])
@pytest.mark.parametrize(
    "line_end, quoting",
    [
        ("\n", csv.QUOTE_MINIMAL),  # leaves a lone CR unquoted
        ("\n", csv.QUOTE_ALL),
        ("\r\n", csv.QUOTE_MINIMAL),
        ("\r\n", csv.QUOTE_ALL),
        ("\r", csv.QUOTE_ALL),
    ],
    ids=["LF minimal", "LF all", "CRLF minimal", "CRLF all", "CR all"],
)
def test_files_written_by_pandas_are_read_exactly(tmp_path, separator, line_end, quoting):
    path = tmp_path / "rows.csv"
    rows = frame()
    rows.to_csv(path, sep=separator, lineterminator=line_end, quoting=quoting, index=False)
    expected = rows.to_dict("records")
    options = {"lineterminator": "\n"} if line_end == "\n" else {}
    assert by_pandas(path, sep=separator, **options) == expected, "the file is valid"
    assert read(path) == read(path, separator=separator) == expected
    assert columns_of(path, source()) == ["id", "text", "label"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_encodings_of_unicode(tmp_path, encoding):
    path = tmp_path / "rows.csv"
    rows = frame()
    rows.to_csv(path, encoding=encoding, index=False)
    marked = not encoding.endswith(("-le", "-be"))
    assert read(path, **({} if marked else {"encoding": encoding})) == rows.to_dict("records")
    if marked and encoding != "utf-8":
        assert read(path, encoding="cp1252") == rows.to_dict("records"), "the byte order mark takes precedence"


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "shift_jis", "cp1251"])
def test_encodings_that_are_set(tmp_path, encoding):
    text = {"shift_jis": "\u6771\u4eac, \u65e5\u672c", "cp1251": "\u043f\u0440\u0438\u0432\u0435\u0442"}.get(encoding)
    rows = [{"text": text or "caf\u00e9, na\u00efve", "label": "a"}, {"text": "plain", "label": "b"}]
    path = tmp_path / "rows.csv"
    pandas.DataFrame(rows).to_csv(path, encoding=encoding, index=False)
    assert read(path, encoding=encoding) == rows
    message = refused(path)
    assert "line 2: not valid UTF-8 at byte " in message and "source.encoding" in message and "cp1252" in message


def test_the_invalid_byte_is_named(tmp_path):
    path = put(tmp_path, "rows.csv", b'text,label\n"two\nlines",a\ncaf\xe9,b\n')
    assert "line 4: not valid UTF-8 at byte 4 of the line (e9)" in refused(path)
    path = put(tmp_path, "rows.csv", b"text,label\rone,a\rcaf\xe9,b\r")
    assert "line 3: not valid UTF-8" in refused(path)
    assert "not a text encoding" in refused(path, encoding="base64") and "'foo'" in refused(path, encoding="foo")


@pytest.mark.parametrize("size", [131072, 131073, 1_000_000])
def test_long_cells(tmp_path, size):
    text = 'x, "y"\n' * (size // 7) + "z" * (size % 7)
    path = tmp_path / "rows.csv"
    pandas.DataFrame({"text": [text], "label": ["a"]}).to_csv(path, index=False)
    assert len(text) == size and read(path) == [{"text": text, "label": "a"}]


def test_a_tsv_with_quotes(tmp_path):
    """Without quoting, doubled quotes would remain and rows would split at quoted line breaks."""
    path = tmp_path / "rows.tsv"
    rows = frame()
    rows.to_csv(path, sep="\t", index=False)
    assert read(path) == rows.to_dict("records")
    plain = put(tmp_path, "plain.tsv", 'text\tlabel\n"Open, he said\ta\n5" screen\tb\n""\ta\n')
    assert read(plain, quoting="none") == [
        {"text": '"Open, he said', "label": "a"},
        {"text": '5" screen', "label": "b"},
        {"text": '""', "label": "a"},
    ]


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_where_a_row_begins(tmp_path, line_end):
    text = line_end.join(["text,label", '"one', "", 'two",a', "", "three,b", '"four', '",a', "five,b"])
    path = put(tmp_path, "rows.csv", text)
    assert [row["text"] for row in read(path)] == [f"one{line_end * 2}two", "three", f"four{line_end}", "five"]
    assert [where for where, _ in read_rows(path, source())] == [f"{path}, line {k}" for k in (2, 6, 7, 9)]


def test_names_of_columns(tmp_path):
    path = put(tmp_path, "rows.csv", "\ufeff id , ticket body,\u00fcber-schrift,,a.b\n1,x,y,z,w\n")
    assert read(path) == [{"id": "1", "ticket body": "x", "\u00fcber-schrift": "y", "": "z", "a.b": "w"}]
    assert columns_of(path, source()) == ["id", "ticket body", "\u00fcber-schrift", "", "a.b"]
    path = put(tmp_path, "rows.csv", '"ticket, body";"a ""b"""\nx;y\n')
    assert read(path) == [{"ticket, body": "x", 'a "b"': "y"}]


@pytest.mark.parametrize(
    "content, expected",
    [
        ("text;label\n1,5;a\n2,5;b\n", [{"text": "1,5", "label": "a"}, {"text": "2,5", "label": "b"}]),
        ("a;b,c;d\n1;x,y;3\n2;z,w;4\n", [{"a": "1", "b,c": "x,y", "d": "3"}, {"a": "2", "b,c": "z,w", "d": "4"}]),
        ("text|label\na,b|c;d\n", [{"text": "a,b", "label": "c;d"}]),
        ("text\nhello, world\n", [{"text": "hello, world"}]),
        ('text\n"a; b"\n', [{"text": "a; b"}]),
        ("text,label\na;b,c\nd;e,f\n", [{"text": "a;b", "label": "c"}, {"text": "d;e", "label": "f"}]),
    ],
)
def test_the_separator_is_found(tmp_path, content, expected):
    assert read(put(tmp_path, "rows.csv", content)) == expected


def test_rows_without_a_header(tmp_path):
    path = put(tmp_path, "rows.csv", '"a, b",1\nc,0\n')
    assert read(path, header=False) == [{0: "a, b", 1: "1"}, {0: "c", 1: "0"}]
    assert columns_of(path, source(header=False)) == ["0", "1"]
    assert "2 columns, expected 3" in refused(path, header=False, num_columns=3)


cells = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.lists(cells, min_size=3, max_size=3), min_size=1, max_size=6), st.sampled_from(",;|\t"))
def test_any_text_survives_a_round_trip(tmp_path_factory, rows, separator):
    buffer = io.StringIO()
    writer = csv.writer(buffer, delimiter=separator, quoting=csv.QUOTE_ALL)
    writer.writerows([["x", "y", "z"], *rows])
    path = put(tmp_path_factory.mktemp("any"), "rows.csv", buffer.getvalue())
    assert [list(row.values()) for row in read(path)] == rows


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("bytes")
    for name in ("rows.csv", "rows.tsv", "rows.jsonl", "rows.parquet"):
        path = put(folder, name, b"x,y\n" + data if name == "rows.csv" else data)
        for keys in ({}, {"quoting": "none"}):
            try:
                rows = read(path, **keys)
            except UserError as error:
                assert str(path) in str(error)
            else:
                assert all(isinstance(row, dict) for row in rows)


# --------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    "content, parts",
    [
        ("", ["empty", "header"]),
        ("\n\n", ["empty", "header"]),
        ("text,label\n", ["no rows after the header"]),
        ("text,label,text\na,b,c\n", ["line 1", "same name", "'text'"]),
        ("text,label, text\na,b,c\n", ["line 1", "same name", "'text'"]),
        ("text,label,,\na,b,c,d\n", ["line 1", "same name", "''"]),
        ("text,label\na,b,c\n", ["line 2", "3 columns, expected 2 (text, label)", "in quotes", "source.separator"]),
        ('text,label\n"a\nb",c\nd\n', ["line 4", "1 columns, expected 2"]),
        ("text,label\na\0b,c\n", ["line 2", "NUL", "utf-16-le"]),
        ("te\0xt,label\na,c\n", ["line 1", "NUL", "utf-16-le"]),
        ('text,label\na,b\n"open,c\nd,e\n', ["line 3", "no quote closes it", "source.quoting: none"]),
        ('text,label\n"a"b,c\n', ["line 2", "source.quoting: none"]),
    ],
)
def test_a_malformed_csv_is_refused(tmp_path, content, parts):
    message = refused(put(tmp_path, "rows.csv", content))
    for part in parts:
        assert part in message


def test_utf_16_without_its_mark(tmp_path):
    path = put(tmp_path, "rows.csv", "text,label\na,b\n", "utf-16-le")
    assert "utf-16-le" in refused(path)
    assert read(path, encoding="utf-16-le") == [{"text": "a", "label": "b"}]


def test_all_malformed_rows_are_reported_together(tmp_path):
    lines = ["text,label", "fine,a", *["torn"] * 5, "x,y,z", '"a"b,c', "nul\0,a", "fine,b"]
    message = refused(put(tmp_path, "rows.csv", "\n".join(lines)))
    assert "8 rows cannot be used" in message
    assert "rows with too many or too few cells: 6" in message and "line 3" in message and "and 3 more" in message
    assert "rows with quotes that do not pair: 1" in message and "line 9" in message
    assert "rows with a NUL character: 1" in message and "line 10" in message
    good = []
    with pytest.raises(UserError):
        for _, row in read_rows(tmp_path / "rows.csv", source()):
            good.append(row["label"])
    assert good == ["a", "b"], "valid rows are yielded first"


def test_malformed_lines_of_jsonl(tmp_path):
    path = put(tmp_path, "rows.jsonl", '{"a": 1}\n[1]\n{\nnull\n{"b": 2}\n')
    message = refused(path)
    assert "3 rows cannot be used" in message and "lines that are not JSON objects: 2" in message
    assert "line 3: not valid JSON" in message


@pytest.mark.parametrize("name", ["rows.xlsx", "rows.txt", "rows", "rows.csv.gz"])
def test_other_suffixes(tmp_path, name):
    path = put(tmp_path, name, "text,label\na,b\n")
    message = refused(path)
    assert ".csv, .tsv, .jsonl, .ndjson, .parquet" in message and "source.format" in message
    assert read(path, format="csv") == [{"text": "a", "label": "b"}]


def test_formats_by_suffix(tmp_path):
    names = {"a.CSV": "csv", "a.tsv": "tsv", "a.jsonl": "jsonl", "a.ndjson": "jsonl", "a.parquet": "parquet"}
    assert {name: format_of(tmp_path / name, source()) for name in names} == names


# --------------------------------------------------------------------------------------------- JSONL and parquet


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_jsonl(tmp_path, encoding):
    rows = [{"text": 'caf\u00e9 "x"\n', "label": True, "n": 1}, {"text": None, "more": [1, 2]}]
    content = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path = put(tmp_path, "rows.ndjson", content, encoding)
    keys = {"encoding": encoding} if encoding == "cp1252" else {}
    assert read(path, **keys) == rows
    assert columns_of(path, source(**keys)) == ["text", "label", "n", "more"]


def test_parquet(tmp_path):
    path = tmp_path / "rows.parquet"
    rows = frame().assign(number=range(len(CELLS)))
    rows.to_parquet(path)
    assert read(path) == rows.to_dict("records") and columns_of(path, source()) == ["id", "text", "label", "number"]
    assert [where for where, _ in read_rows(path, source())][:2] == [f"{path}, row 1", f"{path}, row 2"]
    twice = pyarrow.table([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(twice, path)
    assert "same name: 'text'" in refused(path)
    assert "cannot be read as parquet" in refused(put(tmp_path, "rows.parquet", "text,label\n"))
