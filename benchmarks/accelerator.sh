#!/usr/bin/env bash
# Measures this project on an accelerator, in at most nine minutes; see accelerator.py.
#
#     [PYTHON=python3] [OUT=FOLDER] [WHEELS=FOLDER] benchmarks/accelerator.sh [OPTIONS]
#
# It needs jax for the device, flax, optax, orbax-checkpoint, einops, transformers, ml_collections,
# ftfy and tqdm, but no TensorFlow. What the interpreter lacks is installed from the wheels in
# WHEELS (default: wheels/ here), into a folder of its own:
#
#     pip download --no-deps -d wheels absl-py clu etils ftfy ml_collections tabulate tqdm wcwidth
set -euo pipefail

root=$(dirname "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")")
python=${PYTHON:-python3}
wheels=${WHEELS:-$root/wheels}
missing=()
for wheel in "$wheels"/*.whl; do
  name=$(basename "$wheel")
  [[ -f $wheel ]] || continue
  "$python" -c "import importlib.metadata as m; m.version('${name%%-*}')" 2>/dev/null || missing+=("$wheel")
done
if ((${#missing[@]})); then
  extra=$(mktemp -d)
  trap 'rm -rf "$extra"' EXIT
  "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps \
    --target "$extra" "${missing[@]}"
  export PYTHONPATH=${PYTHONPATH:+$PYTHONPATH:}$extra
fi
"$python" "$root/benchmarks/accelerator.py" "$@"
