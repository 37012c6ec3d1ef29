"""The shape of a GPT model: parameters and FLOPs, from Megatron's arguments alone.

Dimension legend, as in Megatron: s sequence, h hidden, f ffn, L layers, V padded vocabulary;
q = heads × kv_channels, k = query groups × kv_channels.

    FLOPs per token     6·(L·(2hq + 2hk + g·hf) + hV) + 6·L·q·s    g = 3 with a gate, else 2

In a layer with experts f is that of the experts a token is sent to, and of the shared ones. A
prediction layer (multi-token prediction) is one more layer, a projection 2hh, three norms, which
Megatron counts too, and one more output layer.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass

from megatron_xielu.catalog import ACTIVATIONS, TRAINABLE, activation_of, out_of_range
from megatron_xielu.common.flags import flag_of
from megatron_xielu.plan import flags
from megatron_xielu.plan.experts import Experts
from megatron_xielu.plan.flags import PlanError

_REQUIRED = ("num_layers", "hidden_size", "num_attention_heads", "seq_length")
_SIZES = (
    *("ffn_hidden_size", "num_query_groups", "kv_channels", "max_position_embeddings"),
    *("vocab_size", "padded_vocab_size", "make_vocab_size_divisible_by"),
    "tensor_model_parallel_size",
    *("num_experts", "moe_router_topk", "moe_ffn_hidden_size", "mtp_num_layers"),
    "moe_shared_expert_intermediate_size",
)


@dataclass(frozen=True)
class Model:
    """The shape of a GPT model."""

    layers: int  # without prediction layers
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
    experts: Experts | None
    prediction_layers: int  # of multi-token prediction; of the kind of the last layer

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
            experts=Experts.of(args, ffn=ffn),
            prediction_layers=args.mtp_num_layers or 0,
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
    def attention_matrices(self) -> int:
        """Weights of a layer's attention."""
        return 2 * self.hidden * (self.query_width + self.key_width)

    def mlp_matrices(self, ffn: int) -> int:
        """Weights of an MLP of this width."""
        return (3 if self.gated else 2) * self.hidden * ffn

    def mlp_split(self, ffn: int) -> int:
        """Parameters of an MLP that tensor parallelism divides: matrices and the bias of fc1."""
        return self.mlp_matrices(ffn) + (2 if self.gated else 1) * ffn * self.bias

    @property
    def attention_split(self) -> int:
        """Parameters of attention that tensor parallelism divides."""
        biases = (self.query_width + 2 * self.key_width) * self.qkv_bias
        return self.attention_matrices + biases

    @property
    def layer_split(self) -> int:
        """Parameters of a dense layer that tensor parallelism divides: matrices, their biases."""
        return self.attention_split + self.mlp_split(self.ffn)

    @property
    def layer_replicated(self) -> int:
        """Parameters of a dense layer that every tensor-parallel rank holds whole.

        Norms, the biases of the output projection and of fc2, and the two alphas of its own.
        """
        norms = (2 * self.hidden + 2 * self.kv_channels * self.qk_layernorm) * self.norm_size
        return norms + 2 * self.hidden * self.bias + self.alphas * (not self.shared_alphas)

    # A layer with experts: each is an MLP of its own, so are the shared ones together, with alphas.

    @property
    def moe_split(self) -> int:
        """As `layer_split`, of a layer with experts, without the routed ones."""
        shared = self.experts.shared_ffn if self.experts else 0
        return self.attention_split + self.mlp_split(shared)

    @property
    def moe_replicated(self) -> int:
        """As `layer_replicated`, of a layer with experts: the router in the place of fc2's bias."""
        e = self.experts
        if not e:
            return 0
        own = self.alphas * (not self.shared_alphas)
        without = self.layer_replicated - self.hidden * self.bias - own
        router = e.count * (self.hidden + e.bias)
        return without + router + self.hidden * e.shared_gate + self.alphas * (e.shared_ffn > 0)

    @property
    def expert_split(self) -> int:
        """Parameters of a routed expert that expert tensor parallelism divides."""
        return self.mlp_split(self.experts.ffn) if self.experts else 0

    @property
    def expert_replicated(self) -> int:
        """Parameters of a routed expert that every expert-tensor-parallel rank holds."""
        return self.hidden * self.bias + self.alphas if self.experts else 0

    def moe_layers(self, first: int, end: int) -> int:
        """How many of these layers have experts."""
        return self.experts.layers(first, end) if self.experts else 0

    @property
    def prediction_moe_layers(self) -> int:
        """How many prediction layers have experts: all, or none."""
        return self.prediction_layers * self.moe_layers(self.layers - 1, self.layers)

    @property
    def prediction_split(self) -> int:
        """Parameters of a prediction layer, beside the layer in it, that are divided."""
        return 2 * self.hidden * self.hidden

    @property
    def prediction_replicated(self) -> int:
        """And that are not: the norms of both inputs and of its output."""
        return 3 * self.norm_size * self.hidden

    @property
    def alphas(self) -> int:
        """Of a layer, or of all that share them; frozen ones are parameters too."""
        return 2 if self.activation in TRAINABLE else 0

    @property
    def norm_size(self) -> int:
        """Tensors of a norm: RMSNorm has no bias."""
        return 1 if self.normalization == "RMSNorm" else 2

    @property
    def _kinds(self) -> tuple[int, int]:
        """(dense layers, layers with experts), prediction layers among them."""
        moe = self.moe_layers(0, self.layers) + self.prediction_moe_layers
        return self.layers + self.prediction_layers - moe, moe

    def parameters(self, *, embeddings: bool = True) -> int:
        """All parameters, or those without word and position embeddings."""
        dense, moe = self._kinds
        layers = dense * (self.layer_split + self.layer_replicated)
        layers += moe * (self.moe_split + self.moe_replicated)
        if self.experts:
            layers += moe * self.experts.count * (self.expert_split + self.expert_replicated)
        layers += self.prediction_layers * (self.prediction_split + self.prediction_replicated)
        layers += self.alphas * self.shared_alphas
        final_norm = self.norm_size * self.hidden
        tables = self.embedding * (1 if self.tied_embeddings else 2)
        positions = self.learned_positions * self.hidden
        return layers + final_norm + (tables + positions if embeddings else 0)

    def active_parameters(self) -> int:
        """Those that one token meets: of the routed experts the ones that it is sent to."""
        if not self.experts:
            return self.parameters()
        idle = self._kinds[1] * (self.experts.count - self.experts.top_k)
        return self.parameters() - idle * (self.expert_split + self.expert_replicated)

    def weights_per_token(self) -> int:
        """Weights of matrices that a token is multiplied with, the output layers' among them.

        The router is left out, as `num_floating_point_operations` does.
        """
        dense, moe = self._kinds
        weights = (dense + moe) * self.attention_matrices + dense * self.mlp_matrices(self.ffn)
        if self.experts:
            widths = self.experts.top_k * self.experts.ffn + self.experts.shared_ffn
            weights += moe * self.mlp_matrices(widths)
        weights += self.prediction_layers * self.prediction_split
        return weights + (1 + self.prediction_layers) * self.embedding

    def attention_flops_per_token(self) -> int:
        """6·L·q·s: 12·L·q·s, of which a causal mask leaves half."""
        return 6 * sum(self._kinds) * self.query_width * self.sequence

    def flops_per_token(self) -> int:
        """Floating-point operations of training on one token, forward and backward.

        6 per weight of a matrix, the output layer among them, and those of attention. The sum is
        `num_floating_point_operations` of Megatron 0.19 (megatron/training/training.py), which
        counts the norms of prediction layers too, and recomputation nowhere.
        """
        norms = 3 * self.hidden * self.prediction_layers
        return 6 * (self.weights_per_token() + norms) + self.attention_flops_per_token()
