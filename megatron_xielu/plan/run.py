"""A Megatron command on a cluster: its layout over GPUs, memory, checkpoints and time.

Dimension legend, as in Megatron: s sequence, b micro-batch, h hidden, f ffn, V padded vocabulary;
q = heads × kv_channels, k = query groups × kv_channels; t tensor-parallel size.

    kept per token      8h/t' + (6q + 6k + 4·heads + MLP)/t    bytes a layer, bf16, rope, no dropout
    MLP                 2f + 2f; 2f with --xielu-recompute-output; 4f + 2f with a gate
    routed expert       MLP + 2f, the output before it was weighted; with --moe-grouped-gemm 2f + 2f
    logits              6V/t, 10V/t with --cross-entropy-loss-fusion    of one micro-batch

t' = t with sequence parallelism, else 1. Of a layer with experts, under balanced routing, the MLP
is that of the shared experts and of the top-k routed ones, with their inputs. Sources stand at the
functions. Not counted: the CUDA context, NCCL's and cuBLAS's buffers, temporaries inside a layer,
fragmentation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

from megatron_xielu.catalog import TRAINABLE
from megatron_xielu.checkpoints.optimizer_format import (
    DP,
    FULL,
    Load,
    Save,
    load_of_rank,
    save_of_rank,
)
from megatron_xielu.plan import flags, throughput
from megatron_xielu.plan.flags import PlanError
from megatron_xielu.plan.gpus import H100, Gpu
from megatron_xielu.plan.model import Model
from megatron_xielu.plan.throughput import Mfu

GIB = 1024**3
MEMORY_MARGIN = 0.10  # of a GPU's memory, for what is not counted

_MOMENTS = {"sgd": 1, "lion": 1}  # fp32 states per parameter; Adam and others two


@dataclass(frozen=True)
class Cluster:
    """The GPUs of a run. ``mfu``: the share of their peak; None for what is published.

    ``gpu_is_given``: by who asks; else it is the default, which need not be the run's.
    ``node_network``, ``host_copy``: GB/s into a node (None for its GPUs' share), and of one thread
    that copies host memory. The second is an assumption; torchrun gives a rank one thread.
    """

    nodes: int = 1
    gpus_per_node: int = 8
    gpu: Gpu = H100
    mfu: float | None = None
    node_network: float | None = None
    host_copy: float = 5.0
    gpu_is_given: bool = False

    @property
    def gpus(self) -> int:
        """GPUs of the run: Megatron's world size."""
        return self.nodes * self.gpus_per_node

    @property
    def network(self) -> float:
        """GB/s into a node."""
        return self.node_network or self.gpus_per_node * self.gpu.network


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
        expert, expert_tensor: parallel sizes of experts.
        micro_batch, global_batch: samples.
        accumulation: micro-batches a data-parallel rank and step.
        element, gradient: bytes of a number of weights and activations, and of a gradient's.
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
        self.expert: int = args.expert_model_parallel_size
        self.expert_tensor: int = args.expert_tensor_parallel_size or self.tensor
        self.virtual = self._virtual_stages()
        # Where the sizes do not divide, `checks` says so and the rest is still computed.
        self.data = max(1, self.cluster.gpus // (self.tensor * self.pipeline * self.context))
        self.micro_batch: int = args.micro_batch_size
        self.global_batch: int = args.global_batch_size or self.micro_batch * self.data
        self.accumulation = -(-self.global_batch // (self.micro_batch * self.data))
        self.half: bool = args.bf16 or args.fp16
        self.sequence_parallel: bool = args.sequence_parallel and self.tensor > 1
        self.element = 2 if self.half else 4
        self.gradient = 2 if self.half and args.grad_reduce_in_bf16 else 4

    def with_(self, flags: str) -> Plan:
        """This plan with flags added to its command."""
        argv = [*self.argv, *flags.split()]
        return Plan(argv, cluster=self.cluster, vocab_size=self.model.vocabulary)

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

    def mfu(self) -> Mfu:
        """The share of the peak that the model's FLOPs reach: as given, or as published."""
        if self.cluster.mfu is not None:
            return Mfu(self.cluster.mfu, "as given")
        return throughput.expected(self.cluster.gpu, self.model.weights_per_token())

    def seconds_per_step(self) -> float:
        """At the expected MFU."""
        peak = self.cluster.gpu.peak_tflops * 1e12
        flops_per_second = self.cluster.gpus * peak * self.mfu().value
        return self.tokens_per_step() * self.model.flops_per_token() / flops_per_second

    # Memory

    def mlp_bytes_per_token(self, ffn: int | None = None) -> float:
        """What an MLP keeps for its backward pass beside its input, at t = 1.

        Its activation's input and output; docs/memory.md has it measured, with the input. In FP8
        fc2 keeps a byte of the output (docs/training.md).
        """
        tensors = (3 if self.model.gated else 2) - self.args.xielu_recompute_output
        width = self.model.ffn if ffn is None else ffn
        return width * (self.element * tensors - (self.element - 1) * self.fp8_share)

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

    def experts_bytes_per_token(self) -> float:
        """What the experts of a layer keep for its backward pass, at t = 1, by estimate.

        Under balanced routing every rank computes top_k copies of its share of the tokens: their
        inputs, which all expert-tensor-parallel ranks hold whole, and what their MLPs keep. Ungated
        ones keep the output once more, times the router's probability: x, f(x) and w·f(x). A pass
        that does both keeps x and w·f(x) alone: of gated ones, and of ours in grouped experts,
        where ``moe_act`` recomputes either and leaves x. The router's logits and probabilities are
        fp32. Not counted: the buffers of the all-to-all, padding, and what an uneven router sends
        to one rank.
        """
        e, element = self.model.experts, self.element
        # From local layers Megatron builds experts with MLPs of their own, and ignores the flag.
        grouped = self.args.moe_grouped_gemm and self.args.transformer_impl != "local"
        if not e:
            return 0.0
        in_one_pass = self.model.gated or (grouped and self.model.activation in TRAINABLE)
        if grouped and self.recomputes("moe_act"):
            kept = float(element * e.ffn * (2 if self.model.gated else 1))
        else:
            kept = self.mlp_bytes_per_token(e.ffn) + element * e.ffn * (not in_one_pass)
        inputs = element * self.model.hidden * self.expert_tensor
        return e.top_k * (inputs + kept) + 8 * e.count

    def recomputes(self, module: str) -> bool:
        """Whether selective recomputation is of this one of ``--recompute-modules``."""
        args = self.args
        selective = args.recompute_activations or args.recompute_granularity == "selective"
        return selective and module in (args.recompute_modules or ["core_attn"])

    def layer_bytes_per_token(self, *, experts: bool = False) -> float:
        """What a layer keeps on one GPU for its backward pass, per token.

        With dropout and learned positions it is Megatron's `compute_activation_memory`
        (arXiv 2205.05198, table 2), and the statistics of the softmax (fp32, one a head). What
        that leaves out: values are a view of the output of the qkv projection, so all of it stays
        beside queries and keys that rope or a norm made anew. test_plan.py counts it in
        a real layer. Attention that is not fused keeps scores too.
        """
        args, m, element = self.args, self.model, self.element
        # The inputs of both norms and their outputs, and a byte of mask for each dropout.
        whole = 4.0 * element * m.hidden + 2 * m.hidden * (args.hidden_dropout > 0)
        split = element * (2.0 * m.query_width + 2 * m.key_width) + 4 * m.heads
        if m.rope or m.qk_layernorm:
            split += element * (m.query_width + m.key_width)
        if m.groups < m.heads and (m.qk_layernorm or not m.rope):
            split += element * m.query_width  # queries are copied out of their groups
        if self.attention_keeps_scores and not self.recomputes("core_attn"):
            dropout = (element + 1) * (args.attention_dropout > 0)
            split += m.heads * m.sequence * (element + dropout)
        if not experts and not self.recomputes("mlp"):
            split += self.mlp_bytes_per_token()
        if experts and m.experts and not self.recomputes("moe"):
            split += self.experts_bytes_per_token()
            if not self.recomputes("shared_experts"):
                split += self.mlp_bytes_per_token(m.experts.shared_ffn)
        return whole / (self.tensor if self.sequence_parallel else 1) + split / self.tensor

    @property
    def attention_keeps_scores(self) -> bool:
        """Whether the backend of attention keeps s × s numbers a head."""
        local = self.args.transformer_impl == "local"
        return local or self.args.attention_backend in ("unfused", "local")

    def _chunk_bytes_per_token(self, stage: int) -> tuple[float, float]:
        """(kept for a micro-batch in flight, besides while one goes backward) by a model chunk."""
        args, layers = self.args, -(-self.model.layers // (self.pipeline * self.virtual))
        dense, moe = self._layers_on(stage)
        kinds = [(dense, self.layer_bytes_per_token())] if dense else []
        kinds += [(moe, self.layer_bytes_per_token(experts=True))] if moe else []
        layer = sum(number * size for number, size in kinds) / (dense + moe)  # on average
        largest = max(size for _, size in kinds)
        if args.recompute_granularity != "full":
            return layers * layer, 0.0
        shared = self.sequence_parallel or args.distribute_saved_activations
        residual = self.element * self.model.hidden / (self.tensor if shared else 1)
        number = min(args.recompute_num_layers or 1, layers)
        if args.recompute_method == "block":  # that many layers one by one, and no other
            return number * residual + (layers - number) * layer, largest
        return -(-layers // number) * residual, number * largest

    def _prediction_bytes_per_token(self) -> float:
        """What a prediction layer keeps, per token: its layer, and six tensors of hidden size.

        Both inputs, their norms side by side, and the last norm's input and output.
        """
        split = self.tensor if self.sequence_parallel else 1
        layer = self.layer_bytes_per_token(experts=self.model.prediction_moe_layers > 0)
        return layer + 6 * self.element * self.model.hidden / split

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

    def _layers_on(self, stage: int) -> tuple[float, float]:
        """(dense, with experts) of a pipeline stage, without prediction layers."""
        m, chunks = self.model, self.pipeline * self.virtual
        if not m.experts or m.layers % chunks:  # `checks` refuses the second
            moe = m.moe_layers(0, m.layers) / self.pipeline
            return m.layers / self.pipeline - moe, moe
        size = m.layers // chunks
        firsts = (size * (chunk * self.pipeline + stage) for chunk in range(self.virtual))
        moe = sum(m.moe_layers(first, first + size) for first in firsts)
        return size * self.virtual - moe, moe

    def _stages(self) -> Iterable[int]:
        """The pipeline stages of which one holds most."""
        last = self.pipeline - 1
        return range(min(self.pipeline, self.model.layers)) if self.model.experts else {0, last}

    def expert_parameters_on(self, stage: int) -> float:
        """Parameters of routed experts on one GPU of a pipeline stage."""
        m = self.model
        if not m.experts:
            return 0.0
        layers = self._layers_on(stage)[1]
        layers += m.prediction_moe_layers * (stage == self.pipeline - 1)
        one = m.expert_split / self.expert_tensor + m.expert_replicated
        return layers * m.experts.count / self.expert * one

    def parameters_on(self, stage: int) -> float:
        """Parameters of one GPU of a pipeline stage; the last has its own copy of a tied table."""
        m, first, last = self.model, stage == 0, stage == self.pipeline - 1
        dense, moe = self._layers_on(stage)
        ahead = m.prediction_layers * last
        moe += m.prediction_moe_layers * last
        dense += ahead - m.prediction_moe_layers * last
        parameters = dense * (m.layer_split / self.tensor + m.layer_replicated)
        parameters += moe * (m.moe_split / self.tensor + m.moe_replicated)
        parameters += ahead * (m.prediction_split / self.tensor + m.prediction_replicated)
        parameters += self.expert_parameters_on(stage)
        parameters += m.alphas * m.shared_alphas
        # Prediction layers look up words on the last stage, which then has the first table, too.
        looks_up = first or (last and m.prediction_layers > 0)
        tables = looks_up + (last and not (m.tied_embeddings and first))
        parameters += tables * m.embedding / self.tensor
        positions = m.learned_positions * m.hidden * looks_up
        return parameters + positions + m.norm_size * m.hidden * last

    def optimizer_shards(self) -> int:
        """GPUs that share the optimizer state of a parameter which is no expert's."""
        return self._shards(self.data * self.context)

    def _shards(self, copies: int) -> int:
        if not self.args.use_distributed_optimizer:
            return 1
        return max(1, copies // self.args.num_distributed_optimizer_instances)

    @property
    def expert_data(self) -> int:
        """GPUs that hold the same experts."""
        parts = self.expert_tensor * self.expert * self.pipeline
        return max(1, self.cluster.gpus // parts)

    def expert_optimizer_shards(self) -> int:
        """GPUs that share the optimizer state of an expert."""
        return self._shards(self.expert_data)

    def memory(self, stage: int | None = None) -> Memory:
        """Bytes on one GPU of a pipeline stage, or of the stage that holds most.

        Weights and optimizer are those of `compute_weight_and_optimizer_memory`
        (megatron/training/theoretical_memory_usage.py): 2 + 4 + 12/shards bytes a parameter in
        16-bit training. Logits are there in 16 bits and, inside the loss, in fp32
        (megatron/core/tensor_parallel/cross_entropy.py). In FP8 matrices have a quantised copy
        beside them, and its transpose, for all micro-batches of a step.
        """
        if stage is None:
            return max((self.memory(i) for i in self._stages()), key=lambda m: m.total)
        args, m, element, gradient = self.args, self.model, self.element, self.gradient
        parameters, experts = self.parameters_on(stage), self.expert_parameters_on(stage)
        owned = (parameters - experts) / self.optimizer_shards()
        owned += experts / self.expert_optimizer_shards()
        state = 4 * _MOMENTS.get(args.optimizer, 2)
        if self.half:
            state += 4 + (4 if gradient == 2 else 0)  # fp32 weights; an fp32 copy of gradients
        tokens = self.micro_batch * m.sequence / self.context
        chunk, backward = self._chunk_bytes_per_token(stage)
        activations = self.chunks_in_flight(stage) * chunk + backward
        logits = 0.0
        if stage == self.pipeline - 1:
            shared = self.tensor if self.sequence_parallel else 1
            activations += 2 * element * m.hidden / shared  # input and output of the last norm
            logits = self._logit_bytes() * m.padded_vocabulary / self.tensor
            logits *= 1 + m.prediction_layers
            activations += m.prediction_layers * self._prediction_bytes_per_token()
        dense, moe = self._layers_on(stage)
        matrices = (dense * m.layer_split + moe * m.moe_split) / self.tensor
        matrices += self.expert_parameters_on(stage)
        return Memory(
            stage=stage,
            weights=element * parameters + 2 * self.fp8_share * matrices,
            gradients=gradient * parameters,
            optimizer=state * owned,
            activations=tokens * activations,
            logits=tokens * logits,
        )

    def _logit_bytes(self) -> int:
        """Of one logit, from the forward to the backward pass of the loss."""
        whole = 6 if self.half else self.element
        if not self.args.cross_entropy_loss_fusion:
            return whole
        # Megatron's own, as PyTorch compiles it, does not go backward in place.
        return self.element if self.args.cross_entropy_fusion_impl == "te" else whole + 4

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
        return self.element, 0 if self.args.no_save_optim else optimizer

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
        parts = []
        for numel, ranks, slices in self._parts([self.largest_stage()]):
            # Tensor-parallel ranks are neighbours, and a node has those of one pipeline stage.
            slices = min(slices, self.cluster.gpus_per_node)
            on_node = min(ranks, self.cluster.gpus_per_node // slices)
            parts.append(
                save_of_rank(
                    kind,
                    numel=numel,
                    weights=weights,
                    state=state,
                    ranks=ranks,
                    on_node=on_node,
                    slices=slices,
                )
            )
        total: Save = _sum(parts)
        return total

    def seconds_to_save(self, kind: str) -> float:
        """How long training waits for a save, by estimate, in either optimizer format."""
        cluster = self.cluster
        return self.save(kind).seconds(
            node_network=cluster.network * 1e9, host_copy=cluster.host_copy * 1e9
        )

    def load(self, kind: str, *, parallel: bool) -> Load:
        """What a load costs a rank of the stage that holds most, at an unchanged layout."""
        return self._load(kind, [self.largest_stage()], parallel=parallel)

    def _load(self, kind: str, stages: Iterable[int], *, parallel: bool) -> Load:
        """The sum over these stages, of each of which one rank loads."""
        weights, state = self._saved_bytes()
        total: Load = _sum(
            load_of_rank(
                kind, parallel=parallel, numel=numel, weights=weights, state=state, ranks=ranks
            )
            for numel, ranks, _ in self._parts(stages)
        )
        return total

    def read_by_all(self, kind: str, *, parallel: bool) -> float:
        """Bytes that all ranks together read for a load."""
        ranks = self.tensor * self.data * self.context
        return ranks * self._load(kind, range(self.pipeline), parallel=parallel).read

    def largest_stage(self) -> int:
        """The pipeline stage whose ranks have most parameters."""
        return max(self._stages(), key=self.parameters_on)

    def _parts(self, stages: Iterable[int]) -> Iterator[tuple[float, int, int]]:
        """(parameters of a rank, ranks that share their state, slices) of stages: experts apart."""
        stages = list(stages)
        experts = sum(map(self.expert_parameters_on, stages))
        others = sum(map(self.parameters_on, stages)) - experts
        yield others, self.optimizer_shards(), self.tensor
        if experts:
            yield experts, self.expert_optimizer_shards(), self.expert_tensor * self.expert


def _sum(costs: Iterable[Any]) -> Any:
    """Of each field, of costs of one kind."""
    costs = list(costs)
    names = [field.name for field in fields(costs[0])]
    return type(costs[0])(*(sum(getattr(cost, name) for cost in costs) for name in names))
