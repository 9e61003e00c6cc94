#!/bin/sh
# Drop what only developers of the Python packages in a root use, and compile all modules.
# usage: finish_packages.sh DIRECTORY
set -eu
root=$1
packages=$root/usr/local/lib/python3.11/dist-packages

rm -rf "$packages/bin" "$packages/numpy/f2py" "$packages/include"
# The module for Python holds the whole of ONNX Runtime; the library beside it is for programs in other languages.
rm -f "$packages"/onnxruntime/capi/libonnxruntime.so*
for part in transformers tools quantization backend datasets; do rm -rf "$packages/onnxruntime/$part"; done
find "$packages" -type d \( -name tests -o -name test -o -name __pycache__ \) -prune -exec rm -rf {} +
find "$packages" -type f \( -name '*.pyi' -o -name '*.pyx' -o -name '*.pxd' -o -name '*.a' -o -name '*.h' \
  -o -name '*.cc' -o -name '*.proto' \) -delete

# The root is read-only at run time, so modules are compiled now. The version must be the image's own.
built=$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')
[ "$built" = 3.11 ] || { echo "error: the building Python is $built, the image's is 3.11" >&2; exit 1; }
set -- "$packages"
[ ! -d "$root/usr/lib/python3.11" ] || set -- "$root/usr/lib/python3.11" "$@"
python3 -m compileall -q -j 0 --invalidation-mode unchecked-hash -s "$root" -p / "$@" > /dev/null
