"""Runs `megatron_xielu.evaluate.command`."""

from megatron_xielu.evaluate.command import main

if __name__ == "__main__":
    main()
