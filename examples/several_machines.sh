#!/usr/bin/env bash
# Train on several machines by plain torchrun: start this script on each of them, with the first one's name.
#
#     bash several_machines.sh node-1 4        # at most 4 machines; goes on with those that are left
#
# All machines need the same versions, the same data and one shared folder for the run. They must reach each other on
# all ports. If a machine has several networks, name the one to use: export GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0
set -euo pipefail
first=$1
machines=$2
processes=${PROCESSES_PER_MACHINE:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l)} # one for each GPU

torchrun \
    --nnodes "1:$machines" \
    --nproc-per-node "$((processes > 0 ? processes : 1))" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$first:29400" \
    --rdzv-id "${RUN_ID:-rlhf-ppo}" \
    --max-restarts 3 \
    --shutdown-timeout 600 \
    -m rlhf_ppo train \
    --model "${MODEL:-embedded}" \
    --reward "${REWARD:-rlhf_ppo.rewards.toy:positive_sentiment}" \
    --dataset "${DATASET:-rlhf_ppo/assets/story-openings.jsonl}" \
    --output-dir "${OUTPUT_DIR:-runs/several-machines}" \
    --save-every 10 \
    --resume-from-checkpoint auto
