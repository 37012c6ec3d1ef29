"""Runs `megatron_xielu.report.command`."""

from megatron_xielu.report.command import main

if __name__ == "__main__":
    main()
