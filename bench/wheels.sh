#!/bin/sh
# Builds sdist and wheel, and installs each in a clean environment of each Python that is there: `make wheels`. From each
# run `pip check`, `laplace-lora doctor` and the README's script. Gigabytes and minutes a Python, most of it torch.
# PYTHONS="python3.10 python3.13" names them; EXTRAS="cli,evaluate" what is installed beside the package; TORCH comes
# first, as the package's looser requirement could fetch another, much larger build.
# DEPENDENCIES=.venv takes all dependencies from that environment in place of installing them, for the Python that it
# is of: seconds, for what CI runs. The other Pythons that are there then install sdist and wheel without dependencies,
# and compile what was installed.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
dependencies=${DEPENDENCIES:-}
extras=${EXTRAS:-cli,evaluate}
if [ -n "$dependencies" ]; then
    dependencies=$(cd "$root" && cd "$dependencies" && pwd)
    packages=$("$dependencies/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")
fi
runs() { "$1" --version >/dev/null 2>&1; }  # a shim may be there without its Python
there() {  # those of the Pythons that run; pyenv has some that its shims do not show
    for python in "$@"; do
        for each in "$python" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"${python#python}".*/bin/python; do
            if runs "$each"; then echo "$each"; continue 2; fi
        done
        echo "$python is not there: left out" >&2
    done
}

# shellcheck disable=SC2086  (names, one after the other)
others=$(there ${PYTHONS:-python3.10 python3.11 python3.12 python3.13})
pythons=$others
if [ -n "$dependencies" ]; then pythons=$dependencies/bin/python; fi
first=$(echo $pythons | cut -d" " -f1)
test -n "$first"

"$first" -m venv "$work/build"
"$work/build/bin/pip" install -q build
# the wheel is made from the sdist, so that what the sdist lacks shows
"$work/build/bin/python" -m build -o "$work/dist" "$root" >"$work/log" 2>&1 || { tail -40 "$work/log"; exit 1; }
wheel=$(echo "$work"/dist/*.whl)
sdist=$(echo "$work"/dist/*.tar.gz)
echo "built $(basename "$wheel") and $(basename "$sdist")"
case $wheel in *-py3-none-any.whl) ;; *) echo "a wheel without CUDA kernels has to be pure Python"; exit 1 ;; esac
"$work/build/bin/python" - "$wheel" "$root/pyproject.toml" <<'PY'
import re, sys, zipfile
wheel, project = sys.argv[1:]
names = zipfile.ZipFile(wheel).namelist()
for wanted in ("laplace_lora_fast/py.typed", "laplace_kernels/py.typed", "laplace_lora_fast/demo/data/"):
    assert any(name.startswith(wanted) for name in names), f"{wanted} is not in the wheel"
strange = [name for name in names if name.startswith(("tests", "bench", "docs")) or name.endswith((".so", ".cu"))]
assert not strange, strange
version = re.search(r'^version = "(.+)"', open(project).read(), re.M)[1]
assert f"-{version}-" in wheel, version
PY
"$work/build/bin/python" - "$root/README.md" >"$work/readme.py" <<'PY'
import re, sys
blocks = re.findall(r"```python\n(.*?)```", open(sys.argv[1], encoding="utf-8").read(), flags=re.S)
print(next(block for block in blocks if "import peft" in block))  # the one that has a model of its own
PY

used() {  # runs what is installed in $bin, from a folder that is not the checkout
    # shared dependencies may want of each other what is not there, which is not this package's doing
    if [ -n "$dependencies" ]; then ! "$bin/pip" check | grep '^laplace-lora-fast '; else "$bin/pip" check; fi
    "$bin/laplace-lora" --version
    "$bin/laplace-lora" doctor >/dev/null
    (cd "$work" && OMP_NUM_THREADS=1 "$bin/python" readme.py >/dev/null)
    echo "$("$bin/python" --version), $1: installs, pip check, doctor and the README's script run"
}

for python in $pythons; do
    "$python" -m venv "$work/clean"
    bin=$work/clean/bin
    if [ -n "$dependencies" ]; then
        echo "$packages" >"$("$bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")/dependencies.pth"
        "$bin/pip" install -q --no-deps --ignore-installed "$wheel"  # another may be among the dependencies
    else
        "$bin/pip" install -q "${TORCH:-torch==2.13.0}"
        "$bin/pip" install -q "$wheel[$extras]"
    fi
    used wheel
    "$bin/pip" uninstall -q -y laplace-lora-fast
    "$bin/pip" install -q --no-deps --ignore-installed "$sdist"
    used sdist
    rm -rf "$work/clean"  # the next one needs the room
done

test -n "$dependencies" || exit 0
for python in $others; do
    "$python" -m venv "$work/clean"
    bin=$work/clean/bin
    for package in "$wheel" "$sdist"; do
        "$bin/pip" install -q --no-deps --ignore-installed "$package"
        for part in laplace_kernels laplace_lora_fast; do
            "$bin/python" -m compileall -q -f "$("$bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")/$part"
        done
    done
    echo "$("$python" --version): sdist and wheel install, without dependencies, and compile"
    rm -rf "$work/clean"
done
