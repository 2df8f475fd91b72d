#!/usr/bin/env bash
# The rest of the node: kind's own entry point and units (out of its Go module), containerd's settings, a network for the
# pods, and the images that the node would otherwise pull, unpacked into containerd's store now, not at every start.
# Usage: node-root.sh WORKDIR HYPERKUBE KIND_SOURCE VERSION PAUSE_IMAGE ARCHIVE...
# WORKDIR/node is components-root.sh's. It runs inside its own mount and process namespace: all that is mounted or
# started here ends with it.
set -euo pipefail
work=$1 hyperkube=$2 kind=$3 version=$4 pause=$5
shift 5
node=$work/node files=$kind/images/base/files

mkdir -p "$node"/kind/{bin,manifests} "$node"/etc/cni/net.d "$node"/etc/kubernetes/manifests
install -m755 "$files"/usr/local/bin/* "$node/usr/local/bin/"
install -m755 "$files"/kind/bin/* "$node/kind/bin/"
(cd "$files/etc" && find . -type f) | while read -r f; do install -D -m644 "$files/etc/$f" "$node/etc/$f"; done
printf %s "$version" > "$node/kind/version"
install -m755 "$hyperkube" "$node/usr/bin/kubelet"
for n in kubeadm kubectl; do ln -sf kubelet "$node/usr/bin/$n"; done

# A container has no use for most of what a machine's systemd starts: the same list as kind's base image.
rm -f "$node"/lib/systemd/system/{multi-user,local-fs,basic}.target.wants/* "$node"/etc/systemd/system/*.wants/* \
  "$node"/lib/systemd/system/sockets.target.wants/*udev* "$node"/lib/systemd/system/sockets.target.wants/*initctl* \
  "$node"/lib/systemd/system/sysinit.target.wants/systemd-tmpfiles-setup.service
echo 'ReadKMsg=no' >> "$node/etc/systemd/journald.conf"
sed -i 's#/usr/local/bin/containerd#/usr/bin/containerd#' "$node/etc/systemd/system/containerd.service"
chroot "$node" systemctl --quiet enable kubelet containerd undo-mount-hacks
chroot "$node" systemctl --quiet mask systemd-binfmt

cat > "$node/etc/containerd/config.toml" <<TOML
version = 2
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "$pause"
  tolerate_missing_hugepages_controller = true
  # The host's root may lack CAP_SYS_RESOURCE, and then cannot lower an OOM score.
  restrict_oom_score_adj = true
  disable_apparmor = true
  [plugins."io.containerd.grpc.v1.cri".containerd]
    discard_unpacked_layers = true
    snapshotter = "overlayfs"
    default_runtime_name = "runc"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    base_runtime_spec = "/etc/containerd/cri-base.json"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      SystemdCgroup = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "/etc/cni/net.d"
TOML
chroot "$node" ctr oci spec |
  chroot "$node" jq '.hooks.createContainer += [{path: "/kind/bin/mount-product-files.sh"}] | del(.process.rlimits)' \
  > "$node/etc/containerd/cri-base.json"

# Point-to-point links, as kind's own network has them: every packet passes the node's routing, so that services work
# whether or not the host's kernel filters bridged packets. The cluster has one real node, so one range is enough.
cat > "$node/etc/cni/net.d/10-ptp.conflist" <<'JSON'
{"cniVersion": "1.0.0", "name": "ptp", "plugins": [
  {"type": "ptp", "ipMasq": true,
   "ipam": {"type": "host-local", "dataDir": "/run/cni-ipam-state", "ranges": [[{"subnet": "10.244.0.0/24"}]],
            "routes": [{"dst": "0.0.0.0/0"}]}},
  {"type": "portmap", "capabilities": {"portMappings": true}}]}
JSON

# The manifest of the standard StorageClass, as kind would write it, with kind's own names for its two images: the
# archives given here hold the same names.
constants=$kind/pkg/build/nodeimage/const_storage.go
image() { sed -nE "s/^const $1 = \"(.*)\"/\1/p" "$constants"; }
awk '/^const defaultStorageManifest = `/{on=1;next} /^`/{on=0} on' "$constants" |
  sed -e "s#\` + storageProvisionerImage + \`#$(image storageProvisionerImage)#" \
    -e "s#\` + storageHelperImage + \`#$(image storageHelperImage)#" > "$node/kind/manifests/default-storage.yaml"

# containerd itself unpacks the images; the packed layers are dropped, the node has no use for them.
mount -t proc proc "$node/proc"
mount -t tmpfs tmpfs "$node/run"
mount -t tmpfs tmpfs "$node/tmp"
mount --rbind /dev "$node/dev"
mount --rbind /sys "$node/sys"
chroot "$node" containerd --log-level warn &
for _ in $(seq 100); do chroot "$node" ctr version >/dev/null 2>&1 && break; sleep 0.2; done
for archive in "$@"; do
  chroot "$node" ctr --namespace k8s.io images import - < "$archive"
done
for manifest in $(chroot "$node" ctr --namespace k8s.io images ls | awk 'NR > 1 {print $3}' | sort -u); do
  chroot "$node" ctr --namespace k8s.io content get "$manifest" | chroot "$node" jq -r '.layers[].digest'
done | sort -u | xargs -r chroot "$node" ctr --namespace k8s.io content rm >/dev/null
# containerd frees the space when it next tidies up; removing a name with --sync has it do that now.
chroot "$node" ctr --namespace k8s.io images tag "$pause" localhost/gone:1 >/dev/null
chroot "$node" ctr --namespace k8s.io images rm --sync localhost/gone:1 >/dev/null
chroot "$node" ctr --namespace k8s.io images ls -q
kill -TERM %1; wait %1 || true
umount -l "$node"/{sys,dev,tmp,run,proc}
rm -rf "$node"/var/lib/containerd/tmpmounts/* "$node"/run/* "$node"/tmp/*
