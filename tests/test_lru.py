from mlxpref.lru import LRU


def test_least_recently_used_goes_first() -> None:
    memory: LRU[str, str] = LRU(6, len)
    for key, value in (("a", "11"), ("b", "22"), ("c", "33")):
        memory.put(key, value)
    assert memory.get("a") == "11"
    memory.put("d", "44")
    assert [memory.get(key) for key in "abcd"] == ["11", None, "33", "44"]
    memory.put("a", "1111")
    assert [memory.get(key) for key in "acd"] == ["1111", None, "44"]


def test_newest_stays_at_any_size() -> None:
    memory: LRU[int, bytes] = LRU(10, len)
    memory.put(1, bytes(4))
    memory.put(2, bytes(40))
    assert (memory.get(1), memory.get(2)) == (None, bytes(40))
