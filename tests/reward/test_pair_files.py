"""The formats of pairs: read back by us and by the columns of public scripts; resumed, checked, and bounded."""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mlxpref.data.archives import ArchiveCache
from mlxpref.data.images import load_image, read_content
from mlxpref.data.load import load_preferences
from mlxpref.data.tables import read_table
from mlxpref.engine.profile import own_profile
from mlxpref.errors import ConfigError, DataError
from mlxpref.preferences import ImageLike, PackedImage
from mlxpref.reward import pair_files
from mlxpref.reward.pair_files import MANIFEST, UNREADABLE, write_pairs
from mlxpref.reward.pair_formats import PARQUET, Format, jpeg_of
from mlxpref.reward.pairs import TIE
from tests.conftest import picture
from tests.data.own_rows import write_rows

FORMATS: Sequence[Format] = get_args(Format)


COUNT = 14


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Rows of preferences, some of them soft, of eight pictures in three formats, told apart by their brightness."""
    names = [f"{number}.{('png', 'jpg', 'webp')[number % 3]}" for number in range(8)]
    for number, name in enumerate(names):
        picture(number).point(lambda value, least=28 * number: value // 8 + least).save(tmp_path / name)
    shares = (1, 0, 0.7, 0.25, 1, 0.9)
    rows = [
        {"prompt": f"prompt {i % 4} é", "a": names[i % 8], "b": names[(3 * i + 1) % 8], "p_a": shares[i % 6]}
        for i in range(COUNT)
    ]
    return write_rows(tmp_path, *rows)


def number_of(image: ImageLike) -> int:
    """The number of a picture, also after it was encoded as a JPEG."""
    return round((np.asarray(load_image(image)).mean() - 15) / 28)


def meaning(data: str) -> list[tuple[str, dict[int, float]]]:
    """The prompt of each preference and the share of each of its pictures."""
    preferences = load_preferences(data, "train")
    return [(p.prompt, {number_of(p.a): p.p_people, number_of(p.b): 1 - p.p_people}) for p in preferences]


def data_of(folder: Path, to: Format) -> str:
    """The name by which `--data` reads the pairs of a folder."""
    return str(folder if to in PARQUET else next(folder.glob("pairs.json*")))


@pytest.mark.parametrize("to", FORMATS)
def test_pairs_come_back(source: Path, tmp_path: Path, to: Format) -> None:
    result = write_pairs(source, tmp_path / "out", to)
    assert (result.pairs, result.left_out) == (COUNT, {})
    assert meaning(data_of(tmp_path / "out", to)) == meaning(str(source))


@pytest.mark.parametrize("to", FORMATS)
def test_the_preferred_image_stays_so(tmp_path: Path, to: Format) -> None:
    """Light images are preferred; which one is a is drawn."""
    for level in range(20):
        Image.new("RGB", (8, 8), (12 * level,) * 3).save(tmp_path / f"{level}.png")
    rows = [{"prompt": "p", "a": f"{i + 1}.png", "b": f"{i}.png", "p_a": 0.8} for i in range(19)]
    write_pairs(write_rows(tmp_path, *rows), tmp_path / "out", to)
    back = load_preferences(data_of(tmp_path / "out", to), "train")
    for p in back:
        a, b = (np.asarray(load_image(image)).mean() for image in (p.a, p.b))
        assert (a > b) == (p.p_people > 0.5)
    assert 3 < sum(p.p_people > 0.5 for p in back) < 16


def test_columns_of_diffusion_dpo(source: Path, tmp_path: Path) -> None:
    """As its script reads them: an image of 0 where label_0 is 1, else that of 1."""
    write_pairs(source, tmp_path / "out", "diffusion-dpo")
    (path,) = (tmp_path / "out" / "data").iterdir()
    assert path.name == "train-00000-of-00001.parquet"
    rows = pq.read_table(path).to_pylist()
    for row in rows:
        assert row["label_0"] in (0, 1)
        assert row["label_0"] + row["label_1"] == 1
        assert (row["p_a"] > 0.5) == (row["label_0"] == 1)
        for column in ("jpg_0", "jpg_1"):
            image = Image.open(io.BytesIO(row[column])).convert("RGB")
            assert image.size == (84, 84)
    own = {path.read_bytes() for path in tmp_path.glob("*.jpg")}
    assert own & {row[column] for row in rows for column in ("jpg_0", "jpg_1")}  # byte for byte


def test_columns_of_hpsv3(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As its loader reads them: one array, files from any folder, the preferred one first, more votes for it."""
    write_pairs(source, tmp_path / "out", "hpsv3")
    monkeypatch.chdir("/")
    rows = json.loads((tmp_path / "out" / "pairs.json").read_text())
    assert len(rows) == COUNT
    for row in rows:
        assert os.path.exists(row["path1"]), row  # noqa: PTH110  as it does
        assert os.path.isabs(row["path2"])  # noqa: PTH117
        assert row["choice_dist"] == sorted(row["choice_dist"], reverse=True)
        assert row["choice_dist"][0] / sum(row["choice_dist"]) == row["confidence"] > 0.5


def test_columns_of_trl(source: Path, tmp_path: Path) -> None:
    """Typed messages with as many places as images, answers of our own profile, and images that `datasets` decodes."""
    write_pairs(source, tmp_path / "out", "trl")
    (path,) = (tmp_path / "out" / "data").iterdir()
    table, profile = pq.read_table(path), own_profile()
    told = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert told["images"] == [{"_type": "Image"}]
    assert told.keys() == set(table.column_names)
    for row in table.to_pylist():
        user = row["prompt"][-1]
        assert (user["role"], [part["type"] for part in user["content"]].count("image")) == ("user", 2)
        words = "".join(part["text"] or "{image}" for part in user["content"])
        assert words == profile.question.format(criterion=profile.criterion, prompt=row["caption"], image="{image}")
        answers = [row[name][0]["content"][0]["text"] for name in ("chosen", "rejected")]
        assert answers[row["p_a"] < 0.5] == "<think></think><answer>1</answer>"
        assert answers[row["p_a"] > 0.5] == "<think></think><answer>2</answer>"


def test_rows_of_trl_are_read_without_our_columns(source: Path, tmp_path: Path) -> None:
    write_pairs(source, tmp_path / "out", "trl")
    (path,) = (tmp_path / "out" / "data").iterdir()
    table = pq.read_table(path)
    soft = [p.p_people for p in load_preferences(str(path), "train")]
    pq.write_table(table.drop_columns(["p_a", "caption"]), path)
    hard = load_preferences(str(path), "train")
    assert [p.p_people for p in hard] == [float(p > 0.5) for p in soft]
    assert all(p.prompt.startswith("Criterion: People prefer") for p in hard)


def test_images_are_not_read_to_list_a_table(source: Path, tmp_path: Path) -> None:
    """The statistics of the table say that no image is missing."""
    for to in PARQUET:
        write_pairs(source, tmp_path / to, to)
        (path,) = (tmp_path / to / "data").iterdir()
        metadata = pq.ParquetFile(path).metadata
        leaves = [metadata.row_group(0).column(i) for i in range(metadata.num_columns)]
        (leaf, *_) = (leaf for leaf in leaves if leaf.path_in_schema.split(".")[-1] in ("jpg_0", "bytes"))
        assert leaf.statistics.has_null_count
        assert len(list(read_table(path))) == COUNT


def test_ties_of_people(tmp_path: Path) -> None:
    for number in range(2):
        picture(number).save(tmp_path / f"{number}.png")
    row = {"prompt": "p", "a": "0.png", "b": "1.png", "p_a": 0.5}
    path = write_rows(tmp_path, row, row | {"p_a": 1})
    for to in FORMATS:
        result = write_pairs(path, tmp_path / to, to)
        assert (result.pairs, result.left_out) == ((2, {}) if to == "jsonl" else (1, {TIE: 1}))
    assert [p.p_people for p in load_preferences(data_of(tmp_path / "jsonl", "jsonl"), "train")].count(0.5) == 1


# images


def encoded(image: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


def test_a_jpeg_stays_as_it_is() -> None:
    for image in (picture(0), picture(0).convert("L")):
        assert jpeg_of(encoded(image, quality=30)) == encoded(image, quality=30)
    exif = Image.Exif()
    exif[0x0112] = 1
    upright = encoded(picture(0), exif=exif)
    assert jpeg_of(upright) == upright


def test_other_images_are_upright_on_white_and_near() -> None:
    exif, wide = Image.Exif(), picture(0, (40, 20))
    exif[0x0112] = 6
    assert Image.open(io.BytesIO(jpeg_of(encoded(wide, exif=exif)))).size == (20, 40)
    cmyk = encoded(wide.convert("CMYK"))
    assert Image.open(io.BytesIO(jpeg_of(cmyk))).mode == "RGB"
    file = io.BytesIO()
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(file, "PNG")
    image = Image.open(io.BytesIO(jpeg_of(file.getvalue())))
    assert np.asarray(image).min() >= 250
    cut = encoded(wide, quality=95)[:-2]  # without its end, which Pillow alone refuses
    with pytest.raises(OSError, match="truncated"):
        Image.open(io.BytesIO(cut)).load()
    Image.open(io.BytesIO(jpeg_of(cut))).load()
    for damaged in (encoded(wide)[:200], b"", encoded(wide)[:300] + bytes(400)):
        with pytest.raises(DataError):
            jpeg_of(damaged)


@pytest.mark.parametrize("to", FORMATS)
def test_images_that_cannot_be_read(source: Path, tmp_path: Path, to: Format, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "0.png").write_bytes(b"no picture")
    (tmp_path / "1.jpg").unlink()
    lost = sum(any(str(image).endswith(("0.png", "1.jpg")) for image in (p.a, p.b)) for p in read(source))
    result = write_pairs(source, tmp_path / "out", to)
    assert (result.pairs, result.left_out) == (COUNT - lost, {UNREADABLE: lost})
    assert {Path(name).name for name in result.unreadable} == {"0.png", "1.jpg"}
    assert f"{lost} pairs left out, as an image cannot be read: " in caplog.text
    for path in (*tmp_path.glob("?.png"), *tmp_path.glob("?.jpg"), *tmp_path.glob("?.webp")):
        path.unlink()
    for _ in range(2):
        with pytest.raises(DataError, match=r"no pairs: .*cannot be opened") as caught:
            write_pairs(source, tmp_path / "none", to)
        assert "\n" not in str(caught.value)
        assert not list((tmp_path / "none").iterdir())


def read(source: Path) -> Any:
    from mlxpref.reward.pair_sources import read_source

    return read_source(source)


@pytest.mark.parametrize("to", FORMATS)
def test_pairs_are_a_source_of_pairs(source: Path, tmp_path: Path, to: Format) -> None:
    """Also where the images are in a table: they are copied for a file of rows."""
    write_pairs(source, tmp_path / "table", "diffusion-dpo")
    (table,) = (tmp_path / "table" / "data").iterdir()
    result = write_pairs(table, tmp_path / "again", to)
    assert result.pairs == COUNT
    back = load_preferences(data_of(tmp_path / "again", to), "train")
    if to == "jsonl":
        contents = {
            read_content(PackedImage(table, f"jpg_{side}", row), ArchiveCache())
            for row in range(COUNT)
            for side in (0, 1)
        }
        assert {image.read_bytes() for p in back for image in (p.a, p.b) if isinstance(image, Path)} == contents


# folders

KILLED = """
import sys, time
from pathlib import Path
from mlxpref.reward import pair_files, pair_formats

pair_files._SHARD_BYTES, pair_files._GROUP_BYTES, slow = 20_000, 6_000, pair_formats.row_of
def row_of(*given):
    print("pair", flush=True)
    time.sleep(0.05)
    return slow(*given)
pair_files.row_of = row_of
pair_files.write_pairs(*sys.argv[1:])
"""


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("to", FORMATS)
def test_killed_and_resumed(source: Path, tmp_path: Path, to: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair_files, "_SHARD_BYTES", 20_000)
    monkeypatch.setattr(pair_files, "_GROUP_BYTES", 6_000)
    (tmp_path / "7.jpg").unlink()
    write_pairs(source, tmp_path / "whole", to)
    for seen in (5, 3):
        command = [sys.executable, "-c", KILLED, str(source), str(tmp_path / "out"), to]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for _ in range(seen):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not json.loads((tmp_path / "out" / MANIFEST).read_text())["state"]["complete"]
        assert not list((tmp_path / "out").rglob("*.parquet"))  # no reader takes a part for the whole
    done = json.loads((tmp_path / "out" / MANIFEST).read_text())["state"]["done"]
    assert (done > 0) == (to in PARQUET)
    made = {path: path.stat().st_ino for path in (tmp_path / "out").rglob("*.part") if not path.name.startswith(".")}
    result = write_pairs(source, tmp_path / "out", to)
    assert {path.stat().st_ino for path in (tmp_path / "out").rglob("*.parquet")} >= {*made.values()}
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    assert all(digests(tmp_path / "out")[file["path"]] == file["sha256"] for file in result.files)
    assert sum(file["pairs"] for file in result.files) == result.pairs
    assert len(result.files) > 3 or to not in PARQUET


def test_killed_between_the_last_names(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair_files, "_SHARD_BYTES", 20_000)
    write_pairs(source, tmp_path / "whole", "diffusion-dpo")
    save, saved = pair_files._save, list[int]()

    def fail_at_last(result: Any, origin: Any) -> None:
        saved.append(1)
        if result.complete:
            raise KeyboardInterrupt
        save(result, origin)

    monkeypatch.setattr(pair_files, "_save", fail_at_last)
    with pytest.raises(KeyboardInterrupt):
        write_pairs(source, tmp_path / "out", "diffusion-dpo")
    monkeypatch.setattr(pair_files, "_save", save)
    first = sorted((tmp_path / "out" / "data").iterdir())[0]
    first.rename(tmp_path / "out" / "data" / "train-00000.parquet.part")
    write_pairs(source, tmp_path / "out", "diffusion-dpo")
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_a_whole_folder_is_left_alone(source: Path, tmp_path: Path) -> None:
    before = write_pairs(source, tmp_path / "out", "trl")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert write_pairs(source, tmp_path / "out", "trl") == before
    assert times == {path: path.stat().st_mtime_ns for path in times}
    (path,) = (tmp_path / "out" / "data").iterdir()
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(ConfigError, match=r"of-00001\.parquet: is gone or has changed; remove the folder"):
        write_pairs(source, tmp_path / "out", "trl")


def test_a_folder_of_other_conditions(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_pairs(source, out, "jsonl")
    with pytest.raises(ConfigError, match=r"out: holds pairs of other --to; give another --output, or remove"):
        write_pairs(source, out, "hpsv3")
    with pytest.raises(ConfigError, match="of other --choose, --margin, sources or images;"):
        write_pairs(source, out, "jsonl", margin=1.0)
    os.utime(tmp_path / "1.jpg", (time.time() + 5,) * 2)
    with pytest.raises(ConfigError, match="of other sources or images;"):
        write_pairs(source, out, "jsonl")
    with pytest.raises(ConfigError, match="is not an empty folder; give a new one"):
        write_pairs(source, tmp_path, "jsonl")
    (out / MANIFEST).write_text("{}")
    with pytest.raises(ConfigError, match=r"manifest\.json: is none of `mlxpref pairs`"):
        write_pairs(source, out, "jsonl")
    assert not list(tmp_path.rglob(".lock"))


def test_one_process_a_folder(source: Path, tmp_path: Path) -> None:
    with pair_files._locked(tmp_path / "out"), pytest.raises(ConfigError, match="another process writes pairs there"):
        write_pairs(source, tmp_path / "out", "jsonl")


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"to": "csv"}, "to 'csv': give 'diffusion-dpo', 'hpsv3', 'trl', 'jsonl'"),
        ({"choose": "all"}, "choose 'all': give"),
        ({"choose": "margin"}, "goes with a margin in nats"),
        ({"choose": "resolved", "margin": 1.0}, "goes with a margin in nats"),
        ({"margin": -1.0}, "give a number of nats, 0 or more"),
        ({"margin": float("nan")}, "give a number of nats, 0 or more"),
    ],
)
def test_wrong_choices(source: Path, tmp_path: Path, given: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        write_pairs(source, tmp_path / "out", **({"to": "jsonl"} | given))
    assert not (tmp_path / "out").exists()
