#!/usr/bin/env bash
# Tests and times the CUDA path in at most ten minutes, without network.
#
#   bench/gpu.sh [--against NANOGPT] [--out DIR] [--dry]
#
#   --against NANOGPT  a nanoGPT checkout; its training step is timed interleaved with minidisp's
#   --out DIR          folder for the logs, the run and the report (default: runs/gpu-check)
#   --dry              check no numbers, use small sizes, take up to an hour: for an emulated GPU that computes nothing
#
# Every step has a time limit and a log; a failed step does not stop the next. Tests run in parallel, timings run alone.
# DIR/gpu.md has the name of the GPU, the result of each step, and the measurements.
# Exit code 0 if all steps passed, not counting those whose tool is not installed.
# PYTHON=... sets the interpreter (default: python).

set -uo pipefail

against=() out=runs/gpu-check dry=() collect=() half=50 all=100 model=gpt2-1024 tiny=() slower=1
sample=(--sample "def " --max-new-tokens 32)
while [ $# -gt 0 ]; do
  case $1 in
    --against) against=(--against "$(cd "${2:?--against needs a folder}" && pwd)") || exit 2; shift 2 ;;
    --out) out=${2:?--out needs a folder}; shift 2 ;;
    --dry)  # runs no tests; at most 8 steps, since ten NaN losses would end a run; small sizes, long time limits
      dry=(--dry) collect=(--collect-only) half=4 all=8 model=4x128 slower=6 sample=(); shift
      tiny=(--n-layer 2 --n-head 2 --n-embd 64 --block-size 64 --batch-size 4 --eval-tokens 1024) ;;
    *) sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; [ "$1" = --help ] && exit 0; exit 2 ;;
  esac
done
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python}
rm -rf "$out"/*.log "$out"/steps.tsv "$out"/gpu.md "$out"/run
ten_minutes=$((600 * slower))

step() {  # step NAME SECONDS COMMAND...: writes a log, and a line "name, result, seconds" to steps.tsv
  local name=$1 limit=$(($2 * slower)) start=$SECONDS result log=$out/$1.log
  shift 2
  [ "$limit" -gt $((ten_minutes - SECONDS)) ] && limit=$((ten_minutes - SECONDS))
  if [ "$limit" -lt 5 ]; then
    result="no time left"
  elif ! command -v "$1" > /dev/null; then
    result="skipped: $1 was not found"
  else
    echo "$name ..." >&2
    printf '%q ' "$@" > "$log"; echo >> "$log"
    timeout --kill-after=5 "$limit" "$@" >> "$log" 2>&1
    case $? in
      0) result=passed ;;
      124 | 137) result="FAILED: timed out after $limit s" ;;
      *) result="FAILED: $(tail -n 1 "$log" | cut -c 1-100)" ;;
    esac
  fi
  printf '%s\t%s\t%s\n' "$name" "$result" $((SECONDS - start)) >> "$out/steps.tsv"
  echo "$name: $result, $((SECONDS - start)) s" >&2
}

sanitize=(compute-sanitizer --error-exitcode 1)
kernels='regex:softmax_loss|measure|find_centre|centre_tokens|weigh_tiles|add_degrees|finish_tokens'
train=("$python" train.py --recipe gpt2 --out "$out/run" --dispersion 0.1 --eval-every "$half" --log-every "$half")
train+=(--device cuda ${tiny[@]+"${tiny[@]}"})

step build 240 "$python" bench/gpu.py build ${dry[@]+"${dry[@]}"}
step diagnosis 60 "$python" bench/gpu.py diagnosis ${dry[@]+"${dry[@]}"}

# One process, since there is one GPU, and without options that need pytest-xdist.
step tests 120 "$python" -m pytest -q -o addopts= tests/test_ops.py -k cuda ${collect[@]+"${collect[@]}"} &
step checks 120 "$python" bench/gpu.py check ${dry[@]+"${dry[@]}"} &
for tool in memcheck initcheck racecheck synccheck; do
  step "$tool" 100 "${sanitize[@]}" --tool "$tool" "$python" bench/gpu.py small ${dry[@]+"${dry[@]}"} &
done
step strips 100 "${sanitize[@]}" "$python" bench/gpu.py strips ${dry[@]+"${dry[@]}"} &
step train 120 "${train[@]}" --max-steps "$half"
step resume 60 "${train[@]}" --max-steps "$all" --resume
step evaluate 60 "$python" eval.py "$out/run" --device cuda ${sample[@]+"${sample[@]}"}
wait

step timing 90 "$python" bench/gpu.py time ${dry[@]+"${dry[@]}"}
step steps 180 "$python" bench/train.py --device cuda --models "$model" --compile on ${against[@]+"${against[@]}"}
step profile 40 ncu --clock-control none --kernel-name "$kernels" --launch-count 14 --set basic \
  "$python" bench/gpu.py profile ${dry[@]+"${dry[@]}"}

"$python" bench/gpu.py page "$out" || exit 1
! grep -qE $'\t(FAILED|no time)' "$out/steps.tsv"
