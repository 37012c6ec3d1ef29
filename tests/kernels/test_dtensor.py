"""DTensor, which torch's tensor parallelism and FSDP2 are made of."""

from pathlib import Path

from launch import start, wait


def test_the_same_as_on_whole_tensors(tmp_path: Path) -> None:
    script = Path(__file__).with_name("dtensor_cases.py")
    log = tmp_path / "log.txt"
    codes = wait(start([], ranks=2, log=log, command=[str(script)]))
    assert codes == [0, 0], log.read_text()[-3000:]
