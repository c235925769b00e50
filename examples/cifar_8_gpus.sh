#!/bin/sh
# The same on the eight cards of one machine, 512 images each; goes on by itself when a process dies.
# Tested as far as a machine without cards can: on two processes. track_eps=0.004: about 1/255.
exec torchrun --standalone --nproc-per-node 8 --max-restarts 3 -m robust_node_fast train --dataset cifar10 \
    --recipe large-batch --batch-size 4096 --device cuda --set warmup_epochs=10 \
    --set autocast=true --set compile=true --set track_eps=0.004 "$@"
