"""``--use-checkpoint-args`` restores everything that the model computes with."""

import sys

from launch import TINY_LLAMA, train
from megatron.training.arguments import parse_args

from megatron_xielu import arguments
from megatron_xielu.workarounds import checkpoint_arguments

# What Megatron 0.19 leaves out.
FLAGS = (
    "--qk-layernorm --norm-epsilon 1e-3 --use-rope-scaling --rope-scaling-factor 3 "
    "--rotary-seq-len-interpolation-factor 2"
)

# The training and no architecture.
TRAINING = """
    --mock-data --tokenizer-type NullTokenizer --vocab-size 127 --make-vocab-size-divisible-by 32
    --micro-batch-size 2 --global-batch-size 8 --train-iters 3
    --lr 1e-2 --lr-decay-style cosine --adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0
    --log-interval 1 --eval-iters 0 --eval-interval 1000 --save-interval 2
    --ckpt-format torch_dist --ckpt-assume-constant-structure
""".split()


def test_a_training_goes_on_with_the_same_model(tmp_path):
    flags = f"--xielu {FLAGS} --save checkpoints --train-iters 3 --save-interval 2"
    whole = train(tmp_path / "whole", flags)
    load = f"--use-checkpoint-args --load {tmp_path / 'whole' / 'checkpoints'} --ckpt-step 2"
    # The factor as the model has it: Megatron 0.19 reads the flag and does not pass it on.
    show = (
        "from megatron_xielu import pretrain_gpt as p; train = p._train\n"
        "def show(args):\n"
        "    from megatron_xielu import layer_specs; make = layer_specs.model_config\n"
        "    def model_config(args):\n"
        "        config = make(args); print('factor', config.rope_scaling_factor); return config\n"
        "    layer_specs.model_config = model_config; train(args)\n"
        "p._train = show; p.main()"
    )
    again = train(tmp_path / "again", load, model=TRAINING, command=("-c", show))
    assert again.losses == whole.losses[2:] and len(again.losses) == 1
    assert again.grad_norms == whole.grad_norms[2:]
    assert "factor 3.0" in again.output
    for line in ("qk_layernorm to True", "layernorm_epsilon to 0.001", "use_rope_scaling to True"):
        assert f"Setting {line} from checkpoint" in again.output


def test_the_checkpoint_wins_as_for_megatron(monkeypatch):
    def parse(flags: str):
        monkeypatch.setattr(sys, "argv", ["pretrain_gpt", *TINY_LLAMA, *flags.split()])
        return parse_args(extra_args_provider=arguments.add_arguments)

    saved = parse(f"{FLAGS} --quick-geglu --window-size 8,0 --softmax-type off-by-one")
    args = parse("--norm-epsilon 0.5 --rope-scaling-factor 9 --apply-layernorm-1p --lr 3")
    checkpoint_arguments.restore(args, saved)
    for name in (
        *("qk_layernorm", "layernorm_epsilon", "use_rope_scaling", "rope_scaling_factor"),
        *("rotary_seq_len_interpolation_factor", "quick_geglu", "window_size", "softmax_type"),
        "layernorm_zero_centered_gamma",  # also back to what it is by default
    ):
        assert getattr(args, name) == getattr(saved, name), name
    assert args.lr == 3

    del saved.layernorm_epsilon
    saved.norm_epsilon = 0.25  # its name in older releases
    checkpoint_arguments.restore(args, saved)
    assert args.layernorm_epsilon == 0.25
    del saved.norm_epsilon  # an import that says nothing of it
    checkpoint_arguments.restore(args, saved)
    assert args.layernorm_epsilon == 0.25
