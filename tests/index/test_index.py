"""`SetIndex`: exact search, a round trip through a folder, and folders that are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from setemb.index import SetIndex
from setemb.similarity import set_similarity


def unit_sets(n: int, k: int, d: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(n, k, d, generator=generator), dim=-1)


@pytest.fixture
def index() -> SetIndex:
    pictures = np.random.default_rng(0).integers(0, 256, (50, 6, 5, 3), dtype=np.uint8)
    meta = [{"name": f"größe {i}", "tags": ["a", i]} for i in range(50)]
    return SetIndex(unit_sets(50, 4, 16, 0), [f"item-{i}" for i in range(50)], meta, pictures, alpha=8.0)


@pytest.fixture
def folder(index: SetIndex, tmp_path: Path) -> Path:
    index.save(tmp_path / "index")
    return tmp_path / "index"


@pytest.mark.parametrize(("similarity", "k"), [("smooth_chamfer", 4), ("chamfer", 4), ("max", 3), ("cosine", 1)])
@pytest.mark.parametrize("block", [1, 7, 10_000])
def test_search_is_the_sorted_full_matrix(similarity: str, k: int, block: int) -> None:
    items, queries = unit_sets(60, k, 24, 1), unit_sets(5, k, 24, 5)
    index = SetIndex(items, [str(i) for i in range(60)], similarity=similarity, alpha=16.0)  # type: ignore[arg-type]
    full = set_similarity(queries, items, similarity, 16.0)  # type: ignore[arg-type]
    expected, rows = full.sort(1, descending=True)
    result = index.search(queries, k=10, block=block)
    torch.testing.assert_close(result.scores, expected[:, :10], atol=2e-6, rtol=0)
    assert (full.gather(1, result.rows) - result.scores).abs().max() < 2e-6  # the rows are those of the scores
    gaps = (expected[:, :10] - expected[:, 1:11]).min()
    assert gaps > 1e-5, "the case must have no near tie for the next line to be exact"
    assert torch.equal(result.rows, rows[:, :10])
    assert result.ids == [[str(row) for row in line] for line in result.rows.tolist()]


@pytest.mark.parametrize("block", [1, 2, 3, 100])
def test_ties_go_to_the_lowest_row(block: int) -> None:
    # Vectors of 0 and 1 under "max": every product is exact in any order of summation.
    axis = torch.eye(4)
    items = axis[[2, 0, 1, 0, 0, 3, 0]][:, None]
    index = SetIndex(items, list("abcdefg"), similarity="max")
    result = index.search(axis[:1][None], k=6, block=block)
    assert result.ids == [["b", "d", "e", "g", "a", "c"]]
    assert result.scores.tolist() == [[1, 1, 1, 1, 0, 0]]


def test_more_results_than_items(index: SetIndex) -> None:
    assert index.search(unit_sets(2, 4, 16, 3), k=99).scores.shape == (2, 50)


def test_sets_of_another_size_search_too(index: SetIndex) -> None:
    assert index.search(unit_sets(2, 7, 16, 3), k=3).rows.shape == (2, 3)


def file_of(folder: Path, name: str) -> Path:
    """A file of the index's only segment, or of the index itself."""
    return folder / name if name == "index.json" else next(folder.glob(f"segment-*/{name}"))


def same(found: SetIndex, expected: SetIndex) -> None:
    assert found.ids == expected.ids
    for row in range(len(expected)):
        a, b = found.item(row), expected.item(row)
        assert (a.id, a.meta) == (b.id, b.meta)
        assert torch.equal(a.vectors, b.vectors)
        assert np.array_equal(a.picture, b.picture) if b.picture is not None else a.picture is None


@pytest.mark.parametrize("verify", [True, False])
def test_round_trip(index: SetIndex, folder: Path, verify: bool) -> None:
    loaded = SetIndex.load(folder, verify=verify)
    same(loaded, index)
    assert (loaded.similarity, loaded.alpha, loaded.dtype) == ("smooth_chamfer", 8.0, "float32")
    queries = unit_sets(3, 4, 16, 5)
    assert torch.equal(loaded.search(queries).rows, index.search(queries).rows)
    assert sorted(p.name for p in folder.parent.iterdir()) == ["index"], "nothing is left beside"


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="what is mapped is read from /proc: Linux only")
def test_what_is_loaded_is_mapped_and_takes_no_memory(folder: Path) -> None:
    """Shared and read-only: a private mapping that could be written counts as memory, and is refused when large."""
    loaded = SetIndex.load(folder)
    loaded.search(unit_sets(1, 4, 16, 3))
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]
    assert {Path(line[5]).name for line in lines} >= {"vectors.npy", "offsets.npy", "items.jsonl", "pictures.npy"}
    assert {line[1] for line in lines} == {"r--s"}


def test_float16_is_kept_and_searched(tmp_path: Path) -> None:
    items = unit_sets(20, 2, 8, 6).half()
    SetIndex(items, [str(i) for i in range(20)]).save(tmp_path / "half")
    loaded = SetIndex.load(tmp_path / "half")
    assert loaded.dtype == "float16"
    assert np.load(file_of(tmp_path / "half", "vectors.npy")).dtype == np.float16
    assert loaded.search(items.float(), k=1).rows[:, 0].tolist() == list(range(20))


def test_saving_replaces_an_index_and_nothing_else(index: SetIndex, folder: Path, tmp_path: Path) -> None:
    SetIndex(unit_sets(3, 4, 16, 7), ["x", "y", "z"]).save(folder)
    assert SetIndex.load(folder).ids == ["x", "y", "z"]
    assert not list(folder.glob("*/pictures.npy"))
    assert len(list(folder.glob("segment-*"))) == 1
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="thesis exists and is not an index"):
        index.save(tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter.txt").exists()


def test_the_index_of_another_program_is_not_replaced(index: SetIndex, tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "index.json").write_text('{"pages": []}')
    (tmp_path / "file").write_text("text")
    for name in ("site", "file"):
        with pytest.raises(FileExistsError, match=f"{name} exists and is not an index"):
            index.save(tmp_path / name)
    assert (tmp_path / "site" / "index.json").read_text() == '{"pages": []}'


@pytest.mark.parametrize("name", ["vectors.npy", "items.jsonl", "offsets.npy", "pictures.npy", "index.json"])
def test_a_file_cut_short_is_refused(folder: Path, name: str) -> None:
    path = file_of(folder, name)
    data = path.read_bytes()
    for length in (0, 1, len(data) // 2, len(data) - 3):
        path.write_bytes(data[:length])
        for verify in (True, False):
            with pytest.raises(ValueError, match=f"{name} was cut short or altered"):
                SetIndex.load(folder, verify=verify)


@pytest.mark.parametrize("name", ["vectors.npy", "items.jsonl", "offsets.npy", "pictures.npy"])
def test_an_altered_file_is_refused(folder: Path, name: str) -> None:
    path = file_of(folder, name)
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    SetIndex.load(folder)  # contents are not read
    with pytest.raises(ValueError, match=f"{name} was altered: its SHA-256 is [0-9a-f]+, expected [0-9a-f]+"):
        SetIndex.load(folder, verify=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": 9.0}, "was altered: its checksum"),
        ({"version": 3}, "version 3, expected 'setemb-index' version 2"),
        ({"version": 1}, "version 1, expected 'setemb-index' version 2; build the index again"),
        ({"format": "faiss"}, "format 'faiss'"),
    ],
)
def test_an_altered_description_is_refused(folder: Path, change: dict[str, object], message: str) -> None:
    path = folder / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        SetIndex.load(folder)


def test_a_missing_file_is_named(folder: Path, tmp_path: Path) -> None:
    file_of(folder, "vectors.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"vectors\.npy is missing"):
        SetIndex.load(folder)
    shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError, match=r"index\.json is missing"):
        SetIndex.load(folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vectors": torch.zeros(3, 4)}, r"vectors must be .*\[n, K, D\] .* got float32 \[3, 4\]"),
        ({"vectors": torch.zeros(3, 1, 4, dtype=torch.int32)}, "got int32"),
        ({"vectors": torch.zeros(3, 0, 4)}, r"with K, D >= 1, got float32 \[3, 0, 4\]"),
        ({"dtype": "float8"}, "dtype must be one of float32, bfloat16, float16, int8, got 'float8'"),
        ({"alpha": 0.0}, r"alpha must be a finite number > 0, got 0\.0"),
        ({"alpha": float("nan")}, "alpha must be a finite number > 0, got nan"),
        ({"mask": torch.ones(3, 2, dtype=torch.bool)}, r"mask must be bool \[3, 1\], got bool \[3, 2\]"),
        ({"mask": torch.zeros(3, 1, dtype=torch.bool)}, "sets must hold a vector, that of 'a' has none"),
        ({"vectors": torch.full((3, 1, 4), 7e4), "dtype": "float16"}, "row 0 .id 'a'. do not fit float16"),
        ({"meta": [{}, {"x": object()}, {}]}, "meta of 'b' must be what JSON holds"),
        ({"similarity": "cosine", "vectors": torch.zeros(3, 2, 4)}, '"cosine" compares sets of one vector, got 2'),
        ({"ids": ["a", "b"]}, r"ids must have 3 entries \(one a set\), got 2"),
        ({"ids": ["a", "b", "a"]}, "ids must differ, got 'a' more than once"),
        ({"meta": [{}]}, "meta must have 3 entries"),
        ({"pictures": np.zeros((3, 5, 5), np.uint8)}, "pictures must be uint8"),
        ({"similarity": "euclid"}, "similarity must be one of"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    good: dict[str, object] = {"vectors": torch.zeros(3, 1, 4), "ids": ["a", "b", "c"]}
    with pytest.raises(ValueError, match=message):
        SetIndex(**(good | arguments))  # type: ignore[arg-type]


def test_bad_queries_are_named(index: SetIndex) -> None:
    with pytest.raises(ValueError, match=r"queries must have shape \[Q, L, 16\], got \[2, 4, 15\]"):
        index.search(torch.zeros(2, 4, 15))
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        index.search(torch.zeros(2, 4, 16), k=0)
    with pytest.raises(ValueError, match="block must be at least 1, got -1"):
        index.search(torch.zeros(2, 4, 16), block=-1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
def test_vectors_that_are_not_finite_are_refused(dtype: str) -> None:
    for value in (torch.nan, torch.inf):
        vectors = torch.zeros(3, 1, 4)
        vectors[1, 0, 2] = value
        with pytest.raises(ValueError, match=r"row 1 .id 'b'. are not"):
            SetIndex(vectors, ["a", "b", "c"], dtype=dtype)


def test_a_query_that_is_not_finite_is_named(index: SetIndex) -> None:
    queries = unit_sets(4, 4, 16, 3)
    queries[2, 1, 3] = torch.nan
    with pytest.raises(ValueError, match="queries must be finite, query 2 is not"):
        index.search(queries)
