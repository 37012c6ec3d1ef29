"""Tables for a terminal."""

from megatron_xielu.common.text import table


def test_a_table_is_aligned_by_what_a_terminal_shows():
    rows = [("", "loss", "n"), ("ä", "1.25", "10"), ("a\u0308中", "12.5", "3")]
    assert table(rows).split("\n") == [
        "     loss   n",
        "ä    1.25  10",
        "a\u0308中  12.5   3",
    ]
    assert table([("name", "text"), ("n", "")], left=(0, 1)) == "name  text\nn"
