#!/usr/bin/env bash
# Makes the environment if it is missing or out of date, then runs a command in it.
set -euo pipefail

root=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
venv=${ZEGFORMER_VENV:-$root/.venv}
[[ $venv == /* ]] || venv=$PWD/$venv
stamp=$venv/zegformer_ready # What the environment was made from; written when it is complete.

usage() {
  cat <<'TEXT'
usage: ./run.sh [COMMAND] [OPTIONS]

  ./run.sh                  trains and evaluates on the built-in benchmark, writes runs/openmoji
  ./run.sh COMMAND --help   options and examples; the first call installs the environment
  ./run.sh test [--fast]    lint and tests; --fast: without the slow tests; pytest's options
TEXT
  printf '%s\n' "" "commands:$(commands)" ""
  cat <<'TEXT'
environment variables:
  ZEGFORMER_JAX=cpu|cuda12|cuda13|tpu   build of jax (default: by the machine's devices)
  ZEGFORMER_VENV=DIR                    folder of the environment (default: .venv here)
  ZEGFORMER_CACHE=DIR                   folder for text embeddings, compiled programs, weights
                                        (default: zegformer_jax in XDG_CACHE_HOME or ~/.cache)
TEXT
}

# Prints the program's commands, from their table.
commands() {
  local line
  while IFS= read -r line; do
    [[ $line =~ ^\ *\"([a-z]+)\":\ \"zegformer_jax\.cli\. ]] && printf ' %s' "${BASH_REMATCH[1]}"
  done <"$root/zegformer_jax/cli/main.py"
}

fail() {
  echo "run.sh: $1" >&2
  exit "${2:-1}"
}

# Succeeds if there is a TPU, by the PCI ids in jax/_src/hardware_utils.py.
has_tpu() {
  local device vendor id
  for device in /sys/bus/pci/devices/*; do
    [[ -r $device/vendor && -r $device/device ]] || continue
    read -r vendor <"$device/vendor"
    read -r id <"$device/device"
    case "$vendor $id" in
      "0x1ae0 0x0027" | "0x1ae0 0x0056" | "0x1ae0 0x005e" | "0x1ae0 0x0062" | \
        "0x1ae0 0x0063" | "0x1ae0 0x006f" | "0x1ae0 0x0076") return 0 ;;
    esac
  done
  return 1
}

has_gpu() {
  command -v nvidia-smi >/dev/null && [[ $(nvidia-smi -L 2>/dev/null || true) == GPU\ * ]]
}

# CUDA 13 needs driver 580 or later; with an older one jax silently falls back to the CPU.
cuda_build() {
  local driver
  driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null || true)
  driver=${driver%%.*}
  if [[ $driver =~ ^[0-9]+$ && $driver -lt 580 ]]; then echo cuda12; else echo cuda13; fi
}

# Prints which build of jax to install: ZEGFORMER_JAX, or the one for the machine's devices.
jax_build() {
  case ${ZEGFORMER_JAX:-} in
    cpu | cuda12 | cuda13 | tpu) echo "$ZEGFORMER_JAX" ;;
    "")
      if has_tpu; then
        echo tpu
      elif [[ -e /dev/nvidiactl && -f $stamp && $(<"$stamp") =~ "jax cuda"(1[23]) ]]; then
        echo "cuda${BASH_REMATCH[1]}" # Installed already: nvidia-smi can take a second to answer.
      elif has_gpu; then
        cuda_build
      else
        echo cpu
      fi
      ;;
    *) fail "ZEGFORMER_JAX is '$ZEGFORMER_JAX'; use cpu, cuda12, cuda13 or tpu" 2 ;;
  esac
}

# Prints MAJOR.MINOR of an interpreter, or 'broken'.
python_version() {
  "$1" -ISc 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || echo broken
}

# Prints what an environment with this version of Python is made from.
recipe() {
  printf '%s\n' "python $1" "jax $build" "repository $root"
  cat "$root/requirements.txt"
}

is_ready() {
  [[ -f $stamp && $(<"$stamp") == "$(recipe "$(python_version "$venv/bin/python")")" ]]
}

find_python() {
  local candidate version tried="" PATH=:$PATH:
  PATH=${PATH//:"$venv/bin":/:} # An activated environment cannot be replaced by its own Python.
  PATH=${PATH#:} PATH=${PATH%:}
  for candidate in python3 python3.13 python3.12 python3.11 python; do
    command -v "$candidate" >/dev/null || continue
    version=$(python_version "$candidate")
    case $version in
      3.11 | 3.12 | 3.13)
        command -v "$candidate"
        return
        ;;
    esac
    tried+="${tried:+, }$candidate is $version"
  done
  fail "needs Python 3.11, 3.12 or 3.13 (TensorFlow has no build for others); found: ${tried:-none}"
}

install() {
  local python version packages=(-r "$root/requirements.txt")
  python=$(find_python)
  version=$(python_version "$python")
  "$python" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "$python has no venv module; on Debian and Ubuntu: apt install python$version-venv"
  if [[ -n ${ZEGFORMER_VENV:-} && -e $venv && ! -e $venv/pyvenv.cfg && -n $(ls -A "$venv") ]]; then
    fail "ZEGFORMER_VENV=$venv is not a Python environment; name another folder"
  fi
  [[ $build == cpu ]] || packages+=("jax[$build]")

  echo "run.sh: installing into $venv (Python $version, jax for $build; takes minutes) ..." >&2
  rm -rf -- "$venv"
  "$python" -m venv "$venv" || fail "$python could not make $venv"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-input --use-pep517 \
    "${packages[@]}" || fail "pip could not install requirements.txt into $venv (its reason is above)"
  # So that 'import zegformer_jax' works in this environment from any folder.
  echo "$root" >"$("$venv/bin/python" -c 'import site; print(site.getsitepackages()[0])')/zegformer_jax.pth"
  recipe "$version" >"$stamp.new"
  mv "$stamp.new" "$stamp"
}

ensure_environment() {
  build=$(jax_build)
  if is_ready; then return; fi
  mkdir -p "$(dirname "$venv")"
  if command -v flock >/dev/null; then # Only one of several runs installs; the others wait.
    exec 9>"$venv.lock"
    flock 9
  fi
  if ! is_ready; then install; fi
  exec 9>&-
}

# libtpu compiles programs for TPUs on any machine; jax uses it for nothing else without a TPU.
ensure_libtpu() {
  if [[ -n ${TPU_LIBRARY_PATH:-} ]] || compgen -G "$venv/lib/python*/site-packages/libtpu" >/dev/null; then
    return
  fi
  echo "run.sh: installing libtpu into $venv (200 MB) ..." >&2
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-input \
    -r "$root/requirements.txt" "jax[tpu]" || fail "pip could not install libtpu (its reason is above)"
}

run_tests() {
  local argument options=(-n 2 --dist loadfile --no-loadscope-reorder) arguments=()
  for argument in "$@"; do
    if [[ $argument == --fast ]]; then
      options+=(-m "not slow")
    elif [[ $argument != /* && -e ${argument%%::*} ]]; then
      arguments+=("$PWD/$argument")
    else
      arguments+=("$argument")
    fi
  done
  cd "$root"
  "$venv/bin/python" -m ruff check .
  "$venv/bin/python" -m ruff format --check .
  exec "$venv/bin/python" -m pytest "${options[@]}" ${arguments[@]+"${arguments[@]}"}
}

case ${1:-} in
  -h | --help | help)
    usage
    exit 0
    ;;
  "" | -*) set -- demo "$@" ;; # Options alone are the demo's.
esac

ensure_environment
if [[ $build == cpu ]]; then
  export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu} # Else jax looks for a TPU where libtpu is installed.
fi
# YNNPACK's matrix products in XLA: a training step takes 0.7 of the time on a CPU.
if [[ $build == cpu && ($1 == train || $1 == demo) ]]; then
  export XLA_FLAGS=${XLA_FLAGS:---xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_DOT}
fi
if [[ $1 == compile && " $* " != *" --help "* ]]; then ensure_libtpu; fi
if [[ $1 == test ]]; then
  ensure_libtpu
  shift
  run_tests "$@"
fi
ZEGFORMER_PROGRAM=./run.sh exec "$venv/bin/python" -P -m zegformer_jax.cli.main "$@"
