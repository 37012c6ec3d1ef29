# shellcheck shell=bash disable=SC2034 # read by pretrain.sh
# The paper's 3B Llama, as its authors published its configuration (arXiv 2411.13010).
# Every value can be overridden from the environment.

: "${NUM_LAYERS:=36}" "${HIDDEN_SIZE:=2048}" "${NUM_HEADS:=16}" "${NUM_KV_HEADS:=16}"
: "${GATED_FFN_SIZE:=8192}"           # SwiGLU's width; the launcher makes it 12288 for ungated ones
: "${TIE_EMBEDDINGS:=0}"              # as published
: "${SEQ_LENGTH:=4096}" "${ROTARY_BASE:=500000}"
: "${PADDED_VOCAB_SIZE:=147456}"      # the authors' padding; the tokenizer has 131,072 entries.
                                      # PADDED_VOCAB_SIZE=131072 saves 67M unused parameters

: "${LR:=7e-4}"                       # peak
: "${GLOBAL_BATCH:=640}"              # 2.621M tokens a step
# TP=2 is the paper's: 128 replicas with 5 samples each, on 256 GPUs. Without tensor parallelism a
# layer waits for nobody, and 2 samples fit; 256 GPUs do not divide the batch then.
: "${TP:=1}" "${PP:=1}" "${CP:=1}"
: "${MICRO_BATCH:=$((TP == 1 ? 2 : 5))}"
: "${BUCKET_SIZE:=128000000}"         # of gradients: Megatron's own at 128 data-parallel ranks,
                                      # kept when the node count changes
: "${TOKENS:=125829120000}"           # 48,000 steps; TOKENS=125e9 for a round number
# Linear warm-up, constant, then 1 − sqrt to zero: shares of TOKENS, so that they scale with it.
: "${STEPS:=48000}" "${WARMUP_STEPS:=2000}" "${DECAY_STEPS:=10000}"
