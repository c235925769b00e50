#!/bin/sh
# StagedCIFARNode on CIFAR-10, vanilla and contractive, on one card. Tested as far as a machine without one can.
exec rnf train --dataset cifar10 --recipe large-batch --device cuda \
    --set autocast=true --set compile=true --set track_eps=0.004 "$@"
