# shellcheck shell=bash
# What NCCL, Gloo and PyTorch need to know about the network. Sourced by pretrain.sh with
# NETWORK=infiniband|efa|roce|cxi|ethernet; anything already in the environment wins. Everything not set
# here is left to detection: NCCL's own choice is right on most machines, and a value copied from
# another site is the usual reason why it is not. Set NCCL_DEBUG=INFO to see what was chosen.
#
# Sources: NCCL's user guide (env.rst, 2.30), PyTorch's "ProcessGroupNCCL environment variables",
# aws-ofi-nccl's doc/efa-env-var.md, libfabric's fi_efa(7) and fi_cxi(7). For cxi also HPE's NCCL tuning
# guide (github.com/HewlettPackard/shs-ccl-docs), and what CSCS, NERSC, ALCF, Isambard and Sigma2 (Olivia)
# publish or use: values from HPE's guide unless another source is named; FI_PROVIDER is this file's own.

# WARN prints why a call failed and nothing else. INFO for the first run on a new cluster: it names
# the network, the cards and the GPU direct path of every connection.
: "${NCCL_DEBUG:=WARN}"
export NCCL_DEBUG

# A lost peer or a timed-out collective ends the process instead of hanging the job, which is what
# every restart relies on. 3 (PyTorch's default) does not try to clean up NCCL first: that can hang.
: "${TORCH_NCCL_ASYNC_ERROR_HANDLING:=3}"
export TORCH_NCCL_ASYNC_ERROR_HANDLING

# Not set: NCCL_SOCKET_IFNAME, the interface over which NCCL's ranks find each other (and, on
# Ethernet, send everything). NCCL takes ib* first, docker* and lo last. Set it when a node has
# interfaces that do not reach the other nodes: =eth0 is exactly that one, eth is a prefix, ^br
# excludes one.
#
# Not set: GLOO_SOCKET_IFNAME, the same for Gloo, which Megatron uses for its CPU groups. Gloo binds
# to the address of the node's host name; set it, to one plain name without = or ^, when that is
# 127.0.0.1 or a network that the other nodes cannot reach.

case "${NETWORK:-}" in
infiniband | roce)
    # Without a usable card NCCL would fall back to TCP and train on slowly; with this it stops and
    # says so. On one node there may be no card, nor need of one. To use a plugin's network, for
    # SHARP for example, give that one's name.
    if [ "${NNODES:-1}" -gt 1 ]; then
        : "${NCCL_NET:=IB}"
        export NCCL_NET
    fi
    # How long an unanswered packet waits: 4.096 µs × 2^22, seven times, is 2 minutes; NCCL's own 20
    # is 30 seconds. A link that comes back within that time costs no restart. Raise it if a large
    # network still ends with "ibv_poll_cq … error 12"; a dead peer is noticed that much later.
    : "${NCCL_IB_TIMEOUT:=22}"
    export NCCL_IB_TIMEOUT
    # Not set: NCCL_IB_HCA, which cards to use. Set it when some belong to storage or management:
    # =mlx5_0,mlx5_1 uses those two, ^=mlx5_4 all but one; without = a name is a prefix, so that
    # mlx5_1 is mlx5_10 too.
    #
    # RoCE only, not set: NCCL_IB_GID_INDEX, a card's address of RoCE v2 over IPv4. NCCL 2.21 and
    # later (PyTorch 2.6 and later) find it, whatever its number on each card; before that it is
    # what show_gids prints, often 3. For IPv6 set NCCL_IB_ADDR_FAMILY=AF_INET6 instead.
    # RoCE only, not set: NCCL_IB_TC, the traffic class that the switches treat as lossless. It is
    # the network administrator's number; without it, congestion may drop packets.
    ;;
efa)
    # libfabric must not settle for its TCP provider. The aws-ofi-nccl plugin asks for EFA by itself
    # on EC2 since 1.6; it has to be installed, else NCCL uses TCP: look for "Libfabric" at
    # NCCL_DEBUG=INFO. NCCL_NET is not forced: NCCL finds it.
    : "${FI_PROVIDER:=efa}"
    export FI_PROVIDER
    # Not set: FI_EFA_USE_DEVICE_RDMA. libfabric 1.18 with aws-ofi-nccl 1.7 uses RDMA wherever the
    # device has it, and 1 stops on those that have none; older versions need 1 on P4 and P5.
    # Not set: FI_EFA_USE_HUGE_PAGE. Set 0 when a data-loader's fork says "Cannot allocate memory".
    # RDMAV_FORK_SAFE must not be set.
    ;;
cxi)
    # HPE Slingshot, by the aws-ofi-nccl plugin, which has to be installed or brought by the container
    # engine, and libfabric's cxi provider; TCP would be much slower, and nobody would notice. On one
    # node neither is needed. The name is the plugin's first one: 1.11 and older know no other, newer
    # ones this one, too.
    if [ "${NNODES:-1}" -gt 1 ]; then
        : "${NCCL_NET:=AWS Libfabric}" "${FI_PROVIDER:=cxi}"
        # A prefix: hsn0, hsn1, … are Slingshot's. The management network may not reach the others.
        : "${NCCL_SOCKET_IFNAME:=hsn}"
        export NCCL_NET FI_PROVIDER NCCL_SOCKET_IFNAME
    fi
    # GPU direct RDMA where GPU and card hang on the same CPU, and rings over all cards of a node.
    : "${NCCL_NET_GDR_LEVEL:=PHB}" "${NCCL_CROSS_NIC:=1}"
    export NCCL_NET_GDR_LEVEL NCCL_CROSS_NIC
    # Between GH200s with GPU direct RDMA the LL128 of NCCL 2.27 and newer corrupts data, without a word
    # (NCCL issue 2001); it is slower on Slingshot, too (CSCS).
    : "${NCCL_PROTO:=^LL128}"
    export NCCL_PROTO
    # Without the first, calls of the provider to CUDA can deadlock with NCCL's; the second is how its
    # cache of registered memory learns what was given back. HPE also allows kdreg2.
    : "${FI_CXI_DISABLE_HOST_REGISTER:=1}" "${FI_MR_CACHE_MONITOR:=userfaultfd}"
    export FI_CXI_DISABLE_HOST_REGISTER FI_MR_CACHE_MONITOR
    # Queues that do not overflow in large jobs, and messages that software matches when the card has
    # no place left (by default, hardware, that ends the job). HPE's values; CSCS has 32768 and
    # software, ALCF 131072 and software.
    : "${FI_CXI_DEFAULT_CQ_SIZE:=131072}" "${FI_CXI_DEFAULT_TX_SIZE:=2048}" "${FI_CXI_RX_MATCH_MODE:=hybrid}"
    export FI_CXI_DEFAULT_CQ_SIZE FI_CXI_DEFAULT_TX_SIZE FI_CXI_RX_MATCH_MODE
    # Not set: FI_CXI_RDZV_PROTO=alt_read with FI_CXI_RDZV_EAGER_SIZE=0 and FI_CXI_RDZV_GET_MIN=0, which
    # HPE and Isambard recommend: with SRUN_ARGS=--network=disable_rdzv_get, by which the card's driver allows
    # it, or not at all; neither is of use alone.
    # Not set: FI_CXI_RDZV_EAGER_SIZE, _GET_MIN and _THRESHOLD, all 0: what CSCS advises when NCCL hangs.
    # Not set: GLOO_SOCKET_IFNAME. Set =hsn0 where a node's host name is one of the management network.
    # MPICH_GPU_SUPPORT_ENABLED=1 of a site's profile disturbs only programs that use MPI, which this does not.
    ;;
ethernet)
    # TCP, even where an InfiniBand or RoCE card is present but not wired to the other nodes.
    : "${NCCL_NET:=Socket}"
    export NCCL_NET
    # Not set: NCCL_SOCKET_NTHREADS and NCCL_NSOCKS_PERTHREAD. On 100 Gb/s and faster set 4 and 4
    # (their product may be 64 at most), at the price of CPU time.
    ;;
*)
    echo "NETWORK=${NETWORK:-} is not one of infiniband, efa, roce, cxi, ethernet" >&2
    return 2
    ;;
esac
