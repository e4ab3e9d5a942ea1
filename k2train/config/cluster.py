"""The knobs of what is told of a run before it starts: the run's, and the machine that it is meant for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

from k2train.config.rules import rule
from k2train.config.schema import RunConfig


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Nodes of equal devices, a process on each. Bandwidths are those of a device in one direction, in bytes a second.

    Peaks and bandwidths are the vendor's; the efficiencies say what share of them programs attain.
    """

    device: str = rule(one_of=("cuda", "cpu"))
    nodes: int = rule(at_least=1)
    devices_per_node: int = rule(at_least=1)
    memory_bytes: float = rule(above=0)  # of a device
    reserved_bytes: float = rule(at_least=0)  # of it: driver, libraries' workspaces, buffers of the network library
    fragmentation: float = rule(at_least=0)  # lost between allocations, as a share of what comes and goes
    bf16_flops: float = rule(above=0)  # a second, dense, accumulated in fp32
    fp32_flops: float = rule(above=0)
    product_efficiency: float = rule(above=0, at_most=1)  # of these, in a model's matrix products
    memory_bandwidth: float = rule(above=0)
    memory_efficiency: float = rule(above=0, at_most=1)
    node_bandwidth: float = rule(above=0)  # to the other devices of the node
    network_bandwidth: float = rule(above=0)  # to other nodes
    network_efficiency: float = rule(above=0, at_most=1)  # of both
    latency: float = rule(at_least=0)  # seconds that a collective takes at least
    host_seconds: float = rule(at_least=0)  # to start the operations of a layer, forward and backward
    dollars_per_hour: float | None = rule(at_least=0)  # of a device; null: no price is known

    @property
    def devices(self) -> int:
        """In all nodes."""
        return self.nodes * self.devices_per_node


@dataclass(frozen=True, kw_only=True)
class ClusterRunConfig(RunConfig):
    """A run, and where it would run."""

    cluster: ClusterConfig = rule()

    def check(self) -> Iterator[str]:
        """Sentences on fields that contradict each other."""
        yield from super().check()
        if self.train.device not in ("auto", self.cluster.device):
            yield (
                f"train.device={self.train.device} but cluster.device={self.cluster.device}: "
                "set train.device=auto, or choose another cluster"
            )


@dataclass(frozen=True, kw_only=True)
class PlanConfig(ClusterRunConfig):
    """All that decides a plan."""

    phase: str | None = rule()  # of schedule.phases that is planned alone; null: all
    search: bool = rule()  # try other ways of splitting the run too, and rank those that fit
    json: bool = rule()  # for programs, in the place of the page
    picture: str | None = rule()  # a file to draw memory and time into, as SVG; null: none

    def check(self) -> Iterator[str]:
        """Sentences on fields that contradict each other."""
        yield from super().check()
        if self.phase is not None and self.phase not in self.schedule.parts():
            yield f"phase={self.phase} is none of the run's: they are {', '.join(self.schedule.parts())}"


@dataclass(frozen=True, kw_only=True)
class RehearseConfig(ClusterRunConfig):
    """A run, and which of its processes is played."""

    rank: int = rule(at_least=0)  # of cluster.nodes x cluster.devices_per_node

    def check(self) -> Iterator[str]:
        """Sentences on fields that contradict each other."""
        yield from super().check()
        if self.rank >= self.cluster.devices:
            yield f"rank={self.rank} is none of the {self.cluster.devices} of the cluster: they begin with 0"
        yield from self.check_world(self.cluster.devices)

    def plan(self) -> PlanConfig:
        """What ``k2train plan`` plans for the same run."""
        same = {field.name: getattr(self, field.name) for field in fields(ClusterRunConfig)}
        return PlanConfig(**same, phase=None, search=False, json=False, picture=None)
