# shellcheck shell=bash
# What NCCL, Gloo and PyTorch need to know about the network. Sourced by pretrain.sh with
# NETWORK=infiniband|efa|roce|ethernet; anything already in the environment wins. Everything not set
# here is left to detection: NCCL's own choice is right on most machines, and a value copied from
# another site is the usual reason why it is not. Set NCCL_DEBUG=INFO to see what was chosen.
#
# Sources: NCCL's user guide (env.rst, 2.30), PyTorch's "ProcessGroupNCCL environment variables",
# aws-ofi-nccl's doc/efa-env-var.md, libfabric's fi_efa(7).

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
    # NCCL_DEBUG=INFO. NCCL_NET is not forced, since the plugin's name changed between versions.
    : "${FI_PROVIDER:=efa}"
    export FI_PROVIDER
    # Not set: FI_EFA_USE_DEVICE_RDMA. libfabric 1.18 with aws-ofi-nccl 1.7 uses RDMA wherever the
    # device has it, and 1 stops on those that have none; older versions need 1 on P4 and P5.
    # Not set: FI_EFA_USE_HUGE_PAGE. Set 0 when a data-loader's fork says "Cannot allocate memory".
    # RDMAV_FORK_SAFE must not be set.
    ;;
ethernet)
    # TCP, even where an InfiniBand or RoCE card is present but not wired to the other nodes.
    : "${NCCL_NET:=Socket}"
    export NCCL_NET
    # Not set: NCCL_SOCKET_NTHREADS and NCCL_NSOCKS_PERTHREAD. On 100 Gb/s and faster set 4 and 4
    # (their product may be 64 at most), at the price of CPU time.
    ;;
*)
    echo "NETWORK=${NETWORK:-} is not one of infiniband, efa, roce, ethernet" >&2
    return 2
    ;;
esac
