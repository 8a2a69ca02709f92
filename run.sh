#!/usr/bin/env bash
# bash run.sh                    set up, then train, export and evaluate: the full model on GPUs, a small one on a CPU
# PRESET=NAME bash run.sh        another preset; where there is no GPU, its small twin in presets/cpu
# bash run.sh presets/NAME.env   that very file
# bash run.sh test               set up, then run the tests
# Variables that are set win over the preset: ITERATIONS=50 bash run.sh
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=$root/.venv

fail() {
    echo "error: $*" >&2
    exit 1
}

# Installs the given requirement files into .venv, once for each content of them.
setup() {
    local stamp=$venv/.installed python=${PYTHON:-python3}
    if [ ! -x "$venv/bin/python" ]; then
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
            fail "needs Python 3.10 or newer; PYTHON=/path/to/python3 bash run.sh names another one"
        echo "making $venv"
        "$python" -m venv "$venv" || fail "could not make $venv; on Debian: apt install python3-venv"
    fi
    local file key
    for file in "$@"; do
        key=$(cksum <"$file")
        if ! grep -qsxF "$key" "$stamp"; then
            echo "installing $(tr '\n' ' ' <"$file")"
            "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$file" ||
                fail "could not install ${file#"$root/"}; is the package index reachable?"
            echo "$key" >>"$stamp"
        fi
    done
}

# Exports the settings of a preset, KEY=VALUE a line, but for those that are set already. PRESET_BASE names a preset
# that holds where this one is silent. A published switch takes the place of its map table; what does not match
# $taken is left out.
load_preset() {
    local line key base=
    while IFS= read -r line || [ -n "$line" ]; do
        line=${line%%#*}
        line=${line%"${line##*[![:space:]]}"}
        [ -n "$line" ] || continue
        key=${line%%=*}
        [[ $line == *=* && $key =~ ^[A-Z][A-Z0-9_]*$ ]] || fail "$1: this line is not KEY=VALUE: $line"
        case $key in
        PRESET_BASE) base=${line#*=} ;;
        TEACHER_PRESET) ;;
        *) [[ $key != $taken || -n ${!key+set} || (-n $switch && $key == MAP_*) ]] || export "$key=${line#*=}" ;;
        esac
    done <"$1"
    [ -z "$base" ] || load_preset "$root/presets/$base.env"
}

if [ "${1:-}" = test ]; then
    setup "$root/requirements.txt" "$root/tests/requirements.txt"
    cd "$root"
    # Two at a time, each file by one of them: what its tests share is made once.
    exec "$venv/bin/python" -m pytest -q -n 2 --dist loadfile tests "${@:2}"
fi

# The preset: the argument, else PRESET, else what suits the machine.
setup "$root/requirements.txt"
gpus=$("$venv/bin/python" -c 'import torch; print(torch.cuda.device_count())')
if [ -n "${1:-}" ]; then
    preset=$1 why="named on the command line"
elif [ -n "${PRESET:-}" ]; then
    preset=$PRESET why="PRESET names it"
else
    preset=random_adapters why="the default"
fi
places=("$preset" "$root/$preset" "$root/presets/${preset%.env}.env")
[ "$gpus" -gt 0 ] || places=("$preset" "$root/$preset" "$root/presets/cpu/${preset%.env}.env" "${places[2]}")
found=
for file in "${places[@]}"; do
    if [[ -z $found && $file == *.env && -f $file ]]; then found=$file; fi
done
[ -n "$found" ] || fail "no preset $preset; there are: $(cd "$root/presets" && echo *.env)"
export OUTPUT_DIR=${OUTPUT_DIR:-$root/runs}

# A preset with a teacher: that is trained first, with the same variables, unless DISTILL_FROM names one.
teacher=$(sed -n 's/^TEACHER_PRESET=//p' "$found")
if [ -n "$teacher" ] && [ -z "${DISTILL_FROM:-}" ]; then
    name=${RUN_ID:-$(date +%Y%m%d-%H%M%S)}-teacher
    echo "teacher $teacher, run $name"
    [ -f "$OUTPUT_DIR/$name/submission.json" ] || RUN_ID=$name bash "$root/run.sh" "presets/$teacher.env"
    export DISTILL_FROM=$OUTPUT_DIR/$name/model.int6.ptz
fi
switch=
for key in USE_RANDOM_ADAPTERS RANDOM_BASIS_ENABLED SELECTIVE_FREEZE PROGRESSIVE_FREEZE_FRAC RAND_PROJ_LAYERS; do
    switch+=${!key-}
done
# An artifact brings its model, a checkpoint its whole run: of the preset they take how to score, or what fits.
taken=*
[ "${EVAL_ONLY:-0}" != 1 ] || taken='@(EVAL_*|DTYPE|COMPILE)'
[ "${EXPORT_ONLY:-0}" != 1 ] || taken='@(EVAL_BATCH_TOKENS|COMPILE)'
load_preset "$found"

# The data: DATA_PATH, else the English that comes with Python.
if [ -z "${DATA_PATH:-}" ]; then
    export DATA_PATH=$root/data/datasets/docs_sp${VOCAB_SIZE:=1024}
    export TOKENIZER_PATH=${TOKENIZER_PATH:-$root/data/tokenizers/docs_${VOCAB_SIZE}_bpe.model} VOCAB_SIZE
    data_why="DATA_PATH is not set; data/prepare.py makes others"
    [ -f "$DATA_PATH/manifest.json" ] || "$venv/bin/python" "$root/data/prepare.py" docs --vocab "$VOCAB_SIZE"
else
    data_why="DATA_PATH names it"
    manifest=$DATA_PATH/manifest.json
    if [ -z "${TOKENIZER_PATH:-}" ] && [ -f "$manifest" ]; then # data/prepare.py says which tokenizer made them
        entry='import json, sys; print(json.load(open(sys.argv[1]))[sys.argv[2]])'
        export TOKENIZER_PATH=$DATA_PATH/$("$venv/bin/python" -c "$entry" "$manifest" tokenizer)
        export VOCAB_SIZE=${VOCAB_SIZE:-$("$venv/bin/python" -c "$entry" "$manifest" vocab_size)}
    fi
fi

echo "preset $found ($why)"
echo "data   $DATA_PATH ($data_why)"
if [ "$gpus" -gt 0 ]; then
    echo "device $gpus CUDA GPU(s), one process each"
    exec "$venv/bin/python" -m torch.distributed.run --standalone --nproc_per_node="$gpus" "$root/train_gpt.py"
fi
echo "device CPU, $(nproc) cores (torch sees no CUDA GPU)"
# glibc gives freed memory back to the kernel, which then clears each large activation anew: that costs more than
# the arithmetic on it. These two keep it, the third asks for huge pages (bench/cpu.py).
export MALLOC_MMAP_MAX_=${MALLOC_MMAP_MAX_-0} MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_-2147483647}
export GLIBC_TUNABLES=${GLIBC_TUNABLES-glibc.malloc.hugetlb=1}
exec "$venv/bin/python" "$root/train_gpt.py"
