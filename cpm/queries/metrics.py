"""
Prometheus metrics, computed from the manager for each request.

Tested in tests/unit/cpm/api/test_recorded_answers.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from cpm.api import handlers, operations
from cpm.api.views import Document
from cpm.core.manager import Manager
from cpm.protocol.escaping import escaped
from cpm.protocol.model import Role
from cpm.queries import nodes, pool, vms


class _Metrics(Collector):
    def __init__(self, manager: Manager, now: float) -> None:
        self._manager = manager
        self._now = now

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        """Yield the metrics; names are escaped here, since the format escapes line breaks and quotation marks only."""
        for family in self._families():
            family.samples = [
                sample._replace(labels={label: escaped(value) for label, value in sample.labels.items()})
                for sample in family.samples
            ]
            yield family

    def _families(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        yield self._vms()
        yield self._vms_lacking_ports()
        yield self._refused_packets()
        yield self._limited_packets()
        yield from self._addresses()
        yield from self._nodes()
        epoch = GaugeMetricFamily("virt_ports_epoch", "Epoch of this manager; grows with each start.")
        epoch.add_metric([], self._manager.epoch)
        yield epoch
        writable = GaugeMetricFamily("virt_ports_ledger_writable", "0 while nothing can be written to the ledger.")
        writable.add_metric([], self._manager.fleet.unwritable is None)
        yield writable
        refused = CounterMetricFamily(
            "virt_ports_refused_decisions", "Decisions refused because they break a rule: bugs."
        )
        refused.add_metric([], self._manager.fleet.refusals.count)
        yield refused
        steps = CounterMetricFamily(
            "virt_ports_clock_steps", "How often the wall clock was set; nothing depends on it."
        )
        steps.add_metric([], sum(step.is_set for step in self._manager.fleet.timeline.steps))
        yield steps

    def _vms(self) -> GaugeMetricFamily:
        domains = GaugeMetricFamily("virt_ports_domains", "VMs by state.", labels=["state"])
        for state, count in Counter(vm.state for vm in vms.summaries(self._manager, self._now, all=True)).items():
            domains.add_metric([state], count)
        return domains

    def _vms_lacking_ports(self) -> GaugeMetricFamily:
        lacking = GaugeMetricFamily(
            "virt_ports_domains_lacking_ports", "VMs that could not get the ports they want.", labels=["want"]
        )
        lacking.add_metric(["start"], len(self._manager.waiting))
        lacking.add_metric(["growth"], self._manager.sizer.contention.waiting_to_grow)
        return lacking

    def _refused_packets(self) -> CounterMetricFamily:
        refused = CounterMetricFamily(
            "virt_ports_domain_refused_packets",
            "Connection attempts answered by ICMP: the VM is at its cap and has no free port.",
            labels=["name", "uuid"],
        )
        for uuid, observation in self._manager.sizer.observed.items():
            if observation.refused_packets and (vm := self._manager.fleet.vms.get(uuid)) is not None:
                refused.add_metric([vm.name, uuid], observation.refused_packets)
        return refused

    def _limited_packets(self) -> CounterMetricFamily:
        limited = CounterMetricFamily(
            "virt_ports_domain_limited_packets",
            "Packets of new connections dropped: the VM has as many as it may have, or begins too many a second.",
            labels=["name", "uuid"],
        )
        for uuid, observation in self._manager.sizer.observed.items():
            if observation.limited_packets and (vm := self._manager.fleet.vms.get(uuid)) is not None:
                limited.add_metric([vm.name, uuid], observation.limited_packets)
        return limited

    def _addresses(self) -> Iterator[GaugeMetricFamily]:
        ports = GaugeMetricFamily(
            "virt_ports_external_ports", "Ports of an external address by use.", labels=["address", "use"]
        )
        longest = GaugeMetricFamily(
            "virt_ports_external_longest_free", "Longest run of free ports.", labels=["address"]
        )
        for view in pool.addresses(self._manager):
            address = str(view.address)
            ports.add_metric([address, "allocated"], view.ports_allocated)
            ports.add_metric([address, "leaving"], view.ports_leaving)
            ports.add_metric([address, "free"], view.ports_total - view.ports_allocated - view.ports_leaving)
            longest.add_metric([address], view.longest_free)
        yield ports
        yield longest

    def _nodes(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        connected = GaugeMetricFamily("virt_ports_node_connected", "1 while a node has a session.", labels=["node"])
        synced = GaugeMetricFamily(
            "virt_ports_node_synced", "1 when it has confirmed everything it was sent.", labels=["node"]
        )
        dropped = CounterMetricFamily(
            "virt_ports_node_dropped_packets", "Packets dropped at a node.", labels=["node", "reason"]
        )
        in_service = GaugeMetricFamily(
            "virt_ports_node_in_service", "1 while hosts send packets to an edge.", labels=["node"]
        )
        behind = GaugeMetricFamily(
            "virt_ports_node_behind_seconds",
            "Seconds since which a node is away or has not confirmed something.",
            labels=["node"],
        )
        held = GaugeMetricFamily(
            "virt_ports_node_held_ports",
            "Ports that were given back and wait for a node that is away or does not answer.",
            labels=["node"],
        )
        for view in filter(lambda view: view.is_known, nodes.node_views(self._manager, self._now)):
            if Role.EDGE in view.roles:
                in_service.add_metric([view.name], view.in_service)
            since = self._manager.edge_service.behind_since(view.name)
            behind.add_metric([view.name], self._now - since if since is not None else 0.0)
            held.add_metric([view.name], view.held_ports)
            connected.add_metric([view.name], view.connected)
            synced.add_metric([view.name], view.synced)
            for reason, count in view.dropped.items():
                dropped.add_metric([view.name, reason], count)
        yield connected
        yield synced
        yield in_service
        yield behind
        yield held
        yield dropped
        yield from self._membership()

    def _membership(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        membership = self._manager.membership
        asking = GaugeMetricFamily(
            "virt_ports_nodes_waiting_for_approval", "Machines that ask for what the operator has not approved."
        )
        asking.add_metric([], len(membership.asked))
        refused = CounterMetricFamily(
            "virt_ports_node_sessions_refused", "Sessions that nodes were refused, by the code of the error.",
            labels=["code"],
        )  # fmt: skip
        for code, count in sorted(membership.refused.items()):
            refused.add_metric([code], count)
        use = GaugeMetricFamily("virt_ports_node_use", "What counts towards a host's quota.", labels=["node", "of"])
        quota = GaugeMetricFamily("virt_ports_node_quota", "What a host may have.", labels=["node", "of"])
        for name, node in sorted(self._manager.fleet.nodes.items()):
            if Role.HOST in node.roles:
                limits = self._manager.quota(node)
                use.add_metric([name, "vms"], self._manager.fleet.use.vms(name))
                use.add_metric([name, "ports"], self._manager.fleet.use.ports(name))
                quota.add_metric([name, "vms"], limits.vms)
                quota.add_metric([name, "ports"], limits.ports)
        yield from (asking, refused, use, quota)


@handlers.query(operations.METRICS)
def exposition(manager: Manager, now: float) -> Document:
    """Return all metrics in the text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Metrics(manager, now))
    return Document(CONTENT_TYPE_LATEST, generate_latest(registry))
