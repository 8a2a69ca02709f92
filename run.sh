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

fail() {
    echo "error: $*" >&2
    exit 1
}

# Install requirement files into .venv, again only when their content has changed. Python compiles a
# module when it imports it: to compile all that is installed would take half a minute.
setup() {
    local stamp=$venv/.installed python=${PYTHON:-python3} file changed=()
    if [ ! -x "$venv/bin/python" ]; then
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
            fail "Python 3.10 or newer is needed; PYTHON=/path/to/python3 bash run.sh uses another one"
        echo "creating $venv"
        "$python" -m venv "$venv" || fail "cannot create $venv; on Debian: apt install python3-venv"
    fi
    for file in "$@"; do
        grep -qsxF "$(cksum <"$file")" "$stamp" || changed+=("$file")
    done
    [ ${#changed[@]} -gt 0 ] || return 0
    echo "installing ${changed[*]}"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile \
        "${changed[@]/#/--requirement=}" ||
        fail "cannot install ${changed[*]}; is the package index reachable?"
    for file in "${changed[@]}"; do
        cksum <"$file" >>"$stamp"
    done
}

# Export the KEY=VALUE lines of a file, but no key that is set already. Keys match one pattern and not
# the other. PRESET_BASE names a preset that holds for all other keys.
load() { # FILE PATTERN [OTHER_PATTERN]
    local line key base=
    while IFS= read -r line || [ -n "$line" ]; do
        line=${line%%#*}
        line=${line%"${line##*[![:space:]]}"}
        [ -n "$line" ] || continue
        key=${line%%=*}
        [[ $line == *=* && $key =~ ^[A-Z][A-Z0-9_]*$ ]] || fail "$1: not KEY=VALUE: $line"
        case $key in
        PRESET_BASE) base=${line#*=} ;;
        TEACHER_PRESET) ;;
        *) [[ $key != $2 || $key == @(${3-}) || -n ${!key+set} ]] || export "$key=${line#*=}" ;;
        esac
    done <"$1"
    [ -z "$base" ] || load "$root/presets/$base.env" "$2" "${3-}"
}

# Stop if this machine has a GPU that torch cannot use: training on the CPU would take days.
refuse_unused_gpu() {
    local driver
    [[ ${DEVICE:-} != cpu && ${CUDA_VISIBLE_DEVICES-all} != @(|-1) ]] || return 0
    nvidia-smi -L 2>/dev/null | grep -q '^GPU' || [ -e /dev/nvidia0 ] || return 0
    driver=$(nvidia-smi 2>/dev/null | sed -n 's/.*CUDA Version: *\([0-9.]*\).*/\1/p') || true
    fail "this machine has a GPU, but torch cannot use it. The driver supports CUDA" \
        "${driver:=(see nvidia-smi)}, torch is built $1. Install a torch build for CUDA $driver or" \
        "older into $venv (see pytorch.org), or a newer driver. DEVICE=cpu trains on the CPU."
}

# Run the training, then say what can be done with its folder. SIGTERM and SIGHUP go on to it; Ctrl-C
# reaches it from the terminal.
train() {
    local status=0 code interrupted=1 child folder
    # The script would choose this name itself. RESUME=1 asks for the name of a run.
    [ -n "${RUN_ID:-}${RESUME:-}" ] || export RUN_ID=$(date +%Y%m%d-%H%M%S)
    trap 'interrupted=1' INT
    trap 'interrupted=1; kill -TERM "$child"' TERM
    trap 'interrupted=1; kill -HUP "$child"' HUP
    (trap - INT TERM HUP && exec "$@") &
    child=$!
    while [ $interrupted = 1 ]; do # a signal interrupts `wait`
        interrupted=0 code=0
        wait "$child" || code=$?
        # -1, 127 and 255: the script ended as the signal came, and bash has lost its status.
        [[ $code == @(-1|127|255) ]] || status=$code
    done
    folder=$OUTPUT_DIR/${RUN_ID:-}
    if [[ $status = 0 && ${EVAL_ONLY:-0} != 1 && -f $folder/results.json ]]; then
        say_what_is_next "$folder"
    fi
    exit "$status"
}

say_what_is_next() { # FOLDER
    local python tools folder
    printf -v python %q "$venv/bin/python"
    printf -v tools %q "$root/tools"
    printf -v folder %q "$1"
    cat <<END

$python -m pip install -r $tools/requirements.txt  # once
$python $tools/report.py $folder --out report.html  # curves and tables on one page
$python $tools/sample.py $folder "PROMPT"  # text that the model writes
END
}

if [ "${1:-}" = test ]; then
    setup "$root/requirements.txt" "$root/tools/requirements.txt" "$root/tests/requirements.txt"
    cd "$root"
    # Two at a time; tests of one file share what they need, so one process runs the whole file. The
    # slow files come first (tests/conftest.py).
    exec "$venv/bin/python" -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder tests "${@:2}"
fi

setup "$root/requirements.txt"

# The GPUs that torch can use, its build, and the settings that published variables such as
# SELECTIVE_FREEZE=1 stand for: a preset must not set them, nor any MAP_* beside another MAP_BASIS.
{ read -r gpus built && read -r published; } < <(cd "$root" && "$venv/bin/python" -W ignore -c '
import os, torch, train_gpt
given = {name: os.environ.get(name.upper(), "") for name in train_gpt.ALIASES}
names = train_gpt.expand_aliases({name: text for name, text in given.items() if text}, [])
names |= {"map_*": ""} if "map_basis" in names else {}
built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
print(torch.cuda.device_count() if torch.cuda.is_available() else 0, built)
print("|".join(names).upper())') || fail "$venv/bin/python cannot use torch and $root/train_gpt.py"
[ "${DEVICE:-}" != cpu ] || gpus=0
[ "$gpus" -gt 0 ] || refuse_unused_gpu "$built"

# The arguments: a preset, or files of text.
preset=${PRESET:-random_adapters} texts=()
for word in "$@"; do
    if [[ $word == *.env || (! -e $word && -f $root/presets/$word.env) ]]; then
        preset=$word
    else
        texts+=("$word")
    fi
done
places=("$preset" "$root/$preset" "$root/presets/${preset%.env}.env")
[ "$gpus" -gt 0 ] || places=("${places[@]:0:2}" "$root/presets/cpu/${preset%.env}.env" "${places[2]}")
file=
for place in "${places[@]}"; do
    if [[ -z $file && $place == *.env && -f $place ]]; then file=$place; fi
done
[ -n "$file" ] || fail "no preset $preset; there are: $(cd "$root/presets" && echo *.env)"
echo "preset  $file"
export OUTPUT_DIR=${OUTPUT_DIR:-$root/runs}

# An artifact and a checkpoint bring their own settings.
if [ "${EVAL_ONLY:-0}" != 1 ] && [ "${EXPORT_ONLY:-0}" != 1 ]; then
    # Train the preset's teacher first, with the same variables, unless there is an artifact of one.
    teacher=$(sed -n 's/^TEACHER_PRESET=//p' "$file")
    if [ -n "$teacher" ] && [ -z "${DISTILL_FROM:-}" ]; then
        name=${RUN_ID:-$(date +%Y%m%d-%H%M%S)}-teacher
        echo "teacher $teacher, run $name"
        [ -f "$OUTPUT_DIR/$name/results.json" ] ||
            RUN_ID=$name bash "$root/run.sh" "presets/$teacher.env" "${texts[@]}"
        export DISTILL_FROM=$OUTPUT_DIR/$name/model.int6.ptz
    fi
    load "$file" '*' "$published"
fi

# A checkpoint, a run that continues, and an artifact beside its results bring their data.
has_data=0
if [ "${EVAL_ONLY:-0}" = 1 ]; then
    [ ! -f "$(dirname "${MODEL_PATH:-}")/results.json" ] || has_data=1
elif [ "${EXPORT_ONLY:-0}" = 1 ] || [ -f "$OUTPUT_DIR/${RUN_ID:-}/checkpoint.pt" ]; then
    has_data=1
fi

# The data: the given text, else DATA_PATH, else the English text that comes with Python.
if [ ${#texts[@]} -gt 0 ]; then
    [ -z "${DATA_PATH:-}" ] || fail "DATA_PATH and ${texts[0]} are two datasets; unset one"
    output=$("$venv/bin/python" "$root/data/prepare.py" text "${texts[@]}" \
        ${VOCAB_SIZE:+--vocab "$VOCAB_SIZE"} ${TOKENIZER_PATH:+--tokenizer "$TOKENIZER_PATH"})
    echo "$output"
    DATA_PATH=${output##*$'\n'}                     # the last line
    DATA_PATH=${DATA_PATH%: [0-9]* training and *} # begins with the folder
elif [ -z "${DATA_PATH:-}" ] && [ $has_data = 0 ]; then
    DATA_PATH=$root/data/datasets/docs_sp${VOCAB_SIZE:=1024}
    [ -f "$DATA_PATH/manifest.json" ] ||
        "$venv/bin/python" "$root/data/prepare.py" docs --vocab "$VOCAB_SIZE"
fi
[ -z "${DATA_PATH:-}" ] || export DATA_PATH
if [ -f "${DATA_PATH:-}/manifest.json" ]; then # it names the tokenizer that made the shards
    read -r vocab tokenizer < <("$venv/bin/python" -c '
import json, sys
manifest = json.load(open(sys.argv[1]))
print(manifest["vocab_size"], manifest["tokenizer"])' "$DATA_PATH/manifest.json")
    export VOCAB_SIZE=${VOCAB_SIZE:-$vocab} TOKENIZER_PATH=${TOKENIZER_PATH:-$DATA_PATH/$tokenizer}
fi
echo "data    ${DATA_PATH:-that of the run}"

if [ "$gpus" -gt 0 ]; then
    echo "device  $gpus CUDA GPU(s), one process per GPU"
    train "$venv/bin/python" -m torch.distributed.run --standalone --nproc_per_node="$gpus" \
        "$root/train_gpt.py"
fi
echo "device  CPU, $(nproc) cores"
load "$root/tools/memory.env" '*'
train "$venv/bin/python" "$root/train_gpt.py"
