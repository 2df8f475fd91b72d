#!/usr/bin/env bash
# The root of the one image that every control-plane pod runs: the few programs of Debian that kube-proxy and the volume
# helper call, with the libraries those load, and the Go binaries, which are static.
# Usage: components-root.sh BASE.tar WORKDIR HYPERKUBE COREDNS LOCAL_PATH_PROVISIONER   (makes WORKDIR/{node,components})
set -euo pipefail
base=$1 work=$2 hyperkube=$3 coredns=$4 localpath=$5
mkdir -p "$work/node"
tar --numeric-owner -C "$work/node" -xpf "$base"

# Copied inside the chroot, where links such as /etc/alternatives/iptables lead where they should.
chroot "$work/node" /bin/bash -euo pipefail -s <<'SH'
mkdir -p /components/{usr/bin,usr/sbin,usr/lib,usr/lib64,usr/local/bin,etc,proc,sys,dev,run,var}
cd /components
mkdir -m 1777 tmp
for d in bin sbin lib lib64; do ln -s "usr/$d" "$d"; done
programs=(/usr/bin/dash /usr/sbin/xtables-nft-multi /usr/sbin/xtables-legacy-multi /usr/sbin/conntrack)
for p in mkdir rm cp mv ln ls cat chmod chown stat sleep true env id; do programs+=("$(readlink -f "$(type -P "$p")")"); done
plugins=("$(dirname "$(find /usr/lib -name libxt_standard.so)")"/*.so)
{ printf '%s\n' "${programs[@]}" "${plugins[@]}"
  ldd "${programs[@]}" "${plugins[@]}" 2>/dev/null | grep -oE '/[^ :()]+\.so[^ :()]*' || true
} | sort -u | while read -r f; do cp -Lu --parents "$f" . ; done
ln -s dash usr/bin/sh
for kind in nft legacy; do
  for n in iptables ip6tables; do for s in "" -save -restore; do ln -s "xtables-$kind-multi" "usr/sbin/$n-$kind$s"; done; done
done
for n in iptables ip6tables; do for s in "" -save -restore; do ln -s xtables-nft-multi "usr/sbin/$n$s"; done; done
cp --parents /etc/passwd /etc/group /etc/nsswitch.conf /etc/ssl/certs/ca-certificates.crt .
SH
mv "$work/node/components" "$work/components"

bin=$work/components/usr/local/bin
install -m755 "$hyperkube" "$bin/hyperkube"
for n in kube-apiserver kube-controller-manager kube-scheduler kube-proxy etcd; do ln -s hyperkube "$bin/$n"; done
install -m755 "$coredns" "$work/components/coredns"
install -m755 "$localpath" "$bin/local-path-provisioner"
