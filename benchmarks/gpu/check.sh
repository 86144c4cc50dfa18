#!/usr/bin/env bash
# All checks that need a GPU, within so many seconds, most useful first; each part in a process and a limit of its own.
#   bash benchmarks/gpu/check.sh [SECONDS (470)] [PART...]
# Results, log, profiles and tests are left in $OUT (logs/gpu-check), and the page that is made of them.
# CHECK_DEVICE=cpu CHECK_SIZE=storybook runs all that a CPU can. Without a network: wheels of what is missing,
# put in .whl/ (annotated-types, omegaconf, diffusers, ... of constraints.txt), are installed for this run alone.
cd "$(dirname "$0")/../.." || exit 1
total=${1:-470}; shift
root=$PWD temporary=$(mktemp -d)
trap 'rm -rf "$temporary"' EXIT
export OUT=${OUT:-$root/logs/gpu-check} HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
export TMPDIR=$temporary TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$temporary/inductor}
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$OUT"
if compgen -G '.whl/*.whl' >/dev/null; then
    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
        --target "$temporary/site" .whl/*.whl || exit 1
    export PYTHONPATH=$temporary/site:$PYTHONPATH
fi
python3 -c "import annotated_types, diffusers, omegaconf, pytest, pytorch_lightning, transformers" || exit 1
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader 2>/dev/null | tee -a "$OUT/log.txt"
limits="env:45 gpu_tests:70 agree:60 train:150 graph:60 sample:80 peer:150 syncs:60 micro:45 optimizer:30"
limits+=" caps:70 compiled:170 resume:80 whole:120 storybook_base:280"
[ $# -gt 0 ] && wanted=" $* " || wanted=""
for item in $limits; do
    part=${item%:*} limit=${item#*:}
    [ "$CHECK_DEVICE" = cpu ] && limit=$((10 * limit))
    [ -n "$wanted" ] && [[ $wanted != *" $part "* ]] && continue
    [ -z "$wanted" ] && [ "$part" = storybook_base ] && continue # the base is trained when it is asked for
    left=$((total - SECONDS))
    [ "$left" -lt 12 ] && { echo "no time left for $part" | tee -a "$OUT/log.txt"; continue; }
    [ "$limit" -gt "$left" ] && limit=$left
    echo "=== $part, at most $limit s, at $SECONDS s" | tee -a "$OUT/log.txt"
    if [ "$part" = gpu_tests ]; then
        timeout -k 5 "$limit" python3 -m pytest -q -m gpu -p no:cacheprovider $(grep -rl 'mark.gpu' tests) \
            >"$OUT/tests.txt" 2>&1
    elif [ "$part" = storybook_base ]; then
        timeout -k 5 "$limit" python3 -m benchmarks.gpu.check "$part" --seconds $((limit - 10)) >>"$OUT/log.txt" 2>&1
    else
        timeout -k 5 "$limit" python3 -m benchmarks.gpu.check "$part" >>"$OUT/log.txt" 2>&1
    fi
    status=$?
    [ $status -ne 0 ] && echo "$part ended with $status" | tee -a "$OUT/log.txt"
done
tail -c 1500 "$OUT/tests.txt" 2>/dev/null
cut -c1-420 "$OUT/results.jsonl"
python3 -m benchmarks.gpu.page "$OUT/results.jsonl" --out "$OUT"
