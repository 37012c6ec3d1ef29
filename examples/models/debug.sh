# shellcheck shell=bash disable=SC2034 # read by pretrain.sh
# A Llama of 200,000 parameters on made-up data, or on yours: a whole run of the machinery in seconds,
# on any machine (DEVICE=cpu). What it learns means nothing.

: "${NUM_LAYERS:=4}" "${HIDDEN_SIZE:=64}" "${NUM_HEADS:=4}" "${NUM_KV_HEADS:=4}"
: "${GATED_FFN_SIZE:=128}"
: "${TIE_EMBEDDINGS:=0}"
: "${SEQ_LENGTH:=64}" "${ROTARY_BASE:=10000}"
: "${TOKENIZER:=null}" "${VOCAB_SIZE:=255}" "${PADDED_VOCAB_SIZE:=256}" "${MOCK_DATA:=1}"

: "${LR:=1e-3}"
: "${GLOBAL_BATCH:=16}" "${MICRO_BATCH:=2}" "${TP:=1}" "${PP:=1}" "${CP:=1}"
: "${TOKENS:=40960}"                  # 40 steps
: "${STEPS:=40}" "${WARMUP_STEPS:=4}" "${DECAY_STEPS:=8}"
: "${SAVE_INTERVAL:=10}" "${KEEP_EVERY:=20}" "${LOG_INTERVAL:=1}" "${EVAL_INTERVAL:=20}"
: "${EVAL_ITERS:=1}"
