#!/usr/bin/env bash
# Check, synthesize, train, evaluate, time kernels: what a GPU is for, in short
# calls.
# docs/gpu.md is the manual.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  cat <<'EOF'
Usage: tools/gpu_run.sh [OPTIONS] [-- CONFIG FLAGS]

Repeat the same command until it says "done": each call does as much as fits,
and the next one goes on from there. $OUT (default out/) gets the summary, the
log, and everything a fresh machine needs to go on.

  --minutes N             of this call (9)
  --stage NAME            check, synthesize, train, evaluate, or all (all);
                          or kernels, which times them and is no part of all
  --synthesize_minutes N  of all calls together (8)
  --train_minutes N       likewise; the length of training follows (10)
  --config FILE           (configs/smollm2_135m_gpu.py)
  --state DIR             what calls share (.gpu_run)
  --inputs DIR            what was carried along, if anything: wheels, prompts/,
                          pieces of files, an earlier $OUT (.gpu_inputs)
  --tests "FILES"         what pytest runs, once a machine; "" for nothing
  --piece_mb N            size of the pieces of large results (15)
  --cpu                   go on without a GPU, to try the script
  -- --config.train.batch_size=32 ...   passed on to every program; with
                          --stage=kernels to pallas_kernels.bench: -- --only=fp8
EOF
}

# --- Options ------------------------------------------------------------------

minutes=9 stage=all synthesize_minutes=8 train_minutes=10 piece_mb=15 cpu=
config=configs/smollm2_135m_gpu.py state=.gpu_run inputs=.gpu_inputs
# Not the whole suite: what runs on the device, within TEST_SECONDS.
tests="tests/test_layers.py tests/test_verify.py tests/test_session.py"
tests+=" tests/drafters tests/train/test_fused_attention.py"
TEST_SECONDS=240
NO_TARGET=3 # exit code of tools/gpu_run.py
command_line="tools/gpu_run.sh $*"

refuse() {
  echo "error: $*" >&2
  exit 2
}

while [ $# -gt 0 ]; do
  option=${1%%=*}
  case $option in
    --help | -h) usage && exit ;;
    --cpu) cpu=1 && shift && continue ;;
    --) shift && break ;;
    --*=*) ;;
  esac
  if [ "$option" != "$1" ]; then
    value=${1#*=}
  else
    [ $# -ge 2 ] || refuse "$option needs a value; see --help"
    value=$2 && shift
  fi
  shift
  case $option in
    --minutes | --synthesize_minutes | --train_minutes | --piece_mb)
      [[ $value =~ ^[0-9]+(\.[0-9]+)?$ ]] || refuse "$option=$value: a number?"
      printf -v "${option#--}" %s "$value" ;;
    --stage)
      [[ $value =~ ^(check|synthesize|train|evaluate|kernels|all)$ ]] \
        || refuse "--stage=$value is unknown; see --help"
      stage=$value ;;
    --config | --state | --inputs | --tests)
      printf -v "${option#--}" %s "$value" ;;
    *) refuse "$option is unknown; see --help" ;;
  esac
done
passed_on=("$@")

[ -f "$config" ] || refuse "--config=$config does not exist"
seconds() { awk "BEGIN { print int(60 * $1) }"; }
deadline=$(seconds "$minutes")
SECONDS=0 # bash counts them up
left() { echo $((deadline - SECONDS)); }

if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; fi
fi
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 12))' \
  || refuse "$PYTHON is no Python 3.12 or later; name one in PYTHON="

# --- Places -------------------------------------------------------------------

OUT=${OUT:-out}
mkdir -p "$OUT" "$state"/{inputs,machine,progress,records,pack}
out=$(cd "$OUT" && pwd) state=$(cd "$state" && pwd)
echo '*' >"$state/.gitignore"
log=$out/gpu_run.log
rm -f "$out"/*.part[0-9] "$out"/SHA256SUMS
: >"$log"

export PYTHONUNBUFFERED=1 PYTHONPATH=$state/site${PYTHONPATH:+:$PYTHONPATH}
export JAX_COMPILATION_CACHE_DIR=$state/cache
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
export TQDM_MININTERVAL=10
if [ -n "$cpu" ]; then export JAX_PLATFORMS=cpu; fi

# Results that calls share, a small file each.
put() { echo "$2" >"$state/progress/$1"; }
get() { cat "$state/progress/$1" 2>/dev/null || echo "${2:-}"; }
has() { [ -e "$state/progress/$1" ]; }

say() { printf '[%4ds] %s\n' "$SECONDS" "$*" | tee -a "$log"; }

next=""    # what remains to do; nothing when done
failure="" # why the call ended early
waiting=() # carried files of which pieces are missing
fail() {
  failure=$*
  say "error: $*" >&2
  exit 1
}

# Runs a command for at most $1 seconds. False if that was too short; any other
# failure ends the call with the last lines of its output.
limited() {
  local limit=$1 code=0
  shift
  [ "$limit" -gt 0 ] || return 1
  echo "+ $*" >>"$log"
  timeout --foreground --kill-after=15 "$limit" "$@" >>"$log" 2>&1 || code=$?
  case $code in
    0) return 0 ;;
    124 | 137) return 1 ;;
  esac
  tr '\r' '\n' <"$log" | tail -n 25 >&2
  fail "exit code $code of: $*"
}

helper() { "$PYTHON" -m tools.gpu_run "$@"; }

# --- What was carried along ---------------------------------------------------

# File names in a folder's SHA256SUMS that match an awk pattern.
listed() { awk -v p="$2" '$2 ~ p { print $2 }' "$1/SHA256SUMS" | sort; }

# Whether the files that are there match their sums; else says which does not.
intact() {
  damage=$(cd "$1" && sha256sum --check --quiet --ignore-missing SHA256SUMS \
    2>&1 | head -n 1) && [ -z "$damage" ]
}

# Joins the pieces that a folder's SHA256SUMS lists, once all are there.
join_pieces() {
  local folder=$1 damage first name part pieces missing
  intact "$folder" \
    || fail "$folder: $damage; carry the file again, with its SHA256SUMS"
  while IFS= read -r first; do
    name=${first%.part*}
    if [ -e "$folder/$name" ]; then rm -f "$folder/$name".part* && continue; fi
    pieces=() missing=""
    while IFS= read -r part; do
      pieces+=("$folder/$part")
      if [ ! -e "$folder/$part" ]; then missing+=" $part"; fi
    done < <(listed "$folder" "^${name}[.]part[0-9]+\$")
    if [ -n "$missing" ]; then
      say "$name waits for$missing"
      waiting+=("$name")
      continue
    fi
    cat "${pieces[@]}" >"$folder/$name.joining"
    mv "$folder/$name.joining" "$folder/$name"
    if ! intact "$folder" || [ -z "$(listed "$folder" "^$name\$")" ]; then
      rm "$folder/$name"
      fail "$name, joined, does not match SHA256SUMS; split it again"
    fi
    rm "${pieces[@]}"
    say "$name joined from ${#pieces[@]} pieces"
  done < <(listed "$folder" '[.]part0+$')
}

receive() {
  local file manifest wheels=()
  if [ -d "$inputs" ]; then cp -R "$inputs/." "$state/inputs/"; fi
  while IFS= read -r manifest; do
    join_pieces "$(dirname "$manifest")"
  done < <(find "$state/inputs" -name SHA256SUMS | sort)
  while IFS= read -r file; do
    [ -e "$(dirname "$file")/SHA256SUMS" ] \
      || fail "$file came without SHA256SUMS; docs/gpu.md tells how to split"
  done < <(find "$state/inputs" -name '*.part0')

  mapfile -t wheels < <(find "$state/inputs" -name '*.whl' | sort)
  if [ "${wheels[*]}" != "$(cat "$state/machine/wheels" 2>/dev/null)" ]; then
    say "installing ${#wheels[@]} carried packages"
    limited 300 "$PYTHON" -m pip install --quiet --no-index --no-deps \
      --no-compile --upgrade --target "$state/site" "${wheels[@]}" \
      || fail "pip took more than five minutes"
    echo "${wheels[*]}" >"$state/machine/wheels"
  fi
  restore corpus.tar.xz corpus
  restore drafter.tar.xz drafter
  if [ ! -e "$state/records/kernels.json" ]; then
    find "$state/inputs" -name kernels.json -exec cp {} "$state/records/" \;
  fi
}

# Unpacks an earlier call's archive, unless this machine has its own by now.
restore() {
  local archive
  archive=$(find "$state/inputs" -name "$1" | head -n 1)
  [ -n "$archive" ] && [ ! -e "$state/$2" ] || return 0
  helper unpack --archive="$archive" --state="$state" \
    || fail "$archive cannot be unpacked"
  say "$2 restored from $1"
}

# --- Stages -------------------------------------------------------------------

check() {
  local flags=(--config="$config" --state="$state") code=0 target
  if [ -n "$cpu" ]; then flags+=(--cpu); fi
  helper check "${flags[@]}" 2>&1 | tee -a "$log" || code=$?
  [ "$code" -eq 0 ] || [ "$code" -eq "$NO_TARGET" ] || fail "see above"
  if [ -n "$tests" ] && [ ! -e "$state/machine/tests" ]; then
    say "tests: $tests"
    # shellcheck disable=SC2086 # several files
    timeout --foreground "$TEST_SECONDS" "$PYTHON" -m pytest $tests -q \
      -p no:cacheprovider >>"$log" 2>&1 || [ $? -ne 124 ] \
      || echo "cut after $TEST_SECONDS s" >>"$log"
    tail -n 1 "$log" >"$state/machine/tests"
    say "tests: $(cat "$state/machine/tests")"
  fi
  if [ "$stage" = kernels ]; then return; fi
  if [ "${#waiting[@]}" -gt 0 ]; then
    next="carry the rest of ${waiting[*]}"
    exit 0
  fi
  [ "$code" -eq 0 ] || fail "no target: see above"
  target=$(cat "$state/machine/target")
  if [ -n "$target" ]; then run_flags+=(--config.target.path="$target"); fi
}

synthesize() {
  local prompts total used limit began=$SECONDS
  if has synthesized; then return; fi
  if [ -e "$state/run/checkpoints" ]; then
    say "synthesize: training has begun on the corpus as it is"
    return
  fi
  next=synthesize
  prompts=$(find "$state/inputs" -path '*/prompts/*.jsonl' | sort \
    | sed "s/.*/'&',/" | tr -d '\n')
  total=$(seconds "$synthesize_minutes")
  used=$(get synthesize_seconds 0)
  limit=$((total - used))
  if [ "$limit" -gt $(($(left) - 30)) ]; then limit=$(($(left) - 30)); fi
  say "synthesize: for at most ${limit}s"
  if limited "$limit" "$PYTHON" -m train.synthesize "${run_flags[@]}" \
    --config.synthesis.prompts="($prompts)" \
    --config.synthesis.output="$state/corpus"; then
    put synthesized yes
  fi
  used=$((used + SECONDS - began))
  put synthesize_seconds "$used"
  if [ "$used" -ge $((total - 5)) ]; then put synthesized yes; fi
  if has synthesized; then next=""; fi
}

# How many steps fit in --train_minutes, from a short run: the learning rate's
# schedule needs to know the end from the start.
choose_steps() {
  local probe=$state/probe rate
  if has steps; then return; fi
  if [[ " ${passed_on[*]} " == *" --config.train.steps="* ]]; then
    put steps as-configured
    return
  fi
  say "train: 60 steps to measure the speed"
  rm -rf "$probe"
  limited "$(left)" "$PYTHON" -m train.main "${train_flags[@]}" \
    --workdir="$probe" --config.train.steps=60 --config.train.log_every=10 \
    --config.train.evaluate_every=60 --config.train.checkpoint_every=60 \
    || return 1
  rate=$(helper rate --workdir="$probe")
  rm -rf "$probe"
  put steps_per_s "$rate"
  put steps "$(awk "BEGIN {
    n = int($rate * 0.9 * $(seconds "$train_minutes")); print n < 20 ? 20 : n
  }")"
}

has_checkpoint() {
  compgen -G "$state/run/checkpoints/[0-9]*/commit_success.txt" >/dev/null
}

train() {
  local resume=() period ended=""
  if has trained; then return; fi
  next=train
  [ "$(left)" -gt 60 ] || return 0
  put synthesized yes
  train_flags=("${run_flags[@]}" --config.train.corpus="('$state/corpus',)")
  if has_checkpoint; then
    resume=(--resume)
  else
    rm -rf "$state/run"
    choose_steps || return 0
  fi
  if has steps_per_s; then # about a checkpoint a minute
    period=$(awk "BEGIN { print int($(get steps_per_s) * 60) + 1 }")
    train_flags+=(--config.train.steps="$(get steps)"
      --config.train.evaluate_every="$period"
      --config.train.checkpoint_every="$period")
  fi
  say "train: steps $(get steps) ${resume[*]}"
  if limited $(($(left) - 45)) "$PYTHON" -m train.main "${train_flags[@]}" \
    --workdir="$state/run" "${resume[@]}"; then
    ended=yes
  fi
  cp "$state"/run/{config.json,metrics.jsonl} "$state/records/" || return 0
  has_checkpoint || return 0
  limited 90 "$PYTHON" -m train.export --config="$config" \
    --workdir="$state/run" --output="$state/drafter" --step=best || return 0
  if [ -n "$ended" ]; then put trained yes && next=""; fi
}

evaluate() {
  local prompts name dtype result
  [ -e "$state/drafter/config.json" ] || fail "no drafter yet: train first"
  for prompts in "$state"/corpus/held_out-*.jsonl; do
    [ -s "$prompts" ] || continue
    name=$(basename "$prompts" .jsonl)
    for dtype in bfloat16 float32; do
      result=$state/records/${name#held_out-}-$dtype.json
      [ "$state/drafter/config.json" -nt "$result" ] || continue
      next="evaluate"
      say "evaluate: ${name#held_out-} in $dtype"
      limited $(($(left) - 15)) "$PYTHON" -m eval.main "${run_flags[@]}" \
        --drafter="$state/drafter" --prompts="$prompts" \
        --config.target.dtype="$dtype" --json_out="$result" || return 0
    done
  done
  next=""
}

# No case starts in the last 90 seconds; one that is still at work when the call
# ends counts as hanging, and is not tried again.
kernels() {
  local result=$state/records/kernels.json minutes
  next=kernels
  minutes=$(awk "BEGIN { print ($(left) - 90) / 60 }")
  say "kernels: no case begins after ${minutes} minutes"
  limited $(($(left) - 15)) "$PYTHON" -m pallas_kernels.bench --resume \
    --json_out="$result" --minutes="$minutes" "${passed_on[@]}" || return 0
  if grep -q '"complete": true' "$result"; then next=""; fi
}

# --- What goes back -----------------------------------------------------------

# Packs paths of the state, unless the first is older than the archive.
pack() {
  local archive=$state/pack/$1
  shift
  if [ -e "$archive" ] && [ -z "$(find "$state/$1" -newer "$archive")" ]; then
    return
  fi
  helper pack --archive="$archive" --state="$state" "$@"
}

finish() {
  local code=$? name
  trap - EXIT
  set +e
  if [ -e "$state/corpus/index.json" ]; then
    pack corpus.tar.xz corpus progress/synthesize{d,_seconds} >>"$log" 2>&1
  fi
  if [ -e "$state/drafter/config.json" ]; then
    pack drafter.tar.xz records drafter progress >>"$log" 2>&1
  fi
  if [ -e "$state/records/kernels.json" ]; then
    cp "$state/records/kernels.json" "$out/"
  fi
  for name in corpus.tar.xz drafter.tar.xz; do
    [ -e "$state/pack/$name" ] || continue
    split --bytes="$(awk "BEGIN { print int($piece_mb * 1e6) }")" \
      --numeric-suffixes --suffix-length=1 \
      "$state/pack/$name" "$out/$name.part"
    (cd "$state/pack" && sha256sum "$name") >>"$out/SHA256SUMS"
    (cd "$out" && sha256sum "$name".part*) >>"$out/SHA256SUMS"
  done
  helper summary --config="$config" --state="$state" --out="$out" \
    --command_line="$command_line" --next="${failure:-$next}" >>"$log" 2>&1
  if [ "$code" -ne 0 ]; then
    say "failed; $out/gpu_run.log has the details"
  elif [ -n "$next" ]; then
    say "not done: $next; repeat the command"
  else
    say "done: $out/summary.md"
  fi
  exit "$code"
}

# --- The call -----------------------------------------------------------------

if command -v flock >/dev/null; then
  exec 9>"$state/lock"
  flock --nonblock 9 || refuse "another call is still at work in $state"
fi
trap finish EXIT
trap 'exit 143' TERM
trap 'exit 130' INT

run_flags=(--config="$config")
receive
check
run_flags+=("${passed_on[@]}")
case $stage in
  check) ;;
  all)
    synthesize
    if has synthesized; then train; fi
    if has trained; then evaluate; fi
    ;;
  *) "$stage" ;;
esac
