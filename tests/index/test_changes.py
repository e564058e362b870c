"""Adding, deleting, compacting and building, in every dtype, with sets of different sizes: always exact search."""

from __future__ import annotations

import errno
import json
import os
import resource
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from setemb.index import SetIndex
from setemb.index import index as index_module
from setemb.index.folder import read_description
from setemb_kernels import smooth_chamfer

DTYPES = ["float32", "bfloat16", "float16", "int8"]
D = 16


def one_set(number: int, size: int | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    size = 1 + number % 5 if size is None else size
    return torch.nn.functional.normalize(torch.randn(size, D, generator=generator), dim=-1)


def records(numbers: range, size: int | None = None) -> list[tuple[str, Tensor, dict[str, Any]]]:
    return [(f"größe/{i}", one_set(i, size), {"number": i, "tags": ["ä", None]}) for i in numbers]


def stored(x: Tensor, dtype: str) -> Tensor:
    """What is left of vectors in this dtype."""
    if dtype == "int8":
        scale = x.abs().amax(-1, keepdim=True) / 127
        return (x / scale).round() * scale
    return x.to(getattr(torch, dtype)).float()


def check(index: SetIndex, numbers: list[int], dtype: str, k: int = 7) -> None:
    """The index finds in these items what sorting all similarities finds, and knows them."""
    assert len(index) == len(numbers)
    assert index.ids == [f"größe/{i}" for i in numbers]
    queries = torch.stack([one_set(-1 - i, 3) for i in range(4)])
    result = index.search(queries, k)
    assert result.rows.shape == (4, min(k, len(numbers)))
    if not numbers:
        return
    items = [stored(one_set(i), dtype) for i in numbers]
    s = torch.cat([smooth_chamfer(queries, item[None]) for item in items], 1)
    values, _ = s.sort(dim=1, descending=True, stable=True)
    torch.testing.assert_close(result.scores, values[:, :k], atol=2e-6, rtol=0)
    torch.testing.assert_close(s.gather(1, result.rows), result.scores, atol=2e-6, rtol=0)
    assert result.ids == [[f"größe/{numbers[row]}" for row in rows] for rows in result.rows.tolist()]
    for row in {0, len(numbers) // 2, len(numbers) - 1}:
        item = index.item(row)
        assert item.meta == {"number": numbers[row], "tags": ["ä", None]}
        torch.testing.assert_close(item.vectors, items[row], atol=1e-7, rtol=0)
        assert index.get(item.id).meta == item.meta
        assert item.id in index


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_life(tmp_path: Path, dtype: str) -> None:
    """Built, added to, deleted from, compacted, by several objects, in memory and in a folder."""
    folder = tmp_path / "index"
    index = SetIndex.build(folder, iter(records(range(40))), dtype=dtype)
    numbers = list(range(40))
    check(index, numbers, dtype)
    index.add(records(range(40, 55)))
    index.add(records(range(55, 60)))
    numbers += range(40, 60)
    check(index, numbers, dtype)
    assert len(SetIndex.load(folder)) == 40, "what is not saved is in memory"
    index.delete([f"größe/{i}" for i in (3, 17, 39, 58)])
    numbers = [i for i in numbers if i not in (3, 17, 39, 58)]
    check(index, numbers, dtype)
    index.save()
    check(index, numbers, dtype)
    loaded = SetIndex.load(folder, verify=True)
    check(loaded, numbers, dtype)
    loaded.delete(["größe/0", "größe/57"])
    loaded.add(records(range(3, 4)))  # an id that was deleted
    numbers = [*(i for i in numbers if i not in (0, 57)), 3]
    check(loaded, numbers, dtype)
    loaded.save()
    check(SetIndex.load(folder, verify=True), numbers, dtype)
    before = sum(path.stat().st_size for path in folder.rglob("*.npy"))
    loaded.compact()
    check(loaded, numbers, dtype)
    check(SetIndex.load(folder, verify=True), numbers, dtype)
    assert len(list(folder.glob("segment-*"))) == 1
    assert not list(folder.glob("deleted-*"))
    assert sum(path.stat().st_size for path in folder.rglob("*.npy")) < before
    loaded.save(tmp_path / "copy")
    check(SetIndex.load(tmp_path / "copy", verify=True), numbers, dtype)
    loaded.delete(loaded.ids)
    check(loaded, [], dtype)
    loaded.save()
    check(SetIndex.load(tmp_path / "copy"), [], dtype)


@pytest.mark.parametrize("similarity", ["smooth_chamfer", "max"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_however_many_are_deleted_the_rest_is_found(dtype: str, similarity: str) -> None:
    index = SetIndex.empty(similarity, dtype=dtype)  # type: ignore[arg-type]
    index.add(records(range(300), 2))
    queries = torch.stack([one_set(-1 - i, 2) for i in range(3)])
    order = index.search(queries, 300)
    # the best of the first query go, so that many more than k have to be looked at
    gone = set(order.ids[0][:180])
    index.delete(gone)
    found = index.search(queries, 10)
    for query in range(3):
        left = [id_ for id_ in order.ids[query] if id_ not in gone]
        assert found.ids[query] == left[:10]
    index.compact()
    assert index.search(queries, 10).ids == found.ids
    assert index.search(queries, 1000).rows.shape == (3, 120)


def test_among_equals_the_lower_row_comes_first_across_segments(tmp_path: Path) -> None:
    axes = torch.eye(4)
    index = SetIndex.empty()
    for start, of in ((0, [2, 0, 1, 0]), (4, [0, 3, 0]), (7, [1, 0])):
        index.add([(str(start + i), axes[[axis]]) for i, axis in enumerate(of)])
        index.save(tmp_path / "index")
    assert len(list((tmp_path / "index").glob("segment-*"))) == 3
    index.delete(["3"])
    assert index.search(axes[:1][None], 9).ids == [["1", "4", "6", "8", "0", "2", "5", "7"]]
    for block in (1, 2):
        assert index.search(axes[:1][None], 3, block=block).ids == [["1", "4", "6"]]


def test_queries_may_have_masks() -> None:
    index = SetIndex.empty()
    index.add(records(range(30)))
    whole = torch.stack([one_set(-1, 4), one_set(-2, 4)])
    whole[0, 2:] = torch.nan
    mask = torch.tensor([[True, True, False, False], [True] * 4])
    found = index.search(whole, 5, query_mask=mask)
    assert found.ids[0] == index.search(whole[:1, :2], 5).ids[0]
    assert found.ids[1] == index.search(whole[1:], 5).ids[0]


def test_max_leaves_out_what_is_masked() -> None:
    index = SetIndex.empty("max")
    index.add([("negative", -torch.eye(4)[:1]), ("two", torch.eye(4)[1:3])])
    assert index.search(torch.eye(4)[:1][None], 2).scores.tolist() == [[0, -1]]


def test_what_was_deleted_is_written_once(tmp_path: Path) -> None:
    """A save writes what is new: not the vectors that are there, nor what was deleted before."""
    folder = tmp_path / "index"
    index = SetIndex.build(folder, records(range(100)))
    vectors = next(folder.glob("segment-*/vectors.npy"))
    inode = vectors.stat().st_ino
    index.delete(["größe/5"])
    index.save()
    (tombstones,) = folder.glob("deleted-*.npy")
    assert np.load(tombstones).tolist() == [5]
    index.add(records(range(100, 101)))
    index.save()
    assert list(folder.glob("deleted-*.npy")) == [tombstones]
    assert vectors.stat().st_ino == inode
    assert read_description(folder)["revision"] == 3


def test_an_added_item_is_refused_as_a_whole(tmp_path: Path) -> None:
    index = SetIndex.empty()
    index.add(records(range(5)))
    good = records(range(5, 8))
    for bad, error, message in (
        (("größe/1", one_set(1)), ValueError, "ids must differ, 'größe/1' is there already"),
        (("größe/6", one_set(1)), ValueError, "ids must differ, 'größe/6' is there already"),
        ((7, one_set(1)), TypeError, "ids must be strings, got 7 of int"),
        (("x", torch.zeros(2, 3)), ValueError, r"the set of 'x' must be floats \[k, 16\] with k >= 1, got float32 \[2"),
        (("x", torch.zeros(0, D)), ValueError, r"with k >= 1, got float32 \[0, 16\]"),
        (("x", [1.0]), TypeError, "the set of 'x' must be a tensor or a numpy array, got list"),
        (("x", torch.full((1, D), torch.nan)), ValueError, r"row 3 .id 'x'. are not"),
        (("x", one_set(1), {"a": {1, 2}}), ValueError, "meta of 'x' must be what JSON holds"),
        (("x", one_set(1), {"a": float("nan")}), ValueError, "meta of 'x' must be what JSON holds"),
        (("x", one_set(1), "text"), TypeError, "meta of 'x' must be a dict, got str"),
        (("x", one_set(1), None, np.zeros((2, 2, 3), np.uint8)), ValueError, "picture of 'x': expected none as of"),
        (("x",), TypeError, r"expected tuples \(id, set\[, metadata\[, picture\]\]\), got 1 entries"),
    ):
        with pytest.raises(error, match=message):
            index.add([*good, bad])  # type: ignore[list-item]
        assert len(index) == 5
    index.add(good)
    assert index.ids == [f"größe/{i}" for i in range(8)]
    with pytest.raises(ValueError, match="no item has the id 'absent'"):
        index.delete(["größe/1", "absent"])
    with pytest.raises(ValueError, match="no item has the id 'absent'"):
        index.get("absent")
    assert len(index) == 8
    with pytest.raises(ValueError, match="folder must be given"):
        index.save()
    with pytest.raises(IndexError, match="expected 0 <= row < 8, got 8"):
        index.item(8)


def test_sets_without_features_are_refused() -> None:
    index = SetIndex.empty()
    with pytest.raises(ValueError, match=r"the set of 'x' must be floats \[k, D\] with k, D >= 1, got float32 \[2, 0"):
        index.add([("x", torch.zeros(2, 0))])
    index.add([("x", torch.zeros(2, 3))])
    assert index.features == 3


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_an_item_holds_may_be_changed(tmp_path: Path, dtype: str, mapped: bool) -> None:
    """It is a copy: neither the index nor a file changes, and no map that is read-only is written to."""
    index = SetIndex.empty(dtype=dtype)
    picture = np.full((2, 2, 3), 7, np.uint8)
    index.add([("a", one_set(0, 2), {}, picture), ("b", one_set(1, 2), {}, picture)])
    if mapped:
        index.save(tmp_path / "index")
    item, before = index.item(1), index.search(one_set(1, 2)[None], 2)
    # before it is written to: of a map, that would end the process
    vectors = index._segments[0].vectors
    assert item.vectors.untyped_storage().data_ptr() != vectors.untyped_storage().data_ptr()
    kept = item.vectors.clone()
    item.vectors.mul_(-3)
    item.picture[:] = 0  # type: ignore[index]
    assert torch.equal(index.item(1).vectors, kept)
    assert np.array_equal(index.item(1).picture, picture)  # type: ignore[arg-type]
    assert torch.equal(index.search(one_set(1, 2)[None], 2).scores, before.scores)


def test_queries_may_be_of_numpy() -> None:
    index = SetIndex.empty()
    index.add(records(range(9)))
    queries, mask = torch.stack([one_set(-1, 3), one_set(-2, 3)]), torch.tensor([[True, False, True], [True] * 3])
    for given, expected in (((), ()), ((mask.numpy(),), (mask,))):
        found = index.search(queries.numpy(), 4, None, *given)
        assert found.ids == index.search(queries, 4, None, *expected).ids
    with pytest.raises(TypeError, match="queries must be a tensor or a numpy array, got list"):
        index.search(queries.tolist())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="query_mask must be a tensor or a numpy array, got list"):
        index.search(queries, query_mask=mask.tolist())  # type: ignore[arg-type]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files are counted in /proc: Linux only")
def test_many_saves_map_what_is_new_alone(tmp_path: Path) -> None:
    """Of Python before 3.13 a map keeps a file open. Where no more may be, a save changes nothing, and works later."""
    folder = tmp_path / "index"
    index = SetIndex.build(folder, records(range(3)))
    first, (soft, hard) = index._segments[0], resource.getrlimit(resource.RLIMIT_NOFILE)

    def opened() -> set[int]:
        return {int(fd) for fd in os.listdir("/proc/self/fd")}

    start = opened()
    most = next(n for n in range(50, soft) if n - sum(fd < n for fd in start) == 50)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    saved, failed = 3, 0
    try:
        for i in range(3, 33):
            index.add(records(range(i, i + 1)))
            try:
                index.save()
            except OSError as error:
                failed = error.errno or -1
                break
            saved = i + 1
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert index._segments[0] is first
    segments = len(list(folder.glob("segment-*")))
    assert failed == (errno.EMFILE if sys.version_info < (3, 13) else 0)
    if failed:
        assert segments >= 14, "at 3 files each, none of them open twice, 50 are enough"
        check(SetIndex.load(folder, verify=True), list(range(saved)), "float32")
    index.save()
    check(SetIndex.load(folder, verify=True), list(range(len(index))), "float32")
    check(index, list(range(len(index))), "float32")
    assert len(index) == saved + bool(failed)
    assert not list(folder.glob("new-*"))


def test_a_save_that_cannot_map_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any, **more: Any) -> None:
        raise OSError("no more maps")

    index = SetIndex.build(tmp_path / "index", records(range(3)))
    before = sorted(path.name for path in (tmp_path / "index").iterdir())
    for change in (index.save, index.compact):
        index.add(records(range(len(index), len(index) + 1)))
        monkeypatch.setattr(index_module, "read_segments", broken)
        with pytest.raises(OSError, match="no more maps"):
            change()
        monkeypatch.undo()
        assert sorted(path.name for path in (tmp_path / "index").iterdir()) == before
        check(SetIndex.load(tmp_path / "index", verify=True), [0, 1, 2], "float32")
    index.save()
    check(SetIndex.load(tmp_path / "index", verify=True), [0, 1, 2, 3, 4], "float32")
    index.save()


def test_files_that_look_like_leftovers_stay(tmp_path: Path) -> None:
    folder = tmp_path / "index"
    index = SetIndex.build(folder, records(range(3)))
    for name in (".index.json.swp", ".index.json.kate-swp", ".index.json.a1b2c3d_"):
        (folder / name).write_text("")
    index.delete(["größe/1"])
    index.save()
    assert sorted(path.name for path in folder.glob(".index*")) == [".index.json.kate-swp", ".index.json.swp"]


def test_pictures_are_kept(tmp_path: Path) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (6, 4, 5, 3), dtype=np.uint8)
    items = [(str(i), one_set(i), {}, pictures[i]) for i in range(6)]
    index = SetIndex.build(tmp_path / "index", items[:4])
    index.add(items[4:])
    index.delete(["1"])
    index.compact()
    for row, number in enumerate((0, 2, 3, 4, 5)):
        assert np.array_equal(index.item(row).picture, pictures[number])  # type: ignore[arg-type]
    for picture in (pictures[0][:3], pictures[0].astype(np.float32), None):
        with pytest.raises(ValueError, match="picture of 'x': expected uint8"):
            index.add([("x", one_set(1), {}, picture)])


def test_building_holds_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Items are taken as they are written: of 4,000 never more than a few hundred are alive."""
    made: list[weakref.ref[np.ndarray]] = []
    most = 0

    def items() -> Iterator[tuple[str, np.ndarray]]:
        nonlocal most
        for i in range(4000):
            if i % 100 == 0:
                most = max(most, sum(ref() is not None for ref in (*made, *blocks)))
            vectors = np.full((4, 8), i, np.float32)
            made.append(weakref.ref(vectors))
            yield str(i), vectors

    blocks: list[weakref.ref[Any]] = []
    monkeypatch.setattr("setemb.index.intake.AT_ONCE", 256)
    real = index_module.Intake.blocks

    def watched(self: Any, given: Any) -> Iterator[Any]:
        for block in real(self, given):
            blocks.append(weakref.ref(block))
            yield block

    monkeypatch.setattr(index_module.Intake, "blocks", watched)
    index = SetIndex.build(tmp_path / "index", items())
    assert len(index) == 4000
    assert len(blocks) == 16
    assert 256 < most <= 2 * 256 + 2
    assert index.item(1234).vectors.unique().tolist() == [1234]


def test_sets_that_grow_begin_a_new_segment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("setemb.index.intake.AT_ONCE", 10)
    items = [(f"größe/{i}", one_set(i, 1 + i // 20), {"number": i}) for i in range(60)]
    index = SetIndex.build(tmp_path / "index", items)
    assert [entry["vectors"] for entry in read_description(tmp_path / "index")["segments"]] == [1, 2, 3]
    queries = torch.stack([one_set(-1, 3)])
    s = torch.cat([smooth_chamfer(queries, item[1][None]) for item in items], 1)
    assert index.search(queries, 60).rows.tolist() == s.argsort(dim=1, descending=True, stable=True).tolist()
    index.compact()
    assert index.search(queries, 60).rows.tolist() == s.argsort(dim=1, descending=True, stable=True).tolist()


def test_a_build_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    folder = tmp_path / "index"
    SetIndex.build(folder, records(range(5)))
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(ValueError, match="ids must differ"):
        SetIndex.build(folder, [*records(range(3)), *records(range(1))])
    assert sorted(path.name for path in folder.iterdir()) == before
    check(SetIndex.load(folder, verify=True), list(range(5)), "float32")


def test_an_index_of_nothing(tmp_path: Path) -> None:
    index = SetIndex.build(tmp_path / "index", [])
    assert len(SetIndex.load(tmp_path / "index", verify=True)) == 0
    assert index.search(torch.zeros(2, 1, 8)).ids == [[], []]
    index.add(records(range(3)))
    index.save()
    check(SetIndex.load(tmp_path / "index"), [0, 1, 2], "float32")
    assert index.search(torch.zeros(0, 4, D)).ids == []


def test_one_of_two_writers_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from filelock import FileLock

    folder = tmp_path / "index"
    SetIndex.build(folder, records(range(5)))
    first, second = SetIndex.load(folder), SetIndex.load(folder)
    first.delete(["größe/0"])
    first.save()
    second.add(records(range(5, 6)))
    with pytest.raises(ValueError, match="changed by another process since revision 1 was loaded: load it again"):
        second.save()
    check(SetIndex.load(folder, verify=True), [1, 2, 3, 4], "float32")
    monkeypatch.setattr("setemb.index.folder.LOCK_SECONDS", 0.2)
    with FileLock(folder / ".lock"), pytest.raises(TimeoutError, match=r"another process has been writing for 0\.2 s"):
        first.save()


def test_an_old_index_is_refused_and_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "index"
    (folder / "model").mkdir(parents=True)
    (folder / "index.json").write_text(json.dumps({"format": "setemb-index", "version": 1}))
    for name in ("vectors.npy", "items.jsonl", "notes.txt"):
        (folder / name).write_text("old")
    with pytest.raises(ValueError, match="version 1, expected 'setemb-index' version 2; build the index again"):
        SetIndex.load(folder)
    SetIndex.build(folder, records(range(3)))
    check(SetIndex.load(folder, verify=True), [0, 1, 2], "float32")
    assert sorted(path.name.split("-")[0] for path in folder.iterdir()) == [
        ".lock",
        "index.json",
        "notes.txt",
        "segment",
    ]


@pytest.mark.parametrize("name", ["mask.npy", "scale.npy", "deleted"])
def test_every_file_is_checked(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "index"
    index = SetIndex.build(folder, records(range(20)), dtype="int8")
    index.delete(["größe/7"])
    index.save()
    path = next(folder.glob("deleted-*.npy")) if name == "deleted" else next(folder.glob(f"*/{name}"))
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ValueError, match=f"{path.name} was altered"):
        SetIndex.load(folder, verify=True)
    path.write_bytes(data[:-1])
    with pytest.raises(ValueError, match=f"{path.name} was cut short or altered"):
        SetIndex.load(folder)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"{path.name} is missing"):
        SetIndex.load(folder)


def test_a_damaged_line_is_named_where_it_is_read(tmp_path: Path) -> None:
    SetIndex.build(tmp_path / "index", records(range(5)))
    (path,) = (tmp_path / "index").glob("*/items.jsonl")
    path.write_bytes(path.read_bytes().replace(b'"id"', b'"xx"'))
    with pytest.raises(ValueError, match=r"items\.jsonl was altered: line 3 is no item"):
        SetIndex.load(tmp_path / "index").item(2)


def test_the_model_stays_until_another_is_given(tmp_path: Path) -> None:
    from setemb.config import ModelConfig
    from setemb.data.vocab import Vocabulary
    from setemb.model import SetEmbedder

    def model(seed: int) -> SetEmbedder:
        torch.manual_seed(seed)
        config = ModelConfig(dim=D)
        config.image.dim_in, config.text.vocab_size = 8, 7
        return SetEmbedder(config, Vocabulary.build(["a b c"], 1)).eval()

    def kept(index: SetIndex) -> int:
        assert index.model_folder is not None and index.folder is not None
        assert len(list(index.folder.glob("model-*"))) == 1
        weight = SetEmbedder.from_pretrained(index.model_folder).image_encoder.fc.weight
        return next(seed for seed, one in models.items() if torch.equal(one.image_encoder.fc.weight, weight))

    models = {seed: model(seed) for seed in (1, 2)}
    index = SetIndex.build(tmp_path / "index", records(range(5)), model=models[1])
    assert kept(index) == kept(SetIndex.load(tmp_path / "index")) == 1
    index.delete(["größe/1"])
    index.save()
    index.compact()
    assert kept(SetIndex.load(tmp_path / "index")) == 1
    index.save(tmp_path / "copy")
    assert kept(SetIndex.load(tmp_path / "copy")) == 1
    SetIndex.load(tmp_path / "index").save(model=models[2])
    assert kept(SetIndex.load(tmp_path / "index")) == 2
    assert kept(SetIndex.load(tmp_path / "copy")) == 1
    SetIndex.build(tmp_path / "index", records(range(5)))
    assert SetIndex.load(tmp_path / "index").model_folder is None
    assert not list((tmp_path / "index").glob("model-*"))
