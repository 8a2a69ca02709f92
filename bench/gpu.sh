#!/usr/bin/env bash
# bash bench/gpu.sh                 what is worth measuring on one GPU, one part after the other
# bash bench/gpu.sh tests speed     these parts alone; --list names them
# OUT=DIR         folder for the results (bench/results/gpu); a part's log grows while it runs
# LIMIT=SECONDS   time for all parts (540); the last one, the comparison, gets what is left
# BOOKS=DIR       shards of a real corpus for the comparison; or a folder with books_train.jsonl.xz,
#                 val4.jsonl.xz and sp1024_bpe.model, from which they are made
# JOBS=8          runs of the comparison at the same time;  SEEDS=1
# SMOKE=1         tiny sizes, also on a CPU: shows that the parts run
# A part that fails does not stop the others.
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
out=${OUT:-$root/bench/results/gpu}
limit=${LIMIT:-540}
smoke=${SMOKE:+--smoke}
parts="run tests speed comparison"

if [ "${1:-}" = --list ]; then
    echo "run         the main job: 25 steps of the full configuration, export, evaluation"
    echo "tests       the tests that need a GPU"
    echo "speed       every subcommand of bench/speed.py"
    echo "comparison  bench/comparison.plan at 12 M tokens"
    exit
fi
[ $# -eq 0 ] || parts="$*"
mkdir -p "$out"

run_main() {
    local data=$root/data/datasets/docs_sp1024 tokenizer=$root/data/tokenizers/docs_1024_bpe.model
    [ -f "$data/manifest.json" ] || "$python" "$root/data/prepare.py" docs --vocab 1024
    local size="ITERATIONS=25 WARMUP_STEPS=3 TRAIN_BATCH_TOKENS=98304 TRAIN_LOG_EVERY=5"
    [ -z "$smoke" ] || size="ITERATIONS=3 WARMUP_STEPS=1 TRAIN_BATCH_TOKENS=512 TRAIN_SEQ_LEN=128 NUM_LAYERS=2
        MODEL_DIM=64 NUM_HEADS=4 NUM_KV_HEADS=2 HOLDOUT_TOKENS=1024 EVAL_SEQ_LEN=128 EVAL_STRIDE=128 GPTQ_CALIB_BATCHES=1"
    rm -rf "$out/runs/main" # of an earlier call
    # shellcheck disable=SC2086  # words of a list
    env DATA_PATH="$data" TOKENIZER_PATH="$tokenizer" OUTPUT_DIR="$out/runs" RUN_ID=main $size \
        "$python" -m torch.distributed.run --standalone --nproc_per_node=1 "$root/train_gpt.py"
    rm -f "$out"/runs/main/checkpoint*.pt
}

run_speed() {
    local command status=0
    for command in step eval export kernels start; do
        "$python" -u "$root/bench/speed.py" "$command" $smoke || status=1
    done
    return "$status"
}

run_comparison() {
    local books=${BOOKS:-$root/data/datasets/books_sp1024}
    if [ -f "$books/books_train.jsonl.xz" ]; then
        "$python" "$root/data/prepare.py" text "$books/books_train.jsonl.xz" --out "$out/books" --name books \
            --val "$books/val4.jsonl.xz" --tokenizer "$books/sp1024_bpe.model"
        books=$out/books/datasets/books_sp1024
    fi
    [ -z "$smoke" ] || books=${BOOKS:-$root/data/datasets/docs_sp1024}
    local plan=comparison tokens=12000000 batch=16384 warmdown=400
    [ -z "$smoke" ] || plan=narrow tokens=2048 batch=1024 warmdown=1
    "$python" "$root/tools/ablate.py" --out "$out/comparison" --plan "$root/bench/$plan.plan" \
        --seeds "${SEEDS:-1}" --budget "tokens=$tokens" --data "$books" --jobs "${JOBS:-8}" \
        "TRAIN_BATCH_TOKENS=$batch" "MICRO_BATCH_TOKENS=$batch" "WARMDOWN_ITERS=$warmdown" WARMDOWN_FRAC=0 MUON_MOMENTUM=0.99 \
        COMPILE=0 EVAL_STRIDE=128 EVAL_BATCH_TOKENS=65536 CHECKPOINT_SECONDS=0 HOLDOUT_TOKENS=262144
}

for name in $parts; do
    case $name in
    run) command=run_main ;;
    tests) command='"$python" -m pytest -q -p no:cacheprovider -m gpu "$root/tests/test_gpu.py"' ;;
    speed) command=run_speed ;;
    comparison) command=run_comparison ;;
    *) echo "no such part: $name; --list names them" >&2 && continue ;;
    esac
    began=$SECONDS
    left=$((limit - SECONDS > 5 ? limit - SECONDS : 5))
    export -f run_main run_speed run_comparison
    export root python out smoke
    timeout -s INT -k 20 "$left" bash -ec "$command" >"$out/$name.log" 2>&1
    echo "$name: exit code $?, $((SECONDS - began)) s, log in $out/$name.log"
done
