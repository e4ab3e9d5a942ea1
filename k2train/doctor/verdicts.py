"""From what all ranks found to verdicts: pure functions of lists with an entry for each rank, in order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median_high

from k2train.doctor.data import Data
from k2train.doctor.folders import Folder
from k2train.doctor.machine import Machine
from k2train.doctor.network import Network
from k2train.units import count, memory

OK, WARNING, FAILS = "ok", "warning", "fails"

SLOW = 0.7  # of what is usual among the ranks
BUSY = 0.1  # of a GPU's memory that others may use
SHARED_MEMORY = 2**30  # that NCCL and the readers of data are at ease with; a container has 64 MiB by itself
OPEN_FILES = 4096, 256  # with less there may be too few on a large run, and on any
SKEW = 1.0, 60.0  # seconds
NAMED = 8  # ranks in a sentence


@dataclass(frozen=True)
class Verdict:
    """On one thing that was looked at."""

    about: str
    verdict: str  # ok, warning or fails
    said: str
    remedy: str | None = None


def versions(machines: Sequence[Machine]) -> Verdict:
    """Whether all ranks run the same."""
    usual = dict(Counter(tuple(sorted(m.versions.items())) for m in machines).most_common(1)[0][0])
    faults = []
    for name in sorted({name for m in machines for name in m.versions}):
        others = [rank for rank, m in enumerate(machines) if m.versions.get(name) != usual.get(name)]
        if others:
            there = machines[others[0]].versions.get(name, "missing")
            faults.append(f"{name} is {there} on {ranks(others, machines)} and {usual.get(name, 'missing')} elsewhere")
    if faults:
        return Verdict("versions", FAILS, "; ".join(faults), "use one image, or one clone and .venv, on all hosts")
    return Verdict("versions", OK, ", ".join(f"{name} {version}" for name, version in machines[0].versions.items()))


def devices(machines: Sequence[Machine]) -> Verdict:
    """Whether all ranks have the same, and for themselves."""
    usual = Counter((m.device, m.memory >> 30) for m in machines).most_common(1)[0][0]
    others = [rank for rank, m in enumerate(machines) if (m.device, m.memory >> 30) != usual]
    first = machines[0]
    if others:
        other = machines[others[0]]
        said = (
            f"{ranks(others, machines)}: {other.device} of {memory(other.memory)}; elsewhere {usual[0]}, {usual[1]} GiB"
        )
        return Verdict(
            "devices", WARNING, said, "all ranks wait for the slowest, and the smallest has to hold its share"
        )
    on_cpu = first.device == "CPU"
    busy = [rank for rank, m in enumerate(machines) if not on_cpu and m.free < (1 - BUSY) * m.memory]
    if busy:
        said = f"{memory(machines[busy[0]].free)} of {memory(first.memory)} are free on {ranks(busy, machines)}"
        return Verdict("devices", WARNING, said, "another program is there: look with nvidia-smi, and end it")
    uneven = [r for r, m in enumerate(machines) if (m.processes > m.devices if on_cpu else m.processes < m.devices)]
    if uneven:
        node = machines[uneven[0]]
        said = (
            f"{node.processes} processes for {node.devices} {'cores' if on_cpu else 'GPUs'}: {ranks(uneven, machines)}"
        )
        remedy = "PROCESSES of launch/: one for each GPU, and no more than one for each core"
        return Verdict("devices", WARNING, said, remedy)
    nodes = len({m.host for m in machines})
    said = f"{len(machines)} x {first.device}, {memory(first.memory)}, on {nodes} host{'s' if nodes > 1 else ''}"
    return Verdict("devices", OK, said)


def products(machines: Sequence[Machine]) -> Verdict:
    """Whether a rank computes more slowly than the others."""
    rates = {rank: m.products for rank, m in enumerate(machines)}
    look = "its clock, its cooling and its load"
    return _speed("products", rates, machines, lambda rate: f"{count(2 * rate)}FLOP/s", "attained", look=look)


def shared_memory(machines: Sequence[Machine]) -> Verdict:
    """Whether /dev/shm is large enough."""
    sizes = [m.shared_memory or 0 for m in machines]
    small = [rank for rank, size in enumerate(sizes) if size < SHARED_MEMORY]
    if small:
        said = f"/dev/shm has {memory(sizes[small[0]])} on {ranks(small, machines)}"
        return Verdict(
            "shared memory", WARNING, said, "docker run --shm-size=8g, or an emptyDir of medium Memory there"
        )
    return Verdict("shared memory", OK, f"/dev/shm has {memory(min(sizes))} at least")


def open_files(machines: Sequence[Machine]) -> Verdict:
    """Whether a process may open as many files as it needs."""
    limits = [float("inf") if m.open_files < 0 else m.open_files for m in machines]
    wanted, needed = OPEN_FILES
    few = [rank for rank, limit in enumerate(limits) if limit < wanted]
    if few:
        verdict = FAILS if min(limits) < needed else WARNING
        said = f"{min(limits):.0f} files may be open on {ranks(few, machines)}"
        return Verdict("open files", verdict, said, "ulimit -n 65536, or LimitNOFILE of the service that starts ranks")
    return Verdict("open files", OK, "no limit" if min(limits) == float("inf") else f"{min(limits):,.0f}")


def network(networks: Sequence[Network | None], machines: Sequence[Machine]) -> Verdict:
    """Whether a rank is reached more slowly than the others."""
    found = [one for one in networks if one is not None]
    if not found:
        return Verdict("network", OK, "one process alone")
    reduce, exchange = min(one.all_reduce for one in found), min(one.all_to_all for one in found)
    together = f"all-reduce {memory(reduce)}/s, all-to-all {memory(exchange)}/s of a rank"
    if len(found) == 2:  # whose fault a slow pair is, a third rank would have to tell
        return Verdict("network", OK, together)
    pairs = _speed(
        "network",
        {rank: one.pair for rank, one in enumerate(found)},
        machines,
        lambda rate: f"{memory(rate)}/s",
        "in pairs",
        look="its cable and port",
    )
    return Verdict("network", pairs.verdict, f"{together}; {pairs.said}", pairs.remedy)


def clocks(offsets: Sequence[float], machines: Sequence[Machine]) -> Verdict:
    """Whether all clocks agree: by them it is said which rank failed first."""
    limit, hard = SKEW
    wrong = [rank for rank, offset in enumerate(offsets) if abs(offset) > limit]
    most = max(offsets, key=abs)
    if wrong:
        said = f"the clock of {ranks(wrong, machines)} is {most:+.1f} s off that of rank 0"
        remedy = "chronyc tracking: synchronise the hosts, or the rank that failed first is not told"
        return Verdict("clocks", FAILS if abs(most) > hard else WARNING, said, remedy)
    return Verdict("clocks", OK, f"{1000 * abs(most):.1f} ms apart at most")


def folder(about: str, found: Sequence[Folder], machines: Sequence[Machine], *, needed: float = 0) -> Verdict:
    """Whether all ranks write to a folder and see what others wrote there.

    Args:
        about: what the folder is for.
        found: by all ranks.
        machines: of all ranks.
        needed: bytes that shall be free.
    """
    path = found[0].path
    closed = [rank for rank, one in enumerate(found) if one.fault]
    if closed:
        said = f"{ranks(closed, machines)} cannot write: {found[closed[0]].fault}"
        return Verdict(about, FAILS, said, "look at its owner and mount there, or give a folder that all may write to")
    blind = [rank for rank, one in enumerate(found) if one.unseen]
    if blind:
        blind = [rank for rank in blind if 0 in found[rank].unseen] or blind  # where each sees its own alone: all but 0
        writer, there = found[blind[0]].unseen[0], found[blind[0]].path
        where = "" if there == found[writer].path else f"in {there} "
        said = (
            f"{ranks(blind, machines)} cannot see {where}what {ranks([writer], machines)} wrote to {found[writer].path}"
        )
        return Verdict(about, FAILS, said, "give a folder on a disk that all hosts share, mounted at the same path")
    free = min(one.free for one in found)
    if free < needed:
        said = f"{memory(free)} free in {path}, and a checkpoint takes {memory(needed)}"
        return Verdict(about, FAILS, said, "free some space, or give another folder")
    speeds = [
        _speed(
            about,
            {rank: rate for rank, one in enumerate(found) if (rate := getattr(one, way)) is not None},
            machines,
            lambda rate: f"{memory(rate)}/s",
            way,
            look="its mount and its network",
        )
        for way in ("written", "read")
    ]
    slow = next((speed for speed in speeds if speed.verdict != OK), speeds[0])
    said = f"{path}: {memory(free)} free; {', '.join(speed.said for speed in speeds)}"
    return Verdict(about, slow.verdict, said, slow.remedy)


def data(found: Sequence[Data], machines: Sequence[Machine]) -> Verdict:
    """Whether the data set is there, the same for all ranks, and whole."""
    faults = [rank for rank, one in enumerate(found) if one.fault]
    if faults:
        said = f"{ranks(faults, machines)}: {found[faults[0]].fault}"
        return Verdict("data", FAILS, said, "k2train data show with the same words looks at it on one host")
    first = found[0]
    if first.fingerprint is None:
        return Verdict(
            "data", WARNING, "it is not prepared yet", "k2train prepare with the same words, before GPUs wait"
        )
    others = [rank for rank, one in enumerate(found) if one.fingerprint != first.fingerprint]
    if others:
        said = f"{ranks(others, machines)} read another data set than rank 0"
        return Verdict("data", FAILS, said, "give a folder on a disk that all hosts share")
    sampled = sum(one.sampled for one in found)
    said = f"{count(first.tokens)} tokens in {first.shards:,} shards, of the right size; {sampled} blocks as prepared"
    return Verdict("data", OK, said)


def config(faults: Sequence[str]) -> Iterator[Verdict]:
    """What the config asks for that so many processes cannot do."""
    if not faults:
        yield Verdict("config", OK, "composes, and fits this number of processes")
    for fault in faults:
        remedy = "k2train plan with the same words tells it before a launch; with --search, what divides and fits"
        yield Verdict("config", FAILS, fault, remedy)


def ranks(numbers: Sequence[int], machines: Sequence[Machine]) -> str:
    """Ranks by number and host."""
    named = [f"{number} ({machines[number].host})" for number in numbers[:NAMED]]
    more = f" and {len(numbers) - NAMED} more" if len(numbers) > NAMED else ""
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(named)}{more}"


def _speed(
    about: str,
    rates: Mapping[int, float],
    machines: Sequence[Machine],
    text: Callable[[float], str],
    how: str,
    *,
    look: str,
) -> Verdict:
    """Whether a rank is slower than the others; ``rates`` are by rank."""
    usual = median_high(rates.values())
    slow = sorted((rank for rank, rate in rates.items() if rate < SLOW * usual), key=lambda rank: rates[rank])
    if slow:
        said = f"{ranks(slow, machines)} slow: {text(rates[slow[0]])} {how}, usual {text(usual)}"
        return Verdict(about, WARNING, said, f"all ranks wait for the slowest: look at {look}")
    least, most = text(min(rates.values())), text(max(rates.values()))
    return Verdict(about, OK, f"{least} to {most} {how}" if len(rates) > 1 else f"{least} {how}")
