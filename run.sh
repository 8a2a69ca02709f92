#!/usr/bin/env bash
# Train, export and evaluate in one command. The first time it also sets up .venv.
#
#   bash run.sh                    the default: a full model on GPUs, a small one on a CPU
#   bash run.sh book.txt           on your own text (all that `data/prepare.py text` takes)
#   PRESET=mask bash run.sh        another preset of presets/, or of presets/cpu/ on a CPU
#   bash run.sh presets/mask.env   exactly this file
#   bash run.sh test               run the tests
#
# A variable that you set wins over the preset: NUM_LAYERS=6 bash run.sh
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=$root/.venv
python=$venv/bin/python

fail() {
    echo "error: $*" >&2
    exit 1
}

# Install requirement files into .venv, again only when their content has changed. Python compiles a
# module when it imports it: to compile all that is installed would take half a minute.
setup() {
    local stamp=$venv/.installed system=${PYTHON:-python3} file changed=()
    if [ ! -x "$python" ]; then
        "$system" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
            fail "Python 3.10 or newer is needed; PYTHON=/path/to/python3 bash run.sh uses another one"
        echo "creating $venv"
        "$system" -m venv --clear "$venv" || {
            rm -rf "$venv" # or the next start would take it for a whole one
            fail "cannot create $venv; on Debian: apt install python3-venv"
        }
    fi
    for file in "$@"; do
        grep -qsxF "$(cksum <"$file")" "$stamp" || changed+=("$file")
    done
    [ ${#changed[@]} -gt 0 ] || return 0
    echo "installing ${changed[*]}"
    "$python" -m pip install --quiet --disable-pip-version-check --no-compile \
        "${changed[@]/#/--requirement=}" ||
        fail "cannot install ${changed[*]}; is the package index reachable?"
    for file in "${changed[@]}"; do
        cksum <"$file" >>"$stamp"
    done
}

if [ "${1:-}" = test ]; then
    setup "$root/requirements.txt" "$root/tools/requirements.txt" "$root/tests/requirements.txt"
    cd "$root"
    # Two at a time; tests of one file share what they need, so one process runs the whole file.
    exec "$python" -m pytest -q -n 2 --dist loadfile "${@:2}"
fi

setup "$root/requirements.txt"

# The arguments: a preset, or files of text.
texts=()
for word in "$@"; do
    if [[ $word == *.env || (! -e $word && -f $root/presets/$word.env) ]]; then
        [[ ${PRESET:-$word} = "$word" ]] || fail "$PRESET and $word are two presets; name one"
        export PRESET=$word
    else
        texts+=("$word")
    fi
done
export OUTPUT_DIR=${OUTPUT_DIR:-$root/runs}

# An artifact, a checkpoint and a run that continues bring their settings and data; the data of an
# artifact are known beside the results of its run.
trains=1 brings_data=0
if [ "${EVAL_ONLY:-0}" = 1 ]; then
    trains=0
    [ ! -f "$(dirname "${MODEL_PATH:-}")/results.json" ] || brings_data=1
elif [ "${EXPORT_ONLY:-0}" = 1 ]; then
    trains=0 brings_data=1
elif [[ -n ${RUN_ID:-} && ( -f $OUTPUT_DIR/$RUN_ID/checkpoint.pt ||
    -f $OUTPUT_DIR/$RUN_ID/checkpoint.previous.pt ) ]]; then
    brings_data=1
else
    export PRESET=${PRESET:-random_adapters}
fi
[[ $trains = 1 || -z ${PRESET:-} ]] ||
    fail "PRESET=$PRESET: an artifact and a checkpoint bring their own settings; name no preset"
echo "preset  ${PRESET:-that of the run}"

# A GPU that torch cannot use ends here: training on the CPU would take days.
IFS=, read -r gpus vocabulary teacher < <("$python" -W ignore "$root/train_gpt.py" --plan) || exit 1
if [[ $gpus = 0 && ${DEVICE:-} != cpu && ${CUDA_VISIBLE_DEVICES-all} != @(|-1) ]] &&
    nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then
    fail "this machine has a GPU, but torch cannot use it. nvidia-smi names the CUDA version of the" \
        "driver: install a torch build for that or an older one into $venv (see pytorch.org), or a" \
        "newer driver. DEVICE=cpu trains on the CPU."
fi

# Train the preset's teacher first, with the same variables, unless there is an artifact of one.
if [[ $trains = 1 && -n $teacher && -z ${DISTILL_FROM:-} ]]; then
    export RUN_ID=${RUN_ID:-$(date +%Y%m%d-%H%M%S)}
    folder=$OUTPUT_DIR/$RUN_ID-teacher
    if [ -f "$folder/results.json" ]; then
        echo "teacher $teacher: $folder is there already, with"
        grep -E '"(model|dataset|seed)":' "$folder/results.json"
    else
        echo "teacher $teacher, run $RUN_ID-teacher"
        PRESET=$teacher RUN_ID=$RUN_ID-teacher bash "$root/run.sh" "${texts[@]}"
    fi
    export DISTILL_FROM=$folder/model.int6.ptz
fi

# The data: the given text, else DATA_PATH, else the English text that comes with Python.
if [ ${#texts[@]} -gt 0 ]; then
    [ -z "${DATA_PATH:-}" ] || fail "DATA_PATH and ${texts[0]} are two datasets; unset one"
    output=$("$python" "$root/data/prepare.py" text "${texts[@]}" \
        ${vocabulary:+--vocab "$vocabulary"} ${TOKENIZER_PATH:+--tokenizer "$TOKENIZER_PATH"})
    echo "$output"
    DATA_PATH=${output##*$'\n'}                            # the last line
    export DATA_PATH=${DATA_PATH%: [0-9]* training and *} # begins with the folder
elif [[ -z ${DATA_PATH:-} && $brings_data = 0 ]]; then
    export DATA_PATH=$root/data/datasets/docs_sp${vocabulary:=1024}
    [ -f "$DATA_PATH/manifest.json" ] ||
        "$python" "$root/data/prepare.py" docs --vocab "$vocabulary"
fi
echo "data    ${DATA_PATH:-those of the run}"

if [ "$gpus" -gt 0 ]; then
    echo "device  $gpus CUDA GPU(s), one process per GPU"
    exec "$python" -m torch.distributed.run --standalone --nproc_per_node="$gpus" \
        "$root/train_gpt.py"
fi
echo "device  CPU, $(nproc) cores"
while IFS='=' read -r key value; do # keep freed memory in the process
    [[ $key != [A-Z]* || -n ${!key+set} ]] || export "$key=$value"
done <"$root/tools/memory.env"
exec "$python" "$root/train_gpt.py"
