"""The sweep over shapes of the kernels, in Triton's interpreter."""

import dataclasses
import sys

import pytest
import torch
import tune_kernels
from interpreter import like_hardware
from tune_kernels import LOOPS, Candidate

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU interprets nothing")


@pytest.mark.parametrize("bias", [False, True])
def test_every_form_of_the_loop_gives_the_same_bits(bias: bool) -> None:
    found = [
        Candidate(what, loop, block, 4, programs)
        for what in ("forward", "backward")
        for loop in LOOPS
        for block, programs in ((64, 3), (128, 2))
        if loop == "plain" or not bias
    ]
    # Ragged, and several times round the loop.
    with like_hardware():
        records = tune_kernels.measure(found, (17, 33), torch.bfloat16, bias, 2, "cpu")
    assert [{f.name: r[f.name] for f in dataclasses.fields(Candidate)} for r in records] == [
        dataclasses.asdict(c) for c in found
    ]
    assert all(r["us"] > 0 and r["of_copy"] > 0 for r in records)
    table = tune_kernels.best(records).splitlines()
    assert table[1].startswith("forward") and table[1].endswith("(shipped)")


def test_a_candidate_with_another_result_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right, wrong = Candidate("forward", "plain", 64, 4, 3), Candidate("forward", "plain", 64, 2, 3)
    call = Candidate.call

    def altered(self, *args):
        y, *rest = call(self, *args)
        return (y + 1 if self == wrong else y, *rest)

    monkeypatch.setattr(Candidate, "call", altered)
    with like_hardware():
        records = tune_kernels.measure([right, wrong], (5, 40), torch.float32, False, 2, "cpu")
    assert [r["warps"] for r in records] == [4]
    assert "not the shipped one's result" in capsys.readouterr().out


def test_candidates_begin_with_the_shipped_ones() -> None:
    for bias in (False, True):
        found = tune_kernels.candidates(bias)
        assert len(set(found)) == len(found)
        assert {c.loop for c in found} == ({"plain"} if bias else set(LOOPS))


@pytest.mark.parametrize("flags", ["--shapes 8x", "--shapes 0x1", "--rounds 0", "--rounds x"])
def test_bad_flags_of_the_sweep(
    flags: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["tune_kernels.py", *flags.split()])
    with pytest.raises(SystemExit):
        tune_kernels.main()
    assert f"error: argument {flags.split()[0]}: " in capsys.readouterr().err.splitlines()[-1]
