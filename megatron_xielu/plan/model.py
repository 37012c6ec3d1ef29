"""The shape of a dense GPT model: parameters and FLOPs, from Megatron's arguments alone.

Dimension legend, as in Megatron: s sequence, h hidden, f ffn, L layers, V padded vocabulary;
q = heads × kv_channels, k = query groups × kv_channels.

    FLOPs per token     6·(L·(2hq + 2hk + g·hf) + hV) + 6·L·q·s    g = 3 with a gate, else 2
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass

from megatron_xielu.catalog import ACTIVATIONS, TRAINABLE, activation_of, out_of_range
from megatron_xielu.common.flags import flag_of
from megatron_xielu.plan import flags
from megatron_xielu.plan.flags import PlanError

_REQUIRED = ("num_layers", "hidden_size", "num_attention_heads", "seq_length")
_SIZES = (
    *("ffn_hidden_size", "num_query_groups", "kv_channels", "max_position_embeddings"),
    *("vocab_size", "padded_vocab_size", "make_vocab_size_divisible_by"),
    "tensor_model_parallel_size",
)


@dataclass(frozen=True)
class Model:
    """The shape of a dense GPT model."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int  # query groups: heads of keys and values
    kv_channels: int
    sequence: int
    vocabulary: int  # as the tokenizer has it
    padded_vocabulary: int
    activation: str  # of `catalog.ACTIVATIONS`
    shared_alphas: bool  # one pair for all layers
    tied_embeddings: bool
    bias: bool
    qkv_bias: bool
    normalization: str  # RMSNorm or LayerNorm
    qk_layernorm: bool
    learned_positions: int  # 0 without learned position embeddings
    rope: bool

    @classmethod
    def of(cls, arguments: Namespace, *, vocab_size: int | None = None) -> Model:
        """The model of Megatron's arguments, parsed here, or by Megatron and kept in a checkpoint.

        Args:
            arguments: what it lacks, or has as None, is Megatron's default.
            vocab_size: entries of the tokenizer, where ``arguments`` do not say.

        Raises:
            PlanError: arguments are missing, or no sizes.
        """
        given = {name: value for name, value in vars(arguments).items() if value is not None}
        args = Namespace(**{**vars(flags.parse([])), **given})
        sizes = {name: getattr(args, name) for name in (*_REQUIRED, *_SIZES)}
        problems = out_of_range(Namespace(**sizes))
        problems += [f"{flag_of(name)} is required" for name in _REQUIRED if sizes[name] is None]
        if not problems and not args.kv_channels and args.hidden_size % args.num_attention_heads:
            problems.append(
                f"--num-attention-heads {args.num_attention_heads} does not divide --hidden-size "
                f"{args.hidden_size}; give --kv-channels"
            )
        vocabulary = args.vocab_size or vocab_size or args.padded_vocab_size
        if not vocabulary:
            problems.append(
                "the size of the vocabulary is unknown; give --padded-vocab-size to Megatron, or "
                "the plan option --vocab-size with the tokenizer's"
            )
        if problems:
            raise PlanError(problems)
        activation, heads = activation_of(args), args.num_attention_heads
        ffn = args.ffn_hidden_size
        if ffn is None:  # megatron/training/arguments.py, validate_args
            h = args.hidden_size
            ffn = int(4 * h * 2 / 3 / 64) * 64 if activation == "swiglu" else 4 * h
        multiple = args.make_vocab_size_divisible_by * args.tensor_model_parallel_size
        padded = -(-vocabulary // multiple) * multiple
        positions = args.position_embedding_type
        if args.use_rotary_position_embeddings:
            positions = "rope"
        return cls(
            layers=args.num_layers,
            hidden=args.hidden_size,
            ffn=ffn,
            heads=heads,
            groups=args.num_query_groups if args.group_query_attention else heads,
            kv_channels=args.kv_channels or args.hidden_size // heads,
            sequence=args.seq_length,
            vocabulary=vocabulary,
            padded_vocabulary=args.padded_vocab_size
            or (vocabulary if args.no_pad_vocab_size else padded),
            activation=activation,
            shared_alphas=args.xielu_shared_alphas,
            tied_embeddings=not args.untie_embeddings_and_output_weights,
            bias=args.add_bias_linear,
            qkv_bias=args.add_qkv_bias or args.add_bias_linear,
            normalization=args.normalization,
            qk_layernorm=args.qk_layernorm,
            learned_positions=(args.max_position_embeddings or 0)
            if positions == "learned_absolute"
            else 0,
            rope=positions in ("rope", "yarn", "mrope"),
        )

    @property
    def gated(self) -> bool:
        """Whether fc1 makes two tensors of the ffn width."""
        return ACTIVATIONS[self.activation].gated

    @property
    def query_width(self) -> int:
        """q: width of all query heads."""
        return self.heads * self.kv_channels

    @property
    def key_width(self) -> int:
        """k: width of all key heads, and of all value heads."""
        return self.groups * self.kv_channels

    @property
    def embedding(self) -> int:
        """Parameters of one table of word embeddings."""
        return self.padded_vocabulary * self.hidden

    @property
    def layer_matrices(self) -> int:
        """Weights of the four matrices of a layer; tensor parallelism divides them."""
        attention = 2 * self.hidden * (self.query_width + self.key_width)
        return attention + (3 if self.gated else 2) * self.hidden * self.ffn

    @property
    def layer_split(self) -> int:
        """Parameters of a layer that tensor parallelism divides: matrices and their biases."""
        biases = (self.query_width + 2 * self.key_width) * self.qkv_bias
        return self.layer_matrices + biases + (2 if self.gated else 1) * self.ffn * self.bias

    @property
    def layer_replicated(self) -> int:
        """Parameters of a layer that every tensor-parallel rank holds whole.

        Norms, the biases of the output projection and of fc2, and the two alphas of its own.
        """
        norms = (2 * self.hidden + 2 * self.kv_channels * self.qk_layernorm) * self.norm_size
        return norms + 2 * self.hidden * self.bias + self.alphas * (not self.shared_alphas)

    @property
    def alphas(self) -> int:
        """Of a layer, or of all that share them; frozen ones are parameters too."""
        return 2 if self.activation in TRAINABLE else 0

    @property
    def norm_size(self) -> int:
        """Tensors of a norm: RMSNorm has no bias."""
        return 1 if self.normalization == "RMSNorm" else 2

    def parameters(self, *, embeddings: bool = True) -> int:
        """All parameters, or those without word and position embeddings."""
        layers = self.layers * (self.layer_split + self.layer_replicated)
        layers += self.alphas * self.shared_alphas
        final_norm = self.norm_size * self.hidden
        tables = self.embedding * (1 if self.tied_embeddings else 2)
        positions = self.learned_positions * self.hidden
        return layers + final_norm + (tables + positions if embeddings else 0)

    def flops_per_token(self) -> int:
        """Floating-point operations of training on one token, forward and backward.

        6 per weight of a matrix, the output layer among them, and 6·L·q·s of attention: 12·L·q·s,
        of which a causal mask leaves half. The sum is `num_floating_point_operations` of Megatron
        0.19 (megatron/training/training.py); recomputation is not counted there either.
        """
        matrices = self.layers * self.layer_matrices + self.embedding
        return 6 * matrices + 6 * self.layers * self.query_width * self.sequence
