#!/usr/bin/env bash
# Measures Octavo on one GPU, section by section, and reports beside the bar (bar.json).
#
#   benchmarks/gpu/run.sh all|SECTION …   sections: checks offline-8b offline-0.6b fp8 awq lora fp8-70b startup served long report
#
# Run it from anywhere, with python3, torch and triton there; Octavo is taken from src/ of this checkout. Each section
# is one call of at most nine minutes; it appends rows to $OUT_DIR/gpu-rows.jsonl. `report` makes the table and the
# graph of all sections, or of those in $REPORT_SECTIONS, and fails if a row is missing. A section that fails does not
# keep the next one from running; the exit status is then 1, and only what it had finished by then is recorded.
#
#   OUT_DIR       benchmarks/results    where rows and reports go
#   MODELS        benchmarks/gpu/models folder of models with config.json alone; weights are random
#   SERVED_MODEL  (served needs it)     folder with config.json of llama3-8b and a tokenizer
#   CHECK_MODEL   (checks needs it)     a small real model: a .gguf file or a folder
#   KWARGS        {}                    JSON of further LLM() arguments for the offline sections
#   SERVE_FLAGS   (none)                further flags of octavo serve
#   RATES         10,30,inf             requests a second of the served section
#   REPEAT        2                     runs of each workload
#   GIT_COMMIT    (from git)            the commit, where git does not know it
#   LIMIT_S       540                   seconds a section may take
set -u
root=$(cd "$(dirname "$0")/../.." && pwd)
cd "$root" || exit 1
export PYTHONPATH="$root/src${PYTHONPATH:+:$PYTHONPATH}"
gpu=benchmarks/gpu
out=${OUT_DIR:-benchmarks/results}
models=${MODELS:-$gpu/models}
limit=${LIMIT_S:-540}
kwargs=${KWARGS:-"{}"}
repeat=${REPEAT:-2}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir -p "$out"

# shown WORD…: a command as it would be typed.
shown() {
  local word line=
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./,=:+-]+$ ]] || word="'$word'"
    line+=" $word"
  done
  echo "${line# }"
}

# record SECTION FILE COMMAND…: add what the command wrote to FILE, if it got that far.
record() {
  local section=$1 file=$2
  shift 2
  [ -s "$file" ] || return 1
  python3 $gpu/rows.py --section "$section" --command "$(shown "$@")" --out "$out/gpu-rows.jsonl" "$file"
}

# measure SECTION COMMAND…: run the command, which writes its rows to the file after its --out; then record them.
measure() {
  local section=$1 file="$scratch/$1.jsonl" status=0
  shift
  echo "== $section: $(shown "$@")"
  timeout -k 20 "$limit" "$@" --out "$file" || status=$?
  record "$section" "$file" "$@" && return "$status"
}

# offline SECTION MODEL WORKLOADS KWARGS [REPEAT]: one process, so that the start is paid once.
offline() {
  measure "$1" python3 benchmarks/gpu_workloads.py --package octavo --model "$models/$2" --workloads "$3" \
    --kwargs "$4" --repeat "${5:-$repeat}"
}

# with KEY VALUE: $kwargs with one more entry.
with() {
  python3 -c 'import json, sys; print(json.dumps({**json.loads(sys.argv[1]), sys.argv[2]: sys.argv[3]}))' "$kwargs" "$@"
}

# served takes its flags after "--", so --out comes before them.
served() {
  local file="$scratch/served.jsonl" status=0
  local -a flags=() command
  [ -z "${SERVE_FLAGS:-}" ] || read -r -a flags <<<"$SERVE_FLAGS"
  command=(python3 $gpu/served.py --model "${SERVED_MODEL:?names a folder with config.json and a tokenizer}"
    --rates "${RATES:-10,30,inf}" --seconds 20)
  echo "== served: $(shown "${command[@]}" -- ${flags[@]+"${flags[@]}"})"
  timeout -k 20 "$limit" "${command[@]}" --out "$file" -- ${flags[@]+"${flags[@]}"} || status=$?
  record served "$file" "${command[@]}" -- ${flags[@]+"${flags[@]}"} && return "$status"
}

# checks: what one leaves of the time is the next one's.
checks() {
  local end=$((SECONDS + limit)) status=0
  : "${CHECK_MODEL:?names a .gguf file or a folder}"
  timeout -k 20 "$limit" python3 $gpu/check_quantized.py || status=1
  timeout -k 20 $((end > SECONDS ? end - SECONDS : 1)) python3 $gpu/checks.py --model "$CHECK_MODEL" || status=1
  timeout -k 20 $((end > SECONDS ? end - SECONDS : 1)) python3 $gpu/storm.py --model "$CHECK_MODEL" || status=1
  return $status
}

section() {
  case $1 in
    checks) (checks) ;;
    offline-8b) offline "$1" llama3-8b mixed,uniform,prefix,latency "$kwargs" ;;
    offline-0.6b) offline "$1" qwen3-0.6b uniform,latency "$kwargs" ;;
    fp8) offline "$1" llama3-8b mixed,uniform,latency "$(with quantization fp8)" ;;
    long) offline "$1" llama3-8b long "$kwargs" ;;
    awq) offline "$1" llama3-8b-awq mixed,latency "$kwargs" ;;
    lora) measure "$1" python3 $gpu/lora.py --model "$models/llama3-8b" --kwargs "$kwargs" ;;
    fp8-70b) offline "$1" llama3-70b-fp8 latency,uniform "$kwargs" ;;
    startup) measure "$1" python3 $gpu/startup.py --model "$models/llama3-8b" --kwargs "$kwargs" ;;
    served) (served) ;;
    report)
      python3 $gpu/report.py --rows "$out/gpu-rows.jsonl" --out "$out" \
        ${REPORT_SECTIONS:+--sections "$REPORT_SECTIONS"} ;;
    *)
      echo "run.sh: unknown section $1; there are checks offline-8b offline-0.6b fp8 awq lora fp8-70b startup served long report" >&2
      return 2 ;;
  esac
}

if [ $# -eq 0 ]; then
  sed -n '2,/^set -u/{/^set -u/d;s/^# \{0,1\}//;p}' "$0"
  exit 2
fi
[ "$*" != all ] || set -- checks offline-8b offline-0.6b fp8 awq lora fp8-70b startup served long report
failed=()
for name in "$@"; do
  began=$SECONDS
  section "$name" || failed+=("$name")
  echo "== $name took $((SECONDS - began)) s"
done
if [ ${#failed[@]} -gt 0 ]; then
  echo "run.sh: FAILED: ${failed[*]}" >&2
  exit 1
fi
