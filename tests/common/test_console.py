"""Console output of a run: what fits on a terminal, and lines elsewhere."""

import io
import re

import pytest
from rich.cells import cell_len
from rich.table import Table

from extensions.common.console import DataConsole, Reporter, escape_unencodable, say, visible
from extensions.training.records import shares_text, summary_lines

LABELS = [f"a rather long label of a task, number {k}" for k in range(30)]
WIDE = ["請求書に関する問い合わせ", "配送に関する問い合わせ", "返品に関する問い合わせ", "その他の問い合わせ"]


def metrics(labels):
    shares = dict.fromkeys(labels, 1 / len(labels)) | {"wrong format": 0.5}
    own = {"reward_mean": -0.25, "accuracy": 0.5, "format_error_rate": 1.0, "kl": 12.34, "samples_per_s": 123.4}
    return own | {"predicted_shares": shares}


def terminal(width, total, labels):
    """The last frame of the live display."""
    reporter = Reporter(active=True)
    reporter.console = DataConsole(file=io.StringIO(), width=width, force_terminal=True, legacy_windows=False)
    reporter.begin(total, 0)
    reporter.step(total // 2, *summary_lines(metrics(labels)))
    reporter.end()
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", reporter.console.file.getvalue())
    return [line.rstrip() for line in plain.replace("\r", "\n").splitlines() if line.strip()][-2:]


@pytest.mark.parametrize("width", [80, 120, 200])
@pytest.mark.parametrize("total", [30, 20_000])
@pytest.mark.parametrize("labels", [["Yes", "No"], LABELS, WIDE], ids=["two", "thirty", "wide"])
def test_a_live_line_fits(width, total, labels):
    first, second = terminal(width, total, labels)
    assert max(cell_len(first), cell_len(second)) <= width
    for part in (f"{total // 2}/{total}", "━", "reward -0.25", "acc 0.50", "wrong format 100%", "ETA 0:00"):
        assert part in first, part
    assert second.startswith("kl 12.34  123.4 samples/s  ") and labels[0][:10] in second


def test_lines_elsewhere(capsys):
    reporter = Reporter(active=True)
    reporter.begin(30, 0)
    reporter.step(3, *summary_lines(metrics(LABELS)))
    line = capsys.readouterr().out.rstrip("\n")
    assert re.fullmatch(r"step    3/30  reward -0\.25  acc 0\.50  wrong format 100%  ETA 0:00  kl 12\.34 .*", line)
    assert "\n" not in line and line.endswith(" and 24 more") and len(line) < 300


def test_shares():
    assert shares_text({"Yes": 0.75, "No": 0.125, "wrong format": 0.125}) == "Yes 75%, No 12%"
    assert shares_text({f"{k}": k / 100 for k in range(9)}) == "3 3%, 4 4%, 5 5%, 6 6%, 7 7%, 8 8% and 3 more"
    assert shares_text({"a: Yes": 0.5, "a: wrong format": 0.5}) == "a: Yes 50%"
    assert shares_text({}) == "" and shares_text({"x" * 25: 1.0}) == "x" * 23 + "… 100%"


HOSTILE = ["[bold]x[/bold]", "[/]", "[link=x]", ":smile:", "1:100:3", "é 漢字 🙂"]
HOSTILE += ["\x1b[31mred", "\ud800", "a\rb", "\x9b1m"]


ENCODINGS = pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1", "cp1252"])


def standard_output(encoding, monkeypatch):
    """A new standard output, as Python opens it, and a function that returns what was written."""
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict", newline="", write_through=True)
    monkeypatch.setattr("sys.stdout", out)
    return lambda: out.buffer.getvalue().decode(encoding)


def shown(text, encoding):
    return visible(text).encode(encoding, "backslashreplace").decode(encoding)


@ENCODINGS
def test_data_are_shown_as_they_are(encoding, monkeypatch):
    written = standard_output(encoding, monkeypatch)
    reporter = Reporter(active=True)
    reporter.begin(2, 0)
    for text in HOSTILE:
        reporter.info(f"info {text}")
        reporter.warn(text)
        reporter.step(1, text, f"details {text}")
        say(f"say {text}")
        table = Table(f"column {text}", title=f"title {text}")
        table.add_row(f"cell {text}")
        reporter.console.print(table)
    output = written()
    for text in HOSTILE:
        bordered = [line for line in output.splitlines() if f"cell {shown(text, encoding)}" in line]
        assert bordered and all(line.rstrip()[-1] in "│|" for line in bordered)
        for what in ("info", "warning:", "details", "say", "column", "title", "cell"):
            assert shown(f"{what} {text}", encoding) in output, (what, text)
    assert not set("\x1b\r\x9b\ud800") & set(output)
    assert ("┏" in output) is (encoding == "utf-8") and "\\u250f" not in output, "ASCII boxes elsewhere"


def test_the_live_line_shows_labels_as_they_are():
    for text in HOSTILE:
        assert visible(text) in terminal(120, 30, [text])[1]


def test_control_characters_are_escaped():
    assert visible("a\tb\nc é 漢🙂") == "a\tb\nc é 漢🙂"
    assert visible("\x1b[31m \r \x00 \x7f \x9b \udcff") == r"\x1b[31m \r \x00 \x7f \x9b \udcff"


@ENCODINGS
def test_print_raises_in_no_encoding(encoding, monkeypatch):
    written = standard_output(encoding, monkeypatch)
    with pytest.raises(UnicodeEncodeError):
        print("\ud800")
    escape_unencodable()
    print("\ud800 漢")
    assert shown("\ud800 漢", encoding) in written()
