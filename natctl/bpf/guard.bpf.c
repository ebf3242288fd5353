/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Nothing leaves untranslated, whatever becomes of the rules of nftables: at
 * the egress of uplinks.
 *
 * At an edge, a source inside the internal pool was not translated.  It is of
 * a packet that the fast path left to nftables while nftables had no rules:
 * somebody flushed them, and natd has not repaired that yet.
 *
 * At a host, what is marked as a VM's has such a source when it is translated,
 * or goes to an exempt network.
 */
#include <linux/if_ether.h>
#include <linux/ip.h>
#include <linux/pkt_cls.h>

#include "kernel.h"

struct settings {
	__be32 pool, mask;	/* of the VMs' internal addresses */
	__u32 is_edge;
	__u32 mark;		/* bit that is set in packets of VMs; 0: do not look */
};

const volatile struct settings settings = {};

struct network {
	__u32 prefix;
	__be32 address;
};

/* To these networks VMs send untranslated. */
MAP(exempt) = { BPF_MAP_TYPE_LPM_TRIE, sizeof(struct network), sizeof(__u32), 256, BPF_F_NO_PREALLOC };
MAP(dropped) = { BPF_MAP_TYPE_PERCPU_ARRAY, sizeof(__u32), sizeof(__u64), 1, 0 };

static __always_inline int is_exempt(__be32 address)
{
	struct network network = { 32, address };

	return bpf_map_lookup_elem(&exempt, &network) != 0;
}

SEC("tc/guard")
int guard(struct __sk_buff *skb)
{
	struct iphdr ip;
	__u32 zero = 0;
	__u64 *packets;
	int is_inside;

	/* What this machine sends itself has come in nowhere.  Its own address may be inside the pool. */
	if (skb->protocol != constant_htons(ETH_P_IP) || !skb->ingress_ifindex)
		return TC_ACT_UNSPEC;
	/* From that header on: before it, some interfaces have none of Ethernet. */
	if (bpf_skb_load_bytes_relative(skb, 0, &ip, sizeof(ip), BPF_HDR_START_NET))
		return TC_ACT_UNSPEC;
	is_inside = (ip.saddr & settings.mask) == settings.pool;
	if (!(settings.is_edge && is_inside) &&
	    (!(skb->mark & settings.mark) || is_inside || is_exempt(ip.daddr)))
		return TC_ACT_UNSPEC;
	packets = bpf_map_lookup_elem(&dropped, &zero);
	if (packets)
		++*packets;
	return TC_ACT_SHOT;
}
