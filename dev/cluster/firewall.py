"""The packet filter rules that podman's network leaves behind when its last container has gone.

Podman (with CNI plugins, or netavark) makes its own chains at the first container and never removes them. `down`
removes those that were not there before the cluster and that no container uses.
"""

from __future__ import annotations

import re

from dev.cluster.host import run, which

OURS = re.compile(r"\b(CNI|NETAVARK)[-_]")
TOOLS = (("iptables-save", "iptables-restore"), ("ip6tables-save", "ip6tables-restore"))


def has_engine_chains(saved: str) -> bool:
    """Return whether an iptables-save shows chains of a container engine's network."""
    return any(line.startswith(":") and OURS.search(line) for line in saved.splitlines())


def removal(saved: str) -> str:
    """Build the input for iptables-restore --noflush that removes the engine's chains and the rules leading to them."""
    script: list[str] = []
    for table in re.split(r"^\*", saved, flags=re.M)[1:]:
        lines = table.splitlines()
        chains = [line[1:].split()[0] for line in lines if line.startswith(":") and OURS.search(line)]
        if not chains:
            continue
        rules = [line for line in lines if line.startswith("-A ") and OURS.search(line)]
        outer = [rule for rule in rules if rule.split()[1] not in chains]
        script.append(f"*{lines[0]}")
        script += [f"-D {rule[3:]}" for rule in outer]
        script += [f"-F {chain}" for chain in chains]
        script += [f"-X {chain}" for chain in chains]
        script.append("COMMIT")
    return "\n".join(script) + "\n" if script else ""


def engine_chains_present() -> bool:
    return any(has_engine_chains(run([save]).stdout.decode(errors="replace")) for save, _ in TOOLS if which(save))


def remove_engine_chains() -> list[str]:
    """Remove the engine's chains; return the tools that could not."""
    failed: list[str] = []
    for save, restore in TOOLS:
        script = removal(run([save]).stdout.decode(errors="replace")) if which(save) else ""
        if script and run([restore, "--noflush"], stdin=script.encode()).returncode != 0:
            failed.append(restore)
    return failed
