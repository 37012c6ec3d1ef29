"""``python -m megatron_xielu.plan``: what a Megatron command trains, holds, writes and costs."""
