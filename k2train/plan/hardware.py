"""How long a cluster takes for products, for reading memory and for collectives: a roofline (Williams et al. 2009)."""

from __future__ import annotations

from dataclasses import dataclass

from k2train.config import ClusterConfig
from k2train.plan.communication import Traffic


@dataclass(frozen=True)
class Hardware:
    """Seconds of operations on one device of a cluster."""

    cluster: ClusterConfig

    def peak(self, *, bf16: bool) -> float:
        """Operations a second."""
        return self.cluster.bf16_flops if bf16 else self.cluster.fp32_flops

    def products(self, flops: float, *, bf16: bool) -> float:
        """Of matrix products."""
        return flops / (self.cluster.product_efficiency * self.peak(bf16=bf16))

    def reading(self, size: float) -> float:
        """Of reading or writing so many bytes of the device's memory."""
        return size / (self.cluster.memory_efficiency * self.cluster.memory_bandwidth)

    def sending(self, one: Traffic) -> float:
        """Of collectives, by the bandwidth terms of rings.

        A reduction or a gather of S bytes sends ``(n - 1) / n S`` through each of n ranks, an all-reduce twice that
        (nccl-tests, doc/PERFORMANCE.md, "bus bandwidth"). Where a group has m ranks on a node, as many rings cross
        its network cards, which gives each rank m times the bandwidth of one, but no more than within the node. An
        all-to-all sends 1/n of its bytes to each rank, over the network or within the node, both at one time.
        """
        n, node = one.ranks, self.cluster.devices_per_node
        together = min(n, max(1, node // one.stride))  # ranks of the group on a node
        efficiency, latency = self.cluster.network_efficiency, one.calls * self.cluster.latency
        inside, outside = self.cluster.node_bandwidth, self.cluster.network_bandwidth
        if one.operation == "all_to_all":
            near, far = one.bytes * (together - 1) / n, one.bytes * (n - together) / n
            return latency + max(near / inside, far / outside) / efficiency
        bandwidth = inside if together == n else min(inside, together * outside)
        rounds = 2 if one.operation == "all_reduce" else 1
        return latency + rounds * one.bytes * (n - 1) / n / bandwidth / efficiency
