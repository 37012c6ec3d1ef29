"""The benchmark of rows of experts: what it prints, and what it refuses to time."""

import sys
from collections.abc import Callable
from pathlib import Path

import bench_grouped
import pytest
from bench_measure import RefusedError
from torch import Tensor


def test_each_way_has_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "grouped.md"
    flags = f"--shapes 96x32 --experts 5 --rounds 2 --output {output}"
    monkeypatch.setattr(sys, "argv", ["bench_grouped.py", *flags.split()])
    assert bench_grouped.main() == 0
    printed = capsys.readouterr().out
    assert output.read_text() in printed
    table = [line for line in output.read_text().splitlines() if line.startswith("|")]
    rows = [line.strip("| ").split(" | ") for line in table[2:]]
    assert [row[:3] for row in rows] == [
        ["96x32", weights, way]
        for weights in ("no", "yes")
        for way in ("grouped", "each expert", "dense")
    ]
    for row in rows:
        assert all(float(cell) > 0 for cell in row[3::2])
        assert (row[-1] == "1.00") or row[2] != "grouped"


@pytest.mark.parametrize("has_weights", [False, True])
def test_a_wrong_result_is_not_timed(has_weights: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    right = bench_grouped.grouped.grouped_xielu

    def shifted(x: Tensor, alpha_p: Tensor, alpha_n: Tensor, *counts: Tensor, **given: Tensor):
        return right(x, alpha_p.roll(1), alpha_n, *counts, **given)

    wrong: tuple[Callable[..., Tensor], ...] = (shifted, lambda *a, **k: right(*a, **k) * 1.01)
    for function in wrong:
        monkeypatch.setattr(bench_grouped.grouped, "grouped_xielu", function)
        with pytest.raises(RefusedError, match=r"^grouped: (excess of )?(y|dx) is"):
            bench_grouped.check(16, 5, "cpu", has_weights)


def test_experts_are_uneven_and_take_all_rows() -> None:
    for rows, experts in ((49152, 64), (96, 5), (7, 1), (3, 8)):
        tokens = bench_grouped.uneven(rows, experts)
        assert len(tokens) == experts and sum(tokens) == rows and min(tokens) >= 0
    tokens = bench_grouped.uneven(49152, 64)
    assert tokens.count(0) == 2 and max(tokens) > 49152 // 5
