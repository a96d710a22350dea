#!/usr/bin/env bash
# Wheels for a machine without a network that has torch with CUDA, but not all that wsft and the peers need:
#   bash benchmarks/gpu_wheels.sh [FOLDER] [PYTHON]          by default runs/wheels, for CPython 3.12 on x86_64
# benchmarks/gpu.sh installs them there, without their dependencies.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
FOLDER=${1:-runs/wheels} VERSION=${2:-3.12}
mkdir -p "$FOLDER"
PYTHON=python3
if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; fi
PLATFORMS=()
for tag in manylinux_2_28_x86_64 manylinux_2_17_x86_64 manylinux2014_x86_64; do PLATFORMS+=(--platform "$tag"); done
PACKAGES=(
  "transformers==5.24.0" "pysimdjson>=7.0.2,<8" "pydantic>=2.12,<3" "annotated-types" "typing-inspection" "orjson>=3.11,<4"
  "hjson" "msgpack" "einops" "py-cpuinfo" "psutil" "pytest-xdist>=3.8,<4" "execnet" "peft>=0.21.2,<0.22"
  "liger-kernel==0.8.5" "cut-cross-entropy==25.1.1" "trl==1.16.0" "datasets" "dill" "multiprocess"
)
"$PYTHON" -m pip download -q --no-deps --only-binary=:all: --python-version "$VERSION" "${PLATFORMS[@]}" -d "$FOLDER" "${PACKAGES[@]}"
# the core of pydantic is the version that it names, not the newest
CORE=$("$PYTHON" - "$FOLDER" <<'END'
import glob, re, sys, zipfile
wheel = glob.glob(f"{sys.argv[1]}/pydantic-*.whl")[0]
metadata = next(name for name in zipfile.ZipFile(wheel).namelist() if name.endswith("METADATA"))
print(re.search(r"Requires-Dist: (pydantic-core==[\d.]+)", zipfile.ZipFile(wheel).read(metadata).decode())[1])
END
)
"$PYTHON" -m pip download -q --no-deps --only-binary=:all: --python-version "$VERSION" "${PLATFORMS[@]}" -d "$FOLDER" "$CORE"
# DeepSpeed has a source distribution only; ops compile at first use, none is built here
DS_BUILD_OPS=0 "$PYTHON" -m pip wheel -q --no-deps --no-build-isolation -w "$FOLDER" "deepspeed==0.19.8"
du -sh "$FOLDER"
