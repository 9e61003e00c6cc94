#!/bin/sh
# Check that the libraries of an image can be loaded: nothing resolves dependencies later.
# usage: check_libraries.sh DIRECTORY...     directories that become one root
set -eu

programs() { find "$@" -type f \( -name '*.so*' -o -path '*/usr/bin/*' \); }

# Every library that a program or module names has to be there.
have=$(find "$@" -name '*.so*' -printf '%f\n' | sort -u)
missing=$(programs "$@" | xargs readelf -d 2> /dev/null \
  | sed -n 's/.*(NEEDED).*\[\(.*\)\]$/\1/p' | sort -u | while read -r name; do
    echo "$have" | grep -qxF "$name" || echo "$name"; done)
[ -z "$missing" ] || { echo "error: libraries missing in the image: $missing" >&2; exit 1; }

# Kernels with pages of 16 KiB (Raspberry Pi 5) or 64 KiB refuse libraries whose segments are aligned for smaller ones.
# readelf ends each LOAD line with the alignment in hexadecimal: five digits and more are 64 KiB and more.
aligned() { programs "$@" | xargs readelf -lW 2> /dev/null | awk '
  /^File:/ { file = $2 }
  $1 == "LOAD" { found++; if ($NF !~ /^0x[1-9a-f][0-9a-f][0-9a-f][0-9a-f][0-9a-f]+$/) print "narrow", file, $NF }
  END { print "segments", found + 0 }'; }
report=$(aligned "$@")
echo "$report" | grep -q '^segments [1-9]' || { echo "error: no program was found below $*" >&2; exit 1; }
narrow=$(echo "$report" | sed -n 's/^narrow //p' | sort -u)
[ -z "$narrow" ] || { echo "error: not loadable with pages of 16 and 64 KiB: $narrow" >&2; exit 1; }
