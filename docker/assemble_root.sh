#!/bin/sh
# Unpack Debian's arm64 packages into a directory that becomes an image's file system; run none of their scripts.
# usage: assemble_root.sh PACKAGE_LIST DIRECTORY
# Wants `apt-get update` done with the architecture arm64 enabled. apt checks the signatures.
set -eu
list=$1 root=$2
scratch=$(mktemp -d)
(cd "$scratch" && sed 's/$/:arm64/' "$OLDPWD/$list" | xargs apt-get -o APT::Sandbox::User=root download)
mkdir -p "$root"
for package in "$scratch"/*.deb; do dpkg-deb -x "$package" "$root"; done
rm -r "$scratch"

# Documentation, translations, character sets, tools of libc and modules that nothing here imports. Licences stay, and so
# does pydoc_data: its text is what exports are proven on.
cd "$root"
find usr/share/doc -type f ! -name copyright -delete
rm -rf usr/share/man usr/share/lintian usr/share/locale usr/share/binfmts usr/share/bug usr/share/info usr/share/gcc \
  usr/share/gdb usr/share/applications usr/share/pixmaps usr/lib/aarch64-linux-gnu/gconv usr/sbin sbin etc/python3.11 \
  usr/lib/aarch64-linux-gnu/audit
for module in lib2to3 ensurepip idlelib tkinter turtledemo distutils; do rm -rf "usr/lib/python3.11/$module"; done
find . -type d -empty -delete

# Modules whose libraries (libcrypt, libdb, libnsl) are not in the list, and nothing here imports them.
rm usr/lib/python3.11/lib-dynload/_crypt.*.so usr/lib/python3.11/lib-dynload/_dbm.*.so \
  usr/lib/python3.11/lib-dynload/nis.*.so

# Debian's python3 package is only this link; bin/sh is not there on purpose.
ln -s python3.11 usr/bin/python3
mkdir -p etc tmp usr/local/bin usr/local/lib/python3.11/dist-packages state bundle proc sys dev
chmod 1777 tmp
printf 'root:x:0:0:root:/:/nonexistent\nedgelm:x:10001:10001:EdgeLM:/state:/nonexistent\n' > etc/passwd
printf 'root:x:0:\nedgelm:x:10001:\n' > etc/group
printf 'hosts: files dns\n' > etc/nsswitch.conf
chown 10001:10001 state
chmod 700 state
