#!/bin/sh
# The tests of the kernels against a build with AddressSanitizer and UndefinedBehaviorSanitizer: `make sanitize`.
#
# The build has a place of its own, build/sanitize, with a copy of the package, and every instruction set, the emulated ones
# too: the masked loads and stores of AVX2 and AVX-512 are out of the sanitizers' sight, but the emulated and portable sets
# take the same paths in plain code. A finding ends the run at once, with its report and a status that is not zero.
# Arguments go to pytest:
#     tests/sanitize.sh -k layer_norm
# PYTHON is an interpreter that has torch, pytest, hypothesis, setuptools, pybind11 and ninja; CXX has to be a gcc.
set -eu
cd "$(dirname "$0")/.."
root=$PWD
python=${PYTHON:-python3}
compiler=${CXX:-g++}
out=$root/build/sanitize

export FASTATTN_SANITIZE=1 FASTATTN_BUILD_EMULATED=1 CXX="$compiler"
rm -rf "$out/lib" # files that are gone; the objects stay
"$python" setup.py -q build --build-base="$out" --build-lib="$out/lib" --build-temp="$out/objects"

# The sanitizer has to be in the process before everything else, and libstdc++ with it, whose exceptions it watches.
asan=$($compiler -print-file-name=libasan.so)
stdcxx=$($compiler -print-file-name=libstdc++.so.6)
for library in "$asan" "$stdcxx"; do
    if [ ! -e "$library" ]; then
        echo "sanitize.sh: $compiler has no $library; set CXX to a gcc with its sanitizers" >&2
        exit 1
    fi
done
export LD_PRELOAD="$asan $stdcxx"
# Python never frees all it allocates, hence no search for leaks.
export ASAN_OPTIONS="detect_leaks=0:detect_stack_use_after_return=1:abort_on_error=0:exitcode=77"
export UBSAN_OPTIONS="halt_on_error=1:print_stacktrace=1:exitcode=77"
export PYTHONPATH="$out/lib"
export FASTATTN_TEST_EXAMPLES="${FASTATTN_TEST_EXAMPLES:-8}"

cd "$out" # not the root, whose own fastattn would come first
"$python" -c "
import torch, fastattn._C as C
assert C.__file__.startswith('$out/'), f'{C.__file__} is not the build with sanitizers'
print('sanitized:', *C.isas())
"
# What the sanitizers print goes past pytest, which would lose it when they end the process.
exec "$python" -m pytest "$root/tests" -c "$root/pyproject.toml" -m kernel -q --capture=sys -p no:cacheprovider "$@"
