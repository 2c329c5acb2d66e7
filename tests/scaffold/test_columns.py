"""`nlu init`: kinds of columns, targets of label columns, words, settings, files."""

import codecs

import pytest
import yaml

from extensions.common.errors import UserError
from extensions.scaffold import settings
from extensions.scaffold.columns import describe, nearest, suggested_label
from extensions.scaffold.recipe_text import scalar
from extensions.scaffold.source import find_encoding, find_splits, read_source
from extensions.scaffold.target import infer_target, round_range
from extensions.scaffold.words import description, label_words, listed, no_label_word, question, readable
from extensions.tasks.words import normalize_answer


def column(values, name="x"):
    return [{name: value} for value in values]


TEXTS = [f"the {word} machine in room {k} does not start" for k, word in enumerate("abcdefghijkl")]


@pytest.mark.parametrize(
    ("name", "values", "kind"),
    [
        ("body", TEXTS, "text"),
        ("body", [*TEXTS, "", None, float("nan")], "text"),
        ("review", ["good", "bad", "fine"] * 9, "category"),
        ("id", [str(k) for k in range(1000, 1012)], "id"),
        ("nr", [str(k * k) for k in range(12)], "id"),  # by its name
        ("a", [str(k) for k in range(1, 13)], "id"),  # by its numbers
        ("price", [f"{k * 1.37:.2f}" for k in range(12)], "number"),
        ("price", [k * 1.37 for k in range(12)], "number"),
        ("key", [f"T-{k}" for k in range(12)], "id"),
        ("hash", [f"{k:08x}a1" for k in range(12)], "id"),
        ("when", [f"2024-03-{k:02}" for k in range(1, 13)], "date"),
        ("when", [f"2024-03-{k:02}T10:00:00Z" for k in range(1, 13)], "date"),
        ("when", [f"{k}/3/24" for k in range(1, 13)], "date"),
        ("link", [f"https://example.com/{k}" for k in range(12)], "address"),
        ("mail", [f"user{k}@example.com" for k in range(12)], "address"),
        ("lang", ["en"] * 12, "constant"),
        ("gap", ["", None, "  "], "empty"),
        ("tags", [["a"], ["b", "c"], []], "list"),
        ("nested", [{"a": 1}], "object"),
        ("名前", ["これは長い文章です", "もう一つの文章", "三つ目の文章です"], "text"),  # one word each, no digits
    ],
)
def test_column_kinds(name, values, kind):
    found = describe(name, column(values, name))
    assert found.kind == kind, found
    assert found.why
    assert found.is_text == (kind in ("text", "category"))


@pytest.mark.parametrize(
    ("values", "kind", "rest"),
    [
        (["billing", "sales", "billing"] * 9, "classification", {"counts": {"billing": 18, "sales": 9}}),
        (["1", "2", "3", "4", "5"] * 9, "classification", {"counts": dict.fromkeys("12345", 9)}),
        ([5, 1, 3] * 9, "classification", {"counts": {"1": 9, "3": 9, "5": 9}}),
        ([True, False, False] * 9, "classification", {"counts": {"false": 18, "true": 9}}),
        (["0.5", "-0.93", "0.25"] * 9, "regression", {"score_range": (-1.0, 0.5), "decimals": 2}),
        ([str(k) for k in (3, 98, 41, 7, 66, 20, 54, 77, 12, 31, 89, 45, 45)], "regression", {"decimals": 0}),
        (["1e-1", "2.5e-1", "+.5"] * 9, "regression", {"score_range": (0.1, 0.5), "decimals": 2}),
        ([0.123456, 0.9876, 0.5] * 9, "regression", {"score_range": (0.1, 1.0), "decimals": 2}),
        ([["a", "b"], ["a"], [], ["c"]], "multi-label", {"counts": {"a": 2, "b": 1, "c": 1}, "missing": 0}),
        (["a;b", "a", "b;c", "c", ""] * 9, "multi-label", {"separator": ";", "missing": 0}),
        (["a, b", "a", "b, c", "c, a"] * 9, "multi-label", {"separator": ","}),
        (["New York, NY", "Austin, TX", "Boston, MA"] * 9, "classification", {}),  # parts that recur in one company
        (["yes", "no", "", None] * 9, "classification", {"missing": 18, "total": 36}),
        (
            [0.0, 1.0, float("nan")] * 9,
            "classification",
            {"counts": {"0": 9, "1": 9}, "missing": 9},
        ),  # as pandas has it
        ([[1.0, 2.0], [1.0], [2.5]], "multi-label", {"counts": {"1": 2, "2": 1, "2.5": 1}}),
        (["1, 2", "1", "2"] * 9, "multi-label", {"counts": {"1": 18, "2": 18}}),
        (["1;2", "1", "2"] * 9, "multi-label", {"separator": ";"}),
        (["Sales, domestic", "Sales, export", "Support, domestic", "Support, export"] * 9, "classification", {}),
        (["Sales, domestic", "Sales, export", "Support, domestic", "Other"] * 9, "classification", {}),
        (["a, b", "b, c", "c, a, b"] * 9, "multi-label", {"separator": ","}),  # cells of two and of three
        (["[a]", "[b]"] * 9, "classification", {}),
        (["caf\u00e9", "cafe\u0301", "tea"] * 9, "classification", {"counts": {"caf\u00e9": 18, "tea": 9}}),
    ],
)
def test_targets(values, kind, rest):
    found = infer_target("x", column(values))
    assert found.kind == kind and found.why
    for key, value in rest.items():
        got = getattr(found, key)
        assert (list(got.items()) if isinstance(got, dict) else got) == (
            list(value.items()) if isinstance(value, dict) else value
        )


@pytest.mark.parametrize(
    ("values", "wanted", "message"),
    [
        (["", None], None, "is empty in all 2 rows"),
        (["a"] * 9, None, "in every row that has a label"),
        ([f"T-{k}" for k in range(60)], None, "as an id or a free text has"),
        (TEXTS, None, "12 distinct values in 12 rows"),
        ([str(k) for k in range(60)], None, "as an id does"),
        ([{"a": 1}], None, "holds objects"),
        ([["a"], "b"], None, "lists in some rows and single values in others"),
        (["1", "2", "three"] * 3, "regression", "'three' and 2 more that are no finite numbers"),
        (["1e500", "2"] * 3, "regression", "'1e500' and 2 more"),
        (["2", "2"], "regression", "is 2 in every row"),
        (["a", "b"] * 9, "multi-label", "no cell of column 'x' holds two labels"),
        ([["a"], ["b"]], "classification", "which are labels of multi-label"),
        ([["a"], ["a"]], None, "has one label, 'a'"),
        ([["a, b"], ["c"]], None, "no label may hold one"),
        (["1.00000001", "1.00000002"] * 9, "regression", "give them in another unit"),
        (["y" * 101, "n"] * 9, None, "101 characters; a label has at most 100"),
        (["a\0b", "n"] * 9, None, "NUL"),
        (["1,0", "1,5", "2,0", "5,5"] * 9, None, "numbers with a comma, such as '1,0'; write decimals with a point"),
        (["1", "1,5", "-2"] * 9, None, "or say --kind multi-label"),
        (["1", "1,5", "-2"] * 9, "regression", 'read_csv with decimal=","'),
        (["2,250", "1,100", "950"] * 9, None, "such as '2,250'"),
        (["1,234,567.50", "1.5"] * 9, None, "such as '1,234,567.50'"),
        (["1.234,5", "2\u00a0345,25", "7"] * 9, None, "such as '1.234,5'"),
        (["1,5"] * 30 + ["n/a"], None, "such as '1,5'"),  # nearly all
        (
            ["['blue', 'red']", "['blue']", "[]"] * 9,
            None,
            "lists written as text, such as \"['blue', 'red']\"; write the",
        ),
        (["['blue' 'red']", "['blue']"] * 9, "multi-label", "as JSONL"),
        (['["a", "b"]', '["a"]'] * 9, None, "as JSONL"),
        (["[1, 2]", "[1]"] * 9, None, "lists written as text"),
        (["('a', 'b')", "('a',)", "{'b'}"] * 9, None, "lists written as text"),
    ],
)
def test_columns_that_cannot_be_labels(values, wanted, message):
    with pytest.raises(UserError, match=r"^--(label|kind): ") as caught:
        infer_target("x", column(values), wanted)
    assert message in str(caught.value)


def test_kind_option():
    ratings = column(["1", "2", "3", "4", "5"] * 9)
    assert "--kind regression" in infer_target("x", ratings).why  # how to get the other
    assert infer_target("x", ratings, "regression").score_range == (1.0, 5.0)
    assert infer_target("x", column(["0.5", "1.5", "2.5"] * 9), "classification").counts == dict.fromkeys(
        ["0.5", "1.5", "2.5"], 9
    )


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (-1, 1, (-1, 1)),
        (-0.93, 0.88, (-1, 1)),
        (1, 5, (1, 5)),
        (0.2, 4.5, (0, 5)),
        (3, 98, (0, 100)),
        (12_000, 985_000, (0, 1_000_000)),
        (0.0001, 0.0009, (0.0001, 0.0009)),
        (-73, -12, (-80, -10)),
    ],
)
def test_ranges_are_widened_to_round_numbers(low, high, expected):
    assert round_range(low, high) == expected


def test_a_wrong_name_suggests_the_nearest():
    columns = ["id", "subject", "ticket body", "Team"]
    assert nearest("Team", columns, "--label") == "Team"
    assert nearest(" team ", columns, "--label") == "Team"  # case and spaces around do not count, where one is alike
    with pytest.raises(UserError, match=r"^--label: no column 'taem'; did you mean 'Team'\? The columns are: 'id', 's"):
        nearest("taem", columns, "--label")
    with pytest.raises(UserError, match=r"no column 'zzz'\. The columns are"):
        nearest("zzz", columns, "--label")


def test_a_label_column_is_suggested():
    rows = [{"id": k, "text": text, "label": "ab"[k % 2], "lang": "en"} for k, text in enumerate(TEXTS)]
    assert suggested_label([describe(name, rows) for name in rows[0]], rows) == "label"
    rows = [{"id": k, "text": text, "team": "ab"[k % 2]} for k, text in enumerate(TEXTS)]
    assert suggested_label([describe(name, rows) for name in rows[0]], rows) == "team"
    rows = [{"text": text} for text in TEXTS]
    assert suggested_label([describe("text", rows)], rows) is None


# ------------------------------------------------------------------------------------------------------------ words


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ticket body", "ticket body"),
        ("ticketBody", "ticket body"),
        ("Ticket_Body", "ticket body"),
        ("ticket-body", "ticket body"),
        (" FAQ: {x} ", "FAQ x"),
        ("#", "text"),
        ("сообщение", "сообщение"),
        ("a\nb\x00", "a b"),
    ],
)
def test_readable_names(name, words):
    assert readable(name) == words


def test_sentences():
    rows = column(["a", "b"] * 9, "team")
    found = infer_target("team", rows)
    assert description(["subject", "ticket_body"], "team", found) == (
        "You are an assistant that reads the subject and the ticket body of an entry and names its team."
    )
    assert description(["Review"], "sentiment", found) == (
        "You are an assistant that reads a review and names its sentiment."
    )
    assert description(["text"], "y", found) == "You are an assistant that reads a text and names its y."
    scores = infer_target("mood", column(["-0.9", "0.7", "0.1"] * 9, "mood"))
    assert description(["essay"], "mood", scores).endswith(
        "reads an essay and gives its mood as a number from -1 to 1."
    )
    tags = infer_target("tags", column([["a"], ["b", "a"]], "tags"))
    assert description(["post"], "tags", tags).endswith("reads a post and lists the tags that apply.")
    assert question({"subject": "subject", "ticket_body": "ticket_body"}, "team", found, {"a": "a{b}", "b": "b"}) == (
        'Subject: {subject}\n  Ticket body: {ticket_body}\n  What is the team: "a{{b}}" or "b"?'
    )
    assert question({"post": "post"}, "tags", tags, {"a": "a", "b": "b"}).endswith('Which tags apply: "a" and "b"?')
    assert question({"essay": "essay"}, "mood", scores, {}).endswith("What is the mood, from -1 to 1?")
    assert [listed(["a", "b", "c"][:n], "or") for n in (1, 2, 3)] == ["a", "a or b", "a, b or c"]


def test_large_scores_are_written_out():
    prices = infer_target("price", column(["1000000", "1000500.5", "1001250"] * 9, "price"), "regression")
    assert prices.score_range == (1000000.0, 1001500.0)
    assert description(["ad"], "price", prices).endswith("gives its price as a number from 1000000 to 1001500.")
    assert question({"ad": "ad"}, "price", prices, {}).endswith("What is the price, from 1000000 to 1001500?")


def test_kind_option_with_commas_in_labels():
    pairs = column(["a, b", "b, c", "c, a"] * 9)
    assert "--kind multi-label" in infer_target("x", pairs).why
    assert infer_target("x", pairs, "multi-label").counts == {"a": 18, "b": 18, "c": 18}
    assert infer_target("x", column(["1,2", "2,3", "1"] * 9), "multi-label").counts == {"1": 18, "2": 18, "3": 9}
    assert infer_target("x", column(["['a']", "['b']"] * 9), "classification").counts == {"['a']": 9, "['b']": 9}


def test_label_words():
    words, notes = label_words(["Bug_Report", "tech-support", "Sales "], {}, False)
    assert list(words.values()) == ["bug report", "tech support", "sales"] and not notes
    assert label_words(["Bug_Report", "x"], {"Bug_Report": "bug"}, False)[0]["Bug_Report"] == "bug"
    words, notes = label_words(["0", "1"], {}, False)
    assert words == {"0": "0", "1": "1"} and "--labels 0=WORD,1=WORD" in notes[0]
    assert label_words(["0", "1"], {"0": "negative", "1": "positive"}, False) == (
        {"0": "negative", "1": "positive"},
        [],
    )
    assert label_words(["1.0", "2.0"], {}, False)[0] == {"1.0": "1", "2.0": "2"}
    assert label_words(["a,b", "<c>"], {}, True)[0] == {"a,b": "a b", "<c>": "c"}
    notes = label_words(["1", "1.0", "2", "x"], {}, False)[1]
    assert notes[0].startswith("labels '1' and '1.0' are hardly different") and "'2'" not in notes[0]
    assert sum("hardly" in note for note in label_words(["7", "007", "7."], {}, False)[1]) == 1  # said once
    with pytest.raises(UserError, match="--labels: '1' is no label: a regression has scores, no labels"):
        label_words([], {"1": "bad"}, False)
    with pytest.raises(UserError, match="--labels: 'z' is no label of the column; its labels are 'a', 'b'"):
        label_words(["a", "b"], {"z": "x"}, False)
    with pytest.raises(UserError, match="--labels: 'a' and 'b' have the same word, 'x'"):
        label_words(["a", "b"], {"a": "x", "b": "X"}, False)
    assert no_label_word({"a": "x"}) == "none" and no_label_word({"a": "None"}) == "none of these"


@pytest.mark.parametrize(
    "labels",
    [
        ["Yes", "yes", "YES"],
        ["a_b", "a-b", "a b"],
        ["---", "...", "<>", "<"],
        ["No.", "no", '"no"'],
        ["Judgement", "judgment"],
        ["a\nb", "a b", "a  b"],
        ["label 2", "--"],
        ["yes 2", "yes", "Yes"],
        ["ＡＢ", "ab", "AB"],
        ["😀", "😡"],
    ],
)
@pytest.mark.parametrize("multi_label", [False, True])
def test_label_words_are_distinct_and_can_be_written(labels, multi_label):
    words, _ = label_words(labels, {}, multi_label)
    assert list(words) == labels
    assert len({normalize_answer(word) for word in words.values()}) == len(labels), words
    for word in words.values():
        assert word.strip() == word != ""
        assert "<" not in word and "judgement" not in word.lower() and word[0] not in "\"'" and word[-1] not in "\"'."
        assert not multi_label or "," not in word


# --------------------------------------------------------------------------------------------------- settings, YAML


@pytest.mark.parametrize("parameters", [1e6, 1.35e8, 1e9, 7e9])
@pytest.mark.parametrize("rows", [1, 10, 480, 100_000])
def test_settings(parameters, rows):
    found = settings.choose_settings(parameters, rows, 150, 60, 2048, 7, on_gpu=False)
    regime = next(one for one in settings.REGIMES if parameters <= one.parameters)
    assert regime.min_rows <= found.sft_steps * found.batch_size <= regime.max_rows + found.batch_size
    assert 7 < found.response_budget[0] < found.response_budget[1]
    assert found.max_tokens == 152  # the 95th percentile, in eights
    assert found.checkpoint_every >= 1 and found.max_tokens + found.response_budget[1] <= 2048


def test_prompts_fit_the_models_context():
    assert settings.choose_settings(1e8, 480, 3000, 60, 2048, 7, on_gpu=False).max_tokens == 512  # a CPU's cap
    assert settings.choose_settings(1e8, 480, 3000, 60, 2048, 7, on_gpu=True).max_tokens == 1024
    assert settings.choose_settings(1e8, 480, 3000, 60, 256, 7, on_gpu=False).max_tokens == 256 - 12  # the context's
    assert (
        settings.choose_settings(1e8, 480, 3000, 900, 8192, 7, on_gpu=False).max_tokens == 1800
    )  # 50 labels in the prompt


@pytest.mark.parametrize(
    "value",
    [
        *("yes", "no", "null", "~", "007", "1e5", "1_000", "0x1f", "true", "12:30:45", "2024-01-01", "=", "<<", ""),
        *(
            "a: b",
            "a #b",
            "#x",
            "{x}",
            "[x]",
            "'",
            '"',
            'it\'s "so"',
            " lead",
            "trail ",
            "a\nb",
            "tab\tb",
            "- x",
            "? x",
        ),
        *("naïve", "日本語", "😀", "\u200b", "\u2028", "\x85", "a\\nb", "&a", "*a", "!x", "%x", "@x", "`x`", "x" * 500),
        *(3e-4, 1e-4, 0.05, 0.1, 1.0, -1.0, 100.0, 0.123456, 1e-5, 5, 0, True, None),
        ["a, b", "c: d", "}"],
        {"a, b": "x: y", "no": ["null"]},
    ],
)
def test_scalars_read_back(value):
    text = scalar(value)
    assert "\n" not in text
    back = yaml.safe_load(f"x:\n  y: {text}  # comment\n")["x"]["y"]
    assert back == value and type(back) is type(value)
    if isinstance(value, str):
        assert yaml.safe_load(f"x:\n  {text}: 1  # comment\n") == {"x": {value: 1}}


# ------------------------------------------------------------------------------------------------------------ files

LINES = [("subject", "body", "team"), ("café", 'he said "no"', "a"), ("über", "x, y; z", "b")]


def write(path, encoding, separator=",", mark=b""):
    lines = (separator.join('"' + cell.replace('"', '""') + '"' for cell in line) + "\r\n" for line in LINES)
    path.write_bytes(mark + "".join(lines).encode(encoding))
    return path


@pytest.mark.parametrize(
    ("encoding", "mark", "found"),
    [
        ("utf-8", b"", "utf-8"),
        ("utf-8", codecs.BOM_UTF8, "utf-8"),
        ("utf-16-le", codecs.BOM_UTF16_LE, "utf-8"),  # the mark says it, source.encoding need not
        ("utf-16-be", codecs.BOM_UTF16_BE, "utf-8"),
        ("utf-16-le", b"", "utf-16-le"),
        ("utf-16-be", b"", "utf-16-be"),
        ("cp1252", b"", "cp1252"),
        ("latin-1", b"\x81", "latin-1"),  # a byte that cp1252 lacks
    ],
)
@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_encodings_and_separators(tmp_path, encoding, mark, found, separator):
    path = write(tmp_path / "rows.csv", encoding, separator, mark)
    assert find_encoding(path) == found
    if mark == b"\x81":
        return
    table = read_source(path)
    assert [tuple(row.values()) for row in table.rows] == LINES[1:]
    assert table.columns == list(LINES[0])
    assert table.keys == ({} if found == "utf-8" else {"encoding": found})
    assert bool(table.notes) == bool(table.keys)


RUSSIAN = "text,label\n" + "отличный товар номер,да\nне работает совсем,нет\n" * 10
JAPANESE = "text,label\n" + "これは長い文章です,良い\nもう一つの文章,悪い\n" * 10


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        (RUSSIAN, "cp1251"),
        (RUSSIAN, "koi8-r"),
        (JAPANESE, "shift_jis"),
        (JAPANESE, "euc-jp"),
        (JAPANESE, "utf-16-le"),
        (JAPANESE, "utf-16-be"),
    ],
)
def test_an_encoding_that_cannot_be_inferred(tmp_path, text, encoding):
    path = tmp_path / "rows.csv"
    path.write_bytes(text.encode(encoding))
    with pytest.raises(UserError, match="--encoding"):
        read_source(path)
    table = read_source(path, encoding)
    assert table.keys == {"encoding": encoding} and table.notes == []
    assert [",".join(row.values()) for row in table.rows] == text.splitlines()[1:]


def test_western_texts_are_not_misread(tmp_path):
    path = tmp_path / "rows.csv"
    line = "où êtes-vous allés cet été ?;5 €;été\nÇa m’a déçue, à côté;½ £;là\nÖl für Düsseldorf;¾ ¥;né\n"
    path.write_bytes(("text;price;label\n" + line * 10).encode("cp1252"))
    assert read_source(path).rows[1]["text"] == "Ça m’a déçue, à côté"


def test_encoding_option(tmp_path):
    path = write(tmp_path / "rows.csv", "cp1252")
    assert read_source(path, "latin-1").keys == {"encoding": "latin-1"}
    with pytest.raises(UserError, match=r"--encoding: .*rows\.csv has bytes that are not utf-8"):
        read_source(path, "utf-8")
    for name in ("nonsense", "base64"):
        with pytest.raises(UserError, match=f"--encoding: '{name}' is no text encoding"):
            read_source(path, name)
    (tmp_path / "rows.parquet").touch()
    with pytest.raises(UserError, match=r"rows\.parquet is a parquet file"):
        read_source(tmp_path / "rows.parquet", "utf-8")


def test_quotes_as_plain_characters(tmp_path):
    path = tmp_path / "glue.tsv"
    path.write_text('a\tb\tc\n"open\t1\tx\nplain\t2\ty\nclosed"\t3\tz\n', encoding="utf-8")
    table = read_source(path)
    assert table.keys == {"quoting": "none"} and "quotes are characters" in table.notes[0]
    assert [row["a"] for row in table.rows] == ['"open', "plain", 'closed"']
    path.write_text('a\tb\tc\n"open ""x"""\t1\t"two\nlines"\nplain\t2\ty\n', encoding="utf-8")
    table = read_source(path)
    assert table.keys == {} and [row["c"] for row in table.rows] == ["two\nlines", "y"]


def test_splits_are_found(tmp_path):
    for name in ("train.csv", "dev.csv", "test.jsonl", "notes.txt"):
        (tmp_path / name).touch()
    found = find_splits(str(tmp_path), None, None)
    assert {split: path.name for split, path in found.items()} == {
        "train": "train.csv",
        "validation": "dev.csv",
        "test": "test.jsonl",
    }
    other = find_splits(str(tmp_path / "train.csv"), str(tmp_path / "dev.csv"), None)
    assert list(other) == ["train", "validation"]
    (tmp_path / "valid.tsv").touch()
    with pytest.raises(UserError, match=r"dev\.csv and valid\.tsv are of one split"):
        find_splits(str(tmp_path), None, None)
    with pytest.raises(UserError, match=r"absent\.csv: no such file"):
        find_splits(str(tmp_path / "absent.csv"), None, None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no training file; expected train with one of"):
        find_splits(str(tmp_path / "empty"), None, None)
