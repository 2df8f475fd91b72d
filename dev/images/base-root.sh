#!/usr/bin/env bash
# A stand-in for python:3.13-slim from the distribution's packages: Python with its venv module, TLS roots, and little else.
# Usage: base-root.sh WORKDIR SUITE MIRROR COMPONENTS [KEYRING]   (makes WORKDIR/root and WORKDIR/python-version)
# dev/images/base.py runs it in a mount namespace of its own.
set -euo pipefail
work=$1 root=$1/root suite=$2 mirror=$3 components=$4 keyring=${5:-}

debootstrap --variant=minbase --components="$components" ${keyring:+--keyring="$keyring"} \
  --include=python3-venv,ca-certificates "$suite" "$root" "$mirror" </dev/null

# What neither Python nor a shell session in the image needs. Each is purged if the release has it.
unneeded='apt libapt-pkg[0-9.]* sqv gpgv debian-archive-keyring ubuntu-keyring perl-base passwd login login.defs mount
  util-linux libpam-.* libpam0g init-system-helpers sysvinit-utils findutils diffutils tar gzip bsdutils hostname ncurses-bin
  ncurses-base libdb5.3.* libsystemd0 libudev1 libgmp10 libnettle8.* libhogweed6.* openssl e2fsprogs logsave'
list=$(chroot "$root" dpkg-query -Wf '${Package}\n')
for pattern in $unneeded; do grep -xE "$pattern" <<<"$list" || true; done |
  xargs chroot "$root" dpkg --purge --force-remove-essential --force-depends --force-remove-protected || true
rm -rf "$root"/debootstrap "$root"/var/lib/{apt,dpkg/info} "$root"/var/cache/* "$root"/var/log/* "$root"/tmp/* \
  "$root"/usr/lib/*-linux-gnu/{gconv,perl-base} "$root"/usr/share/{man,info,locale,lintian,bug,menu,bash-completion,perl5}
find "$root/usr/share/doc" -not -type d -not -name copyright -delete
echo 'nonroot:x:65532:65532:nonroot:/tmp:/sbin/nologin' >> "$root/etc/passwd"
echo 'nonroot:x:65532:' >> "$root/etc/group"

# It must be what the Dockerfile takes it for.
chroot "$root" python3 -c 'import ctypes, hashlib, lzma, sqlite3, ssl, venv, zoneinfo; zoneinfo.ZoneInfo("America/New_York")'
chroot "$root" python3 -c 'import platform; print(platform.python_version())' > "$work/python-version"
