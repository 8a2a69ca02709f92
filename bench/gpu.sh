#!/usr/bin/env bash
# bash bench/gpu.sh                  all measurements of a GPU, into gpu.md in OUT (bench/results/gpu)
# bash bench/gpu.sh step roofline    these alone
# OUT=DIR: another folder. WHEELS=DIR: wheels of what is missing, where there is no network. PYTHON=python3.
# SMOKE=1: tiny sizes. It needs no data: where there is neither DATA_PATH nor data/datasets/docs_sp1024 the text is
# made up. The file grows program by program; what goes wrong stands in gpu.err.
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
out=${OUT:-$root/bench/results/gpu}
mkdir -p "$out"

for package in numpy sentencepiece brotli; do
    if ! "$python" -c "import $package" 2>/dev/null; then
        if [ -z "${WHEELS:-}" ]; then
            echo "error: $package is missing; WHEELS=DIR names a folder with its wheel" >&2
            exit 1
        fi
        "$python" -m pip install --quiet --no-index --find-links "$WHEELS" "$package" || exit 1
    fi
done

failed=0
[ $# -gt 0 ] || set -- kernels step roofline eval export start scaling
for program in "$@"; do
    began=$SECONDS
    command=("$python" -u "$root/bench/$program.py" ${SMOKE:+--smoke})
    if ! "${command[@]}" 2>>"$out/gpu.err" | tee -a "$out/gpu.md"; then
        echo "$program.py failed:" | tee -a "$out/gpu.md"
        tail -n 20 "$out/gpu.err" | tee -a "$out/gpu.md"
        failed=1
    fi
    echo "$program.py: $((SECONDS - began)) s" >&2
done
exit $failed
