#!/usr/bin/env bash
# The node's Debian (or Ubuntu) root: what kind's own base image installs, from the distribution's packages.
# Usage: base-root.sh OUT.tar WORKDIR SUITE MIRROR COMPONENTS [KEYRING]
# dev/cluster/nodeimage.py runs it in a mount namespace of its own, so that what debootstrap mounts is gone at the end,
# even after a failure.
set -euo pipefail
out=$1 root=$2/root suite=$3 mirror=$4 components=$5 keyring=${6:-}

packages=systemd,systemd-sysv,dbus                                   # what runs the node's services
packages+=,conntrack,iptables,nftables,iproute2,ethtool,socat        # what the kubelet and kube-proxy call
packages+=,util-linux,mount,kmod,procps,hostname,bash,jq,ca-certificates  # what kind's entry point calls
packages+=,containerd,runc,containernetworking-plugins               # what runs the pods

debootstrap --variant=minbase --components="$components" ${keyring:+--keyring="$keyring"} \
  --include="$packages" "$suite" "$root" "$mirror" </dev/null

rm -rf "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/* "$root"/var/log/* \
  "$root"/usr/share/{doc,man,info,locale,lintian,bash-completion}/*
tar --numeric-owner --sort=name -C "$root" -cf "$out" .
