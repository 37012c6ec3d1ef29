# shellcheck shell=bash disable=SC2034 # read by pretrain.sh
# The paper's 1.1B Llama, as its authors published its configuration (arXiv 2411.13010).
# Every value can be overridden from the environment.

: "${NUM_LAYERS:=24}" "${HIDDEN_SIZE:=1536}" "${NUM_HEADS:=16}" "${NUM_KV_HEADS:=16}"
: "${GATED_FFN_SIZE:=6144}"           # SwiGLU's width; the launcher makes it 9216 for ungated ones
: "${TIE_EMBEDDINGS:=1}"              # as published; at this size the embedding is a fifth of it
: "${SEQ_LENGTH:=4096}" "${ROTARY_BASE:=500000}"
: "${PADDED_VOCAB_SIZE:=147456}"      # the authors' padding; the tokenizer has 131,072 entries.
                                      # PADDED_VOCAB_SIZE=131072 saves 25M unused parameters

: "${LR:=8e-4}"                       # peak
: "${GLOBAL_BATCH:=440}"              # 88 GPUs with 5 samples each, 1.802M tokens a step
: "${MICRO_BATCH:=5}" "${TP:=1}" "${PP:=1}" "${CP:=1}"
: "${BUCKET_SIZE:=88000000}"          # of gradients: Megatron's own at 88 data-parallel ranks,
                                      # kept when the node count changes
: "${TOKENS:=126156800000}"           # 70,000 steps; TOKENS=125e9 for a round number
# Linear warm-up, constant, then 1 − sqrt to zero: shares of TOKENS, so that they scale with it.
: "${STEPS:=70000}" "${WARMUP_STEPS:=2000}" "${DECAY_STEPS:=14500}"
