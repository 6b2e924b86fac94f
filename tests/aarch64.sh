#!/usr/bin/env bash
# The C++ module on aarch64, on an x86_64 Debian: cross-compiled as a wheel, then tested by an aarch64 Python under qemu. Needs
# g++-aarch64-linux-gnu, qemu-user-static and auditwheel; all else goes into build/aarch64 (about 1 GB).
#   bash tests/aarch64.sh                        fuzzing, then operations against their references and a rollout (most of an hour)
#   bash tests/aarch64.sh tests/ops/test_layers.py   these tests alone
set -euo pipefail
cd "$(dirname "$0")/.."
host=${PYTHON:-.venv/bin/python}
version=$("$host" -c 'import sys; print("%d.%d" % sys.version_info[:2])') # Debian must have the same: 3.11 in Debian 12
here=$PWD/build/aarch64 root=$PWD/build/aarch64/root
mkdir -p "$here"/{debs,lists/partial,cache/archives/partial,config,site,wheel} "$root"

if [ ! -x "$root/usr/bin/python$version" ]; then # Python and its libraries; the machine's own packages stay as they are
  apt=(apt-get -qq -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o Dir::State::lists="$here/lists" -o Dir::Cache="$here/cache")
  "${apt[@]}" update
  (cd "$here/debs" && "${apt[@]}" download "python$version-minimal" "libpython$version-minimal" "libpython$version-stdlib" \
    "libpython$version-dev" libc6 libcrypt1 libstdc++6 libgcc-s1 libgomp1 libexpat1 zlib1g libssl3 libffi8 liblzma5 libbz2-1.0 \
    libsqlite3-0 libuuid1)
  for deb in "$here"/debs/*.deb; do dpkg -x "$deb" "$root"; done
fi
if [ ! -e "$here/site/torch" ]; then
  pip=("$host" -m pip install -q --target "$here/site" --python-version "$version" --implementation cp --only-binary=:all:)
  for glibc in 2014 _2_17 _2_24 _2_26 _2_27 _2_28; do pip+=(--platform "manylinux${glibc}_aarch64"); done
  # the interpreter of torch 2.10's triton fails with numpy 2.4
  "${pip[@]}" 'numpy<2.4' transformers nltk rapidfuzz regex click rich datasets jinja2 pyyaml pytest hypothesis sympy networkx
  # without dependencies, which pip would choose for this machine; torch 2.10 is the last whose wheel does without CUDA
  "${pip[@]}" --no-deps torch==2.10.0 accelerate psutil
fi

cp "$root/usr/lib/python$version/_sysconfigdata__aarch64-linux-gnu.py" "$here/config" # describes aarch64's Python to setuptools
rm -f "$here"/wheel/*
PYTHONPATH=$here/config _PYTHON_SYSCONFIGDATA_NAME=_sysconfigdata__aarch64-linux-gnu _PYTHON_HOST_PLATFORM=linux-aarch64 \
  CC=aarch64-linux-gnu-gcc CXX=aarch64-linux-gnu-g++ CPPFLAGS="-I$root/usr/include/python$version -I$root/usr/include" PMC_FAST_CUDA=0 \
  "$host" -c "from setuptools import build_meta; build_meta.build_wheel('$here/wheel')" > "$here/build.log"
"$host" -m auditwheel show "$here"/wheel/*.whl
rm -rf "$here/tree" # the tests, beside the package as the wheel has it
mkdir "$here/tree"
cp -r tests benchmarks examples pyproject.toml "$here/tree"
"$host" -m zipfile -e "$here"/wheel/*.whl "$here/tree"

cd "$here/tree"
[ -e "$OLDPWD/.cache" ] && ln -s "$OLDPWD/.cache" .cache # models for the tests
cat > slow.py << 'EOF'
from hypothesis import HealthCheck, settings  # emulated: slow is healthy

settings.register_profile("slow", suppress_health_check=list(HealthCheck), deadline=None)
settings.load_profile("slow")
EOF
export PYTHONPATH=$here/tree:$here/site PYTHONDONTWRITEBYTECODE=1 HF_HUB_OFFLINE=1
python=(qemu-aarch64-static -L "$root" "$root/usr/bin/python$version")
if [ $# -eq 0 ]; then
  "${python[@]}" -m tests.fuzz --examples 20
  # others are Triton's, or start a second Python, which the kernel would have to hand to qemu
  set -- tests/ops/test_layers.py tests/ops/test_decode_ops.py tests/ops/test_sampling.py tests/ops/test_weighted_nll.py \
    -k "not cuda and not triton and not program_walks and not out_of_range and not set_can_be_chosen"
fi
"${python[@]}" -m pytest -p slow -p no:cacheprovider "$@"
