"""The hub's parquet files of GLUE and SuperGLUE: the same rows as the official files."""

import pyarrow
import pyarrow.parquet
import pytest
from hub_files import (
    COMMIT,
    CONFIGS,
    CONVERTED,
    HUB_REPOS,
    LAYOUTS,
    check_like_official,
    hub_rows,
    hub_split,
    hub_splits,
    read,
    snapshot,
    write_hub,
    write_parquet,
)
from official import (
    ALL,
    EXPECTED_SPLITS,
    SPLITS,
    put,
)

from extensions.common.errors import UserError
from extensions.data import is_present
from extensions.tasks import TASKS


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ALL)
def test_the_hubs_files_give_the_official_rows(tmp_path, name, layout):
    write_hub(tmp_path, name, layout)
    for split in hub_splits(name):
        check_like_official(name, split, tmp_path)
    assert [split for split in SPLITS if is_present(TASKS[name], split, str(tmp_path))] == hub_splits(name)


def test_scores_of_32_bits_keep_their_decimals(tmp_path):
    """The float32 3.8 is 3.799999952316284 in float64."""
    write_hub(tmp_path, "stsb", LAYOUTS[0])
    assert [example.label for example in read("stsb", "train", tmp_path)] == ["0", "3.8", "4.333", "5"]


@pytest.mark.parametrize("layout", ["{n:05d}-of-00012", "/{n:04d}"])
def test_shards_are_read_in_order(tmp_path, layout):
    for n in reversed(range(12)):
        name = f"train/{n:04d}.parquet" if layout.startswith("/") else f"train-{layout.format(n=n)}.parquet"
        rows = [{"sentence": f"{n} {k}", "label": k % 2, "idx": 3 * n + k} for k in range(3)]
        write_parquet(tmp_path / "cola" / name, rows)
    examples = read("cola", "train", tmp_path)
    assert [example.fields["sentence"] for example in examples] == [f"{n} {k}" for n in range(12) for k in range(3)]
    assert [example.index for example in examples] == list(range(36))


def test_a_split_does_not_take_the_files_of_another(tmp_path):
    """All of MNLI is in one folder of the hub."""
    for split in ("train", "test", "validation_matched", "test_matched", "validation_mismatched", "test_mismatched"):
        row = {"premise": split, "hypothesis": "b", "label": 0, "idx": 0}
        write_parquet(tmp_path / f"mnli/{split}-00000-of-00001.parquet", [row])
    for name in ("mnli", "mnli_mm"):
        for split in EXPECTED_SPLITS[name]:
            texts = [example.fields["sentence1"] for example in read(name, split, tmp_path)]
            assert texts == [hub_split(name, split)]


def test_official_files_take_precedence_over_the_hubs(tmp_path):
    write_hub(tmp_path, "cola", LAYOUTS[0])
    put(tmp_path, "CoLA/train.tsv", "gj04\t1\t\tThe official row.\n")
    assert [example.fields["sentence"] for example in read("cola", "train", tmp_path)] == ["The official row."]


@pytest.mark.parametrize(
    "name, row, parts",
    [
        ("cola", {"sentence": "a", "label": -1}, ["row 2", "'label'", "'-1'", "'1', '0'"]),
        ("cola", {"sentence": "a", "label": None}, ["row 2", "'label'", "'None'"]),
        ("cola", {"sentence": "a"}, ["row 2", "'label'"]),
        ("cola", {"sentence": None, "label": 1}, ["row 2", "'sentence'", "expected text, got None"]),
        ("mnli", {"premise": "a", "hypothesis": "b", "label": 3}, ["row 2", "'label'", "'3'", "'entailment'"]),
        ("mnli", {"premise": "a", "hypothesis": " ", "label": 0}, ["row 2", "'hypothesis'"]),
        ("stsb", {"sentence1": "a", "sentence2": "b", "label": 5.5}, ["row 2", "'label'", "'5.5'", "0 to 5"]),
        ("stsb", {"sentence1": "a", "sentence2": "b", "label": float("nan")}, ["row 2", "'label'", "'nan'"]),
        ("wsc", {"text": "a", "span2_text": "he"}, ["row 2", "WSC's format"]),
        ("record", {"passage": "a", "query": "b", "entities": None}, ["row 2", "ReCoRD's format"]),
    ],
)
def test_a_malformed_row_of_the_hub_is_named(tmp_path, name, row, parts):
    good = hub_rows(name, "train")[0]
    schema = pyarrow.Table.from_pylist([good, row]).schema
    path = tmp_path / CONFIGS[name] / "train-00000-of-00001.parquet"
    path.parent.mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([good, row], schema), path)
    with pytest.raises(UserError) as caught:
        read(name, "train", tmp_path)
    for part in (str(path), *parts):
        assert part in str(caught.value)


def test_a_column_that_the_hubs_file_lacks_is_named(tmp_path):
    write_parquet(tmp_path / "cola/train-00000-of-00001.parquet", [{"text": "a", "label": 1}])
    with pytest.raises(UserError, match=r"row 1: no field 'sentence'; the row has: text, label"):
        read("cola", "train", tmp_path)


def test_a_file_of_the_hub_without_rows(tmp_path):
    path = tmp_path / "cola/train-00000-of-00001.parquet"
    path.parent.mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"sentence": pyarrow.array([], pyarrow.string()), "label": []}), path)
    with pytest.raises(UserError, match="no rows"):
        read("cola", "train", tmp_path)


def test_a_damaged_parquet_file_is_named(tmp_path):
    path = tmp_path / "cola/train-00000-of-00001.parquet"
    rows = [{"sentence": f"sentence {n} {n * n}", "label": 1} for n in range(5000)]
    write_parquet(path, rows)
    whole = path.read_bytes()
    for damaged in (b"", b"no parquet", whole[:-100], whole[:500] + bytes(range(256)) * 8 + whole[2548:]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"cannot be read.*download it again") as caught:
            read("cola", "train", tmp_path)
        assert str(path) in str(caught.value)
    path.write_bytes(whole)
    assert len(read("cola", "train", tmp_path)) == 5000


# --------------------------------------------------------------------------------------------------- data.root: hub


@pytest.mark.parametrize("name", ALL)
def test_root_hub_reads_the_cache(hub_cache, name):
    write_hub(snapshot(hub_cache, HUB_REPOS[name]), name, LAYOUTS[0])
    for split in hub_splits(name):
        assert is_present(TASKS[name], split, "hub")
        check_like_official(name, split, "hub")


@pytest.mark.parametrize("name", ["mnli", "superglue_rte", "axg"])
def test_root_hub_falls_back_on_the_hubs_own_conversion(hub_cache, name):
    """The branch refs/convert/parquet is used if the main one has a script, or no files of this task."""
    folder = snapshot(hub_cache, HUB_REPOS[name], "refs/convert/parquet", CONVERTED)
    write_hub(folder, name, LAYOUTS[1])
    for _ in range(2):
        for split in hub_splits(name):
            check_like_official(name, split, "hub")
        put(snapshot(hub_cache, HUB_REPOS[name]), "glue.py", "a script")  # main without the files


def test_root_hub_prefers_the_main_branch(hub_cache):
    for revision, commit, text in (("main", COMMIT, "main"), ("refs/convert/parquet", CONVERTED, "converted")):
        folder = snapshot(hub_cache, "nyu-mll/glue", revision, commit)
        write_parquet(folder / "cola/train-00000-of-00001.parquet", [{"sentence": text, "label": 1, "idx": 0}])
    assert [example.fields["sentence"] for example in read("cola", "train", "hub")] == ["main"]


@pytest.mark.parametrize("name, split", [("mnli_mm", "validation"), ("wsc", "train"), ("axg", "test")])
def test_root_hub_without_network_or_cache(hub_cache, name, split):
    with pytest.raises(UserError) as caught:
        read(name, split, "hub")
    for part in ("data.root: hub", HUB_REPOS[name], f"task {name}", f"split {split}", "network", "official download"):
        assert part in str(caught.value)
    with pytest.raises(UserError):
        is_present(TASKS[name], split, "hub")


def test_root_hub_lacks_the_labelled_diagnostic_set(hub_cache):
    write_hub(snapshot(hub_cache, "nyu-mll/glue"), "ax", LAYOUTS[0])
    assert is_present(TASKS["ax"], "test", "hub") and not is_present(TASKS["ax"], "validation", "hub")
    with pytest.raises(UserError, match=r"nyu-mll/glue.*task ax, split validation"):
        read("ax", "validation", "hub")
