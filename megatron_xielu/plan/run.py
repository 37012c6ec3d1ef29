"""A Megatron command on a cluster: its layout over GPUs, memory, checkpoints and time.

Dimension legend, as in Megatron: s sequence, b micro-batch, h hidden, f ffn, V padded vocabulary;
q = heads × kv_channels, k = query groups × kv_channels; t tensor-parallel size.

    kept per token      8h/t' + (6q + 6k + 4·heads + MLP)/t    bytes a layer, bf16, rope, no dropout
    MLP                 2f + 2f; 2f with --xielu-recompute-output; 4f + 2f with a gate
    logits              6V/t, 10V/t with --cross-entropy-loss-fusion    of one micro-batch

t' = t with sequence parallelism, else 1. Sources stand at the functions. Not counted: the CUDA
context, NCCL's and cuBLAS's buffers, temporaries inside a layer, fragmentation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_xielu.checkpoints.optimizer_format import (
    DP,
    FULL,
    Load,
    Save,
    load_of_rank,
    save_of_rank,
)
from megatron_xielu.plan import flags
from megatron_xielu.plan.flags import PlanError
from megatron_xielu.plan.model import Model

GIB = 1024**3
MEMORY_MARGIN = 0.10  # of a GPU's memory, for what is not counted

_MOMENTS = {"sgd": 1, "lion": 1}  # fp32 states per parameter; Adam and others two


@dataclass(frozen=True)
class Cluster:
    """The GPUs of a run. ``peak_tflops``: bf16 without sparsity; ``mfu``: an assumption.

    ``node_network``, ``host_copy``: GB/s into a node, and of one thread that copies host memory.
    The second is an assumption; torchrun gives a rank one thread.
    """

    nodes: int = 1
    gpus_per_node: int = 8
    gpu_memory_gib: float = 80.0
    peak_tflops: float = 989.0  # NVIDIA's data sheet of the H100 SXM
    mfu: float = 0.40
    node_network: float = 400.0  # eight ConnectX-7 of 400 Gb/s: NVIDIA's data sheet of the DGX H100
    host_copy: float = 5.0

    @property
    def gpus(self) -> int:
        """GPUs of the run: Megatron's world size."""
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU, of the pipeline stage that holds most."""

    stage: int
    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        """Their sum."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


@dataclass(frozen=True)
class Schedule:
    """The run in samples; ``steps`` in optimizer steps."""

    samples: int
    steps: int
    warmup: int
    stable: int
    decay: int
    style: str


@dataclass(frozen=True)
class Checkpoints:
    """``bytes``: of one. ``kept``: the most that are there after any save."""

    bytes: int
    written: int
    kept: int

    @property
    def disk(self) -> int:
        """Bytes needed; a new checkpoint is complete before an old one may go."""
        return self.bytes * min(self.kept + 1, self.written)


class Plan:
    """A command on a cluster.

    Attributes:
        model: its `Model`.
        cluster: its `Cluster`.
        tensor, pipeline, context, virtual, data: parallel sizes; ``virtual`` counts the model
            chunks of a pipeline rank.
        micro_batch, global_batch: samples.
        accumulation: micro-batches a data-parallel rank and step.
    """

    def __init__(
        self,
        argv: Sequence[str],
        *,
        cluster: Cluster | None = None,
        vocab_size: int | None = None,
        keep_checkpoints: int | None = None,
        keep_every: int | None = None,
    ) -> None:
        """Read Megatron's command line.

        Args:
            argv: Megatron's arguments.
            cluster: where it runs; one node of eight H100 by default.
            vocab_size: entries of the tokenizer, where ``argv`` does not say.
            keep_checkpoints: how many of the last checkpoints are kept; None for all, or what
                ``--save-retain-interval`` leaves.
            keep_every: iterations; a checkpoint of a multiple is kept for good.

        Raises:
            PlanError: too little is known to compute anything.
        """
        self.argv = list(argv)
        self.args = args = flags.parse(argv)
        self.cluster = cluster or Cluster()
        self.keep_checkpoints = keep_checkpoints
        self.keep_every = keep_every
        self.model = Model.of(args, vocab_size=vocab_size)
        if args.micro_batch_size is None:
            raise PlanError(["--micro-batch-size is required"])
        self.tensor: int = args.tensor_model_parallel_size
        self.pipeline: int = args.pipeline_model_parallel_size
        self.context: int = args.context_parallel_size
        self.virtual = self._virtual_stages()
        # Where the sizes do not divide, `checks` says so and the rest is still computed.
        self.data = max(1, self.cluster.gpus // (self.tensor * self.pipeline * self.context))
        self.micro_batch: int = args.micro_batch_size
        self.global_batch: int = args.global_batch_size or self.micro_batch * self.data
        self.accumulation = -(-self.global_batch // (self.micro_batch * self.data))
        self.half: bool = args.bf16 or args.fp16
        self.sequence_parallel: bool = args.sequence_parallel and self.tensor > 1

    def _virtual_stages(self) -> int:
        stages = self.args.num_virtual_stages_per_pipeline_rank
        layers = self.args.num_layers_per_virtual_pipeline_stage
        if not stages and layers:
            stages = self.args.num_layers // self.pipeline // layers
        return max(1, stages or 1)

    # Compute

    def tokens_per_step(self) -> int:
        """Tokens of a global batch."""
        return self.global_batch * self.model.sequence

    def schedule(self) -> Schedule:
        """Length and learning-rate phases; `get_optimizer_param_scheduler` of Megatron."""
        args, batch = self.args, self.global_batch
        by_samples = args.train_samples is not None
        steps = args.train_samples // batch if by_samples else args.train_iters or 0
        samples = args.train_samples if by_samples else steps * batch

        def length(name: str) -> int | None:
            value = getattr(args, f"{name}_samples" if by_samples else f"{name}_iters")
            return value if by_samples or value is None else value * batch

        end = length("lr_decay") or samples
        warmup = length("lr_warmup") or int((args.lr_warmup_fraction or 0) * end)
        style = args.lr_decay_style
        if style == "WSD":
            decay = length("lr_wsd_decay") or 0
        else:
            decay = 0 if style == "constant" else end - warmup
        return Schedule(samples, steps, warmup, end - warmup - decay, decay, style)

    def flops(self) -> int:
        """Floating-point operations of the whole run."""
        return self.schedule().steps * self.tokens_per_step() * self.model.flops_per_token()

    def seconds_per_step(self) -> float:
        """At the assumed MFU."""
        flops_per_second = self.cluster.gpus * self.cluster.peak_tflops * 1e12 * self.cluster.mfu
        return self.tokens_per_step() * self.model.flops_per_token() / flops_per_second

    # Memory

    def mlp_bytes_per_token(self) -> float:
        """What the MLP of a layer keeps for its backward pass beside its input, at t = 1.

        Its activation's input and output; docs/memory.md has it measured, with the input. In FP8
        fc2 keeps a byte of the output (docs/training.md).
        """
        element = 2 if self.half else 4
        tensors = (3 if self.model.gated else 2) - self.args.xielu_recompute_output
        return self.model.ffn * (element * tensors - (element - 1) * self.fp8_share)

    @property
    def fp8_share(self) -> float:
        """Of a pipeline stage's layers those that compute in FP8."""
        args = self.args
        if not args.fp8_format:
            return 0.0
        edges = args.num_layers_at_start_in_bf16, args.num_layers_at_end_in_bf16
        edge = sum(edges) if self.pipeline == 1 else max(edges)
        bf16 = edge * args.first_last_layers_bf16 * self.pipeline / self.model.layers
        return max(0.0, 1 - bf16)

    def layer_bytes_per_token(self) -> float:
        """What a layer keeps on one GPU for its backward pass, per token.

        With dropout and learned positions it is Megatron's `compute_activation_memory`
        (arXiv 2205.05198, table 2), and the statistics of the softmax (fp32, one a head). What
        that leaves out: values are a view of the output of the qkv projection, so all of it stays
        beside queries and keys that rope or a norm made anew. test_plan.py counts it in
        a real layer. Attention that is not fused keeps scores too.
        """
        args, m = self.args, self.model
        element = 2 if self.half else 4
        modules = args.recompute_modules
        selective = args.recompute_activations or args.recompute_granularity == "selective"
        # The inputs of both norms and their outputs, and a byte of mask for each dropout.
        whole = 4.0 * element * m.hidden + 2 * m.hidden * (args.hidden_dropout > 0)
        split = element * (2.0 * m.query_width + 2 * m.key_width) + 4 * m.heads
        if m.rope or m.qk_layernorm:
            split += element * (m.query_width + m.key_width)
        if m.groups < m.heads and (m.qk_layernorm or not m.rope):
            split += element * m.query_width  # queries are copied out of their groups
        if self.attention_keeps_scores and not (
            selective and (not modules or "core_attn" in modules)
        ):
            dropout = (element + 1) * (args.attention_dropout > 0)
            split += m.heads * m.sequence * (element + dropout)
        if not (selective and "mlp" in modules):
            split += self.mlp_bytes_per_token()
        return whole / (self.tensor if self.sequence_parallel else 1) + split / self.tensor

    @property
    def attention_keeps_scores(self) -> bool:
        """Whether the backend of attention keeps s × s numbers a head."""
        local = self.args.transformer_impl == "local"
        return local or self.args.attention_backend in ("unfused", "local")

    def _chunk_bytes_per_token(self) -> tuple[float, float]:
        """(kept for a micro-batch in flight, besides while one goes backward) by a model chunk."""
        args, layers = self.args, -(-self.model.layers // (self.pipeline * self.virtual))
        layer = self.layer_bytes_per_token()
        if args.recompute_granularity != "full":
            return layers * layer, 0.0
        shared = self.sequence_parallel or args.distribute_saved_activations
        residual = (2 if self.half else 4) * self.model.hidden / (self.tensor if shared else 1)
        number = min(args.recompute_num_layers or 1, layers)
        if args.recompute_method == "block":  # that many layers one by one, and no other
            return number * residual + (layers - number) * layer, layer
        return -(-layers // number) * residual, number * layer

    def chunks_in_flight(self, stage: int) -> int:
        """Micro-batches × model chunks whose activations a pipeline stage holds at once.

        The warm-up of Megatron's 1F1B and interleaved schedules
        (megatron/core/pipeline_parallel/schedules.py), and the one that goes backward.
        """
        after = self.pipeline - stage - 1
        if self.virtual == 1:
            return min(after + 1, self.accumulation)
        warmup = 2 * after + (self.virtual - 1) * self.pipeline
        return min(warmup + 1, self.virtual * self.accumulation)

    def parameters_on(self, stage: int) -> float:
        """Parameters of one GPU of a pipeline stage; the last has its own copy of a tied table."""
        m, first, last = self.model, stage == 0, stage == self.pipeline - 1
        layers = m.layers / self.pipeline
        parameters = layers * (m.layer_split / self.tensor + m.layer_replicated)
        parameters += m.alphas * m.shared_alphas
        tables = first + (last and not (m.tied_embeddings and first))
        parameters += tables * m.embedding / self.tensor
        return parameters + m.learned_positions * m.hidden * first + m.norm_size * m.hidden * last

    def optimizer_shards(self) -> int:
        """GPUs that share the optimizer state of a parameter."""
        if not self.args.use_distributed_optimizer:
            return 1
        return max(1, self.data * self.context // self.args.num_distributed_optimizer_instances)

    def memory(self, stage: int | None = None) -> Memory:
        """Bytes on one GPU of a pipeline stage, or of the stage that holds most.

        Weights and optimizer are those of `compute_weight_and_optimizer_memory`
        (megatron/training/theoretical_memory_usage.py): 2 + 4 + 12/shards bytes a parameter in
        16-bit training. Logits are there in 16 bits and, inside the loss, in fp32
        (megatron/core/tensor_parallel/cross_entropy.py). In FP8 matrices have a quantised copy
        beside them, and its transpose, for all micro-batches of a step.
        """
        if stage is None:
            return max((self.memory(i) for i in {0, self.pipeline - 1}), key=lambda m: m.total)
        args, m, element = self.args, self.model, 2 if self.half else 4
        parameters, shards = self.parameters_on(stage), self.optimizer_shards()
        gradient = 2 if self.half and args.grad_reduce_in_bf16 else 4
        state = 4 * _MOMENTS.get(args.optimizer, 2)
        if self.half:
            state += 4 + (4 if gradient == 2 else 0)  # fp32 weights; an fp32 copy of gradients
        tokens = self.micro_batch * m.sequence / self.context
        chunk, backward = self._chunk_bytes_per_token()
        activations = self.chunks_in_flight(stage) * chunk + backward
        logits = 0.0
        if stage == self.pipeline - 1:
            shared = self.tensor if self.sequence_parallel else 1
            activations += 2 * element * m.hidden / shared  # input and output of the last norm
            logits = self._logit_bytes() * m.padded_vocabulary / self.tensor
        matrices = m.layers / self.pipeline * m.layer_matrices / self.tensor
        return Memory(
            stage=stage,
            weights=element * parameters + 2 * self.fp8_share * matrices,
            gradients=gradient * parameters,
            optimizer=state * parameters / shards,
            activations=tokens * activations,
            logits=tokens * logits,
        )

    def _logit_bytes(self) -> int:
        """Of one logit, from the forward to the backward pass of the loss."""
        element = 2 if self.half else 4
        whole = 6 if self.half else element
        if not self.args.cross_entropy_loss_fusion:
            return whole
        # Megatron's own, as PyTorch compiles it, does not go backward in place.
        return element if self.args.cross_entropy_fusion_impl == "te" else whole + 4

    # Checkpoints

    def checkpoints(self) -> Checkpoints | None:
        """Size and number of ``torch_dist`` checkpoints; None without ``--save``.

        Counted in real ones of Megatron 0.19: model weights, and from the optimizer its fp32
        weights and moments. In fp32 only the distributed optimizer writes weights of its own.
        """
        args, steps, every = self.args, self.schedule().steps, self.args.save_interval
        if not args.save or not every:
            return None
        per_parameter = sum(self._saved_bytes())
        written = -(-steps // every)  # multiples of `every`, and the end of the run
        last, forever = self.keep_checkpoints, self.keep_every
        if last is None and args.save_retain_interval:
            last, forever = 1, args.save_retain_interval
        kept = written
        if last is not None:
            old = max(0, written - last)
            kept -= old - (old * every // math.lcm(every, forever) if forever else 0)
        return Checkpoints(math.ceil(per_parameter * self.model.parameters()), written, kept)

    def _saved_bytes(self) -> tuple[int, int]:
        """(of weights, of optimizer state) a parameter in a checkpoint."""
        optimizer = 4 * _MOMENTS.get(self.args.optimizer, 2)
        optimizer += 4 * (self.half or self.args.use_distributed_optimizer)
        return 2 if self.half else 4, 0 if self.args.no_save_optim else optimizer

    @property
    def optimizer_format(self) -> str | None:
        """Of the checkpoints; None where there is no distributed optimizer to have one."""
        args = self.args
        if not args.use_distributed_optimizer or args.optimizer != "adam":
            return None
        if args.no_save_optim or args.ckpt_format != "torch_dist":
            return None
        full = args.dist_ckpt_optim_fully_reshardable
        return FULL if full else DP

    def save(self, kind: str) -> Save:
        """What a save costs a rank of the stage that holds most, in either optimizer format."""
        weights, state = self._saved_bytes()
        # Tensor-parallel ranks are neighbours, and a node has those of one pipeline stage.
        slices = min(self.tensor, self.cluster.gpus_per_node)
        ranks = self.optimizer_shards()
        return save_of_rank(
            kind,
            numel=self._largest_slice(),
            weights=weights,
            state=state,
            ranks=ranks,
            on_node=min(ranks, self.cluster.gpus_per_node // slices),
            slices=slices,
        )

    def seconds_to_save(self, kind: str) -> float:
        """How long training waits for a save, by estimate, in either optimizer format."""
        cluster = self.cluster
        return self.save(kind).seconds(
            node_network=cluster.node_network * 1e9, host_copy=cluster.host_copy * 1e9
        )

    def load(self, kind: str, *, parallel: bool) -> Load:
        """What a load costs a rank of the stage that holds most, at an unchanged layout."""
        weights, state = self._saved_bytes()
        return load_of_rank(
            kind,
            parallel=parallel,
            numel=self._largest_slice(),
            weights=weights,
            state=state,
            ranks=self.optimizer_shards(),
        )

    def read_by_all(self, kind: str, *, parallel: bool) -> float:
        """Bytes that all ranks together read for a load."""
        share = sum(map(self.parameters_on, range(self.pipeline))) / self._largest_slice()
        ranks = self.tensor * self.data * self.context
        return ranks * share * self.load(kind, parallel=parallel).read

    def _largest_slice(self) -> float:
        """Parameters of a rank of the pipeline stage that has most."""
        return max(self.parameters_on(stage) for stage in {0, self.pipeline - 1})
