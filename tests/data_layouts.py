"""Writes tiny data sets of rendered pictures in the layouts of the public ones.

Names of files and members, columns and keys are those of the hub (ImageRewardDB, HPDv2, Pick-a-Pic v1 and v2, HPDv3,
MMRB2, GenAI-Bench), of ImageReward's list on GitHub, and of the list that MMRB2's script writes; what is judged are the
demo's coloured shapes.
"""

import gzip
import io
import json
import tarfile
import uuid
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mlxpref.demo.briefs import TAUGHT, Brief, Requirement, prompt_text
from mlxpref.demo.pictures import COLOURS, PictureSpec, render

__all__ = ["DAMAGES", "LAYOUTS", "damage_member", "make_layout", "write_split", "write_tar", "write_zip"]

Random = np.random.Generator
_SPLIT_STREAMS = {"train": 1, "validation": 2, "test": 3, "validation_unique": 4, "test_unique": 5}
BRIEFS: tuple[Brief, ...] = tuple(
    (first, Requirement("square", "circle"), last)
    for first in TAUGHT
    for last in TAUGHT
    if first.shape == "circle" and last.shape == "cross" and not first.is_like and not last.is_like
)


def make_layout(name: str, folder: Path, prompts: int = 4, seed: int = 0) -> Path:
    """Write a data set of a layout into a folder, every split of it with so many prompts, and return the folder.

    `name` is one of LAYOUTS; `imagereward-list` is ImageReward's list on GitHub with its images beside it, `mmrb2-list`
    that of MMRB2's script. The same arguments make the same bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    LAYOUTS[name](folder, prompts, seed)
    return folder


def write_zip(path: Path, members: Mapping[str, bytes]) -> Path:
    """A zip of these members, with one date for all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return path


def write_tar(path: Path, members: Mapping[str, bytes]) -> Path:
    """A tar of these members, compressed if the name ends with .gz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name, member in members.items():
            information = tarfile.TarInfo(name)
            information.size = len(member)
            archive.addfile(information, io.BytesIO(member))
    packed = gzip.compress(content.getvalue(), mtime=0) if path.suffix == ".gz" else content.getvalue()
    path.write_bytes(packed)
    return path


DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "html": lambda content: b"<!DOCTYPE html><html><body>404: not found</body></html>",
    "noise": lambda content: b"\x01\x02\x03" * 50,
    "gone": lambda content: None,
}
"""What public data sets have in the place of an image."""


def damage_member(path: Path, kind: str, number: int = 0) -> str:
    """Damage one image of a zip by a kind of DAMAGES, and return its name."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = [name for name in members if name.endswith(".webp")][number]
    content = DAMAGES[kind](members.pop(name))
    write_zip(path, members if content is None else {**members, name: content})
    return f"{path}/{name}"


def write_split(path: Path, parts: int) -> list[Path]:
    """Cut a file into parts named like it with .00, .01 and so on, as `split -d` does, and remove it."""
    content = path.read_bytes()
    size = -(-len(content) // parts)
    cut = [path.with_name(f"{path.name}.{i:02d}") for i in range(parts)]
    for i, part in enumerate(cut):
        part.write_bytes(content[i * size : (i + 1) * size])
    path.unlink()
    return cut


def _rng(seed: int, split: str) -> Random:
    return np.random.default_rng([seed, _SPLIT_STREAMS[split]])


def _prompts(rng: Random, count: int) -> list[Brief]:
    """Briefs, all of them before any comes again."""
    order = rng.permutation(len(BRIEFS))
    return [BRIEFS[order[i % len(order)]] for i in range(count)]


def _looks(brief: Brief) -> list[PictureSpec]:
    """Looks for a brief, best first: as asked and clean, as asked and spoiled, with one mistake, and all wrong."""
    circle, cross = brief[0].wanted, brief[2].wanted
    other = next(colour for colour in COLOURS if colour not in (circle, cross))
    return [
        PictureSpec(circle, circle, other, cross, "clean"),
        PictureSpec(circle, circle, other, cross, "noisy"),
        PictureSpec(circle, other, circle, cross, "clean"),
        PictureSpec(other, circle, cross, circle if circle != cross else other, "blurry"),
    ]


def _picture(look: PictureSpec, rng: Random, kind: str) -> bytes:
    content = io.BytesIO()
    render(look, rng).save(content, kind)
    return content.getvalue()


def _name(rng: Random) -> str:
    return str(uuid.UUID(bytes=rng.bytes(16), version=4))


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def _imagereward(folder: Path, prompts: int, seed: int) -> None:
    """metadata-<split>.parquet, and images/<split>/<split>_<n>.zip with a list of their own."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for split in ("train", "validation", "test"):
        rng, rows = _rng(seed, split), []
        archives: dict[str, dict[str, bytes]] = {}
        for number, prompt in enumerate(_prompts(rng, prompts)):
            part = f"{split}_{1 + number * 2 // prompts}"
            ranks = [int(rank) for rank in rng.permutation([1, 2, 2, 3])]
            for rank in ranks:
                member = f"{part}/{_name(rng)}.webp"
                archives.setdefault(part, {})[member] = _picture(_looks(prompt)[rank - 1], rng, "WEBP")
                rating = {1: 7, 2: 4, 3: 2}[rank]
                rows.append(
                    {
                        "image_path": f"images/{split}/{member}",
                        "prompt_id": f"{number:06d}-{seed:04d}",
                        "prompt": prompt_text(prompt),
                        "classification": "Abstract & Conceptual Items",
                        "image_amount_in_total": len(ranks),
                        "rank": rank,
                        "overall_rating": rating,
                        "image_text_alignment_rating": rating,
                        "fidelity_rating": rating,
                    }
                )
        for part, members in archives.items():
            own = [row for row in rows if f"/{part}/" in str(row["image_path"])]
            write_zip(folder / "images" / split / f"{part}.zip", {**members, f"{part}/{part}.json": _json(own)})
        pq.write_table(pa.Table.from_pylist(rows), folder / f"metadata-{split}.parquet")


def _imagereward_list(folder: Path, prompts: int, seed: int) -> None:
    """The list as on GitHub: test.json, and the images that it names."""
    rng, rows = _rng(seed, "test"), []
    for number, prompt in enumerate(_prompts(rng, prompts)):
        ranking = [int(rank) for rank in rng.permutation([1, 2, 2, 3])]
        paths = [f"part-{number:06d}/images/0001/{_name(rng)}.webp" for _ in ranking]
        for path, rank in zip(paths, ranking, strict=True):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(_picture(_looks(prompt)[rank - 1], rng, "WEBP"))
        rows.append(
            {"id": f"{number:06d}-0001", "prompt": prompt_text(prompt), "generations": paths, "ranking": ranking}
        )
    (folder / "test.json").write_bytes(_json(rows))


def _hpdv2(folder: Path, prompts: int, seed: int) -> None:
    """train.json of pairs, test.json of rankings by ten people, and the images of each in a tar.gz."""
    rng, number = _rng(seed, "train"), 0
    rows: list[dict[str, Any]] = []
    members: dict[str, bytes] = {}
    for prompt in _prompts(rng, prompts):
        names = [f"{number + i:08d}.jpg" for i in range(4)]
        number += 4
        members |= {f"train/{n}": _picture(look, rng, "JPEG") for n, look in zip(names, _looks(prompt), strict=True)}
        for i, j in ((0, 1), (1, 2), (2, 3), (0, 3)):
            pair, preference = ([names[i], names[j]], [1, 0]) if rng.random() < 0.5 else ([names[j], names[i]], [0, 1])
            rows.append({"prompt": prompt_text(prompt), "file_path": pair, "human_preference": preference})
    (folder / "train.json").write_bytes(_json(rows))
    write_tar(folder / "train.tar.gz", members)
    rng, rows, members = _rng(seed, "test"), [], {}
    for number, prompt in enumerate(_prompts(rng, prompts)):
        order = rng.permutation(4)
        names = [f"{4 * number + i:05d}.jpg" for i in range(4)]
        members |= {f"test/{n}": _picture(_looks(prompt)[i], rng, "JPEG") for n, i in zip(names, order, strict=True)}
        raters = [_unsure(order, rng) for _ in range(10)]
        rows.append(
            {
                "prompt": prompt_text(prompt),
                "image_path": names,
                "rank": [int(i) + 1 for i in order],
                "raw_annotations": [{"rank": r, "user_hash": f"rater{i:02d}"} for i, r in enumerate(raters)],
            }
        )
    (folder / "test.json").write_bytes(_json(rows))
    write_tar(folder / "test.tar.gz", members)


def _unsure(order: Iterable[int], rng: Random) -> list[int]:
    """The ranks one person gives, near the true ones."""
    felt = np.asarray(list(order)) + rng.normal(0, 0.6, 4)
    return [int(rank) + 1 for rank in felt.argsort().argsort()]


def _pickapic(folder: Path, prompts: int, seed: int) -> None:
    """Shards of each split, the JPEGs inside; in every second row the better image comes first.

    Every fifth row is a tie; outside train every fourth has no label.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    (folder / "data").mkdir(exist_ok=True)
    for split in _SPLIT_STREAMS:
        rng, rows = _rng(seed, split), []
        for number, prompt in enumerate(_prompts(rng, 2 * prompts)):
            looks = _looks(prompt)
            i, j = sorted((int(k) for k in rng.permutation(4)[:2]), reverse=number % 2 > 0)
            label = 0.5 if number % 5 == 4 else float(i < j)
            has_label = split == "train" or number % 4 != 3
            uids = [_name(rng), _name(rng)]
            rows.append(
                {
                    "are_different": True,
                    "best_image_uid": "tie" if label == 0.5 else uids[int(label < 0.5)],
                    "caption": prompt_text(prompt),
                    "created_at": "2023-01-01T00:00:00",
                    "has_label": has_label,
                    "image_0_uid": uids[0],
                    "image_1_uid": uids[1],
                    "image_0_url": "https://example.invalid/0.jpg",
                    "image_1_url": "https://example.invalid/1.jpg",
                    "jpg_0": _picture(looks[i], rng, "JPEG"),
                    "jpg_1": _picture(looks[j], rng, "JPEG"),
                    "label_0": label,
                    "label_1": 1 - label,
                    "model_0": "a/model",
                    "model_1": "a/model",
                    "ranking_id": number // 2,
                    "user_id": int(rng.integers(100)),
                    "num_example_per_prompt": 2,
                }
            )
        shards = 2 if split == "train" else 1
        size = -(-len(rows) // shards)
        for shard in range(shards):
            table = pa.Table.from_pylist(rows[shard * size : (shard + 1) * size])
            name = f"{split}-{shard:05d}-of-{shards:05d}-{rng.bytes(8).hex()}.parquet"
            pq.write_table(table, folder / "data" / name, row_group_size=3)


def _hpdv3(folder: Path, prompts: int, seed: int) -> None:
    """train.json, test.json, and one tar.gz of all images, cut into parts; path1 is always the preferred one."""
    members: dict[str, bytes] = {}
    for split in ("train", "test"):
        rng, rows = _rng(seed, split), []
        for prompt in _prompts(rng, prompts):
            names = [f"images/{_name(rng)}.jpg" for _ in range(4)]
            members |= {n: _picture(look, rng, "JPEG") for n, look in zip(names, _looks(prompt), strict=True)}
            for i, j in ((0, 1), (1, 2), (2, 3)):
                row: dict[str, Any] = {"prompt": prompt_text(prompt), "path1": names[i], "path2": names[j]}
                votes = int(rng.integers(5, 10))
                if split == "train":  # the test has no votes, and what was taken over from elsewhere has null
                    known = i > 0
                    row["confidence"] = round(votes / 9, 3) if known else None
                    row["choice_dist"] = [votes, 9 - votes] if known else None
                rows.append({**row, "model1": "flux", "model2": "kolors"})
        (folder / f"{split}.json").write_bytes(_json(rows))
    write_split(write_tar(folder / "images.tar.gz", members), 3)


def _mmrb2_rows(prompts: int, seed: int) -> Iterator[tuple[dict[str, Any], bytes, bytes]]:
    """Pairs of every prompt, without images, and both images; A has the better look in about half of them."""
    rng = _rng(seed, "test")
    for number, prompt in enumerate(_prompts(rng, prompts)):
        for i, j in ((0, 2), (3, 1)):
            votes = [int(vote) for vote in rng.integers(4, 7, 3)]
            a_is_better = i < j
            row = {
                "pair_id": f"demo_{number:03d}_{i}{j}",
                "prompt_text": prompt_text(prompt),
                "chosen": "A" if a_is_better else "B",
                "human_annotations": [2, *votes[1:]] if a_is_better else [7 - vote for vote in votes],
                "prompt_source": "demo",
                "prompt_metadata": {"id": number},
                "response_a_model": "model-a",
                "response_b_model": "model-b",
            }
            yield row, _picture(_looks(prompt)[i], rng, "JPEG"), _picture(_looks(prompt)[j], rng, "JPEG")


def _cell(content: bytes) -> dict[str, Any]:
    """An image as `datasets` keeps it in a table."""
    return {"bytes": content, "path": None}


def _mmrb2(folder: Path, prompts: int, seed: int) -> None:
    """The tables of t2i, and one of another task, whose prompt has an image."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    texts = ("pair_id", "prompt_text", "response_a_text", "response_b_text", "chosen", "human_annotations")
    schema = pa.schema(
        [(name, pa.string()) for name in texts]
        + [(name, images) for name in ("prompt_images", "response_a_images", "response_b_images")]
    )
    rows = []
    for row, a, b in _mmrb2_rows(prompts, seed):
        packed = {"response_a_images": [_cell(a)], "response_b_images": [_cell(b)]}
        response = {"response_a_text": "<image_1>", "response_b_text": "<image_1>"}
        votes = json.dumps(row["human_annotations"])
        rows.append({**row, **response, **packed, "prompt_images": [], "human_annotations": votes})
    other = {**rows[0], "prompt_text": "<image_1> as a photo", "prompt_images": rows[0]["response_a_images"]}
    middle = len(rows) // 2
    for name, part in (
        ("t2i/test-00000-of-00002", rows[:middle]),
        ("t2i/test-00001-of-00002", rows[middle:]),
        ("edit/test-00000-of-00001", [other]),
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist(part, schema), folder / f"{name}.parquet", row_group_size=3)


def _mmrb2_list(folder: Path, prompts: int, seed: int) -> None:
    """What the official script makes of them: t2i.json, and images beside it."""
    pairs = []
    (folder / "images").mkdir()
    for row, *contents in _mmrb2_rows(prompts, seed):
        pair = {"id": row["pair_id"], "prompt_content": [["text", row["prompt_text"]]]}
        for side, content in zip("ab", contents, strict=True):
            path = f"images/{row['pair_id']}_{side}_0.jpg"
            (folder / path).write_bytes(content)
            pair[f"response_{side}"] = {"model_name": f"model-{side}", "response_content": [["image", path]]}
        pairs.append({**pair, "chosen": row["chosen"], "human_annotations": row["human_annotations"]})
    (folder / "t2i.json").write_bytes(_json({"pairs": pairs}))


def _genai_bench(folder: Path, prompts: int, seed: int) -> None:
    """The table of test_v1, those of another split and of another task beside it; a fourth of the votes are ties."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng, rows = _rng(seed, "test"), []
    for number, prompt in enumerate(_prompts(rng, prompts)):
        tie = (1, 1, "tievote") if number % 2 else (3, 3, "bothbad_vote")
        for left, right, vote in ((0, 2, "leftvote"), (3, 1, "rightvote"), (3, 0, "rightvote"), tie):
            images = [_cell(_picture(_looks(prompt)[look], rng, "JPEG")) for look in (left, right)]
            rows.append(
                {
                    "prompt": prompt_text(prompt),
                    "left_model": "model-1",
                    "left_image": images[0],
                    "right_model": "model-2",
                    "right_image": images[1],
                    "vote_type": vote,
                }
            )
    for name, part in (
        ("image_generation/test_v1", rows),
        ("image_generation/test", rows + rows),
        ("video_generation/test_v1", rows[:1]),
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist(part), folder / f"{name}-00000-of-00001.parquet", row_group_size=3)


LAYOUTS: dict[str, Callable[[Path, int, int], None]] = {
    "imagereward": _imagereward,
    "imagereward-list": _imagereward_list,
    "hpdv2": _hpdv2,
    "pickapic": _pickapic,
    "pickapic_v1": _pickapic,
    "hpdv3": _hpdv3,
    "mmrb2": _mmrb2,
    "mmrb2-list": _mmrb2_list,
    "genai_bench": _genai_bench,
}
"""What writes each layout."""
