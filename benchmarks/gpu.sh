#!/usr/bin/env bash
# What a GPU can show in ten minutes: the tests that need one, what a step of train_cifar.py costs, and a picture.
# Each part writes its result into the folder as it ends, so that a cut leaves the rest.
#
#     bash benchmarks/gpu.sh runs/gpu data        # a folder for the results, the folder of CIFAR-10
#     TINY=1 bash benchmarks/gpu.sh runs/gpu data # the same with tiny sizes, on a CPU
set -u
cd "$(dirname "$0")/.."
run=${RUN:-python} out=${1:-runs/gpu} data=${2:-data} end=$((SECONDS + ${LIMIT:-570}))
mkdir -p "$out"

part() { # name, seconds at most, command
    local name=$1 limit=$2 left=$((end - SECONDS))
    shift 2
    [ "$limit" -lt "$left" ] || limit=$left
    [ "$limit" -gt 0 ] || return
    echo "== $name, $limit s at most"
    timeout -s INT -k 10 "$limit" "$@" > "$out/$name.txt" 2>&1
    echo "== $name ended with status $?" | tee -a "$out/$name.txt"
    tail -n 4 "$out/$name.txt"
}

if [ "${TINY:-}" ]; then
    step="--network cifar-tiny --batch-size 4 --rounds 2" train="--preset tiny --batch-size 8 --steps 20 --no-compile"
    tests="layers"
else
    step="--network cifar --batch-size 128 --rounds 10" train="--batch-size 128 --steps 4000 --save-every 200"
    tests="cuda or gpu"
fi
step="python benchmarks/step.py --ours --shares 0.5 $step"
part tests 120 python -m pytest -q -k "$tests"
part step-eager 60 $step
part step-compiled 200 $step --compile
end=$((end - 30)) # for the picture
part train 600 $run train_cifar.py $train --data "$data" --out "$out/cifar" --class-cond --guidance 2 --log-every 20 \
    --flow-first 0.25 --reference 2048 --jump-share 0.5 --t-logit 0 1.6 \
    --optimizer muon --lr 1.5e-3 --lr-decay --beta2 0.99 --ema 0.995
end=$((end + 30))
part draw 60 python meanflow.py "$out/cifar/checkpoint.pt" --out "$out/cifar.png"
