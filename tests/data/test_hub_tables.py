"""Data sets of the hub by `owner/name`: their tables, against a hub of one's own."""

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from mlxpref.cli import main
from mlxpref.data.hub_tables import HubName, hub_name
from mlxpref.data.image_cache import ImageCache
from mlxpref.data.load import ALL_ROWS, check_preferences, load_preferences
from mlxpref.errors import ConfigError, DataError
from mlxpref.judge.protocols import protocol_of
from tests.conftest import picture
from tests.data_layouts import make_layout
from tests.hub_server import HubServer, Repository, serving, use_hub
from tests.messages import messages


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    monkeypatch.setattr("huggingface_hub.file_download.time", SimpleNamespace(sleep=lambda seconds: None))
    with serving({}) as server:
        use_hub(monkeypatch, server.endpoint, tmp_path / "cache")
        yield server


def png(seed: int) -> bytes:
    content = io.BytesIO()
    picture(seed, (24, 16)).save(content, "PNG")
    return content.getvalue()


def write_table(path: Path, name: str, rows: int = 4, **columns: object) -> None:
    """A table of pairs with images inside, as `datasets` writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    row = {"chosen": {"bytes": png(1), "path": "a.png"}, "rejected": {"bytes": png(2), "path": "b.png"}, **columns}
    pq.write_table(pa.Table.from_pylist([{"prompt": f"{name} {i}", **row} for i in range(rows)]), path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three tables to learn from, one to test with."""
    for i in range(3):
        write_table(tmp_path / "origin" / "data" / f"train-{i:05d}-of-00003.parquet", f"train{i}")
    write_table(tmp_path / "origin" / "data" / "test-00000-of-00001-0123456789abcdef.parquet", "test")
    (tmp_path / "origin" / "README.md").write_text("x")
    return tmp_path / "origin"


def prompts(data: str, split: str, **options: Any) -> list[str]:
    return [p.prompt for p in load_preferences(data, split, **options)]


def yes(question: str) -> bool:
    return True


def test_names() -> None:
    assert hub_name("a/b") == HubName("a/b")
    assert hub_name("a/b.c-d@v1.0") == HubName("a/b.c-d", None, "v1.0")
    assert hub_name("a/b/c@refs/convert/parquet") == HubName("a/b", "c", "refs/convert/parquet")
    for other in ("demo", "./a/b", "../a/b", "a/b.jsonl", "/a/b", "a/b@", "a//b"):
        assert hub_name(other) is None


def test_size_and_licence_are_asked_about_once(hub: HubServer, folder: Path) -> None:
    hub.repositories["owner/pairs"] = Repository(folder, licence="cc-by-4.0")
    questions: list[str] = []

    def agree(question: str) -> bool:
        questions.append(question)
        return len(questions) > 1

    with pytest.raises(ConfigError, match="nothing was downloaded; agree with --yes"):
        load_preferences("owner/pairs", "train", agree=agree)
    assert hub.downloaded() == []
    size = sum(path.stat().st_size for path in folder.glob("data/train-*")) / 1000
    assert questions == [
        f"owner/pairs on the hub (licence cc-by-4.0; 3 tables, {size:.1f} kB) is not here. Download it?"
    ]
    preferences = load_preferences("owner/pairs", "train", agree=agree)
    assert [p.prompt for p in preferences] == [f"train{n} {i}" for n in range(3) for i in range(4)]
    assert len(hub.downloaded()) == 3
    check_preferences("owner/pairs", preferences, ImageCache(10_000))
    load_preferences("owner/pairs", "train", agree=agree)  # it is here
    assert len(questions) == 2


def test_a_limit_needs_only_the_first_tables(hub: HubServer, folder: Path) -> None:
    hub.repositories["owner/pairs"] = Repository(folder)
    assert len(prompts("owner/pairs", "train", limit=5, agree=yes)) == 5
    assert [path[:16] for path in hub.downloaded()] == ["data/train-00000", "data/train-00001"]


def test_the_cache_is_enough_without_the_hub(hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories["owner/pairs"] = Repository(folder)
    prompts("owner/pairs", "train", limit=5, agree=yes)
    hub.repositories.clear()
    with messages() as lines:
        assert len(prompts("owner/pairs", "train")) == 8
    assert any("what is in the hub's cache is used" in line for line in lines)
    assert any("2 of 3 tables of split train are here" in line for line in lines)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert len(prompts("owner/pairs", "train")) == 8


def test_revisions(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    write_table(tmp_path / "old" / "train.parquet", "old", 2)
    branch = Repository(tmp_path / "old")
    hub.repositories["owner/pairs"] = Repository(folder, branches={"refs/convert/parquet": branch})
    assert prompts("owner/pairs@refs/convert/parquet", "train", agree=yes) == ["old 0", "old 1"]
    with pytest.raises(DataError, match="no such branch, tag or commit"):
        prompts("owner/pairs@v9", "train", agree=yes)


def test_parts_and_names_of_tables(hub: HubServer, tmp_path: Path) -> None:
    origin = tmp_path / "origin"
    write_table(origin / "photos" / "test_v1-00000-of-00001.parquet", "photos")
    write_table(origin / "drawings" / "test" / "0000.parquet", "drawings")
    hub.repositories["owner/parts"] = Repository(origin)
    with pytest.raises(DataError, match="several parts, drawings, photos: give one, as owner/parts/drawings"):
        prompts("owner/parts", "test", agree=yes)
    assert prompts("owner/parts/drawings", "test", agree=yes)[0] == "drawings 0"
    with pytest.raises(DataError, match="no split 'test'; there are test_v1; give one with --split"):
        prompts("owner/parts/photos", "test", agree=yes)
    assert prompts("owner/parts/photos", "test_v1", agree=yes)[0] == "photos 0"
    write_table(tmp_path / "nested" / "photos" / "large" / "test-00000.parquet", "large")
    write_table(tmp_path / "nested" / "drawings" / "large" / "test-00000.parquet", "drawings")
    hub.repositories["owner/nested"] = Repository(tmp_path / "nested")
    assert prompts("owner/nested/photos", "test", agree=yes)[0] == "large 0"
    assert prompts("owner/nested/photos/large", "test", agree=yes)[0] == "large 0"
    write_table(origin / "default" / "partial-train" / "0000.parquet", "default")
    hub.repositories["owner/default"] = Repository(origin)
    assert prompts("owner/default", "train", agree=yes)[0] == "default 0"


@pytest.mark.parametrize("named", [False, True])
def test_one_table_without_splits_is_all_rows(hub: HubServer, tmp_path: Path, named: bool) -> None:
    name = "pairs-00000-of-00001.parquet" if named else "data.parquet"
    write_table(tmp_path / "origin" / name, "all")
    hub.repositories["owner/all"] = Repository(tmp_path / "origin")
    preferences = load_preferences("owner/all", "test", agree=yes)
    assert (len(preferences), preferences.split) == (4, ALL_ROWS)
    with pytest.raises(DataError, match='no split "dev", as it has no splits'):
        load_preferences("owner/all", "dev", agree=yes, needs_split=True)


def test_errors_say_what_to_do(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"no such file or folder here; on the hub: owner/none: the hub at .* has no such"
    ):
        prompts("owner/none", "train", agree=yes)
    hub.repositories["owner/gated"] = Repository(folder, gated=True)
    with pytest.raises(DataError, match=r"agree to their terms at .*/datasets/owner/gated, log in"):
        prompts("owner/gated", "train", agree=yes)
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "load.py").write_text("x")
    hub.repositories["owner/script"] = Repository(tmp_path / "scripts")
    with pytest.raises(DataError, match=r"no parquet tables \(1 .py\).*try owner/script@refs/convert/parquet"):
        prompts("owner/script", "train", agree=yes)
    pq.write_table(pa.table({"question": ["x"], "answer": ["y"]}), tmp_path / "scripts" / "train.parquet")
    hub.repositories["owner/text"] = Repository(tmp_path / "scripts")
    with pytest.raises(DataError, match="its columns are question"):
        prompts("owner/text", "train", agree=yes)


def test_tables_of_texts_are_no_preferences_of_images(hub: HubServer, tmp_path: Path) -> None:
    write_table(tmp_path / "origin" / "train.parquet", "x", chosen="because it is so", rejected="no")
    hub.repositories["owner/answers"] = Repository(tmp_path / "origin")
    with pytest.raises(
        DataError, match='none of 4 rows can be used: row 1: "chosen" is "because it is so": no such file'
    ):
        prompts("owner/answers", "train", agree=yes)


def test_few_bad_rows_are_left_out(hub: HubServer, tmp_path: Path) -> None:
    rows = [{"prompt": "x", "images": [png(1), png(2)], "label": i % 2} for i in range(200)]
    rows[7]["label"] = None  # type: ignore[assignment]
    (tmp_path / "origin").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "origin" / "train.parquet")
    hub.repositories["owner/labels"] = Repository(tmp_path / "origin")
    with messages() as lines:
        assert len(prompts("owner/labels", "train", agree=yes)) == 199
    assert 'row 8: "label" missing' in "\n".join(lines)


def test_ids_of_known_data_sets_are_their_names(tmp_path: Path) -> None:
    folder = make_layout("pickapic", tmp_path / "pickapic")
    preferences = load_preferences("yuvalkirstain/pickapic_v2", "test", data_dir=folder)
    assert preferences == load_preferences("pickapic", "test", data_dir=folder)
    assert protocol_of("yuvalkirstain/pickapic_v2") == "pickapic"
    assert protocol_of("THUDM/ImageRewardDB") == protocol_of("zai-org/ImageRewardDB") == "imagereward"
    assert protocol_of("owner/other") == "pairs"


def test_a_folder_in_the_same_layout(folder: Path) -> None:
    assert len(prompts(str(folder), "train")) == 12
    assert prompts(str(folder), "test")[0] == "test 0"
    assert prompts("owner/pairs", "test", data_dir=folder)[0] == "test 0"
    with pytest.raises(ConfigError, match="--data is a folder itself"):
        prompts(str(folder), "test", data_dir=folder)
    shutil.rmtree(folder / "data")
    with pytest.raises(DataError, match="holds no two folders"):
        prompts(str(folder), "train")


def test_commands_offer_the_data(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    hub.repositories["owner/pairs"] = Repository(folder)
    command = ["eval", "--data", "owner/pairs", "--model", "demo", "--no-think", "--no-store", "--json"]
    done = CliRunner().invoke(main, command)
    assert (done.exit_code, done.stdout) == (1, "")
    assert "nothing was downloaded; agree with --yes" in done.stderr
    done = CliRunner().invoke(main, [*command, "--yes"])
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["pairs"] == 4
