from mlxpref.text import counted, few, first_ten, format_bytes, format_duration, one_line, short_names


def test_numbers_of_bytes() -> None:
    counts = [0, 999, 1000, 2_500_000, 157_623_035, 31_679_865_064, 322_022_952_127]
    expected = ["0 bytes", "999 bytes", "1.0 kB", "2.5 MB", "158 MB", "31.7 GB", "322 GB"]
    assert [format_bytes(count) for count in counts] == expected


def test_long_lists() -> None:
    assert first_ten(["a", "b"], "; ") == "a; b"
    assert few("abc", 2) == "a, b, c"  # "and 1 more" would take as much room
    assert few("abcd", 2) == "a, b, and 2 more"
    assert first_ten([str(i) for i in range(12)], " ") == "0 1 2 3 4 5 6 7 8 9 and 2 more"


def test_shortest_distinct_names() -> None:
    assert short_names(["x/a/1.png", "x/b/2.png"]) == ["1.png", "2.png"]
    assert short_names(["x/a/1.png", "x/b/1.png", "x/2.png"]) == ["a/1.png", "b/1.png", "2.png"]
    assert short_names(["/x/1.png", "y/1.png"]) == ["x/1.png", "y/1.png"]
    # A whole path that another one ends with is marked, else it would name both.
    assert short_names(["1.png", "x/1.png", "y/x/1.png"]) == ["./1.png", "./x/1.png", "y/x/1.png"]
    assert short_names(["image 0", "image 1"]) == ["image 0", "image 1"]
    assert short_names([]) == []


def test_durations() -> None:
    output = [format_duration(seconds) for seconds in (0.04, 2.44, 9.96, 59.4, 59.6, 185, 3600, 7799)]
    assert output == ["0.1 s", "2.4 s", "10 s", "59 s", "1 min 00 s", "3 min 05 s", "1 h 00 min", "2 h 09 min"]


def test_one_is_singular() -> None:
    assert [counted(count, "pair") for count in (0, 1, 2)] == ["0 pairs", "1 pair", "2 pairs"]


def test_errors_are_one_line() -> None:
    assert one_line(ValueError("a\n  b")) == "ValueError: a b"
    assert one_line(KeyError()) == "KeyError"
    assert len(one_line(OSError("x" * 999))) == 300
