"""tools/prepare_data.py --executor slurm on two Slurm nodes: the bytes of the local executor."""

import json
import subprocess
import sys
import sysconfig
import threading
from pathlib import Path

from launch import REPOSITORY
from namespaces import until
from slurm import SlurmCluster
from tokenizers import ByteLevelBPETokenizer

EOD = "<|endoftext|>"


def write_corpus(folder: Path) -> None:
    """Six JSONL files of Python sources, and a tokeniser trained on them."""
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:120]
    texts = [path.read_text() for path in sources]
    (folder / "texts").mkdir()
    for index in range(6):
        lines = [json.dumps({"text": text}) + "\n" for text in texts[index::6]]
        (folder / "texts" / f"{index}.jsonl").write_text("".join(lines))
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts[:30], vocab_size=1000, special_tokens=[EOD])
    tokenizer.save(str(folder / "tokenizer.json"))


def command(folder: Path, output: Path, *options: str) -> list[str]:
    return [
        *(sys.executable, str(REPOSITORY / "tools/prepare_data.py"), "--workers", "2"),
        *("--source", str(folder / "texts"), "--tokenizer", str(folder / "tokenizer.json")),
        *("--eod-token", EOD, "--tasks", "6", "--output", str(output), *options),
    ]


def shards(output: Path) -> dict[str, bytes]:
    paths = [*output.glob("*/0*.bin"), *output.glob("*/0*.idx"), output / "manifest.json"]
    return {str(path.relative_to(output)): path.read_bytes() for path in paths}


def test_slurm_executor(slurm: SlurmCluster, tmp_path: Path):
    """A job of the array is cancelled: the command submits that one again, and ends alike."""
    write_corpus(tmp_path)
    subprocess.run(command(tmp_path, tmp_path / "local"), check=True, capture_output=True)
    output = tmp_path / "slurm"
    options = ("--executor", "slurm", "--slurm-partition", "batch", "--slurm-time", "5")
    run = command(tmp_path, output, *options)
    done: list[subprocess.CompletedProcess] = []
    thread = threading.Thread(
        target=lambda: done.append(slurm.client(*run, timeout=100, check=False))
    )
    thread.start()
    job = output / "work" / "slurm_job"
    until("the array is submitted", job.exists, timeout=30)
    slurm.scancel(f"{job.read_text().strip()}_5")  # two run at a time: it waits
    thread.join()
    assert done[0].returncode == 0, done[0].stdout + done[0].stderr
    assert "doing them again" in done[0].stderr + done[0].stdout
    assert shards(output) == shards(tmp_path / "local") and len(shards(output)) > 12
