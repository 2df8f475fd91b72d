"""What is read off the host, and the sentences said about it."""

import resource
import socket
from pathlib import Path

import pytest
from dev.cluster import host
from dev.cluster.firewall import has_engine_chains, removal
from dev.cluster.host import UserError
from dev.cluster.progress import Progress


def test_settings(tmp_path: Path) -> None:
    (tmp_path / "v.env").write_text("# comment\nA=1\nB = x y\n\n")
    assert host.read_settings(tmp_path / "v.env") == {"A": "1", "B": "x y"}
    (tmp_path / "v.env").write_text("nonsense\n")
    with pytest.raises(UserError, match="line 1"):
        host.read_settings(tmp_path / "v.env")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ID=debian\nVERSION_CODENAME=bookworm\n", True),
        ("ID=ubuntu\nID_LIKE=debian\n", True),
        ('ID=linuxmint\nID_LIKE="ubuntu debian"\n', True),
        ('ID="fedora"\n', False),
        ("", False),
    ],
)
def test_debian_like(text: str, expected: bool) -> None:
    assert host.is_debian_like(host.os_release(text)) is expected


def test_capability() -> None:
    assert host.has_capability(host.CAP_SYS_RESOURCE, "CapEff:\t000001ffffffffff\n")
    assert not host.has_capability(host.CAP_SYS_RESOURCE, "CapEff:\t000001fffeffffff\n")
    assert not host.has_capability(host.CAP_SYS_RESOURCE, "")


@pytest.mark.parametrize(
    ("text", "numbers"), [("go1.26.8", (1, 26, 8)), ("v1.36.3", (1, 36, 3)), ("2:1.19~1", (1, 19)), ("?", ())]
)
def test_version_tuple(text: str, numbers: tuple[int, ...]) -> None:
    assert host.version_tuple(text) == numbers


SOURCES = """\
Types: deb
# a comment
URIs: http://packages.example/debian
Suites: bookworm bookworm-updates
Components: main
Signed-By: /usr/share/keyrings/debian.gpg

Types: deb
URIs: http://packages.example/security
Suites: bookworm-security
"""
BOOKWORM = {"ID": "debian", "VERSION_CODENAME": "bookworm"}


def test_apt_source_in_stanzas() -> None:
    source = host.apt_source(BOOKWORM, ["", SOURCES])
    assert source == host.AptSource(
        "bookworm", "http://packages.example/debian", "main", "/usr/share/keyrings/debian.gpg"
    )


def test_apt_source_in_lines() -> None:
    lines = "# deb http://no.example noble main\ndeb [arch=amd64 signed-by=/k.gpg] http://u.example/ubuntu noble main\n"
    source = host.apt_source({"ID": "ubuntu", "VERSION_CODENAME": "noble"}, [lines])
    assert source == host.AptSource("noble", "http://u.example/ubuntu", "main,universe", "/k.gpg")


def test_apt_source_missing_says_what_to_do() -> None:
    with pytest.raises(UserError, match="configure one"):
        host.apt_source(BOOKWORM, ["deb http://x.example trixie main"])


def test_containers_conf_is_empty_where_podman_does_without() -> None:
    assert host.containers_conf(1048576, 1048576, may_raise=True, v2=True, runc=True, pid_max=32768) == ""


def test_containers_conf_keeps_to_the_hard_limits() -> None:
    text = host.containers_conf(20000, 96365, may_raise=False, v2=False, runc=True, pid_max=32768)
    assert 'default_ulimits = ["nofile=20000:20000", "nproc=32768:32768"]' in text
    assert 'runtime = "runc"' in text
    unlimited = host.containers_conf(
        resource.RLIM_INFINITY, resource.RLIM_INFINITY, may_raise=False, v2=True, runc=True, pid_max=4194304
    )
    assert '"nofile=1048576:1048576", "nproc=4194304:4194304"' in unlimited
    assert "runtime" not in unlimited


def test_port_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match="API_PORT"):
            host.check_port(taken.getsockname()[1])


def test_disk(tmp_path: Path) -> None:
    host.check_disk(tmp_path / "not/yet/there", 1, "This")
    with pytest.raises(UserError, match=r"This needs 1073741824\.0 GiB free"):
        host.check_disk(tmp_path, 2**60, "This")


def test_commands_that_are_missing_or_hang_are_results() -> None:
    assert host.run(["no-such-program"]).returncode == 127
    assert host.run(["sleep", "5"], timeout=0.05).returncode == 124


def test_check_quotes_the_end_of_the_output() -> None:
    assert host.check(host.run(["echo", "fine"]), "no") == "fine"
    with pytest.raises(UserError, match=r"It broke: mend it\.\nreason"):
        host.check(host.run(["sh", "-c", "echo reason >&2; exit 3"]), "It broke: mend it.")


def test_unknown_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINE", "rkt")
    with pytest.raises(UserError, match="docker or podman"):
        host.find_engine(tmp_path)


def test_no_engine_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ENGINE", raising=False)
    monkeypatch.setattr(host, "docker_problem", lambda: "the Docker daemon does not answer")
    monkeypatch.setattr(host, "podman_problem", lambda: "podman is not installed")
    with pytest.raises(UserError, match=r"daemon does not answer; podman is not installed\): run `make deps`"):
        host.find_engine(tmp_path)


def test_docker_before_podman(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ENGINE", raising=False)
    monkeypatch.setattr(host, "docker_problem", lambda: None)
    assert host.find_engine(tmp_path).name == "docker"


def test_packages_are_only_what_is_needed() -> None:
    assert host.packages(engine_works=True, image_available=True) == []
    names = [p.name for p in host.packages(engine_works=False, image_available=False)]
    assert names == ["podman", "runc", "containernetworking-plugins", "iptables", "uidmap", "debootstrap"]


def test_install_elsewhere_says_exactly_what(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "os_release", lambda: {"ID": "fedora"})
    missing = [host.Package("podman", "runs", present=False), host.Package("runc", "runs", present=False)]
    with pytest.raises(UserError, match="podman runc"):
        host.install_packages(missing, Progress())


SAVED = """\
*filter
:FORWARD ACCEPT [0:0]
:CNI-ADMIN - [0:0]
:CNI-FORWARD - [0:0]
:MINE - [0:0]
-A FORWARD -j MINE
-A FORWARD -m comment --comment "CNI firewall plugin rules" -j CNI-FORWARD
-A CNI-FORWARD -j CNI-ADMIN
COMMIT
*nat
:POSTROUTING ACCEPT [0:0]
COMMIT
"""


def test_firewall_removal_takes_only_the_engines_chains() -> None:
    assert has_engine_chains(SAVED)
    assert removal(SAVED).splitlines() == [
        "*filter",
        '-D FORWARD -m comment --comment "CNI firewall plugin rules" -j CNI-FORWARD',
        "-F CNI-ADMIN",
        "-F CNI-FORWARD",
        "-X CNI-ADMIN",
        "-X CNI-FORWARD",
        "COMMIT",
    ]
    assert removal("*nat\n:POSTROUTING ACCEPT [0:0]\nCOMMIT\n") == ""
