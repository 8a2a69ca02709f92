#!/usr/bin/env bash
# bash bench/gpu.sh                     everything worth measuring in nine minutes on one GPU
# bash bench/gpu.sh tests sides         these parts alone; --list names them
# OUT=DIR         folder for the results (bench/results/gpu); every result is there as soon as it exists
# LIMIT=SECONDS   time for all parts (540); the comparison gets what the others leave
# BOOKS=DIR       shards of a real corpus for the comparison; or a folder with books_train.jsonl.xz,
#                 val4.jsonl.xz and sp1024_bpe.model, from which they are made
# WHEELS=DIR      wheels of packages that are missing, where there is no network
# JOBS=8          runs of the comparison at the same time;  SEEDS=1
# PAUSE=PID       another process that stands still while a side is timed
# SMOKE=1         tiny sizes: shows that the parts run
# A part that fails does not stop the others.
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
out=${OUT:-$root/bench/results/gpu}
limit=${LIMIT:-540}
parts="run tests sides comparison"

if [ "${1:-}" = --list ]; then
    echo "run         the main job: 25 steps of the full configuration, export, evaluation"
    echo "tests       the tests that need a GPU"
    echo "sides       the step, its switches, evaluation and export, timed one by one:"
    "$python" "$root/bench/sides.py" --list | sed 's/^/              /'
    echo "comparison  bench/comparison.plan at 12 M tokens"
    cat "$out/seconds.txt" 2>/dev/null
    exit
fi
[ $# -eq 0 ] || parts="$*"
mkdir -p "$out"

for package in numpy sentencepiece brotli psutil; do
    if ! "$python" -c "import $package" 2>/dev/null; then
        if [ -z "${WHEELS:-}" ]; then
            echo "error: $package is missing; WHEELS=DIR names a folder with its wheel" >&2
            exit 1
        fi
        "$python" -m pip install -q --no-index --no-deps --target "$out/../site" "$WHEELS/$package"*.whl
        export PYTHONPATH=$out/../site${PYTHONPATH:+:$PYTHONPATH}
    fi
done

# Runs a part in the time that is left and notes how long it took.
part() {
    local name=$1 began=$SECONDS
    shift
    timeout -s INT -k 20 "$((limit - SECONDS > 5 ? limit - SECONDS : 5))" "$@" >"$out/$name.log" 2>&1
    echo "$name: exit code $?, $((SECONDS - began)) s" | tee -a "$out/seconds.txt"
}

run_main() {
    local data=$root/data/datasets/docs_sp1024
    [ -f "$data/manifest.json" ] || "$python" "$root/data/prepare.py" docs --vocab 1024
    DATA_PATH=$data TOKENIZER_PATH=$root/data/tokenizers/docs_1024_bpe.model OUTPUT_DIR=$out/runs RUN_ID=main \
        ITERATIONS=25 WARMUP_STEPS=3 TRAIN_BATCH_TOKENS=98304 TRAIN_LOG_EVERY=5 \
        "$python" -m torch.distributed.run --standalone --nproc_per_node=1 "$root/train_gpt.py"
    rm -f "$out"/runs/main/checkpoint*.pt
}

run_comparison() {
    local books=${BOOKS:-$root/data/datasets/books_sp1024}
    if [ -f "$books/books_train.jsonl.xz" ]; then
        "$python" "$root/data/prepare.py" --out /tmp/books text "$books/books_train.jsonl.xz" --name books \
            --val "$books/val4.jsonl.xz" --tokenizer "$books/sp1024_bpe.model"
        books=/tmp/books/datasets/books_sp1024
    fi
    exec "$python" "$root/tools/ablate.py" --out "$out/comparison" --plan "$root/bench/comparison.plan" \
        --seeds "${SEEDS:-1}" --budget tokens=12000000 --data "$books" --jobs "${JOBS:-8}" \
        TRAIN_BATCH_TOKENS=16384 MICRO_BATCH_TOKENS=16384 WARMDOWN_ITERS=400 WARMDOWN_FRAC=0 COMPILE=0 EVAL_STRIDE=128 \
        EVAL_BATCH_TOKENS=65536 CHECKPOINT_SECONDS=0 HOLDOUT_TOKENS=262144
}
export -f run_main run_comparison
export root python out

# The comparison runs beside everything else and is stopped while a side is timed.
background=${PAUSE:-}
if [[ " $parts " == *" comparison "* ]]; then
    part comparison bash -c run_comparison &
    background=$!
fi
for name in $parts; do
    case $name in
    run) part run bash -c run_main ;;
    tests) part tests "$python" -m pytest -q -p no:cacheprovider -m gpu "$root/tests/test_gpu.py" ;;
    sides)
        part sides "$python" -u "$root/bench/sides.py" --out "$out" ${SMOKE:+--smoke} \
            --seconds "${SIDES_SECONDS:-240}" ${background:+--pause "$background"}
        ;;
    comparison) ;;
    *) echo "no such part: $name; --list names them" >&2 ;;
    esac
done
wait
for name in $parts; do
    echo "== $name"
    tail -n "${LINES_OF_LOG:-25}" "$out/$name.log"
done
