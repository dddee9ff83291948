from mlxpref.text import first_ten, format_bytes, format_duration, one_line


def test_numbers_of_bytes() -> None:
    counts = [0, 999, 1000, 2_500_000, 157_623_035, 31_679_865_064, 322_022_952_127]
    expected = ["0 bytes", "999 bytes", "1.0 kB", "2.5 MB", "158 MB", "31.7 GB", "322 GB"]
    assert [format_bytes(count) for count in counts] == expected


def test_long_lists() -> None:
    assert first_ten(["a", "b"], "; ") == "a; b"
    assert first_ten([str(i) for i in range(12)], " ") == "0 1 2 3 4 5 6 7 8 9 and 2 more"


def test_durations() -> None:
    output = [format_duration(seconds) for seconds in (0.04, 2.44, 9.96, 59.4, 59.6, 185, 3600, 7799)]
    assert output == ["0.0 s", "2.4 s", "10 s", "59 s", "1 min 00 s", "3 min 05 s", "1 h 00 min", "2 h 09 min"]


def test_errors_are_one_line() -> None:
    assert one_line(ValueError("a\n  b")) == "ValueError: a b"
    assert one_line(KeyError()) == "KeyError"
    assert len(one_line(OSError("x" * 999))) == 300
