/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Nothing leaves untranslated, whatever becomes of the rules of nftables, and
 * what a host has translated goes to an edge: at the egress of uplinks.
 *
 * At a host, a VM's packet is marked when it comes in (tap.bpf.c), and the
 * rules take the mark away when they have translated it, or when it may leave
 * as it is.
 *
 * At an edge, a source inside the internal pool was not translated.  It is of
 * a packet that the fast path left to nftables.
 *
 * Both are seen while nftables has no rules: somebody flushed them, and natd
 * has not repaired that yet.
 *
 * A host's translated packets were routed like any other.  Here they get an
 * edge as next hop, chosen by a hash over their flow, so that no routing rule
 * has to tell them from others.
 */
#include <linux/if_ether.h>
#include <linux/ip.h>
#include <linux/pkt_cls.h>

#include "kernel.h"

#define MAX_INTERFACES	8
#define MAX_EDGES	16
#define MAX_GATEWAYS	4
#define SENT		0x7414	/* tc_index of what was sent to an edge */

struct settings {
	__be32 pool, mask;		/* of the VMs' internal addresses */
	__u32 mark;			/* bit that is set in packets of VMs; 0: do not look */
	__u32 owner;			/* bits that stay in those that were translated */
	__u32 interface;		/* that leads to the edges */
	__u32 hops;			/* how many edges there are; 0: packets go where they were routed */
	__be32 hop[MAX_EDGES];
	__u64 gateway[MAX_GATEWAYS];	/* hardware addresses of the machine's gateways that are no edges, the last two
					   bytes 0; 0: no more */
	__u32 edge[MAX_INTERFACES];	/* uplinks of the edge; 0: no more */
	__s32 passes;			/* verdict on a packet that goes on: as a filter, the next one is asked; at tcx,
					   nobody is */
	__u32 reserved;
};

const volatile struct settings settings = {};

MAP(dropped) = { BPF_MAP_TYPE_PERCPU_ARRAY, sizeof(__u32), sizeof(__u64), 1, 0 };

static __always_inline int is_one_of(__u32 ifindex, const volatile __u32 interfaces[MAX_INTERFACES])
{
#pragma unroll
	for (int i = 0; i < MAX_INTERFACES; i++)
		if (interfaces[i] == ifindex)
			return 1;
	return 0;
}

static __always_inline int is_inside(struct __sk_buff *skb)
{
	__be32 saddr;

	/* From that header on: before it, some interfaces have none of Ethernet. */
	if (bpf_skb_load_bytes_relative(skb, offsetof(struct iphdr, saddr), &saddr, sizeof(saddr), BPF_HDR_START_NET))
		return 0;
	return (saddr & settings.mask) == settings.pool;
}

static __always_inline int drop(void)
{
	__u32 zero = 0;
	__u64 *packets = bpf_map_lookup_elem(&dropped, &zero);

	if (packets)
		++*packets;
	return TC_ACT_SHOT;
}

static __always_inline int is_for_gateway(struct __sk_buff *skb)
{
	__u64 receiver = 0;

	if (bpf_skb_load_bytes_relative(skb, 0, &receiver, ETH_ALEN, BPF_HDR_START_MAC))
		return 0;
#pragma unroll
	for (int i = 0; i < MAX_GATEWAYS; i++)
		if (settings.gateway[i] && settings.gateway[i] == receiver)
			return 1;
	return 0;
}

static __always_inline int send_to_edge(struct __sk_buff *skb)
{
	struct bpf_redir_neigh hop = {};
	__u32 which = settings.hops > 1 ? bpf_get_hash_recalc(skb) % settings.hops : 0;

	/* It comes here again, without the mark, on its way to the edge. */
	skb->mark &= ~settings.owner;
	skb->tc_index = SENT;
	hop.nh_family = AF_INET;
	hop.ipv4_nh = settings.hop[which % MAX_EDGES];
	return bpf_redirect_neigh(settings.interface, &hop, sizeof(hop), 0);
}

SEC("tc/guard")
int guard(struct __sk_buff *skb)
{
	if (skb->protocol != constant_htons(ETH_P_IP))
		return settings.passes;
	/*
	 * What has been sent to an edge.  A packet that waited for the edge's
	 * hardware address goes to where it was routed before: neigh_update()
	 * asks its route again.
	 */
	if (settings.hops && skb->tc_index == SENT && !(skb->mark & settings.owner) && is_inside(skb))
		return is_for_gateway(skb) ? drop() : settings.passes;
	/*
	 * What this machine sends itself has come in nowhere: with an address of
	 * the pool, an ICMP error about a VM's packet, if edges are to get it.
	 * Else it may be the machine's own address.
	 */
	if (!skb->ingress_ifindex)
		return settings.hops && is_inside(skb) ? send_to_edge(skb) : settings.passes;
	if (skb->mark & settings.mark || (is_one_of(skb->ifindex, settings.edge) && is_inside(skb)))
		return drop();
	return settings.hops && skb->mark & settings.owner && is_inside(skb) ? send_to_edge(skb) : settings.passes;
}
