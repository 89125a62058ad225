#!/usr/bin/env bash
# Trains on one slice of Cloud TPU VMs, from a machine with gcloud:
#
#   bash cloud_tpu.sh create     # asks for the slice and waits until it is there
#   bash cloud_tpu.sh install    # on all of its hosts
#   bash cloud_tpu.sh train      # on all of its hosts; again after an interruption, to go on
#   bash cloud_tpu.sh log        # follows process 0
#   bash cloud_tpu.sh delete     # until then the slice costs money
set -euo pipefail

PROJECT=my-project
ZONE=us-east5-b
NAME=gptjax
ACCELERATOR=v6e-16       # 16 chips on 4 hosts; of v4 and v5p the number counts cores, 2 a chip
RUNTIME=v2-alpha-tpuv6e  # v5p: v2-alpha-tpuv5, v5e: v2-alpha-tpuv5-lite, v4: tpu-ubuntu2204-base
TIER=--spot              # or --guaranteed, --reserved, or nothing for on demand
REPOSITORY=https://github.com/ME/gptjax.git
WORKDIR=gs://my-bucket/gpt3-1.3b

on_all_hosts() {
  gcloud compute tpus tpu-vm ssh "$NAME" --project="$PROJECT" --zone="$ZONE" --worker=all \
    --command="$1"
}

state() {
  gcloud compute tpus queued-resources describe "$NAME" --project="$PROJECT" --zone="$ZONE" \
    --format="value(state.state)"
}

case "${1:-}" in
  create)
    gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" --project="$PROJECT" \
      --zone="$ZONE" --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME" $TIER
    until [ "$(state)" = ACTIVE ]; do
      case "$(state)" in
        FAILED | SUSPEND*) echo "the request ended as $(state)" >&2; exit 1 ;;
      esac
      echo "$(date +%T) $(state)"
      sleep 30
    done
    ;;
  install)
    # The images of TPU VMs have Python 3.10, so uv fetches a newer one.
    on_all_hosts "python3 -m pip install --quiet --user uv && rm -rf gptjax &&
      git clone --quiet $REPOSITORY gptjax && cd gptjax &&
      ~/.local/bin/uv venv --quiet --python 3.12 .venv &&
      ~/.local/bin/uv pip install --quiet --python .venv '.[tpu,hf]'"
    ;;
  train)
    # nohup, so that it outlives the connection.
    on_all_hosts "cd gptjax && source .venv/bin/activate && nohup \
      python -m gptjax.train --config=configs/pretrain.py:model=gpt3-1.3b,data=fineweb,mesh=fsdp \
      --config.batch_size=512 --config.sequence_length=2048 --config.grad_accumulation=4 \
      --config.total_tokens=1e10 --config.optim.learning_rate=2e-4 \
      --config.model.dtype=bfloat16 --config.model.execution.remat=full \
      --workdir=$WORKDIR --distributed > train.log 2>&1 < /dev/null &"
    ;;
  log)
    gcloud compute tpus tpu-vm ssh "$NAME" --project="$PROJECT" --zone="$ZONE" --worker=0 \
      --command="tail -n 50 -f gptjax/train.log"
    ;;
  delete)
    gcloud compute tpus queued-resources delete "$NAME" --project="$PROJECT" --zone="$ZONE" --force
    ;;
  *)
    echo "usage: bash cloud_tpu.sh create|install|train|log|delete" >&2
    exit 2
    ;;
esac
