"""``python -m megatron_xielu.convert``: see `megatron_xielu.convert.cli`."""

from megatron_xielu.convert.cli import main

if __name__ == "__main__":
    main()
