"""`LanceIndex`: what it holds, candidates and their exact ranking, recall with and without a trained index."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("lancedb")
pytest.importorskip("PIL")

from setemb.index import SetIndex
from setemb.index.lance import LanceIndex

D = 16


def one_set(number: int, size: int | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    size = 1 + number % 4 if size is None else size
    return torch.nn.functional.normalize(torch.randn(size, D, generator=generator), dim=-1)


def records(numbers: range) -> list[tuple[str, Tensor, dict[str, Any]]]:
    """Ids that would break a condition if they were not quoted."""
    return [(f"it's/{i}", one_set(i), {"number": i, "tags": ["ä", None]}) for i in numbers]


@pytest.fixture(scope="module")
def object_storage() -> Iterator[dict[str, str]]:
    """Options for an S3 server on the loopback interface that has the bucket ``sets``."""
    pytest.importorskip("flask")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        options = {
            "aws_endpoint": f"http://{host}:{port}",
            "aws_access_key_id": "somebody",
            "aws_secret_access_key": "secret",
            "aws_region": "us-east-1",
        }
        keys = {key: value for key, value in options.items() if key not in ("aws_endpoint", "aws_region")}
        client = pytest.importorskip("boto3").client("s3", endpoint_url=options["aws_endpoint"], **keys)
        client.create_bucket(Bucket="sets")
        yield {**options, "allow_http": "true"}
    finally:
        server.stop()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("similarity", ["smooth_chamfer", "max"])
def test_it_is_the_same_index(tmp_path: Path, similarity: Any, dtype: str) -> None:
    check_it_is_the_same_index(tmp_path / "db", similarity, dtype)


def test_it_is_the_same_index_on_object_storage(object_storage: dict[str, str]) -> None:
    check_it_is_the_same_index("s3://sets/db", "smooth_chamfer", "float32", object_storage)


def check_it_is_the_same_index(
    uri: str | Path, similarity: Any, dtype: str, storage_options: dict[str, str] | None = None
) -> None:
    """With all items as candidates, and without candidates, it finds what `SetIndex` finds."""
    mine = SetIndex.empty(similarity, 9.0, dtype=dtype)
    where: dict[str, Any] = {"storage_options": storage_options}
    index = LanceIndex.build(uri, iter(records(range(80))), similarity=similarity, alpha=9.0, dtype=dtype, **where)
    mine.add(records(range(80)))
    for change in (
        lambda it: None,
        lambda it: it.add(records(range(80, 95))),
        lambda it: it.delete([f"it's/{i}" for i in (3, 50, 94)]),
        lambda it: it.add(records(range(3, 4))),
        lambda it: it.compact(),
    ):
        change(mine)
        change(index)
        again = LanceIndex.open(uri, **where)
        assert (again.similarity, again.alpha, again.dtype, len(again)) == (similarity, 9.0, dtype, len(mine))
        queries = torch.stack([one_set(-1 - i, 3) for i in range(5)])
        expected = mine.search(queries, 7)
        for found in (again.search(queries, 7, candidates=200), again.search(queries, 7, exact=True)):
            torch.testing.assert_close(found.scores, expected.scores, atol=2e-6, rtol=0)
            assert found.ids == expected.ids
        item, own = again.get("it's/41"), mine.get("it's/41")
        assert (item.id, item.meta) == (own.id, own.meta)
        torch.testing.assert_close(item.vectors, own.vectors, rtol=0, atol=0)
    assert "it's/41" in index
    assert "it's/50" not in index
    assert index.search(torch.stack([one_set(41, 2)]), 1000, candidates=1000).rows.shape == (1, len(mine))
    assert index.search(torch.zeros(0, 2, D)).ids == []


def test_ties_go_to_the_lowest_row(tmp_path: Path) -> None:
    axes = torch.eye(D)
    index = LanceIndex.build(tmp_path / "db", [(str(i), axes[[axis]]) for i, axis in enumerate([2, 0, 1, 0, 0, 3])])
    for exact in (False, True):
        assert index.search(axes[:1][None], 5, exact=exact).ids == [["1", "3", "4", "0", "2"]]


def test_exact_search_keeps_the_names_of_the_best_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 100_000
    items = [(f"{i:0{size}}", one_set(i)) for i in range(200)]
    index, queries = LanceIndex.build(tmp_path / "db", items), torch.stack([one_set(-1, 3)])
    monkeypatch.setattr("setemb.index.lance._AT_ONCE", 10)
    index.search(queries, 5, exact=True)
    tracemalloc.start()
    try:
        found = index.search(queries, 5, exact=True)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    mine = SetIndex.empty()
    mine.add(items)
    assert found.ids == mine.search(queries, 5).ids
    assert most < 30 * size, "5 names of 200, and a few while they are chosen"


def test_pictures_are_kept(tmp_path: Path) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (4, 6, 5, 3), dtype=np.uint8)
    items = [(str(i), one_set(i), {}, pictures[i]) for i in range(4)]
    index = LanceIndex.build(tmp_path / "db", items[:3])
    index.add(items[3:])
    for i in range(4):
        assert np.array_equal(index.get(str(i)).picture, pictures[i])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected a picture for each"):
        index.add([("x", one_set(1))])


def test_a_build_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("setemb.index.intake.AT_ONCE", 4)
    LanceIndex.build(tmp_path / "db", records(range(5)))
    with pytest.raises(ValueError, match=r"^ids must differ, \"it's/1\" is there already$"):
        LanceIndex.build(tmp_path / "db", [*records(range(10)), *records(range(1, 2))])
    assert len(LanceIndex.open(tmp_path / "db")) == 5
    assert len(LanceIndex.build(tmp_path / "db", records(range(10)))) == 10


def test_a_query_of_few_candidates_does_not_shorten_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = LanceIndex.build(tmp_path / "db", records(range(30)))
    queries = torch.stack([one_set(-1 - i, 3) for i in range(3)])
    whole = index.search(queries, 5)
    real = LanceIndex._of_candidates

    def few(self: Any, query: Tensor, k: int, *others: Any) -> Any:
        return real(self, query, 2 if torch.equal(query[0], queries[1]) else k, *others)

    monkeypatch.setattr(LanceIndex, "_of_candidates", few)
    found = index.search(queries, 5)
    assert found.ids == [whole.ids[0], whole.ids[1][:2], whole.ids[2]]
    assert found.rows[1].tolist() == [*whole.rows[1, :2].tolist(), -1, -1, -1]
    assert found.scores[1, 2:].isneginf().all()
    assert torch.equal(found.scores[::2], whole.scores[::2])


def clustered(n: int) -> Tensor:
    """Sets that have neighbours, as embeddings have: noise around some hundred centres."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(200, 4, D, generator=generator)
    around = centres[torch.randint(200, (n,), generator=generator)] + 0.5 * torch.randn(n, 4, D, generator=generator)
    return torch.nn.functional.normalize(around, dim=-1)


def test_recall_of_candidates(tmp_path: Path) -> None:
    """Candidates by MaxSim hold what smooth-Chamfer finds; a trained index loses some, and more of few candidates."""
    sets = clustered(3100)
    queries = sets[3000:]
    index = LanceIndex.build(tmp_path / "db", [(str(i), one) for i, one in enumerate(sets[:3000])])
    flat = index.recall(queries, 10, candidates=100)
    assert flat >= 0.99
    index.train(num_partitions=8, num_sub_vectors=8)
    trained = index.recall(queries, 10, candidates=200, nprobes=8)
    few = index.recall(queries, 10, candidates=10, nprobes=1)
    print(f"recall@10: flat {flat:.4f}, trained {trained:.4f}, trained with 10 candidates of one partition {few:.4f}")
    assert trained >= 0.95
    assert few < trained
    assert index.search(queries[:1], 10).scores.diff().max() <= 0, "ranked by the exact similarity"


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    index = LanceIndex.build(tmp_path / "db", records(range(5)))
    bad: list[tuple[Any, str]] = [
        (lambda: LanceIndex.open(tmp_path / "db", table="absent"), "no table 'absent' in"),
        (lambda: LanceIndex.build(tmp_path / "x", []), "items: expected at least one, got none"),
        (lambda: LanceIndex.build(tmp_path / "x", records(range(2)), dtype="int8"), "dtype must be one of float32"),
        (lambda: LanceIndex.build(tmp_path / "x", records(range(2)), alpha=0), "alpha must be a finite number > 0"),
        (lambda: LanceIndex.build(tmp_path / "x", [("a", one_set(1))] * 2), "ids must differ, 'a' is there already"),
        (lambda: index.add(records(range(4, 6))), 'ids must differ, "it\'s/4" is there already'),
        (lambda: index.delete(["it's/1", "absent"]), "no item has the id 'absent'"),
        (lambda: index.get("absent"), "no item has the id 'absent'"),
        (lambda: index.search(torch.full((1, 2, D), torch.nan)), "queries must be finite, query 0 is not"),
        (lambda: index.search(torch.zeros(1, 2, D - 1)), r"queries must have shape \[Q, L, 16\]"),
        (lambda: index.search(torch.zeros(1, 2, D), 0), "expected 1 <= k <= candidates, got 0"),
        (lambda: index.search(torch.zeros(1, 2, D), 9, candidates=8), "expected 1 <= k <= candidates, got 9 and 8"),
    ]
    for call, message in bad:
        with pytest.raises(ValueError, match=message):
            call()
    assert len(index) == 5

    import lancedb

    lancedb.connect(tmp_path / "db").create_table("other", [{"vector": [1.0, 2.0]}])
    with pytest.raises(ValueError, match="has format None, expected 'setemb-lance-1'"):
        LanceIndex.open(tmp_path / "db", table="other")
