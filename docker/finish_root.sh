#!/bin/sh
# Add EdgeLM's commands, drop what only developers of the packages use, compile modules, check that libraries are whole.
# usage: finish_root.sh DIRECTORY
set -eu
root=$1
packages=$root/usr/local/lib/python3.11/dist-packages

rm -rf "$packages/bin" "$packages/numpy/f2py" "$packages/include"
find "$packages" -type d \( -name tests -o -name test -o -name __pycache__ \) -prune -exec rm -rf {} +
find "$packages" -type f \( -name '*.pyi' -o -name '*.pyx' -o -name '*.pxd' -o -name '*.a' -o -name '*.h' \) -delete

cat > "$root/usr/local/bin/edgelm" <<'PYTHON'
#!/usr/bin/python3 -s
from edgelm.cli.app import main

main()
PYTHON
cat > "$root/usr/local/bin/edgelm-health" <<'PYTHON'
#!/usr/bin/python3
"""Exit 0 when the server in this container is alive. Liveness needs no key and answers while the engine is busy."""
import http.client

connection = http.client.HTTPConnection("127.0.0.1", 8080, timeout=8)
connection.request("GET", "/health/live")
raise SystemExit(connection.getresponse().status != 200)
PYTHON
chmod 755 "$root/usr/local/bin/edgelm" "$root/usr/local/bin/edgelm-health"

# The root is read-only at run time, so modules are compiled now. The version must be the image's own.
built=$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')
[ "$built" = 3.11 ] || { echo "error: the building Python is $built, the image's is 3.11" >&2; exit 1; }
python3 -m compileall -q -j 0 --invalidation-mode unchecked-hash -s "$root" -p / \
  "$root/usr/lib/python3.11" "$packages" > /dev/null

# Every library that a program or module names has to be in the image: nothing resolves dependencies later.
have=$(find "$root" -name '*.so*' -printf '%f\n' | sort -u)
missing=$(find "$root" -type f \( -name '*.so*' -o -path "$root/usr/bin/*" \) -exec readelf -d {} + 2> /dev/null \
  | sed -n 's/.*(NEEDED).*\[\(.*\)\]$/\1/p' | sort -u | while read -r name; do
    echo "$have" | grep -qxF "$name" || echo "$name"; done)
[ -z "$missing" ] || { echo "error: libraries missing in the image: $missing" >&2; exit 1; }

# Kernels with pages of 16 KiB (Raspberry Pi 5) refuse libraries whose segments are aligned for smaller ones.
narrow=$(find "$root" -type f \( -name '*.so*' -o -path "$root/usr/bin/*" \) -exec readelf -lW {} + 2> /dev/null \
  | awk '/^File:/ { file = $2 } $1 == "LOAD" && (length($NF) < 6 || $NF ~ /^0x[0-3]...$/) { print file }' | sort -u)
[ -z "$narrow" ] || { echo "error: not loadable with 16 KiB pages: $narrow" >&2; exit 1; }
