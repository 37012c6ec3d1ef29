"""The package's training entry, where a validation's losses take a second to reach the event file.

Run by `launch` in place of ``python -m megatron_xielu.pretrain_gpt``.
"""

import time

from tensorboard.summary.writer.record_writer import RecordWriter

from megatron_xielu import pretrain_gpt


def main() -> None:
    """Train."""
    write = RecordWriter.write

    def write_late(self, data: bytes) -> None:
        if b"lm loss validation" in data:
            time.sleep(1)  # in the writer's own thread, which ends with the process
        write(self, data)

    RecordWriter.write = write_late
    pretrain_gpt.main()


if __name__ == "__main__":
    main()
