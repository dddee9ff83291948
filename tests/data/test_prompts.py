import json
import os
import re
import unicodedata
from pathlib import Path
from unittest.mock import patch

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlxpref.data import prompts as prompts_module
from mlxpref.data.find_images import Skipped
from mlxpref.data.prompts import PromptGroup, group_by_prompt, prompts_of
from mlxpref.errors import ConfigError
from tests.data.test_comfyui import BASE, encoder, link, sampler
from tests.data.test_prompt_metadata import INFOTEXT, SETTINGS, SMALL, png, problem

# where prompts come from


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("1.png", "2.png", "3.jpg", "sub/4.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        SMALL.save(tmp_path / name)
    return tmp_path


def images_of(folder: Path) -> list[Path]:
    return [folder / name for name in ("1.png", "2.png", "3.jpg", "sub/4.png")]


def test_sidecars_are_text_beside_the_images(folder: Path) -> None:
    images = images_of(folder)
    (folder / "1.txt").write_bytes(b"\xef\xbb\xbf a red cube\r\non grass \r\n")
    (folder / "2.txt").write_text("another")
    (folder / "2.png.txt").write_text(f"a red cube\non grass\nNegative prompt: ugly\n{SETTINGS}\n")
    (folder / "3.txt").write_text(" \n")
    prompts, skipped, _ = prompts_of(images, "sidecar")
    assert prompts == {images[0]: "a red cube\non grass", images[1]: "a red cube\non grass"}
    assert skipped == [
        Skipped(images[2], "has a prompt file, 3.txt, that has an empty prompt"),
        Skipped(images[3], "has no text file of its name beside it, and no row in a metadata.jsonl there"),
    ]


def test_sidecars_that_cannot_be_used_are_named(folder: Path) -> None:
    images = images_of(folder)
    (folder / "1.txt").write_text("a cube")
    (folder / "2.txt").write_bytes("würfel".encode("utf-16"))
    (folder / "3.txt").write_text("x" * 10_001)
    (folder / "sub" / "4.txt").mkdir()
    _, skipped, _ = prompts_of(images, "sidecar")
    assert [skip.error for skip in skipped] == [
        "has a prompt file, 2.txt, that is not UTF-8; save it as UTF-8",
        "has a prompt file, 3.txt, that has a prompt of 10,001 characters, more than 10,000; shorten it",
        "has no text file of its name beside it, and no row in a metadata.jsonl there",
    ]
    with patch.object(prompts_module, "FILE_LIMIT", 3):
        assert "more than 3 bytes" in problem(prompts_of, images, "sidecar")


def test_sidecars_are_found_in_either_unicode_form(tmp_path: Path) -> None:
    image = tmp_path / unicodedata.normalize("NFC", "café 立方.png")
    SMALL.save(image)
    (tmp_path / unicodedata.normalize("NFD", "café 立方.txt")).write_text("a cube")
    assert prompts_of([image], "sidecar")[0] == {image: "a cube"}


def test_prompts_come_from_metadata(folder: Path) -> None:
    images = images_of(folder)
    png(images[0], {"parameters": INFOTEXT})
    png(images[1], {"prompt": json.dumps({**BASE, "3": sampler(link(6)), "6": encoder(" a cube ")})})
    png(images[3], {"parameters": SETTINGS})
    prompts, skipped, _ = prompts_of(images, "png")
    assert prompts == {images[0]: "a red cube, 4k\non grass", images[1]: "a cube"}
    assert [(skip.path, skip.error) for skip in skipped] == [
        (images[2], "has no prompt in its metadata"),
        (images[3], "has an empty prompt"),
    ]


def test_images_all_without_prompts_are_an_error(folder: Path) -> None:
    images = images_of(folder)
    assert problem(prompts_of, images, "sidecar").startswith(
        f"none of 4 images has a prompt: each of {', '.join(map(str, images))} has no text file of its name beside it, "
        "and no row in a metadata.jsonl there; other ways are --prompt-from sidecar, png or a file (.jsonl, "
    )
    png(images[0], {"parameters": SETTINGS})
    message = problem(prompts_of, [images[0], *images[1:2] * 12], "png")
    assert message.count("no prompt in its metadata") == message.count("and 9 more") == 1, "each reason stands once"
    assert f"{images[0]} has an empty prompt; " in message


LISTS = {
    "list.csv": 'image,prompt\r\n1.png,"a red, ""big"" cube"\r\nsub/4.png,"two\r\nlines"\r\n',
    "bom.csv": '\ufeffPrompt, Image ,note\n"a red, ""big"" cube",1.png,x\n\n"two\nlines",sub/4.png\n',
    "object.json": json.dumps({"1.png": 'a red, "big" cube', "sub/4.png": "two\nlines"}),
    "rows.json": "\ufeff" + json.dumps([{"image": "1.png", "prompt": ' a red, "big" cube'},
                                        {"image": "./sub/../sub/4.png", "prompt": "two\r\nlines\n", "seed": {"a": 1}}]),
    "list.JSONL": '{"image": "1.png", "prompt": "a red, \\"big\\" cube"}\n\n'
                  '{"image": "4.png", "prompt": "two\\nlines"}\r\n',
    "diffusers.jsonl": '{"file_name": "1.png", "text": "a red, \\"big\\" cube"}\n'
                       '{"file_name": "sub/4.png", "text": "two\\nlines", "blip": "x"}\n',
    "kohya.json": json.dumps({"1.png": {"caption": 'a red, "big" cube'}, "4.png": {"caption": "two\nlines"}}),
    "list.tsv": 'filename\tcaption\n1.png\t"a red, ""big"" cube"\nsub/4.png\t"two\nlines"\n',
    "windows.csv": 'image,prompt\nD:\\out\\1.png,"a red, ""big"" cube"\nelsewhere/4.png,"two\nlines"\n',
}  # fmt: skip


@pytest.mark.parametrize("name", LISTS)
def test_lists_name_images_and_prompts(folder: Path, name: str) -> None:
    images = images_of(folder)
    (folder / name).write_bytes(LISTS[name].encode())
    prompts, skipped, _ = prompts_of(images, str(folder / name))
    assert prompts == {images[0]: 'a red, "big" cube', images[3]: "two\nlines"}
    assert [(skip.path, skip.error) for skip in skipped] == [
        (image, f"has no row in {folder / name}") for image in images[1:3]
    ]


def test_a_table_of_parquet_is_a_list(folder: Path) -> None:
    images = images_of(folder)
    table = pa.table({"file_name": ["1.png", "sub/4.png"], "text": ["a cube", "a ball"], "n": [1, 2]})
    pq.write_table(table, folder / "list.parquet")
    assert prompts_of(images, str(folder / "list.parquet"))[0] == {images[0]: "a cube", images[3]: "a ball"}


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_sidecars_may_be_one_list_of_the_folder(folder: Path, name: str) -> None:
    """The layout for training diffusion models; a text file of an image goes before it."""
    images = images_of(folder)
    rows = {"1.png": "a cube", "2.png": "a ball", "3.jpg": "a cone"}
    if name.endswith(".csv"):
        text = "file_name,text\n" + "".join(f"{image},{prompt}\n" for image, prompt in rows.items())
    else:
        text = "".join(json.dumps({"file_name": image, "text": prompt}) + "\n" for image, prompt in rows.items())
    (folder / name).write_text(text)
    (folder / "2.txt").write_text("of its own")
    (folder / "3.caption").write_text("a caption")
    prompts, skipped, _ = prompts_of(images, "sidecar")
    assert prompts == {images[0]: "a cube", images[1]: "of its own", images[2]: "a caption"}
    assert [skip.path for skip in skipped] == [images[3]]


def test_a_list_of_another_kind_is_no_obstacle(folder: Path) -> None:
    images = images_of(folder)
    (folder / "metadata.csv").write_text("epoch,loss\n1,0.5\n")
    (folder / "1.txt").write_text("a cube")
    prompts, skipped, _ = prompts_of(images, "sidecar")
    assert prompts == {images[0]: "a cube"}
    assert f"and {folder / 'metadata.csv'}: no column of images" in skipped[0].error


def listed(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text, "utf-8")
    message = problem(prompts_of, images_of(folder), str(folder / name))
    assert message.startswith(f"{folder / name}: ")
    return message


def test_lists_are_relative_to_their_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "sub" / "list.json").write_text('{"4.png": "a cube", "../1.png": "a ball"}')
    monkeypatch.chdir(folder)
    prompts, _, _ = prompts_of([Path("1.png"), folder / "sub" / "4.png"], "sub/list.json")
    assert prompts == {Path("1.png"): "a ball", folder / "sub" / "4.png": "a cube"}


def test_ambiguous_names(folder: Path) -> None:
    for name in ("a", "b"):
        (folder / name).mkdir()
        SMALL.save(folder / name / "same.png")
    images = [folder / "a" / "same.png", folder / "b" / "same.png", folder / "1.png", folder / "2.png"]
    path = folder / "list.csv"
    path.write_text(
        "image,prompt\nx/same.png,a cube\nx/1.png,a cube\nx/2.png,a cube\ny/2.png,a ball\nb/same.png,a cone\n"
    )
    prompts, skipped, _ = prompts_of(images, str(path))
    assert prompts == {images[1]: "a cone", images[2]: "a cube"}
    message = f"has the same name as another image in {path}; give its path there"
    assert skipped == [Skipped(images[0], message), Skipped(images[3], message)]


def test_bad_rows_are_gathered(folder: Path) -> None:
    rows = (
        "1.png,a cube\n./1.png,a ball\n1.png,a cube\n5.png\n,a cube\n3.jpg,"
        + "x" * 10_001
        + '\n"2.png","a\nb"\n2.png,c\n'
    )
    assert listed(folder, "list.csv", "image,prompt\n" + rows).splitlines() == [
        f"{folder / 'list.csv'}: 4 of 8 rows cannot be used; correct or remove them:",
        '  line 3: "./1.png" has another prompt in an earlier row',
        '  line 6: "image" is empty',
        "  line 7: has a prompt of 10,001 characters, more than 10,000; shorten it",
        '  line 10: "2.png" has another prompt in an earlier row',
    ]
    message = listed(folder, "list.json", json.dumps([{"image": "1.png", "prompt": str(i)} for i in range(14)]))
    assert "13 of 14 rows" in message
    assert message.endswith("\n  and 3 more")
    message = listed(folder, "list.jsonl", '{"image": 3}\n[]\n"x"\n{"image": "1.png", "prompt": "\\ud800"}\n{')
    assert [re.split(r" [({]", line)[0] for line in message.splitlines()[1:]] == [
        "  line 1: image and prompt missing or not text",
        "  line 2: not a JSON object like",
        "  line 3: not a JSON object like",
        "  line 4: has a prompt that is not valid Unicode; write it again",
        "  line 5: not valid JSON",
    ]


def test_lists_that_cannot_be_read_are_errors(folder: Path) -> None:
    assert "or none of prompts (prompt, caption" in listed(folder, "a.csv", "image,price\n1.png,3")
    assert "no column of images (image, file_name" in listed(folder, "a.csv", "1.png,a cube\n2.png,a cube\n")
    for text in ("", "image,prompt\n"):
        assert "no prompts in this file" in listed(folder, "a.csv", text)
    assert "unexpected end of data; is a quote not closed?" in listed(folder, "a.csv", 'image,prompt\n1.png,"a cube\n')
    assert "field larger than field limit" in listed(folder, "a.csv", "image,prompt\n1.png," + "x" * 200_000)
    assert "not valid JSON" in listed(folder, "a.json", "{'1.png': 'a cube'}")
    assert "not valid JSON" in listed(folder, "a.json", "[" * 100_000)
    assert "not a JSON object" in listed(folder, "a.json", '"a cube"')
    assert "no prompts in this file" in listed(folder, "a.json", "{}")
    assert "no prompts in this file" in listed(folder, "a.jsonl", "\n \n")
    (folder / "b.json").write_text('{"5.png": "a cube"}')
    assert "none of 4 images has a prompt: " in problem(prompts_of, images_of(folder), str(folder / "b.json"))
    (folder / "c.csv").write_bytes("image,prompt\n1.png,Würfel\n".encode("latin-1"))
    assert "not UTF-8" in problem(prompts_of, images_of(folder), str(folder / "c.csv"))


def test_unknown_sources(folder: Path) -> None:
    images = images_of(folder)
    for source in ("exif", "prompts.txt", ""):
        assert "prompts come from `sidecar`, `png`, or a file" in problem(prompts_of, images, source, kind=ConfigError)
    assert "gone.csv: cannot be opened (No such file" in problem(prompts_of, images, str(folder / "gone.csv"))
    assert "cannot be opened" in problem(prompts_of, images, "nu\0ll.csv")
    (folder / "folder.csv").mkdir()
    names = ("folder.csv", "pipe.csv", "pipe.json", "pipe.jsonl")
    for name in names[1:]:
        os.mkfifo(folder / name)
    for name in names:
        assert "is a folder or a device" in problem(prompts_of, images, str(folder / name))


def test_an_empty_prompt_in_a_list_is_named(folder: Path) -> None:
    images = images_of(folder)
    (folder / "list.csv").write_text("image,prompt\n1.png,a cube\n2.png,  \n")
    prompts, skipped, _ = prompts_of(images[:2], str(folder / "list.csv"))
    assert prompts == {images[0]: "a cube"}
    assert skipped == [Skipped(images[1], "has an empty prompt")]


# groups


def test_groups_in_order_of_appearance() -> None:
    a, b, c, d, e = (Path(f"{name}.png") for name in "abcde")
    groups, skipped = group_by_prompt({a: "cube", b: "ball", c: "cone\n" * 30, d: "ball", e: "cube"})
    assert groups == [PromptGroup("cube", (a, e)), PromptGroup("ball", (b, d))]
    assert [skip.path for skip in skipped] == [c]
    assert skipped[0].error.startswith("is the only image of its prompt, “cone cone ")
    assert "\n" not in skipped[0].error
    message = problem(group_by_prompt, {Path(f"{i}.png"): str(i) for i in range(12)})
    assert message.startswith(
        "no two of 12 images have the same prompt, so none can be ranked: 0.png is the only image"
    )
    assert message.endswith("; and 2 more")
