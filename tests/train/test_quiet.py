import subprocess
import sys
from pathlib import Path

import pytest

from k2train.train.quiet import quiet

ROOT = Path(__file__).parents[2]


def run(script: str, *arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env={
            "PATH": "/usr/bin:/bin",
            "PYTHONPATH": f"{ROOT}:{ROOT / 'optim'}",
            "OMP_NUM_THREADS": "1",
            "HOME": str(arguments[0]),
        },
    )


NOISY = """
import logging, os, subprocess, sys, warnings
from pathlib import Path
from k2train.train.quiet import quiet
assert "torch" not in sys.modules
early = logging.getLogger("early"); early.addHandler(logging.StreamHandler(sys.stdout)); early.propagate = False
streams = quiet(Path(sys.argv[1]) / "logs" / "rank-0.log", rank=0, world_size=1)
print("python stdout")
print("python stderr", file=sys.stderr)
early.warning("early logger")
logging.getLogger("late").info("late logger")
warnings.warn("a FutureWarning", FutureWarning)
os.write(1, b"descriptor 1\\n")
subprocess.run(["sh", "-c", "echo child; echo child error >&2"])
print("for the person", file=streams.out)
print("also for the person", file=streams.err)
import atexit
atexit.register(lambda: os.write(2, b"last words\\n"))
"""


def test_only_what_is_meant_for_the_person_gets_through(tmp_path):
    found = run(NOISY, tmp_path)
    assert (found.returncode, found.stdout, found.stderr) == (0, "for the person\n", "also for the person\n")
    log = (tmp_path / "logs" / "rank-0.log").read_text()
    noise = (
        "python stdout",
        "python stderr",
        "early logger",
        "INFO late: late logger",
        "FutureWarning",
        "descriptor 1",
    )
    for text in (*noise, "child\n", "child error", "last words"):
        assert text in log
    assert log.index("python stdout") < log.index("python stderr") < log.index("descriptor 1")


def test_a_crash_in_native_code_leaves_its_stack_in_the_log(tmp_path):
    script = """
import os, signal, sys
from pathlib import Path
from k2train.train.quiet import quiet
quiet(Path(sys.argv[1]) / "rank-0.log", rank=0, world_size=1)
os.kill(os.getpid(), signal.SIGSEGV)
"""
    found = run(script, tmp_path)
    assert found.returncode < 0
    assert found.stderr == ""
    assert "Segmentation fault" in (tmp_path / "rank-0.log").read_text()


def test_the_terminal_comes_back(tmp_path, capfd):
    with quiet(tmp_path / "rank-0.log", rank=0, world_size=1) as streams:
        print("hidden")
        print("seen", file=streams.out)
    print("seen again")
    assert capfd.readouterr().out == "seen\nseen again\n"
    assert "hidden\n" in (tmp_path / "rank-0.log").read_text()


def test_an_unwritable_log_changes_nothing(tmp_path, capfd):
    (tmp_path / "logs").write_text("a file where the folder should be")
    with pytest.raises(OSError, match="logs"):
        quiet(tmp_path / "logs" / "rank-0.log", rank=0, world_size=1)
    print("still here")
    assert capfd.readouterr().out == "still here\n"


def test_deepspeed_comes_up_in_silence(tmp_path):
    script = """
import sys
from pathlib import Path
from k2train.train.quiet import quiet, import_deepspeed
streams = quiet(Path(sys.argv[1]) / "rank-0.log", rank=0, world_size=1)
import_deepspeed("cpu")
import deepspeed
from torch.distributed import HashStore
import torch.distributed
torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
print(deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"], file=streams.out)
"""
    found = run(script, tmp_path)
    log = (tmp_path / "rank-0.log").read_text()
    assert (found.stdout, found.stderr) == ("False\n", ""), log
    assert found.returncode == 0


FULL = """
import os, resource, signal, sys
from pathlib import Path
from k2train.train.quiet import quiet
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
streams = quiet(Path(sys.argv[1]) / "rank-0.log", rank=0, world_size=1)
resource.setrlimit(resource.RLIMIT_FSIZE, (200, resource.RLIM_INFINITY))  # any file: EFBIG after 200 bytes
try:
    os.write(1, 300 * b"x")
    os.write(1, 300 * b"x")
except OSError as error:
    print(error.errno, file=streams.out)
for _ in range(100):
    print("no room for this")
sys.stderr.flush()
os.close(streams.err.fileno())  # as of a terminal that went away
print("nobody hears this", file=streams.err)
print("still running", file=streams.out)
"""


def test_neither_a_full_log_nor_a_terminal_that_went_away_ends_a_run(tmp_path):
    found = run(FULL, tmp_path)
    assert found.stdout == "27\nstill running\n"  # EFBIG: the log is really full
    assert found.returncode == 0
