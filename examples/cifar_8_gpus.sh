#!/bin/sh
# The same on the eight cards of one machine, 512 images each; goes on by itself when a process dies.
# Tested as far as a machine without cards can: on two processes.
exec torchrun --standalone --nproc-per-node 8 --max-restarts 3 -m robust_node_fast train --dataset cifar10 \
    --recipe large-batch --batch-size 4096 --warmup-epochs 10 --device cuda --autocast --compile --track-eps 0.004 "$@"
