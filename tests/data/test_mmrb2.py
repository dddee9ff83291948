"""MMRB2's text-to-image pairs: the hub's tables and the official script's list say the same, and what can be wrong."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlxpref.data.image_cache import ImageCache
from mlxpref.data.images import load_image
from mlxpref.data.load import check_preferences, load_preferences
from mlxpref.errors import ConfigError, DataError, UnknownSplitError
from mlxpref.preferences import PackedImage, Preference
from tests.data_layouts import make_layout
from tests.messages import messages

IMAGES = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("pair_id", "prompt_text", "chosen", "human_annotations")]
    + [(name, IMAGES) for name in ("prompt_images", "response_a_images", "response_b_images")]
)


def row(number: int = 0, **changes: Any) -> dict[str, Any]:
    """A row of the hub's table."""
    images = [{"bytes": f"{number}{side}".encode(), "path": None} for side in "ab"]
    return {
        "pair_id": f"pair_{number}",
        "prompt_text": "a red cube",
        "prompt_images": [],
        "response_a_images": images[:1],
        "response_b_images": images[1:],
        "chosen": "A",
        "human_annotations": "[5, 6, 2]",
        **changes,
    }


def read_table(folder: Path, *rows: dict[str, Any], **options: Any) -> list[Preference]:
    """The preferences in a table of these rows."""
    (folder / "t2i").mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows), SCHEMA), folder / "t2i" / "test-00000-of-00001.parquet")
    return load_preferences("mmrb2", "test", data_dir=folder, **options)


def read_list(folder: Path, *rows: dict[str, Any], **options: Any) -> list[Preference]:
    """The preferences in a list as the official script makes it of these rows; it names images and does not have them.

    The split into parts is that of the script: text, and images in the place of <image_N>.
    """
    pairs = []
    for each in rows:
        pair = {"id": each["pair_id"], "chosen": (each["chosen"] or "").upper()}
        pair["prompt_content"] = [["text", each["prompt_text"]]] if each["prompt_text"] else []
        pair["prompt_content"] += [["image", f"input_images/{i}.jpg"] for i in range(len(each["prompt_images"]))]
        for side in "ab":
            count = len(each[f"response_{side}_images"])
            content = [["image", f"images/{each['pair_id']}_{side}_{i}.jpg"] for i in range(count)]
            pair[f"response_{side}"] = {"model_name": "", "response_content": content}
        if each["human_annotations"]:
            pair["human_annotations"] = json.loads(each["human_annotations"])
        pairs.append(pair)
    (folder / "t2i.json").write_text(json.dumps({"pairs": pairs}, indent=2))
    return load_preferences("mmrb2", "test", data_dir=folder, needs_images=False, **options)


READERS = [read_table, read_list]


def test_both_forms_hold_the_same(tmp_path: Path) -> None:
    hub, local = (
        load_preferences("mmrb2", "test", data_dir=make_layout(name, tmp_path / name, 4))
        for name in ("mmrb2", "mmrb2-list")
    )
    assert len(hub) == len(local) == 8
    assert [(p.prompt, p.better, p.p_people, p.votes, p.group) for p in hub] == [
        (p.prompt, p.better, p.p_people, p.votes, p.group) for p in local
    ]
    for one, other in zip(hub, local, strict=True):
        for packed, file in ((one.a, other.a), (one.b, other.b)):
            assert isinstance(packed, PackedImage)
            assert isinstance(file, Path)
            assert load_image(packed).tobytes() == load_image(file).tobytes()
    check_preferences("mmrb2", hub, ImageCache(1000))
    assert {p.better for p in hub} == {"a", "b"}
    assert {p.group for p in hub} == {p.prompt for p in hub}


def test_a_and_b_are_those_of_the_file(tmp_path: Path) -> None:
    """Also where every row prefers the same side: the file's sides do not tell the label, so none is drawn."""
    read = read_table(tmp_path, *(row(i) for i in range(40)))
    table = f"{tmp_path}/t2i/test-00000-of-00001.parquet"
    assert [str(p.a) for p in read] == [f"{table}/{i}/response_a_images/0" for i in range(40)]
    assert {p.better for p in read} == {"a"}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("chosen", "annotations", "share", "votes", "label"),
    [
        ("A", "[5, 6, 2]", 2 / 3, 3, None),
        ("b", "[1, 2, 3]", 0, 3, None),
        ("B", "[4, 1, 2]", 1 / 3, 3, None),
        ("a", "[4, 4, 4]", 1, 3, None),
        ("B", "[4, 6, 1]", 2 / 3, 3, "b"),  # the label is `chosen`, also against the majority
        ("A", "[3, 3, 6]", 1 / 3, 3, "a"),
        ("A", "", 1, 1, None),
        ("B", None, 0, 1, None),
    ],
)
def test_the_label_is_chosen_and_the_votes_are_the_annotators(
    reader: Any, chosen: str, annotations: str | None, share: float, votes: int, label: str | None, tmp_path: Path
) -> None:
    (read,) = reader(tmp_path, row(chosen=chosen, human_annotations=annotations))
    assert read.better == chosen.lower()
    assert (read.p_people, read.votes, read.label) == (pytest.approx(share), votes, label)
    assert read.swapped().better == ("b" if read.better == "a" else "a")


TWO = [{"bytes": b"1", "path": None}, {"bytes": b"2", "path": None}]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        ({"response_b_images": TWO}, "response B has 2 images; one of text-to-image has one"),
        ({"response_a_images": []}, "response A has 0 images"),
        ({"chosen": "C"}, "\"chosen\" must be A or B, not 'C'"),
        ({"chosen": "tie"}, '"chosen" must be A or B, not'),
        ({"chosen": None}, '"chosen" must be A or B, not'),
        ({"prompt_text": "<image_1> in winter"}, "its prompt has images: it is of another task than text-to-image"),
        ({"prompt_images": TWO[:1]}, "its prompt has images"),
        ({"prompt_text": ""}, '"prompt_text" must be text, not empty'),
        ({"human_annotations": "[5, 6]"}, '"human_annotations" must be 3 numbers from 1 to 6, not'),
        ({"human_annotations": "[5, 6, 7]"}, "must be 3 numbers from 1 to 6"),
        ({"human_annotations": "[0, 6, 5]"}, "must be 3 numbers from 1 to 6"),
        ({"human_annotations": '[5, 6, "4"]'}, "must be 3 numbers from 1 to 6"),
        ({"human_annotations": "[5, 6, true]"}, "must be 3 numbers from 1 to 6"),
        ({"human_annotations": "[5, 6, NaN]"}, "must be 3 numbers from 1 to 6"),
        ({"human_annotations": '{"a": 1}'}, "must be 3 numbers from 1 to 6"),
    ],
)
def test_rows_that_cannot_be_used(reader: Any, wrong: dict[str, Any], problem: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        reader(tmp_path, row(0), row(1, **wrong))
    first, second = str(caught.value).splitlines()
    assert first.endswith(": 1 of 2 rows cannot be used; download the data set again:")
    assert second.startswith("  row 2: ")
    assert problem in second
    with messages() as lines:
        assert len(reader(tmp_path, *(row(i) for i in range(200)), row(200, **wrong))) == 200
    assert problem in "\n".join(lines)


def test_text_that_is_no_json(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"must be 3 numbers from 1 to 6, not '\[5, 6, '"):
        read_table(tmp_path, row(0), row(1, human_annotations="[5, 6, "))


def test_all_errors_are_gathered(tmp_path: Path) -> None:
    bad = row(1, chosen="C", human_annotations="x", response_a_images=TWO, prompt_text="<image_1>")
    with pytest.raises(DataError) as caught:
        read_table(tmp_path, row(0), bad, row(2, chosen=""))
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert lines[1].count("; ") == 4  # text-to-image (t2i) ... has one
    assert lines[2] == "  row 3: \"chosen\" must be A or B, not ''"
    with pytest.raises(DataError, match=r"none of 2 rows can be used: row 1: "):
        read_table(tmp_path, bad, bad)


@pytest.mark.parametrize("content", ['{"pairs": []}', "[]", '{"pairs": [{"id": "x"}]}', '{"pairs": [[1]]}'])
def test_lists_without_pairs(content: str, tmp_path: Path) -> None:
    (tmp_path / "t2i.json").write_text(content)
    with pytest.raises(DataError, match=r"t2i\.json: none of \d rows can be used"):
        load_preferences("mmrb2", "test", data_dir=tmp_path)


@pytest.mark.parametrize("content", ["text", [["text"]], [1], {"text": "x"}])
def test_contents_of_another_form(content: Any, tmp_path: Path) -> None:
    folder = make_layout("mmrb2-list", tmp_path, 2)
    pairs = json.loads((folder / "t2i.json").read_text())["pairs"]
    pairs[1]["prompt_content"] = content
    (folder / "t2i.json").write_text(json.dumps({"pairs": pairs}))
    with pytest.raises(DataError, match=r'row 2: "prompt_content" must be a list of \["text", ...\]'):
        load_preferences("mmrb2", "test", data_dir=folder)


def test_missing_images_of_the_list_are_named(tmp_path: Path) -> None:
    folder = make_layout("mmrb2-list", tmp_path, 2)
    gone = sorted((folder / "images").iterdir())[0]
    gone.unlink()
    with pytest.raises(
        DataError, match=rf"1 of 4 rows cannot be used(.|\n)*response A is 'images/{gone.name}': no such"
    ):
        load_preferences("mmrb2", "test", data_dir=folder)


def test_missing_files_name_the_command(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=r"there is no \*\.parquet in \S+t2i and no t2i\.json in .*`mlxpref data mmrb2 --split test`",
    ):
        load_preferences("mmrb2", "test", data_dir=tmp_path)
    with pytest.raises(UnknownSplitError, match="split 'train': mmrb2 has test"):
        load_preferences("mmrb2", "train", data_dir=tmp_path)
    folder = make_layout("mmrb2", tmp_path / "hub", 2)
    (folder / "t2i/test-00001-of-00002.parquet").unlink()
    with messages() as lines:
        assert len(load_preferences("mmrb2", "test", data_dir=folder)) == 2
    assert "mmrb2: 1 of 2 tables of split test are here" in lines[0]


def test_names_without_images(tmp_path: Path) -> None:
    """An image in a table is also known by its pair and side, one of the list by its path."""
    hub = make_layout("mmrb2", tmp_path / "hub", 2)
    for needs_images in (True, False):
        read = load_preferences("mmrb2", "test", data_dir=hub, needs_images=needs_images)
        assert [(p.a.known_as, p.b.known_as) for p in read][1] == ("demo_000_31/a", "demo_000_31/b")
        assert load_image(read[1].a).size == (84, 84)
    local = make_layout("mmrb2-list", tmp_path / "list", 2)
    shutil.rmtree(local / "images")
    names = [(str(p.a), str(p.b)) for p in load_preferences("mmrb2", "test", data_dir=local, needs_images=False)]
    assert names[1] == (f"{local}/images/demo_000_31_a_0.jpg", f"{local}/images/demo_000_31_b_0.jpg")


def test_tables_of_any_name(tmp_path: Path) -> None:
    """The hub's own copies are called so; those of other tasks are elsewhere."""
    folder = make_layout("mmrb2", tmp_path, 2)
    for number, table in enumerate(sorted((folder / "t2i").iterdir())):
        table.rename(table.with_name(f"000{number}.parquet"))
    assert len(load_preferences("mmrb2", "test", data_dir=folder)) == 4
