#!/usr/bin/env bash
# Trains on one slice of a cluster that `xpk cluster create` made: bash xpk.sh
set -euo pipefail

PROJECT=my-project
ZONE=us-east5-b
CLUSTER=my-cluster
NAME=gptjax
ACCELERATOR=v6e-16
REPOSITORY=https://github.com/ME/gptjax.git
WORKDIR=gs://my-bucket/gpt3-1.3b

# One line for XPK, which copies it into a manifest; exec, so that SIGTERM reaches Python.
xpk workload create --project="$PROJECT" --zone="$ZONE" --cluster="$CLUSTER" --workload="$NAME" \
  --tpu-type="$ACCELERATOR" --num-slices=1 --max-restarts=20 --docker-image=python:3.12 \
  --command="git clone --quiet $REPOSITORY gptjax && cd gptjax && \
    pip install --quiet '.[tpu,hf]' && exec \
    python -m gptjax.train --config=configs/pretrain.py:model=gpt3-1.3b,data=fineweb,mesh=fsdp \
    --config.batch_size=512 --config.sequence_length=2048 --config.grad_accumulation=4 \
    --config.total_tokens=1e10 --config.optim.learning_rate=2e-4 \
    --config.model.dtype=bfloat16 --config.model.execution.remat=full \
    --workdir=$WORKDIR --distributed"
