from mlxpref.text import first_ten, format_bytes


def test_numbers_of_bytes() -> None:
    counts = [0, 999, 1000, 2_500_000, 157_623_035, 31_679_865_064, 322_022_952_127]
    expected = ["0 bytes", "999 bytes", "1.0 kB", "2.5 MB", "158 MB", "31.7 GB", "322 GB"]
    assert [format_bytes(count) for count in counts] == expected


def test_long_lists() -> None:
    assert first_ten(["a", "b"], "; ") == "a; b"
    assert first_ten([str(i) for i in range(12)], " ") == "0 1 2 3 4 5 6 7 8 9 and 2 more"
    assert first_ten(["a"] * 10, " ", 11).endswith("a and 1 more")
