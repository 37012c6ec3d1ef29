"""``python -m megatron_xielu.report``: one page with pictures of one or many training runs."""
