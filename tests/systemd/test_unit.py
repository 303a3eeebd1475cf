"""The unit file and the example configuration: read, and run by a real systemd.

That systemd is a container over this machine's own root. Nothing is written to the machine: the
root is an overlay on a tmpfs, mounted in a mount namespace that ends with the container.

    /                     overlay: this machine's root, and over it what `_stage` makes:
      etc/dsd etc/systemd   the configuration, the unit
      opt/dsd               an installation as the unit expects it, of this checkout
      opt/python            bind of the Python that runs the tests, wherever it lies
      opt/packages/N        binds of its site-packages
      srv/                  checkpoints
"""

import contextlib
import itertools
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import httpx
import msgspec
import pytest

from dsd.daemon import config as configuration
from dsd.daemon.notify import Notifier

ROOT = Path(__file__).resolve().parent.parent.parent
UNIT = ROOT / "systemd" / "dsd.service"
EXAMPLE = ROOT / "systemd" / "dsd.toml"
TOOLS = ("systemd-nspawn", "nsenter", "unshare", "setpriv")
SITE_PACKAGES = ("site-packages", "dist-packages")
NOT_INSTALLED = shutil.ignore_patterns(".*", "__pycache__", "tests", "build", "dist", "*.egg-info")
BOOT_TIMEOUT_S = 20
JOURNAL_TIMEOUT_S = 5
COMMAND_TIMEOUT_S = 40
READY_TIMEOUT_S = 40
CONFIG = """
[server]
served_model_name = ["first"]
[model]
model_dir = "/srv/Tiny-V3"
device = "cpu"
dtype = "float32"
[engine]
max_num_tokens = 256
"""
ABSENT_ADDRESS = "port 8000 on 192.0.2.1 fails: Cannot assign requested address"
BOOT = """
set -e
stage=$1 disk=$2
shift 2
mount -t tmpfs -o mode=0755 tmpfs "$disk"
mkdir "$disk/upper" "$disk/work" "$disk/root"
cp -a "$stage/." "$disk/upper/"
chown -R 0:0 "$disk/upper"
chmod -R u=rwX,go=rX "$disk/upper"
mount -t overlay overlay -o "lowerdir=/,upperdir=$disk/upper,workdir=$disk/work" "$disk/root"
exec setpriv --pdeathsig TERM systemd-nspawn -q -D "$disk/root" --register=no --keep-unit \
    --private-network "$@" /lib/systemd/systemd systemd.unit=sysinit.target
"""


# ---- the files ----


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is missing")
def test_unit_systemd_analyze_has_nothing_to_say(tmp_path: Path) -> None:
    """It returns 0 on unknown keys, and wants the binaries to be there."""
    copy = tmp_path / UNIT.name
    copy.write_text(re.sub(r"/opt/dsd/bin/\w+", "/bin/true", UNIT.read_text()))
    result = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(copy)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.stdout + result.stderr, result.returncode) == ("", 0)


def test_unit_waits_for_the_drain_before_it_kills() -> None:
    found = re.search(r"^TimeoutStopSec=(\d+)$", UNIT.read_text(), re.MULTILINE)
    assert found
    assert int(found[1]) > configuration.Config().server.drain_timeout_s


def test_example_changes_nothing_as_it_is() -> None:
    assert configuration.load(EXAMPLE, {}) == configuration.Config()


def test_example_uncommented_is_every_key_at_its_default(tmp_path: Path) -> None:
    path = tmp_path / "dsd.toml"
    path.write_text(re.sub(r"^#(?=\w)", "", EXAMPLE.read_text(), flags=re.MULTILINE))
    assert configuration.load(path, {}) == configuration.Config()
    written = tomllib.loads(path.read_text())
    assert {section: list(keys) for section, keys in written.items()} == {
        section: list(msgspec.structs.asdict(keys))
        for section, keys in msgspec.structs.asdict(configuration.Config()).items()
    }


def test_example_marks_what_can_be_reloaded() -> None:
    found, section = set(), ""
    lines = EXAMPLE.read_text().splitlines()
    for above, line in itertools.pairwise(lines):
        if heading := re.match(r"\[(\w+)\]", line):
            section = heading[1]
        if (key := re.match(r"#(\w+) = ", line)) and above.endswith("Reloadable."):
            found.add((section, key[1]))
    assert found == configuration.RELOADABLE


# ---- the protocol ----


def _manager(path: Path) -> socket.socket:
    manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    manager.settimeout(5)
    manager.bind(str(path))
    return manager


def test_notifier_ready_is_repeated_until_the_manager_takes_it(tmp_path: Path) -> None:
    path = tmp_path / "notify"
    notifier = Notifier(str(path))
    with contextlib.closing(notifier):
        notifier.ready()
        with _manager(path) as manager:
            notifier.ready()
            notifier.ready()
            notifier.status("serving")
            assert [manager.recv(4096) for _ in range(2)] == [b"READY=1", b"STATUS=serving"]


def test_notifier_status_of_two_lines_cannot_add_a_field(tmp_path: Path) -> None:
    with _manager(tmp_path / "notify") as manager:
        with contextlib.closing(Notifier(str(tmp_path / "notify"))) as notifier:
            notifier.status("the file a\nREADY=1 is missing")
        assert manager.recv(4096) == b"STATUS=the file a READY=1 is missing"


# ---- a machine ----


class Machine:
    """A booted container; ended by its context."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self._process = process
        self._log = log
        self.init_pid = 0

    def boot(self) -> None:
        deadline = time.monotonic() + BOOT_TIMEOUT_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                last = self._log.read_text(errors="replace").strip().splitlines()[-1:]
                pytest.skip(f"systemd-nspawn does not run here: {' '.join(last)}")
            self.init_pid = self.init_pid or _find_init(self._process.pid)
            if self.init_pid and not self.run("is-active", "sysinit.target", check=False)[0]:
                return
            time.sleep(0.05)
        raise AssertionError(f"systemd did not come up:\n{self._log.read_text(errors='replace')}")

    def command(self, *words: str) -> list[str]:
        return ["nsenter", "-a", "-t", str(self.init_pid), *words]

    def run(self, *words: str, check: bool = True) -> tuple[int, str]:
        """`systemctl WORDS`: exit status and output."""
        result = subprocess.run(
            self.command("systemctl", "--no-pager", *words),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
            check=False,
        )
        assert not (check and result.returncode), f"{words}: {result.stdout}\n{self.status()}"
        return result.returncode, result.stdout

    def status(self) -> str:
        return self.run("status", "--lines=50", "--full", "dsd", check=False)[1]

    def status_with(self, sentence: str) -> bool:
        """Whether `systemctl status` shows it; the journal is a moment behind."""
        deadline = time.monotonic() + JOURNAL_TIMEOUT_S
        while sentence not in self.status() and time.monotonic() < deadline:
            time.sleep(0.05)
        return sentence in self.status()

    def show(self, name: str) -> str:
        return self.run("show", "--value", "-p", name, "dsd")[1].strip()

    def path(self, path: str) -> Path:
        """A path of the machine, as this process sees it."""
        return Path(f"/proc/{self.init_pid}/root{path}")

    def stop_service(self) -> None:
        """And lets it start again however often it was started."""
        self.run("stop", "dsd")
        self.run("reset-failed", "dsd", check=False)

    def configure(self, text: str) -> None:
        self.path("/etc/dsd/dsd.toml").write_text(text)

    def http(self) -> httpx.Client:
        transport = httpx.HTTPTransport(uds=str(self.path("/run/dsd/api.sock")))
        return httpx.Client(transport=transport, base_url="http://dsd", timeout=30)

    def complete(self, model: str) -> int:
        asked = {"model": model, "prompt": "Where is New York?", "max_tokens": 4}
        with self.http() as http:
            return http.post("/v1/completions", json=asked).status_code

    def wait_ready(self) -> None:
        deadline = time.monotonic() + READY_TIMEOUT_S
        while time.monotonic() < deadline:
            if self.show("ActiveState") == "active":
                with self.http() as http:
                    if http.get("/readyz").status_code == 200:
                        return
            time.sleep(0.05)
        raise AssertionError(f"the service did not become ready:\n{self.status()}")

    def pids(self) -> list[int]:
        """Processes of the user dsd in the machine."""
        uid = next(
            int(line.split(":")[2])
            for line in self.path("/etc/passwd").read_text().splitlines()
            if line.startswith("dsd:")
        )
        ours = os.readlink(f"/proc/{self.init_pid}/ns/pid")
        found = []
        for directory in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if directory.stat().st_uid == uid and os.readlink(directory / "ns/pid") == ours:
                    found.append(int(directory.name))
        return found

    def end(self) -> None:
        """systemd-nspawn kills its container when it is told to end."""
        self._process.terminate()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            if self.init_pid:
                os.kill(self.init_pid, signal.SIGKILL)
            self._process.kill()
            self._process.wait()


def _find_init(nspawn: int) -> int:
    """The container's first process, once it is systemd; 0 before."""
    with contextlib.suppress(OSError):
        for child in Path(f"/proc/{nspawn}/task/{nspawn}/children").read_text().split():
            status = Path(f"/proc/{child}/status").read_text()
            is_first = re.search(r"^NSpid:.*\t1$", status, re.MULTILINE)
            if is_first and status.startswith("Name:\tsystemd\n"):
                return int(child)
    return 0


def _site_packages() -> list[Path]:
    places = [Path(place) for place in sys.path]
    return [place for place in places if place.name in SITE_PACKAGES and place.is_dir()]


def _stage(stage: Path, checkpoint: Path) -> None:
    """What the machine has over this one's root."""
    python = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = stage / "opt/dsd/lib" / python / "site-packages"
    programs = stage / "opt/dsd/bin"
    programs.mkdir(parents=True)
    (programs / "python").symlink_to(f"/opt/python/bin/{python}")
    for name, module in (("dsd", "cli"), ("dsctl", "dsctl")):
        program = programs / name
        program.write_text(
            f"#!/opt/dsd/bin/python -P\nfrom dsd.daemon.{module} import main\n\nmain()\n"
        )
        program.chmod(0o755)
    (stage / "opt/dsd/pyvenv.cfg").write_text("home = /opt/python/bin\n")
    shutil.copytree(ROOT, packages / "dsd", ignore=NOT_INSTALLED)
    binds = [f"/opt/packages/{number}\n" for number in range(len(_site_packages()))]
    (packages / "test.pth").write_text("".join(binds))
    shutil.copytree(checkpoint, stage / "srv/Tiny-V3")
    shutil.copytree(checkpoint, stage / "srv/Damaged")
    for weights in (stage / "srv/Damaged").glob("*.safetensors"):
        os.truncate(weights, weights.stat().st_size - 1000)
    for directory in ("etc/dsd", "etc/systemd/system/dsd.service.d"):
        (stage / directory).mkdir(parents=True)
    shutil.copy(UNIT, stage / "etc/systemd/system")
    # A libpython is otherwise looked for where this Python was installed.
    (stage / "etc/systemd/system/dsd.service.d/python.conf").write_text(
        "[Service]\nEnvironment=LD_LIBRARY_PATH=/opt/python/lib OMP_NUM_THREADS=1\n"
    )
    (stage / "etc/fstab").touch()


def _boot_command(stage: Path, disk: Path) -> list[str]:
    binds = [f"--bind-ro={sys.base_prefix}:/opt/python"]
    for number, place in enumerate(_site_packages()):
        binds.append(f"--bind-ro={place}:/opt/packages/{number}")
    unshare = ["unshare", "--mount", "--propagation", "private", "sh", "-c", BOOT, "boot"]
    return [*unshare, str(stage), str(disk), *binds]


def _cgroups_left() -> set[Path]:
    """What systemd-nspawn makes beside itself, and leaves there."""
    return {
        Path(f"/sys/fs/cgroup/{tree}{place}/{name}")
        for line in Path("/proc/self/cgroup").read_text().splitlines()
        for place in [line.split(":", 2)[2].rstrip("/")]
        for tree in ("systemd", "unified", "")
        for name in ("payload", "supervisor")
    }


def _remove_cgroups(roots: set[Path]) -> None:
    for root in roots:
        for directory, _, _ in os.walk(root, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(directory)


@pytest.fixture(scope="module")
def machine(small_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    if missing := [tool for tool in TOOLS if not shutil.which(tool)]:
        pytest.skip(f"{', '.join(missing)}: missing (packages systemd-container, util-linux)")
    if os.geteuid() != 0:
        pytest.skip("systemd-nspawn needs root")
    base = tmp_path_factory.mktemp("machine")
    stage, disk, log = base / "stage", base / "disk", base / "log"
    stage.mkdir()
    disk.mkdir()
    _stage(stage, small_checkpoint)
    cgroups = {path for path in _cgroups_left() if not path.exists()}
    with log.open("wb") as output:
        process = subprocess.Popen(
            _boot_command(stage, disk), stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
    machine = Machine(process, log)
    try:
        machine.boot()
        add_user = re.search(r"systemd-sysusers --inline '(.*)'", UNIT.read_text())
        assert add_user
        users = machine.command("systemd-sysusers", "--inline", add_user[1])
        subprocess.run(users, check=True, capture_output=True)
        yield machine
    finally:
        machine.end()
        _remove_cgroups(cgroups)


@pytest.fixture
def serving(machine: Machine) -> Machine:
    """The machine with the service up, on CONFIG."""
    machine.configure(CONFIG)
    machine.run("reset-failed", "dsd", check=False)
    machine.run("start", "dsd")
    machine.wait_ready()
    machine.run("reload", "dsd")
    return machine


# ---- the service ----


@pytest.mark.slow
def test_start_returns_active_then_ready_and_answers(machine: Machine) -> None:
    machine.stop_service()
    machine.configure(CONFIG)
    machine.run("start", "dsd")
    assert machine.show("ActiveState") == "active"
    assert re.match(r"(loading|building|serving) ", machine.show("StatusText"))
    machine.wait_ready()
    assert machine.complete("first") == 200
    assert machine.show("StatusText") == "serving first on cpu"
    modes = {"/run/dsd": 0o755, "/run/dsd/api.sock": 0o660, "/run/dsd/control.sock": 0o600}
    for path, mode in modes.items():
        found = machine.path(path).stat()
        assert stat.S_IMODE(found.st_mode) == mode, path
        assert found.st_uid != 0, path
    assert int(machine.show("LimitNOFILESoft")) > 10_000


@pytest.mark.slow
def test_reload_applies_a_changed_file(serving: Machine) -> None:
    pid = serving.show("MainPID")
    serving.configure(CONFIG.replace("first", "second"))
    serving.run("reload", "dsd")
    assert serving.complete("second") == 200
    assert serving.complete("first") == 404
    assert serving.show("StatusText") == "serving second on cpu"
    assert serving.show("MainPID") == pid


@pytest.mark.slow
def test_reload_of_a_bad_file_fails_with_its_line_and_serving_goes_on(serving: Machine) -> None:
    serving.configure(CONFIG.replace("cpu", "gpu"))
    code, _ = serving.run("reload", "dsd", check=False)
    assert code != 0
    assert serving.status_with("nothing was changed: /etc/dsd/dsd.toml, line 6: ")
    assert serving.show("ActiveState") == "active"
    assert serving.complete("first") == 200


@pytest.mark.slow
def test_worker_killed_status_returns_to_serving(serving: Machine) -> None:
    (worker,) = [
        pid
        for pid in serving.pids()
        if b"dsd.model.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    os.kill(worker, signal.SIGKILL)
    deadline = time.monotonic() + READY_TIMEOUT_S
    seen = {serving.show("StatusText")}
    while time.monotonic() < deadline and not (
        len(seen) > 1 and serving.show("StatusText") == "serving first on cpu"
    ):
        seen.add(serving.show("StatusText"))
    assert serving.show("StatusText") == "serving first on cpu"
    serving.wait_ready()


@pytest.mark.slow
def test_main_process_killed_is_started_again_without_orphans(serving: Machine) -> None:
    before = set(serving.pids())
    serving.run("kill", "--kill-who=main", "-s", "KILL", "dsd")
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline and serving.show("NRestarts") == "0":
        time.sleep(0.05)
    serving.wait_ready()
    assert not before & set(serving.pids())


@pytest.mark.slow
def test_stop_finishes_the_request_at_hand_and_leaves_nothing(serving: Machine) -> None:
    asked = {"model": "first", "prompt": "Where is New York?", "max_tokens": 200}
    asked |= {"ignore_eos": True, "stream": True}
    with serving.http() as http, http.stream("POST", "/v1/completions", json=asked) as answer:
        lines = answer.iter_lines()
        next(lines)
        stop = subprocess.Popen(serving.command("systemctl", "stop", "dsd"))
        rest = list(lines)
    assert stop.wait(timeout=COMMAND_TIMEOUT_S) == 0
    assert "data: [DONE]" in rest
    assert '"finish_reason":"length"' in "".join(rest).replace(" ", "")
    assert (serving.show("ActiveState"), serving.show("Result")) == ("inactive", "success")
    assert serving.status_with('"live_requests": 1'), "the request had ended before the stop"
    assert serving.pids() == []
    assert not serving.path("/run/dsd").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "sentence", "state"),
    [
        (CONFIG.replace("Tiny-V3", "Damaged"), "model-00001.safetensors is damaged", "activating"),
        (CONFIG.replace("[server]", '[server]\nhost = "192.0.2.1"'), ABSENT_ADDRESS, "activating"),
        (CONFIG.replace("first", '"'), "dsd: /etc/dsd/dsd.toml: ", "failed"),
    ],
    ids=["checkpoint", "address", "configuration"],
)
def test_start_with_a_bad_file_fails_and_says_why(
    machine: Machine, config: str, sentence: str, state: str
) -> None:
    machine.stop_service()
    machine.configure(config)
    code, _ = machine.run("start", "dsd", check=False)
    assert code != 0
    assert machine.status_with(sentence), machine.status()
    assert machine.show("ActiveState") == state
    machine.stop_service()
    assert machine.pids() == []
