"""The cache: the same input, the same part; complete or not there."""

import io
import json
from pathlib import Path

import pytest
from dev.cluster.parts import MANIFEST, Cache, Part, content_hash, fault
from dev.cluster.progress import Progress, clock


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(Progress(io.StringIO()), tmp_path / "cache")


def write_data(work: Path) -> None:
    (work / "data").write_text("abc")


def test_hash_depends_on_content_and_name_not_on_place(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "f").write_text("x")
    same = content_hash(["v1", tmp_path / "a/f"])
    assert content_hash(["v1", tmp_path / "b/f"]) == same
    (tmp_path / "b/f").write_text("y")
    assert content_hash(["v1", tmp_path / "b/f"]) != same
    assert content_hash(["v2", tmp_path / "a/f"]) != same


def test_hash_keeps_inputs_apart() -> None:
    assert content_hash(["ab", "c"]) != content_hash(["a", "bc"])


def test_built_once(cache: Cache) -> None:
    built = []

    def build(work: Path) -> None:
        built.append(work)
        write_data(work)

    part = Part("thing", ("1",), build)
    assert cache.get(part) == cache.get(part)
    assert len(built) == 1
    assert cache.has(part)


def test_failed_build_leaves_no_part_and_the_next_one_starts_clean(cache: Cache) -> None:
    def fail(work: Path) -> None:
        (work / "half").write_text("x")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        cache.get(Part("thing", ("1",), fail))
    part = Part("thing", ("1",), write_data)
    assert not cache.has(part)
    assert sorted(p.name for p in cache.get(part).iterdir()) == [MANIFEST, "data"]


@pytest.mark.parametrize("damage", ["file gone", "file cut", "manifest gone", "manifest garbage"])
def test_broken_part_is_made_again(cache: Cache, damage: str) -> None:
    part = Part("thing", ("1",), write_data)
    path = cache.get(part)
    if damage == "file gone":
        (path / "data").unlink()
    elif damage == "file cut":
        (path / "data").write_text("a")
    elif damage == "manifest gone":
        (path / MANIFEST).unlink()
    else:
        (path / MANIFEST).write_text("{")
    assert fault(path)
    assert (cache.get(part) / "data").read_text() == "abc"
    assert fault(path) is None


def test_manifest_lists_what_is_in_folders(cache: Cache) -> None:
    def build(work: Path) -> None:
        (work / "sub").mkdir()
        write_data(work / "sub")

    manifest = json.loads((cache.get(Part("thing", (), build)) / MANIFEST).read_text())
    assert manifest["files"] == {"sub/data": 3}


def test_prune_removes_only_old_other_versions(cache: Cache) -> None:
    old, new = Part("thing", ("1",), write_data), Part("thing", ("2",), write_data)
    cache.get(old)
    cache.get(new)
    assert cache.prune([new]) == []
    assert cache.prune([new], older_than_days=-1) == [old.key]
    assert cache.has(new)
    assert not cache.has(old)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (9.96, "10.0 s"), (45.4, "45 s"), (99, "99 s"), (185, "3 min 05 s")]
)
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_progress_keeps_timings() -> None:
    out = io.StringIO()
    progress = Progress(out)
    with progress.step("cook", expected=30):
        pass
    progress.timings.append(("serve", 12.0))
    assert "cook (usually 30 s)" in out.getvalue()
    assert "12 s  serve" in progress.summary()
